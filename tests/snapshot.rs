//! Rings 2 and 3: machines that are saved, and continue in another process.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;
#[path = "snapshot/hosts.rs"]
mod hosts;
#[path = "linux/initramfs.rs"]
mod initramfs;
#[path = "snapshot/migration.rs"]
mod migration;
#[path = "linux/network.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod network;
#[path = "linux/shell.rs"]
mod shell;
#[path = "snapshot/traffic.rs"]
mod traffic;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::{Launch, Session, by_length, guest, host, kernel, one_host, rvmm};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

/// A folder for one test: sockets of its machines, snapshots, disks.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    /// A verb of rvmm or a machine whose socket is in this folder.
    fn rvmm(&self, arguments: &[&str]) -> Launch {
        rvmm(arguments).env("XDG_RUNTIME_DIR", self.0.path())
    }

    /// Runs a verb to its end, and returns its output, or its message.
    fn verb(&self, arguments: &[&str], path: Option<&Path>) -> Result<String, String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rvmm"));
        command.args(arguments).args(path).env("XDG_RUNTIME_DIR", self.0.path());
        let output = command.output().expect("rvmm starts");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    /// Saves the machine, which stops.
    fn save(&self, machine: &mut Session, name: &str, folder: &str) {
        let text = self.verb(&["snapshot", name, "--stop"], Some(&self.at(folder)));
        let text = text.expect("it can be saved");
        assert!(text.starts_with("Saved "), "{text}");
        assert_eq!(machine.exit_code(), 0);
    }

    /// Waits until the machine takes orders, or has ended.
    fn await_socket(&self, session: &mut Session, name: &str) {
        let socket = self.at("rvmm").join(format!("{name}-{}.sock", session.pid()));
        while session.is_running() && !harness::is_listening(&socket) {
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn restore(&self, folder: &str, arguments: &[&str]) -> Session {
        self.rvmm(&["restore"]).path("", &self.at(folder), "").args(arguments).start()
    }
}

/// Modules for a disk with a file system, and for random numbers.
const MODULES: &[&str] = &["virtio_mmio", "virtio_blk", "crc32c_generic", "ext4", "virtio-rng"];

/// A guest of Debian's kernel with an empty disk, at its shell.
fn linux(place: &Place, irqchip: &str, mem: &str) -> Session {
    let initrd = initramfs::build(place.0.path(), &[], MODULES);
    File::create(place.at("disk")).and_then(|file| file.set_len(64 << 20)).expect("a disk");
    let session = place
        .rvmm(&["--mem", mem, "--cpus", "2", "--irqchip", irqchip, "--name", "one"])
        .args(&["--device", "rng", "--device", "balloon", "--power-button"])
        .args(&["--cmdline", "console=ttyS0 quiet"])
        .path("--disk=", &place.at("disk"), "")
        .path("--initrd=", &initrd, "")
        .kernel(&kernel())
        .start();
    session.expect("own initramfs is up\r\n");
    session
}

/// The same, whose shell writes its disk all the time, and keeps the number 42.
fn busy_linux(place: &Place, irqchip: &str) -> Session {
    let mut session = linux(place, irqchip, "256M");
    session.ask("mke2fs /dev/vda >/dev/null; mkdir /m; mount /dev/vda /m; dd if=/dev/urandom of=/data bs=64k count=32 2>/dev/null; md5sum </data >/sum");
    // Copies from memory to the disk and back, and counts what was wrong.
    session.send("wrong=0; (while :; do cp /data /m/data; sync; echo 3 >/proc/sys/vm/drop_caches; head -c256 /dev/hwrng >/dev/null; md5sum </m/data | cmp -s - /sum || echo x >>/wrong; echo x >>/rounds; done) &\n");
    // What a slow host makes of the boot does not count.
    session.ask("until [ -s /rounds ]; do sleep 1; done; dmesg -c >/dev/null; kept=42");
    session
}

/// Checks that a guest that counts its rounds in `/rounds`, and what was wrong in `/wrong`, goes on, and was right all the time.
fn goes_on(session: &mut Session) {
    session.ask(
        "n=$(wc -l </rounds); until [ $(wc -l </rounds) -gt $((n+1)) ]; do sleep 1; done; echo on",
    );
    assert_eq!(session.ask("cat /wrong 2>&1 | grep -c x"), "0\n");
}

/// Checks that the guest's kernel has nothing to say.
fn expect_no_complaints(session: &mut Session) {
    let complaints = "dmesg -r | grep -E '^<[0-4]>' | grep -iE 'stall|lockup|hung|error|bug'";
    assert_eq!(session.ask(complaints), "");
}

#[test]
fn linux_that_writes_to_its_disk_continues_in_another_process() {
    let Some(host) = one_host("plic") else { return };
    let place = Place::new();
    let mut session = busy_linux(&place, host.irqchips[0]);
    for round in 0..by_length(5, 2) {
        let folder = format!("saved{round}");
        place.save(&mut session, "one", &folder);
        session = place.restore(&folder, &[]);
        assert_eq!(session.ask("echo $kept; nproc"), "42\n2\n");
        goes_on(&mut session);
    }
    expect_no_complaints(&mut session);
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn two_copies_of_linux_notice_that_they_are_copies_and_have_other_random_numbers() {
    let Some(host) = host() else { return };
    for irqchip in host.usual_irqchip() {
        let place = Place::new();
        let initrd = initramfs::build(place.0.path(), &[], &[]);
        let mut session = place
            .rvmm(&["--mem", "256M", "--irqchip", irqchip, "--name", "one"])
            .args(&["--cmdline", "console=ttyS0 quiet"])
            .path("--initrd=", &initrd, "")
            .kernel(&kernel())
            .start();
        session.expect("own initramfs is up\r\n");
        const RESEEDED: &str = "dmesg | grep -c 'crng reseeded due to virtual machine fork'";
        // The kernel has random numbers, which both copies inherit.
        session.ask("until dmesg | grep -q 'crng init done'; do sleep 1; done");
        assert_eq!(session.ask(RESEEDED), "0\n");
        place.save(&mut session, "one", "saved");
        let numbers = [(); 2].map(|()| {
            let mut copy = place.restore("saved", &[]);
            // The first thing that it does: the interrupt has come before it.
            let number = copy.ask("head -c16 /dev/urandom | md5sum").to_owned();
            assert_eq!(copy.ask(RESEEDED), "1\n");
            assert_eq!(copy.ask("awk '/vmgenid/ {print $2}' /proc/interrupts"), "1\n");
            copy.send("poweroff -f\n");
            assert_eq!(copy.exit_code(), 0);
            number
        });
        assert_ne!(numbers[0], numbers[1]);
        println!("{irqchip}: {numbers:?}");
    }
}

/// A guest that computes a hash chain on each hart while it counts interrupts of every kind.
fn chain(place: &Place, irqchip: &str, cpus: &str) -> Launch {
    let rounds = format!("rounds={} stop=1", by_length(20_000, 3000));
    place
        .rvmm(&["--no-initrd", "--mem", "64M", "--irqchip", irqchip, "--cpus", cpus])
        .args(&["--name", "chain", "--device", "rng", "--cmdline", &rounds])
        .kernel(&guest("chain"))
}

/// A number below `end`, from the clock: any moment will do.
fn random(end: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock");
    now.subsec_nanos() as u64 / 1000 % end
}

/// Runs the guest, and has `next` bring it to another process at random moments, which `next` returns. Returns what the guest has printed
/// in all, and how often it went on elsewhere.
fn interrupted_at_random(
    irqchip: &str,
    cpus: &str,
    next: impl Fn(&Place, usize) -> Result<Session, String>,
) -> (String, usize) {
    let place = Place::new();
    let mut session = chain(&place, irqchip, cpus).start();
    session.expect("started");
    let (mut printed, mut count) = (String::new(), 0);
    while count < by_length(50, 4) {
        place.await_socket(&mut session, "chain");
        thread::sleep(Duration::from_millis(random(300)));
        let other = next(&place, count);
        assert_eq!(session.exit_code(), 0);
        printed.push_str(&String::from_utf8(session.output()).expect("text"));
        match other {
            Ok(other) => {
                count += 1;
                session = other;
            }
            // It has ended by itself.
            Err(_) if printed.contains("PASS") => return (printed, count),
            Err(error) => panic!("it cannot go on elsewhere: {error}"),
        }
    }
    assert_eq!(session.exit_code(), 0);
    printed.push_str(&String::from_utf8(session.output()).expect("text"));
    (printed, count)
}

/// Checks that the guest ends with the same result as undisturbed, on one hart and on four.
fn expect_same_result(next: impl Fn(&Place, usize) -> Result<Session, String>) {
    let Some(host) = host() else { return };
    for irqchip in host.usual_irqchip() {
        for cpus in ["1", "4"] {
            let mut undisturbed = chain(&Place::new(), irqchip, cpus).start();
            assert_eq!(undisturbed.exit_code(), 0);
            let expected = String::from_utf8(undisturbed.output()).expect("text");
            let (printed, count) = interrupted_at_random(irqchip, cpus, &next);
            assert_eq!(printed, expected, "after {count} times");
            assert!(count > 0, "it was never disturbed");
            println!("{irqchip}, {cpus} harts: {count} times");
        }
    }
}

#[test]
fn a_guest_that_is_saved_at_random_moments_ends_with_the_same_result() {
    expect_same_result(|place, number| {
        let folder = format!("saved{}", number % 2);
        let verb = ["snapshot", "chain", "--stop", "--live"];
        let verb = if number % 2 == 0 { &verb[..] } else { &verb[..3] };
        place.verb(verb, Some(&place.at(&folder)))?;
        Ok(place.restore(&folder, &[]))
    });
}

#[test]
fn a_chain_of_ten_differences_ends_with_the_same_result() {
    let Some(host) = host() else { return };
    for irqchip in host.usual_irqchip() {
        let mut undisturbed = chain(&Place::new(), irqchip, "4").start();
        assert_eq!(undisturbed.exit_code(), 0);
        let expected = String::from_utf8(undisturbed.output()).expect("text");
        let place = Place::new();
        let mut session = chain(&place, irqchip, "4").start();
        session.expect("started");
        for number in 0..=10 {
            thread::sleep(Duration::from_millis(random(100)));
            let folder = place.at(&format!("saved{number}"));
            let verb = ["snapshot", "chain", "--diff", "--live"];
            let verb = if number % 2 == 0 { &verb[..] } else { &verb[..3] };
            let report = place.verb(verb, Some(&folder)).expect("it can be saved");
            let parent = format!(
                "the difference to {}",
                place.at(&format!("saved{}", number.max(1) - 1)).display()
            );
            assert_eq!(report.contains(&parent), number > 0, "{report}");
        }
        // What is not saved any more is lost.
        session.signal(Signal::KILL);
        while session.is_running() {
            thread::yield_now();
        }
        for number in [10, 5, 0] {
            let mut session = place.restore(&format!("saved{number}"), &[]);
            assert_eq!(session.exit_code(), 0, "difference {number}");
            let printed = String::from_utf8(session.output()).expect("text");
            assert!(
                expected.ends_with(&printed) && printed.contains("PASS"),
                "difference {number}: {printed}"
            );
        }
    }
}

/// A clone, and its console.
struct Clone {
    pid: Pid,
    console: UnixStream,
}

impl Clone {
    /// Of a line of `rvmm clone`.
    fn of(line: &str) -> Self {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, pid, console] = words[..] else { panic!("not a clone: {line}") };
        let console = UnixStream::connect(console).expect("it listens");
        console.set_read_timeout(Some(harness::LIMIT)).expect("a time-out");
        Self { pid: Pid::from_raw(pid.parse().expect("a number")).expect("a process"), console }
    }

    /// Runs a command in the guest's shell, and returns its output.
    fn ask(&mut self, command: &str) -> String {
        // Neither word is in the echo of the command.
        let line = format!("echo st\'\'art; {command}; echo do\'\'ne\n");
        self.console.write_all(line.as_bytes()).expect("it reads");
        let (mut output, mut byte) = (Vec::new(), [0]);
        while !output.ends_with(b"done\r\n") {
            self.console.read_exact(&mut byte).expect("it answers");
            output.push(byte[0]);
        }
        let text = String::from_utf8_lossy(&output).replace("\r\n", "\n");
        let (_, answer) = text.split_once("start\n").expect("a start");
        answer.trim_end_matches("done\n").to_owned()
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.pid, Signal::KILL);
    }
}

