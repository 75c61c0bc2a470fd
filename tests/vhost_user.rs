//! Ring 3: Debian's own vhost-user daemons as backends, with Debian's own drivers in the guest.

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

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use harness::{Host, LIMIT, Session, host, kernel, one_host, rvmm};
use rustix::process::{Pid, Signal, kill_process};

/// Modules for a network and a disk; virtiofs is in Debian's kernel.
const MODULES: &[&str] = &["virtio_mmio", "virtio_net", "virtio_blk", "crc32c_generic", "ext4"];

/// The paths of the daemons.
const DAEMONS: [&str; 3] =
    ["/usr/libexec/virtiofsd", "/usr/bin/passt", "/usr/bin/qemu-storage-daemon"];

/// Number of files in the shared folder.
fn files() -> usize {
    harness::by_length(10_000, 200)
}

/// The host, if it has the daemons.
fn with_daemons(host: Option<&'static Host>) -> Option<&'static Host> {
    let host = host?;
    if let Some(missing) = DAEMONS.iter().find(|path| !Path::new(path).exists()) {
        harness::skip(&format!("{missing} is not there (scripts/setup brings it)"));
        return None;
    }
    Some(host)
}

/// A disk of 16 MiB, and qemu-storage-daemon serving it.
struct Storage {
    image: PathBuf,
    socket: PathBuf,
    daemon: Child,
}

impl Storage {
    fn new(folder: &Path) -> Self {
        let (image, socket) = (folder.join("disk.img"), folder.join("disk.sock"));
        File::create(&image).and_then(|file| file.set_len(16 << 20)).expect("a sparse file");
        let daemon = Self::launch(&image, &socket);
        Self { image, socket, daemon }
    }

    fn launch(image: &Path, socket: &Path) -> Child {
        let _ = fs::remove_file(socket);
        let node = format!("driver=file,node-name=disk,filename={}", image.display());
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        );
        let daemon = Command::new(DAEMONS[2])
            .args(["--blockdev", &node, "--export", &export])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon starts");
        wait_until("qemu-storage-daemon listens", || harness::is_listening(socket));
        daemon
    }

    fn kill(&mut self) {
        self.daemon.kill().and_then(|()| self.daemon.wait()).expect("it was alive");
    }

    fn restart(&mut self) {
        self.daemon = Self::launch(&self.image, &self.socket);
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not after {LIMIT:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Descendant processes of `parent` with this name.
fn children(parent: Pid, name: &str) -> Vec<Pid> {
    let all = fs::read_dir("/proc").expect("/proc").flatten();
    let stat = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("stat")).ok();
    let fields = all.filter_map(stat).filter_map(|stat| {
        let (head, tail) = stat.rsplit_once(')')?;
        let (pid, name) = head.split_once(" (")?;
        let mut tail = tail.split_whitespace();
        // Ignores zombies.
        let state = tail.next()?.to_owned();
        let of = tail.next()?.parse::<i32>().ok()?;
        (state != "Z")
            .then(|| (pid.parse::<i32>().ok(), name.to_owned(), of))
            .and_then(|(pid, name, of)| Some((Pid::from_raw(pid?)?, name, Pid::from_raw(of)?)))
    });
    let fields: Vec<_> = fields.collect();
    let direct: Vec<Pid> = fields.iter().filter(|f| f.2 == parent).map(|f| f.0).collect();
    let is_own = |of: &Pid| *of == parent || direct.contains(of);
    let own = fields.iter().filter(|(_, program, of)| program == name && is_own(of));
    own.map(|(pid, ..)| *pid).collect()
}

fn boot(irqchip: &str, arguments: &[&str]) -> (Session, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let initrd = initramfs::build(folder.path(), &[], MODULES);
    let session = rvmm(&["--mem", "256M", "--irqchip", irqchip])
        .args(&["--cmdline", "console=ttyS0 quiet"])
        .args(arguments)
        .path("--initrd=", &initrd, "")
        .kernel(&kernel())
        .start();
    session.expect("own initramfs is up\r\n");
    (session, folder)
}

/// Two folders: a shared one with many files, and one that is read-only for the guest.
fn folders(at: &Path) -> (PathBuf, PathBuf) {
    let (work, read) = (at.join("work"), at.join("read"));
    fs::create_dir_all(work.join("many")).expect("a folder");
    fs::create_dir(&read).expect("a folder");
    for number in 0..files() {
        let text = format!("file {number}\n").repeat(number % 50 + 1);
        fs::write(work.join(format!("many/{number:05}")), text).expect("a file");
    }
    fs::write(work.join("greeting"), "from the host\n").expect("a file");
    fs::write(read.join("greeting"), "only to be read\n").expect("a file");
    (work, read)
}

fn check_folders(session: &mut Session, work: &Path) {
    session.ask("mkdir /w /r; mount -t virtiofs work /w; mount -t virtiofs read /r");
    assert_eq!(session.ask("cat /w/greeting /r/greeting"), "from the host\nonly to be read\n");
    assert_eq!(
        session.ask("echo from the guest >/w/answer; sync; cat /w/answer"),
        "from the guest\n"
    );
    assert_eq!(fs::read_to_string(work.join("answer")).expect("the answer"), "from the guest\n");
    let refused = session.ask("echo no >/r/answer || echo refused; rm /r/greeting || echo refused");
    assert_eq!(refused.matches("refused\n").count(), 2, "{refused}");
    let count = session.ask("ls /w/many | wc -l");
    assert_eq!(count.trim(), files().to_string());
    let seen = session.ask("cat /w/many/* | md5sum");
    let script = format!("cat {}/many/* | md5sum", work.display());
    let here = Command::new(harness::busybox()).args(["sh", "-c", &script]).output();
    let here = here.expect("busybox starts");
    assert_eq!(seen.get(..32), String::from_utf8_lossy(&here.stdout).get(..32));
}

fn check_network(session: &mut Session, forwarded: u16) {
    let lease =
        "udhcpc -i eth0 -n -q -t 30 -s /bin/true 2>&1 | grep -o 'lease of 10.0.2.15 obtained'";
    session.ask("ip link set eth0 up");
    assert_eq!(session.ask(lease), "lease of 10.0.2.15 obtained\n");
    session.ask("ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2");
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let (done, is_done) = mpsc::channel::<()>();
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("the guest's bytes");
        stream.write_all(&all).expect("the guest reads");
        // passt drops pending data when both sides have closed.
        let _ = is_done.recv();
        all.len()
    });
    let sums = session.ask(&format!(
        "dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null; nc 10.0.2.2 {port} </data >/back & until [ $(wc -c </back) -ge 1048576 ]; do sleep 1; done; md5sum </data; md5sum </back"
    ));
    drop(done);
    assert_eq!(echo.join().expect("the echo"), 1 << 20, "{sums}");
    let sums: Vec<&str> = sums.lines().filter(|line| line.ends_with("  -")).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "what came back is not what was sent: {sums:?}");

    // The other direction: a forwarded port of the host.
    session.ask(
        "sleep 1000 | nc -l -p 7000 >/got & until netstat -ltn | grep -q :7000; do sleep 1; done",
    );
    let mut stream = TcpStream::connect(("127.0.0.1", forwarded)).expect("passt listens");
    stream.write_all(&harness::flood(100_000)).expect("passt reads");
    let arrived = session.ask("until [ $(wc -c </got) -ge 100000 ]; do sleep 1; done; wc -c </got");
    assert!(arrived.contains("100000"), "{arrived}");
}

