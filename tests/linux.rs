//! Ring 3: Debian's kernel under rvmm, to the built-in prompt and to a user's initramfs, with every interrupt
//! controller that the host supports. A boot takes a quarter of a minute in an emulated host, so each one checks much.

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
#[path = "linux/log.rs"]
mod log;

use std::io::Read;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::{Launch, STOP_LIMIT, host, kernel, one_host, rvmm};
use rustix::process::Signal;

/// Bytes of console output that have to pass a slow reader unchanged, in a long run and in others. Each is an exit, and a
/// million take two minutes in an emulated host.
const FLOOD: (usize, usize) = (10_000_000, 500_000);

/// A machine of 512 MiB with Debian's kernel.
fn machine(irqchip: &str, cpus: &str) -> Launch {
    rvmm(&["--mem", "512M", "--cpus", cpus, "--irqchip", irqchip]).kernel(&kernel())
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_else(|_| panic!("not a number: {text:?}"))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs()
}

/// Boots to the prompt and checks the properties of the machine.
fn look_around(irqchip: &str, cpus: &str) {
    let mut session = machine(irqchip, cpus).start();
    let greeting = format!("on {cpus} harts");
    session.expect("rvmm: Linux ");
    assert!(session.expect("rvmm# ").contains(&greeting), "the greeting does not say {greeting:?}");

    assert_eq!(session.ask("echo $((6*7))"), "42\n");
    assert_eq!(session.ask("nproc"), format!("{cpus}\n"));
    let cpuinfo = session.ask("cat /proc/cpuinfo");
    assert_eq!(cpuinfo.matches("\nhart\t").count().to_string(), cpus, "{cpuinfo}");
    assert!(cpuinfo.contains("rv64imafdc"), "{cpuinfo}");
    assert!(cpuinfo.contains("mmu\t\t: sv"), "{cpuinfo}");

    // 512 MiB minus the kernel's own memory: its image, an entry per page, the per-CPU areas.
    let total = session.ask("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo");
    let megabytes = number(&total) / 1024;
    assert!((400..512).contains(&megabytes), "MemTotal says {megabytes} MiB of 512");
    assert_eq!(session.ask("cat /proc/cmdline"), "earlycon=sbi console=ttyS0\n");

    // The RTC, and the time that the kernel has read from it at boot.
    for command in ["cat /sys/class/rtc/rtc0/since_epoch", "date +%s"] {
        let seconds = number(&session.ask(command));
        assert!(
            seconds.abs_diff(now()) < 300,
            "{command} says {seconds}, the host's clock {}",
            now()
        );
    }

    let interrupts = session.ask("cat /proc/interrupts");
    let controller = if irqchip == "aia" { " APLIC" } else { " PLIC" };
    let uart = interrupts.lines().find(|line| line.ends_with("ttyS0")).unwrap_or("");
    assert!(uart.contains(controller), "ttyS0 is not at the {controller}: {interrupts}");

    let complaints = log::complaints(&session.ask("dmesg -r"));
    assert!(complaints.is_empty(), "the kernel complains:\n{}", complaints.join("\n"));

    // A reboot: the same process, a new machine.
    session.send("reboot\n");
    session.expect("rvmm: Linux ");
    session.expect("rvmm# ");
    assert_eq!(session.ask("nproc"), format!("{cpus}\n"));
    session.send("poweroff\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn the_built_in_prompt_shows_the_machine_that_was_asked_for_and_survives_a_reboot() {
    let Some(host) = host() else { return };
    look_around(host.irqchips[0], "4");
}

#[test]
fn one_hart_comes_up_with_every_interrupt_controller() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        own_initramfs(irqchip, "1");
    }
}

#[test]
fn two_and_eight_harts_come_up() {
    let Some(host) = one_host("plic") else { return };
    own_initramfs(host.irqchips[0], "2");
    own_initramfs(host.irqchips[0], "8");
}

#[test]
fn four_harts_come_up_with_a_plic_where_the_host_has_aia() {
    let Some(host) = host() else { return };
    if host.irqchips.len() == 1 {
        return harness::skip("the host has no AIA, so the other tests use the PLIC already");
    }
    look_around("plic", "4");
}

/// Boots to a user's initramfs, types into its shell, and powers off from there.
fn own_initramfs(irqchip: &str, cpus: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let initrd = initramfs::build(folder.path(), &[], &[]);
    let mut session = machine(irqchip, cpus)
        .args(&["--cmdline", "console=ttyS0 quiet"])
        .path("--initrd=", &initrd, "")
        .start();
    session.expect("own initramfs is up\r\n");
    session.expect("# ");
    assert_eq!(session.ask("nproc"), format!("{cpus}\n"));
    assert_eq!(session.ask("echo $((6*7))"), "42\n");
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn a_kernel_without_the_memory_that_it_needs_says_so() {
    let Some(_) = host() else { return };
    // Enough for its image, but not for its page tables: it panics long before its UART driver starts.
    let mut session = rvmm(&["--mem", "64M"]).kernel(&kernel()).start();
    session.expect("Kernel panic - not syncing: ");
    session.signal(Signal::TERM);
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn a_flood_reaches_a_slow_reader_byte_for_byte_and_an_idle_machine_stops() {
    let Some(host) = one_host("plic") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let count = harness::by_length(FLOOD.0, FLOOD.1);
    let data = harness::flood(count);
    let initrd = initramfs::build(folder.path(), &[("data", &data)], &[]);
    let mut session = machine(host.irqchips[0], "1")
        .args(&["--cmdline", "console=ttyS0 quiet flood"])
        .path("--initrd=", &initrd, "")
        .unread()
        .start();
    let mut output = session.take_output();
    read_until(&mut output, b"own initramfs is up\r\n");
    read_until(&mut output, b"begin\n");
    // Long enough to fill every buffer in between.
    std::thread::sleep(Duration::from_secs(1));
    let mut got = vec![0; count];
    for piece in got.chunks_mut(100_000) {
        output.read_exact(piece).expect("the guest's output");
        std::thread::sleep(Duration::from_millis(5));
    }
    let same = got.iter().zip(&data).take_while(|(a, b)| a == b).count();
    assert!(got == data, "only the first {same} bytes are right");
    read_until(&mut output, b"end\n");

    // Only a waiting shell runs in the guest now.
    read_until(&mut output, b"# ");
    session.signal(Signal::TERM);
    assert_eq!(session.exit_code_within(STOP_LIMIT), 0);
}

/// Reads byte by byte until `text`.
fn read_until(stream: &mut impl Read, text: &[u8]) {
    let mut seen = Vec::new();
    while !seen.ends_with(text) {
        let mut byte = [0];
        let count = stream.read(&mut byte).expect("a stream");
        let so_far = String::from_utf8_lossy(&seen[seen.len().saturating_sub(2000)..]).into_owned();
        assert_eq!(count, 1, "the end, before {:?}: {so_far}", String::from_utf8_lossy(text));
        seen.push(byte[0]);
    }
}
