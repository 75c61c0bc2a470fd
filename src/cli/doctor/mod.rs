//! The verb `doctor`: what this host supports, with advice for what is missing.
//!
//! `host.rs` reads files, `crate::kvm` queries KVM, `checks.rs` turns facts into lines, `report.rs` prints them; `kernel.rs`
//! lists the limits of each release of Linux.

use std::path::Path;

use crate::cli::output;
use crate::error::{EXIT_HOST, EXIT_OK};
use crate::kvm;

mod checks;
mod host;
mod kernel;
mod report;
mod virtualization;

use host::Host;
use report::Report;

/// Examines this host, prints the report (as JSON if `json`), and returns the exit code: 1 if rvmm cannot run.
pub(super) fn examine(json: bool) -> u8 {
    let host = Host::read(Path::new("/"));
    let kvm = kvm::probe().map_err(|e| output::chain(&e));
    let report = Report::new(checks::all(&host, &kvm));
    let shown = output::show(&if json { report.json() } else { report.text() });
    if report.can_run() || shown != EXIT_OK { shown } else { EXIT_HOST }
}

#[cfg(test)]
mod tests;
