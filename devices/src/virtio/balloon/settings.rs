//! The options of the balloon.

use std::time::Duration;

use crate::options::{OptionError, Options};

/// Feature bits (section 5.5.3).
pub(super) mod f {
    pub(in super::super) const STATS_VQ: u64 = 1 << 1;
    pub(in super::super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(in super::super) const PAGE_REPORTING: u64 = 1 << 5;
}

pub(super) struct BalloonSettings {
    /// The first target, in pages of 4 KiB.
    pub(super) pages: u32,
    /// Offered features.
    pub(super) features: u64,
    /// Interval for logging the guest's statistics.
    pub(super) stats_every: Option<Duration>,
}

impl BalloonSettings {
    pub(super) fn parse(options: &Options) -> Result<Self, OptionError> {
        let mib = options.parsed::<u32>("size", "a number of MiB")?.unwrap_or(0);
        let Some(pages) = mib.checked_mul((1 << 20) / 4096) else {
            return Err(options.bad_value("size", "a number of MiB up to 16777215"));
        };
        let seconds = options.parsed::<u32>("stats", "a number of seconds")?.filter(|s| *s > 0);
        let bits = [
            (seconds.is_some(), f::STATS_VQ),
            (options.flag("reporting", false)?, f::PAGE_REPORTING),
            (options.flag("deflate_on_oom", true)?, f::DEFLATE_ON_OOM),
        ];
        Ok(Self {
            pages,
            features: bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit),
            stats_every: seconds.map(|seconds| Duration::from_secs(seconds.into())),
        })
    }
}
