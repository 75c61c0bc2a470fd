//! Ring 2: every guest of `guests/` under rvmm, with every interrupt controller that the host supports.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;
#[path = "harness/tests.rs"]
mod harness_tests;

use harness::{Host, STOP_LIMIT, Session, guest, host, rvmm};
use rustix::process::Signal;

/// A machine with this guest, by default of 64 MiB.
fn start(name: &str, irqchip: &str, arguments: &[&str]) -> Session {
    let mem: &[&str] = if arguments.contains(&"--mem") { &[] } else { &["--mem", "64M"] };
    let usual = rvmm(&["--no-initrd", "--irqchip", irqchip]).args(mem);
    usual.args(arguments).kernel(&guest(name)).start()
}

/// Checks that the guest passes all of its checks and powers off.
fn passes(mut session: Session, name: &str) {
    session.expect(&format!("PASS {name}\n"));
    assert_eq!(session.exit_code(), 0);
    no_failure(&session);
}

fn no_failure(session: &Session) {
    let output = String::from_utf8_lossy(&session.output()).into_owned();
    assert!(!output.contains("FAIL"), "a check of the guest failed");
}

/// Runs the guest with each interrupt controller, with these arguments.
fn passes_everywhere(host: &Host, name: &str, arguments: &[&str]) {
    for irqchip in &host.irqchips {
        passes(start(name, irqchip, arguments), name);
    }
}

#[test]
fn hello_starts_finds_its_tree_and_powers_off() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let session = start("hello", irqchip, &["--cmdline", "some words"]);
        session.expect("hello from hart 0: 1 harts, RAM 0x80000000+0x4000000, ");
        session.expect(&format!("{irqchip}, bootargs 'some words'"));
        passes(session, "hello");
    }
}

#[test]
fn a_machine_has_as_many_harts_and_as_much_memory_as_asked_for() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        for (cpus, mem, shown) in [
            ("2", "16M", "0x1000000"),
            ("4", "1G", "0x40000000"),
            ("8", "0x2000_0000", "0x20000000"),
        ] {
            let session = start("hello", irqchip, &["--cpus", cpus, "--mem", mem]);
            session.expect(&format!("{cpus} harts, RAM 0x80000000+{shown},"));
            passes(session, "hello");
        }
    }
}

#[test]
fn auto_takes_the_best_interrupt_controller_that_the_host_has() {
    let Some(host) = host() else { return };
    let session = start("hello", "auto", &[]);
    session.expect(&format!(", {}, bootargs", host.irqchips[0]));
    passes(session, "hello");
}

/// Starts rvmm with this number of devices with an interrupt besides those that every machine has.
fn start_with_devices(irqchip: &str, count: usize) -> Session {
    let device = ["--device", "rng"].repeat(count);
    start("hello", irqchip, &device)
}

#[test]
fn a_machine_has_as_many_interrupts_as_devices_with_any_controller() {
    let Some(host) = host() else { return };
    let usual = host.irqchips[0];
    let session = start_with_devices("auto", 27);
    session.expect(&format!(", {usual}, bootargs"));
    passes(session, "hello");
    let session = start_with_devices("auto", 28);
    session.expect(&format!(", {}, bootargs", if host.loses_identities { "plic" } else { usual }));
    passes(session, "hello");
    if host.irqchips.contains(&"aia") {
        for (devices, warns) in [(27, false), (28, host.loses_identities)] {
            let mut session = start_with_devices("aia", devices);
            session.expect(", aia, bootargs");
            assert_eq!(session.exit_code(), 0);
            assert_eq!(session.all_errors().contains("32 interrupts"), warns, "{devices} devices");
        }
    }
}

#[test]
fn a_guest_that_waits_without_an_aia_driver_is_reported() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let mut session = start("wfi", irqchip, &["--cpus", "2"]);
        session.expect("wfi: 2 harts asleep\n");
        match *irqchip {
            "aia" => session.expect_error("use --irqchip plic"),
            _ => String::new(),
        };
        session.signal(Signal::TERM);
        assert_eq!(session.exit_code_within(STOP_LIMIT), 0);
        let times = session.all_errors().matches("--irqchip plic").count();
        assert_eq!(times, usize::from(*irqchip == "aia"));
    }
}

