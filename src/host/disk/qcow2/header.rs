//! The header of a qcow2 image (QEMU's docs/interop/qcow2.txt, "Header"), judged before anything else of the image is used.
//!
//! Read and bounded here, although imago reads it again: what it costs to open an image is decided by these fields, and imago
//! takes lengths that the image has no room for. Left out: the names of features, what only writers of snapshots need, and
//! what bitmaps hold.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of the header in version 2, and at least in version 3.
const V2_BYTES: u64 = 72;
const V3_BYTES: u64 = 104;

/// Bits of a cluster's size, as the format and QEMU bound them: 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// Bytes of an L1 table and of a refcount table at most.
const MOST_L1: u64 = 4 << 20;
const MOST_REFTABLE: u64 = 8 << 20;

/// L2 tables that imago keeps, and the bytes that they may have together: 16 TiB of disk with clusters of 2 MiB.
const KEPT_TABLES: u64 = 128;
const MOST_KEPT: u64 = 64 << 20;

/// Bytes of a backing file's name.
const MOST_NAME: u64 = 1023;

/// Header extensions.
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
/// Bytes of an entry of the table of feature names.
const FEATURE_NAME: u64 = 48;

/// Incompatible features: counts may be lower than references; any table may be wrong.
const DIRTY: u8 = 1;
const CORRUPT: u8 = 2;
/// Where the lowest of the incompatible features lie, and which of them keep nobody from reading.
pub(super) const MARKS_AT: u64 = V2_BYTES + 7;
pub(super) const MARKS: u8 = DIRTY | CORRUPT;
/// Autoclear feature: bitmaps agree with the disk.
const HAS_BITMAPS: u64 = 1;

/// What rvmm uses of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) cluster_bits: u32,
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u64,
    /// Bits of a reference count, as a power of two.
    pub(super) refcount_order: u32,
    pub(super) snapshots: u32,
    /// Bitmaps that agree with the disk, until it is written by who does not keep them.
    pub(super) bitmaps: u64,
    /// Why it has to be repaired before it is written.
    pub(super) flaw: Option<Flaw>,
    pub(super) backing: Option<Backing>,
}

/// Why an image is read only until it is repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flaw {
    /// Whoever wrote it with lazy reference counts did not close it. What is read is right.
    Dirty,
    /// QEMU found a table that contradicts another one. What is read may be wrong.
    Corrupt,
}

/// What the extensions of a header say.
#[derive(Debug, Default)]
struct Extensions {
    backing_format: Option<String>,
    bitmaps: u64,
}

/// What an image says about what lies below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) name: String,
    pub(super) format: Option<String>,
}

/// Extensions that reach over what they lie in.
const ENDLESS: &str = "is damaged: the extensions of its header do not end";

impl Header {
    /// Bytes of a cluster.
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
    /// A sentence for the user, without a subject: `is no qcow2 image (...)`.
    pub(super) fn read(file: &File, len: u64) -> Result<Self, String> {
        let first = Fields::read(file, 0, V2_BYTES.min(len))?;
        if first.number(0, 4) != 0x5146_49fb {
            return Err(
                "is no qcow2 image (leave format=qcow2 away if its bytes are the disk's)".into()
            );
        }
        let version = first.number(4, 4);
        let (bytes, order, flaw, autoclear) = match version {
            2 => (V2_BYTES, 4, None, 0),
            3 => {
                let rest = Fields::read(file, V2_BYTES, V3_BYTES - V2_BYTES)?;
                let flaw = incompatible(rest.number(0, 8))?;
                (rest.number(28, 4), rest.number(24, 4), flaw, rest.number(16, 8))
            }
            other => return Err(format!("has version {other} of the format, known are 2 and 3")),
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
            return Err("is damaged: its header has sizes that the format does not know".into());
        }
        header.judge(len)?;
        let name_at = first.number(8, 8);
        let name = header.backing_name(file, (name_at, first.number(16, 4)))?;
        let said = match version {
            // All that concerns us there is the backing file's format. They need no end before its name, and images of
            // other makers have anything where there is no name.
            2 if name.is_some() => header.extensions(file, bytes, name_at)?.0,
            2 => Extensions::default(),
            _ => header.all_extensions(file, bytes)?,
        };
        header.bitmaps = if autoclear & HAS_BITMAPS == 0 { 0 } else { said.bitmaps };
        header.backing = name.map(|name| Backing { name, format: said.backing_format });
        Ok(header)
    }

