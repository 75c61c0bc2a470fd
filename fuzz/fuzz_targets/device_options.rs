//! Fuzzes the text of `--device`.
#![no_main]

use rvmm_fuzz::scenario;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| scenario::chips::options(bytes));
