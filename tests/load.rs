//! Ring 3: load by Debian's own programs, combined with killed machines, full and failing disks, drivers that are unbound,
//! reboots.
//!
//! The guest is Debian's disk with a shell as process 1. A long run (`scripts/test long`) has more repetitions.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;
#[path = "linux/shell.rs"]
mod shell;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use harness::{Session, blank_image, by_length, debian, one_host, rvmm};
use rustix::process::Signal;

/// Boots Debian with these modules and arguments.
fn boot(irqchip: &str, modules: &str, arguments: &[String]) -> Session {
    let machine = rvmm(&["--mem", "512M", "--irqchip", irqchip])
        .path("--disk=", &debian().disk, ",ro=on")
        .args(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    shell::boot(machine, modules)
}

/// Runs a script of the host's shell, as root.
fn on_the_host(script: &str) {
    let output = Command::new("sh").args(["-euc", script]).output().expect("sh starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {said}");
}

/// Debian's disk mounted on the host, for programs that the host lacks; a tmpfs of 8 MiB; a device that fails on demand.
struct Lab {
    at: tempfile::TempDir,
    server: Option<Child>,
}

impl Lab {
    fn new() -> Self {
        let at = tempfile::tempdir().expect("a folder");
        let lab = Self { at, server: None };
        let (debian, root, small) = (debian().disk, lab.root(), lab.small());
        for folder in [&root, &small] {
            fs::create_dir(folder).expect("a folder");
        }
        on_the_host(&format!(
            "mount -t tmpfs -o size=8m small {small}; losetup -f >{small}/root; losetup -r -o 1048576 $(cat {small}/root) {}; mount -t ext4 -o ro,noload $(cat {small}/root) {root}; mount -o bind /dev {root}/dev; mount -t tmpfs tmp {root}/tmp; \
             mount -t proc proc {root}/proc; mount -t sysfs sys {root}/sys; \
             modprobe dm_flakey; truncate -s 16M {small}/backing; \
             losetup -f >{small}/name; losetup $(cat {small}/name) {small}/backing",
            debian.display(),
            root = root.display(),
            small = small.display()
        ));
        lab.dm("create rvmm-flaky", "linear");
        lab
    }

    fn root(&self) -> PathBuf {
        self.at.path().join("debian")
    }

    fn small(&self) -> PathBuf {
        self.at.path().join("small")
    }

    /// The device that fails.
    fn flaky(&self) -> &'static str {
        "/dev/mapper/rvmm-flaky"
    }

    /// Sets the device-mapper table: `linear` passes all requests on, `error` none, `flakey` fails at once.
    fn dm(&self, command: &str, target: &str) {
        let device = fs::read_to_string(self.small().join("name")).expect("a loop device");
        let device = device.trim();
        let table = match target {
            "linear" => format!("0 32768 linear {device} 0"),
            _ => format!("0 32768 flakey {device} 0 0 3600"),
        };
        on_the_host(&format!(
            "DM_DISABLE_UDEV=1 chroot {} dmsetup {command} --table '{table}'",
            self.root().display()
        ));
    }

    fn turn(&self, target: &str) {
        let root = self.root();
        let root = root.display();
        on_the_host(&format!("DM_DISABLE_UDEV=1 chroot {root} dmsetup suspend rvmm-flaky"));
        self.dm("load rvmm-flaky", target);
        on_the_host(&format!("DM_DISABLE_UDEV=1 chroot {root} dmsetup resume rvmm-flaky"));
    }

    /// Starts Debian's iperf3 on the host.
    fn serve_iperf(&mut self) {
        let mut server = Command::new("chroot");
        server.arg(self.root()).args(["iperf3", "-s"]).stdin(Stdio::null()).stdout(Stdio::null());
        self.server = Some(server.spawn().expect("iperf3 starts"));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
        let script = format!(
            "DM_DISABLE_UDEV=1 chroot {root} dmsetup remove rvmm-flaky; losetup -d $(cat {small}/name); \
             umount {root}/sys {root}/proc {root}/tmp {root}/dev {root}; losetup -d $(cat {small}/root); umount {small}",
            root = self.root().display(),
            small = self.small().display()
        );
        let _ = Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).status();
    }
}

/// A sparse file of this size in MiB.
fn blank(path: &Path, mib: u64) {
    File::create(path).and_then(|file| file.set_len(mib << 20)).expect("a sparse file");
}

