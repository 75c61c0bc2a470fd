//! The kernel's vhost, if this machine has it, with a driver made of test code, and a tap or no backend.

use std::error::Error;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rvmm_devices::Host;
use rvmm_devices::testing::create;
use rvmm_devices::testing::{skip, turn};
use rvmm_devices::virtio::net::{HEADER, bit};
use rvmm_devices::virtio::testing::{Buffer, Rig, status};
use rvmm_devices::virtio::{GuestMemoryMmap, feature};

use super::*;
use crate::host::Linux;
use crate::host::tap::tests::{Cable, ETHERTYPE, attached, frame, in_a_namespace};

/// A device on this machine's kernel, or the reason why it cannot be created.
fn build(text: &str) -> Result<Rig, String> {
    let host: Arc<dyn Host> = Arc::new(Linux::new(Arc::new(|| {})));
    Rig::try_build(|mut wiring| {
        wiring.host = host;
        create(text, wiring)
    })
    .map_err(|error| error.source().map_or_else(String::new, ToString::to_string))
}

/// True if the kernel has the device; else reports a skip.
fn has(node: &Node) -> bool {
    let is_there = Path::new(node.path).exists();
    if !is_there {
        skip(&format!("there is no {}", node.path));
    }
    is_there
}

/// Waits for the next used buffer, as the I/O loop does.
fn wait(rig: &mut Rig, queue: u32) -> (u16, u32) {
    for _ in 0..3000 {
        if let Some(used) = rig.take_used(queue) {
            return used;
        }
        turn(rig.device.as_mut(), 100).unwrap();
    }
    panic!("no buffer is used");
}

/// Gives the kernel buffers for frames.
fn feed(rig: &mut Rig, count: usize) {
    (0..count).for_each(|_| _ = rig.add(0, &[Buffer::Write(2000)]));
    rig.write(0x50, 0);
}

/// Exchanges frames in both directions; the kernel sends some of its own.
fn exchange(rig: &mut Rig, cable: &Cable, len: usize) {
    let bytes = [&[0; HEADER][..], &frame(len)].concat();
    let head = rig.add(1, &[Buffer::Read(&bytes[..5]), Buffer::Read(&bytes[5..])]);
    rig.write(0x50, 1);
    assert_eq!(wait(rig, 1).0, head);
    let got = (0..3000).find_map(|_| {
        cable.receive().or_else(|| {
            thread::sleep(Duration::from_millis(10));
            None
        })
    });
    assert_eq!(got, Some(frame(len)));

    cable.send(&frame(len));
    loop {
        let (head, used) = wait(rig, 0);
        let mut got = rig.written(0, head);
        got.truncate(used as usize);
        feed(rig, 1);
        if got.get(HEADER + 12..HEADER + 14) == Some(&ETHERTYPE) {
            assert_eq!(got.get(HEADER..), Some(frame(len).as_slice()));
            break;
        }
    }
    rig.run();
    assert!(rig.irq.is_high(), "a level");
    rig.acknowledge();
    assert!(!rig.irq.is_high());
}

#[test]
fn the_kernel_moves_frames_until_a_reset_and_again_after_it() {
    if !has(&NET) {
        return;
    }
    in_a_namespace(|| {
        let mut rig = build("net,tap=t0,vhost=on").unwrap();
        let cable = Cable::to("t0");
        for round in 0..3 {
            rig.start(bit::MRG_RXBUF | feature::RING_RESET);
            feed(&mut rig, 8);
            (0..3).for_each(|more| exchange(&mut rig, &cable, 300 + 10 * round + more));
        }
        // A reset of one queue does not affect the other one.
        rig.write(0x30, 1);
        assert!(rig.write(0xc0, 1));
        assert_eq!(rig.read(0xc0), 0);
        assert!(rig.set_up(1));
        exchange(&mut rig, &cable, 500);

        assert!(rig.write(0x70, 0));
        while rig.take_used(0).is_some() {}
        cable.send(&frame(100));
        thread::sleep(Duration::from_millis(100));
        assert_eq!(rig.take_used(0), None, "no buffer is used after a reset");
    });
}

