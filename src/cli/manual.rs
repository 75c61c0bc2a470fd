//! Texts that are generated from the flags: the manual page and the completion scripts.

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use super::command::Cli;

/// The manual page, in roff, of the command with all its verbs.
pub(super) fn page() -> String {
    let mut page = Vec::new();
    // Writing into memory cannot fail.
    let _ = Man::new(Cli::command()).render(&mut page);
    String::from_utf8_lossy(&page).into_owned()
}

/// The completion script for `shell`.
pub(super) fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "rvmm", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}