#[test]
fn fio_finds_what_it_wrote_to_raw_and_qcow2_disks_also_after_the_machine_was_killed() {
    let Some(host) = one_host("aia") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let raw = folder.path().join("disk.img");
    blank(&raw, 128);
    let disks = [
        format!("--disk={}", raw.display()),
        format!("--disk={},format=qcow2", blank_image(folder.path(), 128 << 20).display()),
    ];
    let size = by_length(48, 4);
    let jobs = format!(
        "cd /tmp; fio --minimal --direct=1 --rw=randwrite --bs=4k --size={size}M --ioengine=libaio --iodepth=16 \
         --verify=crc32c --verify_fatal=1 --end_fsync=1 --name=raw --filename=/dev/vdb --name=qcow2 --filename=/dev/vdc"
    );
    let mut session = boot(host.irqchips[0], "virtio_blk", &disks);
    let written = session.ask(&format!("{jobs} >/tmp/out && echo verified || cat /tmp/out"));
    assert_eq!(written, "verified\n");
    // The other half of both disks is being written when the machine is killed.
    session.send(
        "fio --minimal --direct=1 --rw=randwrite --bs=4k --offset=64M --size=32M --ioengine=libaio --iodepth=16 --loops=100 \
         --name=raw --filename=/dev/vdb --name=qcow2 --filename=/dev/vdc >/dev/null & sleep 3; echo under''way\n",
    );
    session.expect("underway\r\n");
    session.signal(Signal::KILL);
    drop(session);

    let irqchip = host.irqchips.last().copied().unwrap_or(host.irqchips[0]);
    let mut session = boot(irqchip, "virtio_blk", &disks);
    let jobs = jobs.replace("--verify=crc32c", "--verify=crc32c --verify_only");
    let read = session.ask(&format!("{jobs} >/tmp/out && echo verified || cat /tmp/out"));
    assert_eq!(read, "verified\n");
    session.send("echo o >/proc/sysrq-trigger\n");
    assert_eq!(session.exit_code(), 0);
}

/// Arguments for every kind of device.
fn everything(lab: &Lab, shared: &Path) -> Vec<String> {
    let full = lab.small().join("full.img");
    blank(&full, 32);
    let spare = lab.at.path().join("spare.img");
    blank(&spare, 16);
    vec![
        format!("--disk={}", full.display()),
        format!("--disk={}", lab.flaky()),
        format!("--disk={}", spare.display()),
        "--net=tap=rvmmload".into(),
        "--net=user".into(),
        format!("--share=work={}", shared.display()),
        format!("--vsock={}", lab.at.path().join("vsock").display()),
        "--device=rng".into(),
        "--device=balloon,stats=1,reporting=on".into(),
        format!("--console=port=test.port,path={}", lab.at.path().join("port").display()),
        "--power-button".into(),
    ]
}

const MODULES: &str = "virtio_blk virtio_net virtio_rng virtio_balloon virtio_console virtio_input \
                       vmw_vsock_virtio_transport virtiofs crc32c_generic";

fn meet_a_full_disk(session: &mut Session, lab: &Lab) {
    let fill = "dd if=/dev/urandom of=/dev/vdb bs=64k count=256 oflag=direct 2>&1 | grep -o 'Input/output error'";
    assert_eq!(session.ask(fill), "Input/output error\n");
    // Existing blocks can be read, and allocated blocks can be written again.
    let works = "dd if=/dev/vdb of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null && dd if=/dev/zero of=/dev/vdb bs=64k count=16 oflag=direct 2>/dev/null && echo works";
    assert_eq!(session.ask(works), "works\n");
    on_the_host(&format!("mount -o remount,size=64m {}", lab.small().display()));
    assert_eq!(session.ask(&format!("{fill}; echo full no more")), "full no more\n");
}

fn meet_a_failing_disk(session: &mut Session, lab: &Lab) {
    // Each time at another offset, and with fsync: the host caches reads and buffers writes.
    let try_both = |at: u32| {
        format!(
            "for way in 'if=/dev/vdc of=/dev/null iflag=direct skip={at}' 'if=/dev/zero of=/dev/vdc conv=fsync seek={at}'; do \
             dd $way bs=64k count=4 2>/dev/null && echo done''1 || echo failed; done"
        )
    };
    assert_eq!(session.ask(&try_both(0)), "done1\ndone1\n");
    lab.turn("flakey");
    assert_eq!(session.ask(&try_both(64)), "failed\nfailed\n");
    lab.turn("linear");
    assert_eq!(session.ask(&try_both(128)), "done1\ndone1\n");
}

fn send_both_ways(session: &mut Session, address: &str) {
    let seconds = by_length(10, 1);
    for way in ["", "-R"] {
        // The server accepts one client at a time, with a short pause between two of them.
        let run = format!("iperf3 -c {address} {way} -t {seconds} -f k >/tmp/said 2>&1");
        let said = session
            .ask(&format!("for n in $(seq 60); do {run} && break; sleep 1; done; cat /tmp/said"));
        let received = said.lines().find(|line| line.ends_with("receiver"));
        let speed = received.and_then(|line| line.split("Kbits/sec").next()).and_then(|line| {
            line.split_whitespace().next_back().and_then(|number| number.parse::<f64>().ok())
        });
        assert!(speed.is_some_and(|speed| speed > 0.0), "{address} {way}: {said}");
    }
}

