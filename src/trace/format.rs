//! The two formats of a trace, one event a line in both.
//!
//! Chrome's trace event format (the "JSON Array Format" and "Complete Events" of its document), which Perfetto opens, and
//! JSON lines. The fields of an exit are the same: in a Chrome event they are its `args`, so that times keep their last digit.

use std::fmt::Write;

use super::names::{DeviceMap, Subject};
use super::record::{ExitKind, Record};
use crate::config::TraceFormat;
use crate::vcpu::record::Ticks;

/// The version of the fields; readers refuse others.
pub(super) const VERSION: u32 = 1;

/// Converts ticks to CLOCK_MONOTONIC: exact at the start, and by the counter's own rate after it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timescale {
    ticks: u64,
    ns: u64,
    hz: u64,
}

impl Timescale {
    pub(super) fn new(ticks: Ticks, ns: u64) -> Self {
        Self { ticks: (ticks.now)(), ns, hz: ticks.hz.max(1) }
    }

    /// Nanoseconds of CLOCK_MONOTONIC; times before the start become the start.
    pub(super) fn ns(&self, ticks: u64) -> u64 {
        let passed = u128::from(ticks.saturating_sub(self.ticks)) * 1_000_000_000;
        let passed = passed / u128::from(self.hz);
        self.ns.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }
}

/// The header of a trace.
#[derive(Debug, Clone)]
pub(super) struct TraceHeader {
    /// The machine's name: letters, digits, `_` and `-`.
    pub(super) name: String,
    pub(super) harts: u32,
    pub(super) start_ns: u64,
    pub(super) hz: u64,
}

/// Writes events into a text. Writing into a String cannot fail: results are dropped.
#[derive(Debug)]
pub(super) struct Format {
    format: TraceFormat,
    process: u32,
    scale: Timescale,
    places: DeviceMap,
}

impl Format {
    pub(super) fn new(format: TraceFormat, scale: Timescale, places: DeviceMap) -> Self {
        Self { format, process: std::process::id(), scale, places }
    }

    /// Writes the first lines.
    pub(super) fn header(&self, out: &mut String, header: &TraceHeader) {
        let TraceHeader { name, harts, start_ns, hz } = header;
        let fields = format!(
            r#"{{"rvmm_trace":{VERSION},"machine":"{name}","harts":{harts},"start_ns":{start_ns},"ticks_per_second":{hz}}}"#
        );
        if self.format == TraceFormat::Lines {
            let _ = writeln!(out, "{fields}");
            return;
        }
        let id = self.process;
        let _ = writeln!(out, r#"[{{"name":"rvmm_trace","ph":"M","pid":{id},"args":{fields}}},"#);
        let _ = writeln!(
            out,
            r#"{{"name":"process_name","ph":"M","pid":{id},"args":{{"name":"rvmm {name}"}}}},"#
        );
        for hart in 0..*harts {
            let _ = writeln!(
                out,
                r#"{{"name":"thread_name","ph":"M","pid":{id},"tid":{hart},"args":{{"name":"hart {hart}"}}}},"#
            );
        }
    }

    /// Writes an exit.
    pub(super) fn exit(&self, out: &mut String, hart: u32, record: &Record) {
        let (left, entered) = (self.scale.ns(record.left), self.scale.ns(record.entered));
        let subject = Subject::new(record, &self.places);
        if self.format == TraceFormat::Chrome {
            let (kind, cost) = (record.kind.name(), entered.saturating_sub(left));
            let id = self.process;
            let _ = write!(
                out,
                r#"{{"name":"{subject}","cat":"{kind}","ph":"X","ts":{}.{:03},"dur":{}.{:03},"pid":{id},"tid":{hart},"args":"#,
                left / 1000,
                left % 1000,
                cost / 1000,
                cost % 1000
            );
        }
        let _ = write!(out, r#"{{"hart":{hart},"exit_ns":{left},"entry_ns":{entered}"#);
        fields(out, record, &subject);
        out.push_str(if self.format == TraceFormat::Chrome { "}},\n" } else { "}\n" });
    }

    /// Writes the number of exits that did not fit into the ring.
    pub(super) fn lost(&self, out: &mut String, hart: u32, count: u64, now: u64) {
        let ns = self.scale.ns(now);
        let fields = format!(r#"{{"hart":{hart},"exit_ns":{ns},"lost":{count}}}"#);
        if self.format == TraceFormat::Lines {
            let _ = writeln!(out, "{fields}");
            return;
        }
        let _ = writeln!(
            out,
            r#"{{"name":"lost","ph":"i","s":"t","ts":{}.{:03},"pid":{},"tid":{hart},"args":{fields}}},"#,
            ns / 1000,
            ns % 1000,
            self.process
        );
    }

    /// Writes the last line: the numbers of exits that are recorded and missing.
    pub(super) fn end(&self, out: &mut String, recorded: u64, lost: u64) {
        let fields = format!(r#"{{"rvmm_end":{VERSION},"recorded":{recorded},"all_lost":{lost}}}"#);
        if self.format == TraceFormat::Lines {
            let _ = writeln!(out, "{fields}");
            return;
        }
        let id = self.process;
        let _ = writeln!(out, r#"{{"name":"rvmm_end","ph":"M","pid":{id},"args":{fields}}}]"#);
    }
}

/// Writes the fields of an exit after its times. None of them has text of the guest's.
fn fields(out: &mut String, record: &Record, subject: &Subject<'_>) {
    let Record { kind, width, outcome, a, b, c, d, pc, .. } = *record;
    let _ = write!(out, r#","kind":"{}","what":"{subject}""#, kind.name());
    let _ = match kind {
        ExitKind::MmioRead | ExitKind::MmioWrite => {
            if let Some(device) = subject.device() {
                let _ = write!(out, r#","device":"{device}""#);
            }
            if let Some(register) = subject.register() {
                let _ = write!(out, r#","register":"{register}""#);
            }
            write!(out, r#","addr":"{a:#x}","width":{width},"value":"{b:#x}""#)
        }
        ExitKind::Sbi => {
            write!(
                out,
                r#","extension":"{a:#x}","function":"{b:#x}","a0":"{c:#x}","error":{}"#,
                d.cast_signed()
            )
        }
        ExitKind::Csr => {
            write!(
                out,
                r#","csr":"{a:#x}","new_value":"{b:#x}","write_mask":"{c:#x}","value":"{d:#x}""#
            )
        }
        ExitKind::System | ExitKind::Fault => write!(out, r#","value":"{b:#x}""#),
        ExitKind::Debug | ExitKind::Interrupted | ExitKind::Unknown => Ok(()),
    };
    let _ = write!(out, r#","flow":"{outcome}""#);
    if let Some(pc) = pc {
        let _ = write!(out, r#","pc":"{pc:#x}""#);
    }
}
