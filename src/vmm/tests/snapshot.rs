//! Machines that are saved and continued, on a hypervisor that runs scripts.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use rvmm_devices::testing::skip;
use tempfile::{NamedTempFile, TempDir};

use super::{machine_of, parsed, refusal};
use crate::config::{OnReset, VmConfig};
use crate::error::{EXIT_HOST, EXIT_SNAPSHOT, EXIT_USAGE, Error, VmError};
use crate::hypervisor::{Hypervisor, Vm};
use crate::inspect::{Query, Reply};
use crate::layout::Span;
use crate::machine::testing::ScriptHypervisor;
use crate::memory::GuestRam;
use crate::snapshot::Snapshot;
use crate::terminal::Console;
use crate::vcpu::exit::SystemEvent;
use crate::vcpu::stop::StopReason;
use crate::vcpu::testing::Step;
use crate::vmm::{
    Handle, MachineState, NewEnd, Parts, RestoreOptions, Running, SnapshotRequest, Vmm,
};

/// A folder with a disk, and a running machine that has it and every other device that can be saved.
pub(super) struct Guest {
    pub(super) folder: TempDir,
    pub(super) running: Running,
    _program: NamedTempFile,
}

impl Guest {
    pub(super) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("disk"), vec![0; 1 << 20]).unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let devices = [
            format!("blk,path={}", at("disk")),
            format!("vsock,path={},cid=3", at("vsock")),
            "balloon".into(),
            "rng".into(),
            "console,to=null".into(),
            "input".into(),
            "uart,to=null".into(),
        ];
        let devices = devices.map(|device| parsed(&device)).to_vec();
        let config = VmConfig { devices, on_reset: OnReset::Exit, ..VmConfig::default() };
        // A scratch register of the UART has a value that a new one has not.
        let script = vec![Step::Store { addr: 0x1000_0007, bytes: vec![0x5a] }, Step::Idle];
        let (vmm, _, program) = machine_of(config, None, [script, vec![Step::Idle]]);
        let running = vmm.unwrap().start().unwrap();
        // The hart has written the register.
        let has_begun = || match running.handle().inspect(Query::Stat) {
            Ok(Reply::Stat(stat)) => stat.devices.iter().any(|device| device.writes > 0),
            _ => false,
        };
        while !has_begun() {
            std::thread::yield_now();
        }
        Self { folder, running, _program: program }
    }

    pub(super) fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn snapshot(&self, name: &str) -> Result<(), Error> {
        snapshot(&self.running.handle(), &self.path(name))
    }

    pub(super) fn stop(self) -> (TempDir, NamedTempFile) {
        self.running.handle().stop();
        assert_eq!(self.running.wait().unwrap(), StopReason::Requested);
        (self.folder, self._program)
    }
}

pub(super) fn snapshot(handle: &Handle, folder: &Path) -> Result<(), Error> {
    let request = SnapshotRequest { folder: folder.into(), ..SnapshotRequest::default() };
    let report = handle.snapshot(&request)?;
    assert!(report.memory > 0 && report.paused_ns > 0, "{report:?}");
    Ok(())
}

fn restore(folder: &Path, options: RestoreOptions, script: Vec<Step>) -> Result<Vmm, Error> {
    let host = ScriptHypervisor::new([script, vec![Step::System(SystemEvent::Shutdown(0))]]);
    let (console, hypervisor) = (Some(Console::null()), Some(Box::new(host) as _));
    let parts = Parts { console, hypervisor, ..Parts::default() };
    Vmm::restore(Snapshot::open(folder)?, options, parts)
}

fn refused(result: Result<Vmm, Error>, code: u8) -> String {
    let error = result.err().unwrap();
    assert_eq!(error.exit_code(), code, "{error}");
    error.to_string()
}

/// A host that creates no VM, because it lacks something or its kernel fails.
struct NoVm(fn() -> VmError);

impl Hypervisor for NoVm {
    fn create_vm(&self) -> Result<Arc<dyn Vm>, VmError> {
        Err((self.0)())
    }
}

