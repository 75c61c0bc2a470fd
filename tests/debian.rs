//! Ring 3: an unmodified Debian, booted from its disk by its own firmware, boot menu and init.
//!
//! `scripts/debian` creates the disk. Guests only read it and keep their changes in memory.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::io::{self, BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use harness::{Session, debian, one_host, rvmm};

/// A port of the host that is forwarded to the guest's sshd.
const FORWARDED: u32 = 1022;

/// A machine with Debian's disk as its first disk.
fn machine(irqchip: &str) -> harness::Launch {
    let disk = debian().disk;
    rvmm(&["--mem", "512M", "--irqchip", irqchip]).path("--disk=", &disk, ",ro=on")
}

/// Forwards the guest's connection to vsock port [`FORWARDED`] of the host back to the guest's vsock port 22, so that sshd is
/// reached from outside without an ssh client on the host. Returns the number of bytes from sshd.
fn lead_to_ssh(path: &Path) -> JoinHandle<u64> {
    let mut detour = path.as_os_str().to_owned();
    detour.push(format!("_{FORWARDED}"));
    let listener = UnixListener::bind(PathBuf::from(detour)).expect("a socket of the host");
    let path = path.to_owned();
    thread::spawn(move || {
        let client = listener.accept().expect("the guest's client").0;
        let mut server = UnixStream::connect(path).expect("rvmm listens");
        server.write_all(b"CONNECT 22\n").expect("rvmm reads");
        let mut answer = String::new();
        BufReader::with_capacity(1, &server).read_line(&mut answer).expect("an answer");
        assert!(answer.starts_with("OK "), "nobody listens on port 22: {answer:?}");
        let (mut from_client, mut to_server) =
            (client.try_clone().expect("a copy"), server.try_clone().expect("a copy"));
        let there = thread::spawn(move || {
            let _ = io::copy(&mut from_client, &mut to_server);
            let _ = to_server.shutdown(Shutdown::Write);
        });
        let said = io::copy(&mut server, &mut &client).expect("the guest's sshd");
        let _ = client.shutdown(Shutdown::Both);
        there.join().expect("a thread");
        said
    })
}

/// Checks ssh over vsock: Debian's sshd listens there without configuration, because systemd detects the virtual machine.
fn look_at_ssh(session: &mut Session, detour: JoinHandle<u64>) {
    let key = "mkdir -p -m 700 ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 && \
               cp ~/.ssh/id_ed25519.pub ~/.ssh/authorized_keys && echo made";
    assert_eq!(session.ask(key), "made\n");
    let ssh = format!(
        "ssh -q -o StrictHostKeyChecking=no -o BatchMode=yes -p {FORWARDED} vsock/2 'echo $((6*7)) on $(hostname)'"
    );
    assert_eq!(session.ask(&ssh), "42 on rvmm-debian\n");
    assert!(detour.join().expect("ssh came by") > 0);
}

#[test]
fn debians_u_boot_reaches_its_prompt_and_starts_debian_by_its_menu_with_ssh_over_vsock() {
    let Some(host) = one_host("plic") else { return };
    for irqchip in host.usual_irqchip() {
        let folder = tempfile::tempdir().expect("a folder");
        let sockets = folder.path().join("vsock");
        let detour = lead_to_ssh(&sockets);
        let machine = machine(irqchip).path("--vsock=", &sockets, "");
        let mut session = machine.kernel(&debian().firmware).start();
        // It waits for two seconds, which a busy host may miss: a key that was sent before counts as well.
        session.expect("Net:");
        session.send("\n");
        session.expect("Hit any key to stop autoboot");
        session.send("\n");
        session.expect("=> ");
        session.send("virtio scan; virtio info; echo do''ne\n");
        let devices = session.expect("done\r\n");
        assert!(devices.contains("VirtIO Block Device"), "{devices}");
        session.send("boot\n");
        session.expect("Found /boot/extlinux/extlinux.conf");
        session.expect("1:\tDebian GNU/Linux 13 (trixie)");
        session.expect("Enter choice: ");
        session.send("1\n");
        session.expect("login: ");
        session.send("root\n");
        session.expect("Password: ");
        session.send("rvmm\n");
        session.expect(":~#");
        assert_eq!(session.ask("systemd-detect-virt"), "kvm\n");
        let checked = session.ask("rvmm-check");
        assert!(checked.ends_with("check: passed\n"), "{checked}");
        look_at_ssh(&mut session, detour);
        session.send("systemctl poweroff\n");
        assert_eq!(session.exit_code(), 0);
    }
}
