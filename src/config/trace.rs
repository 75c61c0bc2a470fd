//! The settings of a trace.

use rvmm_devices::FilePath;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A trace of every exit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TraceConfig {
    /// The file, created or truncated.
    pub file: FilePath,
    /// Its format; `None` derives it from the file's name.
    pub format: Option<TraceFormat>,
    /// True to record the program counter of every exit, which costs a system call each.
    pub pc: bool,
    /// Number of records in a hart's ring, 64 bytes each, rounded up to a power of two; `None` derives it from the number of harts.
    pub ring: Option<u32>,
}

/// The format of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TraceFormat {
    /// Chrome's trace events, which Perfetto opens.
    Chrome,
    /// JSON lines.
    Lines,
}

impl TraceConfig {
    /// Minimum number of records in a ring.
    pub const MIN_RING: u32 = 64;
    /// Maximum number of records in a ring: 64 MiB per hart.
    pub const MAX_RING: u32 = 1 << 20;

    /// The format: the one that is set; else lines for a name that ends in `.jsonl`, and Chrome's for all others.
    #[must_use]
    pub fn format(&self) -> TraceFormat {
        let is_lines = || self.file.extension().is_some_and(|extension| extension == "jsonl");
        self.format.unwrap_or(if is_lines() { TraceFormat::Lines } else { TraceFormat::Chrome })
    }
}
