//! Taps and listening sockets that stay open across reboots of the guest: a tap that is closed may be deleted and lose its port of a
//! bridge, and a socket has connections in its backlog. A guest that reboots gets the same ones, even if their names are now another's.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rvmm_devices::{HostError, Listener};

use super::tap::Tap;
use crate::error::Error;
use crate::sockets::Listening;

/// By the name and the path from the configuration.
#[derive(Debug, Default)]
pub(super) struct Kept {
    taps: Mutex<HashMap<String, KeptTap>>,
    sockets: Mutex<HashMap<PathBuf, Arc<Listening>>>,
}

#[derive(Debug)]
struct KeptTap {
    queues: Vec<OwnedFd>,
    /// Each tap in use holds a clone.
    user: Arc<()>,
}

impl Kept {
    /// The tap of this name with `pairs` queues: the one of the previous boot, else opened or created.
    ///
    /// # Errors
    /// As [`Tap::open`].
    pub(super) fn tap(&self, name: &str, pairs: u16) -> Result<Vec<Tap>, HostError> {
        let mut taps = self.taps.lock().unwrap_or_else(PoisonError::into_inner);
        let is_used = taps.get(name).is_some_and(|tap| Arc::strong_count(&tap.user) > 1);
        if !is_used && let Some(kept) = taps.remove(name) {
            // One that was deleted (`ip link del`) is opened anew, as at the first boot.
            if kept.queues.len() == usize::from(pairs)
                && let Ok(reopened) = reopen(&kept, name)
            {
                taps.insert(name.to_owned(), kept);
                return Ok(reopened);
            }
        }
        let mut opened =
            if pairs > 1 { Tap::open_queues(name, pairs)? } else { vec![Tap::open(name)?] };
        if !is_used {
            let user = Arc::new(());
            let queues = opened.iter_mut().map(|tap| tap.keep(&user)).collect::<io::Result<_>>();
            let queues = queues
                .map_err(|error| HostError::os(format!("Cannot keep tap {name} open"), error))?;
            taps.insert(name.to_owned(), KeptTap { queues, user });
        }
        Ok(opened)
    }

    /// The socket at `path`: the one of the previous boot, else a new one.
    ///
    /// # Errors
    /// As [`Listening::open`].
    pub(super) fn listen(&self, path: &Path, backlog: i32) -> Result<Box<dyn Listener>, Error> {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        let unused = sockets.get(path).filter(|socket| Arc::strong_count(socket) == 1);
        let socket = match unused {
            Some(socket) => Arc::clone(socket),
            // If the old one is in use, opening another one of its path fails.
            None => {
                let new = Arc::new(Listening::open(path, backlog)?);
                sockets.insert(path.into(), Arc::clone(&new));
                new
            }
        };
        Ok(Box::new(Handle(socket)))
    }
}

fn reopen(kept: &KeptTap, name: &str) -> Result<Vec<Tap>, HostError> {
    let queue = |(index, fd)| Tap::reopen(fd, name, index == 0, &kept.user);
    kept.queues.iter().enumerate().map(queue).collect()
}

/// A device's handle of a kept socket.
struct Handle(Arc<Listening>);

impl AsRawFd for Handle {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Listener for Handle {
    fn accept(&self) -> io::Result<UnixStream> {
        self.0.accept().map(Into::into)
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::netdevice::name_to_index;
    use rustix::net::{AddressFamily, SocketType, socket};

    use super::super::in_a_namespace;
    use super::*;
    use crate::sockets::connect_to;

    /// The index of an interface, which the kernel does not reuse.
    fn index(name: &str) -> Option<u32> {
        let any = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
        name_to_index(any, name).ok()
    }

    #[test]
    fn a_tap_stays_the_same_across_reboots_and_is_deleted_with_the_machine() {
        in_a_namespace(|| {
            for (name, pairs) in [("t0", 1), ("t1", 2)] {
                let kept = Kept::default();
                let first = kept.tap(name, pairs).unwrap();
                let number = index(name).unwrap();
                assert_eq!(first.len(), usize::from(pairs));
                if pairs == 1 {
                    let busy = kept.tap(name, pairs).unwrap_err().to_string();
                    assert!(busy.contains("another program has it open"), "{busy}");
                }
                drop(first);
                assert_eq!(index(name), Some(number), "it stays while it is not used");
                let second = kept.tap(name, pairs).unwrap();
                assert_eq!((index(name), second.len()), (Some(number), usize::from(pairs)));
                drop((second, kept));
                assert_eq!(index(name), None);
            }
        });
    }

    #[test]
    fn a_socket_keeps_its_backlog_across_reboots_and_is_removed_with_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let kept = Kept::default();
        let first = kept.listen(&path, 8).unwrap();
        assert!(kept.listen(&path, 8).is_err(), "it is in use");
        let _waits = connect_to(&path).unwrap();
        drop(first);
        let second = kept.listen(&path, 8).unwrap();
        second.accept().unwrap();
        drop(second);
        assert!(path.exists());
        drop(kept);
        assert!(!path.exists());
    }
}
