//! Ring 1: the console without a guest: a process that echoes through the UART, the I/O thread and the console on standard
//! input and output, on terminals, pipes and files.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

#[path = "terminal/jobs.rs"]
mod jobs;

use std::ffi::{OsString, c_int, c_void};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process, setsid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use rvmm::button::Button;
use rvmm::config::Endpoint;
use rvmm::io_loop::IoLoop;
use rvmm::terminal::{self, StopRequest};
use rvmm_devices::{Bus, Claim, Wiring};
use vmm_sys_util::signal::register_signal_handler;

/// Time-out far above the usual times, so that only a hang fails.
const LONG: Duration = Duration::from_secs(60);
const LIMIT: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// Set for the process that echoes; `panic` makes it panic at the first byte.
const ECHO: &str = "RVMM_TEST_ECHO";

/// The test that runs as the process that echoes.
const THIS_TEST: &str = "this_process_echoes_only_on_request";

/// Message of the process that echoes when its console is open.
const READY: &[u8] = b"echo: ready\n";

/// Message of the process when its power button is pressed.
const PRESSED: &[u8] = b"pressed";

/// The data register and the line status of a 16550.
const DATA: u64 = 0;
const STATUS: u64 = 5;
const DATA_READY: u8 = 1;
const ROOM_TO_SEND: u8 = 1 << 5;

struct NoPower;

impl rvmm_devices::PowerSwitch for NoPower {
    fn request(&self, _: rvmm_devices::PowerRequest) {
        unreachable!("an echo never switches off")
    }
}

fn register(bus: &Bus, offset: u64) -> u8 {
    let mut value = [0];
    assert_eq!(bus.read(offset, &mut value), Claim::Device);
    value[0]
}

fn send(bus: &Bus, byte: u8) {
    while register(bus, STATUS) & ROOM_TO_SEND == 0 {
        thread::yield_now();
    }
    assert_eq!(bus.write(DATA, &[byte]), Claim::Device);
}

#[test]
fn this_process_echoes_only_on_request() {
    match std::env::var(ECHO) {
        Ok(mode) => echo(&mode),
        Err(error) => assert_eq!(error, std::env::VarError::NotPresent),
    }
}

/// The process that the tests start: like a machine, with a loop instead of a hart.
fn echo(mode: &str) {
    if mode == "job" {
        jobs::come_to_foreground_on_request();
    } else if io::stdin().is_terminal() {
        setsid().unwrap();
        rustix::process::ioctl_tiocsctty(io::stdin()).unwrap();
    }
    let wants_stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&wants_stop);
    let stop: StopRequest = Arc::new(move || flag.store(true, Ordering::SeqCst));

    let console = terminal::open(&Endpoint::Stdio, Arc::clone(&stop)).unwrap();
    let mut wiring = Wiring::new(Arc::new(NoPower));
    wiring.console = Some(console.backend);
    let serial = rvmm_devices::testing::create("serial", wiring).unwrap();
    let bus = Arc::new(Bus::new(vec![(0, serial)]).unwrap());
    let mut io = IoLoop::new(Arc::clone(&bus)).unwrap();
    io.watch_signals(IoLoop::take_signals().unwrap(), stop);
    let patience = match mode {
        "short grace" => Some(Duration::from_millis(1)),
        "long grace" => Some(Duration::from_secs(3600)),
        _ => None,
    };
    let button = patience.map(|patience| Arc::new(Button::new(patience).unwrap()));
    if let Some(button) = &button {
        io.watch_power_button(Arc::clone(button));
        let device = button.device_event().unwrap();
        let bus = Arc::clone(&bus);
        thread::spawn(move || {
            while device.read().is_err() {
                thread::sleep(Duration::from_millis(1));
            }
            PRESSED.iter().for_each(|byte| send(&bus, *byte));
        });
    }
    let io = io.spawn().unwrap();

    READY.iter().for_each(|byte| send(&bus, *byte));
    while !wants_stop.load(Ordering::SeqCst) {
        if register(&bus, STATUS) & DATA_READY == 0 {
            thread::yield_now();
            continue;
        }
        assert_ne!(mode, "panic", "as it was told");
        send(&bus, register(&bus, DATA));
    }
    io.stop(IoLoop::DRAIN).unwrap();
}

