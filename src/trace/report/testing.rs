//! The fuzz target for traces: arbitrary files, which result in a page or an error message, and files of rvmm's own writer, of which
//! the reader must find all events.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    unreachable_pub,
    reason = "a test fails by panicking, and fuzz/ reaches what is public"
)]

use super::page;
use super::read::events;
use super::tally::Tally;
use crate::config::{MAX_CPUS, TraceFormat, Unassigned};
use crate::trace::format::{Format, Timescale, TraceHeader};
use crate::trace::names::DeviceMap;
use crate::trace::record::{ExitKind, Record};
use crate::vcpu::record::Ticks;
use crate::vcpu::testing::context;

const HEAD: &str = r#"{"rvmm_trace":1,"machine":"web","harts":2,"start_ns":1000}"#;

/// The texts for bytes from 0x80 on.
const WORDS: [&str; 44] = [
    "{",
    "}",
    "},\n",
    "\n",
    "[",
    "]",
    ",",
    "\"",
    HEAD,
    r#"{"name":"x","ph":"X","ts":1.5,"args":"#,
    r#"{"args":"#,
    r#""hart":"#,
    r#"{"hart":0,"exit_ns":2000,"entry_ns":2400,"kind":"mmio-read","what":"serial LSR"}"#,
    r#"{"hart":1,"exit_ns":5000,"entry_ns":9000,"#,
    r#""exit_ns":"#,
    r#""entry_ns":"#,
    r#""kind":"mmio-write""#,
    r#""kind":"sbi""#,
    r#""kind":"csr""#,
    r#""kind":"system""#,
    r#""kind":"debug""#,
    r#""kind":"interrupted""#,
    r#""kind":"fault""#,
    r#""kind":"unknown""#,
    r#""kind":""#,
    r#""what":""#,
    r#""value":""#,
    r#""pc":""#,
    r#""lost":"#,
    r#""rvmm_end":1"#,
    r#""rvmm_trace":1"#,
    r#""machine":""#,
    r#""harts":"#,
    r#""start_ns":"#,
    "18446744073709551615",
    "9223372036854775808",
    "511",
    "-1",
    "1e999",
    "null",
    "\\u001b",
    "\\ud800",
    "<script>",
    "\u{202e}",
];

/// Tests a report of these bytes as a trace. The first selects arbitrary text, with or without a header, or exits that rvmm writes.
///
/// # Panics
/// The reader or the page is wrong.
pub fn report_from_bytes(bytes: &[u8]) {
    let Some((how, rest)) = bytes.split_first() else { return check(&[]) };
    match how % 4 {
        0 => check(&expand(rest)),
        1 => check(&[HEAD.as_bytes(), b"\n", &expand(rest)].concat()),
        2 => check_written(TraceFormat::Chrome, rest),
        _ => check_written(TraceFormat::Lines, rest),
    }
}

fn expand(bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    for byte in bytes {
        match byte {
            0..0x80 => text.push(*byte),
            // Invalid UTF-8.
            0xff => text.push(0xff),
            _ => text.extend(WORDS[usize::from(byte - 0x80) % WORDS.len()].as_bytes()),
        }
    }
    text
}

/// Checks for a page or an error message, without anything that a terminal or a browser interprets as more than text.
fn check(file: &[u8]) {
    let mut tally = Tally::new();
    match events(file, |event| tally.take(event)) {
        Ok(()) => {
            let page = page::page(&tally);
            assert!(page.ends_with("</html>\n") && page.len() < 8 << 20);
            let is_odd = |c: char| c.is_control() && c != '\n' || c == '\u{202e}';
            assert!(!page.contains(is_odd) && !page.contains("<script"));
        }
        Err(what) => {
            assert!(what.starts_with("line ") && what.chars().count() < 300, "{what}");
            assert!(!what.contains(|c: char| c.is_control() || c == '\u{202e}'), "{what:?}");
        }
    }
}

/// Checks that the reader finds all exits as rvmm writes them.
fn check_written(format: TraceFormat, bytes: &[u8]) {
    let (context, _uart) = context(Unassigned::Zero);
    let hz = u64::from(bytes.first().copied().unwrap_or(1)) * 1_000_000;
    let scale = Timescale::new(Ticks { now: || 7, hz }, 1000);
    let format = Format::new(format, scale, DeviceMap::of(&context.bus));
    let header = TraceHeader { name: "web-1_a".into(), harts: 4, start_ns: 1000, hz };
    let (mut text, mut kinds, mut lost) = (String::new(), Vec::new(), 0_u64);
    format.header(&mut text, &header);
    for chunk in bytes.chunks(12) {
        let mut part = [0; 12];
        part[..chunk.len()].copy_from_slice(chunk);
        let hart = u32::from(u16::from_le_bytes([part[0], part[1]])) % MAX_CPUS;
        if part[2] & 0xf0 == 0xf0 {
            format.lost(&mut text, hart, u64::from(part[3]), u64::from(part[4]));
            lost += u64::from(part[3]);
            continue;
        }
        let record = Record::read(&words(part)).unwrap();
        kinds.push(record.kind);
        format.exit(&mut text, hart, &record);
    }
    format.end(&mut text, kinds.len() as u64, lost);
    let mut tally = Tally::new();
    events(text.as_bytes(), |event| tally.take(event))
        .unwrap_or_else(|what| panic!("{what}\n{text}"));
    assert!(tally.is_complete && tally.lost == lost && tally.all.count == kinds.len() as u64);
    for kind in ExitKind::ALL {
        let count = kinds.iter().filter(|known| **known == kind).count() as u64;
        assert_eq!(tally.kinds.get(&kind).map_or(0, |stat| stat.count), count, "{kind:?}");
    }
    check(text.as_bytes());
}

/// The words of a record: numbers of all sizes, from few bytes.
fn words(part: [u8; 12]) -> [u64; 8] {
    let [_, _, kind, shape, left, cost, a, a_size, b, b_size, c, d] = part;
    let kind = u64::from(kind) % ExitKind::ALL.len() as u64;
    let (width, outcome) = (u64::from(shape & 7), u64::from(shape >> 3) % 6);
    let meta = kind | width << 8 | outcome << 16 | u64::from(d & 1) << 24;
    let sized = |value: u8, size: u8| u64::from(value) << (size % 64);
    let left = sized(left, a_size);
    let entered = left.saturating_add(sized(cost, b_size));
    [left, entered, meta, sized(a, a_size), sized(b, b_size), c.into(), sized(d, c), u64::MAX]
}
