//! The labs: exercises of courses on virtualization, each a tiny guest with a question, run by rvmm as a hypervisor of one's own
//! would run it, and printing what its grader looks for.
//!
//! | file | what is in it |
//! |---|---|
//! | `catalog.rs` | [`LABS`]: question, guest, variants, and the lines that must come |
//! | `setup.rs` | from a lab to the machines that run it |
//! | `narrator.rs` | a [`ExitObserver`](crate::vcpu::observer::ExitObserver) that tells what happens in the labs' words |
//! | `stories.rs` | `--explain`: what the hardware, KVM and rvmm did, for each kind of exit |
//! | `steps.rs` | what happens in each lab, step by step: who hands over to whom |
//! | `picture.rs` | `--picture`: those steps as SVG |
//! | `transcript.rs` | what guests and narrator print, in one order |
//! | `run.rs` | running, waiting, checking |
//! | `pflash.rs` | the image of a flash with a program in it |
//!
//! The guests' sources are in `guests/labs`; `build.rs` assembles them.

mod catalog;
mod narrator;
pub mod pflash;
pub mod picture;
mod run;
mod setup;
pub mod steps;
mod stories;
mod transcript;

pub use catalog::{LABS, Lab, Variant};
pub use run::{Outcome, run};
pub use setup::{LabOptions, read};
