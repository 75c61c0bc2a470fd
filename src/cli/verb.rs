//! The flags of the verbs other than `run`, as clap knows them.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use log::LevelFilter;

use super::value;

#[derive(Debug, Args, Default)]
pub(super) struct LabArgs {
    /// The lab, or all
    #[arg(value_name = "NAME")]
    pub(super) name: Option<String>,

    /// List the labs
    #[arg(long)]
    pub(super) list: bool,

    /// A way to run it; --list has them
    #[arg(long, value_name = "NAME")]
    pub(super) variant: Option<String>,

    /// Tell of the lab's steps, and of the first exit at each place in the guest what the hardware, KVM and rvmm did
    #[arg(long)]
    pub(super) explain: bool,

    /// Print the steps of the lab as a picture (SVG), and run nothing
    #[arg(long, conflicts_with_all = ["explain", "check", "payload", "save", "kernel"])]
    pub(super) picture: bool,

    /// Be a grader: say whether the lab passed; the exit code is 0 only if every line came that must
    #[arg(long)]
    pub(super) check: bool,

    /// Run this flat file instead of the lab's own guest
    #[arg(long, value_name = "FILE")]
    pub(super) payload: Option<PathBuf>,

    /// Write the lab's own guest to a file instead of running it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["check", "explain", "variant", "payload"])]
    pub(super) save: Option<PathBuf>,

    /// The kernel of a lab with Linux [default: the host's own, from /boot]
    #[arg(long, value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,

    /// Seconds that a lab may take
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(super) limit: u32,

    /// What is logged to standard error, as for run
    #[arg(long, value_name = "LEVEL", value_parser = value::level)]
    pub(super) log: Option<LevelFilter>,
}

#[derive(Debug, Subcommand)]
pub(super) enum TraceVerb {
    /// Make one page of HTML of a trace: time lines, kinds, registers, the slowest exits, and what they are
    #[command(after_help = "Example: rvmm trace report exits.json -o exits.html")]
    Report {
        /// The trace
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The page; what is there is replaced
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
}

/// Which running machine is meant, and how the answer is printed.
#[derive(Debug, Args)]
pub(super) struct MachineArgs {
    /// Its name (--name) or its process; may be left out where there is only one
    #[arg(value_name = "MACHINE")]
    pub(super) machine: Option<String>,
    /// Print JSON instead of text, once
    #[arg(long)]
    pub(super) json: bool,
}
