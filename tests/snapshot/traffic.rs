//! Debian that uses all of its devices while it is saved.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::geteuid;
use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::harness::{Session, blank_image, by_length, debian, one_host, skip};
use crate::migration::Bridge;
use crate::network::on_the_host;
use crate::{Place, expect_no_complaints, random, shell};

/// Port of the host's echo over vsock.
const PORT: u32 = 53;
/// Address of the bridge, and of the guest's card.
const HERE: &str = "198.51.100.45";
const THERE: &str = "198.51.100.46";

/// Set in the guest, where this program makes the streams.
const INSIDE: &str = "RVMM_INSIDE_THE_GUEST";
/// Exists when the guest's work is to end.
const STOP: &str = "/tmp/stop";

/// Sends blocks to an echo and compares what comes back, until the end of the work. Adds each block to the count in a file.
fn exchange(mut stream: impl Read + Write, blocks: &mut u64, count: &str) -> io::Result<()> {
    let (mut sent, mut back) = (vec![0; 10_000], vec![0; 10_000]);
    while !Path::new(STOP).exists() {
        for (at, byte) in sent.iter_mut().enumerate() {
            *byte = (at as u64 + *blocks).to_le_bytes()[0];
        }
        stream.write_all(&sent)?;
        stream.read_exact(&mut back)?;
        assert_eq!(sent, back, "block {blocks}");
        *blocks += 1;
        // Whole at any time: somebody reads it.
        let other = format!("{count}.new");
        std::fs::write(&other, blocks.to_string()).and_then(|()| std::fs::rename(other, count))?;
    }
    Ok(())
}

/// In the guest: a TCP connection that never breaks, and a vsock stream that is made again whenever it was reset.
fn in_the_guest() {
    let address = std::env::var(INSIDE).expect("the host's address");
    let tcp = TcpStream::connect(address).expect("the host listens");
    let tcp = thread::spawn(move || exchange(tcp, &mut 0, "/tmp/tcp").expect("it goes on"));
    let (mut blocks, mut resets) = (0, 0);
    loop {
        let stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, PORT);
        match stream.and_then(|stream| exchange(stream, &mut blocks, "/tmp/vsock")) {
            Ok(()) => break,
            Err(error) => {
                println!("the stream is gone: {:?}", error.kind());
                resets += 1;
            }
        }
    }
    tcp.join().expect("a thread");
    println!("resets: {resets}.");
}

/// Sends back what comes over a connection.
fn echo(mut stream: impl Read + Write) {
    let mut part = vec![0; 32 << 10];
    while let Ok(count @ 1..) = stream.read(&mut part) {
        if stream.write_all(&part[..count]).is_err() {
            return;
        }
        // The guest has other work as well.
        thread::sleep(Duration::from_millis(50));
    }
}

/// Reads a console's port until its machine has ended: numbered lines, none missing. Returns how many.
fn read_port(stream: UnixStream) -> JoinHandle<usize> {
    thread::spawn(move || {
        // The first one may be the rest of a line.
        let lines: Vec<String> = BufReader::new(stream).lines().skip(1).flatten().collect();
        let numbers: Vec<u64> = lines
            .iter()
            .filter_map(|line| line.strip_prefix("line ")?.strip_suffix('.')?.parse().ok())
            .collect();
        assert!(lines.len() <= numbers.len() + 1, "{lines:?}");
        let is_whole = numbers.windows(2).all(|pair| pair[1] == pair[0] + 1);
        assert!(is_whole, "{numbers:?}");
        numbers.len()
    })
}

/// A copy of this program, as a disk: whole sectors.
fn own_program(path: &Path) {
    let own = std::env::current_exe().and_then(std::fs::read).expect("this program");
    let mut file = File::create(path).expect("a file");
    file.write_all(&own).expect("space");
    file.set_len((own.len() as u64).next_multiple_of(4096)).expect("space");
}

/// Starts all the work.
fn use_everything(session: &mut Session, address: &str) {
    session.ask(&format!(
        "ip addr add {THERE}/30 dev eth0; ip link set eth0 up; cat /dev/vdd >/tmp/inside; chmod +x /tmp/inside; \
         until ping -q -c 1 -W 60 {HERE} >/dev/null; do sleep 1; done; dmesg -C; kept=42"
    ));
    // Blocks are verified while others are written.
    session.send(&format!(
        "(n=0; while [ ! -e {STOP} ]; do fio --direct=1 --rw=randwrite --bs=4k --size=256K --ioengine=libaio --iodepth=16 \
         --verify=crc32c --verify_fatal=1 --verify_backlog=64 --name=raw --filename=/dev/vdb --name=qcow2 --filename=/dev/vdc \
         >/tmp/fio 2>&1 && echo $((n=n+1)) >/tmp/verified || cat /tmp/fio >>/wrong; done) &\n"
    ));
    session.send(&format!(
        "(n=0; while [ ! -e {STOP} ]; do n=$((n+1)); echo line $n.; sleep 0.1; done >$(ls -d /dev/vport*)) &\n"
    ));
    session.send(&format!(
        "(while [ ! -e {STOP} ]; do head -c 4096 /dev/hwrng >/dev/null; sleep 0.5; done) & ping -q -i 0.2 {HERE} >/dev/null &\n"
    ));
    session.send(&format!(
        "{INSIDE}={address} /tmp/inside --exact traffic::debian_that_uses_all_of_its_devices_while_it_is_saved_finds_what_it_wrote --nocapture >/tmp/said 2>&1 &\n"
    ));
}

