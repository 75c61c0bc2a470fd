//! Ring 3: Debian's own drivers on rvmm's virtio devices. Interrupts of each device are tested on both hosts; the other tests of
//! disks do not depend on interrupts.

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

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use harness::{Session, blank_image, busybox, host, kernel, one_host, rvmm};
use rustix::process::Signal;

/// Modules for a disk with a file system.
const DISK: &[&str] = &["virtio_mmio", "virtio_blk", "crc32c_generic", "ext4"];
/// Modules for a network.
const NET: &[&str] = &["virtio_mmio", "virtio_net"];

/// Boots Debian's kernel with these modules loaded and these arguments, up to its shell.
fn boot(irqchip: &str, modules: &[&str], arguments: &[&str]) -> (Session, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let initrd = initramfs::build(folder.path(), &[], modules);
    let session = rvmm(&["--mem", "256M", "--irqchip", irqchip])
        .args(&["--cmdline", "console=ttyS0 quiet"])
        .args(arguments)
        .path("--initrd=", &initrd, "")
        .kernel(&kernel())
        .start();
    session.expect("own initramfs is up\r\n");
    (session, folder)
}

fn power_off(mut session: Session) {
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn debians_driver_draws_random_numbers_through_both_controllers() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let (mut session, _folder) =
            boot(irqchip, &["virtio_mmio", "virtio-rng"], &["--device", "rng"]);
        let current = session.ask("cat /sys/class/misc/hw_random/rng_current");
        assert_eq!(current, "virtio_rng.0\n");
        let counts = session.ask("dd if=/dev/hwrng bs=4096 count=16 2>/dev/null | wc -c");
        assert_eq!(counts.trim(), "65536");
        let interrupts = session.ask("grep virtio /proc/interrupts");
        let taken =
            interrupts.split_whitespace().nth(1).and_then(|count| count.parse::<u32>().ok());
        assert!(taken.is_some_and(|count| count > 0), "{interrupts}");
        power_off(session);
    }
}

/// An empty file of this size in bytes.
fn blank(folder: &Path, bytes: u64) -> std::path::PathBuf {
    let path = folder.join("disk.img");
    File::create(&path).and_then(|file| file.set_len(bytes)).expect("a sparse file");
    path
}

#[test]
fn a_disk_holds_a_file_system_has_a_serial_and_grows_while_the_guest_runs() {
    let Some(host) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for irqchip in host.usual_irqchip() {
        let path = blank(folder.path(), 64 << 20);
        let disk = format!("{},serial=rvmm-test", path.display());
        let (mut session, _folder) = boot(irqchip, DISK, &["--disk", &disk]);
        assert_eq!(session.ask("cat /sys/block/vda/serial; echo"), "rvmm-test\n");
        assert_eq!(session.ask("cat /sys/block/vda/size"), "131072\n");
        assert_eq!(
            session
                .ask("mke2fs /dev/vda >/dev/null && mkdir /m && mount /dev/vda /m && echo mounted"),
            "mounted\n"
        );
        let made = session.ask(
            "dd if=/dev/urandom of=/m/file bs=64k count=128 2>/dev/null; sync; md5sum </m/file",
        );
        // Bypasses the guest's page cache: the data has to be on the disk.
        let read = session.ask("umount /m; echo 3 >/proc/sys/vm/drop_caches; mount -o ro /dev/vda /m; md5sum </m/file; umount /m");
        assert_eq!(made, read);
        assert_eq!(made.len(), 36, "{made}");

        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(96 << 20))
            .expect("a longer file");
        let size = session.ask("dd if=/dev/zero of=/dev/vda bs=4k seek=16000 count=1 conv=fsync 2>/dev/null; until [ $(cat /sys/block/vda/size) = 196608 ]; do sleep 1; done; cat /sys/block/vda/size");
        assert_eq!(size, "196608\n");
        power_off(session);
        fs::remove_file(path).expect("a file");
    }
}

#[test]
fn synced_data_survives_a_killed_machine() {
    let Some(host) = one_host("plic") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = blank(folder.path(), 16 << 20);
    let disk = path.display().to_string();
    let (mut session, _folder) = boot(host.irqchips[0], DISK, &["--disk", &disk]);
    let sum = session.ask("dd if=/dev/urandom of=/data bs=1M count=4 2>/dev/null; dd if=/data of=/dev/vda bs=1M seek=8 conv=fsync 2>/dev/null; md5sum </data");
    session.signal(Signal::KILL);
    drop(session);
    let mut bytes = vec![0; 4 << 20];
    File::open(&path).and_then(|file| file.read_exact_at(&mut bytes, 8 << 20)).expect("the disk");
    let copy = folder.path().join("copy");
    fs::write(&copy, &bytes).expect("a file");
    let here = Command::new(busybox()).arg("md5sum").arg(&copy).output().expect("busybox starts");
    assert_eq!(sum.get(..32), String::from_utf8_lossy(&here.stdout).get(..32));
}