/// Sets signals that this process ignores (after `nohup`, for example) to their defaults for started programs: a signal with
/// a handler has its default action after execve(2).
fn give_default_signals() {
    extern "C" fn drop_it(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let ignored = u64::from_str_radix(mask.trim(), 16).unwrap();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        if ignored & (1 << (signal.as_raw() - 1)) != 0 {
            register_signal_handler(signal.as_raw(), drop_it).unwrap();
        }
    }
}

/// Starts the process that echoes, through the command `through` if given.
fn start(through: &[&str], mode: &str, input: impl Into<Stdio>, output: impl Into<Stdio>) -> Child {
    static ONCE: Once = Once::new();
    ONCE.call_once(give_default_signals);
    let exe = std::env::current_exe().unwrap();
    let words = through.iter().map(OsString::from).chain([exe.into()]).collect::<Vec<_>>();
    Command::new(&words[0])
        .args(&words[1..])
        // One thread: with more, the test runner prints after a minute that a test takes long.
        .args(["--exact", THIS_TEST, "--nocapture", "--quiet", "--test-threads=1"])
        .env(ECHO, mode)
        .stdin(input)
        .stdout(output)
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// The output of the process that no test has consumed yet.
struct Output<R> {
    reader: R,
    rest: Vec<u8>,
}

impl<R: Read + AsFd> Output<R> {
    fn new(reader: R) -> Self {
        Self { reader, rest: Vec::new() }
    }

    /// Waits for `text` and consumes the output up to its end.
    fn until(&mut self, text: &[u8]) {
        self.line_until(text);
    }

    /// Waits for these texts in any order, and consumes all output.
    fn until_all(&mut self, texts: &[&[u8]]) {
        let found =
            |rest: &[u8], text: &[u8]| rest.windows(text.len()).any(|window| window == text);
        while !texts.iter().all(|text| found(&self.rest, text)) {
            self.more();
        }
        self.rest.clear();
    }

    /// Waits for `text` and returns the output before it.
    fn line_until(&mut self, text: &[u8]) -> String {
        let found = |rest: &[u8]| rest.windows(text.len()).position(|window| window == text);
        let at = loop {
            if let Some(at) = found(&self.rest) {
                break at;
            }
            self.more();
        };
        let taken: Vec<u8> = self.rest.drain(..at + text.len()).collect();
        String::from_utf8_lossy(&taken[..at]).into_owned()
    }

    fn more(&mut self) {
        let said = String::from_utf8_lossy(&self.rest).into_owned();
        let mut fds = [PollFd::new(&self.reader, PollFlags::IN)];
        assert_ne!(poll(&mut fds, Some(&LIMIT)).unwrap(), 0, "nothing comes after {said:?}");
        let mut buffer = [0; 4096];
        let count = self.reader.read(&mut buffer).unwrap();
        assert_ne!(count, 0, "the end, after {said:?}");
        self.rest.extend_from_slice(&buffer[..count]);
    }
}

/// A terminal with the process that echoes, which is ready, in raw mode.
struct OnTerminal {
    keyboard: File,
    screen: Output<File>,
    slave: OwnedFd,
    child: Child,
}

impl OnTerminal {
    fn start(mode: &str) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        let child = start(&[], mode, slave.try_clone().unwrap(), slave.try_clone().unwrap());
        let keyboard = File::from(master);
        let screen = Output::new(keyboard.try_clone().unwrap());
        let mut new = Self { keyboard, screen, slave, child };
        new.screen.until(b"Ctrl-A h shows the keys");
        new.screen.until(b"echo: ready");
        assert!(new.is_raw());
        new
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave)
            .unwrap()
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO)
    }

    /// Checks that it ends, with success or not, and that the terminal's settings are restored.
    fn ends(mut self, well: bool) {
        let (deadline, mut status) = (Instant::now() + LONG, None);
        while status.is_none() {
            assert!(Instant::now() < deadline, "it does not end");
            status = self.child.try_wait().unwrap();
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(status.map(|status| status.success()), Some(well));
        assert!(!self.is_raw(), "the terminal is raw still");
    }
}

