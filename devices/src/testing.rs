//! Test doubles for everything that devices are connected to, for tests here and in other crates.
//!
//! Each is a handle: clones share their state, so a test keeps one and passes the other on.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::catalog::{BuildError, Device, Wiring};
use crate::config::DeviceConfig;
use crate::console::{ConsoleBackend, Port, Ports};
use crate::device::{Interest, MmioDevice};
use crate::flash::Window;
use crate::irq::{Interrupt, IrqLine, Messages, PendingInterrupt};
use crate::power::{PowerRequest, PowerSwitch};
use crate::rtc::Clock;
use crate::virtio::VirtioMmio;
use crate::virtio::mmio::KICK;
use crate::vmgenid::GenerationControl;

mod captured_log;
mod host;
mod skip;

pub use captured_log::captured_log;
pub use host::MemoryHost;
pub use skip::{leave_out, skip};

/// An interrupt line that records its level and the number of changes.
#[derive(Debug, Clone, Default)]
pub struct TestIrq(Arc<(AtomicBool, AtomicUsize)>);

impl TestIrq {
    /// The line's level.
    #[must_use]
    pub fn is_high(&self) -> bool {
        self.0.0.load(SeqCst)
    }

    /// Number of changes of the level.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.0.1.load(SeqCst)
    }
}

impl IrqLine for TestIrq {
    fn set_level(&self, high: bool) {
        if self.0.0.swap(high, SeqCst) != high {
            self.0.1.fetch_add(1, SeqCst);
        }
    }
}

/// Messages that are recorded: the queue, or `None` for the configuration.
#[derive(Debug, Clone, Default)]
pub struct TestMessages(Arc<Mutex<Vec<Option<u16>>>>);

impl TestMessages {
    /// The messages since the last call, oldest first.
    #[must_use]
    pub fn take(&self) -> Vec<Option<u16>> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl Messages for TestMessages {
    fn used_buffers(&self, queue: u16) {
        lock(&self.0).push(Some(queue));
    }

    fn configuration_changed(&self) {
        lock(&self.0).push(None);
    }

    fn attach_irqfd(&self, _queue: u16, _event: &EventFd) -> bool {
        false
    }
}

/// A power switch that records the requests.
#[derive(Debug, Clone, Default)]
pub struct FakePower(Arc<Mutex<Vec<PowerRequest>>>);

impl FakePower {
    /// All requests so far.
    #[must_use]
    pub fn requests(&self) -> Vec<PowerRequest> {
        lock(&self.0).clone()
    }
}

impl PowerSwitch for FakePower {
    fn request(&self, request: PowerRequest) {
        lock(&self.0).push(request);
    }
}

/// A clock that only the test advances.
#[derive(Debug, Clone, Default)]
pub struct ManualClock(Arc<AtomicU64>);

impl ManualClock {
    /// Sets the time, in nanoseconds since 1970.
    pub fn set_ns(&self, now: u64) {
        self.0.store(now, SeqCst);
    }

    /// Advances the time, by nanoseconds.
    pub fn advance_ns(&self, by: u64) {
        self.0.fetch_add(by, SeqCst);
    }
}

impl Clock for ManualClock {
    fn now_ns(&self) -> u64 {
        self.0.load(SeqCst)
    }
}

/// A console in memory: the test types input, reads the output, and limits the room for output.
///
/// Its descriptors work with epoll: one is readable while there is input, one writable while
/// there is room.
#[derive(Debug, Clone)]
pub struct MemoryConsole(Arc<Mutex<Memory>>);

#[derive(Debug)]
struct Memory {
    connected: bool,
    input: VecDeque<u8>,
    input_ended: bool,
    output: Vec<u8>,
    /// Bytes of output that still fit; `None` for no limit.
    room: Option<usize>,
    failure: Option<ErrorKind>,
    writes: usize,
    size: Option<(u16, u16)>,
    /// Readable: the counter is not zero while there is input.
    readable: EventFd,
    /// Writable: the counter is at its limit while there is no room.
    writable: EventFd,
    /// The counter is not zero after the peer connected or disconnected.
    event_fd: EventFd,
}

impl MemoryConsole {
    /// A connected console without input and with unlimited room.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self(Arc::new(Mutex::new(Memory {
            connected: true,
            input: VecDeque::new(),
            input_ended: false,
            output: Vec::new(),
            room: None,
            failure: None,
            writes: 0,
            size: None,
            readable: event()?,
            writable: event()?,
            event_fd: event()?,
        }))))
    }

    /// Types bytes for the guest.
    pub fn type_in(&self, bytes: &[u8]) {
        self.change(|memory| memory.input.extend(bytes));
    }

    /// Ends the input, after the bytes typed so far.
    pub fn end_input(&self) {
        self.change(|memory| memory.input_ended = true);
    }

    /// Number of bytes typed that the device has not read.
    #[must_use]
    pub fn unread(&self) -> usize {
        lock(&self.0).input.len()
    }

    /// All output so far.
    #[must_use]
    pub fn output(&self) -> Vec<u8> {
        lock(&self.0).output.clone()
    }

    /// Number of writes, successful or not.
    #[must_use]
    pub fn writes(&self) -> usize {
        lock(&self.0).writes
    }

    /// Sets the room for further output in bytes; `None` for no limit.
    pub fn set_room(&self, room: Option<usize>) {
        self.change(|memory| memory.room = room);
    }

    /// Makes every write fail with this error; `None` for none.
    pub fn fail_writes(&self, kind: Option<ErrorKind>) {
        self.change(|memory| memory.failure = kind);
    }

    /// Disconnects the peer.
    pub fn hang_up(&self) {
        self.change(|memory| memory.connected = false);
        drop(lock(&self.0).event_fd.write(1));
    }

    /// Connects a peer again.
    pub fn connect(&self) {
        self.change(|memory| memory.connected = true);
        drop(lock(&self.0).event_fd.write(1));
    }

    /// Changes the state and updates the descriptors.
    fn change<R>(&self, change: impl FnOnce(&mut Memory) -> R) -> R {
        let mut memory = lock(&self.0);
        let result = change(&mut memory);
        signal(&memory.readable, u64::from(!memory.input.is_empty() || memory.input_ended));
        let full = memory.room == Some(0) && memory.failure.is_none();
        signal(&memory.writable, if full { u64::MAX - 1 } else { 0 });
        result
    }
}