#[test]
fn a_file_system_in_a_qcow2_image_survives_a_killed_machine() {
    let Some(host) = one_host("plic") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = blank_image(folder.path(), 256 << 20);
    let disk = format!("{},format=qcow2", path.display());
    let (mut session, _folder) = boot(host.irqchips[0], DISK, &["--disk", &disk]);
    assert_eq!(session.ask("cat /sys/block/vda/size"), "524288\n");
    assert_eq!(
        session.ask("mke2fs /dev/vda >/dev/null && mkdir /m && mount /dev/vda /m && echo mounted"),
        "mounted\n"
    );
    let made = session.ask("dd if=/dev/urandom of=/m/file bs=64k count=128 2>/dev/null; dd if=/dev/urandom of=/m/gone bs=64k count=64 2>/dev/null; rm /m/gone; sync; md5sum </m/file");
    assert_eq!(made.len(), 36, "{made}");
    // In progress when the machine is killed.
    session.send("dd if=/dev/zero of=/m/more bs=64k count=640 conv=fsync & echo go''ing\n");
    session.expect("going\r\n");
    session.signal(Signal::KILL);
    drop(session);

    let irqchip = host.irqchips.last().copied().unwrap_or(host.irqchips[0]);
    let (mut session, _folder) = boot(irqchip, DISK, &["--disk", &disk]);
    let read = session.ask("mkdir /m; mount /dev/vda /m; md5sum </m/file; rm -f /m/more");
    assert_eq!(made, read);
    assert_eq!(session.ask("fstrim /m && umount /m && echo trimmed"), "trimmed\n");
    power_off(session);
}

#[test]
fn a_read_only_disk_refuses_writes_and_one_in_use_is_not_opened_twice() {
    let Some(host) = one_host("plic") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = blank(folder.path(), 1 << 20);
    let disk = path.display().to_string();
    let (mut session, _folder) =
        boot(host.irqchips[0], DISK, &["--disk", &format!("{disk},ro=on")]);
    assert_eq!(session.ask("cat /sys/block/vda/ro"), "1\n");
    assert_eq!(
        session.ask("dd if=/dev/zero of=/dev/vda count=1 2>/dev/null || echo refused"),
        "refused\n"
    );
    let mut second = rvmm(&["--mem", "64M", "--no-initrd", "--disk", &disk])
        .kernel(&kernel())
        .no_input()
        .start();
    assert_eq!(second.exit_code(), 1);
    assert!(second.all_errors().contains("disk.img"), "{}", second.all_errors());
    power_off(session);
}

#[test]
fn a_file_that_shrinks_gives_io_errors_and_the_guest_continues() {
    let Some(host) = one_host("plic") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = blank(folder.path(), 8 << 20);
    let disk = path.display().to_string();
    let (mut session, _folder) = boot(host.irqchips[0], DISK, &["--disk", &disk]);
    File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(1 << 20))
        .expect("a shorter file");
    // The kernel gets the new size with the first request that fails, and ends there from then on.
    let lost = "dmesg -n 1; dd if=/dev/vda bs=4k skip=1024 count=1 2>/dev/null | wc -c";
    assert_eq!(session.ask(lost), "0\n");
    assert_eq!(session.ask("dd if=/dev/vda bs=4k count=1 2>/dev/null | wc -c"), "4096\n");
    let size =
        "until [ $(cat /sys/block/vda/size) = 2048 ]; do sleep 1; done; cat /sys/block/vda/size";
    assert_eq!(session.ask(size), "2048\n");
    power_off(session);
}

#[test]
fn a_guest_and_its_host_talk_over_a_tap_both_ways() {
    let Some(host) = host() else { return };
    if !rustix::process::geteuid().is_root() {
        return harness::skip("a tap takes root");
    }
    for (number, irqchip) in host.usual_irqchip().iter().enumerate() {
        let tap = format!("rvmmtest{number}");
        let here = format!("192.0.2.{}", 4 * number + 1);
        let there = format!("192.0.2.{}", 4 * number + 2);
        let net = format!("tap={tap},mac=02:00:00:00:00:07,queues=2");
        let (mut session, _folder) = boot(irqchip, NET, &["--cpus", "2", "--net", &net]);
        network::plug_in(&mut session, &tap, &here, &there);
        network::echo_over_tcp(&mut session, &here);
        network::pull_the_cable(&mut session, &tap);
        power_off(session);
    }
}

