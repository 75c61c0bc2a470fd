//! The text form of a device's configuration: `NAME,key=value,...`. A comma in a value is written twice; a value may have any bytes.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, Expected, IntoDeserializer, MapAccess,
    Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;
use thiserror::Error;

use crate::number::number;

/// Splits a list at its commas. Two commas in a row are one comma of a part.
#[must_use]
pub fn split(text: &OsStr) -> Vec<OsString> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.as_bytes().iter().peekable();
    while let Some(byte) = bytes.next() {
        if *byte == b',' && bytes.next_if(|next| **next == b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(*byte);
        }
    }
    parts.into_iter().map(OsString::from_vec).collect()
}

/// Splits a part at its first `=`; `None` if it has none.
#[must_use]
pub fn split_pair(part: &OsStr) -> Option<(&OsStr, &OsStr)> {
    let bytes = part.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (bytes.get(..at)?, bytes.get(at + 1..)?);
    Some((OsStr::from_bytes(key), OsStr::from_bytes(value)))
}

/// A device's name and its options, in the order given.
#[derive(Debug)]
pub(crate) struct Options {
    name: String,
    pairs: Vec<(String, OsString)>,
}

/// An error in a device's options.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OptionError {
    /// There is no name before the first comma.
    #[error("Missing device name in {text:?} (expected NAME,key=value,...)")]
    NoName {
        /// The text as given.
        text: String,
    },
    /// No model has this name.
    #[error("Unknown device {name:?} (known: {known})")]
    UnknownModel {
        /// The name as given.
        name: String,
        /// The names of the catalog.
        known: String,
    },
    /// A part is empty: a comma at the end.
    #[error("Empty option in {text:?} (expected NAME,key=value,...)")]
    Empty {
        /// The text as given.
        text: String,
    },
    /// A part has no `=`, or nothing before it.
    #[error("Option {part:?} is not of the form key=value (a comma in a value is written twice)")]
    NotAPair {
        /// The part as given.
        part: String,
    },
    /// A key is given twice.
    #[error("Option {key:?} is given twice")]
    Duplicate {
        /// The key.
        key: String,
    },
    /// The model has no such key.
    #[error("Unknown option {key:?} ({known})")]
    UnknownKey {
        /// The key as given.
        key: String,
        /// `known: a, b`, or that there are none.
        known: String,
    },
    /// A key that the model needs is not given.
    #[error("Option {key}= is missing")]
    Missing {
        /// The key.
        key: String,
    },
    /// A network device has no host end.
    #[error("The host interface is missing (add tap=NAME or fd=N)")]
    NoBackend,
    /// The value is invalid.
    #[error("Option {key}={value:?} is not {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// The value as given.
        value: String,
        /// The expected kind of value: `a number of seconds`.
        expected: String,
    },
}

impl OptionError {
    /// The error for a value that the other options exclude.
    pub(crate) fn bad_value(key: &str, value: impl Display, expected: &str) -> Self {
        Self::BadValue { key: key.into(), value: value.to_string(), expected: expected.into() }
    }

    /// The same error with the option that it is about: a value itself does not know its key.
    fn about(self, key: &str, value: &OsStr) -> Self {
        match self {
            Self::BadValue { expected, .. } => {
                let value = value.to_string_lossy().into_owned();
                Self::BadValue { key: key.into(), value, expected }
            }
            other => other,
        }
    }

    fn expected(expected: impl Display) -> Self {
        Self::bad_value("", "", &expected.to_string())
    }
}

impl Error for OptionError {
    fn custom<T: Display>(message: T) -> Self {
        Self::expected(message)
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::expected(expected)
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::expected(expected)
    }

    fn unknown_variant(_: &str, known: &'static [&'static str]) -> Self {
        Self::expected(match known {
            [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
            known => known.join(", "),
        })
    }

    fn unknown_field(key: &str, known: &'static [&'static str]) -> Self {
        let known = match known {
            [] => String::new(),
            names => format!("known: {}", names.join(", ")),
        };
        Self::UnknownKey { key: key.into(), known }
    }

    fn missing_field(key: &'static str) -> Self {
        Self::Missing { key: key.into() }
    }

    fn duplicate_field(key: &'static str) -> Self {
        Self::Duplicate { key: key.into() }
    }
}

impl Options {
    /// Parses `NAME,key=value,...`. Unknown keys are only found by [`read`](Self::read).
    pub(crate) fn parse(text: &OsStr) -> Result<Self, OptionError> {
        let shown = || text.to_string_lossy().into_owned();
        let mut parts = split(text).into_iter();
        let name = parts.next().unwrap_or_default().to_string_lossy().into_owned();
        if name.is_empty() || name.contains('=') {
            return Err(OptionError::NoName { text: shown() });
        }
        let mut pairs: Vec<(String, OsString)> = Vec::new();
        for part in parts {
            if part.is_empty() {
                return Err(OptionError::Empty { text: shown() });
            }
            let Some((key, value)) = split_pair(&part).filter(|(key, _)| !key.is_empty()) else {
                return Err(OptionError::NotAPair { part: part.to_string_lossy().into_owned() });
            };
            let key = key.to_string_lossy().into_owned();
            if pairs.iter().any(|(known, _)| *known == key) {
                return Err(OptionError::Duplicate { key });
            }
            pairs.push((key, value.to_owned()));
        }
        Ok(Self { name, pairs })
    }

    /// The device's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Reads the options into a model's configuration.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, OptionError> {
        T::deserialize(Pairs { rest: &self.pairs, current: None }).map_err(|error| match error {
            OptionError::UnknownKey { key, known } if known.is_empty() => {
                OptionError::UnknownKey { key, known: format!("{} takes none", self.name) }
            }
            other => other,
        })
    }
}

