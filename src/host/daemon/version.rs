//! Which options a program knows: its own `--help` tells, and is asked only where the program has failed.

use std::ffi::OsString;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::is_readable;

/// How long a program may take to tell what it knows, and how much of it is read.
const PATIENCE: Duration = Duration::from_secs(10);
const LONGEST: usize = 64 << 10;

/// What has to be there, for those who have an older one.
const WANTED: [(&str, &str); 2] = [
    (
        "virtiofsd",
        "virtiofsd 1.10 or newer is needed, 1.13 for folders that nothing can be changed in; Debian 13 has it",
    ),
    ("passt", "passt 2024_11_27 or newer is needed; Debian 13 has it"),
];

/// The options among `arguments`.
pub(super) fn options(arguments: &[OsString]) -> Vec<String> {
    let texts = arguments.iter().filter_map(|argument| argument.to_str());
    texts.filter(|text| text.starts_with("--")).map(Into::into).collect()
}

/// Says which of `options` a program does not know; none where it knows them all, or does not tell.
pub(super) fn complaint(name: &str, program: &Path, options: &[String]) -> Option<String> {
    let help = ask(program, "--help").ok()?;
    let missing: Vec<&str> =
        options.iter().map(String::as_str).filter(|option| !knows(&help, option)).collect();
    // Without any of them it is no help.
    if missing.is_empty() || missing.len() == options.len() {
        return None;
    }
    let version = ask(program, "--version").unwrap_or_default();
    let version = version.lines().next().unwrap_or_default().trim().chars();
    let version: String = version.filter(|c| !c.is_control()).take(80).collect();
    let wanted = WANTED.iter().find(|(known, _)| *known == name).map_or("", |(_, wanted)| wanted);
    let missing = missing.join(", ");
    Some(format!("{} does not know {missing} (it is {version}; {wanted})", program.display()))
}

/// Whether an option stands in a text as a word of its own.
fn knows(help: &str, option: &str) -> bool {
    help.match_indices(option).any(|(at, _)| {
        let behind = help.get(at + option.len()..).and_then(|rest| rest.chars().next());
        behind.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '-')
    })
}

/// What a program says to one option, on both of its outputs.
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
    let deadline = now.checked_add(PATIENCE).unwrap_or(now);
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
    // One that goes on is not waited for.
    let _ = child.kill();
    child.wait()?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
