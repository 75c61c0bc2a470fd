//! Captures log lines for tests.

use std::cell::RefCell;

use log::{LevelFilter, Log, Metadata, Record};

thread_local! {
    static LINES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// The logger of a test process: keeps the lines of each thread apart.
struct ThreadLog;

impl Log for ThreadLog {
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

/// Returns the lines that this thread logs at `warn` and above while `f` runs.
///
/// # Panics
/// The process has another logger.
#[expect(clippy::panic, reason = "the test depends on the log")]
pub fn captured_log(f: impl FnOnce()) -> Vec<String> {
    static LOG: ThreadLog = ThreadLog;
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
