//! Pause, reset and save of a balloon.

use serde::{Deserialize, Serialize};

use super::{Balloon, INFLATE};
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};
use crate::virtio::{Chain, SavedChain, VirtioLifecycle, Work};

/// The state of a balloon.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonState {
    /// The target in pages.
    num_pages: u32,
    /// The pages in the balloon, as the driver reports them.
    actual: u32,
    unfinished: Option<(SavedChain, u32)>,
    unfinished_report: Option<(SavedChain, u32)>,
    stats: Option<SavedChain>,
    is_asked: bool,
}

impl VirtioLifecycle for Balloon {
    fn pause(&mut self, _work: &mut Work<'_>) -> Result<(), PauseError> {
        Ok(())
    }

    fn resume(&mut self) {
        self.set_timer();
        // A request that a pass has left unfinished; an error means that it is readable already.
        let _ = self.resume.write(1);
    }

    fn reset(&mut self) {
        self.active = 0;
        self.unfinished = None;
        self.reports.reset();
        self.stats = None;
        self.is_asked = false;
        self.config.iter_mut().skip(4).for_each(|byte| *byte = 0);
        let _ = self.control.as_ref().map(|control| control.set_actual(0));
        self.set_timer();
    }

    fn reopen(&mut self) {}

    fn reset_queue(&mut self, queue: u16) {
        if queue == INFLATE {
            self.unfinished = None;
        }
        if Some(queue) == self.stats_queue() {
            self.stats = None;
        }
        if Some(queue) == self.reporting_queue() {
            self.reports.reset();
        }
    }

    fn is_quiescent(&self) -> bool {
        true
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        let Self {
            features: _,
            queue_sizes: _,
            memory: _,
            stats_every: _,
            resume: _,
            timer: _,
            control: _,
            has_warned: _,
            ignored: _,
            // Negotiated.
            active: _,
            config,
            unfinished,
            reports,
            stats,
            is_asked,
        } = self;
        let saved = |part: &(Chain, u32)| (part.0.saved(), part.1);
        let [a, b, c, d, e, f, g, h] = *config;
        SavedState::of(&BalloonState {
            num_pages: u32::from_le_bytes([a, b, c, d]),
            actual: u32::from_le_bytes([e, f, g, h]),
            unfinished: unfinished.as_ref().map(saved),
            unfinished_report: reports.unfinished.as_ref().map(saved),
            stats: stats.as_ref().map(Chain::saved),
            is_asked: *is_asked,
        })
    }

    fn restore(
        &mut self,
        state: SavedState,
        features: Option<u64>,
        work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        let BalloonState { num_pages, actual, unfinished, unfinished_report, stats, is_asked } =
            state.read()?;
        self.active = features.unwrap_or(0);
        // A target that was set for this machine meanwhile counts.
        let target = self.control.as_ref().and_then(|control| control.restore(num_pages));
        self.config.iter_mut().zip(num_pages.to_le_bytes()).for_each(|(to, from)| *to = from);
        self.config.iter_mut().skip(4).zip(actual.to_le_bytes()).for_each(|(to, from)| *to = from);
        if target.is_some_and(|pages| self.set_target(pages)) {
            work.config_changed();
        }
        let _ = self.control.as_ref().map(|control| control.set_actual(actual));
        let mut retake = |part: Option<(SavedChain, u32)>| {
            let Some((chain, offset)) = part else { return Ok(None) };
            Ok(work.retake(chain)?.map(|chain| (chain, offset)))
        };
        self.unfinished = retake(unfinished)?;
        self.reports.unfinished = retake(unfinished_report)?;
        self.stats = stats.map(|chain| work.retake(chain)).transpose()?.flatten();
        self.is_asked = is_asked;
        Ok(())
    }
}
