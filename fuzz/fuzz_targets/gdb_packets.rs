//! Fuzzes what a debugger sends.
#![no_main]

use rvmm::played;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| played::gdb_packets(bytes));
