//! The command: what stands on the command line becomes a [`ValidConfig`] or another task,
//! the task is done, and its end becomes an exit code and at most one message.
//!
//! | file | what is in it |
//! |---|---|
//! | `command.rs` | every verb and flag, as clap structs |
//! | `value.rs`, `size.rs` | what flags take |
//! | `usage.rs` | a mistake on the command line, in one line |
//! | `run.rs` | the verb `run`, which is also the command without a verb |
//! | `doctor/` | the verb `doctor` |
//! | `catalog.rs` | `--list-devices` |
//! | `manual.rs` | the manual page and the completion scripts |
//! | `logging.rs`, `output.rs` | lines on standard error and standard output |

use std::env;
use std::ffi::OsString;

use clap::Parser;
use log::LevelFilter;

use crate::config::ValidConfig;
use crate::error::{EXIT_OK, EXIT_USAGE};

mod catalog;
mod command;
mod doctor;
mod logging;
mod manual;
mod output;
mod run;
mod size;
mod usage;
mod value;

use command::{Cli, RunArgs, Verb};

/// What a command line asks for, free of everything that took it apart.
#[derive(Debug)]
enum Task {
    /// Run a machine. Boxed: the other tasks are small.
    Run(Box<ValidConfig>, LevelFilter),
    /// Examine the host.
    Doctor { json: bool },
    /// Print a text: help, version, the catalog, the manual page, a completion script.
    Show(String),
}

/// Does what the command line `args` (the program's name first) asks for, and gives the exit code: see
/// [`crate::error`]. Messages go to standard error, one line each, texts that were asked for to standard output.
#[must_use]
pub fn main(args: impl Iterator<Item = OsString>) -> u8 {
    // Clap's memory is given back before the machine is built: a guest should cost what a guest needs.
    match task(args, env::var_os("RVMM_LOG")) {
        Ok(Task::Run(config, level)) => run::run(*config, level),
        Ok(Task::Doctor { json }) => doctor::examine(json),
        Ok(Task::Show(text)) => output::show(&text),
        Err(mistake) => {
            output::complain(&mistake);
            EXIT_USAGE
        }
    }
}

/// The task, or the mistake as one line.
fn task(args: impl Iterator<Item = OsString>, env_level: Option<OsString>) -> Result<Task, String> {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) if error.exit_code() == i32::from(EXIT_OK) => {
            return Ok(Task::Show(error.render().to_string()));
        }
        Err(error) => return Err(usage::line(&error)),
    };
    match cli.verb {
        None => run_task(cli.run, env_level),
        Some(Verb::Run(args)) => run_task(*args, env_level),
        Some(Verb::Doctor { json }) => Ok(Task::Doctor { json }),
        Some(Verb::Completions { shell }) => Ok(Task::Show(manual::completions(shell))),
        Some(Verb::Man) => Ok(Task::Show(manual::page())),
    }
}

fn run_task(args: RunArgs, env_level: Option<OsString>) -> Result<Task, String> {
    if args.list_devices || args.device.iter().any(|device| device == "help") {
        return Ok(Task::Show(catalog::listing()));
    }
    let level = run::level(args.log, env_level)?;
    let config = run::config(args).map_err(|error| output::chain(&error))?;
    Ok(Task::Run(Box::new(config), level))
}

#[cfg(test)]
mod tests;
