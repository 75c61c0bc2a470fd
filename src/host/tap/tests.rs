//! Taps of the kernel, each test in a network namespace of its own, so that the host's interfaces are not touched.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use rvmm_devices::testing::{leave_out, skip};
use rvmm_devices::virtio::net::{Net, NetConfig, bit};
use rvmm_devices::virtio::testing::{Buffer, Rig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

const RAM: u64 = 0x8000_0000;

/// An EtherType for experiments (IEEE 802.3), which the kernel does not send by itself.
pub(crate) const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Runs `test` in a network namespace with only a loopback interface, or reports a skip.
pub(crate) fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let name = thread::current().name().unwrap_or("?").to_owned();
    let run = move || {
        // SAFETY: has no preconditions; it concerns this thread alone, which ends soon.
        if let Err(error) = check(unsafe { libc::unshare(libc::CLONE_NEWNET) }) {
            return Err(format!("a network namespace cannot be created: {error}"));
        }
        File::open(TUN).map_err(|error| format!("{TUN} cannot be opened: {error}"))?;
        test();
        Ok(())
    };
    match thread::Builder::new().name(name).spawn(run).unwrap().join() {
        Ok(Ok(())) => {}
        Ok(Err(why)) => {
            skip(&why);
        }
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// A packet socket on the host's side of a tap.
pub(crate) struct Cable(OwnedFd);

impl Cable {
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Brings the interface up and binds a socket to it.
    pub(crate) fn to(name: &str) -> Self {
        let domain = c_int::from(ETHERTYPE_ALL);
        // SAFETY: creates a descriptor.
        let fd =
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, domain) };
        check(fd).unwrap();
        // SAFETY: the descriptor was just created, and has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut request = request(name, 0).unwrap();
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap();
        // SAFETY: both calls read or write one `ifreq`, which outlives them, and after the second the union holds an index.
        let index = unsafe {
            check(libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)).unwrap();
            check(libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request)).unwrap();
            request.ifr_ifru.ifru_ifindex
        };
        // SAFETY: plain data that zero bits make.
        let mut addr: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        addr.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        addr.sll_protocol = ETHERTYPE_ALL;
        addr.sll_ifindex = index;
        let len = u32::try_from(size_of_val(&addr)).unwrap();
        // SAFETY: the address has the length that is passed, and outlives the call.
        check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), len) }).unwrap();
        Self(fd)
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        assert_eq!(rustix::io::write(&self.0, frame).unwrap(), frame.len());
    }

    /// The next frame of the test's EtherType; the kernel sends some of its own.
    pub(crate) fn receive(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        loop {
            let len = rustix::io::read(&self.0, &mut bytes).ok()?;
            if bytes[12..14] == ETHERTYPE {
                return Some(bytes[..len].to_vec());
            }
        }
    }
}

/// `ETH_P_ALL`, in network order.
const ETHERTYPE_ALL: u16 = 3_u16.to_be();

pub(crate) fn frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect();
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[12..14].copy_from_slice(&ETHERTYPE);
    frame
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM), 1 << 20)]).unwrap()
}

fn segments(list: &[(u64, u32)]) -> Vec<Segment> {
    list.iter().map(|(addr, len)| Segment { addr: GuestAddress(*addr), len: *len }).collect()
}

/// Receives at most 1000 frames, up to one of the test's EtherType.
fn receive(tap: &mut Tap, memory: &GuestMemoryMmap, first: &[Segment]) -> (Vec<u8>, usize) {
    for _ in 0..1000 {
        let (mut header, mut rest) = ([0; HEADER], vec![0; 70_000]);
        let len = tap.receive(memory, &mut header, first, &mut rest).unwrap();
        let mut bytes = Vec::new();
        for piece in first {
            let mut part = vec![0; piece.len as usize];
            memory.read_slice(&mut part, piece.addr).unwrap();
            bytes.extend(part);
        }
        bytes.extend(rest);
        if bytes[12..14] == ETHERTYPE {
            bytes.truncate(len);
            return (bytes, len);
        }
    }
    panic!("the frame does not arrive");
}

#[test]
fn frames_pass_between_guest_memory_and_the_kernel_in_pieces() {
    in_a_namespace(|| {
        let mut tap = Tap::open("t0").unwrap();
        let (cable, memory) = (Cable::to("t0"), memory());
        let sent = frame(300);
        memory.write_slice(&sent[14..100], GuestAddress(RAM + 5000)).unwrap();
        memory.write_slice(&sent[100..], GuestAddress(RAM + 77)).unwrap();
        let head = [&[0; HEADER][..], &sent[..14]].concat();
        tap.send(&memory, &head, &segments(&[(RAM + 5000, 86), (RAM + 77, 200)])).unwrap();
        assert_eq!(cable.receive(), Some(sent));

        let first = segments(&[(RAM, 20), (RAM + 4090, 30)]);
        for len in [60, 1400] {
            cable.send(&frame(len));
            assert_eq!(receive(&mut tap, &memory, &first), (frame(len), len));
        }
        let outside = segments(&[(RAM + (1 << 20) - 10, 20)]);
        assert!(tap.send(&memory, &head, &outside).is_err(), "a piece that is not all RAM");
        let quiet = loop {
            if let Err(error) = tap.receive(&memory, &mut [0; HEADER], &first, &mut [0; 70_000]) {
                break error;
            }
        };
        assert_eq!(quiet.kind(), ErrorKind::WouldBlock);
    });
}

