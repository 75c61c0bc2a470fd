//! The loop with test devices on pipes and sockets.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, Sender, channel};

use rvmm_devices::{Access, FdtDesc, Interest, MmioDevice, Source, stateless};
use vmm_sys_util::eventfd::EventFd;

use super::*;

/// Far longer than any of these tests takes, so that only a hang fails.
const LONG: Duration = Duration::from_secs(30);

/// The `ready` function of a test device.
type OnReady = Box<dyn FnMut(&mut Vec<Source>, u32) + Send>;

struct Device {
    sources: Vec<Source>,
    on_ready: OnReady,
}

stateless!(Device, |device| device.sources.clear());

impl MmioDevice for Device {
    fn name(&self) -> &'static str {
        "test"
    }
    fn size(&self) -> u64 {
        1
    }
    fn read(&mut self, _offset: u64, _data: &mut [u8]) -> Access {
        Ok(())
    }
    fn write(&mut self, _offset: u64, _data: &[u8]) -> Access {
        Ok(())
    }
    fn fdt(&self) -> Option<FdtDesc> {
        None
    }
    fn list_sources(&self, list: &mut Vec<Source>) {
        list.extend(&self.sources);
    }
    fn ready(&mut self, token: u32) {
        (self.on_ready)(&mut self.sources, token);
    }
}

fn source(fd: &impl AsRawFd, token: u32, interest: Interest) -> Source {
    Source { fd: fd.as_raw_fd(), token, interest }
}

/// A running loop with one device per list of sources.
fn start(devices: Vec<(Vec<Source>, OnReady)>) -> (IoThread, Arc<Bus>) {
    let devices = devices.into_iter().enumerate().map(|(at, (sources, on_ready))| {
        (at as u64, Box::new(Device { sources, on_ready }) as Box<dyn MmioDevice>)
    });
    let bus = Arc::new(Bus::new(devices.collect()).unwrap());
    (IoLoop::new(Arc::clone(&bus)).unwrap().spawn().unwrap(), bus)
}

/// Reads and sends on the available bytes; removes its source at the end of the input.
fn reader(mut stream: UnixStream) -> (Vec<Source>, OnReady, Receiver<Vec<u8>>) {
    stream.set_nonblocking(true).unwrap();
    let sources = vec![source(&stream, 7, Interest::Read)];
    let (sender, receiver) = channel();
    let on_ready: OnReady = Box::new(move |sources, token| {
        assert_eq!(token, 7);
        let mut buffer = [0; 64];
        match stream.read(&mut buffer) {
            Ok(0) => sources.clear(),
            Ok(count) => sender.send(buffer[..count].to_vec()).unwrap(),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    });
    (sources, on_ready, receiver)
}

/// Sends the token, and does not read.
fn idle() -> (OnReady, Receiver<u32>) {
    let (sender, receiver): (Sender<u32>, _) = channel();
    (Box::new(move |_, token| sender.send(token).unwrap()), receiver)
}

/// Two wake-ups of the loop: all earlier events have been served when this returns.
fn settle(io: &IoThread) {
    for _ in 0..2 {
        let before = io.turns();
        io.refresh();
        let start = Instant::now();
        while io.turns() == before {
            assert!(start.elapsed() < LONG, "the loop does not turn");
            thread::yield_now();
        }
    }
}

#[test]
fn input_reaches_the_device_it_is_for() {
    let ((mut far_a, near_a), (mut far_b, near_b)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let (sources_a, ready_a, receiver_a) = reader(near_a);
    let (sources_b, ready_b, receiver_b) = reader(near_b);
    let (io, _bus) = start(vec![(sources_a, ready_a), (sources_b, ready_b)]);
    far_b.write_all(b"for b").unwrap();
    assert_eq!(receiver_b.recv_timeout(LONG).unwrap(), b"for b");
    far_a.write_all(b"for a").unwrap();
    assert_eq!(receiver_a.recv_timeout(LONG).unwrap(), b"for a");
    io.stop(Duration::ZERO).unwrap();
}

#[test]
fn an_idle_loop_sleeps() {
    let (_far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, _receiver) = reader(near);
    let (io, _bus) = start(vec![(sources, on_ready)]);
    settle(&io);
    let before = io.turns();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(io.turns(), before);
}

#[test]
fn each_signal_is_reported_once_although_nobody_reads_its_counter() {
    let event = EventFd::new(0).unwrap();
    let (on_ready, receiver) = idle();
    let (io, _bus) = start(vec![(vec![source(&event, 3, Interest::Signal)], on_ready)]);
    for _ in 0..3 {
        event.write(1).unwrap();
        assert_eq!(receiver.recv_timeout(LONG).unwrap(), 3);
        settle(&io);
        receiver.try_recv().unwrap_err();
    }
    io.stop(Duration::ZERO).unwrap();
}

#[test]
fn the_end_of_an_input_is_handled_once() {
    let (far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, receiver) = reader(near);
    let (io, _bus) = start(vec![(sources, on_ready)]);
    settle(&io);
    drop(far);
    receiver.recv_timeout(Duration::from_millis(50)).unwrap_err();
    settle(&io);
    assert!(io.turns() < 20, "{} turns", io.turns());
}

#[test]
fn a_hang_up_that_nobody_handles_is_muted() {
    // The write end of a full pipe without a reader: an error, and never writable.
    let (reader, mut writer) = io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[0; 4096]).is_ok() {}
    drop(reader);
    let (on_ready, receiver) = idle();
    let (io, bus) = start(vec![(vec![source(&writer, 1, Interest::Write)], on_ready)]);
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), 1, "the device is called");
    settle(&io);
    assert!(io.turns() < 20, "{} turns", io.turns());
    assert!(receiver.try_recv().is_err(), "and called once");
    // The device still works.
    assert_eq!(bus.with_device(0, |device| device.sources().len()), Some(1));
}