/// Sets the addresses of the guest's network cards, also after a driver has been bound again.
const PLUG_IN: &str = "for n in eth0 eth1; do ip link set $n up; done; ip addr replace 192.0.2.102/30 dev eth0; \
                       ip addr replace 10.0.2.15/24 dev eth1";

/// Unbinds and binds every driver except the root disk's repeatedly, while all devices are in use.
fn reset_everything(session: &mut Session) {
    let times = by_length(100, 4);
    // All jobs end when the file is deleted.
    session.ask("touch /tmp/go; mkdir -p /w");
    for work in [
        "dd if=/dev/vdd of=/dev/null bs=64k count=64 iflag=direct",
        "dd if=/dev/zero of=/dev/vdb bs=64k count=64 oflag=direct",
        "dd if=/dev/hwrng of=/dev/null bs=4k count=16",
        "ping -c 20 -i 0.01 -s 1400 192.0.2.101",
        "iperf3 -c 192.0.2.101 -t 1",
    ] {
        // A connection over a network card that is removed waits for a quarter of an hour.
        session.ask(&format!(
            "(while [ -e /tmp/go ]; do timeout -s KILL 10 {work} >/dev/null 2>&1; sleep 0.05; done) & true"
        ));
    }
    let seen = session.ask(&format!(
        "for n in $(seq {times}); do for d in /sys/bus/virtio/devices/*; do \
         [ -e $d/driver ] && [ ! -e $d/block/vda ] || continue; drv=$(readlink -f $d/driver); \
         echo ${{d##*/}} >$drv/unbind; echo ${{d##*/}} >$drv/bind || echo lost $d; done; {PLUG_IN}; \
         ping -q -c 1 -w 300 192.0.2.101 >/dev/null || echo no network in round $n; done; rm /tmp/go; wait; \
         ls -d /sys/bus/virtio/devices/*/driver | wc -l; dmesg | grep -cE 'BUG|blocked for|WARNING|Oops'"
    ));
    assert_eq!(seen, "12\n0\n", "devices with a driver, complaints of the kernel");
}

#[test]
fn a_machine_with_every_device_survives_full_and_failing_disks_resets_and_reboots_under_load() {
    let Some(host) = one_host("aia") else { return };
    if !rustix::process::geteuid().is_root() {
        return harness::skip("taps, mounts and device-mapper take root");
    }
    let mut lab = Lab::new();
    lab.serve_iperf();
    let shared = lab.at.path().join("work");
    fs::create_dir(&shared).expect("a folder");
    let mut session = boot(host.irqchips[0], MODULES, &everything(&lab, &shared));
    on_the_host("ip addr add 192.0.2.101/30 dev rvmmload; ip link set rvmmload up");
    let connect = format!("{PLUG_IN}; mkdir -p /w; mount -t virtiofs work /w && echo connected");
    assert_eq!(session.ask(&connect), "connected\n");

    meet_a_full_disk(&mut session, &lab);
    meet_a_failing_disk(&mut session, &lab);
    send_both_ways(&mut session, "192.0.2.101");
    send_both_ways(&mut session, "10.0.2.2");
    assert_eq!(session.ask("umount /w && echo away"), "away\n");
    reset_everything(&mut session);
    assert_eq!(session.ask(&connect), "connected\n");
    assert_eq!(
        session.ask(
            "echo from the guest >/w/file; sync; until ping -c 1 -W 60 192.0.2.101 >/dev/null 2>&1; do sleep 1; done; echo answered"
        ),
        "answered\n"
    );
    assert_eq!(fs::read_to_string(shared.join("file")).expect("the file"), "from the guest\n");

    for _ in 0..by_length(10, 1) {
        session.send(
            "fio --minimal --direct=1 --rw=randrw --bs=4k --size=8M --loops=1000 --ioengine=libaio --iodepth=16 --name=a --filename=/dev/vdd >/dev/null & \
             iperf3 -c 192.0.2.101 -t 1000 >/dev/null & ping -f 192.0.2.101 >/dev/null & \
             (while :; do cat /dev/hwrng; done) >/w/noise & sleep 3; echo b >/proc/sysrq-trigger\n",
        );
        session = shell::set_up(session, MODULES);
        on_the_host(
            "ip addr add 192.0.2.101/30 dev rvmmload 2>/dev/null || true; ip link set rvmmload up",
        );
        assert_eq!(session.ask(&connect), "connected\n");
    }
    assert_eq!(
        session.ask("dd if=/dev/vdd of=/dev/null bs=64k 2>/dev/null && echo whole"),
        "whole\n"
    );
    session.send("echo o >/proc/sysrq-trigger\n");
    assert_eq!(session.exit_code(), 0);
}
