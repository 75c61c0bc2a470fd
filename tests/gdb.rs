//! Ring 3: Debian's gdb-multiarch on guests: a bare-metal one with symbols, and Debian's kernel from its first instruction to a
//! shell in user space.

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
#[path = "gdb/symbols.rs"]
mod symbols;

use std::path::{Path, PathBuf};

use harness::{Launch, STOP_LIMIT, Session, guest, kernel, one_host, rvmm};
use rustix::process::Signal;

/// Load address of a kernel: 2 MiB above the start of RAM.
const KERNEL: u64 = 0x8020_0000;

/// A connected GDB.
struct Gdb(Session);

impl Gdb {
    fn connect(file: &Path, socket: &Path) -> Self {
        let gdb = Launch::new("gdb-multiarch").args(&["-nx", "-q"]).path("", file, "").start();
        let mut gdb = Self(gdb);
        gdb.0.expect("(gdb) ");
        // With the default of 2 seconds, GDB takes a late reply for the reply to its next request.
        for setting in [
            "pagination off",
            "confirm off",
            "width 0",
            "breakpoint pending off",
            "remotetimeout 600",
        ] {
            gdb.say(&format!("set {setting}"));
        }
        let said = gdb.say(&format!("target remote {}", socket.display()));
        assert!(said.contains("Remote debugging using"), "{said}");
        gdb
    }

    /// Types a command and returns its output.
    fn say(&mut self, command: &str) -> String {
        self.0.send(&format!("{command}\n"));
        self.answer()
    }

    fn answer(&self) -> String {
        self.0.expect("(gdb) ")
    }

    /// Types a command and checks that its output contains this text.
    #[track_caller]
    fn check(&mut self, command: &str, part: &str) -> String {
        let said = self.say(command);
        assert!(said.contains(part), "{command}: {part:?} is not in\n{said}\n{}", self.0.errors());
        said
    }

    /// The value of an expression.
    fn value(&mut self, expression: &str) -> u64 {
        let said = self.say(&format!("output/x {expression}"));
        let digits =
            said.trim().strip_prefix("0x").unwrap_or_else(|| panic!("{expression}: {said}"));
        u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{expression}: {said}"))
    }
}

/// A socket in a separate folder.
fn socket() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("gdb");
    (folder, socket)
}

fn small(name: &str, socket: &Path) -> Session {
    let session = rvmm(&["--no-initrd", "--mem", "64M", "--cpus", "2"])
        .path("--gdb=unix:", socket, "")
        .kernel(&guest(name))
        .start();
    session.expect_error("rvmm: The guest waits for a debugger at unix:");
    session
}

#[test]
fn gdb_finds_functions_arguments_and_variables_and_changes_them() {
    let Some(host) = one_host("aia") else { return };
    let (_folder, socket) = socket();
    let mut session = small("debug", &socket);
    let mut gdb = Gdb::connect(&guest("debug.debug"), &socket);
    assert_eq!(gdb.value("$pc"), KERNEL, "before the first instruction");
    assert_eq!(gdb.value("$a0"), 0, "the hart's number");
    assert_eq!((gdb.value("$satp"), gdb.value("$priv")), (0, 1));
    if host.irqchips.contains(&"aia") {
        gdb.say("set var $siselect = 0x70");
        assert_eq!((gdb.value("$siselect"), gdb.value("$hviprio1")), (0x70, 0));
    }
    let threads = gdb.say("info threads");
    assert!(threads.contains("(hart 0)") && threads.contains("(hart 1)"), "{threads}");
    // One instruction after the other, each at a different address.
    let mut places = vec![KERNEL];
    for _ in 0..5 {
        gdb.say("stepi");
        places.push(gdb.value("$pc"));
    }
    places.dedup();
    assert_eq!(places.len(), 6, "{places:x?}");

    gdb.check("break debug::sum", "Breakpoint 1 at");
    gdb.check("continue", "Breakpoint 1, debug::sum");
    gdb.check("print debug::INPUT.v.value", "= 5");
    gdb.say("set var debug::INPUT.v.value = 6");
    gdb.check("break debug::sum_down", "Breakpoint 2 at");
    gdb.check("continue", "debug::sum_down (number=6, so_far=0)");
    gdb.check("continue", "debug::sum_down (number=5, so_far=6)");
    gdb.check("continue", "debug::sum_down (number=4, so_far=11)");
    gdb.check("print number * 10", "= 40");
    let trace = gdb.say("backtrace");
    for part in ["#0  debug::sum_down (number=4", "#1", "#2", "in debug::sum (", "runtime"] {
        assert!(trace.contains(part), "{part:?} is not in\n{trace}");
    }
    // A line at a time, which is many steps, and over calls.
    gdb.say("delete 2");
    gdb.say("next");
    gdb.check("finish", "Value returned");
    gdb.say("set language c");
    gdb.say("set var $ft0.double = 1.5");
    gdb.check("print $ft0.double", "= 1.5");
    gdb.say("delete");
    gdb.check("continue", "exited normally");
    session.expect("debug: the sum from 6 down is 21\n");
    session.expect("PASS debug\n");
    assert_eq!(session.exit_code(), 0);
    gdb.0.send("quit\n");
    assert_eq!(gdb.0.exit_code(), 0);
}

