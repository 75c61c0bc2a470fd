//! Tracing of a machine: every exit of every hart in a file, and a report that explains it.
//!
//! | file | what is in it |
//! |---|---|
//! | `record.rs` | [`HartRecorder`]: the record of an exit |
//! | `ring.rs` | the ring between a hart and the writer |
//! | `writer.rs` | the thread that empties the rings into the file |
//! | `format.rs` | Chrome's trace events, and JSON lines |
//! | `report/` | [`report()`]: a page that shows and explains a trace |
//! | `names.rs` | [`DeviceMap`] of devices and their registers; SBI calls and CSRs by name |
//!
//! A hart takes the time when it leaves the guest and when it enters again, and stores eight words: no system
//! call, no lock, no allocation. The writer does everything else. Without a trace the run loop is compiled without any of it
//! ([`Unrecorded`](crate::vcpu::record::Unrecorded)).

mod format;
mod names;
mod record;
mod report;
mod ring;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use format::{Format, Timescale, TraceHeader};
pub use names::DeviceMap;
pub use record::HartRecorder;
pub use report::report;
#[cfg(any(test, fuzzing))]
pub use report::testing::report_from_bytes;
use ring::Ring;
use writer::{Job, Writer};

use crate::config::TraceConfig;
use crate::error::Error;
use crate::vcpu::record::{Ticks, monotonic_ns};

/// Default number of records of a ring, and of all rings together: 64 bytes each.
const RING: u32 = 32_768;
const ALL_RINGS: u32 = 262_144;
/// Minimum default number of records of a ring.
const MIN_RING: u32 = 1024;

/// The subject of a trace.
#[derive(Debug)]
pub struct TracePlan {
    /// The machine's name: letters, digits, `_` and `-`.
    pub name: String,
    /// Number of its harts, which are numbered from 0.
    pub harts: u32,
    /// The clock of the harts.
    pub ticks: Ticks,
    /// The addresses of its devices.
    pub places: DeviceMap,
}

/// A trace that is being written, across reboots. Dropping it completes the file.
#[derive(Debug)]
pub struct Trace {
    rings: Vec<Arc<Ring>>,
    ticks: Ticks,
    every_pc: bool,
    writer: Writer,
    path: PathBuf,
}

impl Trace {
    /// Creates the file and starts its writer.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be created, [`Error::Host`] if the host has no thread left.
    pub fn start(config: &TraceConfig, plan: TracePlan) -> Result<Self, Error> {
        let failed =
            |source| Error::File { verb: "write", path: config.file.to_path_buf(), source };
        // Non-blocking: a named pipe without a reader is an error instead of a hang.
        let open = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&config.file);
        let file = open.map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(io::Error::other("it is not a regular file")));
        }
        let default = (ALL_RINGS / plan.harts.max(1)).clamp(MIN_RING, RING);
        let records = config.ring.unwrap_or(default);
        let rings: Vec<_> = (0..plan.harts).map(|_| Arc::new(Ring::new(records))).collect();
        let start_ns = monotonic_ns();
        let scale = Timescale::new(plan.ticks, start_ns);
        let format = Format::new(config.format(), scale, plan.places);
        let mut text = String::new();
        let header =
            TraceHeader { name: plan.name, harts: plan.harts, start_ns, hz: plan.ticks.hz };
        format.header(&mut text, &header);
        let (ticks, path) = (plan.ticks, config.file.display().to_string());
        let job = Job { file, format, rings: rings.clone(), ticks, text, path };
        let writer = Writer::start(job).map_err(|source| Error::Host {
            what: "Cannot start the writer of the trace".into(),
            source,
        })?;
        Ok(Self { rings, ticks, every_pc: config.pc, writer, path: config.file.to_path_buf() })
    }

    /// Completes the file.
    ///
    /// # Errors
    /// [`Error::File`] if the file lacks recorded exits; it then ends with a whole event, and with the number of missing ones if
    /// there is room for that.
    pub fn finish(self) -> Result<(), Error> {
        let Self { writer, path, .. } = self;
        writer.finish().map_err(|source| Error::File {
            verb: "write all of the trace",
            path,
            source,
        })
    }

    /// The recorder for hart `hart`; `None` for a hart that the machine does not have. One at a time for each hart.
    #[must_use]
    pub fn recorder(&self, hart: u32) -> Option<HartRecorder> {
        let ring = usize::try_from(hart).ok().and_then(|hart| self.rings.get(hart))?;
        Some(HartRecorder::new(Arc::clone(ring), self.ticks, self.every_pc))
    }
}
