//! Flushes of a disk: all that arrive while one runs are served by the next.

use rvmm_devices::virtio::blk::DiskDone;

/// Pending flushes.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    is_running: bool,
    /// Slots that the running flush serves.
    served: Vec<u32>,
    /// Slots that the next one serves.
    waiting: Vec<u32>,
}

impl Flushes {
    /// Adds a slot. True if a flush is to begin for it.
    pub(super) fn add(&mut self, slot: u32) -> bool {
        self.waiting.push(slot);
        !self.is_running
    }

    /// Begins a flush for all slots that wait.
    pub(super) fn begin(&mut self) {
        self.is_running = true;
        self.served.append(&mut self.waiting);
    }

    /// Forgets these slots: none of them is served any more.
    pub(super) fn forget(&mut self, slots: &[u32]) {
        let is_meant = |slot: &u32| slots.contains(slot);
        self.served.retain(|slot| !is_meant(slot));
        self.waiting.retain(|slot| !is_meant(slot));
    }

    /// True if somebody waits for the flush that runs.
    pub(super) fn serves(&self) -> bool {
        !self.served.is_empty()
    }

    /// Ends a flush, whose slots are added to `done`. True if another one is to begin.
    pub(super) fn end(&mut self, is_ok: bool, done: &mut Vec<DiskDone>) -> bool {
        done.extend(self.served.drain(..).map(|slot| DiskDone { slot, is_ok }));
        self.is_running = false;
        !self.waiting.is_empty()
    }
}
