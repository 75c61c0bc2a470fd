//! The rules, one function each.

use std::path::{Component, Path, PathBuf};

use super::file::File;

/// Returns the violations in a file.
pub(crate) type Rule = fn(&File) -> Vec<String>;

/// Maximum number of lines of production code in a file.
const MOST_LINES: usize = 400;

/// Words without a meaning in a name.
const EMPTY_WORDS: [&str; 10] = [
    "util", "utils", "common", "misc", "helper", "manager", "handler", "wrapper", "legacy", "info",
];

/// Method names of traits of other crates.
const THEIR_NAMES: [&str; 3] =
    ["get_storage_helper", "support_thread_extra_info", "thread_extra_info"];

/// External crates, and the folders (with `/`) or files that may use each of them.
const ALLOWED_PLACES: [(&str, &[&str]); 17] = [
    ("bytemuck", &["src/snapshot/"]),
    ("kvm_ioctls", &["src/kvm/"]),
    ("kvm_bindings", &["src/kvm/"]),
    ("clap", &["src/cli/"]),
    ("clap_complete", &["src/cli/"]),
    ("clap_mangen", &["src/cli/"]),
    ("event_manager", &["src/io_loop.rs", "src/io_loop/"]),
    ("vm_fdt", &["boot/"]),
    ("linux_loader", &["boot/"]),
    ("elf", &["boot/"]),
    ("vm_superio", &["devices/src/serial.rs", "devices/src/ns16550.rs", "devices/src/rtc.rs"]),
    ("virtio_queue", &["devices/src/virtio/queue.rs"]),
    ("io_uring", &["src/host/disk/uring.rs"]),
    ("imago", &["src/host/disk/qcow2/"]),
    ("gdbstub", &["src/gdb/"]),
    ("fnv", &["devices/src/virtio/"]),
    ("strsim", &["src/kvm/"]),
];

/// Places where `unsafe` is allowed.
const UNSAFE_PLACES: [&str; 10] = [
    "src/kvm/",
    "src/memory.rs",
    "src/memory/",
    "src/host/daemon.rs",
    "src/host/disk/",
    "src/host/inherited.rs",
    "src/host/tap",
    "src/host/vhost/",
    "src/sockets/peer.rs",
    "guests/",
];

pub(crate) fn size(file: &File) -> Vec<String> {
    let lines: Vec<&str> = file.text.lines().collect();
    let tests =
        lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1] == "mod tests {");
    let count = tests.unwrap_or(lines.len());
    let long = file.is_rust() && !file.is_test() && count > MOST_LINES;
    let what = format!("{count} lines of production code, more than {MOST_LINES}");
    long.then(|| file.complain(count - 1, &what)).into_iter().collect()
}

pub(crate) fn first_line(file: &File) -> Vec<String> {
    let bad = file.is_rust() && !file.text.starts_with("//! ");
    bad.then(|| file.complain(0, "does not begin with `//! ` and a description"))
        .into_iter()
        .collect()
}

pub(crate) fn crates(file: &File) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, places) in ALLOWED_PLACES {
        if !places.iter().any(|place| file.path.starts_with(place)) {
            complaints.extend(uses(file, name));
        }
    }
    complaints
}

/// Complaints about each line that names `path` (`elf`) as the beginning of a longer path.
fn uses(file: &File, path: &str) -> Vec<String> {
    let lines = file.code.lines().enumerate();
    let named = lines.filter(|(_, line)| names_path(line, path) || ends_in(line, path));
    named.map(|(index, _)| file.complain(index, &format!("names {path}"))).collect()
}

/// True if the line contains `path::`, not as the end of a longer name.
pub(crate) fn names_path(line: &str, path: &str) -> bool {
    let longer = format!("{path}::");
    line.match_indices(&longer).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':')
    })
}

/// True if the line is `use path;`.
pub(crate) fn ends_in(line: &str, path: &str) -> bool {
    line.trim_start().starts_with("use ")
        && line.trim().trim_start_matches("use ").trim_end_matches(';') == path
}

pub(crate) fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

