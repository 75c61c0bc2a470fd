//! Host ends of consoles and serial lines.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::path::FilePath;

/// The host end of a console or a serial line: `stdio`, `null`, `pty`, `file:PATH`, `unix:PATH` or `connect:PATH`. In JSON the same
/// text, or `{"unix": PATH}` for a path of any bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Endpoint {
    /// Standard input and output.
    #[default]
    Stdio,
    /// None: output is discarded.
    Null,
    /// Output to a file, created or truncated.
    File(FilePath),
    /// A new pseudo terminal; its path is logged and printed.
    Pty,
    /// A Unix socket that rvmm listens on, one client at a time.
    Unix(FilePath),
    /// A Unix socket that another program listens on: another machine's serial line, for example.
    Connect(FilePath),
}

const FORMS: &str = "one of stdio, null, pty, file:PATH, unix:PATH and connect:PATH";

impl Endpoint {
    /// Parses `stdio`, `null`, `pty`, `file:PATH`, `unix:PATH` or `connect:PATH`.
    ///
    /// # Errors
    /// The reason for which the text is invalid.
    pub fn parse(text: &OsStr) -> Result<Self, &'static str> {
        let bytes = text.as_bytes();
        match bytes {
            b"stdio" => return Ok(Self::Stdio),
            b"null" => return Ok(Self::Null),
            b"pty" => return Ok(Self::Pty),
            b"file:" | b"unix:" | b"connect:" => return Err("the path after the ':' is missing"),
            _ => {}
        }
        let path = |prefix: &[u8]| bytes.strip_prefix(prefix).map(OsStr::from_bytes);
        path(b"file:")
            .map(|path| Self::File(path.into()))
            .or_else(|| path(b"unix:").map(|path| Self::Unix(path.into())))
            .or_else(|| path(b"connect:").map(|path| Self::Connect(path.into())))
            .ok_or("it is not one of stdio, null, pty, file:PATH, unix:PATH and connect:PATH")
    }
}

impl Endpoint {
    /// Its path, if it has one.
    pub fn path_mut(&mut self) -> Option<&mut FilePath> {
        match self {
            Self::Stdio | Self::Null | Self::Pty => None,
            Self::File(path) | Self::Unix(path) | Self::Connect(path) => Some(path),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::Null => f.write_str("null"),
            Self::Pty => f.write_str("pty"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Connect(path) => write!(f, "connect:{}", path.display()),
        }
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EndpointVisitor)
    }
}

struct EndpointVisitor;

impl<'de> Visitor<'de> for EndpointVisitor {
    type Value = Endpoint;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(FORMS)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Endpoint, E> {
        self.visit_bytes(text.as_bytes())
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Endpoint, E> {
        let unexpected = Unexpected::Bytes(bytes);
        let unexpected = std::str::from_utf8(bytes).map_or(unexpected, Unexpected::Str);
        Endpoint::parse(OsStr::from_bytes(bytes)).map_err(|_| E::invalid_value(unexpected, &self))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Endpoint, A::Error> {
        const KINDS: &[&str] = &["file", "unix", "connect"];
        let kind = map.next_key::<Cow<'_, str>>()?;
        let kind = kind.ok_or_else(|| A::Error::invalid_length(0, &self))?;
        let end = match &*kind {
            "file" => Endpoint::File(map.next_value()?),
            "unix" => Endpoint::Unix(map.next_value()?),
            "connect" => Endpoint::Connect(map.next_value()?),
            other => return Err(A::Error::unknown_field(other, KINDS)),
        };
        match map.next_key::<Cow<'_, str>>()? {
            None => Ok(end),
            Some(_) => Err(A::Error::invalid_length(2, &self)),
        }
    }
}

impl JsonSchema for Endpoint {
    fn schema_name() -> Cow<'static, str> {
        "Endpoint".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let path = generator.subschema_for::<FilePath>();
        let object = |kind: &str| {
            json_schema!({
                "type": "object",
                "properties": { kind: path },
                "required": [kind],
                "additionalProperties": false
            })
        };
        json_schema!({
            "description": "The host end of a console or a serial line.",
            "anyOf": [
                { "type": "string", "pattern": "^(stdio|null|pty|(file|unix|connect):.+)$" },
                object("file"),
                object("unix"),
                object("connect")
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_text_or_an_object_with_a_path() {
        let read = |text: &str| serde_json::from_str::<Endpoint>(text);
        assert_eq!(read(r#""pty""#).unwrap(), Endpoint::Pty);
        assert_eq!(read(r#""unix:/a:b""#).unwrap(), Endpoint::Unix("/a:b".into()));
        assert_eq!(read(r#"{"file":"log"}"#).unwrap(), Endpoint::File("log".into()));
        let bytes = Endpoint::Connect(OsStr::from_bytes(b"\xff").into());
        assert_eq!(serde_json::to_string(&bytes).unwrap(), r#"{"connect":{"hex":"ff"}}"#);
        assert_eq!(read(r#"{"connect":{"hex":"ff"}}"#).unwrap(), bytes);
        for text in [
            r#""tty""#,
            r#""unix:""#,
            "{}",
            r#"{"tty":"a"}"#,
            r#"{"file":""}"#,
            r#"{"file":"a","unix":"b"}"#,
            "1",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
