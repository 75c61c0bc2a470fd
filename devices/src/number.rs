//! Numbers as users write them: `512M`, `2GiB`, `0x8020_0000`, `1_048_576`.
//!
//! Decimal digits, or hexadecimal digits after `0x`; single underscores may separate digits. Sizes and addresses may have a unit.

/// Parses a number without a unit.
///
/// # Errors
/// The reason for which it is invalid, and in parentheses what to write instead.
pub fn number(text: &str) -> Result<u64, String> {
    match address(text) {
        Ok(_) if has_unit(text) => Err("it has a unit (write it in digits: 512 or 0x200)".into()),
        number => number,
    }
}

/// Parses a number of bytes, at least 1: a decimal number may have a binary unit (`K`, `M`, `G`, `T`, in either case, with or without
/// `B` or `iB`).
///
/// # Errors
/// The reason for which it is invalid, and in parentheses what to write instead.
pub fn size(text: &str) -> Result<u64, String> {
    match address(text)? {
        0 => Err("the size must be greater than zero (write 512M, for example)".into()),
        bytes => Ok(bytes),
    }
}

/// Parses a guest-physical address: as [`size`], but 0 is valid.
///
/// # Errors
/// As [`size`].
pub fn address(text: &str) -> Result<u64, String> {
    if text.is_empty() {
        return Err("the number is missing (write 512M, 2G or 0x2000_0000)".into());
    }
    if text.starts_with('-') {
        return Err("it is negative (write 512M, 2G or 0x2000_0000)".into());
    }
    let (digits, radix, shift) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16, 0),
        None => {
            let end = text.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
            let (digits, unit) = text.split_at(end);
            (digits, 10, shift_of(digits, unit)?)
        }
    };
    let scale = 1_u64 << shift;
    let value = parse_digits(digits, radix)?;
    value
        .and_then(|value| value.checked_mul(scale))
        .ok_or_else(|| "it does not fit in 64 bits".into())
}

/// True if a valid number has a unit.
fn has_unit(text: &str) -> bool {
    !text.starts_with("0x")
        && !text.starts_with("0X")
        && text.ends_with(|c: char| c.is_alphabetic())
}

/// The exponent of the power of two that `unit`, written after `digits`, stands for.
fn shift_of(digits: &str, unit: &str) -> Result<u32, String> {
    if unit.starts_with('.') || unit.starts_with(',') {
        return Err("fractions are not supported (write 1536M instead of 1.5G)".into());
    }
    if digits.is_empty() {
        return Err("it does not begin with a digit (write 512M, 2G or 0x2000_0000)".into());
    }
    let lower = unit.to_ascii_lowercase();
    let letter = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
    match letter {
        "" if lower != "ib" => Ok(0),
        "k" => Ok(10),
        "m" => Ok(20),
        "g" => Ok(30),
        "t" => Ok(40),
        _ => Err("its unit is unknown (use K, M, G or T: 512M, 2G)".into()),
    }
}

/// The value of `digits`; `None` if it does not fit in 64 bits.
fn parse_digits(digits: &str, radix: u32) -> Result<Option<u64>, String> {
    let mut value = Some(0_u64);
    let mut after_digit = false;
    for c in digits.chars() {
        match c.to_digit(radix) {
            Some(digit) => {
                let next = value.and_then(|value| value.checked_mul(u64::from(radix)));
                value = next.and_then(|value| value.checked_add(u64::from(digit)));
                after_digit = true;
            }
            None if c == '_' && after_digit => after_digit = false,
            None => return Err("it is not a number (write 512M, 2G or 0x2000_0000)".into()),
        }
    }
    if after_digit {
        Ok(value)
    } else {
        Err("it does not end in a digit (write 512M, 2G or 0x2000_0000)".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_a_size_is_understood() {
        for (text, bytes) in [
            ("1", 1),
            ("1048576", 1 << 20),
            ("1_048_576", 1 << 20),
            ("4K", 4 << 10),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("512MB", 512 << 20),
            ("512MiB", 512 << 20),
            ("512mib", 512 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
            ("100B", 100),
            ("0x2000_0000", 512 << 20),
            ("0X10", 16),
            ("0xFFFFFFFFFFFFFFFF", u64::MAX),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn an_invalid_size_is_refused_in_one_line() {
        for (text, reason) in [
            ("", "missing"),
            ("0", "greater than zero"),
            ("0G", "greater than zero"),
            ("0x0", "greater than zero"),
            ("-5M", "negative"),
            ("--cpus", "negative"),
            ("M", "begin with a digit"),
            ("lots", "begin with a digit"),
            (" 5M", "begin with a digit"),
            ("_5", "not a number"),
            ("5__0", "not a number"),
            ("5_", "end in a digit"),
            ("5_M", "end in a digit"),
            ("0x", "end in a digit"),
            ("0x5G", "not a number"),
            ("1.5G", "fractions"),
            ("1,5G", "fractions"),
            ("5Q", "unit"),
            ("5iB", "unit"),
            ("5 M", "unit"),
            ("5MM", "unit"),
            ("5M\n", "unit"),
            ("5µ", "unit"),
            ("18446744073709551616", "64 bits"),
            ("16777216T", "64 bits"),
            ("0x1_0000_0000_0000_0000", "64 bits"),
        ] {
            let error = size(text).expect_err(text);
            assert!(error.contains(reason) && !error.contains('\n'), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_number_has_no_unit() {
        assert_eq!((number("0"), number("1_000"), number("0xB")), (Ok(0), Ok(1000), Ok(11)));
        for text in ["1K", "1B", "4GiB", "", "+1", "0x+1", "1.5", "1__0"] {
            assert!(number(text).is_err(), "{text}");
        }
    }

    #[test]
    fn zero_is_an_address() {
        assert_eq!(address("0"), Ok(0));
        assert_eq!(address("0x8020_0000"), Ok(0x8020_0000));
        assert_eq!(address("2G"), Ok(0x8000_0000));
    }
}
