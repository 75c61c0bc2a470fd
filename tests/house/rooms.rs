//! The rooms, and the rule that each names only those above it in the list.

use super::file::File;
use super::rules::{ends_in, names_path, words};

/// The crates `boot`, `devices` and `init` and the rooms (top-level modules of `src`), from the bottom up, and the rooms that the production
/// code of each may name: only those above it in this list, so that there is no circle.
pub(crate) const ROOMS: [(&str, &[&str]); 28] = [
    ("boot", &[]),
    ("devices", &[]),
    ("init", &["boot"]),
    ("riscv", &[]),
    ("button", &[]),
    ("signals", &["init"]),
    ("error", &["boot"]),
    ("layout", &["error"]),
    ("memory", &["devices", "error", "layout"]),
    ("config", &["boot", "devices", "riscv", "error", "layout"]),
    ("sockets", &["devices", "error", "config"]),
    ("terminal", &["devices", "error", "config", "sockets"]),
    ("io_loop", &["devices", "button", "signals", "terminal"]),
    ("host", &["devices", "error", "memory", "config", "sockets", "terminal"]),
    ("vcpu", &["devices", "riscv", "error", "memory", "config"]),
    ("hypervisor", &["devices", "error", "layout", "config", "vcpu"]),
    ("snapshot", &["devices", "error", "memory", "config", "hypervisor"]),
    (
        "migration",
        &["devices", "error", "layout", "memory", "config", "sockets", "host", "vcpu", "snapshot"],
    ),
    ("pager", &["signals", "error", "layout", "memory", "config", "sockets", "vcpu", "snapshot"]),
    ("kvm", &["devices", "riscv", "error", "layout", "config", "host", "vcpu", "hypervisor"]),
    ("gdb", &["riscv", "error", "memory", "config", "sockets", "vcpu"]),
    ("trace", &["devices", "riscv", "error", "config", "host", "vcpu"]),
    (
        "inspect",
        &[
            "devices",
            "error",
            "layout",
            "memory",
            "config",
            "sockets",
            "io_loop",
            "vcpu",
            "snapshot",
            "migration",
            "trace",
        ],
    ),
    (
        "machine",
        &[
            "boot",
            "devices",
            "riscv",
            "button",
            "signals",
            "error",
            "layout",
            "memory",
            "config",
            "terminal",
            "io_loop",
            "host",
            "init",
            "vcpu",
            "hypervisor",
            "snapshot",
            "migration",
            "pager",
            "kvm",
            "gdb",
            "trace",
            "inspect",
        ],
    ),
    (
        "vmm",
        &[
            "devices",
            "error",
            "config",
            "host",
            "vcpu",
            "snapshot",
            "migration",
            "inspect",
            "machine",
        ],
    ),
    ("labs", &["devices", "riscv", "error", "memory", "config", "terminal", "host", "vcpu", "vmm"]),
    (
        "cli",
        &[
            "boot",
            "devices",
            "error",
            "config",
            "sockets",
            "host",
            "vcpu",
            "snapshot",
            "migration",
            "pager",
            "kvm",
            "trace",
            "inspect",
            "labs",
            "vmm",
        ],
    ),
    ("fuzzing", &["gdb", "trace"]),
];

/// The room of a file; `None` for files outside of rooms, such as `src/lib.rs`.
fn room(path: &str) -> Option<&str> {
    let (first, rest) = path.split_once('/')?;
    match first {
        "boot" | "devices" | "init" => rest.starts_with("src/").then_some(first),
        "src" => {
            let name = rest.split('/').next()?.trim_end_matches(".rs");
            (!matches!(name, "lib" | "main")).then_some(name)
        }
        _ => None,
    }
}

pub(crate) fn arrows(file: &File) -> Vec<String> {
    let Some(room) = room(&file.path).filter(|_| file.is_rust() && !file.is_test()) else {
        return Vec::new();
    };
    let Some((_, allowed)) = ROOMS.iter().find(|(name, _)| *name == room) else {
        return vec![file.complain(0, &format!("{room} is not among the rooms"))];
    };
    let named = rooms_named(file).into_iter();
    let wrong = named.filter(|(_, name)| name != room && !allowed.contains(&name.as_str()));
    wrong
        .map(|(index, name)| file.complain(index, &format!("{room} may not name {name}")))
        .collect()
}

/// The rooms that the production code of a file names, each with the line.
fn rooms_named(file: &File) -> Vec<(usize, String)> {
    let text: Vec<&str> = file.text.lines().collect();
    let tests =
        text.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1] == "mod tests {");
    let mut named = Vec::new();
    // Depth of braces within `use crate::{...}`; its names at depth 1 are rooms.
    let mut depth = 0_usize;
    for (index, line) in file.code.lines().enumerate().take(tests.unwrap_or(text.len())) {
        for (name, room) in [
            ("rvmm_boot", "boot"),
            ("rvmm_devices", "devices"),
            ("rvmm_init", "init"),
            ("rvmm", "rvmm"),
        ] {
            if names_path(line, name) || ends_in(line, name) {
                named.push((index, room.to_owned()));
            }
        }
        if !file.path.starts_with("src/") {
            continue;
        }
        for (at, _) in line.match_indices("crate::").filter(|(at, _)| !line[..*at].ends_with('$')) {
            named.extend(
                words(&line[at + 7..])
                    .next()
                    .filter(|_| !line[at + 7..].starts_with('{'))
                    .map(|word| (index, word.to_owned())),
            );
        }
        let begin = line.find("crate::{").map(|at| at + 7);
        let mut rest = if depth > 0 { line } else { begin.map_or("", |at| &line[at..]) };
        let mut expects_name = depth == 1;
        while let Some(c) = rest.chars().next() {
            match c {
                '{' => depth += 1,
                '}' if depth <= 1 => {
                    depth = 0;
                    break;
                }
                '}' => depth -= 1,
                ',' => {}
                c if expects_name && c.is_alphabetic() => {
                    named.extend(words(rest).next().map(|word| (index, word.to_owned())));
                    expects_name = false;
                }
                _ => {}
            }
            expects_name |= depth == 1 && matches!(c, '{' | ',');
            rest = &rest[c.len_utf8()..];
        }
    }
    named
}

/// Arrows of [`ROOMS`] that do not point upwards in the list: without any there is no circle.
pub(crate) fn circles() -> Vec<String> {
    let mut complaints = Vec::new();
    for (index, (room, allowed)) in ROOMS.iter().enumerate() {
        for name in *allowed {
            let is_above = ROOMS[..index].iter().any(|(above, _)| above == name);
            if !is_above {
                complaints.push(format!("{room} names {name}, which is not above it"));
            }
        }
    }
    complaints
}
