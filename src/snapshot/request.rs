//! What a client asks for, and what it learns afterwards.

use rvmm_devices::FilePath;
use serde::{Deserialize, Serialize};

/// What is to be saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The folder, which does not exist or is a snapshot that is replaced.
    pub folder: FilePath,
    /// The machine stops afterwards, and does not run in between.
    #[serde(default)]
    pub stop: bool,
    /// Save only what has changed since the last snapshot that was saved this way. The first one is whole.
    #[serde(default)]
    pub diff: bool,
    /// Save most of the memory while the guest runs.
    #[serde(default)]
    pub live: bool,
}

/// What was saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotReport {
    /// The folder.
    pub folder: FilePath,
    /// The folder of the snapshot to which it is the difference; `None` if it is whole.
    pub parent: Option<FilePath>,
    /// Bytes of RAM written.
    pub memory: u64,
    /// Nanoseconds for which the guest stood still.
    pub paused_ns: u64,
}
