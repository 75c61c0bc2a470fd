//! Numbers within bounds: each type is one kind of value, and a value outside of its bounds does not exist.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserializer;
use serde::de::{Error, Unexpected, Visitor};

/// A kind of number.
pub(crate) trait Bounded: Sized {
    /// The kind, for error messages: `a number of queues from 1 to 8`.
    const EXPECTED: &'static str;

    /// `None` if `value` is out of bounds.
    fn bounded(value: i128) -> Option<Self>;
}

/// Reads a number from JSON, or from the text of an option.
pub(crate) fn read<'de, D: Deserializer<'de>, T: Bounded>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_u64(NumberVisitor(PhantomData))
}

struct NumberVisitor<T>(PhantomData<T>);

impl<T: Bounded> Visitor<'_> for NumberVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<T, E> {
        T::bounded(value.into()).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(value), &self))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<T, E> {
        T::bounded(value.into()).ok_or_else(|| E::invalid_value(Unexpected::Signed(value), &self))
    }
}

/// Defines a kind of number: its type, bounds, step, and its name in error messages.
macro_rules! number {
    ($(#[$doc:meta])* $name:ident($int:ty), $least:expr, $most:expr, $step:expr, $expected:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, ::serde::Serialize)]
        pub struct $name($int);

        impl $name {
            /// `None` if the value is out of bounds.
            #[must_use]
            pub fn new(value: $int) -> Option<Self> {
                $crate::config::number::Bounded::bounded(value.into())
            }

            /// The value.
            #[must_use]
            pub fn get(self) -> $int {
                self.0
            }
        }

        impl $crate::config::number::Bounded for $name {
            const EXPECTED: &'static str = $expected;

            fn bounded(value: i128) -> Option<Self> {
                let value = <$int>::try_from(value).ok()?;
                let (least, most, step): ($int, $int, $int) = ($least, $most, $step);
                ((least..=most).contains(&value) && value.checked_rem(step) == Some(0)).then_some(Self(value))
            }
        }

        impl<'de> ::serde::Deserialize<'de> for $name {
            fn deserialize<D: ::serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                $crate::config::number::read(from)
            }
        }

        impl ::schemars::JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> ::std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut ::schemars::SchemaGenerator) -> ::schemars::Schema {
                let (least, most, step): ($int, $int, $int) = ($least, $most, $step);
                let mut schema = ::schemars::json_schema!({
                    "type": "integer",
                    "minimum": least,
                    "maximum": most
                });
                if step > 1 {
                    schema.insert("multipleOf".into(), step.into());
                }
                schema
            }
        }
    };
}

pub(crate) use number;

number! {
    /// A slot of the board.
    Slot(u8), 0, 31, 1, "the number of a slot, 0 to 31"
}

number! {
    /// A limit of bytes per second.
    ByteRate(u64), 1, u64::MAX, 1, "a number of bytes from 1"
}

number! {
    /// A number without bounds: an address, or a register's value.
    Number(u64), 0, u64::MAX, 1, "a number (decimal, or 0x and hexadecimal)"
}

#[cfg(test)]
mod tests {
    #![expect(unreachable_pub, reason = "the macro makes public types")]

    number! {
        /// An even number.
        Even(i32), -4, 4, 2, "an even number from -4 to 4"
    }

    #[test]
    fn a_number_is_within_its_bounds_however_it_is_made() {
        assert_eq!(Even::new(-2).map(Even::get), Some(-2));
        assert_eq!(serde_json::from_str::<Even>("4").unwrap().get(), 4);
        for value in [-5, 1, 6] {
            assert_eq!(Even::new(value), None);
            let error = serde_json::from_str::<Even>(&value.to_string()).unwrap_err().to_string();
            assert!(error.contains("an even number from -4 to 4"), "{error}");
        }
        for text in ["1.5", "\"2\"", "null", "99999999999999999999"] {
            assert!(serde_json::from_str::<Even>(text).is_err(), "{text}");
        }
    }
}
