//! A console device's link to its backend: queued output, requested input, and the descriptors that
//! epoll has to watch for both.
//!
//! Output goes into a queue, so that a vCPU thread never waits. It is written to the backend in
//! bursts: by the vCPU thread when the guest reads the state of the line
//! ([`Link::flush`]) or a burst is full, else by the I/O thread within [`FLUSH_AFTER`]. If the backend
//! has no room, the queue waits for `EPOLLOUT`; from [`HELD_FROM`] bytes on the link is busy
//! ([`Link::is_held`]), which throttles the guest.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::time::Duration;

use log::{info, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::console::{ConsoleBackend, Port};
use crate::device::{Interest, Source};
use crate::lifecycle::RestoreError;

const TOKEN_KICK: u32 = 0;
const TOKEN_TIMER: u32 = 1;
const TOKEN_INPUT: u32 = 2;
const TOKEN_OUTPUT: u32 = 3;
const TOKEN_ATTENTION: u32 = 4;

/// The last token that the link uses; those of the device follow.
pub(crate) const LAST_TOKEN: u32 = TOKEN_ATTENTION;

/// Bytes in the queue from which on it is written without waiting for the guest to read the state of the line.
const BURST: usize = 64;

/// Maximum time that output waits for more, if the guest neither fills a burst nor reads the state of the line.
pub(crate) const FLUSH_AFTER: Duration = Duration::from_millis(10);

/// Bytes in the queue from which on the guest is throttled, and down to which it stays so.
pub(crate) const HELD_FROM: usize = 4096;
const HELD_DOWN_TO: usize = 2048;

/// Bytes in the queue beyond which more are dropped: room for a guest that writes although the line is
/// busy, as Linux's console does after 10 ms.
pub(crate) const QUEUE_MAX: usize = 64 * 1024;

/// Room in the device's FIFO from which on input is read again after the FIFO was full, so
/// that a guest reading byte by byte does not wake the I/O thread for each byte.
const RESUME_ROOM: usize = 32;

/// The link; owned by the device, under its lock.
pub(crate) struct Link {
    /// The device's name in the log.
    name: &'static str,

    backend: Box<dyn ConsoleBackend>,
    /// Written by vCPU threads when the set of descriptors to watch has changed.
    kick: EventFd,
    /// Expires when output has waited for [`FLUSH_AFTER`].
    timer: TimerFd,
    timer_armed: bool,

    queue: VecDeque<u8>,
    held: bool,
    /// The backend had no room; the I/O thread waits until it has.
    blocked: bool,
    output_ended: bool,
    input_wanted: bool,
    input_ended: bool,
    /// The state that the I/O thread has seen: input wanted, output blocked.
    announced: (bool, bool),
    counters: Counters,
    /// The loss of output has been logged.
    warned: bool,
}

/// Bytes of output that never reached the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Counters {
    /// Dropped without a peer, or because writing failed.
    lost: u64,
    /// Dropped because the guest wrote while the line was busy.
    overrun: u64,
}

impl Link {
    pub(crate) fn new(name: &'static str, backend: Box<dyn ConsoleBackend>) -> io::Result<Self> {
        Ok(Self {
            name,
            backend,
            kick: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            timer: TimerFd::new()?,
            timer_armed: false,
            queue: VecDeque::new(),
            held: false,
            blocked: false,
            output_ended: false,
            input_wanted: false,
            input_ended: false,
            announced: (false, false),
            counters: Counters::default(),
            warned: false,
        })
    }

    /// Queues a byte of output. Called by vCPU threads.
    pub(crate) fn push(&mut self, byte: u8) {
        if self.queue.len() >= QUEUE_MAX {
            if self.counters.overrun == 0 {
                warn!("{}: the guest sends although the line is busy: output dropped", self.name);
            }
            self.counters.overrun += 1;
            return;
        }
        self.queue.push_back(byte);
        if self.blocked {
            self.held |= self.queue.len() >= HELD_FROM;
        } else if self.queue.len() >= BURST {
            self.flush();
        } else if !self.timer_armed {
            self.arm_timer();
        }
    }