#[test]
fn breakpoints_of_the_guest_are_delivered_to_the_guest() {
    if one_host("plic").is_none() {
        return;
    }
    let (_folder, socket) = socket();
    let mut session = small("fault", &socket);
    let mut gdb = Gdb::connect(&guest("fault.debug"), &socket);
    gdb.check("break guest_main", "Breakpoint 1 at");
    gdb.check("continue", "Breakpoint 1, ");
    // It executes a hundred of them, and checks that they are in memory.
    gdb.check("continue", "exited normally");
    session.expect("PASS fault\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn a_killed_gdb_leaves_the_guest_intact_and_another_one_ends_it() {
    if one_host("aia").is_none() {
        return;
    }
    let (_folder, socket) = socket();
    let mut session = small("smp", &socket);
    let mut gdb = Gdb::connect(&guest("smp.debug"), &socket);
    gdb.check("break guest_main", "Breakpoint 1 at");
    gdb.check("break smp::ipi", "Breakpoint 2 at");
    gdb.check("continue", "Breakpoint 1, ");
    gdb.0.signal(Signal::KILL);
    drop(gdb);
    session.expect("PASS smp\n");
    assert_eq!(session.exit_code(), 0);

    let mut session = small("smp", &socket);
    let mut gdb = Gdb::connect(&guest("smp.debug"), &socket);
    gdb.check("kill", "killed");
    assert_eq!(session.exit_code_within(STOP_LIMIT), 0);
    assert!(!String::from_utf8_lossy(&session.output()).contains("smp"));
}

/// Kernel symbols by name, from the guest's /proc/kallsyms.
fn ask_symbols(session: &mut Session, names: &[&str]) -> Vec<(String, u64)> {
    let list = session.ask(&format!("grep -wE '({})$' /proc/kallsyms", names.join("|")));
    let symbols: Vec<(String, u64)> = list
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let addr = u64::from_str_radix(words.next()?, 16).ok()?;
            Some((words.nth(1)?.to_owned(), addr))
        })
        .collect();
    for name in names {
        assert!(symbols.iter().any(|(symbol, _)| symbol == name), "no {name} in\n{list}");
    }
    symbols
}

const SYMBOLS: [&str; 6] = [
    "_start",
    "start_kernel",
    "kernel_init",
    "__riscv_sys_newuname",
    "do_trap_ecall_u",
    "linux_banner",
];

fn linux(initrd: &Path, socket: &Path, wait: &str) -> Session {
    rvmm(&["--mem", "512M", "--cpus", "4", "--cmdline", "console=ttyS0 quiet nokaslr"])
        .path("--initrd=", initrd, "")
        .path("--gdb=unix:", socket, wait)
        .kernel(&kernel())
        .start()
}

