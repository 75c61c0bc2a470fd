//! Traces of scripted harts.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::Value;
use tempfile::TempDir;

use super::{DeviceMap, Trace, TracePlan};
use crate::config::{TraceConfig, TraceFormat, Unassigned};
use crate::error::{EXIT_USAGE, Error};
use crate::host::on_a_small_file_system;
use crate::riscv::sbi::eid;
use crate::vcpu::exit::SystemEvent;
use crate::vcpu::hart::Reg;
use crate::vcpu::record::Ticks;
use crate::vcpu::testing::{NOWHERE, ScriptHart, Step, UART, context};
use crate::vcpu::{Control, spawn_hart};

/// A counter of 10 MHz that advances by one tick at each read.
fn ticks() -> Ticks {
    static COUNT: AtomicU64 = AtomicU64::new(1000);
    Ticks { now: || COUNT.fetch_add(1, Relaxed), hz: 10_000_000 }
}

/// Runs `script` with a trace, and returns the file.
fn traced(config: &TraceConfig, script: &[Step]) -> String {
    let (text, ended) = run_script(config, script);
    ended.unwrap();
    text
}

/// Runs `script` with a trace, and returns the file and the result of the trace.
fn run_script(config: &TraceConfig, script: &[Step]) -> (String, Result<(), Error>) {
    let (context, _uart) = context(Unassigned::Zero);
    let places = DeviceMap::of(&context.bus);
    let plan = TracePlan { name: "web".into(), harts: 2, ticks: ticks(), places };
    let trace = Trace::start(config, plan).unwrap();
    let control = Arc::new(Control::new());
    control.start();
    let hart = Box::new(ScriptHart::new(1, script.to_vec()).with([(Reg::Pc, 0x8000_1234)]));
    let recorder = trace.recorder(1).unwrap();
    let thread = spawn_hart(hart, Arc::new(context), Arc::clone(&control), None, recorder).unwrap();
    let _ = control.wait();
    thread.join().unwrap();
    let ended = trace.finish();
    (fs::read_to_string(&config.file).unwrap(), ended)
}

fn config(folder: &TempDir, name: &str) -> TraceConfig {
    TraceConfig { file: folder.path().join(name).into(), ..TraceConfig::default() }
}

fn script() -> Vec<Step> {
    vec![
        Step::Load { addr: UART + 5, len: 1 },
        Step::Store { addr: NOWHERE, bytes: vec![0x34, 0x12] },
        Step::Sbi { extension: 0x0900_0000, function: 1, args: [7; 6] },
        Step::Sbi { extension: eid::DBCN, function: 9, args: [0; 6] },
        Step::Csr { csr: 0x151 },
        Step::Debug,
        Step::System(SystemEvent::Shutdown(0)),
    ]
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_exit_is_a_line_with_its_times_its_cause_and_its_answer() {
    let folder = tempfile::tempdir().unwrap();
    let all = lines(&traced(&config(&folder, "a.jsonl"), &script()));
    assert_eq!((&all[0]["rvmm_trace"], &all[0]["harts"]), (&1.into(), &2.into()));
    assert_eq!(all[0]["machine"], "web");
    let exits = &all[1..all.len() - 1];
    let what: Vec<_> = exits.iter().map(|exit| exit["what"].as_str().unwrap()).collect();
    let expected = [
        "fake-uart +0x5",
        "no device",
        "vendor 0x9000000 0x1",
        "DBCN 0x9",
        "sireg",
        "ebreak",
        "shutdown",
    ];
    assert_eq!(what, expected);
    assert_eq!((&exits[0]["value"], &exits[0]["width"]), (&"0x0".into(), &1.into()));
    assert_eq!((&exits[1]["value"], &exits[1]["addr"]), (&"0x1234".into(), &"0x20000000".into()));
    assert_eq!((&exits[2]["error"], &exits[2]["a0"]), (&(-2).into(), &"0x7".into()));
    // The pc is recorded where it costs nothing: where registers are read anyway, and at the end.
    let pcs: Vec<_> = exits.iter().map(|exit| exit.get("pc").is_some()).collect();
    assert_eq!(pcs, [false, false, false, false, false, true, true]);
    assert_eq!(exits[5]["pc"], "0x80001234");
    let mut last = all[0]["start_ns"].as_u64().unwrap();
    for exit in exits {
        let (left, entered) =
            (exit["exit_ns"].as_u64().unwrap(), exit["entry_ns"].as_u64().unwrap());
        assert!(left >= last && entered > left && exit["hart"] == 1, "{exit}");
        last = entered;
    }
    assert_eq!((&all[8]["recorded"], &all[8]["all_lost"]), (&7.into(), &0.into()));
}

#[test]
fn with_pc_every_exit_says_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let config = TraceConfig { pc: true, ..config(&folder, "a.jsonl") };
    let all = lines(&traced(&config, &script()));
    assert!(all[1..7].iter().all(|exit| exit["pc"] == "0x80001234"), "{all:?}");
    // The last exit was in the trap vector.
    assert_eq!(all[7]["pc"], "0x0");
}