impl MemoryConsole {
    /// Makes the console a terminal with this number of columns and rows.
    pub fn set_size(&self, size: (u16, u16)) {
        self.change(|memory| memory.size = Some(size));
    }
}

impl ConsoleBackend for MemoryConsole {
    fn size(&self) -> Option<(u16, u16)> {
        lock(&self.0).size
    }

    fn ports(&self) -> Ports {
        let memory = lock(&self.0);
        let port = |event: &EventFd| match memory.connected {
            true => Port::Poll(event.as_raw_fd()),
            false => Port::Closed,
        };
        Ports {
            input: port(&memory.readable),
            output: port(&memory.writable),
            event_fd: Some(memory.event_fd.as_raw_fd()),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.change(|memory| {
            if memory.input.is_empty() && !memory.input_ended {
                return Err(ErrorKind::WouldBlock.into());
            }
            io::Read::read(&mut memory.input, buffer)
        })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.change(|memory| {
            memory.writes += 1;
            if let Some(kind) = memory.failure {
                return Err(kind.into());
            }
            if !memory.connected {
                return Err(ErrorKind::NotConnected.into());
            }
            let taken = memory.room.map_or(bytes.len(), |room| room.min(bytes.len()));
            if taken == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            memory.room = memory.room.map(|room| room - taken);
            memory.output.extend(bytes.iter().take(taken));
            Ok(taken)
        })
    }

    fn process_event(&mut self) {
        drop(lock(&self.0).event_fd.read());
    }
}

/// A window that accepts every mapping and does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenWindow;

impl Window for OpenWindow {
    fn map(&self, _offset: u64, _host_address: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Builds the device of the text `NAME,key=value,...`, a virtio device with the MMIO transport.
///
/// # Errors
/// [`BuildError::Option`] for a text that is no device, and those of [`DeviceConfig::build`].
pub fn create(text: &str, wiring: Wiring) -> Result<Box<dyn MmioDevice>, BuildError> {
    let config = DeviceConfig::parse(text)
        .map_err(|source| BuildError::Option { model: "of the test", source })?;
    build(&config, wiring)
}

/// As [`create`], of a configuration.
///
/// # Errors
/// Those of [`DeviceConfig::build`].
pub fn build(config: &DeviceConfig, wiring: Wiring) -> Result<Box<dyn MmioDevice>, BuildError> {
    let (memory, irq) = (Arc::clone(&wiring.memory), Arc::clone(&wiring.irq));
    match config.build(wiring)? {
        Device::Mmio(device) => Ok(device),
        Device::Virtio(device) => {
            Ok(Box::new(VirtioMmio::create(device, memory, Interrupt::Line(irq))?))
        }
    }
}

/// Wiring with test doubles for the line, the power switch, the clock and the host, a generation ID that is always the same, and no
/// console.
#[must_use]
pub fn wiring() -> Wiring {
    Wiring {
        irq: Arc::new(TestIrq::default()),
        clock: Arc::new(ManualClock::default()),
        host: Arc::new(MemoryHost::default()),
        window: Arc::new(OpenWindow),
        generation: GenerationControl::with_id([0x5a; 16]).ok(),
        ..Wiring::new(Arc::new(FakePower::default()))
    }
}

/// Dispatches an event to a device as the I/O thread does: the interrupt is driven afterwards.
pub fn dispatch_event(device: &mut dyn MmioDevice, token: u32) {
    device.ready(token);
    let _ = device.take_pending_irq().map(PendingInterrupt::deliver);
}

/// Runs one turn of an I/O loop with only this device: waits up to `timeout_ms` milliseconds for its
/// sources, and calls it for each that is ready. Returns their number: 0 means that the loop is idle.
///
/// # Errors
/// An error of epoll, above all if it does not accept one of the sources.
pub fn turn(device: &mut dyn MmioDevice, timeout_ms: i32) -> io::Result<usize> {
    let epoll = Epoll::new()?;
    for source in device.sources() {
        let events = match source.interest {
            Interest::Read => EventSet::IN,
            Interest::Write => EventSet::OUT,
            Interest::ReadWrite => EventSet::IN | EventSet::OUT,
            // This set is a new one each time, to which every write since the beginning is news.
            Interest::Signal => EventSet::IN,
        };
        let event = EpollEvent::new(events, source.token.into());
        epoll.ctl(ControlOperation::Add, source.fd, event)?;
    }
    let mut events = [EpollEvent::default(); 16];
    let count = loop {
        match epoll.wait(timeout_ms, &mut events) {
            // io_uring's task work in this thread interrupts the wait.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    for event in events.iter().take(count) {
        let token = u32::try_from(event.data()).unwrap_or(u32::MAX);
        for ioevent in device.ioeventfds().iter().filter(|ioevent| KICK | ioevent.value == token) {
            drop(ioevent.event.read());
        }
        dispatch_event(device, token);
    }
    Ok(count)
}

/// Sets an eventfd's counter.
fn signal(event: &EventFd, counter: u64) {
    drop(event.read());
    drop(event.write(counter));
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
