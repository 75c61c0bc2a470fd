//! Fuzzes the registers of the UART.
#![no_main]

use rvmm_fuzz::scenario;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| scenario::chips::uart(bytes));