#[test]
fn a_chrome_trace_is_an_array_of_events_with_the_same_fields() {
    let folder = tempfile::tempdir().unwrap();
    let config = TraceConfig { format: Some(TraceFormat::Chrome), ..config(&folder, "a") };
    let all: Vec<Value> = serde_json::from_str(&traced(&config, &script())).unwrap();
    let exits: Vec<_> = all.iter().filter(|event| event["ph"] == "X").collect();
    assert_eq!(exits.len(), 7);
    for exit in exits {
        let (left, entered) = (&exit["args"]["exit_ns"], &exit["args"]["entry_ns"]);
        let cost = entered.as_u64().unwrap() - left.as_u64().unwrap();
        let ns = |micros: &Value| (micros.as_f64().unwrap() * 1000.0).round();
        assert_eq!((ns(&exit["dur"]), exit["tid"].as_u64()), (cost as f64, Some(1)));
        assert_eq!(exit["cat"], exit["args"]["kind"]);
    }
    let names: Vec<_> = all.iter().filter(|event| event["name"] == "thread_name").collect();
    assert_eq!((names.len(), &names[1]["args"]["name"]), (2, &"hart 1".into()));
}

#[test]
fn exits_that_do_not_fit_into_the_ring_are_counted_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let config = TraceConfig { ring: Some(64), ..config(&folder, "a.jsonl") };
    let load = Step::Load { addr: UART + 5, len: 1 };
    let mut script = vec![load; 50_000];
    script.push(Step::System(SystemEvent::Shutdown(0)));
    let all = lines(&traced(&config, &script));
    let exits = all.iter().filter(|line| line.get("kind").is_some()).count() as u64;
    let lost: u64 = all.iter().filter_map(|line| line["lost"].as_u64()).sum();
    let end = all.last().unwrap();
    assert_eq!((end["recorded"].as_u64(), end["all_lost"].as_u64()), (Some(exits), Some(lost)));
    assert_eq!(exits + lost, 50_001);
}

#[test]
fn a_trace_that_finds_no_room_ends_with_a_whole_event_and_says_what_is_missing() {
    on_a_small_file_system(|folder| {
        let mut script = vec![Step::Load { addr: UART + 5, len: 1 }; 2000];
        script.push(Step::System(SystemEvent::Shutdown(0)));
        for (name, format) in [("a.jsonl", TraceFormat::Lines), ("a.json", TraceFormat::Chrome)] {
            let file = folder.join(name);
            let config = TraceConfig {
                file: file.as_path().into(),
                format: Some(format),
                ring: Some(4096),
                ..TraceConfig::default()
            };
            let (text, ended) = run_script(&config, &script);
            let error = ended.unwrap_err();
            assert_eq!(error.exit_code(), EXIT_USAGE);
            let what = error.to_string();
            assert!(what.starts_with("Cannot write all of the trace") && what.contains("No space"));
            // The header may fit, depending on when the writer was woken; the rest never does.
            if !text.is_empty() {
                let events = match format {
                    TraceFormat::Lines => lines(&text),
                    TraceFormat::Chrome => serde_json::from_str(&text).unwrap(),
                };
                let end = events.last().unwrap();
                let end = end.get("args").unwrap_or(end);
                let exits =
                    events.iter().filter(|event| event.to_string().contains("exit_ns")).count();
                assert_eq!(end["recorded"].as_u64(), Some(exits as u64));
                assert_eq!(end["all_lost"].as_u64(), Some(2001 - exits as u64));
            }
            fs::remove_file(&file).unwrap();
        }
    });
}

#[test]
fn a_file_that_cannot_be_a_trace_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for file in [folder.path().into(), folder.path().join("no/where"), pipe, "/dev/null".into()] {
        let config = TraceConfig { file: file.into(), ..TraceConfig::default() };
        let plan =
            TracePlan { name: "a".into(), harts: 1, ticks: ticks(), places: DeviceMap::default() };
        let error = Trace::start(&config, plan).unwrap_err().to_string();
        assert!(error.starts_with("Cannot write "), "{error}");
    }
}
