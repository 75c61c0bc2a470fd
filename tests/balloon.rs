//! Ring 3: changes of a balloon's target through the library while a Debian guest computes.

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

use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::time::{Duration, Instant};

use harness::{kernel, one_host};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rvmm::config::{InitrdConfig, IrqchipChoice, VmConfig};
use rvmm::terminal::Console;
use rvmm::vmm::BalloonControl;
use rvmm::vmm::{Parts, Vmm};
use rvmm_devices::config::BalloonConfig;

/// The guest's memory, and half of it.
const MEMORY: u64 = 256 << 20;
const HALF: u64 = MEMORY / 2;

/// A guest's console.
struct Shell {
    keys: PipeWriter,
    output: PipeReader,
    seen: String,
}

impl Shell {
    fn expect(&mut self, text: &str) -> String {
        loop {
            if let Some((before, after)) = self.seen.split_once(text) {
                let (before, after) = (before.to_owned(), after.to_owned());
                self.seen = after;
                return before;
            }
            let limit = Timespec { tv_sec: harness::LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
            let came = poll(&mut [PollFd::new(&self.output, PollFlags::IN)], Some(&limit));
            assert_eq!(came.expect("poll"), 1, "it has not said {text:?}: {}", self.seen);
            let mut bytes = [0; 4096];
            let read = self.output.read(&mut bytes).expect("the console can be read");
            assert!(read > 0, "it ended without saying {text:?}: {}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&bytes[..read]).replace('\r', ""));
        }
    }

    fn ask(&mut self, command: &str) -> String {
        // Marks that are typed in two halves appear complete only in the output of the shell.
        let line = format!("echo st''art; {command}; echo do''ne\n");
        self.keys.write_all(line.as_bytes()).expect("the console takes keys");
        self.expect("start\n");
        self.expect("done\n")
    }
}

/// Resident memory of this process in bytes, most of which is the guest's.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").expect("statm");
    let pages: u64 = text.split(' ').nth(1).expect("a second number").parse().expect("a number");
    pages * 4096
}

/// Waits until the guest has released this number of bytes.
fn until_given(balloon: &BalloonControl, bytes: u64) {
    let limit = Instant::now() + harness::LIMIT;
    while balloon.actual() != bytes {
        assert!(Instant::now() < limit, "the guest has given {} of {bytes}", balloon.actual());
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn balloon_to_half_and_back(irqchip: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let initrd = initramfs::build(folder.path(), &[], &["virtio_mmio", "virtio_balloon"]);
    let mut config = VmConfig { mem: MEMORY, ..VmConfig::default() };
    config.irqchip = if irqchip == "aia" { IrqchipChoice::Aia } else { IrqchipChoice::Plic };
    config.boot.kernel = Some(kernel().into());
    config.boot.initrd = InitrdConfig::File(initrd.into());
    config.boot.cmdline = "console=ttyS0 quiet".into();
    config.devices = vec![BalloonConfig::default().into()];
    let ((input, keys), (output, writer)) = (pipe().expect("a pipe"), pipe().expect("a pipe"));
    let console = Console::from_fds(Some(input.into()), Some(writer.into())).expect("a console");
    let parts = Parts { console: Some(console), ..Parts::default() };
    let machine = Vmm::build_with(config.validate().expect("a valid machine"), parts)
        .expect("a machine")
        .start()
        .expect("a thread");
    let handle = machine.handle();
    let mut shell = Shell { keys, output, seen: String::new() };
    shell.expect("own initramfs is up\n");

    // A repeated computation with a known result, and memory that was used once.
    shell.ask("seq 1 20000 >/known; sha256sum </known >/expected; echo 0 >/rounds; : >/wrong");
    shell.ask(
        "(while :; do sha256sum </known | cmp -s - /expected || echo wrong >>/wrong; \
         echo $(($(cat /rounds) + 1)) >/new && mv /new /rounds; sleep 0.2; done) & true",
    );
    shell.ask("dd if=/dev/zero of=/used bs=1M count=80 2>/dev/null; rm /used");
    let before = resident();

    handle.balloon().set_target(HALF).expect("a target");
    until_given(handle.balloon(), HALF);
    let halved = resident();
    assert!(halved + (40 << 20) < before, "{before} bytes were resident, {halved} are now");
    let rounds: u64 = shell.ask("cat /rounds").trim().parse().expect("a number");

    handle.balloon().set_target(0).expect("a target");
    until_given(handle.balloon(), 0);
    shell.ask("dd if=/dev/zero of=/used bs=1M count=80 2>/dev/null");
    assert_eq!(shell.ask("stat -c %s /used"), "83886080\n");
    assert_eq!(
        shell.ask(&format!("until [ $(cat /rounds) -gt {rounds} ]; do sleep 1; done; cat /wrong")),
        ""
    );

    shell.keys.write_all(b"poweroff -f\n").expect("the console takes keys");
    let reason = machine.wait().expect("an end");
    assert_eq!(reason.to_string(), "The guest powered off");
}

#[test]
fn memory_goes_to_the_host_and_comes_back_while_the_guest_computes() {
    let Some(host) = one_host("plic") else { return };
    balloon_to_half_and_back(host.irqchips[0]);
}