#[test]
fn a_forced_aia_on_a_host_without_one_is_refused_with_the_reason() {
    let Some(host) = host() else { return };
    if host.irqchips.contains(&"aia") {
        return harness::skip("this host has AIA (the host without is HOST_IRQCHIP=plic)");
    }
    let mut session = start("hello", "aia", &[]);
    assert_eq!(session.exit_code(), 1);
    let errors = session.all_errors();
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert!(errors.contains("AIA"), "{errors}");
}

#[test]
fn mmio_is_answered_in_every_width_everywhere() {
    let Some(host) = host() else { return };
    passes_everywhere(host, "mmio", &[]);
    passes_everywhere(host, "mmio", &["--unassigned", "zero"]);
}

#[test]
fn with_unassigned_fault_the_guest_takes_access_faults() {
    let Some(host) = host() else { return };
    passes_everywhere(host, "mmio", &["--unassigned", "fault", "--cmdline", "unassigned=fault"]);
}

#[test]
fn with_unassigned_stop_the_machine_stops_with_a_register_dump() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let mut session = start("mmio", irqchip, &["--unassigned", "stop"]);
        assert_eq!(session.exit_code(), 3);
        let errors = session.all_errors();
        assert!(
            errors.contains("Hart 0 loaded from 0x8, which is neither memory nor a device"),
            "{errors}"
        );
        for register in ["pc ", "ra ", "sp ", "a0 ", "t6 ", "sepc ", "scause ", "stval ", "satp "] {
            assert!(errors.contains(register), "no {register}in the register dump: {errors}");
        }
    }
}

#[test]
fn sbi_calls_with_any_arguments_are_answered() {
    let Some(host) = host() else { return };
    passes_everywhere(host, "sbi", &[]);
}

#[test]
fn the_debug_console_reads_what_is_typed_and_a_suspended_machine_wakes() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let mut session = start("sbi", irqchip, &["--cmdline", "input"]);
        session.expect("sbi: waiting for 12 bytes");
        session.send("hello, world");
        session.expect("sbi: read 'hello, world'");
        session.expect("PASS sbi input\n");
        if host.linux >= (6, 14) && *irqchip == "plic" {
            is_woken(&mut session);
        }
        assert_eq!(session.exit_code(), 0);
        no_failure(&session);
    }
}

/// The guest suspends itself four times, the last time until there is input.
fn is_woken(session: &mut Session) {
    for by in ["0, woken by its timer", "1, woken by its timer", "2, woken by an interrupt"] {
        session.expect(&format!("PASS sbi: suspend {by}\n"));
    }
    session.expect("sbi: suspending\n");
    session.send("x");
    session.expect("sbi: resumed");
    session.expect("PASS sbi: suspend\n");
}

#[test]
fn input_wakes_a_suspended_machine_whose_guest_has_never_read_any() {
    let Some(host) = host() else { return };
    if host.linux < (6, 14) {
        return harness::skip("this host's kernel has no SBI SUSP (Linux 6.14 has)");
    }
    let mut session = start("sbi", "plic", &["--cmdline", "suspend"]);
    is_woken(&mut session);
    assert_eq!(session.exit_code(), 0);
    no_failure(&session);
}

#[test]
fn interrupts_reach_the_hart_through_both_controllers() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        for cpus in ["1", "4"] {
            let mut session = start("irq", irqchip, &["--cpus", cpus, "--cmdline", "input"]);
            session.expect("irq: waiting for a line");
            session.send("abc\n");
            let sum: u32 = b"abc\n".iter().map(|&byte| u32::from(byte)).sum();
            session.expect(&format!("irq: received bytes that add up to {sum}"));
            passes(session, "irq");
        }
    }
}

#[test]
fn waiting_harts_are_woken_on_any_host_cpu() {
    let Some(host) = host() else { return };
    // The host migrates threads at arbitrary times, so more than one round.
    for _ in 0..5 {
        passes_everywhere(host, "irq", &["--cpus", "4"]);
    }
}

#[test]
fn harts_start_stop_and_interrupt_each_other() {
    let Some(host) = host() else { return };
    for cpus in ["1", "2", "4", "8"] {
        passes_everywhere(host, "smp", &["--cpus", cpus]);
    }
}

#[test]
fn invalid_accesses_are_access_faults_that_the_guest_survives() {
    let Some(host) = host() else { return };
    passes_everywhere(host, "fault", &[]);
    passes_everywhere(host, "fault", &["--unassigned", "fault"]);
}

