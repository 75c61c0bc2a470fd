//! The subscribers of the loop's event manager besides the devices.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use log::{info, warn};
use vmm_sys_util::epoll::EventSet;

use super::IoLoop;
use super::device::DeviceSubscriber;
use super::running::LoopState;
use crate::button::Button;
use crate::signals::Signals;
use crate::terminal::{self, StopRequest};

/// A descriptor that the I/O thread watches and that is not a device's, such as a listening socket.
pub trait EventSource: Send + Sync {
    /// The descriptor that is watched for reading. Read again after every [`EventSource::ready`].
    fn fd(&self) -> RawFd;

    /// Serves the event. Must not block.
    fn ready(&self);
}

/// A subscriber.
pub(super) enum Subscriber {
    /// Another thread has set flags for the loop.
    Wake(Arc<LoopState>),
    Signals(Signals, SignalActions),
    /// The time-out of a guest that was asked to power off.
    ShutdownTimeout {
        button: Arc<Button>,
        stop: Option<StopRequest>,
    },
    External(External),
    Device(DeviceSubscriber),
}

/// What the process's signals do.
pub(super) struct SignalActions {
    pub(super) stop: StopRequest,
    /// Pressed by the first SIGTERM.
    pub(super) button: Option<Arc<Button>>,
    pub(super) state: Arc<LoopState>,
}

/// The external event source, and its descriptor in the epoll set.
pub(super) struct External {
    source: Arc<dyn EventSource>,
    fd: RawFd,
}

impl External {
    pub(super) fn new(source: Arc<dyn EventSource>) -> Self {
        let fd = source.fd();
        Self { source, fd }
    }

    fn serve(&mut self, ops: &mut EventOps<'_>) {
        self.source.ready();
        let fd = self.source.fd();
        if fd == self.fd {
            return;
        }
        // Fails if it was closed: then it is no longer in the set.
        let _ = ops.remove(Events::empty_raw(self.fd));
        self.fd = fd;
        if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
            warn!("Inspection socket no longer available: {error}");
        }
    }
}

impl SignalActions {
    pub(super) fn act_on(&self, signal: i32) {
        match signal {
            libc::SIGTSTP => terminal::suspend(),
            libc::SIGCONT => terminal::resume(),
            libc::SIGXFSZ => {}
            libc::SIGWINCH => terminal::resized(),
            _ => self.end(signal),
        }
    }

    fn end(&self, signal: i32) {
        // If the guest has stopped already, the loop is waiting for a slow reader of its output.
        self.state.shorten(IoLoop::DRAIN);
        if signal == libc::SIGTERM && self.button.as_ref().is_some_and(|button| button.press()) {
            info!("SIGTERM presses the power button");
        } else {
            info!("Stopping the machine on signal {signal}");
            (self.stop)();
        }
    }
}

impl Subscriber {
    /// The descriptor to watch for reading; `None` for a device, which lists its own.
    pub(super) fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Wake(state) => Some(state.wake.as_raw_fd()),
            Self::Signals(signals, _) => Some(signals.as_raw_fd()),
            Self::ShutdownTimeout { button, .. } => Some(button.as_raw_fd()),
            Self::External(external) => Some(external.fd),
            Self::Device(_) => None,
        }
    }
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match self {
            Self::Wake(state) => {
                // Fails if it was read already.
                let _ = state.wake.read();
            }
            Self::Signals(signals, actions) => {
                signals.take().for_each(|signal| actions.act_on(signal));
            }
            Self::ShutdownTimeout { button, stop } => {
                if button.is_over() {
                    warn!("The guest has not powered off in time: stopping the machine");
                    let _ = stop.as_ref().map(|stop| stop());
                }
            }
            Self::External(external) => external.serve(ops),
            Self::Device(device) => device.serve(events, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // The others are added by the loop, which returns the error.
        if let Self::Device(device) = self {
            device.subscribe(ops);
        }
    }
}