pub(crate) fn names(file: &File) -> Vec<String> {
    if !file.is_rust() {
        return Vec::new();
    }
    let path = file.path.trim_end_matches(".rs");
    let empty =
        |name: &str| parts_of(name).into_iter().find(|part| EMPTY_WORDS.contains(&part.as_str()));
    let mut complaints: Vec<String> = path
        .split('/')
        .filter_map(empty)
        .map(|word| file.complain(0, &format!("has \"{word}\" in its name")))
        .collect();
    let mut names_test = false;
    for (index, line) in file.code.lines().enumerate() {
        names_test |= line.trim() == "#[test]";
        let all: Vec<&str> = words(line).collect();
        for pair in all.windows(2) {
            // A test's name is a sentence, and sentences have words of all kinds.
            if pair[0] == "fn" && std::mem::take(&mut names_test) {
                continue;
            }
            let defines =
                matches!(pair[0], "fn" | "struct" | "enum" | "trait" | "mod" | "type" | "union");
            if THEIR_NAMES.contains(&pair[1]) {
                continue;
            }
            if let (true, Some(word)) = (defines, empty(pair[1])) {
                complaints
                    .push(file.complain(index, &format!("{} has \"{word}\" in its name", pair[1])));
            }
        }
    }
    complaints
}

/// The words of a name: `ExitHandler`, `exit_handler` and `exit-handler` are `exit` and `handler`.
fn parts_of(name: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    for c in name.chars() {
        if c.is_uppercase() || !c.is_alphanumeric() {
            parts.push(String::new());
        }
        if c.is_alphanumeric() {
            parts.last_mut().expect("never empty").extend(c.to_lowercase());
        }
    }
    parts
}

pub(crate) fn unsafe_code(file: &File) -> Vec<String> {
    let allowed = UNSAFE_PLACES.iter().any(|place| file.path.starts_with(place));
    let text: Vec<&str> = file.text.lines().collect();
    let mut complaints = Vec::new();
    for (index, line) in file.code.lines().enumerate() {
        let block = line.contains("unsafe {") || line.contains("unsafe impl");
        if !words(line).any(|word| word == "unsafe") {
            continue;
        }
        if !allowed {
            complaints.push(file.complain(index, "unsafe outside of the allowed places"));
        }
        let above = &text[index.saturating_sub(6)..=index];
        if block && !above.iter().any(|line| line.contains("SAFETY:")) {
            complaints.push(file.complain(index, "unsafe without a SAFETY comment above it"));
        }
    }
    complaints
}

pub(crate) fn architecture(file: &File) -> Vec<String> {
    let lines: Vec<&str> = file.code.lines().collect();
    let asks = |index: &usize| words(lines[*index]).any(|word| word == "target_arch");
    let right = |index: &usize| {
        let next = lines[index + 1..].iter().find(|line| !line.trim().is_empty());
        file.path == "src/lib.rs"
            && next.is_some_and(|line| line.trim() == "pub mod kvm;" || line.trim() == "mod kvm;")
    };
    let wrong = (0..lines.len()).filter(|index| asks(index) && !right(index));
    wrong
        .map(|index| file.complain(index, "target_arch belongs on `mod kvm` in src/lib.rs"))
        .collect()
}

pub(crate) fn unfinished(file: &File) -> Vec<String> {
    // Split, so that this file itself does not contain them.
    let marks =
        [("TO", "DO"), ("FIX", "ME"), ("unimple", "mented!"), ("to", "do!"), ("#[ig", "nore]")];
    let mut complaints = Vec::new();
    for (start, end) in marks {
        let mark = format!("{start}{end}");
        let lines = file.text.lines().enumerate().filter(|(_, line)| line.contains(&mark));
        complaints.extend(lines.map(|(index, _)| file.complain(index, &format!("says {mark}"))));
    }
    complaints
}

pub(crate) fn scripts(file: &File) -> Vec<String> {
    let place = file.path.rsplit_once('/').map(|(folder, _)| folder);
    let is_script = matches!(place, Some("scripts" | ".ci")) && file.text.starts_with("#!");
    let mut complaints = Vec::new();
    if is_script && !file.text.lines().nth(1).is_some_and(|line| line.starts_with("# ")) {
        complaints.push(file.complain(1, "has no description of the script"));
    }
    if is_script && !file.text.lines().any(|line| line == "set -euo pipefail") {
        complaints.push(file.complain(1, "has no `set -euo pipefail`"));
    }
    complaints
}

pub(crate) fn paths(file: &File) -> Vec<String> {
    let mut complaints = Vec::new();
    for folder in ["home", "Users", "work"] {
        let path = format!("/{folder}/");
        for (index, line) in file.text.lines().enumerate() {
            let absolute = line.match_indices(&path).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                before.is_none_or(|c| {
                    !c.is_alphanumeric() && !matches!(c, '_' | '-' | '.' | '~' | '}' | '/' | '*')
                })
            });
            if absolute {
                complaints.push(file.complain(index, &format!("names a path below {path}")));
            }
        }
    }
    complaints
}

