//! The header of a qcow2 image (QEMU's docs/interop/qcow2.txt, "Header"), checked before the rest of the image is used.
//!
//! Read and bounded here, although imago reads it again: these fields determine the cost of opening an image, and imago
//! accepts lengths beyond the image's end. Left out: the names of features, the fields that only writers of snapshots need,
//! and the contents of bitmaps.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Size of the header in version 2, and its minimum in version 3.
const V2_BYTES: u64 = 72;
const V3_BYTES: u64 = 104;

/// Limits of cluster_bits in the format and in QEMU: 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// Limits of the bytes of an L1 table and of a refcount table.
const MOST_L1: u64 = 4 << 20;
const MOST_REFTABLE: u64 = 8 << 20;

/// L2 tables that imago caches, and the limit of their bytes: 16 TiB of disk with clusters of 2 MiB.
const KEPT_TABLES: u64 = 128;
const MOST_KEPT: u64 = 64 << 20;

/// Limit of the bytes of a backing file's name.
const MOST_NAME: u64 = 1023;

/// Types of header extensions.
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
/// Size of an entry of the feature name table.
const FEATURE_NAME: u64 = 48;

/// Incompatible features: refcounts may be too low; any table may be wrong.
const DIRTY: u8 = 1;
const CORRUPT: u8 = 2;
/// Offset of the lowest byte of the incompatible features, and the bits in it that do not prevent reading.
pub(super) const MARKS_AT: u64 = V2_BYTES + 7;
pub(super) const MARKS: u8 = DIRTY | CORRUPT;
/// Autoclear feature: bitmaps are consistent with the disk.
const HAS_BITMAPS: u64 = 1;

/// The fields of a header that rvmm uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ImageHeader {
    pub(super) cluster_bits: u32,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u64,
    /// Logarithm of the bits of a refcount.
    pub(super) refcount_order: u32,
    pub(super) snapshots: u32,
    /// Number of bitmaps that are consistent with the disk, until a program writes it without updating them.
    pub(super) bitmaps: u64,
    /// The reason why it has to be repaired before it is written.
    pub(super) flaw: Option<Flaw>,
    pub(super) backing: Option<Backing>,
}

/// The reason why an image is read-only until it is repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flaw {
    /// A program that wrote it with lazy refcounts did not close it. Reads return correct data.
    Dirty,
    /// QEMU has found inconsistent tables. Reads may return wrong data.
    Corrupt,
}

/// The header extensions that rvmm uses.
#[derive(Debug, Default)]
struct Extensions {
    backing_format: Option<String>,
    bitmaps: u64,
}

/// The backing file that an image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) name: String,
    pub(super) format: Option<String>,
}

/// Error for extensions that extend beyond the header.
const ENDLESS: &str = "is damaged: its header extensions do not end";

impl ImageHeader {
    /// Size of a cluster in bytes.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the disk that one L2 table describes.
    fn table_covers(&self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }

    /// Reads the header of an image of `len` bytes.
    ///
    /// # Errors
    /// A sentence for the user, without a subject: `is not a qcow2 image (...)`.
    pub(super) fn read(file: &File, len: u64) -> Result<Self, String> {
        let first = Fields::read(file, 0, V2_BYTES.min(len))?;
        if first.number(0, 4) != 0x5146_49fb {
            return Err("is not a qcow2 image (omit format=qcow2 if it is a raw disk)".into());
        }
        let version = first.number(4, 4);
        let (bytes, order, flaw, autoclear) = match version {
            2 => (V2_BYTES, 4, None, 0),
            3 => {
                let rest = Fields::read(file, V2_BYTES, V3_BYTES - V2_BYTES)?;
                let flaw = incompatible(rest.number(0, 8))?;
                (rest.number(28, 4), rest.number(24, 4), flaw, rest.number(16, 8))
            }
            other => return Err(format!("has format version {other}, supported are 2 and 3")),
        };
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let mut header = Self {
            cluster_bits: small(first.number(20, 4)),
            size: first.number(24, 8),
            l1_entries: first.number(36, 4),
            l1_offset: first.number(40, 8),
            reftable_offset: first.number(48, 8),
            reftable_clusters: first.number(56, 4),
            refcount_order: small(order),
            snapshots: small(first.number(60, 4)),
            bitmaps: 0,
            flaw,
            backing: None,
        };
        if first.number(32, 4) != 0 {
            return Err("is encrypted, which is not supported (qemu-img convert it)".into());
        }
        if !CLUSTER_BITS.contains(&header.cluster_bits) || header.refcount_order > 6 {
            return Err("is damaged: its header has sizes that the format does not allow".into());
        }
        header.check(len)?;
        let name_at = first.number(8, 8);
        let name = header.backing_name(file, (name_at, first.number(16, 4)))?;
        let found = match version {
            // Only the backing file's format is needed. The extensions may end at its name without an end mark, and without a
            // name the bytes may be arbitrary.
            2 if name.is_some() => header.extensions(file, bytes, name_at)?.0,
            2 => Extensions::default(),
            _ => header.all_extensions(file, bytes)?,
        };
        header.bitmaps = if autoclear & HAS_BITMAPS == 0 { 0 } else { found.bitmaps };
        header.backing = name.map(|name| Backing { name, format: found.backing_format });
        Ok(header)
    }

