//! Runs a lab: builds its machines, waits for their end, and checks their output.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};

use super::catalog::{Guest, Lab, Variant};
use super::narrator::Narrator;
use super::setup::{LabOptions, LabSetup, SetupError, set_up};
use super::transcript::{Screen, Transcript, missing};
use crate::error::Error;
use crate::terminal::Console;
use crate::vcpu::stop::StopReason;
use crate::vmm::{Handle, Parts, Running, Vmm};

/// A part of the line that rvmm's own init prints when user space runs.
const INIT_LINE: &str = "user space after";

/// The prompt of the shell that it starts.
const PROMPT: &str = "rvmm# ";

/// The result of a lab.
#[derive(Debug)]
pub enum Outcome {
    /// The guest ended, and every expected line was printed.
    Passed,
    /// The guest ended or was stopped, with this error.
    Failed(String),
    /// The host lacks what the lab needs.
    Skipped(String),
}

/// Runs a variant of a lab, prints the output of guest and hypervisor to `out`, and checks for the expected lines.
///
/// # Errors
/// The machine cannot be built on this host.
pub fn run(
    lab: &Lab,
    variant: &Variant,
    options: &LabOptions,
    out: Box<dyn Write + Send>,
) -> Result<Outcome, Error> {
    let setup = match set_up(lab, variant, options) {
        Ok(setup) => setup,
        Err(SetupError::Host(why)) => return Ok(Outcome::Skipped(why)),
        Err(SetupError::Failed(error)) => return Err(error),
    };
    let transcript = Transcript::new(out);
    let closing_lines = setup.closing_lines;
    let (reason, is_late) = run_machines(lab, setup, options, &transcript)?;
    if is_late {
        return Ok(Outcome::Failed(format!(
            "the guest did not end within {} seconds",
            options.limit_s
        )));
    }
    if reason != StopReason::PowerOff {
        return Ok(Outcome::Failed(reason.to_string()));
    }
    for line in closing_lines {
        transcript.line(line);
    }
    let text = transcript.text();
    let missing = match lab.guest {
        Guest::Pair { .. } => variant.expects.iter().find_map(|line| missing(&text, &[line])),
        _ => missing(&text, variant.expects),
    };
    Ok(match missing {
        None => Outcome::Passed,
        Some(line) => Outcome::Failed(format!("the line {line:?} is missing, or not in its place")),
    })
}

/// Runs the machines. Returns the reason of the first one that did not power off, and true if they were stopped by the time
/// limit.
fn run_machines(
    lab: &Lab,
    setup: LabSetup,
    options: &LabOptions,
    transcript: &Transcript,
) -> Result<(StopReason, bool), Error> {
    let LabSetup { configs, narration, code, _files, _folder, .. } = setup;
    let (mut input, typing) = match lab.guest {
        Guest::Linux => Some(pipe()?).unzip(),
        _ => (None, None),
    };
    let is_pair = configs.len() > 1;
    let harts = configs.first().map_or(1, |config| config.cpus.count);
    let mut machines = Vec::new();
    for config in configs {
        let narrator = Narrator {
            transcript: transcript.clone(),
            narration,
            explains: options.explain,
            code: code.clone(),
            count: AtomicU64::new(0),
            explained: Mutex::default(),
        };
        let screen = Screen::new(transcript, input.take(), is_pair.then(|| config.name.clone()));
        let parts = Parts {
            console: Some(Console { backend: Box::new(screen), pty: None }),
            observer: Some(Arc::new(narrator)),
            ..Parts::default()
        };
        machines.push(Vmm::build_with(config.validate()?, parts)?);
    }
    let running = machines.into_iter().map(Vmm::start).collect::<Result<Vec<_>, Error>>()?;
    let limit = Duration::from_secs(options.limit_s);
    let (ended, end) = channel::<()>();
    let handles: Vec<_> = running.iter().map(Running::handle).collect();
    let watch = thread::Builder::new().name("limit".into()).spawn(move || {
        let is_late = matches!(end.recv_timeout(limit), Err(RecvTimeoutError::Timeout));
        if is_late {
            handles.iter().for_each(Handle::stop);
        }
        is_late
    });
    let watch =
        watch.map_err(|source| Error::Host { what: "Cannot start a thread".into(), source })?;
    // The user thread ends with the machine, whatever has been printed until then.
    let reasons: Vec<_> = thread::scope(|scope| {
        if let Some(typing) = typing {
            let user = thread::Builder::new().name("user".into());
            let user = user.spawn_scoped(scope, move || operate(typing, transcript, harts, limit));
            if let Err(error) = user {
                // The time limit stops the guest then.
                log::warn!("Cannot start the thread that types in the guest: {error}");
            }
        }
        let reasons = running.into_iter().map(Running::wait).collect();
        transcript.end();
        reasons
    });
    drop(ended);
    let is_late = watch.join().unwrap_or(false);
    let reasons = reasons.into_iter().collect::<Result<Vec<_>, Error>>()?;
    let bad = reasons.into_iter().find(|reason| *reason != StopReason::PowerOff);
    Ok((bad.unwrap_or(StopReason::PowerOff), is_late))
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
        .map_err(|e| Error::Host { what: "Cannot create a pipe".into(), source: e.into() })
}

/// Acts as the user of a Linux guest: waits for its prompt, prints a line for the check, and powers it off.
fn operate(typing: OwnedFd, transcript: &Transcript, harts: u32, limit: Duration) {
    let is_up = transcript.wait_for(INIT_LINE, limit)
        && transcript.text().contains(&format!("on {harts} harts"));
    if is_up {
        transcript.line(&format!("user space reached on {harts} harts"));
    }
    // Input before the shell has set up its terminal may be lost. A guest that ignores it is stopped by the time limit.
    transcript.wait_for(PROMPT, limit);
    let _: io::Result<usize> = rustix::io::write(&typing, b"poweroff\n").map_err(Into::into);
}