fn check_disk(session: &mut Session, storage: &mut Storage) {
    let written = session.ask("cat /sys/block/vda/size; mke2fs /dev/vda >/dev/null && mkdir /m && mount /dev/vda /m; dd if=/dev/urandom of=/m/file bs=64k count=64 2>/dev/null; sync; md5sum </m/file");
    let read = session.ask("umount /m; echo 3 >/proc/sys/vm/drop_caches; cat /sys/block/vda/size; mount /dev/vda /m; md5sum </m/file");
    assert_eq!(written, read);
    assert!(written.starts_with("32768\n"), "{written}");

    // Its daemon is killed while the guest writes, and another one replaces it: the guest does not notice.
    session.send("dd if=/m/file of=/m/copy bs=4k conv=fsync 2>/dev/null; echo copi''ed\n");
    storage.kill();
    session.expect_error("vhost-user-blk");
    assert!(session.is_running());
    storage.restart();
    session.expect("copied\r\n");
    let copied = session.ask("umount /m; echo 3 >/proc/sys/vm/drop_caches; mount /dev/vda /m; md5sum </m/copy; umount /m");
    assert_eq!(copied, written.replace("32768\n", ""));
    assert!(storage.image.exists());
}

#[test]
fn a_guest_has_folders_a_network_and_a_disk_through_debians_daemons() {
    let Some(host) = with_daemons(host()) else { return };
    for irqchip in host.usual_irqchip() {
        let folder = tempfile::tempdir().expect("a folder");
        let (work, read) = folders(folder.path());
        let mut storage = Storage::new(folder.path());
        let free = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = free.local_addr().expect("an address").port();
        drop(free);
        let (mut session, _initrd) = boot(
            irqchip,
            &[
                &format!("--share=work={}", work.display()),
                &format!("--share=read={}:ro", read.display()),
                &format!("--net=user,forward={port}:7000"),
                &format!("--disk=vhost-user={}", storage.socket.display()),
            ],
        );
        check_network(&mut session, port);
        check_disk(&mut session, &mut storage);
        check_folders(&mut session, &work);
        // The folders' daemon is killed: the machine continues.
        for daemon in children(session.pid(), "virtiofsd") {
            let _ = kill_process(daemon, Signal::KILL);
        }
        session.expect_error("the device is lost");
        assert_eq!(session.ask("echo alive"), "alive\n");
        let pid = session.pid();
        session.send("poweroff -nf\n");
        assert_eq!(session.exit_code(), 0);
        assert_eq!(children(pid, "passt"), []);
    }
}

