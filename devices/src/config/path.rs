//! Paths of files: bytes, as the kernel takes them, also in JSON.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::ops::Deref;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, MapAccess, Unexpected, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A path in a configuration. In JSON a string, or `{"hex": "2f746d70ff"}` if it is not UTF-8.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FilePath(PathBuf);

/// The key of a path's bytes in JSON.
const HEX: &str = "hex";

impl FilePath {
    /// The path's bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_os_str().as_bytes()
    }
}

impl fmt::Debug for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl Deref for FilePath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for FilePath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl From<FilePath> for PathBuf {
    fn from(path: FilePath) -> Self {
        path.0
    }
}

/// Conversions from the types that paths have in programs.
macro_rules! from {
    ($($from:ty),*) => {
        $(impl From<$from> for FilePath {
            fn from(path: $from) -> Self {
                Self(path.into())
            }
        })*
    };
}

from!(PathBuf, &Path, &PathBuf, OsString, &OsStr, String, &str);

impl Serialize for FilePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => {
                let digits: String =
                    self.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry(HEX, &digits)?;
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for FilePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PathVisitor)
    }
}

struct PathVisitor;

impl<'de> Visitor<'de> for PathVisitor {
    type Value = FilePath;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<FilePath, E> {
        self.visit_bytes(text.as_bytes())
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<FilePath, E> {
        if bytes.is_empty() {
            return Err(E::invalid_value(Unexpected::Str(""), &self));
        }
        Ok(OsStr::from_bytes(bytes).into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<FilePath, A::Error> {
        let mut bytes = None;
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            if key != HEX {
                return Err(A::Error::unknown_field(&key, &[HEX]));
            }
            let digits: Cow<'_, str> = map.next_value()?;
            let decoded = decode(&digits).ok_or_else(|| {
                A::Error::invalid_value(
                    Unexpected::Str(&digits),
                    &"the bytes of a path, two hexadecimal digits each",
                )
            })?;
            bytes = Some(decoded);
        }
        let bytes = bytes.ok_or_else(|| A::Error::missing_field(HEX))?;
        Ok(OsString::from_vec(bytes).into())
    }
}

/// The bytes of hexadecimal digits; at least one.
pub(crate) fn decode(digits: &str) -> Option<Vec<u8>> {
    let is_whole = !digits.is_empty() && digits.len().is_multiple_of(2);
    let byte = |pair: &[u8]| {
        let text = std::str::from_utf8(pair).ok().filter(|text| !text.starts_with('+'))?;
        u8::from_str_radix(text, 16).ok()
    };
    is_whole.then(|| digits.as_bytes().chunks(2).map(byte).collect()).flatten()
}

impl JsonSchema for FilePath {
    fn schema_name() -> Cow<'static, str> {
        "FilePath".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A path: a string, or its bytes in hexadecimal if it is not UTF-8.",
            "anyOf": [
                { "type": "string", "minLength": 1 },
                {
                    "type": "object",
                    "properties": { "hex": { "type": "string", "pattern": "^([0-9a-fA-F]{2})+$" } },
                    "required": ["hex"],
                    "additionalProperties": false
                }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_path_that_is_no_text_is_hexadecimal_in_json() {
        let path = FilePath::from(OsStr::from_bytes(b"/tmp/\xff"));
        assert_eq!(serde_json::to_string(&path).unwrap(), r#"{"hex":"2f746d702fff"}"#);
        assert_eq!(serde_json::to_string(&FilePath::from("a,b c")).unwrap(), r#""a,b c""#);
    }

    #[test]
    fn json_that_is_no_path_is_refused() {
        for text in [
            r#""""#,
            "1",
            "{}",
            r#"{"hex":""}"#,
            r#"{"hex":"f"}"#,
            r#"{"hex":"+f"}"#,
            r#"{"hex":"fé"}"#,
            r#"{"text":"a"}"#,
            r#"{"hex":"00","more":1}"#,
        ] {
            assert!(serde_json::from_str::<FilePath>(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_path_survives_json(bytes in prop::collection::vec(1_u8.., 1..40)) {
            let path = FilePath::from(OsString::from_vec(bytes));
            let text = serde_json::to_string(&path).unwrap();
            prop_assert_eq!(serde_json::from_str::<FilePath>(&text).unwrap(), path);
        }
    }
}