/// The options as a map of serde's.
struct Pairs<'a> {
    rest: &'a [(String, OsString)],
    current: Option<(&'a str, &'a OsStr)>,
}

impl<'de> Deserializer<'de> for Pairs<'_> {
    type Error = OptionError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_map(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
        seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> MapAccess<'de> for Pairs<'_> {
    type Error = OptionError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, OptionError> {
        let Some(((key, value), rest)) = self.rest.split_first() else { return Ok(None) };
        self.rest = rest;
        self.current = Some((key, value));
        let key: StrDeserializer<'_, OptionError> = key.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, OptionError> {
        let (key, value) = self.current.take().unwrap_or_default();
        seed.deserialize(Value(value)).map_err(|error| error.about(key, value))
    }
}

/// The value of an option. Its type is the one that the reader expects.
struct Value<'a>(&'a OsStr);

impl Value<'_> {
    fn number<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        let number = self.0.to_str().and_then(signed);
        let number = number.ok_or_else(|| OptionError::expected(&visitor as &dyn Expected))?;
        match (u64::try_from(number), i64::try_from(number)) {
            (Ok(number), _) => visitor.visit_u64(number),
            (_, Ok(number)) => visitor.visit_i64(number),
            _ => Err(OptionError::expected(&visitor as &dyn Expected)),
        }
    }
}

/// Parses a number as [`number`] does, or a negative one.
fn signed(text: &str) -> Option<i128> {
    match text.strip_prefix('-') {
        Some(digits) => number(digits).ok().map(|number| -i128::from(number)),
        None => number(text).ok().map(i128::from),
    }
}

impl<'de> Deserializer<'de> for Value<'_> {
    type Error = OptionError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        match self.0.to_str() {
            Some(text) => visitor.visit_str(text),
            None => visitor.visit_bytes(self.0.as_bytes()),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        match self.0.as_bytes() {
            b"on" => visitor.visit_bool(true),
            b"off" => visitor.visit_bool(false),
            _ => Err(OptionError::expected("on or off")),
        }
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        self.number(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        self.number(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        self.number(visitor)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        self.number(visitor)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        self.number(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        let text = self.0.to_string_lossy();
        let text: StrDeserializer<'_, OptionError> = text.as_ref().into_deserializer();
        visitor.visit_enum(text)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct
        identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;
    use crate::config::FilePath;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Sample {
        path: Option<FilePath>,
        size: Option<i64>,
        text: String,
        is: bool,
    }

    fn read(text: &[u8]) -> Result<Sample, OptionError> {
        Options::parse(OsStr::from_bytes(text)).and_then(|options| options.read())
    }

    fn message(text: &str) -> String {
        read(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_text_is_parsed_into_a_name_and_its_options() {
        let sample = read(b"blk,path=/a=b c,size=-0x1_0,text=,is=on").unwrap();
        let path = Some("/a=b c".into());
        assert_eq!(sample, Sample { path, size: Some(-16), text: String::new(), is: true });
        assert_eq!(read(b"blk"), Ok(Sample::default()));
    }

    #[test]
    fn a_comma_in_a_value_is_written_twice_and_a_path_has_any_bytes() {
        let path = |text: &[u8]| read(text).unwrap().path.unwrap();
        assert_eq!(path(b"blk,path=a,,b"), "a,b".into());
        assert_eq!(path(b"blk,path=,,,,,size=1"), ",,".into());
        assert_eq!(path(b"blk,size=1,path=a,,"), "a,".into());
        assert_eq!(path(b"blk,path=\xff").as_bytes(), b"\xff");
        assert!(read(b"blk,text=\xff").is_err(), "a text is UTF-8");
    }

    #[test]
    fn errors_quote_the_text_that_is_wrong() {
        for (text, expected) in [
            ("", "Missing device name in \"\" (expected NAME,key=value,...)"),
            (",a=b", "Missing device name in \",a=b\" (expected NAME,key=value,...)"),
            ("path=b", "Missing device name in \"path=b\" (expected NAME,key=value,...)"),
            ("blk,", "Empty option in \"blk,\" (expected NAME,key=value,...)"),
            ("blk,path=a,,,", "Empty option in \"blk,path=a,,,\" (expected NAME,key=value,...)"),
            ("blk,size=1,size=2", "Option \"size\" is given twice"),
            ("blk,pth=x", "Unknown option \"pth\" (known: path, size, text, is)"),
            ("blk,is=1", "Option is=\"1\" is not on or off"),
            ("blk,path=", "Option path=\"\" is not a path"),
        ] {
            assert_eq!(message(text), expected);
        }
        assert!(message("blk,path").starts_with("Option \"path\" is not of the form key=value"));
        assert!(message("blk,=x").starts_with("Option \"=x\" is not of the form key=value"));
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        for (text, value) in
            [("0", Some(0)), ("0x1f", Some(31)), ("1_000", Some(1000)), ("-7", Some(-7))]
        {
            assert_eq!(signed(text), value);
        }
        for text in ["", "-", "+1", "--1", "0x", "0x+1", "-0x-1", "1.0", " 1", "1e3", "x"] {
            assert_eq!(signed(text), None, "{text}");
        }
        assert!(message("blk,size=18446744073709551616").contains("size="));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = read(&bytes);
        }

        #[test]
        fn parsing_returns_the_values_of_the_text(value in "[^,]+", other in ".*") {
            let text = format!("n,path={value},text={}", other.replace(',', ",,"));
            let sample = read(text.as_bytes()).unwrap();
            prop_assert_eq!(sample.path, Some(value.into()));
            prop_assert_eq!(sample.text, other);
        }
    }
}
