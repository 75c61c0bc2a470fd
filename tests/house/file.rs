//! The files of the repository, and the code of Rust files without comments and literals.

use std::fs;
use std::path::Path;

/// A text file.
pub(crate) struct File {
    /// Path from the root, with `/`.
    pub(crate) path: String,
    /// The complete text.
    pub(crate) text: String,
    /// The text with comments and the contents of string literals replaced by spaces, with the same lines.
    pub(crate) code: String,
}

impl File {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        let code = if path.ends_with(".rs") { code_of(text) } else { String::new() };
        Self { path: path.to_owned(), text: text.to_owned(), code }
    }

    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// True for a file that only holds tests: in a folder `tests` or `testing`, or called `tests.rs` or `testing.rs`.
    pub(crate) fn is_test(&self) -> bool {
        self.path
            .split('/')
            .any(|part| matches!(part, "tests" | "testing" | "tests.rs" | "testing.rs"))
    }

    /// A complaint about line `index` (from 0).
    pub(crate) fn complain(&self, index: usize, what: &str) -> String {
        format!("{}:{}: {what}", self.path, index + 1)
    }
}

/// Every text file below `root`, except for built files, downloads and those of version control.
pub(crate) fn all_files(root: &Path) -> Vec<File> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("an entry of a folder").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            let is_folder = path.symlink_metadata().is_ok_and(|data| data.is_dir());
            if is_folder && !matches!(name.as_str(), "target" | ".git" | "corpus" | "artifacts") {
                folders.push(path);
            } else if !is_folder && name != ".git" && name != "Cargo.lock" {
                let relative = path.strip_prefix(root).expect("below the root").to_string_lossy();
                if let Ok(text) = fs::read_to_string(&path) {
                    files.push(File::new(&relative, &text));
                }
            }
        }
    }
    files
}

/// Rust source with comments and the contents of literals replaced by spaces; line ends stay.
fn code_of(text: &str) -> String {
    let source: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < source.len() {
        let end = match source[at..] {
            ['/', '/', ..] => at + source[at..].iter().take_while(|c| **c != '\n').count(),
            ['/', '*', ..] => end_of_block(&source, at),
            ['"', ..] => end_of_string(&source, at),
            ['r', '"' | '#', ..] if !is_name(&source, at) => end_of_raw(&source, at),
            ['\'', '\\', ..] => end_of_char(&source, at),
            ['\'', _, '\'', ..] => at + 3,
            _ => {
                code.push(source[at]);
                at += 1;
                continue;
            }
        };
        let end = end.min(source.len());
        code.extend(source[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
        at = end;
    }
    code
}

/// True if the character before `at` is part of a name, so that no literal begins at `at`.
fn is_name(source: &[char], at: usize) -> bool {
    at > 0 && (source[at - 1].is_alphanumeric() || source[at - 1] == '_')
}

fn end_of_block(source: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut at = start;
    while at < source.len() {
        match source[at..] {
            ['/', '*', ..] => depth += 1,
            ['*', '/', ..] => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            break;
        }
    }
    at
}

fn end_of_string(source: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < source.len() && source[at] != '"' {
        at += if source[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn end_of_char(source: &[char], start: usize) -> usize {
    let mut at = start + 3;
    while at < source.len() && source[at] != '\'' {
        at += 1;
    }
    at + 1
}

/// `r"..."`, `r#"..."#`; a raw name (`r#type`) ends at once.
fn end_of_raw(source: &[char], start: usize) -> usize {
    let hashes = source[start + 1..].iter().take_while(|c| **c == '#').count();
    let open = start + 1 + hashes;
    if source.get(open) != Some(&'"') {
        return start + 1;
    }
    let mut at = open + 1;
    while at < source.len() {
        let closes = source[at] == '"'
            && source[at + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
        if closes {
            return at + 1 + hashes;
        }
        at += 1;
    }
    at
}