#[test]
fn a_device_may_change_its_sources() {
    let (_far, near) = UnixStream::pair().unwrap();
    let number = near.as_raw_fd();
    let (sender, receiver) = channel();
    // Always writable: the device removes its source after three times.
    let mut count = 0;
    let on_ready: OnReady = Box::new(move |sources, token| {
        let _held = &near;
        count += 1;
        sender.send((count, token)).unwrap();
        *sources = match count {
            1 | 2 => vec![Source { fd: number, token: count, interest: Interest::ReadWrite }],
            _ => vec![Source { fd: number, token: count, interest: Interest::Read }],
        };
    });
    let first = Source { fd: number, token: 0, interest: Interest::Write };
    let (io, _bus) = start(vec![(vec![first], on_ready)]);
    for expected in [(1, 0), (2, 1), (3, 2)] {
        assert_eq!(receiver.recv_timeout(LONG).unwrap(), expected);
    }
    settle(&io);
    assert!(receiver.try_recv().is_err());
}

#[test]
fn a_descriptor_that_was_closed_and_one_of_the_same_number_are_told_apart() {
    let (mut far, near) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let number = near.as_raw_fd();
    let (sender, receiver) = channel();
    let mut stream = Some(near);
    let on_ready: OnReady = Box::new(move |sources, _| {
        let mut buffer = [0; 8];
        match stream.as_mut().map(|stream| stream.read(&mut buffer)) {
            Some(Ok(0)) => {
                // Closed here; the list no longer has it.
                stream = None;
                sources.clear();
                sender.send(None).unwrap();
            }
            Some(Ok(count)) => sender.send(Some(count)).unwrap(),
            _ => {}
        }
    });
    let (io, bus) =
        start(vec![(vec![Source { fd: number, token: 0, interest: Interest::Read }], on_ready)]);
    far.write_all(b"abc").unwrap();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), Some(3));
    drop(far);
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), None);
    settle(&io);
    assert_eq!(bus.with_device(0, |device| device.sources()), Some(vec![]));
    io.stop(Duration::ZERO).unwrap();
}