    /// Checks the sizes against each other, the size of the file and the memory limits.
    fn check(&self, len: u64) -> Result<(), String> {
        let damaged = |what: &str| Err(format!("is damaged: {what}"));
        if self.size < 512 {
            return damaged("its disk is smaller than a sector");
        }
        let needed = self.size.div_ceil(self.table_covers());
        let kept = needed.min(KEPT_TABLES) << self.cluster_bits;
        if needed.saturating_mul(8) > MOST_L1 || kept > MOST_KEPT {
            let (size, cluster) = (self.size, self.cluster());
            return Err(format!(
                "has a disk of {size} bytes in clusters of {cluster}, which needs larger tables than rvmm allows (convert it to other clusters: qemu-img convert -O qcow2 -o cluster_size=64k)"
            ));
        }
        if self.l1_entries < needed || self.l1_entries.saturating_mul(8) > MOST_L1 {
            return damaged("its L1 table has the wrong size for the disk");
        }
        let reftable = self.reftable_clusters << self.cluster_bits;
        if reftable == 0 || reftable > MOST_REFTABLE.max(self.cluster()) {
            return damaged("its refcount table has an invalid size");
        }
        let is_inside = |offset: u64, bytes: u64| {
            offset >= self.cluster()
                && offset.is_multiple_of(self.cluster())
                && offset.checked_add(bytes).is_some_and(|end| end <= len)
        };
        if !is_inside(self.l1_offset, self.l1_entries * 8) {
            return damaged("its L1 table is not inside the file");
        }
        // The file may end within the last cluster.
        if !is_inside(self.reftable_offset, 8) || len - self.reftable_offset < reftable / 2 {
            return damaged("its refcount table is not inside the file");
        }
        Ok(())
    }

    /// Reads the extensions of version 3, which have an end mark.
    fn all_extensions(&self, file: &File, at: u64) -> Result<Extensions, String> {
        if !(V3_BYTES..=self.cluster()).contains(&at) || !at.is_multiple_of(8) {
            return Err("is damaged: its header has an invalid length".into());
        }
        match self.extensions(file, at, self.cluster())? {
            (found, true) => Ok(found),
            (_, false) => Err(ENDLESS.into()),
        }
    }

    /// Reads the extensions from `at` up to `end`, inside the first cluster. The flag is true if they have an end mark.
    fn extensions(&self, file: &File, mut at: u64, end: u64) -> Result<(Extensions, bool), String> {
        let mut found = Extensions::default();
        // Each takes at least eight bytes.
        while at + 8 <= end {
            let head = Fields::read(file, at, 8)?;
            let (kind, bytes) = (head.number(0, 4), head.number(4, 4));
            at += 8;
            if bytes > end - at {
                return Err(ENDLESS.into());
            }
            match u32::try_from(kind) {
                Ok(0) => return Ok((found, true)),
                Ok(BACKING_FORMAT) if bytes <= MOST_NAME => {
                    found.backing_format = Some(Fields::read(file, at, bytes)?.text()?);
                }
                Ok(FEATURE_NAMES) if !bytes.is_multiple_of(FEATURE_NAME) => {
                    return Err(ENDLESS.into());
                }
                Ok(BITMAPS) if bytes >= 4 => {
                    found.bitmaps = Fields::read(file, at, 4)?.number(0, 4)
                }
                _ => {}
            }
            at += bytes.next_multiple_of(8);
        }
        Ok((found, false))
    }

    fn backing_name(
        &self,
        file: &File,
        (offset, bytes): (u64, u64),
    ) -> Result<Option<String>, String> {
        if offset == 0 {
            return Ok(None);
        }
        let is_inside =
            offset.checked_add(bytes).is_some_and(|end| end < self.cluster()) && bytes <= MOST_NAME;
        if !is_inside || bytes == 0 {
            return Err("is damaged: the name of its backing file is not inside the header".into());
        }
        Fields::read(file, offset, bytes)?.text().map(Some)
    }
}

/// Returns the flaw that prevents writing the image; fails for features that rvmm does not support.
fn incompatible(bits: u64) -> Result<Option<Flaw>, String> {
    let what = match (bits & !u64::from(MARKS)).trailing_zeros() {
        64 if bits & u64::from(CORRUPT) != 0 => return Ok(Some(Flaw::Corrupt)),
        64 if bits & u64::from(DIRTY) != 0 => return Ok(Some(Flaw::Dirty)),
        64 => return Ok(None),
        2 => "has its data in another file, which is not supported (qemu-img convert it)",
        3 => "is not compressed by deflate, which is not supported (qemu-img convert it)",
        4 => "has extended L2 entries, which are not supported (qemu-img convert it)",
        _ => "has features that rvmm does not support (qemu-img convert it)",
    };
    Err(what.into())
}

/// A piece of the image with big-endian numbers.
struct Fields(Vec<u8>);

impl Fields {
    fn read(file: &File, at: u64, bytes: u64) -> Result<Self, String> {
        let mut piece = vec![0; usize::try_from(bytes).unwrap_or(0)];
        file.read_exact_at(&mut piece, at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "is not a qcow2 image: its header is truncated".into(),
            _ => format!("cannot be read: {error}"),
        })?;
        Ok(Self(piece))
    }

    /// The number at an offset; zero beyond the end of the piece.
    fn number(&self, at: usize, bytes: usize) -> u64 {
        let bytes = self.0.get(at..at + bytes).unwrap_or_default();
        bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn text(self) -> Result<String, String> {
        let is_text = |text: &String| !text.contains('\0');
        String::from_utf8(self.0)
            .ok()
            .filter(is_text)
            .ok_or_else(|| "has a backing file whose name or format is not UTF-8 text".into())
    }
}
