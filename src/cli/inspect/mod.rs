//! The verbs `stat`, `regs` and `walk`: a running machine is asked, and the answer becomes text.

use std::io;

use super::output;
use crate::error::{EXIT_HOST, EXIT_OK};
use crate::inspect::{Connection, HartRegisters, Query, Reply};

mod stat;
mod walk;

pub(super) use stat::watch;

/// What is asked, and of which machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) query: Query,
    /// A name or a process; the only machine where nothing is said.
    pub(super) target: Option<String>,
    /// The answer as it came.
    pub(super) json: bool,
}

/// Asks once, prints the answer, and gives the exit code.
pub(super) fn ask(request: &Request) -> u8 {
    let answer = connect(request.target.as_deref())
        .and_then(|mut connection| query(&mut connection, request.query));
    let text = answer.and_then(|answer| match answer {
        Reply::Error(what) => Err(what),
        answer if request.json => json(&answer),
        Reply::Registers(harts) => Ok(harts.iter().map(registers).collect()),
        Reply::Walk(walk) => Ok(walk::text(&walk)),
        Reply::Stat(stat) => Ok(stat::table(&stat, None)),
    });
    match text {
        Ok(text) => output::show(&harmless(&text)),
        Err(what) => refuse(&what),
    }
}

fn connect(target: Option<&str>) -> Result<Connection, String> {
    Connection::open(target)
}

fn query(connection: &mut Connection, query: Query) -> Result<Reply, String> {
    connection.ask(query).map_err(|error| gone(&error))
}

fn gone(error: &io::Error) -> String {
    format!("The machine does not answer: {error} (has it ended?)")
}

fn refuse(what: &str) -> u8 {
    output::complain(what);
    EXIT_HOST
}

fn json(answer: &Reply) -> Result<String, String> {
    let text = match answer {
        Reply::Stat(stat) => serde_json::to_string_pretty(stat),
        Reply::Registers(harts) => serde_json::to_string_pretty(harts),
        Reply::Walk(walk) => serde_json::to_string_pretty(walk),
        Reply::Error(what) => serde_json::to_string_pretty(what),
    };
    text.map(|text| text + "\n").map_err(|error| format!("Cannot print the answer: {error}"))
}

/// What came over the socket, without anything that could reach into the terminal.
fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        output::push_escaped(&mut out, line.trim_end_matches('\n'));
        out.push_str(if line.ends_with('\n') { "\n" } else { "" });
    }
    out
}

/// Registers, four in a line.
fn registers(hart: &HartRegisters) -> String {
    let mut text = format!("hart {}\n", hart.hart);
    for line in hart.registers.chunks(4) {
        for (name, value) in line {
            let value = value.map_or_else(|| "-".into(), |value| format!("{value:016x}"));
            text.push_str(&format!("{name:>11} {value:16}"));
        }
        text.push('\n');
    }
    text
}

/// Ends well where the machine has ended while it was looked at.
fn ended(name: &str) -> u8 {
    output::complain(&format!("The machine {name} has ended"));
    EXIT_OK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_stand_four_in_a_line_and_those_that_are_not_there_are_a_dash() {
        let pairs = [
            ("pc", Some(0x8000_0000)),
            ("mode", Some(1)),
            ("ra", Some(2)),
            ("sp", None),
            ("gp", Some(0)),
        ];
        let registers = pairs.map(|(name, value)| (name.to_owned(), value)).to_vec();
        let text = super::registers(&HartRegisters { hart: 1, registers });
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(
            lines[1].contains("pc 0000000080000000") && lines[1].trim_end().ends_with("sp -"),
            "{text}"
        );
    }

    #[test]
    fn nothing_that_comes_over_the_socket_reaches_into_the_terminal() {
        assert_eq!(harmless("a\u{1b}[2J\nb\r\n"), "a\\u{1b}[2J\nb\\r\n");
    }
}