#[test]
fn a_descriptor_that_a_reset_closed_does_not_block_the_next_of_its_number() {
    // Numbers that no other test reaches, so that the second descriptor gets the first's.
    let high = |stream: &UnixStream| rustix::io::fcntl_dupfd_cloexec(stream, 600).unwrap();
    let (_far, near) = UnixStream::pair().unwrap();
    let closed = high(&near);
    drop(near);
    let number = closed.as_raw_fd();
    let (on_ready, _receiver) = idle();
    // The first device is reset on a hart's thread; the second accepts a connection.
    let (mut client, accepted) = UnixStream::pair().unwrap();
    let (connecting, listening) = UnixStream::pair().unwrap();
    let listener = source(&listening, 0, Interest::Read);
    let (sender, receiver) = channel();
    let mut stream: Option<UnixStream> = None;
    let accept: OnReady = Box::new(move |sources, token| {
        if token == 0 {
            (&listening).read_exact(&mut [0]).unwrap();
            let new = UnixStream::from(high(&accepted));
            sender.send(format!("{}", new.as_raw_fd())).unwrap();
            sources.push(source(&new, 1, Interest::Read));
            stream = Some(new);
        } else if let Some(stream) = &mut stream {
            let mut received = [0; 5];
            stream.read_exact(&mut received).unwrap();
            sender.send(String::from_utf8_lossy(&received).into_owned()).unwrap();
        }
    });
    let (io, bus) =
        start(vec![(vec![source(&closed, 0, Interest::Read)], on_ready), (vec![listener], accept)]);
    settle(&io);
    bus.with_device(0, |device| {
        device.reset();
        drop(closed);
    });
    (&connecting).write_all(b"!").unwrap();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), number.to_string());
    client.write_all(b"hello").unwrap();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), "hello");
    io.stop(Duration::ZERO).unwrap();
}

#[test]
fn a_file_among_the_sources_is_left_out_and_the_loop_goes_on() {
    let file = tempfile::tempfile().unwrap();
    let (mut far, near) = UnixStream::pair().unwrap();
    let (mut sources, on_ready, receiver) = reader(near);
    sources.insert(0, source(&file, 1, Interest::Read));
    let (_io, _bus) = start(vec![(sources, on_ready)]);
    far.write_all(b"x").unwrap();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), b"x");
}

#[test]
fn a_refresh_finds_sources_that_were_added_from_outside() {
    let (mut far, near) = UnixStream::pair().unwrap();
    let (sources, mut on_ready, receiver) = reader(near);
    let known = Arc::new(Mutex::new(Vec::new()));
    struct Late(Arc<Mutex<Vec<Source>>>, OnReady);
    stateless!(Late);
    impl MmioDevice for Late {
        fn name(&self) -> &'static str {
            "late"
        }
        fn size(&self) -> u64 {
            1
        }
        fn read(&mut self, _offset: u64, _data: &mut [u8]) -> Access {
            Ok(())
        }
        fn write(&mut self, _offset: u64, _data: &[u8]) -> Access {
            Ok(())
        }
        fn fdt(&self) -> Option<FdtDesc> {
            None
        }
        fn list_sources(&self, list: &mut Vec<Source>) {
            list.extend(self.0.lock().unwrap().iter());
        }
        fn ready(&mut self, token: u32) {
            (self.1)(&mut self.0.lock().unwrap(), token);
        }
    }
    let wrapped: OnReady = Box::new(move |sources, token| on_ready(sources, token));
    let device: Box<dyn MmioDevice> = Box::new(Late(Arc::clone(&known), wrapped));
    let bus = Arc::new(Bus::new(vec![(0, device)]).unwrap());
    let io = IoLoop::new(bus).unwrap().spawn().unwrap();
    settle(&io);
    *known.lock().unwrap() = sources;
    far.write_all(b"late").unwrap();
    io.refresh();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), b"late");
}

