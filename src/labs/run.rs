//! Running a lab: build, wait, say how it ended, look for its lines.

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
use super::setup::{Bench, LabOptions, Obstacle, bench};
use super::transcript::{Screen, Transcript, missing};
use crate::error::Error;
use crate::machine::{Handle, Machine, Parts, Running};
use crate::terminal::Console;
use crate::vcpu::stop::StopReason;

/// What rvmm's own init says of itself when user space is there.
const INIT_LINE: &str = "user space after";

/// What stands in front of a command in the shell that it starts.
const PROMPT: &str = "rvmm# ";

/// How a lab ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest ended, and every line that the lab asks for came.
    Passed,
    /// The guest ended, or was ended, and this is what was wrong.
    Failed(String),
    /// The host lacks what the lab needs.
    Skipped(String),
}

/// Runs a variant of a lab, shows on `out` what guest and hypervisor say, and looks for the lines that must come.
///
/// # Errors
/// The machine cannot be built on this host.
pub fn run(
    lab: &Lab,
    variant: &Variant,
    options: &LabOptions,
    out: Box<dyn Write + Send>,
) -> Result<Outcome, Error> {
    let bench = match bench(lab, variant, options) {
        Ok(bench) => bench,
        Err(Obstacle::Host(why)) => return Ok(Outcome::Skipped(why)),
        Err(Obstacle::Failed(error)) => return Err(error),
    };
    let transcript = Transcript::new(out);
    let farewell = bench.farewell;
    let (reason, is_late) = live(lab, bench, options, &transcript)?;
    if is_late {
        return Ok(Outcome::Failed(format!(
            "the guest did not end within {} seconds",
            options.limit_s
        )));
    }
    if reason != StopReason::PowerOff {
        return Ok(Outcome::Failed(reason.to_string()));
    }
    for line in farewell {
        transcript.line(line);
    }
    let text = transcript.text();
    let missing = match lab.guest {
        Guest::Pair { .. } => variant.expects.iter().find_map(|line| missing(&text, &[line])),
        _ => missing(&text, variant.expects),
    };
    Ok(match missing {
        None => Outcome::Passed,
        Some(line) => {
            Outcome::Failed(format!("the line {line:?} did not come, or not in its place"))
        }
    })
}

/// The machines' lives: why the first one ended that did not power off. The second is true where they were ended since it took too
/// long.
fn live(
    lab: &Lab,
    bench: Bench,
    options: &LabOptions,
    transcript: &Transcript,
) -> Result<(StopReason, bool), Error> {
    let Bench { configs, voice, code, _files, _folder, .. } = bench;
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
            voice,
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
        machines.push(Machine::build_with(config, parts)?);
    }
    let running = machines.into_iter().map(Machine::start).collect::<Result<Vec<_>, Error>>()?;
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
    // The user goes when the machine goes, whatever has come until then.
    let reasons: Vec<_> = thread::scope(|scope| {
        if let Some(typing) = typing {
            let user = thread::Builder::new().name("user".into());
            let user = user.spawn_scoped(scope, move || operate(typing, transcript, harts, limit));
            if let Err(error) = user {
                // The guest is ended by the limit then.
                log::warn!("Nobody types in the guest: {error}");
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
        .map_err(|e| Error::Host { what: "Cannot make a pipe".into(), source: e.into() })
}

/// The user of a Linux guest: waits for its prompt, says what is there, and powers it off.
fn operate(typing: OwnedFd, transcript: &Transcript, harts: u32, limit: Duration) {
    let has_come = transcript.wait_for(INIT_LINE, limit)
        && transcript.text().contains(&format!("on {harts} harts"));
    if has_come {
        transcript.line(&format!("user space reached on {harts} harts"));
    }
    // What is typed before the shell has set its terminal up may be thrown away. A guest that does not take it is ended by the limit.
    transcript.wait_for(PROMPT, limit);
    let _: io::Result<usize> = rustix::io::write(&typing, b"poweroff\n").map_err(Into::into);
}
