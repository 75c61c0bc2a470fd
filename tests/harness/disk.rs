//! Disk images that the tests create.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// An empty qcow2 image of this size in bytes, less than 512 MiB: header, refcounts, and an L1 table in four clusters.
pub(crate) fn blank_image(folder: &Path, bytes: u64) -> PathBuf {
    const CLUSTER: u64 = 65536;
    let path = folder.join("disk.qcow2");
    let file = File::create(&path).expect("a file");
    let header: [(u64, &[u8]); 8] = [
        (0, &[0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3]),
        (20, &[0, 0, 0, 16]),
        (24, &bytes.to_be_bytes()),
        (36, &[0, 0, 0, 1]),
        (40, &(3 * CLUSTER).to_be_bytes()),
        (48, &CLUSTER.to_be_bytes()),
        (56, &[0, 0, 0, 1]),
        (96, &[0, 0, 0, 4, 0, 0, 0, 104]),
    ];
    let tables: [(u64, &[u8]); 3] = [
        (CLUSTER, &(2 * CLUSTER).to_be_bytes()),
        (2 * CLUSTER, &[0, 1, 0, 1, 0, 1, 0, 1]),
        (4 * CLUSTER - 1, &[0]),
    ];
    for (at, bytes) in header.into_iter().chain(tables) {
        file.write_all_at(bytes, at).expect("the image");
    }
    path
}

/// An empty FAT16 file system of 4 MiB: a boot sector, two tables of 32 sectors, and a root folder of 512 entries
/// (Microsoft's "FAT: General Overview of On-Disk Format").
pub(crate) fn blank_fat(folder: &Path) -> PathBuf {
    const SECTOR: u64 = 512;
    const TABLE_SECTORS: u16 = 32;
    let path = folder.join("disk.fat");
    let file = File::create(&path).expect("a file");
    let parts: [(u64, &[u8]); 12] = [
        (0, &[0xeb, 0x3c, 0x90]),
        (11, &[0, 2, 1, 1, 0, 2]),
        (17, &512_u16.to_le_bytes()),
        (19, &8192_u16.to_le_bytes()),
        (21, &[0xf8]),
        (22, &TABLE_SECTORS.to_le_bytes()),
        (38, &[0x29]),
        (43, b"NO NAME    FAT16   "),
        (510, &[0x55, 0xaa]),
        (SECTOR, &[0xf8, 0xff, 0xff, 0xff]),
        (SECTOR * (1 + u64::from(TABLE_SECTORS)), &[0xf8, 0xff, 0xff, 0xff]),
        (SECTOR * 8192 - 1, &[0]),
    ];
    for (at, bytes) in parts {
        file.write_all_at(bytes, at).expect("the file system");
    }
    path
}
