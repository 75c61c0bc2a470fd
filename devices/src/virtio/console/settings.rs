//! The configuration of a console device: `to=WHERE,port1=NAME=WHERE,...`.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::catalog::Key;
use crate::config::text::{Textual, text};
use crate::config::{Endpoint, FilePath, Slot};
use crate::options::{OptionError, split_pair};

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

/// The name of a port: 1 to 63 letters, digits, `-`, `_` and `.`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortName(String);

impl PortName {
    /// `None` for an invalid name.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        Self::textual(name)
    }
}

impl Textual for PortName {
    const EXPECTED: &'static str = "a name of 1 to 63 letters, digits, '-', '_' and '.'";

    fn textual(text: &str) -> Option<Self> {
        let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
        let is_name = (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(good);
        is_name.then(|| Self(text.into()))
    }
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

text!(PortName, "^[A-Za-z0-9._-]{1,63}$");

/// A named port. In JSON an object, or the text `NAME=WHERE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PortConfig {
    /// Its name in the guest.
    pub name: PortName,
    /// The host end.
    pub to: Endpoint,
}

impl<'de> Deserialize<'de> for PortConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PortVisitor)
    }
}

struct PortVisitor;

impl<'de> Visitor<'de> for PortVisitor {
    type Value = PortConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port NAME=WHERE (as log=file:/tmp/guest.log)")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<PortConfig, E> {
        self.visit_bytes(text.as_bytes())
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<PortConfig, E> {
        let read = |(name, to): (&OsStr, &OsStr)| {
            Some(PortConfig { name: PortName::new(name.to_str()?)?, to: Endpoint::parse(to).ok()? })
        };
        split_pair(OsStr::from_bytes(bytes))
            .and_then(read)
            .ok_or_else(|| E::invalid_value(Unexpected::Bytes(bytes), &self))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<PortConfig, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Parts {
            name: PortName,
            to: Endpoint,
        }
        let Parts { name, to } = Parts::deserialize(MapAccessDeserializer::new(map))?;
        Ok(PortConfig { name, to })
    }
}

impl JsonSchema for PortConfig {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "PortConfig".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (name, to) =
            (generator.subschema_for::<PortName>(), generator.subschema_for::<Endpoint>());
        json_schema!({
            "description": "A named port: an object, or the text NAME=WHERE.",
            "anyOf": [
                { "type": "string", "pattern": "^[A-Za-z0-9._-]{1,63}=.+$" },
                {
                    "type": "object",
                    "properties": { "name": name, "to": to },
                    "required": ["name", "to"],
                    "additionalProperties": false
                }
            ]
        })
    }
}

/// The configuration of a console device: a console, named ports, or both.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleConfig {
    /// The host end of the console; `None` for ports only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<Endpoint>,
    /// Port 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port1: Option<PortConfig>,
    /// Port 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port2: Option<PortConfig>,
    /// Port 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port3: Option<PortConfig>,
    /// Port 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port4: Option<PortConfig>,
    /// Port 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port5: Option<PortConfig>,
    /// Port 6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port6: Option<PortConfig>,
    /// Port 7.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port7: Option<PortConfig>,
    /// The slot on the board; `None` for the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

impl ConsoleConfig {
    /// The paths of all host ends.
    pub(super) fn endpoint_paths(&mut self) -> Vec<&mut FilePath> {
        let Self { to, port1, port2, port3, port4, port5, port6, port7, slot: _ } = self;
        let ports = [port1, port2, port3, port4, port5, port6, port7].into_iter().flatten();
        let ends = to.iter_mut().chain(ports.map(|port| &mut port.to));
        ends.filter_map(Endpoint::path_mut).collect()
    }

    /// A console with these ports, at most 7; `None` if they are more.
    #[must_use]
    pub fn new(to: Option<Endpoint>, ports: Vec<PortConfig>) -> Option<Self> {
        let mut ports = ports.into_iter();
        let [port1, port2, port3, port4, port5, port6, port7] =
            std::array::from_fn(|_| ports.next());
        let config = Self { to, port1, port2, port3, port4, port5, port6, port7, slot: None };
        ports.next().is_none().then_some(config)
    }

    /// The name and the host end of each port, the console first, which has no name.
    pub(super) fn ends(&self) -> impl Iterator<Item = (Option<&PortName>, &Endpoint)> {
        let console = self.to.iter().map(|to| (None, to));
        console.chain(self.ports().map(|(_, port)| (Some(&port.name), &port.to)))
    }

    fn ports(&self) -> impl Iterator<Item = (&'static str, &PortConfig)> {
        let Self { port1, port2, port3, port4, port5, port6, port7, .. } = self;
        let ports = [port1, port2, port3, port4, port5, port6, port7];
        let names = KEYS.iter().skip(1).map(|key| key.name);
        names.zip(ports).filter_map(|(key, port)| Some((key, port.as_ref()?)))
    }

    pub(super) fn check(&self) -> Result<(), OptionError> {
        if self.ends().next().is_none() {
            return Err(OptionError::bad_value(
                "to",
                "",
                "stdio, null, pty, file:PATH or unix:PATH",
            ));
        }
        let twice = self.ports().enumerate().find(|(index, (_, port))| {
            self.ports().take(*index).any(|(_, other)| other.name == port.name)
        });
        twice.map_or(Ok(()), |(_, (key, port))| {
            let value = format!("{}={}", port.name, port.to);
            Err(OptionError::bad_value(key, value, "a name that no other port has"))
        })
    }
}