#[test]
fn clones_share_memory_and_each_has_a_disk_of_its_own() {
    let Some(host) = one_host("aia") else { return };
    let place = Place::new();
    let mut session = linux(&place, host.irqchips[0], "128M");
    session.ask("mke2fs /dev/vda >/dev/null; mkdir /m; mount /dev/vda /m; echo first >/m/name; sync; kept=42");
    place.save(&mut session, "one", "saved");
    let count = by_length(50, 20);
    let disks = place.0.path().display().to_string();
    let arguments = ["clone", "-n", &count.to_string(), "--disks", &disks];
    let lines = place.verb(&arguments, Some(&place.at("saved"))).expect("they start");
    let mut clones: Vec<Clone> = lines.lines().map(Clone::of).collect();
    assert_eq!(clones.len(), count);
    for (number, clone) in clones.iter_mut().enumerate() {
        let command = format!("echo $kept $(cat /m/name); echo {number} >/m/name; sync");
        assert_eq!(clone.ask(&command), "42 first\n");
    }
    for (number, clone) in clones.iter_mut().enumerate() {
        let read = "umount /m; echo 3 >/proc/sys/vm/drop_caches; mount /dev/vda /m; cat /m/name";
        assert_eq!(clone.ask(read), format!("{number}\n"));
    }
    // Copies of pages that the clones have not written would not fit, and a clone has not written much.
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", clones[1].pid.as_raw_nonzero()));
    let private = status.expect("it runs").lines().find_map(|line| {
        line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    assert!(private.expect("a number") < 24 << 10, "{private:?} KiB");
    let again = place.verb(&arguments, Some(&place.at("saved"))).expect_err("its disks exist");
    assert!(again.contains("one-1") && again.contains("exists"), "{again}");
}

#[test]
fn linux_that_is_saved_while_it_reboots_comes_up_in_another_process() {
    let Some(host) = one_host("plic") else { return };
    let place = Place::new();
    let mut session = linux(&place, host.irqchips[0], "128M");
    for _ in 0..by_length(10, 2) {
        session.send("reboot -f\n");
        thread::sleep(Duration::from_millis(random(3000)));
        while let Err(error) = place.verb(&["snapshot", "one", "--stop"], Some(&place.at("saved")))
        {
            // Just while the machine is reset.
            assert!(error.contains("it is stopping") && session.is_running(), "{error}");
            thread::yield_now();
        }
        assert_eq!(session.exit_code(), 0);
        session = place.restore("saved", &[]);
        session.expect("own initramfs is up\r\n");
        assert_eq!(session.ask("nproc"), "2\n");
    }
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

/// Starts a pager, which listens when this returns.
fn pager(place: &Place, arguments: &[&str], folder: Option<&str>, ready: &str) -> Session {
    let launch = place.rvmm(&["pager"]).args(arguments);
    let launch = match folder {
        Some(folder) => launch.path("--snapshot=", &place.at(folder), ""),
        None => launch,
    };
    let session = launch.start();
    session.expect_error(ready);
    session
}

/// Saves a guest in the middle of its work, and returns what it prints from there on.
fn saved_chain(place: &Place, irqchip: &str, folder: &str) -> String {
    let mut undisturbed = chain(&Place::new(), irqchip, "4").start();
    assert_eq!(undisturbed.exit_code(), 0);
    let expected = String::from_utf8(undisturbed.output()).expect("text");
    let mut session = chain(place, irqchip, "4").start();
    session.expect("started");
    thread::sleep(Duration::from_millis(random(200)));
    place.save(&mut session, "chain", folder);
    let printed = String::from_utf8(session.output()).expect("text");
    let rest = expected.strip_prefix(&printed).expect("it has printed the beginning");
    assert!(rest.contains("PASS"), "it had ended already");
    rest.to_owned()
}

/// Continues the guest, and compares what it prints.
fn expect_rest(place: &Place, folder: &str, arguments: &[&str], rest: &str) {
    let mut session = place.restore(folder, arguments);
    assert_eq!(session.exit_code(), 0, "{arguments:?}");
    assert_eq!(String::from_utf8(session.output()).expect("text"), rest, "{arguments:?}");
}

#[test]
fn a_guest_whose_memory_comes_while_it_runs_ends_with_the_same_result() {
    let Some(host) = host() else { return };
    for irqchip in host.usual_irqchip() {
        let place = Place::new();
        let rest = saved_chain(&place, irqchip, "saved");
        expect_rest(&place, "saved", &["--prefetch"], &rest);
        let path = |name: &str| place.at(name).display().to_string();
        let (socket, at) = (path("pager"), format!("unix:{}", path("pager")));
        let mut near =
            pager(&place, &["--socket", &socket], Some("saved"), "Waiting for a machine at");
        expect_rest(&place, "saved", &["--pager", &at], &rest);
        assert_eq!(near.exit_code(), 0);
        println!("{irqchip}: {}", String::from_utf8_lossy(&near.output()).trim());
        // From another host: here is only the state.
        std::fs::create_dir(place.at("here")).expect("a folder");
        for file in ["state.json", "checksum"] {
            std::fs::copy(place.at("saved").join(file), place.at("here").join(file)).expect(file);
        }
        let far =
            pager(&place, &["--serve", "tcp:localhost:0"], Some("saved"), "Serving pages at ");
        far.expect_error("tcp:127.0.0.1:");
        let port = far.expect_error("\n");
        let from = format!("tcp:127.0.0.1:{}", port.trim());
        let arguments = ["--socket", &socket, "--from", &from];
        let mut near = pager(&place, &arguments, None, "Waiting for a machine at");
        expect_rest(&place, "here", &["--pager", &at], &rest);
        assert_eq!(near.exit_code(), 0);
        println!("{irqchip}: {}", String::from_utf8_lossy(&near.output()).trim());
    }
}

#[test]
fn a_machine_ends_with_its_pager_and_can_be_stopped_while_it_waits_for_it() {
    let Some(host) = host() else { return };
    for irqchip in host.usual_irqchip() {
        let place = Place::new();
        saved_chain(&place, irqchip, "saved");
        let socket = place.at("pager").display().to_string();
        let at = format!("unix:{socket}");
        for (is_killed, arguments) in [
            (true, &["--pager", &at][..]),
            (true, &["--pager", &at, "--paused"]),
            (false, &["--pager", &at]),
        ] {
            let ready = "Waiting for a machine at";
            let pager = pager(&place, &["--socket", &socket], Some("saved"), ready);
            // It accepts nothing and fills nothing from now on: all harts wait within KVM_RUN.
            pager.signal(Signal::STOP);
            let mut session = place.restore("saved", arguments);
            place.await_socket(&mut session, "chain");
            thread::sleep(Duration::from_millis(500));
            assert!(session.is_running(), "it waits");
            if is_killed {
                pager.signal(Signal::KILL);
                session.expect_error("The host failed: the pager at ");
                session.expect_error("has ended");
                assert_eq!(session.exit_code(), 1);
            } else {
                session.signal(Signal::TERM);
                assert_eq!(session.exit_code(), 0);
                pager.signal(Signal::CONT);
            }
        }
    }
}

#[test]
fn linux_whose_memory_a_pager_has_can_be_saved_again() {
    let Some(host) = one_host("aia") else { return };
    let place = Place::new();
    let mut session = linux(&place, host.irqchips[0], "128M");
    session.ask("mke2fs /dev/vda >/dev/null; mkdir /m; mount /dev/vda /m; head -c 2097152 /dev/urandom >/data; cp /data /m; kept=$(md5sum </data); dmesg -c >/dev/null");
    place.save(&mut session, "one", "first");
    let socket = place.at("pager").display().to_string();
    let at = format!("unix:{socket}");
    let ready = "Waiting for a machine at";
    let mut near = pager(&place, &["--socket", &socket], Some("first"), ready);
    let mut session = place.restore("first", &["--pager", &at]);
    // Its dirty pages go to the disk before the guest has touched them.
    assert_eq!(session.ask("sync; echo 3 >/proc/sys/vm/drop_caches; nproc"), "2\n");
    // All of the memory is saved, what the guest has not used since then, too.
    place.save(&mut session, "one", "second");
    assert_eq!(near.exit_code(), 0);
    println!("{}", String::from_utf8_lossy(&near.output()).trim());
    let mut session = place.restore("second", &[]);
    let check =
        "for file in /data /m/data; do [ \"$(md5sum <$file)\" = \"$kept\" ] && echo same; done";
    assert_eq!(session.ask(check), "same\nsame\n");
    expect_no_complaints(&mut session);
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}
