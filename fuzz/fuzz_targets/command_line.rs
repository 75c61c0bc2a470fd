//! Fuzzes a kernel command line, and the archive that paths of a user become.
#![no_main]

use rvmm_fuzz::opened;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| opened::command_line(bytes));
