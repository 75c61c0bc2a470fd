//! Inputs saved from fuzzing: `fuzz/seeds/TARGET.txt`, one per line, in hexadecimal.

use std::path::Path;

pub(crate) fn of(target: &str) -> Vec<Vec<u8>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../fuzz/seeds/{target}.txt"));
    let text = std::fs::read_to_string(&file).unwrap();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    text.lines().map(|line| line.as_bytes().chunks(2).map(byte).collect()).collect()
}
