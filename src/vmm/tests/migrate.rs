//! Machines that move from one controller to another one, in this process or between two.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};

use rvmm_devices::testing::skip;

use super::snapshot::{Guest, snapshot, state, take_generation};
use crate::error::Error;
use crate::machine::testing::ScriptHypervisor;
use crate::migration::{Address, Incoming, MigrationProgress, MigrationReport, MigrationRequest};
use crate::terminal::Console;
use crate::vcpu::exit::SystemEvent;
use crate::vcpu::stop::StopReason;
use crate::vcpu::testing::Step;
use crate::vmm::{Handle, MachineState, NewEnd, Parts, RestoreOptions, Running, Vmm};

/// Takes a machine over that comes through this socket, with another vsock path; its hart runs this script.
fn receive(socket: UnixStream, options: RestoreOptions, script: Vec<Step>) -> Result<Vmm, Error> {
    let host = ScriptHypervisor::new([script, vec![Step::System(SystemEvent::Shutdown(0))]]);
    let (console, hypervisor) = (Some(Console::null()), Some(Box::new(host) as _));
    let parts = Parts { console, hypervisor, ..Parts::default() };
    Vmm::receive(Incoming::of(socket.into())?, options, parts)
}

fn elsewhere(folder: &Path) -> RestoreOptions {
    let path = folder.join("other-vsock");
    RestoreOptions { ends: vec![NewEnd::Vsock(path.as_path().into())], ..RestoreOptions::default() }
}

fn migrate(handle: &Handle, socket: UnixStream) -> Result<MigrationReport, Error> {
    handle.migrate(&MigrationRequest::default(), socket.into(), &mut |_| true)
}

/// Moves the guest to a new machine of this process.
fn moved_to(
    handle: &Handle,
    options: RestoreOptions,
) -> (Result<MigrationReport, Error>, Result<Running, Error>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let target: JoinHandle<Result<Running, Error>> =
        thread::spawn(move || receive(theirs, options, vec![Step::Idle])?.start());
    let report = migrate(handle, ours);
    (report, target.join().unwrap())
}

fn await_state(handle: &Handle, state: MachineState) {
    while handle.state() != state {
        thread::yield_now();
    }
}

#[test]
fn a_machine_that_has_moved_is_the_one_that_it_was() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    snapshot(&handle, &guest.path("before")).unwrap();
    let mut told: Vec<MigrationProgress> = Vec::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = RestoreOptions { paused: true, ..elsewhere(guest.folder.path()) };
    let target = thread::spawn(move || receive(theirs, options, vec![Step::Idle])?.start());
    let mut tell = |progress: &MigrationProgress| {
        told.push(progress.clone());
        true
    };
    let report = handle.migrate(&MigrationRequest::default(), ours.into(), &mut tell).unwrap();
    let running = target.join().unwrap().unwrap();
    assert_eq!(told.len(), usize::try_from(report.rounds).unwrap());
    assert!(told[0].sent > 0 && report.sent > told[0].sent && report.downtime_ns > 0, "{report:?}");
    // It has ended here, and its disk is in use there.
    let at = |name: &str| guest.folder.path().join(name);
    assert_eq!(guest.running.wait().unwrap(), StopReason::Requested);
    await_state(&running.handle(), MachineState::Paused);
    snapshot(&running.handle(), &at("after")).unwrap();
    let [mut before, mut after] = ["before", "after"].map(|name| state(&at(name)));
    let path = &mut after["machine"]["config"]["devices"];
    let vsock = path.as_array_mut().unwrap().iter_mut().find(|device| device["model"] == "vsock");
    let vsock = vsock.map(|vsock| vsock["path"].take()).unwrap();
    assert!(vsock.as_str().unwrap().ends_with("other-vsock"), "{vsock}");
    before["machine"]["config"]["devices"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .filter(|device| device["model"] == "vsock")
        .for_each(|device| _ = device["path"].take());
    // There is no second one with its random numbers: it keeps its generation ID.
    assert_eq!(take_generation(&mut before), take_generation(&mut after));
    assert_eq!(before, after);
    assert!(
        fs::read(at("before").join("memory")).unwrap()
            == fs::read(at("after").join("memory")).unwrap()
    );
    // And on to a third one, which runs.
    running.handle().resume().unwrap();
    let ends = vec![NewEnd::Vsock(at("vsock").as_path().into())];
    let back = RestoreOptions { ends, ..RestoreOptions::default() };
    let (report, third) = moved_to(&running.handle(), back);
    report.unwrap();
    let third = third.unwrap();
    await_state(&third.handle(), MachineState::Running);
    assert_eq!(running.wait().unwrap(), StopReason::Requested);
    third.handle().stop();
    assert_eq!(third.wait().unwrap(), StopReason::Requested);
}

