//! Fuzzes a kernel command line, and an archive with a user's paths.
#![no_main]

use rvmm_fuzz::fuzz_inputs;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz_inputs::command_line(bytes));