    /// Whether the sizes fit each other, the file and our memory.
    fn judge(&self, len: u64) -> Result<(), String> {
        let damaged = |what: &str| Err(format!("is damaged: {what}"));
        if self.size < 512 {
            return damaged("its disk has no sector");
        }
        let needed = self.size.div_ceil(self.table_covers());
        let kept = needed.min(KEPT_TABLES) << self.cluster_bits;
        if needed.saturating_mul(8) > MOST_L1 || kept > MOST_KEPT {
            let (size, cluster) = (self.size, self.cluster());
            return Err(format!(
                "has a disk of {size} bytes in clusters of {cluster}, which takes tables larger than rvmm allows (other clusters help: qemu-img convert -O qcow2 -o cluster_size=64k)"
            ));
        }
        if self.l1_entries < needed || self.l1_entries.saturating_mul(8) > MOST_L1 {
            return damaged("its L1 table does not have the size that the disk needs");
        }
        let reftable = self.reftable_clusters << self.cluster_bits;
        if reftable == 0 || reftable > MOST_REFTABLE.max(self.cluster()) {
            return damaged("its table of reference counts has an impossible size");
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
            return damaged("its table of reference counts is not inside the file");
        }
        Ok(())
    }

    /// Looks through the extensions of version 3, which have an end.
    fn all_extensions(&self, file: &File, at: u64) -> Result<Extensions, String> {
        if !(V3_BYTES..=self.cluster()).contains(&at) || !at.is_multiple_of(8) {
            return Err("is damaged: its header has an impossible length".into());
        }
        match self.extensions(file, at, self.cluster())? {
            (said, true) => Ok(said),
            (_, false) => Err(ENDLESS.into()),
        }
    }

    /// Looks through the extensions from `at` up to `end`, inside the first cluster; and whether they have an end of their own.
    fn extensions(&self, file: &File, mut at: u64, end: u64) -> Result<(Extensions, bool), String> {
        let mut said = Extensions::default();
        // Each takes at least eight bytes.
        while at + 8 <= end {
            let head = Fields::read(file, at, 8)?;
            let (kind, bytes) = (head.number(0, 4), head.number(4, 4));
            at += 8;
            if bytes > end - at {
                return Err(ENDLESS.into());
            }
            match u32::try_from(kind) {
                Ok(0) => return Ok((said, true)),
                Ok(BACKING_FORMAT) if bytes <= MOST_NAME => {
                    said.backing_format = Some(Fields::read(file, at, bytes)?.text()?);
                }
                Ok(FEATURE_NAMES) if !bytes.is_multiple_of(FEATURE_NAME) => {
                    return Err(ENDLESS.into());
                }
                Ok(BITMAPS) if bytes >= 4 => said.bitmaps = Fields::read(file, at, 4)?.number(0, 4),
                _ => {}
            }
            at += bytes.next_multiple_of(8);
        }
        Ok((said, false))
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

/// Refuses features without which the image cannot be understood; what keeps it from being written.
fn incompatible(bits: u64) -> Result<Option<Flaw>, String> {
    let what = match (bits & !u64::from(MARKS)).trailing_zeros() {
        64 if bits & u64::from(CORRUPT) != 0 => return Ok(Some(Flaw::Corrupt)),
        64 if bits & u64::from(DIRTY) != 0 => return Ok(Some(Flaw::Dirty)),
        64 => return Ok(None),
        2 => "has its data in another file, which is not supported (qemu-img convert it)",
        3 => "is not compressed by deflate, which is not supported (qemu-img convert it)",
        4 => "has extended L2 entries, which are not supported (qemu-img convert it)",
        _ => "has features that rvmm does not know (qemu-img convert it)",
    };
    Err(what.into())
}

/// A piece of the image with numbers in it, the highest byte first.
struct Fields(Vec<u8>);

impl Fields {
    fn read(file: &File, at: u64, bytes: u64) -> Result<Self, String> {
        let mut piece = vec![0; usize::try_from(bytes).unwrap_or(0)];
        file.read_exact_at(&mut piece, at).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "is no qcow2 image: it ends within its header".into(),
            _ => format!("cannot be read: {error}"),
        })?;
        Ok(Self(piece))
    }

    /// Zero where the piece has ended.
    fn number(&self, at: usize, bytes: usize) -> u64 {
        let bytes = self.0.get(at..at + bytes).unwrap_or_default();
        bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn text(self) -> Result<String, String> {
        let is_text = |text: &String| !text.contains('\0');
        String::from_utf8(self.0)
            .ok()
            .filter(is_text)
            .ok_or_else(|| "names its backing file by what is no text".into())
    }
}
