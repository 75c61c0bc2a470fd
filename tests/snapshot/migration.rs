//! Machines that move to another process while they run.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::harness::{Session, by_length, is_listening, kernel, one_host, skip};
use crate::network::{on_the_host, set_up_guest};
use crate::{Place, busy_linux, expect_no_complaints, expect_same_result, goes_on, initramfs};

/// Moves the machine to a new process with these arguments, which is returned with what the verb has printed, with these flags.
fn try_to_move_with(
    place: &Place,
    name: &str,
    arguments: &[&str],
    flags: &[&str],
) -> Result<(Session, String), String> {
    let socket = place.at("move");
    let mut target =
        place.rvmm(&["restore", "--listen"]).path("unix:", &socket, "").args(arguments).start();
    while target.is_running() && !is_listening(&socket) {
        thread::yield_now();
    }
    let to = format!("unix:{}", socket.display());
    match place.verb(&[&["migrate", name, &to][..], flags].concat(), None) {
        Ok(text) => Ok((target, text)),
        Err(error) => {
            assert_ne!(target.exit_code(), 0, "nobody has come: {error}");
            Err(error)
        }
    }
}

/// The same without flags.
fn try_to_move(place: &Place, name: &str, arguments: &[&str]) -> Result<(Session, String), String> {
    try_to_move_with(place, name, arguments, &[])
}

/// As [`try_to_move`]; the old process ends.
fn move_on(place: &Place, session: &mut Session, name: &str, arguments: &[&str]) -> Session {
    place.await_socket(session, name);
    let (target, text) = try_to_move(place, name, arguments).expect("it moves");
    assert!(text.starts_with(&format!("Moved {name}: ")), "{text}");
    assert_eq!(session.exit_code(), 0);
    target
}

#[test]
fn a_guest_that_moves_at_random_moments_ends_with_the_same_result() {
    expect_same_result(|place, _| try_to_move(place, "chain", &[]).map(|(target, _)| target));
}

/// The image over the disk, which grows while the guest writes.
fn overlay(place: &Place) -> PathBuf {
    place.at("disk.qcow2")
}

