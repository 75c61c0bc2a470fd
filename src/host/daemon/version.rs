//! Options that a program supports, according to its `--help`, which is run only after the program has failed.

use std::ffi::OsString;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::is_readable;

/// Time-out for the output of `--help`, and the limit of its bytes.
const TIMEOUT: Duration = Duration::from_secs(10);
const LONGEST: usize = 64 << 10;

/// Advice for a program that is too old.
const NEEDED: [(&str, &str); 2] = [
    (
        "virtiofsd",
        "virtiofsd 1.10 or newer is needed, 1.13 for read-only folders; Debian 13 has it",
    ),
    ("passt", "passt 2024_11_27 or newer is needed; Debian 13 has it"),
];

/// The options among `arguments`.
pub(super) fn options(arguments: &[OsString]) -> Vec<String> {
    let texts = arguments.iter().filter_map(|argument| argument.to_str());
    texts.filter(|text| text.starts_with("--")).map(Into::into).collect()
}

/// A message about those of `options` that a program does not support; none if it supports them all, or its `--help` is of no use.
pub(super) fn complaint(name: &str, program: &Path, options: &[String]) -> Option<String> {
    let help = ask(program, "--help").ok()?;
    let missing: Vec<&str> =
        options.iter().map(String::as_str).filter(|option| !lists(&help, option)).collect();
    // A text without any of them is no list of options.
    if missing.is_empty() || missing.len() == options.len() {
        return None;
    }
    let version = ask(program, "--version").unwrap_or_default();
    let version = version.lines().next().unwrap_or_default().trim().chars();
    let version: String = version.filter(|c| !c.is_control()).take(80).collect();
    let needed = NEEDED.iter().find(|(known, _)| *known == name).map_or("", |(_, needed)| needed);
    let missing = missing.join(", ");
    Some(format!("{} does not support {missing} (it is {version}; {needed})", program.display()))
}

/// True if an option is in a text as a word of its own.
fn lists(help: &str, option: &str) -> bool {
    help.match_indices(option).any(|(at, _)| {
        let behind = help.get(at + option.len()..).and_then(|rest| rest.chars().next());
        behind.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '-')
    })
}

/// Output and error output of a program that is run with one option.
fn ask(program: &Path, option: &str) -> io::Result<String> {
    let (mut reader, writer) = io::pipe()?;
    let mut child = Command::new(program)
        .arg(option)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()?;
    let now = Instant::now();
    let deadline = now.checked_add(TIMEOUT).unwrap_or(now);
    let mut text = Vec::new();
    while text.len() < LONGEST
        && is_readable(&reader, deadline.saturating_duration_since(Instant::now()))
    {
        let mut page = [0; 4096];
        match reader.read(&mut page)? {
            0 => break,
            count => text.extend(page.get(..count).unwrap_or_default()),
        }
    }
    // It may still be running.
    let _ = child.kill();
    child.wait()?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
