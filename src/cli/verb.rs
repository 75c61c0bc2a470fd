//! The flags of the verbs other than `run`, as clap structs.

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

    /// A variant of the lab; --list shows them
    #[arg(long, value_name = "NAME")]
    pub(super) variant: Option<String>,

    /// Print the lab's steps, and for the first exit at each place in the guest what the hardware, KVM and rvmm did
    #[arg(long)]
    pub(super) explain: bool,

    /// Print the lab's steps as a picture (SVG) instead of running it
    #[arg(long, conflicts_with_all = ["explain", "check", "payload", "save", "kernel"])]
    pub(super) picture: bool,

    /// Grade the lab: print if it passed; the exit code is 0 only if every required line was printed
    #[arg(long)]
    pub(super) check: bool,

    /// Run this flat binary instead of the lab's own guest
    #[arg(long, value_name = "FILE")]
    pub(super) payload: Option<PathBuf>,

    /// Write the lab's own guest to a file instead of running it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["check", "explain", "variant", "payload"])]
    pub(super) save: Option<PathBuf>,

    /// The kernel of a lab with Linux [default: the host's own, from /boot]
    #[arg(long, value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,

    /// Time limit of a lab in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(super) limit: u32,

    /// Level of the log on standard error, as for run
    #[arg(long, value_name = "LEVEL", value_parser = value::level)]
    pub(super) log: Option<LevelFilter>,
}

#[derive(Debug, Subcommand)]
pub(super) enum TraceVerb {
    /// Write a trace as one page of HTML: time lines, kinds, registers, and the slowest exits with explanations
    #[command(after_help = "Example: rvmm trace report exits.json -o exits.html")]
    Report {
        /// The trace
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The page; an existing file is replaced
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
}

/// Selects a running machine and the format of the reply.
#[derive(Debug, Args)]
pub(super) struct MachineArgs {
    /// Its name (--name) or process ID; optional if only one is running
    #[arg(value_name = "MACHINE")]
    pub(super) machine: Option<String>,
    /// Print JSON instead of text, once
    #[arg(long)]
    pub(super) json: bool,
}