#[test]
fn the_power_button_is_pressed_by_a_signal_and_a_second_one_stops() {
    let Some(host) = host() else { return };
    for irqchip in host.usual_irqchip() {
        let modules = &["virtio_mmio", "virtio_input", "evdev"];
        let (mut session, _folder) =
            boot(irqchip, modules, &["--power-button", "--shutdown-timeout", "60"]);
        assert_eq!(session.ask("cat /sys/class/input/input0/name"), "rvmm power button\n");
        // Only a process with the device open gets the event.
        session.send("exec 3</dev/input/event0; echo wait''ing; dd bs=24 count=4 <&3 2>/dev/null | xxd -p -c 24; echo press''ed\n");
        session.expect("waiting\r\n");
        session.signal(Signal::TERM);
        let events = session.expect("pressed\r\n");
        // Each ends in type, code and value: the key down, the end of the report, the key up, the end of the report.
        let ends: Vec<&str> = events.split_whitespace().filter_map(|line| line.get(32..)).collect();
        assert_eq!(
            ends,
            ["0100740001000000", "0000000000000000", "0100740000000000", "0000000000000000"],
            "{events}"
        );
        session.signal(Signal::TERM);
        assert_eq!(session.exit_code_within(harness::STOP_LIMIT), 0);
    }
}

#[test]
fn a_balloon_reaches_its_target_and_the_guest_continues() {
    let Some(host) = host() else { return };
    let modules = &["virtio_mmio", "virtio_balloon"];
    for irqchip in host.usual_irqchip() {
        let (mut session, _folder) = boot(irqchip, modules, &["--device", "balloon,size=64"]);
        // 64 MiB are 16,384 pages; the driver inflates them asynchronously.
        let inflated = "until [ $(sed -n 's/balloon_inflate //p' /proc/vmstat) -ge 16384 ]; do sleep 1; done; echo inflated";
        assert_eq!(session.ask(inflated), "inflated\n");
        assert_eq!(
            session.ask("dd if=/dev/zero of=/data bs=1M count=32 2>/dev/null; wc -c </data"),
            "33554432\n"
        );
        power_off(session);
    }
}

/// The pseudo terminal that rvmm reports, in raw mode as a terminal program sets it.
fn terminal_of(session: &Session) -> File {
    session.expect_error("The console of the device console is ");
    let path = session.expect_error("\n");
    let mut options = File::options();
    let terminal = options.read(true).write(true).custom_flags(libc::O_NOCTTY).open(path.trim());
    let terminal = terminal.expect("a pseudo terminal");
    let mut mode = rustix::termios::tcgetattr(&terminal).expect("a terminal");
    mode.make_raw();
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &mode)
        .expect("a terminal");
    terminal
}

#[test]
fn a_second_console_and_named_ports_are_separate() {
    let Some(host) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for irqchip in host.usual_irqchip() {
        let log = folder.path().join(format!("log-{irqchip}"));
        let socket = folder.path().join(format!("agent-{irqchip}"));
        let agent = format!("port=agent,path={}", socket.display());
        let file = format!("port=log,to=file:{}", log.display());
        let consoles = ["--console", "to=pty", "--console", &agent, "--console", &file];
        let (mut session, _folder) = boot(irqchip, &["virtio_mmio"], &consoles);
        let mut terminal = terminal_of(&session);
        session.ask("exec 4<>/dev/hvc0; stty raw -echo <&4");

        let expected: String = (1..=1000).map(|number| format!("{number}\n")).collect();
        let mut reader = terminal.try_clone().expect("a copy of a descriptor");
        let len = expected.len();
        let reading = thread::spawn(move || {
            let mut bytes = vec![0; len];
            reader.read_exact(&mut bytes).expect("what the guest prints");
            String::from_utf8_lossy(&bytes).into_owned()
        });
        session.ask("seq 1 1000 >&4");
        assert!(reading.join().expect("the reader") == expected);

        let size = rustix::termios::Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&terminal, size).expect("a terminal");
        terminal.write_all(b"x").expect("the guest's terminal");
        let sized = session
            .ask("until [ \"$(stty size <&4)\" = '33 101' ]; do sleep 1; done; stty size <&4");
        assert_eq!(sized, "33 101\n");

        let dev = |name| {
            format!("/dev/$(basename $(dirname $(grep -lx {name} /sys/class/virtio-ports/*/name)))")
        };
        session.ask(&format!("echo to the log >{}", dev("log")));
        let mut stream = UnixStream::connect(&socket).expect("the port's socket");
        stream.write_all(b"hello, agent").expect("the guest");
        let agent = dev("agent");
        session.ask(&format!("exec 3<>{agent}; head -c 12 <&3 | tr a-z A-Z >&3; exec 3>&-"));
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).expect("the guest's answer");
        assert_eq!(&answer, b"HELLO, AGENT");
        power_off(session);
        assert_eq!(fs::read_to_string(&log).expect("the port's file"), "to the log\n");
    }
}