#[test]
fn a_paused_machine_arrives_paused() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    handle.pause().unwrap().keep();
    let (report, running) = moved_to(&handle, elsewhere(guest.folder.path()));
    report.unwrap();
    let running = running.unwrap();
    await_state(&running.handle(), MachineState::Paused);
    running.handle().resume().unwrap();
    running.handle().stop();
    running.wait().unwrap();
    assert_eq!(guest.running.wait().unwrap(), StopReason::Requested);
}

#[test]
fn a_target_that_cannot_build_the_machine_leaves_it_running_with_its_disk() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    // The vsock path is in use, and so the target has opened the disk already, or not: it gives it back.
    let (report, running) = moved_to(&handle, RestoreOptions::default());
    let [here, there] =
        [report.unwrap_err(), running.err().unwrap()].map(|error| error.to_string());
    assert!(there.contains("vsock") && here.contains(&there), "{here}\n{there}");
    assert_eq!(handle.state(), MachineState::Running);
    let missing = RestoreOptions {
        ends: vec![NewEnd::Disk(0, "/nowhere/at/all".into())],
        ..elsewhere(guest.folder.path())
    };
    let (report, running) = moved_to(&handle, missing);
    assert!(report.unwrap_err().to_string().contains("/nowhere/at/all"));
    assert!(running.is_err());
    // Its disk is its own again: a snapshot of it is not opened by another machine meanwhile.
    snapshot(&handle, &guest.path("saved")).unwrap();
    let other =
        super::machine(&format!("blk,path={}", guest.path("disk").display()), [vec![Step::Idle]]).0;
    let text = other.err().unwrap().to_string();
    assert!(text.contains("another program has it open"), "{text}");
    // It can still move.
    let (report, running) = moved_to(&handle, elsewhere(guest.folder.path()));
    report.unwrap();
    let running = running.unwrap();
    running.handle().stop();
    running.wait().unwrap();
}

#[test]
fn a_machine_whose_disks_are_lent_resumes_only_with_them() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    handle.pause().unwrap().keep();
    handle.lend_disks().unwrap();
    let disk = format!("blk,path={}", guest.path("disk").display());
    let other = super::machine(&disk, [vec![Step::Idle]]).0.unwrap();
    let text = handle.resume().unwrap_err().to_string();
    assert!(text.contains("another program has it open"), "{text}");
    assert_eq!(handle.state(), MachineState::Paused);
    drop(other);
    handle.resume().unwrap();
    assert_eq!(handle.state(), MachineState::Running);
    assert!(super::machine(&disk, [vec![Step::Idle]]).0.is_err());
    guest.stop();
}

#[test]
fn a_migration_that_is_given_up_leaves_the_machine_running_and_tells_the_target() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = elsewhere(guest.folder.path());
    let target = thread::spawn(move || receive(theirs, options, vec![Step::Idle]).map(drop));
    let given_up = handle.migrate(&MigrationRequest::default(), ours.into(), &mut |_| false);
    assert!(given_up.unwrap_err().to_string().contains("given up"));
    let there = target.join().unwrap().unwrap_err().to_string();
    assert!(there.contains("stays where it is: The migration was given up"), "{there}");
    assert_eq!(handle.state(), MachineState::Running);
    guest.stop();
}

#[test]
fn a_machine_that_ends_meanwhile_moves_nowhere() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let options = elsewhere(guest.folder.path());
    let target = thread::spawn(move || receive(theirs, options, vec![Step::Idle]).map(drop));
    let stopper = handle.clone();
    let result = handle.migrate(&MigrationRequest::default(), ours.into(), &mut |_| {
        stopper.stop();
        await_state(&stopper, MachineState::Ended);
        true
    });
    assert!(result.is_err() && target.join().unwrap().is_err());
    assert_eq!(guest.running.wait().unwrap(), StopReason::Requested);
}

/// In the environment of a process of its own: the socket that its source connects to, or that its target listens on.
const SOURCE: &str = "RVMM_TEST_MIGRATE_TO";
const TARGET: &str = "RVMM_TEST_MIGRATE_AT";