#[test]
fn a_guest_that_restarts_has_its_folder_again_and_no_process_outlives_rvmm() {
    let Some(host) = with_daemons(one_host("plic")) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let share = format!("--share=work={}", folder.path().display());
    let (mut session, _initrd) = boot(host.irqchips[0], &[&share, "--net=user"]);
    let mount =
        "mkdir /w; mount -t virtiofs work /w; echo $(date) >>/w/lives; cat /w/lives | wc -l";
    assert_eq!(session.ask(mount).trim(), "1");
    // Unbinds the driver and binds it again.
    let again = "umount /w; cd /sys/bus/virtio/drivers/virtiofs; for d in virtio*; do echo $d >unbind; echo $d >bind; done; cd /; mount -t virtiofs work /w; cat /w/lives | wc -l";
    assert_eq!(session.ask(again).trim(), "1");
    session.send("reboot -f\n");
    session.expect("own initramfs is up\r\n");
    assert_eq!(session.ask(mount).trim(), "2");
    let mut daemons = children(session.pid(), "virtiofsd");
    daemons.extend(children(session.pid(), "passt"));
    assert!(daemons.len() >= 2, "{daemons:?}");
    session.signal(Signal::KILL);
    let is_there =
        |pid: &Pid| Path::new(&format!("/proc/{}/root/.", pid.as_raw_nonzero())).exists();
    wait_until("the daemons end with rvmm", || !daemons.iter().any(is_there));
}

#[test]
fn devices_that_cannot_be_served_are_refused_in_one_line() {
    let Some(_) = with_daemons(host()) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let dead = folder.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).expect("a socket"));
    for (argument, part) in [
        (format!("--share=a={}/nowhere", folder.path().display()), "No such file"),
        ("--share=a=/proc/version".to_owned(), "not a folder"),
        (format!("--disk=vhost-user={}", dead.display()), "dead.sock"),
        (format!("--device=vhost-user-net,socket={}/none", folder.path().display()), "none"),
        ("--net=user,forward=1:2:3".to_owned(), "forward"),
    ] {
        let mut session =
            rvmm(&["--mem", "64M", "--no-initrd", &argument]).kernel(&kernel()).no_input().start();
        assert_ne!(session.exit_code(), 0, "{argument}");
        let errors = session.all_errors();
        assert!(errors.contains(part) && errors.trim().lines().count() == 1, "{errors}");
    }
}
