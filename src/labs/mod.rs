//! The labs: exercises of courses on virtualization, each a tiny guest with a question. rvmm runs it like a hypervisor that a
//! student has written, and prints the lines that the course's grader looks for.
//!
//! | file | what is in it |
//! |---|---|
//! | `catalog.rs` | [`LABS`]: question, guest, variants, and the expected lines |
//! | `setup.rs` | the configurations of a lab's machines |
//! | `narrator.rs` | a [`ExitObserver`](crate::vcpu::observer::ExitObserver) that prints events in the labs' words |
//! | `stories.rs` | `--explain`: the parts of hardware, KVM and rvmm in each kind of exit |
//! | `steps.rs` | each lab step by step: actions of each mode and transitions between them |
//! | `picture.rs` | `--picture`: those steps as SVG |
//! | `transcript.rs` | the output of guests and narrator, in order |
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
