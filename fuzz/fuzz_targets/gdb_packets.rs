//! Fuzzes what a debugger sends.
#![no_main]

use rvmm::fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::gdb_packets(bytes));
