//! Fuzzes a user's device tree.
#![no_main]

use rvmm_fuzz::opened;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| opened::device_tree(bytes));