#[test]
fn an_inherited_tap_can_be_used_with_vhost_again_and_again() {
    if !has(&NET) {
        return;
    }
    in_a_namespace(|| {
        let tap = attached("t0");
        let cable = Cable::to("t0");
        for round in 0..3 {
            let mut rig = build(&format!("net,fd={},vhost=on", tap.as_raw_fd())).unwrap();
            rig.start(bit::MRG_RXBUF);
            feed(&mut rig, 8);
            exchange(&mut rig, &cable, 300 + round);
        }
    });
}

#[test]
fn a_ring_that_the_kernel_rejects_stops_the_device_until_a_reset() {
    if !has(&NET) {
        return;
    }
    in_a_namespace(|| {
        let mut rig = build("net,tap=t0,vhost=on").unwrap();
        let cable = Cable::to("t0");
        rig.start(bit::MRG_RXBUF);
        let [table, ..] = rig.rings(1);
        rig.set_descriptor(table, 0, (0x1000, 100, 0, 0));
        rig.make_available(1, 0);
        rig.write(0x50, 1);
        for _ in 0..3000 {
            turn(rig.device.as_mut(), 100).unwrap();
            if rig.status() & status::NEEDS_RESET != 0 {
                break;
            }
        }
        assert_ne!(rig.status() & status::NEEDS_RESET, 0, "a buffer that is no RAM");
        rig.start(bit::MRG_RXBUF);
        feed(&mut rig, 8);
        exchange(&mut rig, &cable, 200);
    });
}

/// Memory whose written pages are recorded while `log` has something.
struct Recorded {
    memory: Arc<dyn DmaMemory>,
    log: Arc<Mutex<Option<WriteLog>>>,
}

impl DmaMemory for Recorded {
    fn view(&self) -> &GuestMemoryMmap {
        self.memory.view()
    }

    fn records_writes(&self) -> bool {
        self.log.lock().unwrap().is_some()
    }

    fn note_written(&self, _addr: u64, _len: u64) {}

    fn write_log(&self) -> Option<WriteLog> {
        self.log.lock().unwrap().clone()
    }

    fn release(&self, addr: u64, len: u64) {
        self.memory.release(addr, len);
    }
}

#[test]
fn the_kernel_records_the_pages_of_buffers_and_rings_that_it_writes_while_they_are_recorded() {
    if !has(&NET) {
        return;
    }
    in_a_namespace(|| {
        let log: Arc<Mutex<Option<WriteLog>>> = Arc::default();
        let host: Arc<dyn Host> = Arc::new(Linux::new(Arc::new(|| {})));
        let mut rig = Rig::try_build(|mut wiring| {
            wiring.host = host;
            wiring.memory =
                Arc::new(Recorded { memory: Arc::clone(&wiring.memory), log: Arc::clone(&log) });
            create("net,tap=t0,vhost=on", wiring)
        })
        .unwrap();
        let cable = Cable::to("t0");
        rig.start(bit::MRG_RXBUF);
        feed(&mut rig, 8);
        exchange(&mut rig, &cable, 300);
        let start = rig.memory.iter().next().unwrap().start_addr().0;
        let size = rig.memory.iter().map(GuestMemoryRegion::len).sum::<u64>();
        let words: Arc<[AtomicU64]> =
            (0..size.div_ceil(4096 * 64)).map(|_| AtomicU64::new(0)).collect();
        let taken = || {
            let pages = (0..).zip(words.iter()).flat_map(|(number, word)| {
                let bits = word.swap(0, Ordering::AcqRel);
                (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| 64 * number + bit)
            });
            pages.collect::<Vec<u64>>()
        };
        // Recording begins while the device is paused, and each buffer is in a page of the rig's own.
        rig.device.pause().unwrap();
        *log.lock().unwrap() = Some(WriteLog { start, words: Arc::clone(&words) });
        rig.device.resume();
        exchange(&mut rig, &cable, 310);
        let pages = taken();
        let used: Vec<u64> = [0, 1].map(|queue| (rig.rings(queue)[2] - start) / 4096).to_vec();
        assert!(used.iter().all(|page| pages.contains(page)), "{used:?}: {pages:?}");
        let buffers = pages.iter().filter(|page| !used.contains(page)).count();
        assert!(buffers > 0, "{pages:?}");
        rig.device.pause().unwrap();
        *log.lock().unwrap() = None;
        rig.device.resume();
        exchange(&mut rig, &cable, 320);
        assert_eq!(taken(), [0; 0]);
    });
}

