//! Rings 2 and 3: traces of a tiny guest and of Debian's kernel, and inspection of a running kernel.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::fs;
use std::path::Path;

use harness::{Launch, Session, guest, host, kernel, one_host, rvmm};
use serde_json::Value;

/// The output of a command that succeeds.
fn printed(launch: Launch) -> String {
    let mut session = launch.no_input().start();
    let code = session.exit_code();
    let text = String::from_utf8_lossy(&session.output()).into_owned();
    assert_eq!(code, 0, "{text}{}", session.all_errors());
    text
}

/// The exits of a trace, with the fields of both formats, and the summary at its end.
fn exits(file: &Path) -> (Vec<Value>, Value) {
    let text = fs::read_to_string(file).expect("the trace");
    let all: Vec<Value> = match serde_json::from_str::<Vec<Value>>(&text) {
        Ok(events) => events.into_iter().map(|mut event| event["args"].take()).collect(),
        Err(_) => text.lines().map(|line| serde_json::from_str(line).expect("a line")).collect(),
    };
    let end = all.last().expect("an end").clone();
    assert_eq!((&all[0]["rvmm_trace"], &end["rvmm_end"]), (&1.into(), &1.into()));
    let exits: Vec<Value> = all.into_iter().filter(|event| event.get("kind").is_some()).collect();
    assert_eq!(end["recorded"].as_u64(), Some(exits.len() as u64));
    (exits, end)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// Checks the order of times: each entry of a hart into the guest is after its exit, and each exit after its entry.
fn in_order(exits: &[Value], hart: u64) {
    let mut last = 0;
    for exit in exits.iter().filter(|exit| exit["hart"] == hart) {
        let (left, entered) = (number(&exit["exit_ns"]), number(&exit["entry_ns"]));
        assert!(left >= last && entered >= left, "{exit} after {last}");
        last = entered;
    }
}

#[test]
fn a_tiny_guest_is_traced_from_its_first_exit_to_its_last() {
    let Some(host) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for (irqchip, name) in host.irqchips.iter().zip(["a.jsonl", "b.json"]) {
        let file = folder.path().join(name);
        let usual = rvmm(&["--no-initrd", "--mem", "64M", "--irqchip", irqchip, "--cmdline", "x"]);
        let traced = usual.path("--trace=", &file, ",pc=on").kernel(&guest("hello"));
        let text = printed(traced);
        assert!(text.contains("PASS hello"), "{text}");
        let (exits, end) = exits(&file);
        in_order(&exits, 0);
        assert_eq!(end["all_lost"], 0);
        let sent = exits.iter().filter(|exit| exit["what"] == "serial THR");
        let sent: Vec<u8> =
            sent.map(|exit| hex(&exit["value"]).try_into().expect("a byte")).collect();
        assert_eq!(String::from_utf8_lossy(&sent), text, "every byte of output is a record");
        assert!(exits.iter().all(|exit| hex(&exit["pc"]) >= 0x8000_0000), "{irqchip}");
        let last = exits.last().expect("an exit");
        assert_eq!((&last["kind"], &last["flow"]), (&"system".into(), &"stop".into()));
        assert!(exits.iter().any(|exit| number(&exit["entry_ns"]) > number(&exit["exit_ns"])));
    }
}

fn hex(value: &Value) -> u64 {
    let text = value.as_str().unwrap_or_default().trim_start_matches("0x");
    u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("not a number: {value}"))
}

/// Debian's kernel at the built-in prompt.
fn linux(arguments: &[&str], add: impl FnOnce(Launch) -> Launch) -> Session {
    let usual = rvmm(&["--mem", "512M", "--cpus", "2"]).args(arguments).kernel(&kernel());
    let session = add(usual).start();
    session.expect("rvmm# ");
    session
}

#[test]
fn a_boot_of_linux_is_traced_over_a_reboot_and_becomes_a_report() {
    let Some(_) = one_host("aia") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let (file, page) = (folder.path().join("boot.json"), folder.path().join("boot.html"));
    let mut session =
        linux(&["--name", "traced"], |rvmm| rvmm.path("--trace=", &file, ",ring=262144"));
    session.send("reboot\n");
    // The shell may print another prompt before it ends.
    session.expect("rvmm: Linux ");
    session.expect("rvmm# ");
    session.send("poweroff\n");
    assert_eq!(session.exit_code(), 0);
    let (exits, end) = exits(&file);
    (0..2).for_each(|hart| in_order(&exits, hart));
    assert!(exits.len() > 1000, "{} exits", exits.len());
    assert_eq!(end["all_lost"], 0, "{end}");
    let reset = exits.iter().position(|exit| exit["what"] == "reset").expect("a reset");
    assert!(reset > 500 && reset < exits.len() - 500, "both lives are there: {reset}");
    printed(rvmm(&["trace", "report"]).path("", &file, "").path("--output=", &page, ""));
    let page = fs::read_to_string(&page).expect("a page");
    for part in ["Exits of <em>traced</em>", "hart 1", "serial LSR", "Power off or reset"] {
        assert!(page.contains(part), "no {part}");
    }
}

