//! Ring 2: an idle host sleeps after any guest. Its own /proc/stat counts a CPU that never sleeps as idle, so the CPU time of
//! the QEMU that runs this host is measured.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::fs;
use std::hint;
use std::io::Read;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use harness::{Host, STOP_LIMIT, Session, guest, host, rvmm, skip};
use rustix::process::{Pid, Signal};
use rustix::thread::{CpuSet, sched_setaffinity};

/// Duration of a measurement.
const WHILE: Duration = Duration::from_secs(4);

/// Seconds of CPU time that this host has used of the machine below, if available (`scripts/host`).
fn cpu_time() -> Option<f64> {
    let address = std::env::var("RVMM_HOST_CPU_TIME").ok()?;
    let mut answer = String::new();
    TcpStream::connect(address).and_then(|mut from| from.read_to_string(&mut answer)).unwrap();
    Some(answer.trim().parse::<f64>().unwrap() / 100.0)
}

/// Average number of CPUs of the machine below that are busy with this host during `what`.
fn busy_while(what: impl FnOnce()) -> f64 {
    let (start, before) = (Instant::now(), cpu_time().unwrap());
    what();
    let after = cpu_time().unwrap();
    (after - before) / start.elapsed().as_secs_f64()
}

/// Keeps one CPU of this host busy.
fn work() {
    let start = Instant::now();
    while start.elapsed() < WHILE {
        hint::spin_loop();
    }
}

/// A guest that has set a timer and prints `wfi: armed`.
fn armed(arguments: &[&str]) -> Session {
    let usual = ["--no-initrd", "--mem", "64M", "--cmdline", "end=armed"];
    let session = rvmm(&usual).args(arguments).kernel(&guest("wfi")).start();
    session.expect("PASS wfi\n");
    session.expect("wfi: armed\n");
    session
}

/// The thread that runs hart 0.
fn hart_thread(session: &Session) -> Pid {
    let tasks = format!("/proc/{}/task", session.pid().as_raw_nonzero());
    let is_hart = |tid: &String| {
        fs::read_to_string(format!("{tasks}/{tid}/comm")).is_ok_and(|name| name.trim() == "vcpu0")
    };
    let tids = fs::read_dir(&tasks).unwrap();
    let tids = tids.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    Pid::from_raw(tids.into_iter().find(is_hart).unwrap().parse().unwrap()).unwrap()
}

fn powers_off(_: &Host) {
    let mut session = armed(&[]);
    session.send("p");
    assert_eq!(session.exit_code(), 0);
}

fn is_stopped(_: &Host) {
    let mut session = armed(&["--irqchip", "plic"]);
    session.signal(Signal::TERM);
    assert_eq!(session.exit_code_within(STOP_LIMIT), 0);
}

fn reboots(_: &Host) {
    let mut session = armed(&["--no-reboot"]);
    session.send("c");
    assert_eq!(session.exit_code(), 0);
}

/// Moves the hart's thread to every CPU, and ends the guest on the last one.
fn moves(host: &Host) {
    let mut session = armed(&[]);
    let thread = hart_thread(&session);
    for cpu in 0..host.cpus {
        let mut one = CpuSet::new();
        one.set(cpu);
        sched_setaffinity(Some(thread), &one).unwrap();
        thread::sleep(Duration::from_millis(200));
    }
    session.send("p");
    assert_eq!(session.exit_code(), 0);
}

/// The way in which a guest ends, and a function that runs a guest until then.
type End = (&'static str, fn(&Host));

#[test]
fn the_host_is_idle_after_a_guest_that_had_set_a_timer() {
    let Some(host) = host() else { return };
    if cpu_time().is_none() {
        return skip("the CPU time of this host is not available (scripts/host provides it)");
    }
    let busy = busy_while(work);
    let ends: [End; 4] = [
        ("powers off", powers_off),
        ("is stopped", is_stopped),
        ("reboots", reboots),
        ("moves from CPU to CPU", moves),
    ];
    for (end, run) in ends {
        run(host);
        let idle = busy_while(|| thread::sleep(WHILE));
        println!("after a guest that {end}: {idle:.2} CPUs; at work: {busy:.2}");
        assert!(idle < busy / 3.0, "the host does not sleep after a guest that {end}");
    }
}
