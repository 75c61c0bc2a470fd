//! Fuzzes the packets of a debugger.
#![no_main]

use rvmm::fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::gdb_packets(bytes));
