//! The options of `--device blk`.

use std::hash::Hasher;
use std::num::NonZeroU64;

use fnv::FnvHasher;

use super::backend::{DiskCache, DiskFormat, DiskPlan};
use super::request::ID_BYTES;
use crate::options::{OptionError, Options};
use crate::virtio::Limit;

/// Maximum number of queues.
const MAX_QUEUES: u16 = 8;

/// The settings of a disk.
pub(super) struct BlkSettings {
    pub(super) plan: DiskPlan,
    /// The serial number given by the user.
    pub(super) serial: Option<[u8; ID_BYTES]>,
    pub(super) queues: u16,
    pub(super) bps: Option<Limit>,
    pub(super) iops: Option<Limit>,
}

impl BlkSettings {
    pub(super) fn read(options: &Options) -> Result<Self, OptionError> {
        let path = options.get("path").unwrap_or_default();
        if path.is_empty() {
            return Err(options.bad_value("path", "the path of a file or block device"));
        }
        let has_backing = options.flag("backing", false)?;
        let format = match options.get("format") {
            None | Some("raw") if options.get("backing").is_some() => {
                return Err(
                    options.bad_value("backing", "possible with a raw disk (add format=qcow2)")
                );
            }
            None | Some("raw") => DiskFormat::Raw,
            Some("qcow2") => DiskFormat::Qcow2 { has_backing },
            Some(_) => {
                const KNOWN: &str = "raw or qcow2 (convert other formats with qemu-img convert)";
                return Err(options.bad_value("format", KNOWN));
            }
        };
        let is_read_only = match options.get("ro") {
            None | Some("off") => false,
            Some("on") => true,
            Some(_) => return Err(options.bad_value("ro", "on or off")),
        };
        let cache = match options.get("cache") {
            None | Some("writeback") => DiskCache::Writeback,
            Some("none") => DiskCache::None,
            Some("unsafe") => DiskCache::Unsafe,
            Some(_) => return Err(options.bad_value("cache", "writeback, none or unsafe")),
        };
        let serial = options.get("serial");
        if serial.is_some_and(|serial| serial.is_empty() || serial.len() > ID_BYTES) {
            return Err(options.bad_value("serial", "a text of 1 to 20 bytes"));
        }
        const QUEUES: &str = "a number of queues from 1 to 8";
        let queues = options.parsed("queues", QUEUES)?.unwrap_or(1);
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(options.bad_value("queues", QUEUES));
        }
        let limit = |key, what| {
            let limit = options.parsed::<NonZeroU64>(key, what)?;
            Ok(limit.map(|limit| Limit::per_second(limit.get())))
        };
        Ok(Self {
            plan: DiskPlan { path: path.into(), is_read_only, cache, format },
            serial: serial.map(padded),
            queues,
            bps: limit("bps", "a number of bytes from 1")?,
            iops: limit("iops", "a number of requests from 1")?,
        })
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