#[test]
fn the_kernel_is_told_what_frames_may_leave_to_the_guest() {
    in_a_namespace(|| {
        let mut tap = Tap::open("t0").unwrap();
        let all = Offloads { csum: true, tso4: true, tso6: true, ecn: true };
        tap.set_offloads(all).unwrap();
        tap.set_offloads(Offloads::default()).unwrap();
        // The kernel rejects invalid combinations, so the bits arrive.
        assert!(tap.set_offloads(Offloads { csum: false, ..all }).is_err());
        assert!(tap.set_offloads(Offloads { tso4: false, tso6: false, ..all }).is_err());
    });
}

#[test]
fn a_tap_is_busy_while_it_is_open_and_free_afterwards() {
    in_a_namespace(|| {
        for _ in 0..3 {
            let _tap = Tap::open("t0").unwrap();
            let (what, source) = Tap::open("t0").unwrap_err().into_parts();
            assert!(what.contains("tap t0 (another program"), "{what}");
            assert_eq!(source.and_then(|error| error.raw_os_error()), Some(libc::EBUSY));
        }
    });
}

#[test]
fn a_tap_of_several_queues_gives_frames_only_to_those_in_use() {
    in_a_namespace(|| {
        let mut taps = Tap::open_queues("t0", 3).unwrap();
        let (what, _) = Tap::open("t0").unwrap_err().into_parts();
        assert!(what.contains("queues=2 for one created with multi_queue"), "{what}");
        let (cable, memory) = (Cable::to("t0"), memory());
        for tap in &mut taps[1..] {
            tap.set_in_use(false).unwrap();
        }
        for len in 60..80 {
            cable.send(&frame(len));
        }
        for len in 60..80 {
            assert_eq!(receive(&mut taps[0], &memory, &[]), (frame(len), len));
        }
        for tap in &mut taps[1..] {
            tap.set_in_use(true).unwrap();
            let head = [&[0; HEADER][..], &frame(70)].concat();
            tap.send(&memory, &head, &[]).unwrap();
            assert_eq!(cable.receive(), Some(frame(70)));
        }
        drop(taps);
        let _one = Tap::open("t1").unwrap();
        let (what, _) = Tap::open_queues("t1", 2).unwrap_err().into_parts();
        assert!(what.contains("omit queues"), "{what}");
    });
}

#[test]
fn a_tap_reports_the_state_of_its_link() {
    in_a_namespace(|| {
        let mut tap = Tap::open("t0").unwrap();
        assert!(!tap.is_link_up(), "a new one is down");
        let is_told = |tap: &Tap| {
            // SAFETY: the descriptor is the tap's, which outlives the borrow.
            let fd = unsafe { BorrowedFd::borrow_raw(tap.link_fd().unwrap()) };
            let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())) == Ok(1)
        };
        let cable = Cable::to("t0");
        // The kernel may report one change twice, with a delay.
        assert!(is_told(&tap));
        while is_told(&tap) {
            assert!(tap.is_link_up());
        }
        let mut request = request("t0", 0).unwrap();
        // SAFETY: SIOCSIFFLAGS reads one `ifreq`, which outlives the call.
        let done =
            unsafe { libc::ioctl(cable.0.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) };
        check(done).unwrap();
        assert!(is_told(&tap));
        while is_told(&tap) {
            assert!(!tap.is_link_up());
        }
        let mut queues = Tap::open_queues("t1", 2).unwrap();
        assert!(queues[0].link_fd().is_some() && queues[1].link_fd().is_none());
        assert!(!queues[0].is_link_up());
    });
}

#[test]
fn an_interface_that_is_not_a_tap_is_refused_with_advice() {
    in_a_namespace(|| {
        let (what, _) = Tap::open("lo").unwrap_err().into_parts();
        assert!(what.contains("Cannot use tap lo (an interface of this name"), "{what}");
    });
    for name in ["", ".", "..", "a/b", "a b", "tap%d", "sixteen-letters-", "é"] {
        let (what, source) = Tap::open(name).unwrap_err().into_parts();
        assert!(what.contains("1 to 15 letters") && source.is_none(), "{name:?}: {what}");
    }
    let sentence =
        |errno| not_attached("t0", false, io::Error::from_raw_os_error(errno)).to_string();
    assert!(sentence(libc::EPERM).contains("sudo ip tuntap add t0 mode tap user $USER"));
    let sentence = |errno| no_tun(Place::Machine, io::Error::from_raw_os_error(errno)).to_string();
    assert!(sentence(libc::ENOENT).contains("sudo modprobe tun"));
    assert!(sentence(libc::EACCES).contains("chmod"));
}

