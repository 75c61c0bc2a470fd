//! The fuzz targets of this crate, by name (`fuzz/fuzz_targets`); the tests here run them with saved inputs and with those of
//! proptest. The fuzz targets of `devices` and `boot` are in those crates' tests.

pub use crate::gdb::testing::run_packets as gdb_packets;
pub use crate::trace::report_from_bytes as trace_report;

/// Runs a fuzz target on an input.
pub type FuzzTarget = fn(&[u8]);

/// The fuzz targets, by name.
pub const TARGETS: [(&str, FuzzTarget); 2] =
    [("gdb_packets", gdb_packets), ("trace_report", trace_report)];

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    /// The inputs in `fuzz/seeds/TARGET.txt`: one per line, in hexadecimal.
    fn seeds(target: &str) -> Vec<Vec<u8>> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/seeds/{target}.txt"));
        let text = fs::read_to_string(&file).unwrap();
        let byte =
            |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        text.lines().map(|line| line.as_bytes().chunks(2).map(byte).collect()).collect()
    }

    #[test]
    fn every_seed_of_the_fuzzers_passes() {
        for (name, target) in TARGETS {
            let seeds = seeds(name);
            assert!(!seeds.is_empty(), "no seeds of {name}");
            seeds.iter().for_each(|seed| target(seed));
        }
    }

    /// A saved input with some of its bytes changed, or random bytes.
    fn input(target: &str) -> impl Strategy<Value = Vec<u8>> {
        let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8);
        let changed =
            (prop::sample::select(seeds(target)), changes).prop_map(|(mut seed, changes)| {
                for (at, byte) in changes {
                    if !seed.is_empty() {
                        *at.get_mut(&mut seed) = byte;
                    }
                }
                seed
            });
        prop_oneof![changed, prop::collection::vec(any::<u8>(), 0..300)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 200, ..ProptestConfig::default() })]

        #[test]
        fn no_bytes_of_a_debugger_do_harm(bytes in input("gdb_packets")) {
            gdb_packets(&bytes);
        }

        #[test]
        fn no_bytes_of_a_trace_do_harm(bytes in input("trace_report")) {
            trace_report(&bytes);
        }
    }
}
