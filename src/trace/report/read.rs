//! Reads a trace, one line at a time. The file is not trusted: lines have a maximum length, errors have the line's number, and
//! texts may differ from what rvmm writes.

use std::borrow::Cow;
use std::io::{self, BufRead, Read};

use serde::Deserialize;

use crate::config::quoted;
use crate::trace::format::VERSION;
use crate::trace::record::ExitKind;

/// Maximum length of a line in bytes. rvmm's own have some 400.
const MAX_LINE: u64 = 4096;

/// Maximum length in characters of the reason why a line is not an event.
const MAX_REASON: usize = 120;

/// Maximum number of harts of a trace: as many as a machine may have.
const MAX_HARTS: u32 = crate::config::MAX_CPUS;

/// The content of a line.
#[derive(Debug, PartialEq)]
pub(super) enum Event<'a> {
    /// The header: the machine's name, its harts and the time at which the trace begins.
    TraceHeader {
        machine: Cow<'a, str>,
        harts: u32,
        start_ns: u64,
    },
    Exit(Exit<'a>),
    /// This many exits of this hart are missing.
    Lost {
        hart: u32,
        count: u64,
    },
    /// The trace is complete.
    End,
    /// A line for other programs.
    Other,
}

/// An exit.
#[derive(Debug, PartialEq)]
pub(super) struct Exit<'a> {
    pub(super) hart: u32,
    pub(super) left_ns: u64,
    pub(super) cost_ns: u64,
    pub(super) kind: ExitKind,
    pub(super) what: Cow<'a, str>,
    pub(super) value: Option<Cow<'a, str>>,
    pub(super) pc: Option<Cow<'a, str>>,
}

/// All fields of all lines. In a Chrome event they are in `args`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Fields<'a> {
    #[serde(borrow)]
    args: Option<Box<Fields<'a>>>,
    rvmm_trace: Option<u32>,
    rvmm_end: Option<u32>,
    machine: Option<Cow<'a, str>>,
    harts: Option<u32>,
    start_ns: Option<u64>,
    hart: Option<u32>,
    lost: Option<u64>,
    exit_ns: Option<u64>,
    entry_ns: Option<u64>,
    kind: Option<Cow<'a, str>>,
    what: Option<Cow<'a, str>>,
    value: Option<Cow<'a, str>>,
    pc: Option<Cow<'a, str>>,
}

/// Calls `take` with the content of each line, in order.
///
/// # Errors
/// A message with the number of the wrong line, or the error of a read.
pub(super) fn events(
    mut file: impl BufRead,
    mut take: impl FnMut(Event<'_>),
) -> Result<(), String> {
    let mut line = Vec::new();
    let mut number = 0_u64;
    let mut has_header = false;
    loop {
        line.clear();
        let read = file.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut line);
        let failed = |error: io::Error| format!("line {} cannot be read: {error}", number + 1);
        if read.map_err(failed)? == 0 {
            break;
        }
        number += 1;
        if line.len() as u64 > MAX_LINE {
            return Err(format!("line {number} is longer than {MAX_LINE} bytes"));
        }
        let event = event(&line).map_err(|what| format!("line {number}: {what}"))?;
        match event {
            Event::Other => continue,
            Event::TraceHeader { .. } if has_header => {
                return Err(format!(
                    "line {number}: there is a second header (are these two traces?)"
                ));
            }
            Event::TraceHeader { .. } => has_header = true,
            _ if !has_header => return Err(no_trace(number)),
            _ => {}
        }
        take(event);
    }
    if has_header { Ok(()) } else { Err(no_trace(number.max(1))) }
}

fn no_trace(line: u64) -> String {
    format!("line {line}: no header of a trace so far (rvmm --trace FILE writes one)")
}

fn event(line: &[u8]) -> Result<Event<'_>, String> {
    let text = std::str::from_utf8(line).map_err(|_| "it is not UTF-8")?;
    // The brackets and commas of an array with one event per line.
    let text = text.trim().trim_start_matches('[').trim_end_matches([',', ']']);
    if text.is_empty() {
        return Ok(Event::Other);
    }
    let fields: Fields<'_> = serde_json::from_str(text)
        .map_err(|error| format!("it is not an event: {}", plain(&error)))?;
    interpret(match fields.args {
        Some(args) => *args,
        None => fields,
    })
}

/// The error without its position, which is relative to the line, and cut to the maximum length, since it may quote the line.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    let text = text.get(..end).unwrap_or_default();
    match text.char_indices().nth(MAX_REASON) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

fn interpret(fields: Fields<'_>) -> Result<Event<'_>, String> {
    if let Some(version) = fields.rvmm_trace {
        if version != VERSION {
            return Err(format!(
                "the trace has version {version}, and this rvmm supports {VERSION} only"
            ));
        }
        let harts = fields.harts.unwrap_or(1);
        let machine = fields.machine.unwrap_or_default();
        return Ok(Event::TraceHeader { machine, harts, start_ns: fields.start_ns.unwrap_or(0) });
    }
    if fields.rvmm_end.is_some() {
        return Ok(Event::End);
    }
    let Some(hart) = fields.hart else { return Ok(Event::Other) };
    if hart >= MAX_HARTS {
        return Err(format!("hart {hart}: a machine has at most {MAX_HARTS}"));
    }
    if let Some(count) = fields.lost {
        return Ok(Event::Lost { hart, count });
    }
    let (Some(kind), Some(left), Some(entered)) = (fields.kind, fields.exit_ns, fields.entry_ns)
    else {
        return Err("an exit without its kind or one of its times".into());
    };
    let known = ExitKind::ALL.into_iter().find(|known| known.name() == kind);
    let kind = known.ok_or_else(|| format!("the kind of exit {} is unknown", quoted(&kind)))?;
    Ok(Event::Exit(Exit {
        hart,
        left_ns: left,
        cost_ns: entered.saturating_sub(left),
        kind,
        what: fields.what.unwrap_or_default(),
        value: fields.value,
        pc: fields.pc,
    }))
}
