//! Fuzzes trace files, including changed ones of rvmm's own writer.
#![no_main]

use rvmm::fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::trace_report(bytes));
