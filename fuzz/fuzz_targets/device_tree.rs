//! Fuzzes a user's device tree.
#![no_main]

use rvmm_fuzz::fuzz_inputs;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz_inputs::device_tree(bytes));
