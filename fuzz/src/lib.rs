//! The code of the fuzz targets: the same sources as in the tests of ring 1.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    dead_code,
    missing_docs,
    reason = "a target fails by panicking, and does not use all that the tests use"
)]

#[path = "../../boot/tests/fuzz_inputs/mod.rs"]
pub mod fuzz_inputs;
#[path = "../../devices/tests/hostile/scenario/mod.rs"]
pub mod scenario;
