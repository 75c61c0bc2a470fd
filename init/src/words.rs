//! Splits a line of the prompt into words as a shell does: blanks separate them, quotes and backslashes keep them together.

/// An error in a line that cannot be split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum WordError {
    /// A quote is not closed.
    #[error("A {0} is not closed")]
    OpenQuote(char),
    /// The last character is a backslash.
    #[error("Nothing follows the last \\")]
    OpenEscape,
}

/// Splits a line into words. `'...'` keeps everything, `"..."` everything but `\"` and `\\`, a backslash the next character;
/// a word that begins with `#` starts a comment.
pub(super) fn split(line: &str) -> Result<Vec<String>, WordError> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut rest = line.chars();
    while let Some(c) = rest.next() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (None, '#') if word.is_none() => break,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => {
                let next = rest.next().ok_or(WordError::OpenEscape)?;
                let word = word.get_or_insert_default();
                if quote.is_some() && !matches!(next, '"' | '\\') {
                    word.push('\\');
                }
                word.push(next);
            }
            (None, _) if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    match quote {
        Some(open) => Err(WordError::OpenQuote(open)),
        None => {
            words.extend(word);
            Ok(words)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_separate_and_none_are_left() {
        assert_eq!(split("  ls\t-l   /proc \n").unwrap(), ["ls", "-l", "/proc"]);
        assert!(split(" \t\n").unwrap().is_empty());
    }

    #[test]
    fn quotes_and_backslashes_keep_together() {
        assert_eq!(split(r"echo 'a  b' c\ d").unwrap(), ["echo", "a  b", "c d"]);
        assert_eq!(split(r#""a \"b\" \n" '\'"#).unwrap(), [r#"a "b" \n"#, r"\"]);
        assert_eq!(split("a'b'\"c\"d").unwrap(), ["abcd"]);
        assert_eq!(split("'' \"\"").unwrap(), ["", ""]);
    }

    #[test]
    fn comments_are_left_out_and_hashes_inside_words_are_not() {
        assert_eq!(split("run a#b # c 'd").unwrap(), ["run", "a#b"]);
        assert_eq!(split("'#' x").unwrap(), ["#", "x"]);
    }

    #[test]
    fn what_is_not_closed_is_refused() {
        assert_eq!(split("echo 'a"), Err(WordError::OpenQuote('\'')));
        assert_eq!(split("echo \"a"), Err(WordError::OpenQuote('"')));
        assert_eq!(split("echo \\"), Err(WordError::OpenEscape));
    }

    #[test]
    fn characters_of_several_bytes_are_kept() {
        assert_eq!(split("echo grüße\u{a0}日本").unwrap(), ["echo", "grüße", "日本"]);
    }
}