    /// Queues bytes of output, as many as fit without throttling the guest, and returns their number. Writes them at once, except for
    /// a single byte, which waits for more as with [`push`](Self::push). Called by vCPU threads.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.get(..self.output_room()).unwrap_or(bytes);
        match *taken {
            [] => {}
            [byte] => self.push(byte),
            _ => self.extend(taken),
        }
        taken.len()
    }

    /// Number of bytes of output that fit without throttling the guest.
    pub(crate) fn output_room(&self) -> usize {
        HELD_FROM.saturating_sub(self.queue.len())
    }

    /// Queues output, at most [`output_room`](Self::output_room) bytes, and writes as much as the backend accepts.
    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        self.queue.extend(bytes);
        self.flush();
    }

    /// Columns and rows of the terminal, if the backend is one.
    pub(crate) fn size(&self) -> Option<(u16, u16)> {
        self.backend.size()
    }

    /// True if a peer is connected, or the backend needs none.
    pub(crate) fn is_connected(&self) -> bool {
        let ports = self.backend.ports();
        ports.input != Port::Closed || ports.output != Port::Closed
    }

    /// True if there is output that [`flush`](Self::flush) could write.
    pub(crate) fn can_flush(&self) -> bool {
        !self.blocked && !self.queue.is_empty()
    }

    /// Writes as much output as the backend accepts. Called by any thread; free if there is nothing to
    /// do.
    pub(crate) fn flush(&mut self) {
        if self.can_flush() {
            self.write_out();
            self.announce();
        }
    }

    /// The output that the host has not accepted.
    pub(crate) fn pending_output(&self) -> Vec<u8> {
        let Self {
            name: _,
            backend: _,
            kick: _,
            timer: _,
            timer_armed: _,
            queue,
            // In the state of a device that throttles its guest by it.
            held: _,
            // The backend of a restored device tells these anew.
            blocked: _,
            output_ended: _,
            // Set by the device.
            input_wanted: _,
            input_ended: _,
            announced: _,
            counters: _,
            warned: _,
        } = self;
        queue.iter().copied().collect()
    }

    /// Queues the output of a saved device, which throttled its guest if `held`. Nothing is written before [`flush`](Self::flush).
    pub(crate) fn restore_output(&mut self, output: &[u8], held: bool) -> Result<(), RestoreError> {
        if output.len() > QUEUE_MAX {
            return Err(RestoreError::invalid("the length of the output"));
        }
        self.queue.extend(output);
        self.held = held;
        Ok(())
    }

    /// True if no output is queued.
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// True if the line is busy: the guest has to wait before it sends more.
    pub(crate) fn is_held(&self) -> bool {
        self.held
    }

    /// Sets the number of bytes of input that the device can accept now. Called by any thread.
    pub(crate) fn set_room(&mut self, room: usize) {
        if room == 0 {
            self.input_wanted = false;
        } else if room >= RESUME_ROOM {
            self.input_wanted = true;
        }
        self.announce();
    }

    /// The descriptors for the I/O loop to watch now.
    pub(crate) fn list_sources(&self, list: &mut Vec<Source>) {
        let ports = self.backend.ports();
        let read = |fd, token| Source { fd, token, interest: Interest::Read };
        list.extend([
            read(self.kick.as_raw_fd(), TOKEN_KICK),
            read(self.timer.as_raw_fd(), TOKEN_TIMER),
        ]);
        list.extend(ports.event_fd.map(|fd| read(fd, TOKEN_ATTENTION)));
        let reads = self.input_wanted && !self.input_ended;
        let writes = !self.queue.is_empty() && !self.output_ended;
        let mut add = |port, token, interest: Option<Interest>| {
            if let (Port::Poll(fd), Some(interest)) = (port, interest) {
                list.push(Source { fd, token, interest });
            }
        };
        if ports.input == ports.output {
            add(ports.input, TOKEN_INPUT, Interest::of(reads, writes));
        } else {
            add(ports.input, TOKEN_INPUT, Interest::of(reads, false));
            add(ports.output, TOKEN_OUTPUT, Interest::of(false, writes));
        }
    }

    /// Processes a source that may be ready: writes queued output, and reads at most `buffer.len()` bytes of
    /// input, if input is wanted. Called by the I/O thread only. Returns the bytes read.
    pub(crate) fn ready<'b>(&mut self, token: u32, buffer: &'b mut [u8]) -> &'b [u8] {
        match token {
            // Drained; empty if the event was stale.
            TOKEN_KICK => drop(self.kick.read()),
            TOKEN_TIMER => self.disarm_timer(),
            TOKEN_ATTENTION => {
                self.backend.process_event();
                (self.input_ended, self.output_ended) = (false, false);
            }
            _ => {}
        }
        self.write_out();
        let read = self.read_in(buffer);
        // The loop calls `sources` after this: no kick is needed.
        self.announced = self.wanted_lines();
        buffer.get(..read).unwrap_or_default()
    }

    /// Reads input into `buffer`, as much as is available and fits.
    fn read_in(&mut self, buffer: &mut [u8]) -> usize {
        let mut filled = 0;
        while self.input_wanted && !self.input_ended {
            let port = self.backend.ports().input;
            let Some(rest @ [_, ..]) = buffer.get_mut(filled..) else { break };
            if port == Port::Closed {
                break;
            }
            match self.backend.read(rest) {
                Ok(0) => self.input_ended = true,
                Ok(read) => filled += read.min(rest.len()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    info!("{}: console input has ended: {error}", self.name);
                    self.input_ended = true;
                }
            }
            // Epoll reports when a pollable port has more.
            if port != Port::Always {
                break;
            }
        }
        filled
    }

    /// Writes the queue to the backend until the queue is empty or the backend is full.
    fn write_out(&mut self) {
        self.blocked = false;
        while let (bytes @ [_, ..], _) = self.queue.as_slices() {
            if self.output_ended || self.backend.ports().output == Port::Closed {
                self.lose(None);
                break;
            }
            match self.backend.write(bytes) {
                Ok(0) => self.lose(Some(ErrorKind::WriteZero.into())),
                Ok(written) => drop(self.queue.drain(..written.min(bytes.len()))),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.blocked = true;
                    break;
                }
                Err(error) => self.lose(Some(error)),
            }
        }
        self.held &= self.queue.len() > HELD_DOWN_TO;
        // `Port::Always` should never block. There is nothing to poll, so the timer retries.
        if self.blocked && self.backend.ports().output == Port::Always {
            self.arm_timer();
        }
    }

    /// Drops the queued output.
    #[cold]
    fn lose(&mut self, error: Option<io::Error>) {
        if let Some(error) = error {
            // By number: the standard library has no stable error kind for the hang-up of a terminal.
            self.output_ended |= error.raw_os_error() == Some(EIO)
                || matches!(
                    error.kind(),
                    ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected
                );
            if !std::mem::replace(&mut self.warned, true) {
                warn!("{}: cannot write to the console, output is dropped: {error}", self.name);
            }
        }
        self.counters.lost += self.queue.len() as u64;
        self.queue.clear();
    }

    fn wanted_lines(&self) -> (bool, bool) {
        (self.input_wanted && !self.input_ended, self.blocked)
    }

    /// Wakes the I/O thread if the descriptors to watch have changed.
    fn announce(&mut self) {
        let wanted_lines = self.wanted_lines();
        if self.announced != wanted_lines {
            self.announced = wanted_lines;
            // Fails only if the counter is full, and then the thread has been woken.
            drop(self.kick.write(1));
        }
    }

    fn arm_timer(&mut self) {
        // Cannot fail with a valid timer and a valid time.
        self.timer_armed = self.timer.reset(FLUSH_AFTER, None).is_ok();
    }

    /// Setting the timer clears its expiry: it is never read, and so a stale event cannot
    /// block.
    fn disarm_timer(&mut self) {
        self.timer_armed = self.timer.clear().is_err();
    }
}