/// A device with output that its full socket does not accept, and the reading end.
fn owing() -> (Vec<Source>, OnReady, UnixStream) {
    let (mut writer, reader) = UnixStream::pair().unwrap();
    writer.set_nonblocking(true).unwrap();
    while writer.write(&[0; 4096]).is_ok() {}
    let sources = vec![source(&writer, 0, Interest::Write)];
    let on_ready: OnReady = Box::new(move |sources, _| {
        if writer.write(b"last words").is_ok() {
            sources.clear();
        }
    });
    (sources, on_ready, reader)
}

#[test]
fn a_stop_waits_for_pending_output_but_not_for_ever() {
    let (sources, on_ready, mut reader) = owing();
    let (io, bus) = start(vec![(sources, on_ready)]);
    settle(&io);
    let stopping = thread::spawn(move || io.stop(LONG));
    let mut text = Vec::new();
    let mut buffer = [0; 65536];
    while !text.ends_with(b"last words") {
        let count = reader.read(&mut buffer).unwrap();
        text.extend_from_slice(&buffer[..count]);
    }
    stopping.join().unwrap().unwrap();
    assert_eq!(bus.with_device(0, |device| device.sources().len()), Some(0));

    let (sources, on_ready, _nobody_reads) = owing();
    let (io, _bus) = start(vec![(sources, on_ready)]);
    let start = Instant::now();
    io.stop(Duration::from_millis(20)).unwrap();
    assert!(start.elapsed() < LONG);
}

#[test]
fn a_signal_shortens_the_wait_for_output_but_ends_no_loop_that_was_not_stopped() {
    let state = Arc::new(LoopState::new().unwrap());
    let stops = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&stops);
    let stop: StopRequest = Arc::new(move || {
        seen.fetch_add(1, Ordering::Relaxed);
    });
    let actions = SignalActions { stop, button: None, state: Arc::clone(&state) };
    actions.act_on(libc::SIGTERM);
    assert_eq!((state.deadline(), stops.load(Ordering::Relaxed)), (None, 1));

    let late = Instant::now() + LONG;
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        *state.deadline.lock().unwrap() = Some(late);
        actions.act_on(signal);
        let soon = state.deadline().unwrap();
        assert!(soon <= Instant::now() + IoLoop::DRAIN, "{signal}");
        actions.act_on(signal);
        assert_eq!(state.deadline(), Some(soon), "a second one does not give it more time");
    }
    // `stop` is called for each signal, also by a loop that is being stopped for a reboot.
    assert_eq!(stops.load(Ordering::Relaxed), 9);
}

/// A loop that has started, and the receiver of its failure.
fn watched(mut io: IoLoop) -> (IoThread, Receiver<String>) {
    let (sender, receiver) = channel();
    io.watch_failure(Box::new(move |what| sender.send(what).unwrap()));
    (io.spawn().unwrap(), receiver)
}

#[test]
fn a_loop_whose_epoll_fails_reports_it_and_one_that_is_stopped_does_not() {
    let new = || IoLoop::new(Arc::new(Bus::new(Vec::new()).unwrap())).unwrap();
    let mut broken = new();
    // epoll_wait(2) fails with EINVAL if there is room for no event.
    broken.manager = EventManager::new_with_capacity(0).unwrap();
    let (_thread, receiver) = watched(broken);
    let what = receiver.recv_timeout(LONG).unwrap();
    assert!(what.starts_with("The I/O thread failed: "), "{what}");
    let (thread, receiver) = watched(new());
    thread.stop(Duration::ZERO).unwrap();
    assert!(receiver.recv().is_err());
}

#[test]
fn a_loop_whose_device_panics_reports_it() {
    let bell = EventFd::new(0).unwrap();
    bell.write(1).unwrap();
    let sources = vec![source(&bell, 0, Interest::Read)];
    let device = Device { sources, on_ready: Box::new(|_, _| panic!("on purpose")) };
    let bus = Bus::new(vec![(0, Box::new(device) as Box<dyn MmioDevice>)]).unwrap();
    let (thread, receiver) = watched(IoLoop::new(Arc::new(bus)).unwrap());
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), "The I/O thread panicked");
    thread.stop(Duration::ZERO).unwrap_err();
}

