//! The configuration of the balloon.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::Slot;
use crate::config::number::number;

/// Feature bits (section 5.5.3).
pub(super) mod f {
    pub(in super::super) const STATS_VQ: u64 = 1 << 1;
    pub(in super::super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(in super::super) const PAGE_REPORTING: u64 = 1 << 5;
}

number! {
    /// A size of the balloon in MiB: 32 bits of pages of 4 KiB.
    BalloonSize(u32), 0, 16_777_215, 1, "a number of MiB up to 16777215"
}

number! {
    /// An interval in seconds; 0 for never.
    Interval(u32), 0, u32::MAX, 1, "a number of seconds"
}

/// The configuration of a balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// The first target; `None` for 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<BalloonSize>,
    /// Interval for logging the guest's memory statistics; `None` for never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<Interval>,
    /// True to take back pages that the guest reports as free.
    pub reporting: bool,
    /// True if the guest may deflate the balloon when it runs out of memory.
    pub deflate_on_oom: bool,
    /// The slot on the board; `None` for the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self { size: None, stats: None, reporting: false, deflate_on_oom: true, slot: None }
    }
}

impl BalloonConfig {
    /// The first target, in pages of 4 KiB.
    pub(super) fn pages(&self) -> u32 {
        const PAGES_PER_MIB: u32 = (1 << 20) / 4096;
        self.size.map_or(0, BalloonSize::get).saturating_mul(PAGES_PER_MIB)
    }

    /// Offered features.
    pub(super) fn features(&self) -> u64 {
        let bits = [
            (self.stats_every().is_some(), f::STATS_VQ),
            (self.reporting, f::PAGE_REPORTING),
            (self.deflate_on_oom, f::DEFLATE_ON_OOM),
        ];
        bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit)
    }

    /// Interval for logging the guest's statistics.
    pub(super) fn stats_every(&self) -> Option<Duration> {
        let seconds = self.stats.map(Interval::get).filter(|seconds| *seconds > 0);
        seconds.map(|seconds| Duration::from_secs(seconds.into()))
    }
}
