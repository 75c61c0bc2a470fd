//! The flags of verbs other than `run`, as clap structs.

use std::path::PathBuf;

use clap::{Args, Subcommand};

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
