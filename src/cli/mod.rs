//! The command: parses the command line into a [`ValidConfig`] or another task, runs the task,
//! and turns its result into an exit code and at most one message.
//!
//! | file | contents |
//! |---|---|
//! | `command.rs`, `verb.rs`, `texts.rs` | every verb and flag, as clap structs |
//! | `value.rs`, `device.rs`, `size.rs`, `choice.rs` | values of flags |
//! | `usage.rs` | mistakes on the command line, one line each |
//! | `run.rs` | the verb `run`, which is also the command without a verb |
//! | `doctor/` | the verb `doctor` |
//! | `lab/` | the verbs `lab` and `mkpflash`, with the feature `labs` |
//! | `inspect/` | the verbs `info`, `stat`, `regs` and `walk` |
//! | `machines.rs` | the verbs `list`, `stop`, `kill`, `balloon` and `wait` |
//! | `snapshot.rs` | the verbs `pause`, `resume`, `snapshot` and `restore` |
//! | `clone.rs`, `migrate.rs` | the verbs `clone` and `migrate` |
//! | `pager.rs` | the verb `pager` |
//! | `catalog.rs` | `--list-devices` |
//! | `manual.rs` | the manual page and the completion scripts |
//! | `logging.rs`, `output.rs` | the log; standard error and standard output |

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use log::LevelFilter;

use crate::config::ValidConfig;
use crate::error::{EXIT_OK, EXIT_USAGE, Error};
use crate::inspect::{Order, Query};
use crate::trace;

mod catalog;
mod choice;
mod clone;
mod command;
mod device;
mod doctor;
mod inspect;
#[cfg(feature = "labs")]
mod lab;
mod logging;
mod machines;
mod manual;
mod migrate;
mod output;
mod pager;
mod run;
mod snapshot;
mod texts;
mod usage;
mod value;
mod verb;

use command::{Cli, RunArgs, Verb};
use device::DeviceFlag;
use machines::MachinesTask;
use snapshot::OrderTask;
use verb::{MachineArgs, TraceVerb};

/// The task of a command line, independent of clap.
#[derive(Debug)]
enum Task {
    /// Run a machine. Boxed: the other tasks are small.
    Run(Box<ValidConfig>, LevelFilter),
    /// Examine the host.
    Doctor { json: bool },
    /// Run labs, or create a file for one.
    #[cfg(feature = "labs")]
    Lab(lab::LabTask),
    /// Write the report `output` of the trace `file`.
    Report { file: PathBuf, output: PathBuf },
    /// Query a running machine once.
    Ask(inspect::Request),
    /// Give an order to a running machine.
    Give(OrderTask),
    /// List, stop, kill running machines, wait for one, or change its balloon.
    Machines(MachinesTask),
    /// Move a running machine to another process.
    Migrate(migrate::MigrateArgs),
    /// Start clones of a machine that was saved.
    Clone(clone::CloneArgs),
    /// Continue a machine that was saved. Boxed: the other tasks are small.
    Restore(Box<snapshot::RestoreTask>),
    /// Serve the memory of a machine.
    Page(pager::PagerTask),
    /// Show a running machine until it ends.
    Watch(inspect::Request),
    /// Print a text: help, version, the catalog, the manual page, a completion script.
    Show(String),
}

/// Runs the command line `args` (the program's name first) and returns the exit code: see [`crate::error`]. Messages
/// are written to standard error, one line each, requested texts to standard output.
#[must_use]
pub fn main(args: impl Iterator<Item = OsString>) -> u8 {
    // Clap's memory is freed before the machine is built, so that it does not add to the memory of a running guest.
    match task(args, env::var_os("RVMM_LOG")) {
        Ok(Task::Run(config, level)) => run::run(*config, level),
        Ok(Task::Doctor { json }) => doctor::examine(json),
        #[cfg(feature = "labs")]
        Ok(Task::Lab(task)) => lab::perform(task),
        Ok(Task::Report { file, output }) => exit_code(trace::report(&file, &output)),
        Ok(Task::Ask(request)) => inspect::ask(&request),
        Ok(Task::Give(task)) => task.perform(),
        Ok(Task::Machines(task)) => task.perform(),
        Ok(Task::Restore(task)) => task.perform(),
        Ok(Task::Clone(args)) => args.perform(),
        Ok(Task::Migrate(args)) => args.perform(),
        Ok(Task::Page(task)) => task.perform(),
        Ok(Task::Watch(request)) => inspect::watch(&request),
        Ok(Task::Show(text)) => output::show(&text),
        Err(mistake) => {
            output::print_message(&mistake);
            EXIT_USAGE
        }
    }
}

