//! Whole machines on a hypervisor that runs scripts.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use rvmm_devices::config::NetConfig;
use rvmm_devices::virtio::vhost_user::testing::{Traits, serve_at};
use rvmm_devices::{ConsoleBackend, Port, Ports};
use tempfile::NamedTempFile;

mod migrate;
mod snapshot;

use super::{CommandError, DeviceChange, MachineState, Parts, Vmm};
use crate::config::{
    DeviceConfig, GdbAddress, GdbConfig, InitrdConfig, LoadConfig, OnReset, TraceConfig, VmConfig,
};
use crate::error::{EXIT_HOST, EXIT_USAGE, Error};
use crate::host::in_a_namespace;
use crate::inspect::{BalloonSizes, Connection, GuestState, Order, Query, Reply, WalkTarget};
use crate::machine::testing::ScriptHypervisor;
use crate::terminal::Console;
use crate::vcpu::exit::SystemEvent;
use crate::vcpu::stop::StopReason;
use crate::vcpu::testing::Step;

fn parsed(device: &str) -> DeviceConfig {
    DeviceConfig::parse(device).unwrap()
}

/// A machine of 16 MiB with this device, whose hart runs one of `scripts` after the other, the number of resets,
/// and the file that it starts.
fn machine(
    device: &str,
    scripts: impl IntoIterator<Item = Vec<Step>>,
) -> (Result<Vmm, Error>, Arc<AtomicUsize>, NamedTempFile) {
    let config = VmConfig { devices: vec![parsed(device)], ..VmConfig::default() };
    machine_of(config, None, scripts)
}

/// The same with this configuration and an inspection socket.
fn machine_of(
    config: VmConfig,
    socket: Option<PathBuf>,
    scripts: impl IntoIterator<Item = Vec<Step>>,
) -> (Result<Vmm, Error>, Arc<AtomicUsize>, NamedTempFile) {
    machine_with(config, socket, Console::null(), scripts)
}

/// The same with this console.
fn machine_with(
    mut config: VmConfig,
    socket: Option<PathBuf>,
    console: Console,
    scripts: impl IntoIterator<Item = Vec<Step>>,
) -> (Result<Vmm, Error>, Arc<AtomicUsize>, NamedTempFile) {
    let program = NamedTempFile::new().unwrap();
    std::fs::write(program.path(), [0; 64]).unwrap();
    config.mem = 16 << 20;
    config.boot.load = vec![LoadConfig { file: program.path().into(), addr: 0x8000_0000 }];
    config.boot.entry = Some(0x8000_0000);
    let host = ScriptHypervisor::new(scripts);
    let resets = Arc::clone(&host.resets);
    let (console, hypervisor) = (Some(console), Some(Box::new(host) as _));
    let parts = Parts { console, hypervisor, socket, ..Parts::default() };
    let machine = config.validate().and_then(|config| Vmm::build_with(config, parts));
    (machine, resets, program)
}

#[test]
fn a_trace_continues_over_all_runs_of_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("exits.jsonl");
    let trace = Some(TraceConfig { file: file.as_path().into(), ..TraceConfig::default() });
    let config = VmConfig { trace, ..VmConfig::default() };
    let look = || Step::Load { addr: 0x1000_0005, len: 1 };
    let scripts = [
        vec![look(), look(), Step::System(SystemEvent::Reset(0))],
        vec![look(), Step::System(SystemEvent::Shutdown(0))],
    ];
    let (machine, _, _program) = machine_of(config, None, scripts);
    assert_eq!(machine.unwrap().run().unwrap(), StopReason::PowerOff);
    let text = std::fs::read_to_string(&file).unwrap();
    let field = |line: &str| {
        let fields: serde_json::Value = serde_json::from_str(line).unwrap();
        fields["what"].as_str().map(String::from)
    };
    let what: Vec<String> = text.lines().filter_map(field).collect();
    assert_eq!(what, ["serial LSR", "serial LSR", "reset", "serial LSR", "shutdown"]);
    let page = folder.path().join("exits.html");
    crate::trace::report(&file, &page).unwrap();
    assert!(std::fs::read_to_string(&page).unwrap().contains("serial LSR"));
}

