//! A kernel for tests: it records its calls, and the test works on the queues in its place.

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{KernelQueue, KernelQueues};
use crate::virtio::{Rings, feature};

/// Queues of a kernel. A clone is a handle to the same ones: a test keeps one and passes on the other.
#[derive(Debug, Clone)]
pub struct FakeKernel(Arc<Mutex<FakeKernelState>>);

#[derive(Debug)]
struct FakeKernelState {
    has: u64,
    taken: Option<u64>,
    queues: Vec<Running>,
    stops: Vec<Vec<u16>>,
    failure: Option<ErrorKind>,
}

/// A queue that the kernel serves.
#[derive(Debug)]
pub struct Running {
    /// Its rings, with the end's queue number.
    pub rings: Rings,
    /// The driver's kicks.
    pub kick: EventFd,
    /// Interrupts the driver.
    pub call: EventFd,
    /// Signals an invalid ring.
    pub error: EventFd,
}

impl Default for FakeKernel {
    fn default() -> Self {
        Self::with_features(feature::TRANSPORT)
    }
}

impl FakeKernel {
    /// Creates a kernel with these features.
    #[must_use]
    pub fn with_features(has: u64) -> Self {
        let (taken, queues, stops, failure) = (None, Vec::new(), Vec::new(), None);
        Self(Arc::new(Mutex::new(FakeKernelState { has, taken, queues, stops, failure })))
    }

    /// The features of the last start.
    #[must_use]
    pub fn taken(&self) -> Option<u64> {
        self.lock().taken
    }

    /// The rings of the queues that run, in the order of their starts.
    #[must_use]
    pub fn rings(&self) -> Vec<Rings> {
        self.lock().queues.iter().map(|queue| queue.rings).collect()
    }

    /// Runs `task` with a queue; `None` if it is not started.
    pub fn with_queue<R>(&self, queue: u16, task: impl FnOnce(&Running) -> R) -> Option<R> {
        self.lock().queues.iter().find(|running| running.rings.queue == queue).map(task)
    }

    /// Takes the calls of `stop` since the last call.
    #[must_use]
    pub fn stops(&self) -> Vec<Vec<u16>> {
        std::mem::take(&mut self.lock().stops)
    }

    /// Makes every start fail with this error; `None` ends that.
    pub fn fail(&self, kind: Option<ErrorKind>) {
        self.lock().failure = kind;
    }

    fn lock(&self) -> MutexGuard<'_, FakeKernelState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KernelQueues for FakeKernel {
    fn features(&self) -> u64 {
        self.lock().has
    }

    fn start(&mut self, features: u64, queues: &[KernelQueue<'_>]) -> io::Result<()> {
        let mut state = self.lock();
        if let Some(kind) = state.failure {
            return Err(kind.into());
        }
        if features & !state.has != 0 {
            return Err(ErrorKind::Unsupported.into());
        }
        state.taken = Some(features);
        for queue in queues {
            state.queues.push(Running {
                rings: queue.rings,
                kick: queue.kick.try_clone()?,
                call: queue.call.try_clone()?,
                error: queue.error.try_clone()?,
            });
        }
        Ok(())
    }

    fn stop(&mut self, queues: &[u16]) {
        let mut state = self.lock();
        state.queues.retain(|running| !queues.contains(&running.rings.queue));
        state.stops.push(queues.to_vec());
    }
}
