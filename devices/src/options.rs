//! Parser for `--device NAME,key=value,...`.

use std::str::FromStr;

use thiserror::Error;

use crate::catalog::Key;
use crate::number::number;

/// A device's name and its options, in the order given.
///
/// Values may contain any character but a comma; there is no quoting.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    name: String,
    pairs: Vec<(String, String)>,
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
    /// A part is empty: two commas in a row, or one at the end.
    #[error("Empty option in {text:?} (expected NAME,key=value,...)")]
    Empty {
        /// The text as given.
        text: String,
    },
    /// A part has no `=`, or nothing before it.
    #[error("Option {part:?} is not of the form key=value")]
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
    /// The value is invalid.
    #[error("Option {key}={value:?} is not {expected}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// The expected kind of value: `a number of seconds`.
        expected: &'static str,
    },
}

impl Options {
    /// A device without options.
    #[must_use]
    pub fn none(name: &str) -> Self {
        Self { name: name.to_owned(), pairs: Vec::new() }
    }

    /// Parses `NAME,key=value,...`. Unknown keys are only found by [`check`](Self::check),
    /// with those of the model.
    ///
    /// # Errors
    /// [`OptionError`] for a text without a name, with an empty part, without `=`, or with a key
    /// given twice.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        if name.is_empty() || name.contains('=') {
            return Err(OptionError::NoName { text: text.to_owned() });
        }
        let mut options = Self::none(name);
        for part in parts {
            if part.is_empty() {
                return Err(OptionError::Empty { text: text.to_owned() });
            }
            match part.split_once('=') {
                None | Some(("", _)) => {
                    return Err(OptionError::NotAPair { part: part.to_owned() });
                }
                Some((key, _)) if options.get(key).is_some() => {
                    return Err(OptionError::Duplicate { key: key.to_owned() });
                }
                Some((key, value)) => options.pairs.push((key.to_owned(), value.to_owned())),
            }
        }
        Ok(options)
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the value of a key, as given.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Returns the value of a key, parsed; `expected` names the kind of value: `a number of seconds`.
    ///
    /// # Errors
    /// [`OptionError::BadValue`] if it is given and does not parse.
    pub fn parsed<T: FromStr>(
        &self,
        key: &'static str,
        expected: &'static str,
    ) -> Result<Option<T>, OptionError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.parse().map(Some).map_err(|_| self.bad_value(key, expected))
    }

    /// Returns the value of a key as a number of up to 64 bits: decimal, or hexadecimal after `0x`; single underscores may separate digits.
    ///
    /// # Errors
    /// [`OptionError::BadValue`] if it is given and is no such number.
    pub fn number(&self, key: &'static str) -> Result<Option<u64>, OptionError> {
        let Some(text) = self.get(key) else { return Ok(None) };
        number(text)
            .map(Some)
            .map_err(|_| self.bad_value(key, "a number (decimal, or 0x and hexadecimal)"))
    }

    /// Returns true if a key is `on`, false if it is `off`; `default` if it is not given.
    ///
    /// # Errors
    /// [`OptionError::BadValue`] if it is anything else.
    pub fn flag(&self, key: &'static str, default: bool) -> Result<bool, OptionError> {
        match self.get(key) {
            None => Ok(default),
            Some("on") => Ok(true),
            Some("off") => Ok(false),
            Some(_) => Err(self.bad_value(key, "on or off")),
        }
    }

    /// The error for an invalid value.
    #[must_use]
    pub fn bad_value(&self, key: &'static str, expected: &'static str) -> OptionError {
        let value = self.get(key).unwrap_or_default().to_owned();
        OptionError::BadValue { key, value, expected }
    }

    /// Checks that every key given is one of `keys`.
    ///
    /// # Errors
    /// [`OptionError::UnknownKey`], which lists the known ones.
    pub fn check(&self, keys: &[Key]) -> Result<(), OptionError> {
        let unknown = self.pairs.iter().find(|(name, _)| keys.iter().all(|key| key.name != name));
        let Some((key, _)) = unknown else { return Ok(()) };
        let names: Vec<&str> = keys.iter().map(|key| key.name).collect();
        let known = match names.as_slice() {
            [] => format!("{} takes none", self.name),
            names => format!("known: {}", names.join(", ")),
        };
        Err(OptionError::UnknownKey { key: key.clone(), known })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEYS: &[Key] = &[
        Key { name: "path", value: "FILE", help: "The file" },
        Key { name: "size", value: "N", help: "Its size" },
    ];

    fn message(text: &str) -> String {
        let checked = Options::parse(text).and_then(|options| options.check(KEYS));
        checked.unwrap_err().to_string()
    }

    #[test]
    fn a_text_is_parsed_into_a_name_and_its_options() {
        let options = Options::parse("blk,path=/a=b c,size=").unwrap();
        assert_eq!(options.name(), "blk");
        assert_eq!(options.get("path"), Some("/a=b c"));
        assert_eq!(options.get("size"), Some(""));
        assert_eq!(options.get("other"), None);
        assert_eq!(options.check(KEYS), Ok(()));
        assert_eq!(Options::parse("blk"), Ok(Options::none("blk")));
    }

    #[test]
    fn errors_quote_the_text_that_is_wrong() {
        assert_eq!(message(""), "Missing device name in \"\" (expected NAME,key=value,...)");
        assert_eq!(
            message(",a=b"),
            "Missing device name in \",a=b\" (expected NAME,key=value,...)"
        );
        assert_eq!(
            message("path=b"),
            "Missing device name in \"path=b\" (expected NAME,key=value,...)"
        );
        assert_eq!(message("blk,"), "Empty option in \"blk,\" (expected NAME,key=value,...)");
        assert_eq!(message("blk,,"), "Empty option in \"blk,,\" (expected NAME,key=value,...)");
        assert_eq!(message("blk,path"), "Option \"path\" is not of the form key=value");
        assert_eq!(message("blk,=x"), "Option \"=x\" is not of the form key=value");
        assert_eq!(message("blk,size=1,size=2"), "Option \"size\" is given twice");
        assert_eq!(message("blk,pth=x"), "Unknown option \"pth\" (known: path, size)");
        let none = Options::parse("uart,x=1").and_then(|options| options.check(&[]));
        assert_eq!(none.unwrap_err().to_string(), "Unknown option \"x\" (uart takes none)");
    }

    #[test]
    fn the_error_for_a_bad_value_names_the_expected_kind() {
        let options = Options::parse("blk,size=-1").unwrap();
        assert_eq!(options.parsed::<i8>("size", "a small number"), Ok(Some(-1)));
        assert_eq!(options.parsed::<i8>("path", "a small number"), Ok(None));
        let error = options.parsed::<u8>("size", "a number of bytes").unwrap_err();
        assert_eq!(error.to_string(), "Option size=\"-1\" is not a number of bytes");
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".*") {
            if let Ok(options) = Options::parse(&text) {
                drop(options.check(KEYS));
                prop_assert!(text.starts_with(options.name()));
            }
        }

        #[test]
        fn parsing_returns_the_values_of_the_text(value in "[^,]*", other in "[^,]*") {
            let options = Options::parse(&format!("n,a={value},b={other}")).unwrap();
            prop_assert_eq!(options.get("a"), Some(value.as_str()));
            prop_assert_eq!(options.get("b"), Some(other.as_str()));
        }
    }
}
