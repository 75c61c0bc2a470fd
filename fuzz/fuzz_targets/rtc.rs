//! Fuzzes the registers of the RTC.
#![no_main]

use rvmm_fuzz::scenario;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| scenario::chips::rtc(bytes));
