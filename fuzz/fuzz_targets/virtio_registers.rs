//! Fuzzes the registers of virtio devices.
#![no_main]

use rvmm_fuzz::scenario;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| scenario::registers(bytes));
