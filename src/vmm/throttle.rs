//! Slows a guest down that writes its memory faster than it can be sent: its harts are held for a part of the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::vcpu::Control;

/// Length of a period.
const PERIOD: Duration = Duration::from_millis(20);

/// By how much the held part grows, in per cent, and its maximum.
const STEP: u8 = 20;
const MOST: u8 = 95;

/// Holds the harts for a part of each period, until it is dropped.
pub(super) struct Throttle {
    control: Arc<Control>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    percent: AtomicU8,
    is_over: AtomicBool,
}

impl Throttle {
    /// Holds nothing yet.
    pub(super) fn new(control: Arc<Control>) -> Self {
        Self { control, shared: Arc::default(), thread: None }
    }

    /// The part of the time for which the harts are held, in per cent.
    pub(super) fn percent(&self) -> u8 {
        self.shared.percent.load(SeqCst)
    }

    /// Holds the harts longer. False if they are held for as long as possible already, or the host has no thread for it.
    pub(super) fn increase(&mut self) -> bool {
        let percent = self.percent().saturating_add(STEP).min(MOST);
        if percent == self.percent() {
            return false;
        }
        if self.thread.is_none() {
            let (control, shared) = (Arc::clone(&self.control), Arc::clone(&self.shared));
            let thread = thread::Builder::new().name("throttle".into());
            self.thread = thread.spawn(move || hold(&control, &shared)).ok();
        }
        self.shared.percent.store(percent, SeqCst);
        self.thread.is_some()
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.is_over.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn hold(control: &Arc<Control>, shared: &Shared) {
    while !shared.is_over.load(SeqCst) {
        let held = PERIOD * u32::from(shared.percent.load(SeqCst)) / 100;
        let Some(pause) = control.pause() else { return };
        thread::sleep(held);
        drop(pause);
        thread::sleep(PERIOD - held);
    }
}