#[test]
fn a_machine_is_described_reset_and_stopped_over_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rvmm-1.sock");
    let config =
        VmConfig { name: "web".into(), devices: vec![parsed("balloon")], ..VmConfig::default() };
    let scripts = [vec![Step::Idle], vec![Step::Idle]];
    let (machine, _, _program) = machine_of(config, Some(path.clone()), scripts);
    let running = machine.unwrap().start().unwrap();
    let mut connection = Connection::to(&path).unwrap();
    let info = |connection: &mut Connection| loop {
        match connection.ask(Query::Info).unwrap() {
            Reply::Info(info) => return info,
            other => assert!(matches!(other, Reply::Error(_)), "{other:?}"),
        }
    };
    let first = info(&mut connection);
    assert_eq!((first.name.as_str(), first.harts, first.memory), ("web", 1, 16 << 20));
    assert_eq!((first.state, first.power_button), (GuestState::Running, false));
    assert_eq!(first.balloon, Some(BalloonSizes { target: 0, actual: 0 }));
    let mut give = |order| connection.give(&order).unwrap();
    assert!(matches!(give(Order::Balloon(8 << 20)), Reply::Done { .. }));
    assert!(matches!(give(Order::Balloon(u64::MAX)), Reply::Error(_)));
    let Reply::Error(refusal) = give(Order::PowerButton) else { panic!("a button") };
    assert!(refusal.contains("no power button"), "{refusal}");
    assert!(matches!(give(Order::Pause), Reply::Done { .. }));
    // A machine that is paused stays so after a reset, and the balloon keeps its target.
    assert!(matches!(give(Order::Reset), Reply::Done { .. }));
    let second = info(&mut connection);
    assert_eq!((second.state, second.balloon.unwrap().target), (GuestState::Paused, 8 << 20));
    assert!(matches!(connection.give(&Order::Stop).unwrap(), Reply::Done { .. }));
    assert_eq!(running.wait().unwrap(), StopReason::Requested);
    assert!(!path.exists());
}

#[test]
fn a_running_machine_answers_queries_and_keeps_running() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rvmm-1.sock");
    let mut script = vec![Step::Load { addr: 0x1000_0005, len: 1 }];
    script.extend(vec![Step::Idle; 8]);
    let (machine, _, _program) = machine_of(VmConfig::default(), Some(path.clone()), [script]);
    let running = machine.unwrap().start().unwrap();
    let mut connection = Connection::to(&path).unwrap();
    // Until the machine runs, it replies that it does not.
    let mut ask = |query| loop {
        match connection.ask(query).unwrap() {
            Reply::Error(text) if text.contains("starting") => std::thread::yield_now(),
            reply => return reply,
        }
    };
    let Reply::Registers(harts) = ask(Query::Registers) else { panic!("no registers") };
    assert_eq!((harts.len(), harts[0].registers[0].clone()), (1, ("pc".into(), Some(7))));
    let Reply::Walk(walk) = ask(Query::Walk { address: 0x8000_1000, hart: 0 }) else {
        panic!("no walk")
    };
    let landing = WalkTarget::Memory { slot: 0, base: 0x8000_0000, offset: 0x1000 };
    assert_eq!((walk.mode.as_str(), walk.landing), ("bare", Some(landing)));
    let Reply::Error(text) = ask(Query::Walk { address: 0, hart: 1 }) else { panic!("a hart") };
    assert!(text.contains("no hart 1 (the last one is 0)"), "{text}");
    // A machine answers before its hart has run its first load.
    let (stat, reads) = loop {
        let Reply::Stat(stat) = ask(Query::Stat) else { panic!("no counters") };
        let serial = stat.devices.iter().find(|device| device.name == "serial").unwrap();
        match serial.reads {
            0 => std::thread::yield_now(),
            reads => break (stat, reads),
        }
    };
    assert_eq!((stat.name.as_str(), stat.harts.len(), reads), ("rvmm", 1, 1));
    // A machine that was paused through its handle stays paused, as many times as that.
    let handle = running.handle();
    assert!(handle.resume().is_err());
    let (first, second) = (handle.pause().unwrap(), handle.pause().unwrap());
    assert!(matches!(ask(Query::Registers), Reply::Registers(_)));
    assert_eq!(handle.state(), MachineState::Paused);
    drop(first);
    assert_eq!(handle.state(), MachineState::Paused);
    second.keep();
    assert_eq!(handle.state(), MachineState::Paused);
    handle.resume().unwrap();
    assert_eq!(handle.state(), MachineState::Running);
    assert!(matches!(ask(Query::Registers), Reply::Registers(_)));
    assert_eq!(handle.state(), MachineState::Running);
    running.handle().stop();
    assert_eq!(running.wait().unwrap(), StopReason::Requested);
    assert!(!path.exists());
}

