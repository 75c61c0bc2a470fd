//! The backends of devices on Linux: files, taps, sockets and programs of the host.
//!
//! | file | content |
//! |---|---|
//! | `disk/` | disks: files and block devices |
//! | `flash.rs` | flash memory: files, and the host's own |
//! | `tap.rs` | networks: tap interfaces |
//! | `vhost/` | networks and sockets whose queues the kernel processes (vhost) |
//! | `small.rs` | files that are read at once |
//! | `output.rs` | files that are written for a user, whole or not at all |
//! | `inherited.rs` | descriptors that the parent process has opened |
//! | `node.rs` | device nodes, and advice for one that cannot be opened |
//! | `daemon.rs` | programs that serve devices: virtiofsd, passt |

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use log::warn;
use rvmm_devices::flash::{FlashMemory, FlashPlan};
use rvmm_devices::virtio::DmaMemory;
use rvmm_devices::virtio::blk::{DiskBackend, DiskPlan};
use rvmm_devices::virtio::net::{NetBackend, NetworkSource};
use rvmm_devices::virtio::vhost_kernel::KernelQueues;
use rvmm_devices::virtio::vhost_user::{Daemon, Service};
use rvmm_devices::{ConsoleBackend, Host, HostError, Listener};

use crate::config::{Endpoint, quoted};
use crate::error::Error;
use crate::sockets::{Listening, connect_to};
use crate::terminal::{self, StopRequest};

mod daemon;
mod disk;
mod flash;
mod inherited;
pub(crate) mod node;
mod output;
mod small;
mod tap;
mod vhost;

use disk::DiskLock;
pub(crate) use disk::{create_overlay, disk_size};
pub(crate) use inherited::duplicate;
#[cfg(test)]
pub(crate) use output::tests::on_a_small_file_system;
#[cfg(feature = "labs")]
pub(crate) use output::write_padded;
pub(crate) use output::{deliver, write_file};
pub(crate) use small::read_small;
#[cfg(test)]
pub(crate) use tap::tests::in_a_namespace;

/// Backlog of a device's listening socket.
const BACKLOG: i32 = 128;

/// The Linux host of one machine. What it opens belongs to the device that asked for it, as long as the machine exists.
pub(crate) struct Linux {
    /// Stops the machine at a user's request.
    stop: StopRequest,
    /// The consoles of devices, each of which has one user.
    consoles: Mutex<Vec<Endpoint>>,
    /// The locks of disks.
    locks: Mutex<Vec<Weak<DiskLock>>>,
}

impl Linux {
    /// Creates a host whose consoles call `stop` on Ctrl-A x.
    pub(crate) fn new(stop: StopRequest) -> Self {
        Self { stop, consoles: Mutex::default(), locks: Mutex::default() }
    }

    /// The locks of the disks that are open.
    fn locks(&self) -> Vec<Arc<DiskLock>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|lock| lock.strong_count() > 0);
        locks.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Host for Linux {
    fn network(&self, end: &NetworkSource) -> Result<Box<dyn NetBackend>, HostError> {
        match end {
            NetworkSource::Tap(_) => one(self.network_queues(end, 1)?),
            NetworkSource::Descriptor(fd) => Ok(Box::new(tap::Tap::inherit(*fd)?)),
        }
    }

    fn network_queues(
        &self,
        end: &NetworkSource,
        pairs: u16,
    ) -> Result<Vec<Box<dyn NetBackend>>, HostError> {
        match end {
            NetworkSource::Tap(name) => {
                let taps = match pairs {
                    1 => vec![tap::Tap::open(name)?],
                    _ => tap::Tap::open_queues(name, pairs)?,
                };
                Ok(taps.into_iter().map(|tap| Box::new(tap) as Box<dyn NetBackend>).collect())
            }
            NetworkSource::Descriptor(_) => Ok(vec![self.network(end)?]),
        }
    }

    fn disk(
        &self,
        plan: &DiskPlan,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn DiskBackend>, HostError> {
        let disk = disk::open(plan, memory)?;
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).push(disk.lock());
        Ok(Box::new(disk))
    }

    fn release_locks(&self) {
        self.locks().iter().for_each(|lock| lock.release());
    }

    fn retake_locks(&self) -> Result<(), HostError> {
        let taken = self.locks().iter().try_for_each(|lock| lock.retake());
        if taken.is_err() {
            // All or none.
            self.release_locks();
        }
        taken
    }

    fn console(&self, to: &Endpoint) -> Result<Box<dyn ConsoleBackend>, HostError> {
        let mut consoles = self.consoles.lock().unwrap_or_else(PoisonError::into_inner);
        if consoles.contains(to) && !matches!(to, Endpoint::Null | Endpoint::Pty) {
            let what =
                format!("Cannot use {} twice (give each console its own)", quoted(&to.to_string()));
            return Err(HostError::invalid(what));
        }
        let console = terminal::open(to, Arc::clone(&self.stop)).map_err(refusal)?;
        if let Some(path) = &console.pty {
            // At a level that is always shown: the terminal's name is only known from this line.
            warn!("The console of the device console is {}", path.display());
        }
        consoles.push(to.clone());
        Ok(console.backend)
    }

    fn listen(&self, path: &Path) -> Result<Box<dyn Listener>, HostError> {
        Ok(Box::new(Listening::open(path, BACKLOG).map_err(refusal)?))
    }

    fn kernel_sockets(
        &self,
        guest_cid: u32,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<Box<dyn KernelQueues>, HostError> {
        vhost::sockets(guest_cid, memory)
    }

    fn flash(&self, plan: &FlashPlan) -> Result<Box<dyn FlashMemory>, HostError> {
        flash::open(plan)
    }

    fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        connect_to(path)
    }

    fn serve(&self, service: &Service) -> Result<(UnixStream, Box<dyn Daemon>), HostError> {
        daemon::start(service)
    }
}

fn one(mut ends: Vec<Box<dyn NetBackend>>) -> Result<Box<dyn NetBackend>, HostError> {
    ends.pop().ok_or_else(|| HostError::invalid("Cannot connect a network without queues"))
}

/// Converts an error of this crate to that of a device.
fn refusal(error: Error) -> HostError {
    match error {
        Error::Host { what, source } => HostError::os(what, source),
        other => HostError::invalid(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn linux() -> Linux {
        Linux::new(Arc::new(|| {}))
    }

    #[test]
    fn a_console_has_one_user() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (linux, to) = (linux(), Endpoint::File(path.as_path().into()));
        let mut first = linux.console(&to).unwrap();
        first.write(b"text").unwrap();
        let refused = linux.console(&to).err().unwrap().to_string();
        assert!(refused.contains("twice"), "{refused}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    }

    #[test]
    fn consoles_that_share_nothing_may_be_used_many_times() {
        let linux = linux();
        for _ in 0..2 {
            linux.console(&Endpoint::Null).unwrap();
            linux.console(&Endpoint::Pty).unwrap();
        }
    }

    #[test]
    fn an_invalid_console_is_a_mistake() {
        for to in ["file:/nowhere/at/all", "file:/"] {
            let to = Endpoint::parse(to.as_ref()).unwrap();
            let (what, source) = linux().console(&to).err().unwrap().into_parts();
            assert!(what.starts_with("Cannot ") && source.is_none(), "{what}");
        }
    }
}
