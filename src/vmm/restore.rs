//! What differs between a saved machine and the one that continues it.

use rvmm_devices::FilePath;

use crate::config::{DeviceConfig, Endpoint, GdbConfig, TraceConfig, ValidConfig, VmConfig};
use crate::error::Error;
use crate::machine::Continuation;
use crate::snapshot::{DiskIdentity, Snapshot};

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
}

/// Another end of a device on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewEnd {
    /// The file of a disk, by the disk's number.
    Disk(usize, FilePath),
    /// The tap interface of a network device, by the device's number.
    Tap(usize, String),
    /// The socket of the socket device.
    Vsock(FilePath),
}

impl RestoreOptions {
    /// Applies the options to the configuration in a snapshot.
    pub(super) fn apply(self, snapshot: Snapshot) -> Result<(ValidConfig, Continuation), Error> {
        let saved = snapshot.machine();
        let mut config = saved.config.clone();
        let Self { name, paused: _, follows_wall_clock, force, serial, ends, trace, gdb } = self;
        config.name = name.unwrap_or(config.name);
        config.serial = serial.unwrap_or(config.serial);
        (config.trace, config.gdb) = (trace, gdb);
        for end in ends {
            end.apply(&mut config)?;
        }
        let refused = |what: String| {
            let folder = snapshot.folder().display();
            Error::Snapshot(format!("Cannot use the snapshot {folder}: {what}"))
        };
        let change = DiskIdentity::first_change(&saved.disks, &config)
            .map_err(|error| refused(error.to_string()))?;
        if let Some(change) = change.filter(|_| !force) {
            return Err(refused(format!(
                "{change} (the guest would damage it: use a copy from that time with --disk-path, or --force)"
            )));
        }
        let config = config.validate().map_err(|error| refused(error.to_string()))?;
        Ok((config, Continuation { snapshot, follows_wall_clock }))
    }
}

impl NewEnd {
    fn apply(self, config: &mut VmConfig) -> Result<(), Error> {
        let missing = |what: String| {
            Error::Config(format!(
                "The saved machine has no {what} (its state.json has its devices)"
            ))
        };
        let mut devices = config.devices.iter_mut();
        match self {
            Self::Disk(number, path) => {
                let mut disks = devices.filter_map(|device| match device {
                    DeviceConfig::Blk(disk) => Some(disk),
                    _ => None,
                });
                let disk = disks.nth(number);
                disk.ok_or_else(|| missing(format!("disk {}", disk_name(number))))?.path = path;
            }
            Self::Tap(number, name) => {
                let mut cards = devices.filter_map(|device| match device {
                    DeviceConfig::Net(card) => Some(card),
                    _ => None,
                });
                let card = cards.nth(number);
                let card = card.ok_or_else(|| missing(format!("network device {number}")))?;
                (card.tap, card.fd) = (Some(name), None);
            }
            Self::Vsock(path) => {
                let sockets = devices.find_map(|device| match device {
                    DeviceConfig::Vsock(sockets) => Some(sockets),
                    _ => None,
                });
                sockets.ok_or_else(|| missing("vsock device".into()))?.path = Some(path);
            }
        }
        Ok(())
    }
}

/// The name that Linux gives to a disk: vda, vdb, ...
fn disk_name(number: usize) -> String {
    let letter = u8::try_from(number).ok().and_then(|number| b'a'.checked_add(number));
    format!("vd{}", letter.filter(u8::is_ascii_lowercase).map_or('?', char::from))
}
