//! What a client asks for, and what it learns meanwhile and afterwards.

use serde::{Deserialize, Serialize};

/// How a machine is to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// Milliseconds for which the guest may stand still.
    pub downtime_ms: u32,
    /// After one round the guest runs at the target, and the rest of its memory follows.
    #[serde(default)]
    pub postcopy: bool,
}

impl Default for MigrationRequest {
    fn default() -> Self {
        Self { downtime_ms: 300, postcopy: false }
    }
}

/// The state of a migration after a round over the memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationProgress {
    /// Number of the round, from 1.
    pub round: u32,
    /// Bytes sent so far.
    pub sent: u64,
    /// Bytes of memory that the guest has written meanwhile, which are to be sent again.
    pub left: u64,
    /// Bytes of memory that go over the connection in a second.
    pub per_second: u64,
    /// Per cent of the time for which the harts are held, so that they write less.
    pub throttle: u8,
}

/// A migration that is complete.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationReport {
    /// Number of rounds while the guest ran.
    pub rounds: u32,
    /// Bytes sent, all of them.
    pub sent: u64,
    /// Nanoseconds from the moment when the guest stood still until the target has said that it runs.
    pub downtime_ns: u64,
}