#[test]
fn a_virtio_device_answers_and_a_broken_driver_breaks_only_its_device() {
    let Some(host) = host() else { return };
    passes_everywhere(host, "virtio", &["--device", "rng"]);
}

#[test]
fn a_reset_gives_a_new_machine() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let mut session = start("reboot", irqchip, &["--cpus", "3"]);
        for wish in ["c", "w", "s", "b", "c", "p"] {
            session.expect("reboot: boot\n");
            session.expect("PASS reboot\n");
            session.expect("reboot: what next?\n");
            session.send(wish);
        }
        assert_eq!(session.exit_code(), 0);
        no_failure(&session);
        assert_eq!(String::from_utf8_lossy(&session.output()).matches("reboot: boot\n").count(), 6);
    }
}

#[test]
fn a_machine_that_resets_repeatedly_leaks_nothing() {
    let Some(host) = host() else { return };
    let mut session = start("reboot", host.irqchips[0], &[]);
    let reset = |session: &mut Session| {
        session.expect("reboot: what next?\n");
        session.send("c");
    };
    let open_files = |session: &Session| {
        let folder = format!("/proc/{}/fd", session.pid().as_raw_nonzero());
        std::fs::read_dir(folder).expect("the descriptors of a living process").count()
    };
    reset(&mut session);
    session.expect("reboot: what next?\n");
    let before = open_files(&session);
    session.send("c");
    for _ in 0..20 {
        reset(&mut session);
    }
    session.expect("reboot: what next?\n");
    assert_eq!(open_files(&session), before);
    session.send("p");
    assert_eq!(session.exit_code(), 0);
    no_failure(&session);
}

#[test]
fn with_no_reboot_a_reset_ends_rvmm() {
    let Some(host) = host() else { return };
    for wish in ["c", "s"] {
        let mut session = start("reboot", host.irqchips[0], &["--no-reboot"]);
        session.expect("reboot: what next?\n");
        session.send(wish);
        assert_eq!(session.exit_code(), 0);
        no_failure(&session);
    }
}

#[test]
fn a_guest_that_reports_a_failure_ends_rvmm_with_code_3() {
    let Some(host) = host() else { return };
    for (wish, code, said) in
        [("q", 0, ""), ("f", 3, "failure 42"), ("p", 0, ""), ("F", 3, "a system failure")]
    {
        let mut session = start("reboot", host.irqchips[0], &[]);
        session.expect("reboot: what next?\n");
        session.send(wish);
        assert_eq!(session.exit_code(), code);
        assert!(session.all_errors().contains(said), "{}", session.errors());
        no_failure(&session);
    }
}

#[test]
fn timers_wake_every_hart_and_a_sleeping_machine_can_be_stopped() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        for (cpus, signal) in [("1", Signal::TERM), ("4", Signal::TERM), ("4", Signal::INT)] {
            let mut session = start("wfi", irqchip, &["--cpus", cpus]);
            session.expect("PASS wfi\n");
            session.expect(&format!("wfi: {cpus} harts asleep\n"));
            session.signal(signal);
            assert_eq!(session.exit_code_within(STOP_LIMIT), 0);
            no_failure(&session);
        }
    }
}

#[test]
fn no_access_harms_the_machine() {
    let Some(host) = host() else { return };
    for cpus in ["1", "4"] {
        passes_everywhere(host, "hostile", &["--cpus", cpus]);
    }
}

#[test]
fn a_trap_without_a_vector_is_a_documented_stop() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let mut session = start("hostile", irqchip, &["--cmdline", "end=vector"]);
        session.expect("hostile: a trap whose vector is nowhere\n");
        if host.linux >= (6, 14) {
            // KVM itself raises the fault repeatedly: the hart spins, and can be stopped.
            session.signal(Signal::TERM);
            assert_eq!(session.exit_code_within(STOP_LIMIT), 0);
            continue;
        }
        assert_eq!(session.exit_code(), 3);
        let errors = session.all_errors();
        assert!(errors.contains("Hart 0 stopped: its trap vector 0x60000000"), "{errors}");
        assert!(errors.contains("sepc "), "no register dump: {errors}");
    }
}

#[test]
fn a_hart_that_spins_in_traps_can_be_stopped() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let mut session = start("hostile", irqchip, &["--cmdline", "end=spin"]);
        session.expect("hostile: page faults for ever\n");
        session.signal(Signal::TERM);
        assert_eq!(session.exit_code_within(STOP_LIMIT), 0);
    }
}
