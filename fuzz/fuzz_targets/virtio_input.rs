//! Fuzzes a hostile driver of the virtio device input.
#![no_main]

use rvmm_fuzz::scenario;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| scenario::virtio(scenario::kind::Kind::Input, bytes));
