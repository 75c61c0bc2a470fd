//! Fuzzes trace files, and those of rvmm's own writer.
#![no_main]

use rvmm::played;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| played::trace_report(bytes));
