//! Output for users: requested texts on standard output, messages on standard error.

use std::error::Error;
use std::io::{self, ErrorKind};

use rustix::termios::{OutputModes, tcgetattr};

use crate::error::{EXIT_HOST, EXIT_OK};
use crate::host::deliver;

/// Prints a requested text, and returns the exit code. A reader that closes the pipe early (`| head`) is no error.
pub(super) fn show(text: &str) -> u8 {
    report_result(deliver(io::stdout(), text.as_bytes()))
}

/// Reports an error of standard output, and returns the exit code.
pub(super) fn report_result(written: io::Result<()>) -> u8 {
    match written {
        Ok(()) => EXIT_OK,
        Err(error) if error.kind() == ErrorKind::BrokenPipe => EXIT_OK,
        Err(error) => {
            print_message(&format!(
                "Cannot write to standard output: {}",
                crate::error::plain(&error.to_string())
            ));
            EXIT_HOST
        }
    }
}

/// Prints a message on standard error; its lines are prefixed, and control characters escaped.
pub(super) fn print_message(message: &str) {
    let mut text = String::new();
    for line in message.lines() {
        text.push_str("rvmm: ");
        push_escaped(&mut text, line);
        text.push_str(line_end());
    }
    // A failure to write the message cannot be reported anywhere.
    let _ = deliver(io::stderr(), text.as_bytes());
}

/// The end of a line on standard error: a terminal in raw mode (a guest's console) needs a carriage return, too.
pub(super) fn line_end() -> &'static str {
    let cooked =
        tcgetattr(io::stderr()).map(|modes| modes.output_modes.contains(OutputModes::OPOST));
    if cooked.unwrap_or(true) { "\n" } else { "\r\n" }
}

/// An error and its sources as one line: `A: B: C`, without repetitions.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut escaped = String::new();
    push_escaped(&mut escaped, &crate::error::chain(error));
    escaped
}

/// Appends `line` with its control characters escaped.
pub(super) fn push_escaped(out: &mut String, line: &str) {
    for c in line.chars() {
        if c.is_control() && c != '\t' { out.extend(c.escape_default()) } else { out.push(c) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error as RvmmError;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Layer(&'static str, #[source] Option<Box<Layer>>);

    #[test]
    fn an_error_and_its_sources_are_one_line() {
        let error =
            Layer("A", Some(Box::new(Layer("B\n\u{1b}[31m", Some(Box::new(Layer("C", None)))))));
        assert_eq!(chain(&error), "A: B\\n\\u{1b}[31m: C");
    }

    #[test]
    fn a_source_that_the_message_repeats_is_printed_once() {
        let source = io::Error::from_raw_os_error(2);
        let error = RvmmError::File { verb: "open", path: "/x".into(), source };
        assert_eq!(chain(&error), "Cannot open /x: No such file or directory");
    }
}
