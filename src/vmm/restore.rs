//! What differs between a saved machine and the one that continues it.

use std::io;
use std::path::PathBuf;

use rvmm_devices::FilePath;
use rvmm_devices::config::{BlkConfig, Cid, ImageFormat, MacAddress, NetConfig, VsockConfig};

use crate::config::{DeviceConfig, Endpoint, GdbConfig, TraceConfig, ValidConfig, VmConfig};
use crate::error::Error;
use crate::host::{create_overlay, disk_size};
use crate::machine::{Continuation, Origin};
use crate::snapshot::DiskIdentity;

/// The options of a restore. Without any the machine has the ends of the host that it had when it was saved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RestoreOptions {
    /// Another name.
    pub name: Option<String>,
    /// The guest waits for a resume.
    pub paused: bool,
    /// The guest's time goes on as if it had run meanwhile; otherwise as if there had been no time in between.
    pub follows_wall_clock: bool,
    /// Disks are used although they have changed since.
    pub force: bool,
    /// Another backend of the first UART.
    pub serial: Option<Endpoint>,
    /// Other ends of devices.
    pub ends: Vec<NewEnd>,
    /// A trace of every exit.
    pub trace: Option<TraceConfig>,
    /// The address a debugger connects to.
    pub gdb: Option<GdbConfig>,
    /// The Unix socket of the program that has the memory, a pager: it serves the guest's page faults. The snapshot may be one of
    /// [`crate::snapshot::Snapshot::open_state`].
    pub pager: Option<PathBuf>,
    /// A thread reads the memory's file ahead of the guest.
    pub prefetches: bool,
}

/// Another end of a device on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewEnd {
    /// The file of a disk, by the disk's number.
    Disk(usize, FilePath),
    /// A new qcow2 image over the saved disk, by the disk's number: the guest writes there, and the disk stays as it is.
    Overlay(usize, FilePath),
    /// The tap interface of a network device, by the device's number.
    Tap(usize, String),
    /// The MAC address of a network device, by the device's number. The guest's driver reads it when it is loaded again.
    Mac(usize, MacAddress),
    /// The socket of the socket device.
    Vsock(FilePath),
    /// The guest's CID. The guest reads it again.
    Cid(Cid),
}

impl RestoreOptions {
    /// Applies the options to the configuration of a saved machine.
    pub(super) fn apply(self, origin: Origin) -> Result<(ValidConfig, Continuation), Error> {
        let saved = origin.machine();
        let (pager, prefetches) = (self.pager.clone(), self.prefetches);
        check_pager(pager.is_some(), &saved.config)?;
        let mut config = saved.config.clone();
        let Self { name, paused: _, follows_wall_clock, force, serial, ends, trace, gdb, .. } =
            self;
        config.name = name.unwrap_or(config.name);
        config.serial = serial.unwrap_or(config.serial);
        (config.trace, config.gdb) = (trace, gdb);
        // An overlay is put over a disk that is still the saved one.
        let (overlays, others): (Vec<_>, Vec<_>) =
            ends.into_iter().partition(|end| matches!(end, NewEnd::Overlay(..)));
        for end in others {
            end.apply(&mut config)?;
        }
        let change = DiskIdentity::first_change(&saved.disks, &config)
            .map_err(|error| origin.refused(error))?;
        if let Some(change) = change.filter(|_| !force) {
            return Err(origin.refused(format!(
                "{change} (the guest would damage it: use a copy from that time with --disk-path, or --force)"
            )));
        }
        for overlay in overlays {
            overlay.apply(&mut config)?;
        }
        let config = config.validate().map_err(|error| origin.refused(error))?;
        Ok((config, Continuation { origin, follows_wall_clock, pager, prefetches }))
    }
}

/// Refuses what a pager cannot serve, before the machine has anything of the host.
fn check_pager(is_wanted: bool, config: &VmConfig) -> Result<(), Error> {
    if is_wanted && config.hugepages {
        let what = "Cannot use --pager: the saved machine's memory is in huge pages (--hugepages), which are filled as a whole (restore it without --pager)";
        return Err(Error::Config(what.into()));
    }
    Ok(())
}

impl NewEnd {
    fn apply(self, config: &mut VmConfig) -> Result<(), Error> {
        match self {
            Self::Disk(number, path) => disk(config, number)?.path = path,
            Self::Overlay(number, path) => {
                let disk = disk(config, number)?;
                put_over(disk, &path).map_err(|source| Error::File {
                    verb: "create the overlay",
                    path: path.to_path_buf(),
                    source,
                })?;
            }
            Self::Tap(number, name) => {
                let card = network(config, number)?;
                (card.tap, card.fd) = (Some(name), None);
            }
            Self::Mac(number, mac) => network(config, number)?.mac = Some(mac),
            Self::Vsock(path) => sockets(config)?.path = Some(path),
            Self::Cid(cid) => sockets(config)?.cid = Some(cid),
        }
        Ok(())
    }
}

/// Finds a device of a type in a configuration, by its number among those of its type.
macro_rules! find {
    ($name:ident, $variant:ident, $config:ty) => {
        fn $name(
            config: &mut VmConfig,
            number: usize,
            what: String,
        ) -> Result<&mut $config, Error> {
            let mut found = config.devices.iter_mut().filter_map(|device| match device {
                DeviceConfig::$variant(found) => Some(found),
                _ => None,
            });
            found.nth(number).ok_or_else(|| {
                Error::Config(format!(
                    "The saved machine has no {what} (its state.json has its devices)"
                ))
            })
        }
    };
}

find!(find_disk, Blk, BlkConfig);
find!(find_network, Net, NetConfig);
find!(find_sockets, Vsock, VsockConfig);

fn disk(config: &mut VmConfig, number: usize) -> Result<&mut BlkConfig, Error> {
    find_disk(config, number, format!("disk {}", disk_name(number)))
}

fn network(config: &mut VmConfig, number: usize) -> Result<&mut NetConfig, Error> {
    find_network(config, number, format!("network device eth{number}"))
}

fn sockets(config: &mut VmConfig) -> Result<&mut VsockConfig, Error> {
    find_sockets(config, 0, "vsock device".into())
}

/// Creates an image over a disk, and puts it in the disk's place.
fn put_over(disk: &mut BlkConfig, path: &FilePath) -> io::Result<()> {
    let size = disk_size(&disk.path, disk.format)?;
    create_overlay(path, size, &disk.path, disk.format)?;
    (disk.path, disk.format, disk.backing) = (path.clone(), ImageFormat::Qcow2, true);
    Ok(())
}

/// The name that Linux gives to a disk: vda, vdb, ...
fn disk_name(number: usize) -> String {
    let letter = u8::try_from(number).ok().and_then(|number| b'a'.checked_add(number));
    format!("vd{}", letter.filter(u8::is_ascii_lowercase).map_or('?', char::from))
}
