//! Descriptors that the parent process has opened, and that are known by their numbers.
#![expect(unsafe_code, reason = "a descriptor is found by its number")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Duplicates a descriptor; the original stays open.
///
/// # Errors
/// EBADF if it is not open; or this process may have no more.
pub(crate) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: only the number is used, by one call that fails if it is not open.
    let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if own < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was created above, and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(own) })
}
