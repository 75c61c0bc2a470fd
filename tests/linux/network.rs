//! Network traffic between a guest and its host over a tap.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::process::Command;
use std::thread;

use crate::harness::{Session, busybox};

/// Runs a busybox command on the host, as root like the tests.
pub(crate) fn on_the_host(arguments: &[&str]) {
    let status = Command::new(busybox()).args(arguments).status().expect("busybox starts");
    assert!(status.success(), "{arguments:?}: {status}");
}

/// Sets the addresses of the tap and of the guest's card, and pings the host.
pub(crate) fn plug_in(session: &mut Session, tap: &str, here: &str, there: &str) {
    on_the_host(&["ip", "addr", "add", &format!("{here}/30"), "dev", tap]);
    on_the_host(&["ip", "link", "set", tap, "up"]);
    set_up_guest(session, here, there);
    assert_eq!(session.ask("cat /sys/class/net/eth0/address"), "02:00:00:00:00:07\n");
    // By default Linux uses as many queue pairs as it has harts.
    let queues = session.ask("ls /sys/class/net/eth0/queues | tr '\\n' ' '; echo");
    assert_eq!(queues, "rx-0 rx-1 tx-0 tx-1 \n");
}

/// Sets the address of the guest's card, and pings the host.
pub(crate) fn set_up_guest(session: &mut Session, here: &str, there: &str) {
    session.ask(&format!("ip addr add {there}/30 dev eth0; ip link set eth0 up"));
    // With several pings, busybox does not wait for the last ones.
    let pings = session.ask(&format!("for n in $(seq 60); do ping -c 1 -W 60 {here} >/dev/null 2>&1 && echo answered && break; sleep 1; done"));
    assert_eq!(pings, "answered\n");
}

/// Echoes data of the guest through TCP, with the negotiated offloads. Returns the data, which is also in the guest's file
/// `/data`.
pub(crate) fn echo_over_tcp(session: &mut Session, here: &str) -> Vec<u8> {
    let listener = TcpListener::bind((here, 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("the guest's bytes");
        stream.write_all(&all).expect("the guest reads");
        stream.shutdown(Shutdown::Write).expect("the end");
        all
    });
    let sums = session.ask(&format!(
        "dd if=/dev/urandom of=/data bs=64k count=32 2>/dev/null; nc {here} {port} </data >/back; md5sum </data; md5sum </back"
    ));
    let mut sums = sums.lines();
    assert_eq!(sums.next(), sums.next(), "what came back is not what was sent");
    let all = echo.join().expect("the echo");
    assert_eq!(all.len(), 2 << 20);
    all
}

/// Checks that the guest's link goes down and up with the tap.
pub(crate) fn pull_the_cable(session: &mut Session, tap: &str) {
    for (state, carrier) in [("down", "0"), ("up", "1")] {
        on_the_host(&["ip", "link", "set", tap, state]);
        let wait = format!(
            "until [ $(cat /sys/class/net/eth0/carrier) = {carrier} ]; do sleep 1; done; echo {state}"
        );
        assert_eq!(session.ask(&wait), format!("{state}\n"));
    }
}
