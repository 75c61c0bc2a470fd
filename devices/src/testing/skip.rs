//! Reports of tests that cannot run on this host. `scripts/test` counts these lines, as the test runner counts such a test as passed.

use std::cell::Cell;
use std::io::Write;

thread_local! {
    /// Each test runs in its own thread.
    static IS_SKIPPED: Cell<bool> = const { Cell::new(false) };
}

/// Reports once, even if the test runner captures output, that this thread's test is skipped: `skipped: NAME: WHY`.
pub fn skip(why: &str) {
    if !IS_SKIPPED.replace(true) {
        print("skipped", why);
    }
}

/// Reports that this thread's test runs without a part of it: `left out: NAME: WHY`. The test's result counts as usual.
pub fn leave_out(why: &str) {
    print("left out", why);
}

/// Writes the line with one call, bypassing the test runner, which hides the output of passing tests.
fn print(what: &str, why: &str) {
    let thread = std::thread::current();
    let line = format!("{what}: {}: {why}\n", thread.name().unwrap_or("?"));
    let _ = std::io::stderr().write_all(line.as_bytes());
}
