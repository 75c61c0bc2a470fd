//! The kernel command line, as a type that RISC-V Linux uses unchanged.
//!
//! Linux silently truncates a command line that is too long, stops at a NUL, and splits words at every byte
//! for which its `isspace` is true, including 0xa0, which is part of many UTF-8 letters (lib/ctype.c). So only
//! printable ASCII is accepted, and only as much of it as fits.

use std::fmt;

use linux_loader::cmdline;

use crate::error::BootError;

/// Maximum number of bytes that RISC-V Linux keeps of its command line, the NUL at the end included
/// (`COMMAND_LINE_SIZE` in arch/riscv/include/uapi/asm/setup.h).
pub const COMMAND_LINE_SIZE: usize = 1024;

/// A kernel command line: printable ASCII, at most [`COMMAND_LINE_SIZE`] bytes with its NUL; the
/// text that was given.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Cmdline(String);

impl Cmdline {
    /// Checks a command line. An empty one is valid.
    ///
    /// # Errors
    /// [`BootError::Cmdline`] names the character, its position or the limit.
    pub fn new(text: &str) -> Result<Self, BootError> {
        if let Some((at, c)) = text.char_indices().find(|(_, c)| !matches!(c, ' '..='~')) {
            return Err(refuse(format!(
                "the character {c:?} at byte {at} is not printable ASCII (take it out)"
            )));
        }
        if text.len() >= COMMAND_LINE_SIZE {
            return Err(refuse(format!(
                "it is {} bytes long, and RISC-V Linux keeps only {} (shorten it)",
                text.len(),
                COMMAND_LINE_SIZE - 1
            )));
        }
        Ok(Self(text.into()))
    }

