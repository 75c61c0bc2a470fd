//! Formats numbers and escapes foreign texts for a page.

/// A duration with three significant digits: `380 ns`, `4.12 µs`, `1.05 s`.
pub(super) fn time(ns: u64) -> String {
    let (divisor, unit) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (1_000, "µs"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    let whole = ns / divisor;
    let rest = ns % divisor * 1000 / divisor;
    match whole {
        0..10 => format!("{whole}.{:02} {unit}", rest / 10),
        10..100 => format!("{whole}.{} {unit}", rest / 100),
        _ => format!("{} {unit}", count(whole)),
    }
}

/// A number with separated thousands.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A part of a whole in per cent.
pub(super) fn percent(part: u64, whole: u64) -> String {
    let permille = u128::from(part) * 1000 / u128::from(whole.max(1));
    match permille {
        0 if part > 0 => "&lt; 0.1 %".into(),
        _ => format!("{}.{} %", permille / 10, permille % 10),
    }
}

/// A part of a whole, scaled to `length`.
pub(super) fn part_of(length: u64, part: u64, whole: u64) -> u64 {
    let scaled = u128::from(length) * u128::from(part) / u128::from(whole.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// Escapes a text of the file, which can be anything, for a page: no markup, no control characters, no change of direction.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => {
                out.push('\u{fffd}');
            }
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_significant_digits() {
        for (ns, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_000, "1.00 µs"),
            (12_345, "12.3 µs"),
            (999_999, "999 µs"),
            (1_050_000_000, "1.05 s"),
            (u64::MAX, "18,446,744,073 s"),
        ] {
            assert_eq!(time(ns), text);
        }
        assert_eq!((count(0), count(1_234_567)), ("0".into(), "1,234,567".into()));
        assert_eq!((percent(1, 3), percent(0, 0)), ("33.3 %".into(), "0.0 %".into()));
        assert_eq!(percent(1, 100_000), "&lt; 0.1 %");
    }

    #[test]
    fn no_text_of_a_file_is_markup() {
        let text = escaped("<script>a&b\"'\u{202e}\u{7}");
        assert_eq!(text, "&lt;script&gt;a&amp;b&quot;&#39;\u{fffd}\u{fffd}");
    }
}
