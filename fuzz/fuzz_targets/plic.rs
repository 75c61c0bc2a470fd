//! Fuzzes the registers of the PLIC.
#![no_main]

use rvmm_fuzz::scenario;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| scenario::chips::plic(bytes));
