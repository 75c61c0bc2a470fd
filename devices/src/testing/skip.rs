//! What a test says that has nothing to run on. `scripts/test` counts these lines: the test runner takes such a test for one that passed.

use std::cell::Cell;
use std::io::Write;

thread_local! {
    /// Each test has a thread of its own.
    static IS_SKIPPED: Cell<bool> = const { Cell::new(false) };
}

/// Says once, whatever the test runner does with output, that the test on this thread is skipped: `skipped: NAME: WHY`.
pub fn skip(why: &str) {
    if !IS_SKIPPED.replace(true) {
        say("skipped", why);
    }
}

/// Says that the test on this thread runs without a part of it: `left out: NAME: WHY`. It counts as what it comes to.
pub fn leave_out(why: &str) {
    say("left out", why);
}

/// One line in one piece, past the capture of the test runner, which hides what a passing test prints.
fn say(what: &str, why: &str) {
    let thread = std::thread::current();
    let line = format!("{what}: {}: {why}\n", thread.name().unwrap_or("?"));
    let _ = std::io::stderr().write_all(line.as_bytes());
}