pub(crate) fn links(file: &File) -> Vec<String> {
    if !file.path.ends_with(".md") {
        return Vec::new();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Path::new(&file.path).parent().unwrap_or(Path::new(""));
    let mut complaints = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        let links = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let links = links.map(|link| link.split('#').next().unwrap_or(""));
        let links = links.filter(|link| !link.is_empty() && !link.contains("://"));
        let scripts = line.split('`').skip(1).step_by(2).filter_map(|code| {
            let word = code.split_whitespace().next()?.trim_start_matches("./");
            (word.starts_with("scripts/") && !word.contains(['*', '<'])).then_some(word)
        });
        let targets = links.map(|link| folder.join(link)).chain(scripts.map(PathBuf::from));
        for target in targets.filter(|target| !root.join(normal(target)).exists()) {
            let what = format!("points at {}, which does not exist", target.display());
            complaints.push(file.complain(index, &what));
        }
    }
    complaints
}

/// The path without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => _ = normal.pop(),
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

pub(crate) fn sentences(file: &File) -> Vec<String> {
    let lines: Vec<&str> = file.code.lines().map(str::trim).collect();
    let mut complaints = Vec::new();
    for (index, _) in lines.iter().enumerate().filter(|(_, line)| **line == "#[test]") {
        let named =
            lines[index..].iter().find_map(|line| words(line).skip_while(|w| *w != "fn").nth(1));
        let name = named.unwrap_or("");
        if name.split('_').count() < 3 || name.starts_with("test_") {
            complaints.push(file.complain(index, &format!("test {name:?} is not a sentence")));
        }
    }
    complaints
}

/// Functions of other files that print `skipped:` and the reason if a test cannot run; and the one that returns true in the
/// guest's part of a test.
const SKIPPING: [&str; 5] = ["skip", "host", "one_host", "foreign", "is_inside"];

/// [`SKIPPING`], and the functions of a file that call one of them.
fn skipping<'a>(lines: &[&'a str]) -> Vec<&'a str> {
    let mut names = SKIPPING.to_vec();
    let functions: Vec<(&str, &[&str])> = (0..lines.len())
        .filter_map(|start| {
            let name = words(lines[start]).skip_while(|word| *word != "fn").nth(1)?;
            Some((name, block(&lines[start..])))
        })
        .collect();
    loop {
        let calls = |body: &[&str]| {
            body[1..].iter().any(|line| names.iter().any(|name| is_called(line, name)))
        };
        let more: Vec<&str> = functions
            .iter()
            .filter(|(name, body)| !names.contains(name) && calls(body))
            .map(|(name, _)| *name)
            .collect();
        if more.is_empty() {
            return names;
        }
        names.extend(more);
    }
}

/// True if the line calls a function of exactly this name.
fn is_called(line: &str, name: &str) -> bool {
    line.match_indices(&format!("{name}(")).any(|(at, _)| {
        !line[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '.'))
    })
}

/// The lines of the block that begins in the first line.
fn block<'a, 'b>(lines: &'b [&'a str]) -> &'b [&'a str] {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let ends = |line: &&str| line.trim() == "}" && indent(line) == indent(lines[0]);
    let end = lines[1..].iter().position(ends);
    &lines[..end.map_or(1, |end| end + 2)]
}

/// Finds tests that return early without a message, which would count as passed.
pub(crate) fn skipped(file: &File) -> Vec<String> {
    let lines: Vec<&str> = file.code.lines().collect();
    let mut complaints = Vec::new();
    let skipping = skipping(&lines);
    for (start, _) in lines.iter().enumerate().filter(|(_, line)| line.trim() == "#[test]") {
        let test = block(&lines[start..]);
        for (index, line) in test.iter().enumerate() {
            let is_bare = line.contains("return;") || line.contains("return }");
            // The condition is on this line or the one above.
            let mut condition = test[index.saturating_sub(1)..=index].iter();
            let is_said = |line: &&str| skipping.iter().any(|name| is_called(line, name));
            if is_bare && !condition.any(is_said) {
                complaints.push(file.complain(start + index, "a test ends early without `skip`"));
            }
        }
    }
    let shouts = format!("SKIP{}", "PED");
    for what in ["skipped: ", &shouts] {
        let prints = |line: &&str| line.contains("print") && line.contains(&format!("\"{what}"));
        let bad = file.text.lines().enumerate().filter(|(_, line)| prints(line));
        complaints
            .extend(bad.map(|(index, _)| file.complain(index, "prints the message of `skip`")));
    }
    complaints
}