#[test]
fn a_host_that_lacks_what_the_guest_uses_refuses_the_snapshot_and_one_that_fails_does_not() {
    let guest = Guest::start();
    guest.snapshot("saved").unwrap();
    let place = guest.path("saved");
    let _files = guest.stop();
    let restore = |why| {
        let (console, hypervisor) = (Some(Console::null()), Some(Box::new(NoVm(why)) as _));
        let parts = Parts { console, hypervisor, ..Parts::default() };
        Vmm::restore(Snapshot::open(&place).unwrap(), RestoreOptions::default(), parts)
    };
    let lack = refused(restore(|| VmError::new("The AIA is not available")), EXIT_SNAPSHOT);
    assert!(lack.contains("Cannot use the snapshot") && lack.contains("AIA"), "{lack}");
    let failure = || VmError::io("Cannot create a VM", std::io::ErrorKind::OutOfMemory.into());
    refused(restore(failure), EXIT_HOST);
}

/// Takes the generation ID out of a state.
pub(super) fn take_generation(state: &mut serde_json::Value) -> serde_json::Value {
    let devices = state["machine"]["devices"].as_array_mut().unwrap();
    let device = devices.iter_mut().find(|device| device["model"] == "vmgenid").unwrap();
    device["state"]["id"].take()
}

/// The state in a snapshot, without its time.
pub(super) fn state(folder: &Path) -> serde_json::Value {
    let mut state: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("state.json")).unwrap()).unwrap();
    state["machine"]["saved_at_ns"] = 0.into();
    state
}

#[test]
fn a_machine_that_was_restored_is_the_one_that_was_saved() {
    let guest = Guest::start();
    guest.snapshot("first").unwrap();
    // It goes on meanwhile, and so another snapshot may follow.
    guest.snapshot("second").unwrap();
    assert_eq!(guest.running.handle().state(), MachineState::Running);
    let (folder, _program) = guest.stop();
    let at = |name: &str| folder.path().join(name);
    let options = RestoreOptions { paused: true, ..RestoreOptions::default() };
    let running = restore(&at("first"), options, vec![Step::Idle]).unwrap().start().unwrap();
    let handle = running.handle();
    while handle.state() != MachineState::Paused {
        std::thread::yield_now();
    }
    snapshot(&handle, &at("third")).unwrap();
    assert_eq!(state(&at("second")), state(&at("first")));
    let [mut first, mut third] = ["first", "third"].map(|name| state(&at(name)));
    assert_ne!(take_generation(&mut third), take_generation(&mut first));
    assert_eq!(third, first);
    for name in ["second", "third"] {
        assert!(
            fs::read(at(name).join("memory")).unwrap()
                == fs::read(at("first").join("memory")).unwrap()
        );
    }
    handle.resume().unwrap();
    assert_eq!(handle.state(), MachineState::Running);
    handle.stop();
    assert_eq!(running.wait().unwrap(), StopReason::Requested);
}

#[test]
fn a_restored_machine_runs_on_and_restarts_from_the_files_of_the_saved_one() {
    let guest = Guest::start();
    guest.snapshot("saved").unwrap();
    let (folder, _program) = guest.stop();
    let saved = folder.path().join("saved");
    let shutdown = vec![Step::System(SystemEvent::Shutdown(0))];
    let vmm = restore(&saved, RestoreOptions::default(), shutdown).unwrap();
    assert_eq!(vmm.run().unwrap(), StopReason::PowerOff);
    let running =
        restore(&saved, RestoreOptions::default(), vec![Step::Idle]).unwrap().start().unwrap();
    while running.handle().state() != MachineState::Running {
        std::thread::yield_now();
    }
    running.handle().reset().unwrap();
    assert_eq!(running.wait().unwrap(), StopReason::PowerOff);
}

#[test]
fn a_restart_of_a_restored_machine_whose_files_are_gone_is_an_error_that_names_them() {
    let guest = Guest::start();
    guest.snapshot("saved").unwrap();
    let (folder, program) = guest.stop();
    let path = program.path().display().to_string();
    drop(program);
    let saved = folder.path().join("saved");
    let running =
        restore(&saved, RestoreOptions::default(), vec![Step::Idle]).unwrap().start().unwrap();
    while running.handle().state() != MachineState::Running {
        std::thread::yield_now();
    }
    assert!(running.handle().reset().is_err());
    let error = running.wait().unwrap_err().to_string();
    assert!(error.contains(&path), "{error}");
}