#[test]
fn gdb_debugs_debians_kernel_to_its_user_space_and_from_its_first_instruction() {
    if one_host("plic").is_none() {
        return;
    }
    let (folder, socket) = socket();
    let initrd = initramfs::build(folder.path(), &[], &[]);
    let mut session = linux(&initrd, &socket, ",wait=off");
    session.expect("own initramfs is up\r\n");
    session.expect("# ");
    let symbols = ask_symbols(&mut session, &SYMBOLS);
    let of = |name: &str| symbols.iter().find(|(symbol, _)| symbol == name).expect("it is there").1;
    let elf = folder.path().join("kernel.elf");
    symbols::write(&elf, of("_start"), 64 << 20, &symbols);

    // A system call of the shell: the shell stops for the debugger, and gets its result afterwards.
    let mut gdb = Gdb::connect(&elf, &socket);
    gdb.check("x/s linux_banner", "Linux version");
    gdb.check("break *__riscv_sys_newuname", "Breakpoint 1 at");
    gdb.0.send("continue\n");
    session.send("uname -r; echo do''ne\n");
    let said = gdb.answer();
    assert!(said.contains("Breakpoint 1, 0x") && said.contains("__riscv_sys_newuname"), "{said}");
    assert_eq!(gdb.value("$pc"), of("__riscv_sys_newuname"));
    assert_eq!(gdb.value("$priv"), 1);
    gdb.check("backtrace 2", "#0");
    let threads = gdb.say("info threads");
    assert_eq!(threads.matches("(hart ").count(), 4, "{threads}");
    for _ in 0..10 {
        let before = gdb.value("$pc");
        gdb.say("stepi");
        assert_ne!(gdb.value("$pc"), before);
    }
    gdb.say("delete");
    gdb.0.send("continue\n");
    session.expect("done\r\n");
    gdb.0.signal(Signal::INT);
    let said = gdb.answer();
    assert!(said.contains("SIGINT"), "{said}");
    gdb.check("detach", "detached");
    assert_eq!(session.ask("echo $((6*7))"), "42\n");
    assert_eq!(session.ask("nproc"), "4\n");
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);

    // Again, from the start: with physical addresses until there are page tables.
    let mut session = linux(&initrd, &socket, "");
    session.expect_error("rvmm: The guest waits for a debugger at unix:");
    let mut gdb = Gdb::connect(&elf, &socket);
    assert_eq!((gdb.value("$pc"), gdb.value("$satp")), (KERNEL, 0));
    gdb.say("stepi");
    assert_ne!(gdb.value("$pc"), KERNEL);
    gdb.check(
        &format!("break *{:#x}", KERNEL + (of("start_kernel") - of("_start"))),
        "Breakpoint 1 at",
    );
    gdb.check("continue", "SIGTRAP");
    assert_eq!(gdb.value("$pc"), of("start_kernel"), "met by its virtual address");
    assert_ne!(gdb.value("$satp"), 0);
    gdb.say("delete");
    // After the two instructions at the start of every function that ftrace later overwrites, with any breakpoint there.
    let behind = of("kernel_init") + 8;
    gdb.check(&format!("break *{behind:#x}"), "Breakpoint 2 at");
    gdb.check("continue", "Breakpoint 2, 0x");
    assert_eq!(gdb.value("$pc"), behind);
    gdb.check("detach", "detached");
    session.expect("own initramfs is up\r\n");
    session.expect("# ");
    assert_eq!(session.ask("nproc"), "4\n");
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn a_restored_machine_is_debugged_and_traced_from_where_it_was_saved() {
    let Some(_host) = one_host("aia") else { return };
    let (folder, socket) = socket();
    let at = |name: &str| folder.path().join(name);
    let verb = |arguments: &[&str]| rvmm(arguments).env("XDG_RUNTIME_DIR", folder.path());
    let machine =
        ["--no-initrd", "--mem", "64M", "--cpus", "2", "--name", "chain", "--device", "rng"];
    let mut session =
        verb(&machine).args(&["--cmdline", "rounds=3000"]).kernel(&guest("chain")).start();
    session.expect("started");
    let mut save = verb(&["snapshot", "chain", "--stop"]).path("", &at("saved"), "").start();
    assert_eq!((save.exit_code(), session.exit_code()), (0, 0), "{}", save.all_errors());
    let text = std::fs::read(at("saved/state.json")).expect("a state");
    let state: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let hart = &state["machine"]["vm"]["harts"][0];
    // KVM's number of the program counter.
    let is_pc = |register: &&serde_json::Value| register["id"] == 0x8030_0000_0200_0000_u64;
    let registers = hart["registers"].as_array().expect("registers");
    let pc = registers.iter().find(is_pc).expect("it has one")["value"].as_u64();
    let mut session = verb(&["restore"])
        .path("", &at("saved"), "")
        .path("--gdb=unix:", &socket, "")
        .path("--trace=", &at("trace.jsonl"), "")
        .start();
    session.expect_error("rvmm: The guest waits for a debugger at unix:");
    let mut gdb = Gdb::connect(&guest("chain.debug"), &socket);
    assert_eq!(Some(gdb.value("$pc")), pc);
    let threads = gdb.say("info threads");
    assert!(threads.contains("(hart 0)") && threads.contains("(hart 1)"), "{threads}");
    gdb.say("stepi");
    assert_ne!(Some(gdb.value("$pc")), pc);
    gdb.check("continue", "exited normally");
    assert_eq!(session.exit_code(), 0);
    let printed = String::from_utf8(session.output()).expect("text");
    assert!(printed.contains("PASS"), "{printed}");
    let trace = std::fs::read_to_string(at("trace.jsonl")).expect("the trace");
    let end = trace.lines().last().expect("an end");
    let end: serde_json::Value = serde_json::from_str(end).expect("a line");
    assert!(end["rvmm_end"] == 1 && end["recorded"].as_u64() > Some(0), "{end}");
}