/// A tap that the test has opened and attached, as a parent process does.
pub(crate) fn attached(name: &str) -> File {
    let file = File::options().read(true).write(true).open(TUN).unwrap();
    let mut request = request(name, FLAGS).unwrap();
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }).unwrap();
    file
}

#[test]
fn an_inherited_tap_can_be_used_again_and_again() {
    in_a_namespace(|| {
        let file = attached("t0");
        let cable = Cable::to("t0");
        for _ in 0..3 {
            let mut tap = Tap::inherit(file.as_raw_fd()).unwrap();
            assert!(tap.identity().ends_with("/t0"), "{}", tap.identity());
            cable.send(&frame(60));
            assert_eq!(receive(&mut tap, &memory(), &[]), (frame(60), 60));
        }
        let flags = rustix::io::fcntl_getfd(file.as_fd()).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    });
}

#[test]
fn a_descriptor_that_is_no_tap_is_refused() {
    in_a_namespace(|| {
        let refusal = |fd: RawFd| Tap::inherit(fd).unwrap_err().into_parts().0;
        let unattached = File::options().read(true).write(true).open(TUN).unwrap();
        assert!(refusal(unattached.as_raw_fd()).contains("not attached"));
        let null = File::open("/dev/null").unwrap();
        assert!(refusal(null.as_raw_fd()).contains("not a tap"));
        assert!(refusal(999_999).contains("it is not open"));
        let tun = File::options().read(true).write(true).open(TUN).unwrap();
        let mut request = request("t1", FLAGS).unwrap();
        let flags = libc::IFF_TUN | libc::IFF_NO_PI;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
        let tun = tun.into_raw_fd();
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
        check(unsafe { libc::ioctl(tun, libc::TUNSETIFF, &raw mut request) }).unwrap();
        assert!(refusal(tun).contains("IFF_TAP"));
        // SAFETY: `into_raw_fd` above has given up its ownership.
        drop(unsafe { OwnedFd::from_raw_fd(tun) });
    });
}

#[test]
fn a_tap_that_is_down_or_deleted_is_an_error() {
    in_a_namespace(|| {
        let (mut tap, memory) = (Tap::open("t0").unwrap(), memory());
        let head = [&[0; HEADER][..], &frame(60)].concat();
        let down = tap.send(&memory, &head, &[]).unwrap_err();
        assert!(down.to_string().contains("sudo ip link set t0 up"), "{down}");
        if !Command::new("ip").args(["link", "del", "t0"]).status().is_ok_and(|s| s.success()) {
            return leave_out("there is no command ip, so no tap is deleted");
        }
        assert_eq!(tap.send(&memory, &head, &[]).unwrap_err().kind(), ErrorKind::NotConnected);
        let gone = tap.receive(&memory, &mut [0; HEADER], &[], &mut [0; 100]).unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotConnected);
    });
}

#[test]
fn a_guest_and_the_kernel_exchange_frames_and_large_segments() {
    in_a_namespace(|| {
        let tap = Tap::open("t0").unwrap();
        let cable = Cable::to("t0");
        let device = Net::new(Box::new(tap), &NetConfig::default()).unwrap();
        let counters = Arc::clone(&device.counters());
        let mut rig = Rig::new(Box::new(device));
        rig.start(bit::CSUM | bit::HOST_TSO4 | bit::GUEST_CSUM | bit::GUEST_TSO4 | bit::MRG_RXBUF);
        let bytes = [&[0; HEADER][..], &frame(1000)].concat();
        rig.ask(1, &[Buffer::Read(&bytes[..5]), Buffer::Read(&bytes[5..])]).unwrap();
        assert_eq!(cable.receive(), Some(frame(1000)));

        for _ in 0..16 {
            rig.add(0, &[Buffer::Write(500)]);
        }
        rig.kick(0);
        cable.send(&frame(1400));
        rig.run();
        let mut got = Vec::new();
        while let Some((head, len)) = rig.take_used(0) {
            let part = rig.written(0, head);
            got.extend_from_slice(&part[..len as usize]);
            // The kernel's own frames may arrive first.
            if got.len() == HEADER + 1400 && got[24..26] == ETHERTYPE {
                break;
            }
            if len < 500 {
                got.clear();
            }
        }
        assert_eq!((got[10], &got[HEADER..]), (3, frame(1400).as_slice()));

        // A TCP segment over IPv4 that the kernel has to segment.
        let mut large = frame(9000);
        large[12..14].copy_from_slice(&[8, 0]);
        large[14..34].copy_from_slice(&[
            0x45, 0, 0x23, 0x1a, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        large[46] = 0x50;
        let header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
        let before = counters.tx_frames.get();
        rig.ask(1, &[Buffer::Read(&[&header[..], &large].concat())]).unwrap();
        assert_eq!((counters.tx_frames.get() - before, counters.tx_failed.get()), (1, 0));
    });
}