/// With `console=ttyS0` alone a boot makes more than two exits for each character: a read of LSR, and a write of THR.
#[test]
fn a_boot_makes_at_most_one_exit_for_each_character_and_loses_none() {
    let Some(host) = host() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("boot.jsonl");
    let usual = rvmm(&["--mem", "512M", "--irqchip", host.irqchips[0]]).kernel(&kernel());
    let mut session = usual.path("--trace=", &file, ",ring=262144").start();
    session.expect("rvmm# ");
    session.send("poweroff\n");
    assert_eq!(session.exit_code(), 0);
    let output = String::from_utf8_lossy(&session.output()).into_owned();
    let (exits, end) = exits(&file);
    assert_eq!(end["all_lost"], 0, "{end}");
    let (exits, bytes) = (exits.len(), output.len());
    assert!(bytes > 8000 && exits <= bytes, "{exits} exits for {bytes} bytes: {output}");
    // Before and after the change from one console to the other, which Linux reports on both.
    for once in
        ["Linux version", "Kernel command line: ", " is a 16550A", "Run /init as init process"]
    {
        assert_eq!(output.matches(once).count(), 1, "{once}: {output}");
    }
}

#[test]
fn a_running_kernel_is_inspected_and_continues() {
    let Some(_) = one_host("aia") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let ask = |arguments: &[&str]| printed(rvmm(arguments).env("XDG_RUNTIME_DIR", folder.path()));
    let json =
        |arguments: &[&str]| -> Value { serde_json::from_str(&ask(arguments)).expect("JSON") };
    let mut session = linux(&["--name", "web"], |rvmm| rvmm.env("XDG_RUNTIME_DIR", folder.path()));

    let stat = json(&["stat", "--json"]);
    assert_eq!(
        (stat["name"].as_str(), stat["harts"].as_array().map(Vec::len)),
        (Some("web"), Some(2))
    );
    let counters = &stat["harts"][0]["counters"];
    let exits = number(&counters["exits"]);
    assert!(
        exits >= number(&counters["mmio_exit_user"]) && number(&counters["mmio_exit_user"]) > 100,
        "{stat}"
    );
    let devices = stat["devices"].as_array().expect("devices");
    let serial = devices.iter().find(|device| device["name"] == "serial").expect("a UART");
    assert!(number(&serial["writes"]) > 100 && number(&serial["reads"]) > 100, "{stat}");
    let table = ask(&["stat", "web"]);
    assert!(
        table.contains("MMIO rvmm") && table.contains("serial") && table.lines().count() > 6,
        "{table}"
    );

    let pid = session.pid().as_raw_nonzero().to_string();
    let harts = json(&["regs", &pid, "--json"]);
    let register = |hart: usize, name: &str| {
        let all = harts[hart]["registers"].as_array().expect("registers");
        number(&all.iter().find(|pair| pair[0] == name).expect(name)[1])
    };
    let text = ask(&["regs"]);
    assert!(
        text.contains("hart 1") && text.contains("stvec") && text.contains("mode 000000000000000"),
        "{text}"
    );

    // The kernel's trap vector is always mapped.
    let vector = register(0, "stvec") & !3;
    let address = format!("{vector:#x}");
    let walk = json(&["walk", &address, "--json"]);
    let physical = number(&walk["physical"]);
    let memory = &walk["landing"]["memory"];
    assert_eq!(number(&memory["base"]) + number(&memory["offset"]), physical, "{walk}");
    assert!(
        walk["steps"].as_array().expect("steps").last().expect("a leaf")["is_leaf"] == true,
        "{walk}"
    );
    let (levels, steps) =
        (number(&walk["second_levels"]), walk["steps"].as_array().expect("steps").len() as u64);
    assert_eq!(number(&walk["accesses"]), (steps + 1) * (levels + 1) - 1, "{walk}");
    let text = ask(&["walk", &address, "web", "--hart", "1"]);
    assert!(text.contains("guest-physical address") && text.contains("slot 0"), "{text}");
    assert!(ask(&["walk", "0"]).contains("page fault"));

    // It has been paused seven times, and continues.
    assert_eq!(session.ask("echo $((6*7))"), "42\n");
    assert!(number(&json(&["stat", "--json"])["harts"][0]["counters"]["exits"]) > exits);
    session.send("poweroff\n");
    assert_eq!(session.exit_code(), 0);
    assert_eq!(fs::read_dir(folder.path().join("rvmm")).expect("a folder").count(), 0);
    let mut none = rvmm(&["stat"]).env("XDG_RUNTIME_DIR", folder.path()).no_input().start();
    assert_eq!(none.exit_code(), 1);
    assert!(
        none.all_errors().contains("No machine of this user is running"),
        "{}",
        none.all_errors()
    );
}