#[test]
fn a_machine_that_is_saved_for_good_does_not_run_afterwards() {
    let guest = Guest::start();
    let folder = guest.path("saved");
    let request = SnapshotRequest {
        folder: folder.as_path().into(),
        stop: true,
        ..SnapshotRequest::default()
    };
    guest.running.handle().snapshot(&request).unwrap();
    assert_eq!(guest.running.wait().unwrap(), StopReason::Requested);
    Snapshot::open(&folder).unwrap();
}

#[test]
fn a_machine_cannot_be_reset_while_it_is_saved() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    let saved = handle.save().unwrap();
    assert_eq!(handle.state(), MachineState::Paused);
    assert!(refusal(handle.reset()).contains("it is being saved"));
    drop(saved);
    assert_eq!(handle.state(), MachineState::Running);
    // It may be reset again, and ended while it is saved.
    let saved = handle.save().unwrap();
    handle.stop();
    assert_eq!(guest.running.wait().unwrap(), StopReason::Requested);
    assert!(saved.memory.read(0, &mut [0]).is_ok());
    drop(saved);
}

#[test]
fn a_save_that_fails_leaves_the_machine_running() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    let request = |folder: &str| SnapshotRequest {
        folder: folder.into(),
        stop: true,
        ..SnapshotRequest::default()
    };
    let file = guest.path("disk").display().to_string();
    for (folder, part) in
        [("/nowhere/at/all", "Cannot create"), (&file, "it exists and is no snapshot")]
    {
        let error = handle.snapshot(&request(folder)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    // A disk whose file was deleted cannot be found again.
    fs::remove_file(guest.path("disk")).unwrap();
    let error = guest.snapshot("saved").unwrap_err().to_string();
    assert!(error.contains("/disk: No such file"), "{error}");
    assert_eq!(handle.state(), MachineState::Running);
    assert!(!guest.path("saved").exists());
    guest.stop();
}

#[test]
fn a_disk_that_has_changed_is_refused_unless_it_is_forced_or_another_one() {
    let guest = Guest::start();
    guest.snapshot("saved").unwrap();
    let (disk, copy) = (guest.path("disk"), guest.path("copy"));
    let (folder, _program) = guest.stop();
    let saved = folder.path().join("saved");
    let idle = || vec![Step::Idle];
    fs::write(&copy, vec![0; 1 << 20]).unwrap();
    let time = fs::metadata(&disk).unwrap().modified().unwrap();
    fs::File::options().write(true).open(&copy).unwrap().set_modified(time).unwrap();
    fs::write(&disk, vec![1; 1 << 20]).unwrap();
    let forced = RestoreOptions { force: true, ..RestoreOptions::default() };
    let other = |number| RestoreOptions {
        ends: vec![NewEnd::Disk(number, copy.as_path().into())],
        ..RestoreOptions::default()
    };
    let text = refused(restore(&saved, RestoreOptions::default(), idle()), EXIT_SNAPSHOT);
    assert!(text.contains("was written since") && text.contains("--disk-path"), "{text}");
    restore(&saved, forced.clone(), idle()).unwrap();
    // The disk of another file is the same one for the guest, by its serial number.
    let options = RestoreOptions { paused: true, ..other(0) };
    let running = restore(&saved, options, idle()).unwrap().start().unwrap();
    while running.handle().state() != MachineState::Paused {
        std::thread::yield_now();
    }
    let serial = |devices: Vec<rvmm_devices::DeviceState>| {
        let state = devices.into_iter().find(|device| device.model == "blk").unwrap();
        serde_json::to_value(state.state).unwrap()["device"]["serial"].clone()
    };
    let before = serial(Snapshot::open(&saved).unwrap().machine().devices.clone());
    assert!(before.is_string());
    assert_eq!(serial(running.handle().save().unwrap().machine.devices), before);
    running.handle().stop();
    running.wait().unwrap();
    assert!(refused(restore(&saved, other(1), idle()), EXIT_USAGE).contains("no disk vdb"));
    fs::write(&disk, vec![1; 2 << 20]).unwrap();
    let text = refused(restore(&saved, RestoreOptions::default(), idle()), EXIT_SNAPSHOT);
    assert!(text.contains("has 2097152 bytes, and had 1048576"), "{text}");
    fs::remove_file(&disk).unwrap();
    refused(restore(&saved, forced, idle()), EXIT_SNAPSHOT);
}

#[test]
fn a_state_that_does_not_fit_is_refused_whole() {
    let guest = Guest::start();
    guest.snapshot("saved").unwrap();
    let (folder, _program) = guest.stop();
    let saved = folder.path().join("saved");
    let whole = state(&saved);
    let change = |change: fn(&mut serde_json::Value)| {
        let mut state = whole.clone();
        change(&mut state["machine"]);
        let text = serde_json::to_vec(&state).unwrap();
        fs::write(saved.join("state.json"), &text).unwrap();
        fs::write(saved.join("checksum"), crate::snapshot::checksum_line(&text)).unwrap();
        refused(restore(&saved, RestoreOptions::default(), vec![Step::Idle]), EXIT_SNAPSHOT)
    };
    assert!(change(|machine| machine["vm"]["harts"][0]["id"] = 1.into()).contains("other harts"));
    let no_device = change(|machine| _ = machine["devices"].as_array_mut().unwrap().pop());
    assert!(no_device.contains("it has no saved state"), "{no_device}");
    let model = change(|machine| machine["devices"][0]["model"] = "tpm".into());
    assert!(model.contains("the machine has no such device"), "{model}");
    let value = change(|machine| {
        let devices = machine["devices"].as_array_mut().unwrap();
        devices.iter_mut().for_each(|device| device["state"] = "?".into());
    });
    assert!(value.contains("Cannot restore device"), "{value}");
    assert!(
        change(|machine| machine["config"]["name"] = "../x".into()).contains("Cannot use --name")
    );
    assert!(change(|machine| machine["config"]["mem"] = (1 << 20).into()).contains("another size"));
}

#[test]
fn the_time_of_the_guest_stands_still_unless_it_follows_the_clock() {
    let guest = Guest::start();
    guest.snapshot("saved").unwrap();
    let (folder, _program) = guest.stop();
    let saved = folder.path().join("saved");
    let time = |options: RestoreOptions| {
        let options = RestoreOptions { paused: true, ..options };
        let running = restore(&saved, options, vec![Step::Idle]).unwrap().start().unwrap();
        let handle = running.handle();
        while handle.state() != MachineState::Paused {
            std::thread::yield_now();
        }
        let time = handle.save().unwrap().machine.vm.time;
        handle.stop();
        running.wait().unwrap();
        time
    };
    assert_eq!(time(RestoreOptions::default()), 0);
    // At least the time that it has taken to restore it, in ticks of 100 ns.
    let later = time(RestoreOptions { follows_wall_clock: true, ..RestoreOptions::default() });
    assert!(later > 0 && later < 36_000_000_000, "{later}");
}

#[test]
fn clients_save_one_machine_at_once_whole_live_and_as_differences() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    let folder = Arc::new(guest.path(""));
    let clients: Vec<_> = (0..8)
        .map(|number| {
            let (handle, folder) = (handle.clone(), Arc::clone(&folder));
            std::thread::spawn(move || {
                let request = SnapshotRequest {
                    folder: folder.join(number.to_string()).into(),
                    diff: number & 1 == 1,
                    live: number & 2 == 2,
                    stop: false,
                };
                handle.snapshot(&request).unwrap();
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    assert_eq!(handle.state(), MachineState::Running);
    for number in 0..8 {
        Snapshot::open(&guest.path(&number.to_string())).unwrap();
    }
    guest.stop();
}

#[test]
fn a_difference_has_only_what_was_written_since_the_last_one() {
    let guest = Guest::start();
    let handle = guest.running.handle();
    let save = |name: &str, diff: bool| {
        let folder = guest.path(name).into();
        handle.snapshot(&SnapshotRequest { folder, diff, ..SnapshotRequest::default() }).unwrap()
    };
    let parent = |name: &str| Some(guest.path(name).into());
    let first = save("first", true);
    assert!(first.parent.is_none() && first.memory > 0, "the first one is whole");
    let second = save("second", true);
    assert_eq!((second.parent, second.memory), (parent("first"), 0), "nothing was written");
    let disk = SnapshotRequest {
        folder: guest.path("disk").into(),
        diff: true,
        ..SnapshotRequest::default()
    };
    assert!(handle.snapshot(&disk).is_err(), "a mistake in the name costs no base");
    // A reset writes all of it.
    handle.reset().unwrap();
    let third = save("third", true);
    assert_eq!(third.parent, parent("second"));
    assert!(third.memory > 0);
    assert!(save("whole", false).parent.is_none());
    assert!(save("anew", true).parent.is_none(), "the whole one has ended the row");
    for name in ["second", "third", "anew"] {
        Snapshot::open(&guest.path(name)).unwrap();
    }
    guest.stop();
}

/// A pager that takes over a machine's memory and fills nothing; the result is its connection.
fn idle_pager(path: &Path) -> std::thread::JoinHandle<std::os::unix::net::UnixStream> {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    std::thread::spawn(move || listener.accept().unwrap().0)
}

/// The options of a restore from a pager; `None`, and a report, where the user may not have one.
fn paged(path: &Path) -> Option<RestoreOptions> {
    let span = Span { base: 0x8000_0000, size: 4096 };
    if let Err(error) = GuestRam::new(span, false).unwrap().leave_to_pager() {
        skip(&error.to_string());
        return None;
    }
    Some(RestoreOptions { pager: Some(path.into()), ..RestoreOptions::default() })
}

#[test]
fn a_machine_ends_with_its_pager_and_without_its_memorys_file() {
    let guest = Guest::start();
    guest.snapshot("saved").unwrap();
    let (folder, _program) = guest.stop();
    let at = |name: &str| folder.path().join(name);
    let Some(options) = paged(&at("pager")) else { return };
    fs::remove_file(at("saved/memory")).unwrap();
    let restore = |options: &RestoreOptions| {
        let host = ScriptHypervisor::new([vec![Step::Idle], vec![Step::Idle]]);
        let (console, hypervisor) = (Some(Console::null()), Some(Box::new(host) as _));
        let parts = Parts { console, hypervisor, ..Parts::default() };
        Vmm::restore(Snapshot::open_state(&at("saved")).unwrap(), options.clone(), parts)
    };
    assert!(refused(restore(&options), EXIT_HOST).contains("start it first"));
    for paused in [false, true] {
        let pager = idle_pager(&at("pager"));
        let options = RestoreOptions { paused, ..options.clone() };
        let running = restore(&options).unwrap().start().unwrap();
        drop(pager.join().unwrap());
        let StopReason::HostFailure(what) = running.wait().unwrap() else { panic!("no failure") };
        assert!(what.contains("/pager, which has the guest's memory, has ended"), "{what}");
        fs::remove_file(at("pager")).unwrap();
    }
    // A machine that never runs is no trouble either.
    let pager = idle_pager(&at("pager"));
    drop(restore(&options).unwrap());
    drop(pager.join().unwrap());
    fs::remove_file(at("pager")).unwrap();
    // With a restart all of the memory is new, and the pager is not needed any more.
    let pager = idle_pager(&at("pager"));
    let running = restore(&options).unwrap().start().unwrap();
    let mut connection = pager.join().unwrap();
    while running.handle().state() != MachineState::Running {
        std::thread::yield_now();
    }
    running.handle().reset().unwrap();
    std::io::copy(&mut connection, &mut std::io::sink()).unwrap();
    drop(connection);
    assert_eq!(running.handle().state(), MachineState::Running);
    running.handle().stop();
    assert_eq!(running.wait().unwrap(), StopReason::Requested);
}

#[test]
fn a_machine_in_huge_pages_is_not_left_to_a_pager() {
    let guest = Guest::start();
    guest.snapshot("saved").unwrap();
    let (folder, _program) = guest.stop();
    let saved = folder.path().join("saved");
    let mut state = state(&saved);
    state["machine"]["config"]["hugepages"] = true.into();
    let text = serde_json::to_vec(&state).unwrap();
    fs::write(saved.join("state.json"), &text).unwrap();
    fs::write(saved.join("checksum"), crate::snapshot::checksum_line(&text)).unwrap();
    let options = RestoreOptions { pager: Some("/nowhere".into()), ..RestoreOptions::default() };
    let text = refused(restore(&saved, options, vec![Step::Idle]), EXIT_USAGE);
    assert!(text.contains("--hugepages"), "{text}");
}