#[test]
fn a_log_that_does_not_begin_with_a_whole_byte_is_refused() {
    let words: Arc<[AtomicU64]> = Arc::default();
    let at = |start| log_base(&WriteLog { start, words: Arc::clone(&words) });
    let first = words.as_ptr() as u64;
    assert_eq!(at(0).unwrap(), first);
    assert_eq!(at(0x8000_0000).unwrap(), first.wrapping_sub(0x8000_0000 / 4096 / 8));
    assert!(at(0x8000_1000).is_err() && at(0x100).is_err());
}

#[test]
fn a_cid_belongs_to_one_guest_at_a_time() {
    // A CID that no other guest has.
    const CID: u32 = 0x7fff_fff0;
    if !has(&VSOCK) {
        return;
    }
    let text = format!("vsock,backend=kernel,cid={CID}");
    for _ in 0..2 {
        let mut rig = build(&text).unwrap();
        assert_eq!((rig.read(0x100), rig.read(0x104)), (CID, 0));
        let taken = build(&text).err().unwrap();
        assert!(taken.contains("Cannot use CID") && taken.contains("cid=N"), "{taken}");
        for _ in 0..3 {
            rig.start(0);
        }
    }
}

#[test]
fn ioctl_numbers_match_the_kernels_header() {
    // From include/uapi/linux/vhost.h, calculated for the sizes of its structures.
    assert_eq!(GET_FEATURES, 0x8008_af00);
    assert_eq!(SET_OWNER, 0xaf01);
    assert_eq!(SET_MEM_TABLE, 0x4008_af03);
    assert_eq!((SET_FEATURES.0, SET_VRING_NUM.0), (0x4008_af00, 0x4008_af10));
    assert_eq!(SET_LOG_BASE.0, 0x4008_af04);
    assert_eq!((SET_VRING_ADDR.0, SET_VRING_KICK.0), (0x4028_af11, 0x4008_af20));
    assert_eq!((VSOCK_SET_GUEST_CID.0, VSOCK_SET_RUNNING.0), (0x4008_af60, 0x4004_af61));
    assert_eq!((size_of::<Region>(), size_of::<Table>()), (32, 8 + 32 * MOST_REGIONS));
}

#[test]
fn a_device_node_that_cannot_be_opened_is_refused_with_advice() {
    let error = io::Error::from_raw_os_error;
    let sentence = |errno| not_opened(&NET, Place::Machine, error(errno)).to_string();
    assert!(sentence(libc::ENOENT).contains("sudo modprobe vhost_net"));
    assert!(sentence(libc::EACCES).contains("sudo setfacl -m u:$USER:rw /dev/vhost-net"));
    let (what, source) = not_opened(&VSOCK, Place::Machine, error(libc::EMFILE)).into_parts();
    assert_eq!(what, "Cannot open /dev/vhost-vsock");
    assert_eq!(source.and_then(|error| error.raw_os_error()), Some(libc::EMFILE));
    assert!(no_cid(7, error(libc::EADDRINUSE)).to_string().contains("CID 7 (another guest"));
    if !Path::new(VSOCK.path).exists() {
        let refused = build("vsock,backend=kernel").err().unwrap();
        assert!(refused.contains(&VSOCK.remedy_for_absence(Place::here())), "{refused}");
    }
}
