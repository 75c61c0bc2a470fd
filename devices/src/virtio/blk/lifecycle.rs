//! Pause, reset and save of a disk.

use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{Blk, DriverView, NOW, POLL_DELAY, feature};
use crate::config::decode_hex;
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};
use crate::virtio::bucket::LimiterState;
use crate::virtio::{VirtioLifecycle, Work};

/// Time for which a reset waits for the disk, with the device's lock held. After that the driver waits.
const RESET_TIMEOUT: Duration = Duration::from_secs(1);

/// Time for which a pause waits for the requests in the backend.
const PAUSE_TIMEOUT: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 30_000 });

/// The state of a disk. No request is in flight.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlkState {
    /// The cache mode that the driver has chosen.
    is_writeback: bool,
    /// The serial number that the driver may have read, in hexadecimal.
    serial: String,
    limiter: LimiterState,
}

impl VirtioLifecycle for Blk {
    fn pause(&mut self, work: &mut Work<'_>) -> Result<(), PauseError> {
        let start = Instant::now();
        loop {
            self.collect(work);
            if self.abandoned.is_empty() && self.in_flight.iter().all(Option::is_none) {
                let written = self.disk.write_back();
                return written.map_err(|_| PauseError("its disk's tables cannot be written"));
            }
            let left = PAUSE_TIMEOUT.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(PauseError("its disk does not complete a request"));
            }
            self.await_disk(left);
        }
    }

    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.abandon(|_| true, RESET_TIMEOUT);
        if self.disk.is_behind() {
            self.poll_after(POLL_DELAY);
        }
        self.is_starved = false;
        self.state.config.set_writeback(true);
        self.state.has_flush = false;
    }

    fn reopen(&mut self) {}

    fn reset_queue(&mut self, queue: u16) {
        self.abandon(|chain| chain.queue() == queue, RESET_TIMEOUT);
        // Requests of other queues may have completed meanwhile.
        self.poll_after(NOW);
    }

    fn is_quiescent(&self) -> bool {
        self.abandoned.is_empty()
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        let Self {
            queue_sizes: _,
            features: _,
            is_read_only: _,
            id,
            has_chosen_id: _,
            disk: _,
            memory: _,
            limiter,
            poll_timer: _,
            // Empty in a paused device, as are these two.
            in_flight: _,
            free: _,
            abandoned: _,
            // All queues are kicked when the device is resumed.
            is_starved: _,
            done: _,
            data: _,
            // The size is that of the file, and the use of flushes is negotiated.
            state: DriverView { config, has_flush: _ },
        } = self;
        SavedState::of(&BlkState {
            is_writeback: config.is_writeback(),
            serial: id.map(|byte| format!("{byte:02x}")).concat(),
            limiter: limiter.save(),
        })
    }

    fn restore(
        &mut self,
        state: SavedState,
        features: Option<u64>,
        _work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        let BlkState { is_writeback, serial, limiter } = state.read()?;
        let id = decode_hex(&serial).and_then(|bytes| bytes.try_into().ok());
        let id = id.ok_or_else(|| RestoreError::invalid("the serial number"))?;
        // Whatever file the disk is in now: the guest may have found it by this number.
        if !self.has_chosen_id {
            self.id = id;
        }
        self.state.config.set_writeback(is_writeback);
        self.state.has_flush = features.is_some_and(|taken| taken & feature::FLUSH != 0);
        self.limiter.restore(limiter)
    }
}

impl Blk {
    /// Waits until the backend may have completed a request, for `limit` at most.
    fn await_disk(&self, limit: Duration) {
        let limit = if self.disk.is_behind() { limit.min(POLL_DELAY) } else { limit };
        let millis = i32::try_from(limit.as_millis().max(1)).unwrap_or(i32::MAX);
        let waited = Epoll::new().and_then(|epoll| {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, self.disk.fd(), event)?;
            epoll.wait(millis, &mut [EpollEvent::default()])
        });
        // An interrupted wait, or no descriptor left: the caller polls again.
        if waited.is_err() {
            thread::sleep(POLL_DELAY);
        }
    }
}
