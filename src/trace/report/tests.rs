//! Reports of valid traces and of invalid files.

use std::fmt::Write as _;
use std::fs;

use proptest::prelude::*;

use super::read::events;
use super::tally::{Tally, step_start};
use super::{page, report};
use crate::error::EXIT_USAGE;
use crate::trace::record::ExitKind;

const HEAD: &str = r#"{"rvmm_trace":1,"machine":"web","harts":2,"start_ns":1000}"#;

fn tally(text: &str) -> Result<Tally, String> {
    let mut tally = Tally::new();
    events(text.as_bytes(), |event| tally.take(event))?;
    Ok(tally)
}

fn exit(hart: u32, at: u64, cost: u64, kind: &str, what: &str) -> String {
    let after = at + cost;
    format!(
        r#"{{"hart":{hart},"exit_ns":{at},"entry_ns":{after},"kind":"{kind}","what":"{what}","value":"0x60","pc":"0x80000000"}}"#
    )
}

#[test]
fn exits_are_counted_by_hart_by_kind_and_by_cause() {
    let mut text = format!("{HEAD}\n");
    for index in 0..1000 {
        let _ = writeln!(text, "{}", exit(1, 2000 + index * 5000, 400, "mmio-read", "serial LSR"));
    }
    let _ = writeln!(text, "{}", exit(0, 5_002_000, 90_000, "sbi", "DBCN console_write"));
    let _ = writeln!(text, r#"{{"hart":1,"exit_ns":7,"lost":5}}"#);
    let tally = tally(&text).unwrap();
    assert_eq!((tally.all.count, tally.lost, tally.is_complete), (1001, 5, false));
    assert_eq!(tally.kinds[&ExitKind::MmioRead].count, 1000);
    assert_eq!(tally.causes[&(ExitKind::Sbi, "DBCN console_write".into())].max_ns, 90_000);
    assert_eq!((tally.harts[&1].stat.count, tally.harts[&1].lost), (1000, 5));
    assert_eq!((tally.slowest[0].cost_ns, tally.slowest.len()), (90_000, 10));
    // 240 columns of 16 times 1,024 ns are not enough for 5 ms, 32 times are.
    assert_eq!(tally.width_ns, 32 * 1024);
    let exits: u32 = tally.harts[&1].columns.iter().flatten().sum();
    assert_eq!(exits, 1000);
    let half = tally.all.percentile_ns(50);
    assert!((400..=480).contains(&half), "{half}");
}

#[test]
fn a_page_is_complete_and_has_no_external_resources() {
    let text = [
        HEAD.to_owned(),
        exit(0, 2000, 400, "mmio-read", "serial LSR"),
        exit(1, 9000, 4000, "fault", "unemulated access"),
        r#"{"rvmm_end":1,"recorded":2,"all_lost":0}"#.into(),
    ];
    let page = page::page(&tally(&text.join("\n")).unwrap());
    for part in
        ["Exits of <em>web</em>", "hart 0", "hart 1", "serial LSR", "guest-page fault", "4.00 µs"]
    {
        assert!(page.contains(part), "no {part} in {page}");
    }
    for part in ["http://", "https://", "<script", "url(", "@import", "src="] {
        assert!(!page.contains(part), "{part}");
    }
}

#[test]
fn an_array_of_chrome_events_is_read_as_lines_are() {
    let chrome = format!(
        "[{{\"name\":\"rvmm_trace\",\"ph\":\"M\",\"args\":{HEAD}}},\n{{\"name\":\"process_name\",\"args\":{{\"name\":\"x\"}}}},\n{{\"ph\":\"X\",\"ts\":1.5,\"args\":{}}},\n{{\"args\":{{\"rvmm_end\":1}}}}]\n",
        exit(0, 2000, 400, "debug", "ebreak")
    );
    let tally = tally(&chrome).unwrap();
    assert_eq!((tally.all.count, tally.is_complete, tally.machine.as_str()), (1, true, "web"));
}

#[test]
fn an_error_has_the_number_of_its_line() {
    let good = exit(0, 2000, 400, "debug", "ebreak");
    for (lines, line, part) in [
        (vec![""], 1, "no header of a trace"),
        (vec![good.as_str()], 1, "no header of a trace"),
        (vec![HEAD, good.as_str(), "nonsense"], 3, "not an event"),
        (vec![HEAD, HEAD], 2, "second header"),
        (vec![HEAD, r#"{"hart":0,"kind":"sbi"}"#], 2, "one of its times"),
        (vec![HEAD, "", r#"{"hart":512,"lost":1}"#], 3, "at most 512"),
        (vec![r#"{"rvmm_trace":2}"#], 1, "version 2"),
        (vec![HEAD, r#"{"hart":-1}"#], 2, "not an event"),
        (vec![HEAD, &good.replace("debug", "a\\u001b<b>")], 2, "'a\\u{1b}<b>' is unknown"),
        (vec![HEAD, &"x".repeat(5000)], 2, "longer than 4096 bytes"),
        (vec![HEAD, &format!(r#"{{"hart":"{}"}}"#, "x".repeat(4000))], 2, "invalid type: string"),
    ] {
        let what = tally(&lines.join("\n")).unwrap_err();
        assert!(what.starts_with(&format!("line {line}")) && what.contains(part), "{what}");
        assert!(what.len() < 200 && !what.contains('\n'), "{what}");
    }
    let deep = format!("{HEAD}\n{}1{}", "{\"args\":".repeat(400), "}".repeat(400));
    assert!(tally(&deep).unwrap_err().starts_with("line 2"));
    assert!(tally("\u{feff}{}").is_err());
}

#[test]
fn hostile_words_stay_words_and_hostile_numbers_stay_bounded() {
    let mut text = HEAD.replace("web", "<script>alert(1)</script>");
    for index in 0..2000 {
        let what = format!("<img src=x{index}>\\u202e");
        let _ =
            write!(text, "\n{}", exit(index % 512, u64::from(index) << 40, 1, "mmio-write", &what));
    }
    let last = r#"{"hart":0,"exit_ns":18446744073709551615,"entry_ns":0,"kind":"csr","what":"x"}"#;
    let _ = write!(text, "\n{last}");
    let longest =
        r#"{"hart":0,"exit_ns":0,"entry_ns":18446744073709551615,"kind":"csr","what":"x"}"#;
    let _ = write!(text, "\n{longest}\n{longest}");
    let tally = tally(&text).unwrap();
    assert!(tally.causes.len() <= 512 + ExitKind::ALL.len() && tally.harts.len() == 512);
    let page = page::page(&tally);
    assert!(!page.contains("<script") && !page.contains("<img") && !page.contains('\u{202e}'));
    assert!(page.len() < 4 << 20, "{} bytes", page.len());
}

#[test]
fn a_file_that_is_no_trace_is_a_usage_error_and_leaves_no_report() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("a.json"), folder.path().join("a.html"));
    fs::write(&input, "{}\n").unwrap();
    let error = report(&input, &output).unwrap_err();
    assert_eq!(error.exit_code(), EXIT_USAGE);
    assert!(error.to_string().contains("line 1"), "{error}");
    assert!(!output.exists());
    assert!(report(folder.path(), &output).is_err());
    let itself = report(&input, &input).unwrap_err().to_string();
    assert!(itself.contains("the trace itself"), "{itself}");
    fs::write(&input, HEAD).unwrap();
    report(&input, &output).unwrap();
    assert!(fs::read_to_string(&output).unwrap().contains("No exits"));
}

#[test]
fn steps_of_a_histogram_follow_each_other() {
    let all: Vec<u64> = (0..256).map(step_start).collect();
    assert!(all.windows(2).all(|pair| pair[0] <= pair[1]));
    assert_eq!((step_start(40), step_start(41)), (1024, 1280));
}

proptest! {
    #[test]
    fn every_file_results_in_a_page_or_an_error_message(
        lines in prop::collection::vec("(\\{\"(hart|lost|exit_ns|entry_ns|kind|what|args|harts)\":[0-9\"a-z{}\\[\\]]{0,12}(,\"(hart|kind|exit_ns)\":[0-9\"a-z]{0,20})*\\})|.{0,40}", 0..20)
    ) {
        let text = format!("{HEAD}\n{}", lines.join("\n"));
        match tally(&text) {
            Ok(tally) => prop_assert!(page::page(&tally).ends_with("</html>\n")),
            Err(what) => prop_assert!(what.starts_with("line ")),
        }
    }
}