#[test]
fn ctrl_a_x_ends_it_and_the_terminal_is_restored() {
    let mut terminal = OnTerminal::start("echo");
    terminal.keyboard.write_all(b"hello\x01\x01").unwrap();
    terminal.screen.until(b"hello\x01");
    terminal.keyboard.write_all(b"\x01h").unwrap();
    terminal.screen.until(b"end the virtual machine");
    terminal.keyboard.write_all(b"\x01x").unwrap();
    terminal.ends(true);
}

#[test]
fn a_signal_ends_it_and_the_terminal_is_restored() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let terminal = OnTerminal::start("echo");
        kill_process(pid(&terminal.child), signal).unwrap();
        terminal.ends(true);
    }
}

#[test]
fn the_first_sigterm_presses_the_power_button_and_the_second_stops_the_machine() {
    let mut child = start(&[], "long grace", File::open("/dev/null").unwrap(), Stdio::piped());
    let mut output = Output::new(child.stdout.take().unwrap());
    output.until(READY);
    kill_process(pid(&child), Signal::TERM).unwrap();
    output.until(PRESSED);
    assert!(child.try_wait().unwrap().is_none(), "the guest has its time");
    kill_process(pid(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
}

#[test]
fn a_guest_that_does_not_power_off_in_time_is_stopped() {
    let mut child = start(&[], "short grace", File::open("/dev/null").unwrap(), Stdio::piped());
    let mut output = Output::new(child.stdout.take().unwrap());
    output.until(READY);
    kill_process(pid(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
}

#[test]
fn another_signal_stops_without_the_guest() {
    let mut child = start(&[], "long grace", File::open("/dev/null").unwrap(), Stdio::piped());
    let mut output = Output::new(child.stdout.take().unwrap());
    output.until(READY);
    kill_process(pid(&child), Signal::INT).unwrap();
    child.wait().unwrap();
}

#[test]
fn a_panic_restores_the_terminal() {
    let mut terminal = OnTerminal::start("panic");
    terminal.keyboard.write_all(b"!").unwrap();
    terminal.ends(false);
}

#[test]
fn a_pipe_is_echoed_byte_for_byte_including_rvmms_keys() {
    let mut child = start(&[], "echo", Stdio::piped(), Stdio::piped());
    let (mut input, mut output) =
        (child.stdin.take().unwrap(), Output::new(child.stdout.take().unwrap()));
    let text: Vec<u8> =
        (0..200_000u32).map(|n| n.to_le_bytes()[0]).chain(*b"\x01x\x01hend").collect();
    output.until(READY);
    let typed = text.clone();
    let typing = thread::spawn(move || input.write_all(&typed));
    while output.rest.len() < text.len() {
        output.more();
    }
    typing.join().unwrap().unwrap();
    assert!(output.rest == text);
    // The input has ended, but not the machine.
    kill_process(pid(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_file_is_echoed_into_a_file() {
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(&[b'x'; 5000]).unwrap();
    input.write_all(b"last line\n").unwrap();
    input.rewind().unwrap();
    let output = tempfile::NamedTempFile::new().unwrap();
    let mut child = start(&[], "echo", input, output.reopen().unwrap());
    let deadline = Instant::now() + LONG;
    let mut text = String::new();
    while !text.contains("last line\n") {
        assert!(Instant::now() < deadline, "{text:?}");
        thread::sleep(Duration::from_millis(5));
        text = std::fs::read_to_string(&output).unwrap();
    }
    kill_process(pid(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(text.contains(&"x".repeat(5000)));
}

#[test]
fn without_input_and_without_a_reader_it_runs_until_it_is_stopped() {
    let mut child = start(&[], "echo", File::open("/dev/null").unwrap(), Stdio::piped());
    let mut output = Output::new(child.stdout.take().unwrap());
    output.until(READY);
    drop(output);
    assert!(child.try_wait().unwrap().is_none());
    kill_process(pid(&child), Signal::TERM).unwrap();
    // Its last line has no reader either, which affects the test library, not the console.
    let status = child.wait().unwrap();
    assert!(status.code().is_some(), "{status}");
}
