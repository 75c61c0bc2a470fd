//! User inputs saved from fuzzing (`fuzz/seeds`), and inputs that proptest generates.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]

mod fuzz_inputs;

use std::path::Path;

use proptest::prelude::*;

/// The inputs in `fuzz/seeds/TARGET.txt`: one per line, in hexadecimal.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../fuzz/seeds/{target}.txt"));
    let text = std::fs::read_to_string(&file).unwrap();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    text.lines().map(|line| line.as_bytes().chunks(2).map(byte).collect()).collect()
}

#[test]
fn every_seed_of_the_fuzzers_is_opened_or_refused() {
    for (name, target) in fuzz_inputs::TARGETS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "no seeds of {name}");
        seeds.iter().for_each(|seed| target(seed));
    }
}

proptest! {
    #[test]
    fn random_bytes_are_opened_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        for (_, target) in fuzz_inputs::TARGETS {
            target(&bytes);
        }
    }
}
