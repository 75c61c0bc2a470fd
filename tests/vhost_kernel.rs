//! Ring 3: Debian's own drivers, with the host's vhost as backend of rvmm's network card and sockets. The guest's program is
//! this test itself, started there. Then a guest with rings that are invalid for vhost.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;
#[path = "linux/initramfs.rs"]
mod initramfs;
#[path = "linux/network.rs"]
mod network;
#[path = "linux/streams.rs"]
mod streams;

use std::fs;
use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use harness::{Host, LIMIT, Session, flood, guest, host, kernel, rvmm};
use streams::{GUEST_PORT, HOST_PORT, STREAMS, bytes, connect, send_and_take_back, serve};
use vsock::{VMADDR_CID_ANY, VsockListener};

/// The guest's CID, not used by other tests.
const CID: u32 = 52_052;

/// The device nodes of vhost.
const NODES: [&str; 2] = ["/dev/vhost-net", "/dev/vhost-vsock"];

/// Number of open files of a process with this path.
fn open_files(session: &Session, path: &str) -> usize {
    let folder = format!("/proc/{}/fd", session.pid().as_raw_nonzero());
    let files = fs::read_dir(folder).expect("the process lives").flatten();
    files.filter(|file| fs::read_link(file.path()).is_ok_and(|to| to == Path::new(path))).count()
}

/// Connects from the host to the guest, and sends the contents of the guest's file `/data`.
fn send_over_tcp(session: &mut Session, there: &str, all: Vec<u8>) {
    let address = format!("{there}:5000");
    let sender = thread::spawn(move || {
        let deadline = Instant::now() + LIMIT;
        let mut stream = loop {
            match TcpStream::connect(&address) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{address}: {error}"),
            }
            thread::sleep(Duration::from_millis(100));
        };
        stream.write_all(&all).expect("the guest reads");
    });
    let sums = session.ask("nc -l -p 5000 </dev/null >/got; md5sum </data; md5sum </got");
    sender.join().expect("all was sent");
    let mut sums = sums.lines();
    assert_eq!(sums.next(), sums.next(), "what came is not what was sent");
}

/// Runs streams from the host, then from the guest; all data is echoed.
fn talk_over_sockets(session: &mut Session) {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, HOST_PORT).expect("a port");
    let server = thread::spawn(move || {
        serve(|| {
            let (stream, from) = listener.accept().expect("the guest connects");
            assert_eq!(from.cid(), CID);
            stream
        });
    });
    streams::start_inside(session);
    for number in 0..STREAMS {
        send_and_take_back(connect(CID, GUEST_PORT), &flood(bytes(number)));
    }
    streams::passed_inside(session);
    server.join().expect("every stream came");
}

/// The host, if its kernel has the nodes and this process may create taps.
fn host_with_vhost() -> Option<&'static Host> {
    let host = host()?;
    if let Some(missing) = NODES.iter().find(|path| !Path::new(path).exists()) {
        harness::skip(&format!("there is no {missing} (sudo modprobe vhost_net vhost_vsock)"));
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        harness::skip("a tap takes root");
        return None;
    }
    Some(host)
}

#[test]
fn a_guest_and_its_host_talk_through_the_kernels_vhost_both_ways() {
    if streams::is_inside() {
        return streams::guests_side();
    }
    let Some(host) = host_with_vhost() else { return };
    let own = std::env::current_exe().and_then(fs::read).expect("this program");
    for (number, irqchip) in host.usual_irqchip().iter().enumerate() {
        let folder = tempfile::tempdir().expect("a folder");
        let modules = ["virtio_mmio", "virtio_net", "vmw_vsock_virtio_transport"];
        let initrd = initramfs::build(folder.path(), &[("inside", &own)], &modules);
        let tap = format!("rvmmvhost{number}");
        let here = format!("198.51.100.{}", 4 * number + 1);
        let there = format!("198.51.100.{}", 4 * number + 2);
        let sockets = format!("backend=kernel,cid={CID}");
        let mut session = rvmm(&["--mem", "256M", "--irqchip", irqchip, "--cpus", "2"])
            .args(&["--cmdline", "console=ttyS0 quiet", "--vsock", &sockets])
            .args(&["--net", &format!("tap={tap},mac=02:00:00:00:00:07,queues=2,vhost=on")])
            .path("--initrd=", &initrd, "")
            .kernel(&kernel())
            .start();
        session.expect("own initramfs is up\r\n");
        assert_eq!(NODES.map(|path| open_files(&session, path)), [2, 1]);

        network::plug_in(&mut session, &tap, &here, &there);
        let all = network::echo_over_tcp(&mut session, &here);
        send_over_tcp(&mut session, &there, all);
        network::pull_the_cable(&mut session, &tap);
        talk_over_sockets(&mut session);

        // Unbinds the driver, which resets the card, and binds it again.
        session.ask("rmmod virtio_net && insmod /modules/virtio_net.ko");
        network::set_up_guest(&mut session, &here, &there);

        let mut second = rvmm(&["--mem", "64M", "--no-initrd", "--vsock", &sockets])
            .kernel(&kernel())
            .no_input()
            .start();
        assert_eq!(second.exit_code(), 1);
        let refused = second.all_errors();
        assert!(refused.contains(&format!("Cannot use CID {CID} (another guest")), "{refused}");
        session.send("poweroff -f\n");
        assert_eq!(session.exit_code(), 0);
    }
}

/// Sends broadcast frames through a tap, ten per second, until `is_over`.
fn chatter(here: &str, everybody: &str, is_over: Arc<AtomicBool>) -> thread::JoinHandle<()> {
    let socket = UdpSocket::bind((here, 0)).expect("a socket");
    socket.set_broadcast(true).expect("a right of every socket");
    let everybody = format!("{everybody}:5000");
    thread::spawn(move || {
        while !is_over.load(Ordering::Relaxed) {
            // Without a reader the tap's queue is full.
            let _ = socket.send_to(b"anybody there?", &everybody);
            thread::sleep(Duration::from_millis(100));
        }
    })
}

#[test]
fn rings_that_are_invalid_for_the_kernel_break_only_that_device() {
    let Some(host) = host_with_vhost() else { return };
    let tap = "rvmmnonsense";
    let sockets = format!("backend=kernel,cid={}", CID + 1);
    for irqchip in host.usual_irqchip() {
        let mut session = rvmm(&["--mem", "64M", "--no-initrd", "--irqchip", irqchip])
            .args(&["--device", "rng", "--vsock", &sockets])
            .args(&["--net", &format!("tap={tap},vhost=on")])
            .kernel(&guest("vhost"))
            .no_input()
            .start();
        session.expect("vhost: waiting for frames\n");
        network::on_the_host(&["ip", "addr", "add", "203.0.113.1/30", "dev", tap]);
        network::on_the_host(&["ip", "link", "set", tap, "up"]);
        let is_over = Arc::new(AtomicBool::new(false));
        let chatter = chatter("203.0.113.1", "203.0.113.3", Arc::clone(&is_over));
        session.expect("PASS vhost\n");
        is_over.store(true, Ordering::Relaxed);
        chatter.join().expect("it ends");
        assert_eq!(session.exit_code(), 0);
    }
}
