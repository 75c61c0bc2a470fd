//! What is written into the log, for a test that looks at it.

use std::cell::RefCell;

use log::{LevelFilter, Log, Metadata, Record};

thread_local! {
    static LINES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// The log of a process of tests: each thread's lines are its own.
struct Told;

impl Log for Told {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        LINES.with_borrow_mut(|lines| {
            lines.iter_mut().for_each(|lines| lines.push(record.args().to_string()));
        });
    }

    fn flush(&self) {}
}

/// What this thread logs at `warn` and above while `f` runs, a line each.
///
/// # Panics
/// The process has another logger.
#[expect(clippy::panic, reason = "a test without its log is no test")]
pub fn told(f: impl FnOnce()) -> Vec<String> {
    static LOG: Told = Told;
    static SET: std::sync::Once = std::sync::Once::new();
    SET.call_once(|| {
        if log::set_logger(&LOG).is_err() {
            panic!("The process has another logger");
        }
        log::set_max_level(LevelFilter::Warn);
    });
    LINES.set(Some(Vec::new()));
    f();
    LINES.take().unwrap_or_default()
}