/// Waits until each of these files has a higher number.
fn await_progress(session: &mut Session, counts: &[&str]) {
    for count in counts {
        let now = format!("cat {count} 2>/dev/null || echo 0");
        let wait = format!("was=$({now}); until [ $({now}) -gt $((was+1)) ]; do sleep 1; done");
        assert_eq!(session.ask(&format!("{wait}; echo $kept")), "42\n", "{count}");
    }
}

#[test]
fn debian_that_uses_all_of_its_devices_while_it_is_saved_finds_what_it_wrote() {
    if std::env::var_os(INSIDE).is_some() {
        return in_the_guest();
    }
    let Some(host) = one_host("aia") else { return };
    if !geteuid().is_root() {
        return skip("a tap takes root");
    }
    let place = Place::new();
    File::create(place.at("raw")).and_then(|file| file.set_len(32 << 20)).expect("a disk");
    let image = blank_image(place.0.path(), 32 << 20);
    own_program(&place.at("program"));
    let _bridge = Bridge::new("rvmmtraffic", &format!("{HERE}/30"));
    let tcp = TcpListener::bind((HERE, 0)).expect("a port");
    let address = tcp.local_addr().expect("an address").to_string();
    thread::spawn(move || echo(tcp.accept().expect("the guest").0));
    let vsock = UnixListener::bind(place.at(&format!("vsock_{PORT}"))).expect("a socket");
    thread::spawn(move || {
        vsock.incoming().flatten().for_each(|stream| drop(thread::spawn(|| echo(stream))))
    });

    let machine = place
        .rvmm(&["--mem", "512M", "--cpus", "2", "--irqchip", host.irqchips[0], "--name", "one"])
        .path("--disk=", &debian().disk, ",ro=on")
        .path("--disk=", &place.at("raw"), "")
        .path("--disk=", &image, ",format=qcow2")
        .path("--disk=", &place.at("program"), ",ro=on")
        .args(&["--net", "tap=rvmmtraffic1,vhost=on", "--device", "rng"])
        .args(&["--device", "balloon,stats=1,reporting=on"])
        .path("--vsock=", &place.at("vsock"), "")
        .path("--console=port=test.port,path=", &place.at("port"), "");
    let mut session = shell::boot(
        machine,
        "virtio_blk virtio_net virtio_rng virtio_balloon virtio_console vmw_vsock_virtio_transport",
    );
    let plug_in = || {
        on_the_host(&["ip", "link", "set", "rvmmtraffic1", "master", "rvmmtraffic"]);
        on_the_host(&["ip", "link", "set", "rvmmtraffic1", "up"]);
    };
    plug_in();
    let mut port = read_port(session.connect(&place.at("port")));
    use_everything(&mut session, &address);
    let saves = by_length(20, 1);
    for number in 0..saves {
        await_progress(&mut session, &["/tmp/tcp", "/tmp/vsock"]);
        thread::sleep(Duration::from_millis(random(2000)));
        let folder = place.at(&format!("saved{number}"));
        let verb = ["snapshot", "one", "--stop", "--live", "--diff"];
        let verb = &verb[..5 - number % 3];
        place.verb(verb, Some(&folder)).expect("it can be saved");
        assert_eq!(session.exit_code(), 0);
        let lines = port.join().expect("whole lines");
        assert!(lines > 0, "the port was silent");
        session = place.restore(&format!("saved{number}"), &[]);
        port = read_port(session.connect(&place.at("port")));
        plug_in();
    }
    await_progress(&mut session, &["/tmp/tcp", "/tmp/vsock", "/tmp/verified"]);
    let end = session.ask(&format!(
        "touch {STOP}; until grep -E 'test result|panicked' /tmp/said; do sleep 1; done | wc -l; cat /tmp/said; cat /wrong"
    ));
    assert!(end.contains(&format!("resets: {saves}.")) && end.contains("1 passed"), "{end}");
    assert!(end.contains("/wrong: No such file"), "{end}");
    expect_no_complaints(&mut session);
    session.send("echo o >/proc/sysrq-trigger\n");
    assert_eq!(session.exit_code(), 0);
}
