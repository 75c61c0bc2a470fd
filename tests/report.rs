//! The report of a trace in a browser: its visible content, without console messages. The trace is one of Debian's kernel,
//! reduced by leaving out exits.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use std::fs;
use std::path::{Path, PathBuf};

use harness::{Launch, rvmm, skip};

/// Browsers that support the flags below.
const BROWSERS: [&str; 4] =
    ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"];

fn browser() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let all = BROWSERS.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    let found = all.into_iter().find(|file| file.is_file());
    if found.is_none() {
        skip("no Chromium in PATH (scripts/setup installs it)");
    }
    found
}

/// Shows `page` in the browser, and returns its standard output and error.
fn show(browser: &Path, page: &Path, flags: &[&str]) -> (String, String) {
    let profile = tempfile::tempdir().expect("a folder");
    let usual = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"];
    let size = "--window-size=1200,3600";
    let launch = Launch::new(browser).args(&usual).args(&[size, "--hide-scrollbars"]).args(flags);
    let launch = launch.path("--user-data-dir=", profile.path(), "");
    let mut session = launch.path("file://", page, "").no_input().start();
    assert_eq!(session.exit_code(), 0);
    (String::from_utf8_lossy(&session.output()).into_owned(), session.all_errors())
}

fn report(folder: &Path) -> PathBuf {
    let trace = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/trace/boot.jsonl");
    let page = folder.join("report.html");
    let launch = rvmm(&["trace", "report"]).path("", &trace, "").path("--output=", &page, "");
    assert_eq!(launch.start().exit_code(), 0);
    page
}

#[test]
fn a_recorded_boot_becomes_a_page_without_scripts() {
    let folder = tempfile::tempdir().expect("a folder");
    let page = fs::read_to_string(report(folder.path())).expect("the page");
    for part in
        ["serial LSR", "serial THR", "hart 0", "hart 1", "load guest-page fault", "power FINISHER"]
    {
        assert!(page.contains(part), "no {part}");
    }
    assert!(!page.contains("<script"));
}

#[test]
fn a_browser_shows_the_report_light_and_dark_and_has_nothing_to_complain_about() {
    let Some(browser) = browser() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let page = report(folder.path());
    let (dom, errors) = show(&browser, &page, &["--dump-dom"]);
    for part in ["Time line", "By kind", "The ten slowest", "Explanations", "serial LSR"] {
        assert!(dom.contains(part), "no {part}");
    }
    assert!(!errors.contains("CONSOLE"), "{errors}");
    let pictures = ["light", "dark"].map(|name| Path::new(env!("CARGO_TARGET_TMPDIR")).join(name));
    for (picture, scheme) in pictures.iter().zip(["1", "0"]) {
        let scheme = format!("--blink-settings=preferredColorScheme={scheme}");
        let picture = format!("--screenshot={}.png", picture.display());
        let (_, errors) = show(&browser, &page, &[&scheme, &picture]);
        assert!(!errors.contains("CONSOLE"), "{errors}");
    }
    let pictures = pictures.map(|picture| fs::read(picture.with_extension("png")).expect("a file"));
    for picture in &pictures {
        assert!(picture.starts_with(b"\x89PNG") && picture.len() > 50_000, "{}", picture.len());
    }
    assert_ne!(pictures[0], pictures[1]);
}

#[test]
fn errors_in_the_browser_would_be_found() {
    let Some(browser) = browser() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let page = folder.path().join("page.html");
    fs::write(&page, "<script>console.error('seen')</script>").expect("a file");
    let (_, errors) = show(&browser, &page, &["--dump-dom"]);
    assert!(errors.contains("CONSOLE") && errors.contains("seen"), "{errors}");
}