#[test]
fn linux_that_writes_to_its_disk_moves_with_it_and_to_an_image_as_well() {
    let Some(host) = one_host("aia") else { return };
    let place = Place::new();
    let mut session = busy_linux(&place, host.irqchips[0]);
    // From here on it writes an image, whose tables move with it.
    place.save(&mut session, "one", "saved");
    let image = format!("vda={}", overlay(&place).display());
    session = place.restore("saved", &["--disk-overlay", &image]);
    for _ in 0..by_length(10, 3) {
        session = move_on(&place, &mut session, "one", &[]);
        assert_eq!(session.ask("echo $kept; nproc"), "42\n2\n");
        goes_on(&mut session);
    }
    expect_no_complaints(&mut session);
    assert!(File::open(overlay(&place)).is_ok());
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

/// Linux whose shell writes a file in memory all the time.
fn writing_linux(place: &Place, irqchip: &str) -> Session {
    let initrd = initramfs::build(place.0.path(), &[], &[]);
    let mut session = place
        .rvmm(&["--mem", "256M", "--irqchip", irqchip, "--name", "one"])
        .args(&["--cmdline", "console=ttyS0 quiet"])
        .path("--initrd=", &initrd, "")
        .kernel(&kernel())
        .start();
    session.expect("own initramfs is up\r\n");
    session.ask("dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null; md5sum </data >/sum");
    session.send("(while :; do cp /data /x; cat /data /data /data /data /data /data >/y; md5sum </x | cmp -s - /sum || echo x >>/wrong; echo x >>/rounds; done) &\n");
    session.ask("until [ -s /rounds ]; do sleep 1; done; echo begun");
    session
}

#[test]
fn a_guest_that_writes_all_the_time_is_slowed_down_and_moves_or_stays() {
    let Some(host) = one_host("plic") else { return };
    let place = Place::new();
    let mut session = writing_linux(&place, host.irqchips[0]);
    match try_to_move_with(&place, "one", &[], &["--downtime", "1", "--json"]) {
        Ok((target, text)) => {
            assert!(text.lines().last().is_some_and(|line| line.starts_with("{\"migrated\":")));
            assert_eq!(session.exit_code(), 0);
            println!("{text}");
            session = target;
        }
        Err(error) => assert!(error.contains("faster than the connection"), "{error}"),
    }
    goes_on(&mut session);
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn a_guest_that_writes_all_the_time_runs_elsewhere_before_its_memory_is_there() {
    let Some(host) = one_host("aia") else { return };
    let place = Place::new();
    let mut session = writing_linux(&place, host.irqchips[0]);
    for _ in 0..by_length(10, 2) {
        place.await_socket(&mut session, "one");
        let moved = try_to_move_with(&place, "one", &[], &["--postcopy", "--json"]);
        let (target, text) = moved.expect("it moves");
        assert!(text.contains("\"rounds\":1,"), "{text}");
        assert_eq!(session.exit_code(), 0);
        session = target;
        goes_on(&mut session);
    }
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

/// Port of the guest's program.
const PORT: u32 = 52;

/// In the guest: the stream of the host is reset, and the next one carries bytes.
fn in_the_guest() {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, PORT).expect("bind");
    println!("the guest listens");
    let (mut stream, _) = listener.accept().expect("the host");
    println!("the guest has accepted");
    let error = stream.read_to_end(&mut Vec::new()).expect_err("a reset");
    println!("the stream is gone: {:?}", error.kind());
    let (mut stream, _) = listener.accept().expect("the host");
    let mut word = String::new();
    stream.read_to_string(&mut word).expect("bytes");
    println!("the guest was told {word}");
}

/// Connects to the guest's program.
fn connect(path: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).expect("rvmm listens");
    writeln!(stream, "CONNECT {PORT}").expect("rvmm reads");
    let mut answer = String::new();
    BufReader::with_capacity(1, &stream).read_line(&mut answer).expect("an answer");
    assert!(answer.starts_with("OK "), "{answer:?}");
    stream
}

/// Echoes the bytes of a connection slowly, and sends their number from time to time; returns all of them.
fn echo_slowly(listener: &TcpListener, progress: &Sender<usize>) -> Vec<u8> {
    let (mut stream, _) = listener.accept().expect("the guest");
    let (mut all, mut part) = (Vec::new(), vec![0; 32 << 10]);
    loop {
        let count = stream.read(&mut part).expect("the connection goes on");
        if count == 0 {
            return all;
        }
        stream.write_all(&part[..count]).expect("the connection goes on");
        all.extend_from_slice(&part[..count]);
        let _ = progress.send(all.len());
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_tcp_connection_goes_on_after_a_move_and_a_vsock_stream_is_reset() {
    const INSIDE: &str = "RVMM_INSIDE_THE_GUEST";
    const SIZE: usize = 8 << 20;
    if std::env::var_os(INSIDE).is_some() {
        return in_the_guest();
    }
    let Some(host) = one_host("aia") else { return };
    if !rustix::process::geteuid().is_root() {
        return skip("a tap takes root");
    }
    let place = Place::new();
    let own = std::env::current_exe().and_then(std::fs::read).expect("this program");
    let modules = ["virtio_mmio", "virtio_net", "vmw_vsock_virtio_transport"];
    let initrd = initramfs::build(place.0.path(), &[("inside", &own)], &modules);
    let mut session = place
        .rvmm(&["--mem", "256M", "--irqchip", host.irqchips[0], "--name", "one"])
        .args(&["--net", "tap=rvmmmove1,mac=02:00:00:00:00:07", "--cmdline", "console=ttyS0 quiet"])
        .path("--vsock=", &place.at("vsock"), "")
        .path("--initrd=", &initrd, "")
        .kernel(&kernel())
        .start();
    session.expect("own initramfs is up\r\n");
    let _bridge = Bridge::new("rvmmbridge", "203.0.113.1/24");
    let plug_in = |tap: &str| {
        on_the_host(&["ip", "link", "set", tap, "master", "rvmmbridge"]);
        on_the_host(&["ip", "link", "set", tap, "up"]);
    };
    plug_in("rvmmmove1");
    set_up_guest(&mut session, "203.0.113.1", "203.0.113.2");
    // The streams are open, and in use, when the machine moves.
    session.send(&format!("chmod +x /inside; {INSIDE}=1 /inside --exact migration::a_tcp_connection_goes_on_after_a_move_and_a_vsock_stream_is_reset --nocapture &\n"));
    session.expect("the guest listens\r\n");
    let mut stream = connect(&place.at("vsock"));
    session.expect("the guest has accepted\r\n");
    let listener = TcpListener::bind(("203.0.113.1", 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let (sender, progress) = channel();
    let echo = thread::spawn(move || echo_slowly(&listener, &sender));
    let blocks = SIZE >> 16;
    session.ask(&format!("dd if=/dev/urandom of=/data bs=64k count={blocks} 2>/dev/null"));
    session.send(&format!("(nc 203.0.113.1 {port} </data >/back; touch /done) &\n"));
    while progress.recv().expect("it sends") < SIZE / 16 {}
    let other = place.at("other").display().to_string();
    session =
        move_on(&place, &mut session, "one", &["--tap", "eth0=rvmmmove2", "--vsock-path", &other]);
    plug_in("rvmmmove2");
    session.expect("the stream is gone: ConnectionReset\r\n");
    let mut rest = Vec::new();
    assert!(stream.read_to_end(&mut rest).is_ok() && rest.is_empty(), "{rest:?}");
    let mut stream = connect(Path::new(&other));
    stream.write_all(b"something").expect("it reads");
    drop(stream);
    session.expect("the guest was told something\r\n");
    let sums = session.ask("until [ -e /done ]; do sleep 1; done; md5sum </data; md5sum </back");
    let mut sums = sums.lines();
    assert_eq!(sums.next(), sums.next(), "what came back is not what was sent");
    assert_eq!(echo.join().expect("the echo").len(), SIZE);
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

/// A bridge of the host with an address, which is removed at the end.
pub(crate) struct Bridge(&'static str);

impl Bridge {
    pub(crate) fn new(name: &'static str, address: &str) -> Self {
        on_the_host(&["ip", "link", "add", name, "type", "bridge"]);
        let bridge = Self(name);
        on_the_host(&["ip", "addr", "add", address, "dev", name]);
        on_the_host(&["ip", "link", "set", name, "up"]);
        bridge
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        on_the_host(&["ip", "link", "del", self.0]);
    }
}
