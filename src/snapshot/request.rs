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
}

/// What was saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotReport {
    /// The folder.
    pub folder: FilePath,
    /// Bytes of RAM in it.
    pub memory: u64,
    /// Nanoseconds for which the guest stood still.
    pub paused_ns: u64,
}
