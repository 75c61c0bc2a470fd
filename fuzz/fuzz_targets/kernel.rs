//! Fuzzes kernel files: Image, ELF, gzip, zstd.
#![no_main]

use rvmm_fuzz::fuzz_inputs;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz_inputs::kernel(bytes));
