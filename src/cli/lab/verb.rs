//! The verbs `lab` and `mkpflash` with their flags, as clap structs.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use log::LevelFilter;

use crate::cli::value;

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum LabVerb {
    /// Run an exercise of a course on virtualization, and see what the hardware, KVM and rvmm do
    #[command(after_help = "Example: rvmm lab simple_hv --explain")]
    Lab(Box<LabArgs>),
    /// Create a flash image with one program, for the labs h_2_0 and h_4_0
    #[command(after_help = "Example: rvmm mkpflash program.bin --output pflash.img")]
    Mkpflash {
        /// The program: a flat file
        #[arg(value_name = "FILE")]
        program: PathBuf,
        /// The image, 32 MiB with holes
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
    },
}

#[derive(Debug, Args, Default)]
pub(in crate::cli) struct LabArgs {
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