#[test]
fn two_loops_run_in_one_process_and_end_by_being_dropped() {
    let (mut far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, receiver) = reader(near);
    let (first, _first_bus) = start(vec![]);
    let (second, _second_bus) = start(vec![(sources, on_ready)]);
    drop(first);
    far.write_all(b"x").unwrap();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), b"x");
    drop(second);
}

#[test]
fn a_paused_loop_delivers_no_event_until_it_is_resumed() {
    let (mut far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, receiver) = reader(near);
    let (io, _bus) = start(vec![(sources, on_ready)]);
    far.write_all(b"before").unwrap();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), b"before");
    io.pause(Duration::ZERO);
    io.pause(Duration::ZERO);
    far.write_all(b"meanwhile").unwrap();
    // The loop still runs: it serves what is not a device's.
    let turns = io.turns();
    io.refresh();
    while io.turns() == turns {
        thread::yield_now();
    }
    assert!(receiver.try_recv().is_err());
    io.resume();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), b"meanwhile");
    io.pause(Duration::ZERO);
    io.stop(Duration::ZERO).unwrap();
}

#[test]
fn a_paused_loop_that_is_stopped_at_rest_delivers_what_waits_to_nobody() {
    let (mut far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, receiver) = reader(near);
    let (io, _bus) = start(vec![(sources, on_ready)]);
    io.pause(Duration::ZERO);
    far.write_all(b"meanwhile").unwrap();
    io.stop_at_rest().unwrap();
    assert!(receiver.try_recv().is_err());
}

#[test]
fn a_device_that_was_added_is_watched_and_one_that_was_removed_is_not() {
    let (io, bus) = start(Vec::new());
    settle(&io);
    let (mut far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, receiver) = reader(near);
    let index = bus.add(7, Box::new(Device { sources, on_ready })).unwrap();
    io.refresh();
    far.write_all(b"added").unwrap();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), b"added");
    let device = bus.remove(index).unwrap();
    io.refresh();
    settle(&io);
    drop(device);
    assert!(far.write_all(b"removed").is_err(), "nobody holds the other end");
    assert!(receiver.recv().is_err());
}

#[test]
fn a_pause_waits_for_pending_output_but_not_for_ever() {
    let (sources, on_ready, mut reader) = owing();
    let (io, _bus) = start(vec![(sources, on_ready)]);
    let pausing = thread::spawn(move || {
        io.pause(LONG);
        io
    });
    let mut text = Vec::new();
    let mut buffer = [0; 65536];
    while !text.ends_with(b"last words") {
        let count = reader.read(&mut buffer).unwrap();
        text.extend_from_slice(&buffer[..count]);
    }
    pausing.join().unwrap().stop(Duration::ZERO).unwrap();

    let (sources, on_ready, _reader) = owing();
    let (io, _bus) = start(vec![(sources, on_ready)]);
    io.pause(Duration::from_millis(10));
    io.stop(Duration::ZERO).unwrap();
}

#[test]
fn activity_is_reported_once_each_time_that_it_is_expected() {
    let (mut far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, receiver) = reader(near);
    let device: Box<dyn MmioDevice> = Box::new(Device { sources, on_ready });
    let bus = Arc::new(Bus::new(vec![(0, device)]).unwrap());
    let mut io = IoLoop::new(bus).unwrap();
    let (sender, reports) = channel();
    io.watch_activity(Box::new(move || sender.send(()).unwrap()));
    let io = io.spawn().unwrap();
    for _ in 0..3 {
        for text in [b"a", b"b", b"c"] {
            far.write_all(text).unwrap();
            assert_eq!(receiver.recv_timeout(LONG).unwrap(), text);
        }
        settle(&io);
        assert_eq!(reports.try_iter().count(), 1);
        io.expect_activity();
    }
    io.stop(Duration::ZERO).unwrap();
}