/// The result of a machine of this configuration after a reboot, when everything in its folder was removed before its start.
fn after_reboot(folder: tempfile::TempDir, config: VmConfig) -> Result<StopReason, Error> {
    let reset = vec![Step::System(SystemEvent::Reset(0))];
    let scripts = [reset, vec![Step::System(SystemEvent::Shutdown(0))]];
    let (machine, resets, program) = machine_of(config, None, scripts);
    let machine = machine.unwrap();
    drop((program, folder));
    let reason = machine.run();
    assert!(reason.is_err() || resets.load(SeqCst) == 1);
    reason
}

#[test]
fn a_machine_whose_io_thread_dies_ends_as_a_failure_of_the_host() {
    struct Breaks(UnixStream);
    impl ConsoleBackend for Breaks {
        fn ports(&self) -> Ports {
            let (input, output) = (Port::Closed, Port::Closed);
            Ports { input, output, event_fd: Some(self.0.as_raw_fd()) }
        }
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn process_event(&mut self) {
            panic!("on purpose");
        }
    }
    let (far, near) = UnixStream::pair().unwrap();
    let console = Console { backend: Box::new(Breaks(near)), pty: None };
    let (machine, ..) = machine_with(VmConfig::default(), None, console, [vec![Step::Idle]]);
    let running = machine.unwrap().start().unwrap();
    (&far).write_all(b"!").unwrap();
    assert_eq!(running.wait().unwrap_err().exit_code(), EXIT_HOST);
}

#[test]
fn a_restart_needs_nothing_from_the_paths_of_what_the_guest_starts_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // An Image: 2 MiB behind the start of RAM, of unknown size.
    let mut image = vec![0; 4096];
    image[8..16].copy_from_slice(&(2_u64 << 20).to_le_bytes());
    image[0x38..0x3c].copy_from_slice(b"RSC\x05");
    std::fs::write(path("Image"), &image).unwrap();
    std::fs::write(path("initrd"), [7; 100]).unwrap();
    let gzip = std::process::Command::new("gzip").arg("-k").arg(path("Image")).status();
    assert!(gzip.unwrap().success());
    for kernel in ["Image", "Image.gz"] {
        let copy = tempfile::tempdir().unwrap();
        let path = |name: &str| copy.path().join(name);
        for name in [kernel, "initrd"] {
            std::fs::copy(folder.path().join(name), path(name)).unwrap();
        }
        let mut config = VmConfig::default();
        config.boot.kernel = Some(path(kernel).into());
        config.boot.initrd = InitrdConfig::File(path("initrd").into());
        config.boot.dump_dtb = Some(path("tree").into());
        assert_eq!(after_reboot(copy, config).unwrap(), StopReason::PowerOff, "{kernel}");
    }
}

#[test]
fn a_restart_needs_nothing_from_the_paths_of_sockets() {
    let folder = tempfile::tempdir().unwrap();
    let device = format!("vsock,path={},cid=3", folder.path().join("vsock").display());
    let config = VmConfig { devices: vec![parsed(&device)], ..VmConfig::default() };
    assert_eq!(after_reboot(folder, config).unwrap(), StopReason::PowerOff);
}

#[test]
fn a_restart_needs_nothing_from_the_paths_of_disks_and_flash() {
    for device in ["blk,path=", "flash,addr=0x20000000,file="] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, [0; 4096]).unwrap();
        let devices = vec![parsed(&format!("{device}{}", file.display()))];
        let config = VmConfig { devices, ..VmConfig::default() };
        assert_eq!(after_reboot(folder, config).unwrap(), StopReason::PowerOff, "{device}");
    }
}

#[test]
fn a_tap_is_opened_once_for_all_runs_of_the_guest() {
    in_a_namespace(|| {
        let reset = || vec![Step::System(SystemEvent::Reset(0))];
        let scripts = [reset(), reset(), vec![Step::System(SystemEvent::Shutdown(0))]];
        // A tap can be open once only.
        let (machine, resets, _program) = machine("net,tap=t0", scripts);
        assert_eq!(machine.unwrap().run().unwrap(), StopReason::PowerOff);
        assert_eq!(resets.load(SeqCst), 2);
    });
}

