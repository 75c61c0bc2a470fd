//! The loop with devices that are made of pipes and sockets.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, Sender, channel};

use rvmm_devices::{Access, FdtDesc, MmioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::*;

/// Far more than anything here takes, so that only a hang fails.
const LONG: Duration = Duration::from_secs(30);

/// What a test's device does when it is ready.
type OnReady = Box<dyn FnMut(&mut Vec<Source>, u32) + Send>;

struct Device {
    sources: Vec<Source>,
    on_ready: OnReady,
}

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
    fn reset(&mut self) {
        self.sources.clear();
    }
    fn fdt(&self) -> Option<FdtDesc> {
        None
    }
    fn sources(&self) -> Vec<Source> {
        self.sources.clone()
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

/// Reads all that is there and tells it; forgets its source at the end.
fn reader(mut stream: UnixStream) -> (Vec<Source>, OnReady, Receiver<Vec<u8>>) {
    stream.set_nonblocking(true).unwrap();
    let sources = vec![source(&stream, 7, Interest::Read)];
    let (tell, told) = channel();
    let on_ready: OnReady = Box::new(move |sources, token| {
        assert_eq!(token, 7);
        let mut buffer = [0; 64];
        match stream.read(&mut buffer) {
            Ok(0) => sources.clear(),
            Ok(count) => tell.send(buffer[..count].to_vec()).unwrap(),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    });
    (sources, on_ready, told)
}

/// Counts, and does nothing about it.
fn idle() -> (OnReady, Receiver<u32>) {
    let (tell, told): (Sender<u32>, _) = channel();
    (Box::new(move |_, token| tell.send(token).unwrap()), told)
}

/// Two wake-ups by the loop's own door: whatever an event before them caused has been served when this returns.
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
    let (sources_a, ready_a, told_a) = reader(near_a);
    let (sources_b, ready_b, told_b) = reader(near_b);
    let (io, _bus) = start(vec![(sources_a, ready_a), (sources_b, ready_b)]);
    far_b.write_all(b"for b").unwrap();
    assert_eq!(told_b.recv_timeout(LONG).unwrap(), b"for b");
    far_a.write_all(b"for a").unwrap();
    assert_eq!(told_a.recv_timeout(LONG).unwrap(), b"for a");
    io.stop(Duration::ZERO).unwrap();
}

#[test]
fn an_idle_loop_sleeps() {
    let (_far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, _told) = reader(near);
    let (io, _bus) = start(vec![(sources, on_ready)]);
    settle(&io);
    let before = io.turns();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(io.turns(), before);
}

#[test]
fn the_end_of_an_input_is_handled_once() {
    let (far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, told) = reader(near);
    let (io, _bus) = start(vec![(sources, on_ready)]);
    settle(&io);
    drop(far);
    told.recv_timeout(Duration::from_millis(50)).unwrap_err();
    settle(&io);
    assert!(io.turns() < 20, "{} turns", io.turns());
}

#[test]
fn a_hang_up_that_nobody_handles_is_muted() {
    // The write end of a full pipe whose reader is gone: an error, never room.
    let (reader, mut writer) = io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[0; 4096]).is_ok() {}
    drop(reader);
    let (on_ready, told) = idle();
    let (io, bus) = start(vec![(vec![source(&writer, 1, Interest::Write)], on_ready)]);
    assert_eq!(told.recv_timeout(LONG).unwrap(), 1, "the device is told");
    settle(&io);
    assert!(io.turns() < 20, "{} turns", io.turns());
    assert!(told.try_recv().is_err(), "and told once");
    // The device is alive all the same.
    assert_eq!(bus.with_device(0, |device| device.sources().len()), Some(1));
}

#[test]
fn a_device_may_change_its_mind() {
    let (_far, near) = UnixStream::pair().unwrap();
    let number = near.as_raw_fd();
    let (tell, told) = channel();
    // Room to write is always there: three times, then it does not want it any more.
    let mut count = 0;
    let on_ready: OnReady = Box::new(move |sources, token| {
        let _held = &near;
        count += 1;
        tell.send((count, token)).unwrap();
        *sources = match count {
            1 | 2 => vec![Source { fd: number, token: count, interest: Interest::ReadWrite }],
            _ => vec![Source { fd: number, token: count, interest: Interest::Read }],
        };
    });
    let first = Source { fd: number, token: 0, interest: Interest::Write };
    let (io, _bus) = start(vec![(vec![first], on_ready)]);
    for expected in [(1, 0), (2, 1), (3, 2)] {
        assert_eq!(told.recv_timeout(LONG).unwrap(), expected);
    }
    settle(&io);
    assert!(told.try_recv().is_err());
}

#[test]
fn a_descriptor_that_was_closed_and_one_of_the_same_number_are_told_apart() {
    let (mut far, near) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let number = near.as_raw_fd();
    let (tell, told) = channel();
    let mut stream = Some(near);
    let on_ready: OnReady = Box::new(move |sources, _| {
        let mut buffer = [0; 8];
        match stream.as_mut().map(|stream| stream.read(&mut buffer)) {
            Some(Ok(0)) => {
                // Closed here; the loop sees the list without it.
                stream = None;
                sources.clear();
                tell.send(None).unwrap();
            }
            Some(Ok(count)) => tell.send(Some(count)).unwrap(),
            _ => {}
        }
    });
    let (io, bus) =
        start(vec![(vec![Source { fd: number, token: 0, interest: Interest::Read }], on_ready)]);
    far.write_all(b"abc").unwrap();
    assert_eq!(told.recv_timeout(LONG).unwrap(), Some(3));
    drop(far);
    assert_eq!(told.recv_timeout(LONG).unwrap(), None);
    settle(&io);
    assert_eq!(bus.with_device(0, |device| device.sources()), Some(vec![]));
    io.stop(Duration::ZERO).unwrap();
}

#[test]
fn a_descriptor_that_a_reset_closed_does_not_make_the_next_of_its_number_deaf() {
    // Numbers that no other test comes to, so that the second gets the first's.
    let high = |stream: &UnixStream| rustix::io::fcntl_dupfd_cloexec(stream, 600).unwrap();
    let (_far, near) = UnixStream::pair().unwrap();
    let closed = high(&near);
    drop(near);
    let number = closed.as_raw_fd();
    let (on_ready, _told) = idle();
    // The first device is one whose hart resets it; the second lets somebody in.
    let (mut caller, let_in) = UnixStream::pair().unwrap();
    let (doorbell, door) = UnixStream::pair().unwrap();
    let bell = source(&door, 0, Interest::Read);
    let (tell, told) = channel();
    let mut stream: Option<UnixStream> = None;
    let let_one_in: OnReady = Box::new(move |sources, token| {
        if token == 0 {
            (&door).read_exact(&mut [0]).unwrap();
            let new = UnixStream::from(high(&let_in));
            tell.send(format!("{}", new.as_raw_fd())).unwrap();
            sources.push(source(&new, 1, Interest::Read));
            stream = Some(new);
        } else if let Some(stream) = &mut stream {
            let mut heard = [0; 5];
            stream.read_exact(&mut heard).unwrap();
            tell.send(String::from_utf8_lossy(&heard).into_owned()).unwrap();
        }
    });
    let (io, bus) =
        start(vec![(vec![source(&closed, 0, Interest::Read)], on_ready), (vec![bell], let_one_in)]);
    settle(&io);
    bus.with_device(0, |device| {
        device.reset();
        drop(closed);
    });
    (&doorbell).write_all(b"!").unwrap();
    assert_eq!(told.recv_timeout(LONG).unwrap(), number.to_string());
    caller.write_all(b"hello").unwrap();
    assert_eq!(told.recv_timeout(LONG).unwrap(), "hello");
    io.stop(Duration::ZERO).unwrap();
}

#[test]
fn a_file_among_the_sources_is_left_out_and_the_loop_goes_on() {
    let file = tempfile::tempfile().unwrap();
    let (mut far, near) = UnixStream::pair().unwrap();
    let (mut sources, on_ready, told) = reader(near);
    sources.insert(0, source(&file, 1, Interest::Read));
    let (_io, _bus) = start(vec![(sources, on_ready)]);
    far.write_all(b"x").unwrap();
    assert_eq!(told.recv_timeout(LONG).unwrap(), b"x");
}

#[test]
fn a_refresh_finds_sources_that_were_added_from_outside() {
    let (mut far, near) = UnixStream::pair().unwrap();
    let (sources, mut on_ready, told) = reader(near);
    let known = Arc::new(Mutex::new(Vec::new()));
    struct Late(Arc<Mutex<Vec<Source>>>, OnReady);
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
        fn reset(&mut self) {}
        fn fdt(&self) -> Option<FdtDesc> {
            None
        }
        fn sources(&self) -> Vec<Source> {
            self.0.lock().unwrap().clone()
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
    assert_eq!(told.recv_timeout(LONG).unwrap(), b"late");
}

#[test]
fn a_stop_waits_for_output_that_is_owed_but_not_for_ever() {
    let owing = || {
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
    };

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
fn a_signal_cuts_the_wait_for_output_short_but_ends_no_loop_that_was_not_told() {
    let io = IoLoop::new(Arc::new(Bus::new(Vec::new()).unwrap())).unwrap();
    let stops = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&stops);
    let stop: StopRequest = Arc::new(move || {
        seen.fetch_add(1, Ordering::Relaxed);
    });
    io.obey(libc::SIGTERM, &stop);
    assert_eq!((io.shared.deadline(), stops.load(Ordering::Relaxed)), (None, 1));

    let late = Instant::now() + LONG;
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        *io.shared.deadline.lock().unwrap() = Some(late);
        io.obey(signal, &stop);
        let soon = io.shared.deadline().unwrap();
        assert!(soon <= Instant::now() + IoLoop::DRAIN, "{signal}");
        io.obey(signal, &stop);
        assert_eq!(io.shared.deadline(), Some(soon), "a second one does not give it more time");
    }
    // An in-place restart goes the same way: the end that was asked for is not forgotten.
    assert_eq!(stops.load(Ordering::Relaxed), 9);
}

/// A loop that has started, and what it says of its failure.
fn watched(mut io: IoLoop) -> (IoThread, Receiver<String>) {
    let (tell, told) = channel();
    io.watch_failure(Box::new(move |what| tell.send(what).unwrap()));
    (io.spawn().unwrap(), told)
}

#[test]
fn a_loop_whose_epoll_fails_says_so_and_one_that_is_ended_does_not() {
    let new = || IoLoop::new(Arc::new(Bus::new(Vec::new()).unwrap())).unwrap();
    let mut broken = new();
    // Room for no event at all is what epoll refuses (EINVAL).
    broken.manager = EventManager::new_with_capacity(0).unwrap();
    let (_thread, told) = watched(broken);
    let what = told.recv_timeout(LONG).unwrap();
    assert!(what.starts_with("The I/O thread cannot go on: "), "{what}");
    let (thread, told) = watched(new());
    thread.stop(Duration::ZERO).unwrap();
    assert!(told.recv().is_err());
}

#[test]
fn a_loop_whose_device_panics_says_so() {
    let bell = EventFd::new(0).unwrap();
    bell.write(1).unwrap();
    let sources = vec![source(&bell, 0, Interest::Read)];
    let device = Device { sources, on_ready: Box::new(|_, _| panic!("on purpose")) };
    let bus = Bus::new(vec![(0, Box::new(device) as Box<dyn MmioDevice>)]).unwrap();
    let (thread, told) = watched(IoLoop::new(Arc::new(bus)).unwrap());
    assert_eq!(told.recv_timeout(LONG).unwrap(), "The I/O thread panicked");
    thread.stop(Duration::ZERO).unwrap_err();
}

#[test]
fn two_loops_run_in_one_process_and_end_by_being_dropped() {
    let (mut far, near) = UnixStream::pair().unwrap();
    let (sources, on_ready, told) = reader(near);
    let (first, _first_bus) = start(vec![]);
    let (second, _second_bus) = start(vec![(sources, on_ready)]);
    drop(first);
    far.write_all(b"x").unwrap();
    assert_eq!(told.recv_timeout(LONG).unwrap(), b"x");
    drop(second);
}

#[test]
fn epoll_takes_pipes_and_no_files() {
    use std::os::fd::AsFd;
    let (reader, _writer) = io::pipe().unwrap();
    assert!(accepts(reader.as_fd()).unwrap());
    assert!(!accepts(tempfile::tempfile().unwrap().as_fd()).unwrap());
    assert!(!accepts(std::fs::File::open("/dev/null").unwrap().as_fd()).unwrap());
}
