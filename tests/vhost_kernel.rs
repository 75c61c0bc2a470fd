//! Ring 3: Debian's own drivers, and the host's kernel behind rvmm's network card and sockets. The guest's program is this very
//! test, started there.

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
use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use harness::{LIMIT, Session, flood, host, kernel, rvmm};
use streams::{GUEST_PORT, HOST_PORT, STREAMS, bytes, echo, send_and_take_back};
use vsock::{VMADDR_CID_ANY, VsockListener, VsockStream};

/// The guest's address, which nobody else takes.
const CID: u32 = 52_052;

/// Nodes of the kernel's vhost.
const NODES: [&str; 2] = ["/dev/vhost-net", "/dev/vhost-vsock"];

#[test]
fn what_runs_inside_the_guest() {
    streams::run_inside_the_guest();
}

/// What a process has open, by path.
fn open_files(session: &Session, path: &str) -> usize {
    let folder = format!("/proc/{}/fd", session.pid().as_raw_nonzero());
    let files = fs::read_dir(folder).expect("the process lives").flatten();
    files.filter(|file| fs::read_link(file.path()).is_ok_and(|to| to == Path::new(path))).count()
}

/// The host connects to the guest, and sends what is in the guest's file `/data`.
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

/// Streams from the host, then from the guest, all of which come back.
fn talk_over_sockets(session: &mut Session) {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, HOST_PORT).expect("a port");
    let server = thread::spawn(move || {
        for _ in 0..STREAMS {
            let (stream, from) = listener.accept().expect("the guest connects");
            assert_eq!(from.cid(), CID);
            echo(stream);
        }
    });
    session.send("chmod +x /inside; RVMM_INSIDE_THE_GUEST=1 /inside --exact what_runs_inside_the_guest --nocapture\n");
    session.expect("the guest listens\r\n");
    for number in 0..STREAMS {
        let stream = VsockStream::connect_with_cid_port(CID, GUEST_PORT).expect("the guest");
        send_and_take_back(stream, &flood(bytes(number)));
    }
    session.expect("the guest has all of it\r\n");
    server.join().expect("every stream came");
}

#[test]
fn a_guest_and_its_host_talk_through_the_kernels_vhost_both_ways() {
    let Some(host) = host() else { return };
    if let Some(missing) = NODES.iter().find(|path| !Path::new(path).exists()) {
        return harness::skip(&format!(
            "there is no {missing} (sudo modprobe vhost_net vhost_vsock)"
        ));
    }
    if !rustix::process::geteuid().is_root() {
        return harness::skip("a tap takes root");
    }
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

        // The driver goes, which resets the card, and comes again.
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
