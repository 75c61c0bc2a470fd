//! Mistakes on the command line, as one line that names the flag, its value, and what to do.

use std::error::Error as _;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Error};

use super::command::Cli;
use crate::config::quoted;

/// Converts clap's error to one line.
pub(super) fn line(error: &Error) -> String {
    let invalid = text(error, ContextKind::InvalidArg).unwrap_or_default();
    match error.kind() {
        ErrorKind::UnknownArgument => unknown_flag(error, &invalid),
        ErrorKind::InvalidSubcommand => {
            let word = text(error, ContextKind::InvalidSubcommand).unwrap_or_default();
            stray_word(&word, text(error, ContextKind::SuggestedSubcommand))
        }
        ErrorKind::InvalidValue => unlisted_value(error, flag(&invalid)),
        ErrorKind::ValueValidation => bad_value(error, flag(&invalid)),
        ErrorKind::ArgumentConflict => conflict(error, &invalid),
        ErrorKind::MissingRequiredArgument => format!("Missing {invalid} (see rvmm --help)"),
        ErrorKind::TooManyValues | ErrorKind::WrongNumberOfValues => {
            format!("Cannot use {} with a value: it takes none", flag(&invalid))
        }
        ErrorKind::InvalidUtf8 => {
            "Cannot read the command line: a word other than a path is not UTF-8".into()
        }
        // Kinds that clap adds later: the first line is the message.
        _ => {
            let text = error.render().to_string();
            let first = text.lines().next().unwrap_or_default();
            first.strip_prefix("error: ").unwrap_or(first).to_owned()
        }
    }
}

fn unknown_flag(error: &Error, word: &str) -> String {
    if !word.starts_with('-') {
        return stray_word(word, None);
    }
    if word.chars().nth(1).is_some_and(|c| c.is_ascii_digit()) {
        return format!("Unexpected argument {} (no flag takes a negative number)", quoted(word));
    }
    let suggestion = text(error, ContextKind::SuggestedArg);
    match suggestion {
        Some(near) => format!("Unknown flag {} (did you mean {near}?)", quoted(word)),
        None => format!("Unknown flag {} (see rvmm --help)", quoted(word)),
    }
}

/// A word that is neither a flag nor a flag's value: a misspelt verb, or a kernel without its flag.
fn stray_word(word: &str, near: Option<String>) -> String {
    // Verbs are in lower case, and no kernel's Image is a misspelt one.
    let near = near.filter(|_| word.chars().all(|c| c.is_ascii_lowercase()));
    let word = quoted(word);
    match near {
        Some(near) => format!("Unknown verb {word} (did you mean {near}?)"),
        None => format!(
            "Unexpected argument {word} (a kernel is given with --kernel FILE; see rvmm --help)"
        ),
    }
}

/// A value that is missing or not one of the flag's values.
fn unlisted_value(error: &Error, flag: &str) -> String {
    let known = text(error, ContextKind::ValidValue);
    match text(error, ContextKind::InvalidValue).filter(|value| !value.is_empty()) {
        None => {
            let known = known.filter(|known| !known.is_empty());
            let hint =
                known.map_or_else(|| "see rvmm --help".into(), |known| format!("use {known}"));
            format!("Cannot use {flag}: its value is missing ({hint})")
        }
        Some(value) => {
            let near = text(error, ContextKind::SuggestedValue);
            let near = near.map_or_else(String::new, |near| format!("; did you mean {near}?"));
            let known = known.unwrap_or_default();
            format!("Cannot use {flag} {}: the values are {known}{near}", quoted(&value))
        }
    }
}

/// A value that `value.rs` or `size.rs` refused.
fn bad_value(error: &Error, flag: &str) -> String {
    let value = text(error, ContextKind::InvalidValue).unwrap_or_default();
    if value.starts_with("--") {
        return format!("Cannot use {flag}: its value is missing ({} follows)", quoted(&value));
    }
    let reason = error.source().map(ToString::to_string).unwrap_or_default();
    format!("Cannot use {flag} {}: {reason}", quoted(&value))
}

fn conflict(error: &Error, invalid: &str) -> String {
    let prior = text(error, ContextKind::PriorArg).unwrap_or_default();
    let prior = flag(&prior);
    match text(error, ContextKind::InvalidSubcommand) {
        Some(verb) if Cli::command().find_subcommand(&verb).is_some() => {
            format!("Cannot use {prior} before the verb {verb} (put the verb first)")
        }
        Some(word) => stray_word(&word, None),
        None if prior == flag(invalid) => {
            format!("Cannot use {prior}: it is given twice (leave one out)")
        }
        None => format!("Cannot use {} together with {prior} (leave one out)", flag(invalid)),
    }
}

/// A flag's own name: clap reports `--mem <SIZE>`.
fn flag(usage: &str) -> &str {
    usage.split(' ').next().unwrap_or(usage)
}

fn text(error: &Error, kind: ContextKind) -> Option<String> {
    match error.get(kind)? {
        ContextValue::String(text) => Some(text.clone()),
        ContextValue::Strings(texts) => Some(texts.join(", ")),
        ContextValue::StyledStr(text) => Some(text.to_string()),
        _ => None,
    }
}
