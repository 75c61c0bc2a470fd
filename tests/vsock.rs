//! Ring 3: streams between programs of a Debian guest and of its host. The guest's program is this test itself, started there.

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
#[path = "linux/streams.rs"]
mod streams;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use harness::{checksum, flood, host, kernel, rvmm};
use streams::{GUEST_PORT, HOST_PORT, STREAMS, bytes, serve};

/// Connects to a port of the guest like any host program. If the guest does not answer within two seconds, the stream is
/// closed without a reply.
fn connect(path: &Path) -> UnixStream {
    loop {
        let mut stream = UnixStream::connect(path).expect("rvmm listens");
        writeln!(stream, "CONNECT {GUEST_PORT}").expect("rvmm reads");
        let mut answer = String::new();
        BufReader::with_capacity(1, &stream).read_line(&mut answer).expect("an answer");
        if !answer.is_empty() {
            assert!(answer.starts_with("OK "), "{answer:?}");
            return stream;
        }
    }
}

#[test]
fn streams_carry_every_byte_both_ways_from_either_side() {
    if streams::is_inside() {
        return streams::guests_side();
    }
    let Some(host) = host() else { return };
    for irqchip in host.usual_irqchip() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vsock");
        let own = std::env::current_exe().and_then(fs::read).expect("this program");
        let modules = ["virtio_mmio", "vmw_vsock_virtio_transport"];
        let initrd = initramfs::build(folder.path(), &[("inside", &own)], &modules);
        let listener = UnixListener::bind(folder.path().join(format!("vsock_{HOST_PORT}")))
            .expect("a socket of the host");
        let server = thread::spawn(move || serve(|| listener.accept().expect("rvmm connects").0));
        let mut session = rvmm(&["--mem", "256M", "--irqchip", irqchip])
            .args(&["--cmdline", "console=ttyS0 quiet"])
            .path("--vsock=", &path, "")
            .path("--initrd=", &initrd, "")
            .kernel(&kernel())
            .start();
        session.expect("own initramfs is up\r\n");
        streams::start_inside(&mut session);
        for number in 0..STREAMS {
            let sent = flood(bytes(number));
            let mut stream = connect(&path);
            stream.write_all(&sent).expect("the guest reads");
            stream.shutdown(Shutdown::Write).expect("the end");
            let mut back = Vec::new();
            stream.read_to_end(&mut back).expect("the guest's answer");
            assert_eq!(checksum(&back), checksum(&sent));
        }
        streams::passed_inside(&session);
        server.join().expect("every stream came");
        session.send("poweroff -f\n");
        assert_eq!(session.exit_code(), 0);
    }
}
