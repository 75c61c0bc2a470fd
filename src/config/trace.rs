//! What a user asks for when exits are to be recorded.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A trace of every exit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TraceConfig {
    /// The file, created or truncated.
    pub file: PathBuf,
    /// Its format; by the file's name where nothing is said.
    pub format: Option<TraceFormat>,
    /// The program counter of every exit, for a system call each.
    pub pc: bool,
    /// Records that the ring of a hart holds, 64 bytes each, rounded up to a power of two; by the number of harts where nothing is
    /// said.
    pub ring: Option<u32>,
}

/// The format of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TraceFormat {
    /// Chrome's trace events, which Perfetto opens.
    Chrome,
    /// JSON lines.
    Lines,
}

impl TraceConfig {
    /// The fewest records of a ring.
    pub const LEAST_RING: u32 = 64;
    /// The most records of a ring: 64 MiB a hart.
    pub const MOST_RING: u32 = 1 << 20;

    /// The format: the one that was asked for; else lines for a name that ends in `.jsonl`, and Chrome's for all others.
    #[must_use]
    pub fn format(&self) -> TraceFormat {
        let is_lines = || self.file.extension().is_some_and(|extension| extension == "jsonl");
        self.format.unwrap_or(if is_lines() { TraceFormat::Lines } else { TraceFormat::Chrome })
    }
}