impl Drop for Link {
    /// Offers the queued output to the backend a last time, without waiting.
    fn drop(&mut self) {
        self.write_out();
        let Counters { lost, overrun } = self.counters;
        let dropped = lost + overrun + self.queue.len() as u64;
        if dropped != 0 {
            info!("{}: {dropped} bytes of console output were dropped", self.name);
        }
    }
}

/// The error for a terminal whose peer is gone; the same on every Linux.
const EIO: i32 = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemoryConsole;

    fn link() -> (Link, MemoryConsole) {
        let console = MemoryConsole::new().unwrap();
        (Link::new("test", Box::new(console.clone())).unwrap(), console)
    }

    fn push(link: &mut Link, bytes: &[u8]) {
        bytes.iter().for_each(|byte| link.push(*byte));
    }

    /// The sources other than the link's own two descriptors and the console's event_fd.
    fn watched(link: &Link) -> Vec<(u32, Interest)> {
        let console = |source: &Source| matches!(source.token, TOKEN_INPUT | TOKEN_OUTPUT);
        let mut sources = Vec::new();
        link.list_sources(&mut sources);
        sources.iter().filter(|source| console(source)).map(|s| (s.token, s.interest)).collect()
    }

    #[test]
    fn a_full_burst_is_written_at_once_and_less_waits_for_a_flush_or_the_timer() {
        let (mut link, console) = link();
        push(&mut link, &[b'a'; BURST - 1]);
        assert_eq!(console.writes(), 0);
        link.push(b'b');
        assert_eq!((console.writes(), console.output().len()), (1, BURST));
        link.push(b'c');
        link.flush();
        assert_eq!((console.writes(), console.output().len()), (2, BURST + 1));
        link.push(b'd');
        assert!(link.timer_armed);
        link.ready(TOKEN_TIMER, &mut []);
        assert!(!link.timer_armed);
        assert_eq!(console.output().len(), BURST + 2);
    }

    #[test]
    fn output_without_room_waits_for_the_console_and_throttles_the_guest() {
        let (mut link, console) = link();
        console.set_room(Some(10));
        push(&mut link, &[b'x'; HELD_FROM + 9]);
        assert!(!link.is_held());
        assert_eq!(watched(&link), [(TOKEN_OUTPUT, Interest::Write)]);
        link.push(b'x');
        assert!(link.is_held());
        assert_eq!(link.kick.read().unwrap(), 1, "one wake for the change, none for the bytes");
        let writes = console.writes();
        link.flush();
        assert_eq!(console.writes(), writes, "no write to a console without room");

        console.set_room(Some(HELD_FROM - HELD_DOWN_TO - 1));
        link.ready(TOKEN_OUTPUT, &mut []);
        assert!(link.is_held());
        console.set_room(Some(1));
        link.ready(TOKEN_OUTPUT, &mut []);
        assert!(!link.is_held());
        console.set_room(None);
        link.ready(TOKEN_OUTPUT, &mut []);
        assert!(link.is_empty());
        assert_eq!(watched(&link), []);
        assert_eq!(console.output(), [b'x'; HELD_FROM + 10]);
    }

    #[test]
    fn output_beyond_the_size_of_the_queue_is_dropped_and_counted() {
        let (mut link, console) = link();
        console.set_room(Some(0));
        push(&mut link, &[b'x'; QUEUE_MAX + 3]);
        assert_eq!(link.counters, Counters { lost: 0, overrun: 3 });
        console.set_room(None);
        link.ready(TOKEN_OUTPUT, &mut []);
        assert_eq!(console.output().len(), QUEUE_MAX);
    }

    #[test]
    fn output_to_a_broken_pipe_is_dropped_and_never_throttles_the_guest() {
        let (mut link, console) = link();
        console.fail_writes(Some(ErrorKind::BrokenPipe));
        push(&mut link, &[b'x'; 10 * BURST]);
        assert!(!link.is_held() && link.is_empty());
        assert_eq!(link.counters.lost, 10 * BURST as u64);
        assert_eq!(console.writes(), 1, "no further write to a broken pipe");
        console.fail_writes(None);
        link.ready(TOKEN_ATTENTION, &mut []);
        push(&mut link, &[b'y'; BURST]);
        assert_eq!(console.output(), [b'y'; BURST]);
    }

    #[test]
    fn output_to_a_full_disk_is_dropped_until_there_is_room() {
        let (mut link, console) = link();
        console.fail_writes(Some(ErrorKind::StorageFull));
        push(&mut link, &[b'x'; 2 * BURST]);
        assert_eq!((link.counters.lost, console.writes()), (2 * BURST as u64, 2));
        console.fail_writes(None);
        push(&mut link, &[b'y'; BURST]);
        assert_eq!(console.output(), [b'y'; BURST]);
    }

    #[test]
    fn without_a_peer_output_is_dropped_and_counted() {
        let (mut link, console) = link();
        console.hang_up();
        push(&mut link, &[b'x'; BURST]);
        assert_eq!((link.counters.lost, console.writes()), (BURST as u64, 0));
        assert!(link.is_empty() && !link.warned);
        console.connect();
        link.ready(TOKEN_ATTENTION, &mut []);
        push(&mut link, &[b'y'; BURST]);
        assert_eq!(console.output(), [b'y'; BURST]);
    }

    #[test]
    fn input_is_watched_while_there_is_room_and_resumes_with_half_of_it() {
        let (mut link, console) = link();
        console.type_in(b"abc");
        assert_eq!(link.ready(TOKEN_INPUT, &mut [0; 8]), b"", "input is not wanted");
        link.set_room(64);
        assert_eq!(watched(&link), [(TOKEN_INPUT, Interest::Read)]);
        assert_eq!(link.ready(TOKEN_KICK, &mut [0; 2]), b"ab");
        link.set_room(64);
        assert!(link.kick.read().is_err(), "no kick without a change");
        link.set_room(0);
        assert_eq!(watched(&link), []);
        link.set_room(RESUME_ROOM - 1);
        assert_eq!(watched(&link), []);
        link.set_room(RESUME_ROOM);
        assert_eq!(watched(&link), [(TOKEN_INPUT, Interest::Read)]);
    }

    #[test]
    fn after_the_end_of_the_input_nothing_is_read_until_a_peer_connects() {
        let (mut link, console) = link();
        console.end_input();
        link.set_room(64);
        assert_eq!(link.ready(TOKEN_INPUT, &mut [0; 8]), b"");
        assert_eq!(watched(&link), []);
        link.ready(TOKEN_ATTENTION, &mut []);
        assert_eq!(watched(&link), [(TOKEN_INPUT, Interest::Read)]);
    }

    #[test]
    fn dropping_the_link_writes_the_queued_output() {
        let (mut link, console) = link();
        push(&mut link, b"bye");
        drop(link);
        assert_eq!(console.output(), b"bye");
    }

    /// A file: never blocks, and epoll does not accept it.
    struct File(&'static [u8]);

    impl ConsoleBackend for File {
        fn ports(&self) -> crate::Ports {
            crate::Ports { input: Port::Always, output: Port::Always, event_fd: None }
        }

        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let few = buffer.len().min(3);
            io::Read::read(&mut self.0, &mut buffer[..few])
        }

        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(ErrorKind::WouldBlock.into())
        }
    }

    #[test]
    fn a_file_is_read_without_being_watched() {
        let mut link = Link::new("test", Box::new(File(b"0123456789"))).unwrap();
        link.set_room(64);
        assert_eq!(link.kick.read().unwrap(), 1);
        assert_eq!(link.ready(TOKEN_KICK, &mut [0; 8]), b"01234567");
        assert_eq!(link.ready(TOKEN_KICK, &mut [0; 64]), b"89");
        assert_eq!(watched(&link), []);
        assert!(link.input_ended);
    }

    #[test]
    fn a_port_that_blocks_although_it_should_not_is_retried_by_the_timer() {
        let mut link = Link::new("test", Box::new(File(b""))).unwrap();
        push(&mut link, &[b'x'; BURST]);
        assert!(link.blocked && link.timer_armed);
        link.ready(TOKEN_TIMER, &mut []);
        assert!(link.blocked && link.timer_armed);
    }
}