#[test]
fn a_missing_network_and_one_that_was_not_named_are_different_errors() {
    let devices = vec![NetConfig::default().into()];
    let config = VmConfig { devices, ..VmConfig::default() };
    let error = machine_of(config, None, [Vec::new()]).0.err().unwrap();
    assert_eq!(error.exit_code(), EXIT_USAGE);
    assert!(error.to_string().contains("add tap=NAME or fd=N"), "{error}");
    in_a_namespace(|| {
        for (device, code, part) in [
            ("net,tap=a/b", EXIT_USAGE, "1 to 15 letters"),
            ("net,tap=lo", EXIT_HOST, "Cannot use tap lo (an interface"),
        ] {
            let error = machine(device, [Vec::new()]).0.err().unwrap();
            assert_eq!(error.exit_code(), code, "{device}");
            let text = error.to_string();
            assert!(text.starts_with("Device net: ") && text.contains(part), "{text}");
        }
    });
}

#[test]
fn a_machine_shares_its_memory_where_a_device_needs_it() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("peer.sock");
    let _peer = serve_at(&socket, Traits::default()).unwrap();
    let reset = || vec![Step::System(SystemEvent::Reset(0))];
    let scripts = [reset(), vec![Step::System(SystemEvent::Shutdown(0))]];
    // Another program's device is not built with memory that is not shared.
    let device = format!("vhost-user-blk,socket={}", socket.display());
    let (machine, resets, _program) = machine(&device, scripts);
    assert_eq!(machine.unwrap().run().unwrap(), StopReason::PowerOff);
    assert_eq!(resets.load(SeqCst), 1);
}

#[test]
fn a_machine_waits_for_its_debugger_and_is_killed_by_it() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gdb");
    let program = NamedTempFile::new().unwrap();
    std::fs::write(program.path(), [0; 64]).unwrap();
    let mut config = VmConfig { mem: 16 << 20, ..VmConfig::default() };
    config.boot.load = vec![LoadConfig { file: program.path().into(), addr: 0x8000_0000 }];
    config.boot.entry = Some(0x8000_0000);
    config.gdb = Some(GdbConfig { at: GdbAddress::Unix(socket.as_path().into()), wait: true });
    let host = ScriptHypervisor::new([vec![Step::System(SystemEvent::Shutdown(0))]]);
    let parts = Parts {
        console: Some(Console::null()),
        hypervisor: Some(Box::new(host)),
        signals: false,
        ..Parts::default()
    };
    let machine = Vmm::build_with(config.validate().unwrap(), parts).unwrap();
    assert_eq!(machine.debugger(), Some((&GdbAddress::Unix(socket.as_path().into()), true)));
    let running = machine.start().unwrap();
    let mut debugger = UnixStream::connect(&socket).unwrap();
    let mut answer = [0; 8];
    debugger.write_all(b"$p20#d2").unwrap();
    debugger.read_exact(&mut answer).unwrap();
    // The program counter where the boot hart starts: 000000 80 0..., with run lengths.
    assert_eq!(&answer, b"+$0*\"80*");
    debugger.write_all(b"$k#6b").unwrap();
    assert_eq!(running.wait().unwrap(), StopReason::Requested);
    assert!(!socket.exists(), "the socket is gone with the machine");
}

/// A machine with these devices whose hart idles.
fn idle(devices: &[&str]) -> (Vmm, Arc<AtomicUsize>, NamedTempFile) {
    let devices = devices.iter().map(|device| parsed(device)).collect();
    // Resets of the guest itself would end the machine.
    let config = VmConfig { devices, on_reset: OnReset::Exit, ..VmConfig::default() };
    let idle = || vec![Step::Idle];
    let (vmm, resets, program) = machine_of(config, None, [idle(), idle(), idle()]);
    (vmm.unwrap(), resets, program)
}

