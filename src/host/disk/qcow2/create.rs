//! Creates an image that has only what differs from another disk, its backing file.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, file};
use rvmm_devices::config::ImageFormat;

use super::super::open::whole_sectors;
use super::header::ImageHeader;

/// Size of a cluster in bytes, as of qemu-img.
const CLUSTER: usize = 64 << 10;

/// Creates an image of `size` bytes at `path`, where there is nothing yet, over the disk at `backing`, an absolute path.
///
/// # Errors
/// The file exists or cannot be written, or the path of the backing file is no UTF-8.
pub(crate) fn create_overlay(
    path: &Path,
    size: u64,
    backing: &Path,
    format: ImageFormat,
) -> io::Result<()> {
    let name = backing.to_str().ok_or_else(|| {
        io::Error::other("the path of its backing file is not UTF-8, which qcow2 needs")
    })?;
    let format = match format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
    };
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    let created = file::File::try_from(file).and_then(|storage| {
        let builder = Qcow2::<file::File>::create_builder(storage).size(size).cluster_size(CLUSTER);
        builder.backing(name.into(), format.into()).create()
    });
    created.inspect_err(|_| {
        let _ = std::fs::remove_file(path);
    })
}

/// The size in bytes of the disk in a file or block device.
///
/// # Errors
/// The file cannot be read, or is no image of this format.
pub(crate) fn disk_size(path: &Path, format: ImageFormat) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let len = file.seek(SeekFrom::End(0))?;
    match format {
        ImageFormat::Raw => Ok(whole_sectors(len)),
        ImageFormat::Qcow2 => {
            let header = ImageHeader::read(&file, len);
            header.map(|header| header.size).map_err(|what| io::Error::other(format!("it {what}")))
        }
    }
}
