//! The configuration of a disk.

use std::fmt;
use std::hash::Hasher;

use fnv::FnvHasher;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::backend::{DiskCache, DiskFormat, DiskPlan};
use super::request::ID_BYTES;
use crate::catalog::Key;
use crate::config::number::number;
use crate::config::text::{Textual, text};
use crate::config::{ByteRate, FilePath, Slot};
use crate::options::OptionError;
use crate::virtio::Limit;

pub(super) const KEYS: &[Key] = &[
    key("path", "FILE", "the file or block device (needed)"),
    key("ro", "on|off", "the guest cannot write (default: off)"),
    key("serial", "TEXT", "identity of up to 20 bytes (default: derived from the file)"),
    key("cache", "MODE", "writeback, none (O_DIRECT) or unsafe (no flush) (default: writeback)"),
    key("queues", "N", "request queues, 1 to 8 (default: 1)"),
    key("iops", "N", "limit of requests per second (default: no limit)"),
    key("bps", "BYTES", "limit of bytes per second (default: no limit)"),
    key("format", "FORMAT", "raw or qcow2; never probed (default: raw)"),
    key("backing", "on|off", "a qcow2 image may name a backing file (default: off)"),
];

const fn key(name: &'static str, value: &'static str, help: &'static str) -> Key {
    Key { name, value, help }
}

number! {
    /// A number of request queues.
    DiskQueues(u16), 1, 8, 1, "a number of queues from 1 to 8"
}

number! {
    /// A limit of requests per second.
    RequestRate(u64), 1, u64::MAX, 1, "a number of requests from 1"
}

/// The serial number of a disk: 1 to 20 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSerial(String);

impl DiskSerial {
    /// `None` for a text that is empty or too long.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        Self::textual(text)
    }
}

impl Textual for DiskSerial {
    const EXPECTED: &'static str = "a text of 1 to 20 bytes";

    fn textual(text: &str) -> Option<Self> {
        (1..=ID_BYTES).contains(&text.len()).then(|| Self(text.into()))
    }
}

impl fmt::Display for DiskSerial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

text!(DiskSerial, "^[\\s\\S]{1,20}$");

/// The name of a disk's format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The file's bytes are the disk's.
    #[default]
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// The configuration of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlkConfig {
    /// The file or block device.
    pub path: FilePath,
    /// The guest cannot write.
    #[serde(default)]
    pub ro: bool,
    /// The serial number; `None` for one derived from the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<DiskSerial>,
    /// The cache mode.
    #[serde(default)]
    pub cache: DiskCache,
    /// Request queues; `None` for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<DiskQueues>,
    /// Limit of requests per second; `None` for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<RequestRate>,
    /// Limit of bytes per second; `None` for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bps: Option<ByteRate>,
    /// The format, which is never probed.
    #[serde(default)]
    pub format: ImageFormat,
    /// A qcow2 image may name a backing file.
    #[serde(default)]
    pub backing: bool,
    /// The slot on the board; `None` for the first free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

impl BlkConfig {
    /// A disk with the defaults.
    pub fn new(path: impl Into<FilePath>) -> Self {
        Self {
            path: path.into(),
            ro: false,
            serial: None,
            cache: DiskCache::default(),
            queues: None,
            iops: None,
            bps: None,
            format: ImageFormat::default(),
            backing: false,
            slot: None,
        }
    }

    pub(super) fn check(&self) -> Result<(), OptionError> {
        if self.backing && self.format == ImageFormat::Raw {
            let expected = "possible with a raw disk (add format=qcow2)";
            return Err(OptionError::bad_value("backing", "on", expected));
        }
        Ok(())
    }

    /// The parameters with which the host opens the disk.
    pub(super) fn plan(&self) -> DiskPlan {
        let format = match self.format {
            ImageFormat::Raw => DiskFormat::Raw,
            ImageFormat::Qcow2 => DiskFormat::Qcow2 { has_backing: self.backing },
        };
        DiskPlan { path: self.path.clone(), is_read_only: self.ro, cache: self.cache, format }
    }

    /// The serial number that the user has chosen.
    pub(super) fn id(&self) -> Option<[u8; ID_BYTES]> {
        self.serial.as_ref().map(|serial| padded(&serial.0))
    }

    /// Number of queues.
    pub(super) fn queues(&self) -> u16 {
        self.queues.map_or(1, DiskQueues::get)
    }

    /// The limits on bytes and on requests.
    pub(super) fn limits(&self) -> (Option<Limit>, Option<Limit>) {
        let bytes = self.bps.map(|rate| Limit::per_second(rate.get()));
        (bytes, self.iops.map(|rate| Limit::per_second(rate.get())))
    }
}

fn padded(text: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    id.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    id
}

/// Derives a serial number from the identity of a file: FNV-1a of it.
pub(super) fn derived_id(name: &[u8]) -> [u8; ID_BYTES] {
    let mut hasher = FnvHasher::default();
    hasher.write(name);
    padded(&format!("rvmm-{:015x}", hasher.finish() >> 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_keeps_its_serial_number_from_one_version_to_the_next() {
        assert_eq!(&derived_id(b"/srv/disks/root.img"), b"rvmm-8bfe801272a9d27");
        assert_ne!(derived_id(b"/srv/disks/root.img"), derived_id(b"/srv/disks/root2.img"));
    }
}