/// Is a side of a migration in the process that is killed; does nothing otherwise.
#[test]
fn a_side_in_a_process_of_its_own() {
    let path = |name: &str| std::env::var_os(name).map(std::path::PathBuf::from);
    if let Some(path) = path(SOURCE) {
        let guest = Guest::start();
        let result = migrate(&guest.running.handle(), UnixStream::connect(path).unwrap());
        // Without the test runner, which prints something.
        std::process::exit(if result.is_ok() { 0 } else { 9 });
    }
    if let Some(path) = path(TARGET) {
        let incoming = Incoming::accept(&Address::unix(&path), |_| {}).unwrap();
        let host = ScriptHypervisor::new([vec![Step::Idle]]);
        let (console, hypervisor) = (Some(Console::null()), Some(Box::new(host) as _));
        let parts = Parts { console, hypervisor, ..Parts::default() };
        let built = Vmm::receive(incoming, elsewhere(path.parent().unwrap()), parts);
        let Ok(running) = built.and_then(Vmm::start) else { std::process::exit(9) };
        // Until the other side has seen enough.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        running.handle().stop();
        std::process::exit(0);
    }
}

/// A side in a process of its own, which is killed at the n-th of these system calls: each message is sent by one.
fn killed_side(role: &str, path: &Path, call: &str, number: usize) -> Child {
    let mut command = Command::new("strace");
    command.args(["-f", "-qqq", "-o", "/dev/null", "-e", &format!("trace={call}")]);
    command.args(["-e", &format!("inject={call}:signal=SIGKILL:when={number}")]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "vmm::tests::migrate::a_side_in_a_process_of_its_own"]);
    command.env(role, path).env("TMPDIR", path.parent().unwrap());
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

fn may_trace() -> bool {
    let mut command = Command::new("strace");
    let tried = command.args(["-e", "trace=none", "true"]).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

/// System calls of one side, and some more than it makes.
const CALLS: [(&str, usize); 2] = [("sendto", 7), ("recvfrom", 12)];

#[test]
fn a_target_that_is_killed_at_any_message_leaves_the_guest_running_at_its_source() {
    if !may_trace() {
        return skip("strace may not trace programs here");
    }
    let (mut stayed, mut moved) = (0, 0);
    for (call, number) in CALLS.iter().flat_map(|(call, most)| (1..=*most).map(move |n| (call, n)))
    {
        let guest = Guest::start();
        let handle = guest.running.handle();
        let socket = guest.path("move");
        let mut child = killed_side(TARGET, &socket, call, number);
        let connection = loop {
            match UnixStream::connect(&socket) {
                Ok(connection) => break connection,
                Err(_) => thread::yield_now(),
            }
        };
        match migrate(&handle, connection) {
            Ok(_) => {
                moved += 1;
                assert_eq!(guest.running.wait().unwrap(), StopReason::Requested);
            }
            Err(error) => {
                stayed += 1;
                assert_eq!(handle.state(), MachineState::Running, "{call} {number}: {error}");
                // It is whole: it can be saved, and move.
                snapshot(&handle, &guest.path("saved")).unwrap();
                let (report, running) = moved_to(&handle, elsewhere(guest.folder.path()));
                report.unwrap();
                running.unwrap().handle().stop();
            }
        }
        drop(child.stdin.take());
        child.wait().unwrap();
    }
    assert!(stayed >= 8 && moved >= 4, "it stayed {stayed} times, and moved {moved} times");
}

#[test]
fn a_source_that_is_killed_at_any_message_leaves_the_guest_running_at_the_target_once_it_is_complete()
 {
    if !may_trace() {
        return skip("strace may not trace programs here");
    }
    for (call, most) in CALLS {
        let mut outcomes = Vec::new();
        for number in 1..=most {
            let folder = tempfile::tempdir().unwrap();
            let socket = folder.path().join("move");
            let address = Address::unix(&socket);
            let target = thread::spawn(move || Incoming::accept(&address, |_| {}));
            while !socket.exists() {
                thread::yield_now();
            }
            let mut child = killed_side(SOURCE, &socket, call, number);
            let host = ScriptHypervisor::new([vec![Step::Idle]]);
            let (console, hypervisor) = (Some(Console::null()), Some(Box::new(host) as _));
            let parts = Parts { console, hypervisor, ..Parts::default() };
            let options = elsewhere(folder.path());
            let received =
                target.join().unwrap().and_then(|incoming| Vmm::receive(incoming, options, parts));
            let runs = received.and_then(Vmm::start).map(|running| {
                running.handle().stop();
                running.wait().unwrap();
            });
            drop(child.stdin.take());
            child.wait().unwrap();
            outcomes.push(runs.is_ok());
        }
        // Up to a message it is lost with its source, and from then on it goes on here.
        let first = outcomes.iter().position(|runs| *runs).expect("it moves");
        assert!(first > 1 && outcomes[first..].iter().all(|runs| *runs), "{call}: {outcomes:?}");
    }
}
