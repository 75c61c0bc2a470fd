//! Errors between the command line and the guest's last instruction: one variant per stage, and the exit code of each.

use std::io;
use std::path::PathBuf;

use rvmm_boot::BootError;

/// An error that keeps a machine from being built or from running on. `Display` is one line; the sources are chained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts itself, or requests something that rvmm does not support.
    #[error("{0}")]
    Config(String),
    /// A kernel, initrd, device tree or flat binary cannot be used.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A user's file cannot be opened, read or written.
    #[error("Cannot {verb} {}: {source}", path.display())]
    File {
        /// The operation: `open`, `write`, ...
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Guest memory is not available.
    #[error("{what}")]
    Memory {
        /// The whole message.
        what: String,
        /// The kernel's error.
        #[source]
        source: Option<io::Error>,
    },
    /// The hypervisor refused an operation.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A device cannot be created.
    #[error("{0}")]
    Device(String),
    /// A snapshot cannot be used: it is damaged, of another kind, or does not fit this host. Nothing of it was used.
    #[error("{0}")]
    Snapshot(String),
    /// The terminal, a socket or the event loop failed.
    #[error("{what}")]
    Host {
        /// The whole message.
        what: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// An error of the hypervisor: the whole message for the user, with the kernel's error as source.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct VmError {
    what: String,
    #[source]
    source: Option<io::Error>,
    mistake: bool,
}

impl VmError {
    /// An error that rvmm has found itself.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None, mistake: false }
    }

    /// An error in the request, which no host could fulfil: a mistake of the user's.
    pub fn invalid_request(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None, mistake: true }
    }

    /// An error of the kernel.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self { what: what.into(), source: Some(source), mistake: false }
    }

    /// True if this host lacks something that the machine needs, or has it in another form: not a failure of the kernel, and no mistake of
    /// the user's.
    #[must_use]
    pub fn is_lack(&self) -> bool {
        self.source.is_none() && !self.mistake
    }

    /// True if no host could have fulfilled the request.
    #[must_use]
    pub fn is_invalid_request(&self) -> bool {
        self.mistake
    }
}

/// Exit code of a clean end: the guest powered off, or the user stopped it.
pub const EXIT_OK: u8 = 0;
/// The host could not provide something (KVM, memory, a device).
pub const EXIT_HOST: u8 = 1;
/// The command line, the configuration or a file given is wrong.
pub const EXIT_USAGE: u8 = 2;
/// The guest stopped abnormally, for a documented reason (see [`crate::vcpu::stop::StopReason`]).
pub const EXIT_GUEST: u8 = 3;
/// A snapshot was refused: nothing of it was used.
pub const EXIT_SNAPSHOT: u8 = 4;

impl Error {
    /// The stable exit code of the command.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Boot(_) | Self::File { .. } | Self::Device(_) => EXIT_USAGE,
            Self::Vm(refusal) if refusal.is_invalid_request() => EXIT_USAGE,
            Self::Snapshot(_) => EXIT_SNAPSHOT,
            Self::Memory { .. } | Self::Vm(_) | Self::Host { .. } => EXIT_HOST,
        }
    }
}

/// An error and its sources as one line, without repetitions.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = plain(&error.to_string());
    let mut source = error.source();
    while let Some(cause) = source {
        let text = plain(&cause.to_string());
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        source = cause.source();
    }
    line
}

/// The text without the number that the standard library appends to the system's errors.
pub(crate) fn plain(text: &str) -> String {
    match text.rsplit_once(" (os error ") {
        Some((text, number)) if number.ends_with(')') => text.to_owned(),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_no_host_can_meet_is_a_usage_error_and_a_refusal_of_this_host_is_not() {
        assert_eq!(
            Error::from(VmError::invalid_request("--isa: no such thing")).exit_code(),
            EXIT_USAGE
        );
        assert_eq!(Error::from(VmError::new("no AIA here")).exit_code(), EXIT_HOST);
    }
}
