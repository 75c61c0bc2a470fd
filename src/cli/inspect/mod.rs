//! The verbs `info`, `stat`, `regs` and `walk`: queries to a running machine, and its replies as text.

use std::io;
use std::os::fd::OwnedFd;

use super::machines::properties;
use super::output;
use crate::error::{EXIT_HOST, EXIT_OK};
use crate::inspect::{Connection, HartRegisters, Order, Query, Reply};

mod stat;
mod walk;

pub(super) use stat::watch;

/// A query, and the machine it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) query: Query,
    /// A name or a process ID; `None` for the only machine.
    pub(super) target: Option<String>,
    /// True to print the reply as JSON.
    pub(super) json: bool,
}

/// Sends one query, prints the reply, and returns the exit code.
pub(super) fn ask(request: &Request) -> u8 {
    let reply = connect(request.target.as_deref())
        .and_then(|mut connection| query(&mut connection, request.query));
    let text = reply.and_then(|reply| match reply {
        Reply::Error(what) => Err(what),
        Reply::Done { .. } | Reply::Snapshot(_) | Reply::Progress(_) | Reply::Migrated(_) => {
            Err("The machine gives another reply than asked for".into())
        }
        reply if request.json => json(&reply),
        Reply::Registers(harts) => Ok(harts.iter().map(registers).collect()),
        Reply::Walk(walk) => Ok(walk::text(&walk)),
        Reply::Stat(stat) => Ok(stat::table(&stat, None)),
        Reply::Info(info) => Ok(properties(&info)),
    });
    match text {
        Ok(text) => output::show(&escaped(&text)),
        Err(what) => refuse(&what),
    }
}

fn connect(target: Option<&str>) -> Result<Connection, String> {
    Connection::open(target)
}

/// Gives an order, and returns its reply; an error is its refusal.
pub(super) fn give(target: Option<&str>, order: &Order) -> Result<Reply, String> {
    match connect(target)?.give(order).map_err(|error| no_reply(&error))? {
        Reply::Error(what) => Err(what),
        reply => Ok(reply),
    }
}

/// Gives an order with a descriptor, and returns the last reply; the others go to `each`.
pub(super) fn give_with(
    target: Option<&str>,
    order: &Order,
    descriptor: OwnedFd,
    each: impl FnMut(&Reply),
) -> Result<Reply, String> {
    let reply = connect(target)?.give_with(order, descriptor, each);
    match reply.map_err(|error| no_reply(&error))? {
        Reply::Error(what) => Err(what),
        reply => Ok(reply),
    }
}

fn query(connection: &mut Connection, query: Query) -> Result<Reply, String> {
    connection.ask(query).map_err(|error| no_reply(&error))
}

fn no_reply(error: &io::Error) -> String {
    format!("The machine does not answer: {error} (has it ended?)")
}

pub(super) fn refuse(what: &str) -> u8 {
    output::print_message(&escaped(what));
    EXIT_HOST
}

fn json(reply: &Reply) -> Result<String, String> {
    let text = match reply {
        Reply::Info(info) => serde_json::to_string_pretty(info),
        Reply::Stat(stat) => serde_json::to_string_pretty(stat),
        Reply::Registers(harts) => serde_json::to_string_pretty(harts),
        Reply::Walk(walk) => serde_json::to_string_pretty(walk),
        Reply::Error(what) => serde_json::to_string_pretty(what),
        Reply::Done { .. } | Reply::Snapshot(_) | Reply::Progress(_) | Reply::Migrated(_) => {
            serde_json::to_string_pretty(reply)
        }
    };
    text.map(|text| text + "\n").map_err(|error| format!("Cannot print the reply: {error}"))
}

/// Text from the socket, with control characters escaped.
pub(super) fn escaped(text: &str) -> String {
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

/// Reports that the machine has ended, which is no failure, and returns the exit code.
fn ended(name: &str) -> u8 {
    output::print_message(&format!("The machine {name} has ended"));
    EXIT_OK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_printed_four_in_a_line_and_missing_ones_as_a_dash() {
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
    fn control_characters_from_the_socket_are_escaped() {
        assert_eq!(escaped("a\u{1b}[2J\nb\r\n"), "a\\u{1b}[2J\nb\\r\n");
    }
}