/// Parses the task; the error is the mistake as one line.
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
        #[cfg(feature = "labs")]
        Some(Verb::Labs(verb)) => lab::task(verb, env_level),
        Some(Verb::Trace { verb: TraceVerb::Report { file, output } }) => {
            Ok(Task::Report { file, output })
        }
        Some(Verb::List(args)) => Ok(Task::Machines(MachinesTask::List(args))),
        Some(Verb::Stop(args)) => Ok(Task::Machines(MachinesTask::Stop(args))),
        Some(Verb::Kill(args)) => Ok(Task::Machines(MachinesTask::Kill(args))),
        Some(Verb::Balloon(args)) => Ok(Task::Machines(MachinesTask::Balloon(args))),
        Some(Verb::Wait(args)) => Ok(Task::Machines(MachinesTask::Wait(args))),
        Some(Verb::Info { machine }) => Ok(Task::Ask(request(Query::Info, machine))),
        Some(Verb::Reboot { machine }) => Ok(give(machine, Order::Reset)),
        Some(Verb::Stat { machine }) => Ok(Task::Watch(request(Query::Stat, machine))),
        Some(Verb::Regs { machine }) => Ok(Task::Ask(request(Query::Registers, machine))),
        Some(Verb::Walk { address, hart, machine }) => {
            Ok(Task::Ask(request(Query::Walk { address, hart }, machine)))
        }
        Some(Verb::Pause { machine }) => Ok(give(machine, Order::Pause)),
        Some(Verb::Resume { machine }) => Ok(give(machine, Order::Resume)),
        Some(Verb::Snapshot(args)) => args.task().map(Task::Give),
        Some(Verb::Restore(args)) => args.task(env_level).map(|task| Task::Restore(Box::new(task))),
        Some(Verb::Clone(args)) => Ok(Task::Clone(args)),
        Some(Verb::Migrate(args)) => Ok(Task::Migrate(args)),
        Some(Verb::Pager(args)) => args.task(env_level).map(Task::Page),
        Some(Verb::Completions { shell }) => Ok(Task::Show(manual::completions(shell))),
        Some(Verb::Man) => Ok(Task::Show(manual::page())),
    }
}

fn request(query: Query, machine: MachineArgs) -> inspect::Request {
    inspect::Request { query, target: machine.machine, json: machine.json }
}

fn give(machine: MachineArgs, order: Order) -> Task {
    Task::Give(OrderTask::new(machine, order))
}

/// Reports the error, if there is one, and returns the exit code.
fn exit_code(result: Result<(), Error>) -> u8 {
    match result {
        Ok(()) => EXIT_OK,
        Err(error) => {
            output::print_message(&output::chain(&error));
            error.exit_code()
        }
    }
}

fn run_task(args: RunArgs, env_level: Option<OsString>) -> Result<Task, String> {
    if args.list_devices || args.device.contains(&DeviceFlag::Help) {
        return Ok(Task::Show(catalog::listing()));
    }
    let level = run::level(args.log, env_level)?;
    let is_dump = args.dump_config;
    let config = run::config(args).map_err(|error| output::chain(&error))?;
    if is_dump {
        return config.to_json().map(Task::Show).map_err(|error| error.to_string());
    }
    Ok(Task::Run(Box::new(config), level))
}

#[cfg(test)]
mod tests;