fn refusal(result: Result<(), CommandError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_launched_machine_runs_when_it_is_started_and_each_command_needs_its_state() {
    let (vmm, _, _program) = idle(&["rng"]);
    let handle = vmm.handle();
    assert_eq!(refusal(handle.start()), "Cannot start the machine: it is not started");
    let running = vmm.launch().unwrap();
    // The controller's thread may not have begun yet.
    while handle
        .change(DeviceChange::BalloonTarget(0))
        .unwrap_err()
        .to_string()
        .contains("not started")
    {
        std::thread::yield_now();
    }
    assert_eq!(handle.state(), MachineState::Built);
    assert_eq!(refusal(handle.pause().map(drop)), "Cannot pause the machine: it is not started");
    assert_eq!(refusal(handle.reset()), "Cannot reset the machine: it is not started");
    assert!(handle.inspect(Query::Stat).is_err());
    handle.start().unwrap();
    assert_eq!(handle.state(), MachineState::Running);
    assert_eq!(refusal(handle.start()), "Cannot start the machine: it is running");
    assert_eq!(refusal(handle.resume()), "Cannot resume the machine: it is running");
    assert!(matches!(handle.inspect(Query::Stat), Ok(Reply::Stat(_))));
    assert_eq!(refusal(handle.press_power_button()), "The machine has no power button");
    let target = DeviceChange::BalloonTarget(0);
    assert_eq!(refusal(handle.change(target)), "The machine has no balloon");
    handle.stop();
    assert_eq!(running.wait().unwrap(), StopReason::Requested);
    assert_eq!(handle.state(), MachineState::Ended);
    assert_eq!(refusal(handle.reset()), "Cannot reset the machine: it is ended");
}

#[test]
fn a_machine_that_is_stopped_before_its_start_never_runs() {
    let (vmm, _, _program) = idle(&[]);
    vmm.handle().stop();
    assert_eq!(vmm.run().unwrap(), StopReason::Requested);
    let (vmm, _, _program) = idle(&[]);
    let running = vmm.launch().unwrap();
    running.handle().stop();
    assert_eq!(running.wait().unwrap(), StopReason::Requested);
}

#[test]
fn a_client_resets_a_machine_in_place_and_a_paused_one_stays_paused() {
    let (vmm, resets, _program) = idle(&["balloon", "rng"]);
    let running = vmm.start().unwrap();
    let handle = running.handle();
    while handle.state() != MachineState::Running {
        std::thread::yield_now();
    }
    handle.reset().unwrap();
    assert_eq!((resets.load(SeqCst), handle.state()), (1, MachineState::Running));
    let paused = handle.pause().unwrap();
    handle.reset().unwrap();
    assert_eq!((resets.load(SeqCst), handle.state()), (2, MachineState::Paused));
    drop(paused);
    assert_eq!(handle.state(), MachineState::Running);
    handle.change(DeviceChange::BalloonTarget(4 << 20)).unwrap();
    assert_eq!(handle.balloon().target(), 4 << 20);
    let error = handle.change(DeviceChange::BalloonTarget(u64::MAX)).unwrap_err();
    assert!(error.to_string().contains("less than 16 TiB"), "{error}");
    handle.stop();
    assert_eq!(running.wait().unwrap(), StopReason::Requested);
}

#[test]
fn the_devices_of_a_paused_machine_are_at_rest() {
    /// A console that counts the reads of its input, which is always announced and never there.
    struct Busy(UnixStream, Arc<AtomicUsize>);
    impl ConsoleBackend for Busy {
        fn ports(&self) -> Ports {
            let input = Port::Poll(self.0.as_raw_fd());
            Ports { input, output: Port::Closed, event_fd: None }
        }
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            self.1.fetch_add(1, SeqCst);
            Err(io::ErrorKind::WouldBlock.into())
        }
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn process_event(&mut self) {}
    }
    let (near, far) = UnixStream::pair().unwrap();
    let reads = Arc::new(AtomicUsize::new(0));
    let console = Console { backend: Box::new(Busy(near, Arc::clone(&reads))), pty: None };
    // The guest enables the receive interrupt: input is read from then on.
    let script = vec![Step::Store { addr: 0x1000_0001, bytes: vec![1] }, Step::Idle];
    let (vmm, ..) = machine_with(VmConfig::default(), None, console, [script]);
    let running = vmm.unwrap().start().unwrap();
    let handle = running.handle();
    let stat = |handle: &super::Handle| match handle.inspect(Query::Stat) {
        Ok(Reply::Stat(stat)) => stat.devices.iter().map(|device| device.writes).sum::<u64>(),
        _ => 0,
    };
    while stat(&handle) == 0 {
        std::thread::yield_now();
    }
    let paused = handle.pause().unwrap();
    (&far).write_all(b"!").unwrap();
    let before = reads.load(SeqCst);
    // The I/O thread still serves others than the devices; so this proves that it had its chance.
    for _ in 0..20 {
        assert_eq!(stat(&handle), 1);
    }
    assert_eq!(reads.load(SeqCst), before);
    drop(paused);
    while reads.load(SeqCst) == before {
        std::thread::yield_now();
    }
    handle.stop();
    running.wait().unwrap();
}
