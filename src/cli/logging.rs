//! The log: one line per record on standard error, with the seconds since the start. It never blocks.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::output::{line_end, push_escaped};

/// Maximum length of a line in bytes. Not more than `PIPE_BUF` (pipe(7)): a pipe that polls as writable takes it without blocking.
const MOST: usize = 4096;

/// The logger. The harts' threads log, too, and must not wait for a reader: a line for which standard error has no room is
/// dropped, and the next one that fits reports the number of dropped lines.
#[derive(Debug)]
struct Lines {
    start: Instant,
    dropped: AtomicU32,
}

/// Logs records of `level` and more severe ones to standard error from now on. Only the first call in a process counts.
pub(super) fn start(level: LevelFilter) {
    log::set_max_level(level);
    if level != LevelFilter::Off {
        let lines = Lines { start: Instant::now(), dropped: AtomicU32::new(0) };
        // A second logger is refused, and the first one stays.
        let _ = log::set_boxed_logger(Box::new(lines));
    }
}

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // That crate logs every packet of a debugger.
        let is_asked_for =
            metadata.level() == Level::Trace || !metadata.target().starts_with("gdbstub");
        is_asked_for && metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        if !has_room() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let line = line(self.start.elapsed(), record, dropped, line_end());
        // A failure to write the log cannot be reported anywhere.
        let _ = io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// True if standard error has room for a line now.
fn has_room() -> bool {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds.iter().all(|fd| fd.revents().contains(PollFlags::OUT))
}

/// `rvmm 0.123 warn: message`; at the levels for developers, with the module that logs.
fn line(elapsed: Duration, record: &Record<'_>, dropped: u32, end: &str) -> String {
    let mut line = format!("rvmm {:.3} {}", elapsed.as_secs_f64(), name(record.level()));
    // Writing into a String cannot fail.
    if record.level() >= Level::Debug {
        let _ = write!(line, " {}", record.target().trim_start_matches("rvmm::"));
    }
    if dropped > 0 {
        let _ = write!(
            line,
            " ({dropped} lines before this one were dropped: standard error was full)"
        );
    }
    line.push_str(": ");
    push_escaped(&mut line, &record.args().to_string());
    if line.len() + end.len() > MOST {
        let fits = (0..=MOST - 3 - end.len()).rev().find(|at| line.is_char_boundary(*at));
        line.truncate(fits.unwrap_or(0));
        line.push_str("...");
    }
    line.push_str(end);
    line
}

fn name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(level: Level, message: &str, dropped: u32) -> String {
        let args = format_args!("{message}");
        let record = Record::builder().level(level).target("rvmm::vcpu::run").args(args).build();
        line(Duration::from_millis(1234), &record, dropped, "\r\n")
    }

    #[test]
    fn a_line_has_the_time_the_level_and_the_message() {
        assert_eq!(logged(Level::Warn, "It is late", 0), "rvmm 1.234 warn: It is late\r\n");
    }

    #[test]
    fn a_debug_line_names_the_module_that_logs() {
        assert_eq!(logged(Level::Debug, "x", 0), "rvmm 1.234 debug vcpu::run: x\r\n");
    }

    #[test]
    fn control_characters_of_a_guest_are_escaped() {
        assert_eq!(logged(Level::Info, "a\n\u{1b}[2Jb", 0), "rvmm 1.234 info: a\\n\\u{1b}[2Jb\r\n");
    }

    #[test]
    fn a_line_is_never_longer_than_a_pipe_takes_at_once() {
        let text = logged(Level::Error, &"ä".repeat(100_000), 0);
        assert!(text.len() <= MOST && text.ends_with("...\r\n"), "{} bytes", text.len());
    }

    #[test]
    fn dropped_lines_are_counted_in_the_next() {
        assert!(logged(Level::Warn, "x", 3).contains("(3 lines before"));
    }
}
