//! The options of a console device: `to=WHERE,port1=NAME=WHERE,...`.

use crate::catalog::Key;
use crate::options::{OptionError, Options};

const PORT: &str = "a port: NAME of letters, digits, '-', '_' and '.', and WHERE as for to";

const fn port(name: &'static str) -> Key {
    Key { name, value: "NAME=WHERE", help: PORT }
}

pub(super) const KEYS: &[Key] = &[
    Key {
        name: "to",
        value: "WHERE",
        help: "the console's backend: stdio, null, pty, file:PATH or unix:PATH (needed without ports)",
    },
    port("port1"),
    port("port2"),
    port("port3"),
    port("port4"),
    port("port5"),
    port("port6"),
    port("port7"),
];

/// Maximum length of a port's name in bytes.
const MAX_NAME: usize = 63;

/// A port: the console if it has no name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    pub(super) name: Option<String>,
    pub(super) to: String,
}

/// The settings of a console device: its ports, the console first.
pub(super) struct ConsoleSettings {
    pub(super) ends: Vec<End>,
}

impl ConsoleSettings {
    pub(super) fn read(options: &Options) -> Result<Self, OptionError> {
        let mut ends = Vec::new();
        if let Some(to) = options.get("to") {
            ends.push(End { name: None, to: to.to_owned() });
        }
        for key in KEYS.iter().skip(1) {
            let Some(text) = options.get(key.name) else { continue };
            let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
            let is_name =
                |name: &str| (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(good);
            let end = text.split_once('=').filter(|(name, _)| is_name(name));
            let Some((name, to)) = end else {
                return Err(
                    options.bad_value(key.name, "a port NAME=WHERE (as log=file:/tmp/guest.log)")
                );
            };
            if ends.iter().any(|end| end.name.as_deref() == Some(name)) {
                return Err(options.bad_value(key.name, "a name that no other port has"));
            }
            ends.push(End { name: Some(name.to_owned()), to: to.to_owned() });
        }
        if ends.is_empty() {
            return Err(options.bad_value("to", "stdio, null, pty, file:PATH or unix:PATH"));
        }
        Ok(Self { ends })
    }
}