    /// The same command line with the kernel parameter `key=value` added, before any ` -- ` that starts the
    /// arguments of init. A value with spaces has to be in double quotes.
    ///
    /// # Errors
    /// [`BootError::Cmdline`] if the result is too long, or the key or the value cannot be represented.
    pub fn with(&self, key: &str, value: &str) -> Result<Self, BootError> {
        // With the space, a `-- ` at the very start is not taken for a parameter.
        let text = format!(" {}", self.0);
        let added = cmdline::Cmdline::try_from(&text, COMMAND_LINE_SIZE).and_then(|mut cmdline| {
            cmdline.insert(key, value)?;
            cmdline.as_cstring()
        });
        let reason = match added {
            Ok(text) => return Self::new(&text.to_string_lossy()),
            Err(cmdline::Error::TooLarge | cmdline::Error::InvalidCapacity) => format!(
                "{key}={value} no longer fits: RISC-V Linux keeps only {} bytes (shorten it)",
                COMMAND_LINE_SIZE - 1
            ),
            Err(error) => format!("{:?} cannot be added: {error:?}", format!("{key}={value}")),
        };
        Err(refuse(reason))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// True if the kernel gets the parameter `key`, with a value or without one. As for Linux, `-` and
    /// `_` are the same in it, and what follows ` -- ` is not for the kernel.
    #[must_use]
    pub fn has_key(&self, key: &str) -> bool {
        self.parameters().any(|(name, _)| same_key(name, key))
    }

    /// The device of the last `console=`, which is the one behind /dev/console: `ttyS0` for
    /// `console=ttyS0,115200`.
    #[must_use]
    pub fn console(&self) -> Option<&str> {
        let consoles = self.parameters().filter(|(name, _)| same_key(name, "console"));
        let last = consoles.filter_map(|(_, value)| value).last()?;
        last.split(',').next()
    }

    /// The kernel's parameters and their values, split as Linux splits them (`next_arg`, lib/cmdline.c).
    fn parameters(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let mut quoted = false;
        let words = self.0.split(move |c| {
            quoted ^= c == '"';
            c == ' ' && !quoted
        });
        words.filter(|word| !word.is_empty()).take_while(|word| *word != "--").map(|word| {
            let whole = word.strip_prefix('"').map(|word| word.strip_suffix('"').unwrap_or(word));
            match whole.unwrap_or(word).split_once('=') {
                Some((name, value)) => (name, Some(value.trim_matches('"'))),
                None => (whole.unwrap_or(word), None),
            }
        })
    }
}

impl fmt::Display for Cmdline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn same_key(a: &str, b: &str) -> bool {
    let normal = |c: u8| if c == b'-' { b'_' } else { c };
    a.bytes().map(normal).eq(b.bytes().map(normal))
}

fn refuse(reason: String) -> BootError {
    BootError::Cmdline { reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(text: &str) -> String {
        Cmdline::new(text).unwrap_err().to_string()
    }

    #[test]
    fn a_command_line_is_kept_as_it_was_given() {
        for text in ["", " ", "console=ttyS0", "  a  b=\"c d\"  --  init arg "] {
            assert_eq!(Cmdline::new(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn the_longest_command_line_has_1023_bytes() {
        let longest = "x".repeat(1023);
        assert_eq!(Cmdline::new(&longest).unwrap().as_str(), longest);
        assert_eq!(
            message(&"x".repeat(1024)),
            "Cannot use this kernel command line: it is 1024 bytes long, \
             and RISC-V Linux keeps only 1023 (shorten it)"
        );
        assert!(message(&"x".repeat(65536)).contains("65536 bytes"));
    }

    #[test]
    fn characters_that_linux_would_stop_or_split_at_are_refused_by_name() {
        assert_eq!(
            message("console=ttyS0\nroot=/dev/vda"),
            "Cannot use this kernel command line: \
             the character '\\n' at byte 13 is not printable ASCII (take it out)"
        );
        assert!(message("a\0b").contains("'\\0' at byte 1"));
        assert!(message("a\tb").contains("'\\t'"));
        assert!(message("label=à").contains("'à' at byte 6"));
        assert!(message("\u{1b}[2J").contains("'\\u{1b}'"), "no escape reaches the terminal");
    }

    #[test]
    fn a_key_is_found_with_and_without_a_value() {
        let cmdline = Cmdline::new("quiet root=/dev/vda ro").unwrap();
        assert!(cmdline.has_key("root") && cmdline.has_key("quiet") && cmdline.has_key("ro"));
        assert!(!cmdline.has_key("roo") && !cmdline.has_key("/dev/vda") && !cmdline.has_key(""));
    }

    #[test]
    fn a_key_in_quotes_or_for_init_is_not_the_kernels() {
        let cmdline =
            Cmdline::new("a=\"x root=/dev/vda\" \"b=c d\" log-buf-len=1M -- root=1").unwrap();
        assert!(!cmdline.has_key("root"));
        assert!(cmdline.has_key("b") && cmdline.has_key("log_buf_len"));
        assert!(!Cmdline::new("-- root=/dev/vda").unwrap().has_key("root"));
    }

    #[test]
    fn the_last_console_is_the_console() {
        let console = |text: &str| Cmdline::new(text).unwrap().console().map(str::to_string);
        assert_eq!(console("console=tty0 console=ttyS0,115200n8"), Some("ttyS0".into()));
        assert_eq!(console("console=\"hvc0\""), Some("hvc0".into()));
        assert_eq!(console("earlycon console"), None);
        assert_eq!(console(""), None);
    }

    #[test]
    fn a_parameter_is_added_before_the_arguments_of_init() {
        let with = |text: &str| {
            Cmdline::new(text).unwrap().with("root", "/dev/vda").unwrap().as_str().to_string()
        };
        assert_eq!(with(""), "root=/dev/vda");
        assert_eq!(with("quiet"), "quiet root=/dev/vda");
        assert_eq!(with("quiet -- single"), "quiet root=/dev/vda -- single");
        assert_eq!(with("-- single"), "root=/dev/vda -- single");
    }

    #[test]
    fn a_parameter_that_does_not_fit_is_refused() {
        let full = Cmdline::new(&"x".repeat(1020)).unwrap();
        let error = full.with("root", "/dev/vda").unwrap_err().to_string();
        assert!(error.contains("no longer fits") && error.contains("1023"), "{error}");
        let error = Cmdline::default().with("a b", "c").unwrap_err().to_string();
        assert!(error.contains("\"a b=c\" cannot be added"), "{error}");
    }

    proptest! {
        #[test]
        fn linux_keeps_every_accepted_command_line(text in "\\PC{0,80}", n in 0_usize..20) {
            let text = text.repeat(n);
            let fine = text.len() < COMMAND_LINE_SIZE && text.bytes().all(|b| (b' '..=b'~').contains(&b));
            match Cmdline::new(&text) {
                Ok(cmdline) => {
                    prop_assert!(fine);
                    let _ = (cmdline.has_key("root"), cmdline.console());
                    if let Ok(longer) = cmdline.with("root", "x") {
                        prop_assert!(longer.has_key("root") || cmdline.as_str().contains('"'));
                    }
                }
                Err(error) => {
                    prop_assert!(!fine);
                    prop_assert!(!error.to_string().contains('\n'));
                }
            }
        }
    }
}
