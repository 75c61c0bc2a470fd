//! What a snapshot says besides guest RAM: plain data, in JSON.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use rvmm_devices::{DeviceState, FilePath};
use serde::{Deserialize, Serialize};

use super::image::MemoryImage;
use super::preamble::{Format, Preamble};
use crate::config::{DeviceConfig, VmConfig};
use crate::error::Error;
use crate::hypervisor::VmState;

/// The format of snapshots.
pub(super) const FORMAT: Format = Format { name: "rvmm-snapshot", version: 1, what: "snapshot" };

/// The contents of `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SnapshotState {
    #[serde(flatten)]
    pub(super) preamble: Preamble,
    /// What this is the difference to; `None` for a whole snapshot.
    pub(super) parent: Option<Parent>,
    /// Guest RAM.
    pub(super) memory: MemoryImage,
    /// All the rest.
    pub(super) machine: SavedMachine,
}

/// The snapshot that another one is the difference to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Its folder.
    pub folder: FilePath,
    /// The checksum of its state.
    pub checksum: String,
}

/// The state of a whole machine but its RAM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMachine {
    /// When it was saved, in nanoseconds since 1970 (UTC).
    pub saved_at_ns: u64,
    /// The configuration; paths are absolute.
    pub config: VmConfig,
    /// The files of disks, in the order of the configuration.
    pub disks: Vec<DiskIdentity>,
    /// Time, harts and the interrupt controller in the kernel.
    pub vm: VmState,
    /// All devices.
    pub devices: Vec<DeviceState>,
}

/// What shows whether a disk's file has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskIdentity {
    /// The file.
    pub path: FilePath,
    /// Its size in bytes.
    pub size: u64,
    /// Its last change in nanoseconds since 1970 (UTC); `None` for a block device, which has none.
    pub modified_ns: Option<i64>,
}

impl DiskIdentity {
    /// The identity of each disk of a configuration now.
    ///
    /// # Errors
    /// A file does not exist any more, or cannot be examined.
    pub(crate) fn of_config(config: &VmConfig) -> Result<Vec<Self>, Error> {
        paths(config).map(Self::of).collect()
    }

    fn of(path: &FilePath) -> Result<Self, Error> {
        let metadata = std::fs::metadata(path).map_err(|source| Error::File {
            verb: "examine",
            path: path.to_path_buf(),
            source,
        })?;
        let is_block = metadata.file_type().is_block_device();
        let time =
            metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
        Ok(Self {
            path: path.clone(),
            size: metadata.len(),
            modified_ns: (!is_block).then_some(time),
        })
    }

    /// The first disk of a configuration, by number, that is not as it was saved, with the reason.
    ///
    /// # Errors
    /// As for [`DiskIdentity::of_config`].
    pub(crate) fn first_change(saved: &[Self], config: &VmConfig) -> Result<Option<String>, Error> {
        let now = Self::of_config(config)?;
        if saved.len() != now.len() {
            return Ok(Some(format!("it knows {} disks of {}", saved.len(), now.len())));
        }
        for (saved, now) in saved.iter().zip(now) {
            let path = &now.path;
            if saved.size != now.size {
                let (was, is) = (saved.size, now.size);
                return Ok(Some(format!("disk {path} has {is} bytes, and had {was}")));
            }
            if saved.modified_ns != now.modified_ns {
                return Ok(Some(format!("disk {path} was written since")));
            }
        }
        Ok(None)
    }
}

/// The files of a configuration's disks.
pub(crate) fn paths(config: &VmConfig) -> impl Iterator<Item = &FilePath> {
    config.devices.iter().filter_map(|device| match device {
        DeviceConfig::Blk(disk) => Some(&disk.path),
        _ => None,
    })
}
