//! Consistency check of the tables of a qcow2 image (QEMU's docs/interop/qcow2.txt, "Host cluster management", "Cluster
//! mapping"), made before the image is written.
//!
//! Writing an image allocates clusters whose refcount is zero. If refcounts are lower than the references, a cluster is
//! allocated twice, and a guest that writes its disk may overwrite the image's tables. So an image is written only if the
//! refcount of every cluster covers its references, tables share no clusters, and all references are inside the file.
//! Refcounts that are too high only waste space: a killed machine may leave such ones behind.
//!
//! The check reads all tables: 1/8192 of the disk with clusters of 64 KiB. Left out: tables of snapshots, since images with
//! snapshots are not written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::header::ImageHeader;

/// Limit of the clusters of a file: 4 TiB in clusters of 64 KiB. A count in memory takes two bytes.
const MOST_CLUSTERS: u64 = 1 << 26;

/// Marks a table's cluster in place of a number of references.
const TABLE: u16 = u16::MAX;

/// Mask of the offset in an entry of an L1, L2 or refcount table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Reserved bits in an entry of an L1 table, an L2 table, and a refcount table.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const REFTABLE_RESERVED: u64 = 0x1ff;
/// The bit of an L2 entry for a compressed cluster.
const COMPRESSED: u64 = 1 << 62;

/// Checks an image of `len` bytes.
///
/// # Errors
/// The inconsistency, as a sentence without a subject.
pub(super) fn check(file: &File, header: &ImageHeader, len: u64) -> Result<(), String> {
    let clusters = len.div_ceil(header.cluster());
    if clusters > MOST_CLUSTERS {
        return Err(format!(
            "has {clusters} clusters, more than {MOST_CLUSTERS} (convert it to larger clusters: qemu-img convert -O qcow2 -o cluster_size=1M)"
        ));
    }
    let count = usize::try_from(clusters).unwrap_or(0);
    let mut tables = Tables { file, header, references: vec![0; count] };
    tables.run().map_err(|what| format!("is damaged: {what} (repair it: qemu-img check -r all)"))
}

struct Tables<'a> {
    file: &'a File,
    header: &'a ImageHeader,
    /// References to each cluster of the file.
    references: Vec<u16>,
}

impl Tables<'_> {
    fn run(&mut self) -> Result<(), String> {
        let cluster = self.header.cluster();
        self.own(0, 1)?;
        let (at, bytes) = (self.header.l1_offset, self.header.l1_entries * 8);
        self.own(at, bytes.div_ceil(cluster))?;
        let l1 = self.entries(at, bytes)?;
        let (at, count) = (self.header.reftable_offset, self.header.reftable_clusters);
        self.own(at, count)?;
        let blocks = self.entries(at, count * cluster)?;
        for block in &blocks {
            self.own_entry(*block, REFTABLE_RESERVED)?;
        }
        for table in &l1 {
            self.own_entry(*table, L1_RESERVED)?;
        }
        for table in l1.iter().filter(|table| **table & OFFSET != 0) {
            for entry in self.entries(table & OFFSET, cluster)? {
                self.refer(entry)?;
            }
        }
        self.count(&blocks)
    }

    /// Reads big-endian numbers; zeroes beyond the end of the file.
    fn entries(&self, at: u64, bytes: u64) -> Result<Vec<u64>, String> {
        let raw = self.bytes(at, bytes)?;
        let number = |entry: &[u8]| entry.try_into().map_or(0, u64::from_be_bytes);
        Ok(raw.chunks(8).map(number).collect())
    }

    fn bytes(&self, at: u64, bytes: u64) -> Result<Vec<u8>, String> {
        let mut raw = vec![0; usize::try_from(bytes).unwrap_or(0)];
        let mut done = 0;
        while let Some(rest) = raw.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, at + done as u64) {
                Ok(0) => break,
                Ok(more) => done += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("a table cannot be read: {error}")),
            }
        }
        Ok(raw)
    }

    /// Marks the cluster that an entry refers to as a table; fails if it has another use.
    fn own_entry(&mut self, entry: u64, reserved: u64) -> Result<(), String> {
        if entry & reserved != 0 {
            return Err(format!("the entry {entry:#x} of a table has reserved bits"));
        }
        if entry & OFFSET == 0 { Ok(()) } else { self.own(entry & OFFSET, 1) }
    }

    fn own(&mut self, at: u64, count: u64) -> Result<(), String> {
        for place in self.places(at, count)? {
            if std::mem::replace(place, TABLE) != 0 {
                return Err(format!("two tables share a cluster at or after {at:#x}"));
            }
        }
        Ok(())
    }

    /// The reference counts of the `count` clusters at `at`.
    fn places(&mut self, at: u64, count: u64) -> Result<&mut [u16], String> {
        let first = at >> self.header.cluster_bits;
        let range = first..first.saturating_add(count);
        let index = |number| usize::try_from(number).unwrap_or(usize::MAX);
        let is_aligned = at.is_multiple_of(self.header.cluster());
        self.references
            .get_mut(index(range.start)..index(range.end))
            .filter(|_| is_aligned)
            .ok_or_else(|| format!("a table refers to {at:#x}, which is no cluster of the file"))
    }

    /// Counts the references of an L2 entry.
    fn refer(&mut self, entry: u64) -> Result<(), String> {
        let bits = self.header.cluster_bits;
        let (at, count) = if entry & COMPRESSED == 0 {
            if entry & L2_RESERVED != 0 {
                return Err(format!("the entry {entry:#x} of an L2 table has reserved bits"));
            }
            (entry & OFFSET, u64::from(entry & OFFSET != 0))
        } else {
            if entry >> 63 != 0 {
                return Err(format!("the entry {entry:#x} of an L2 table has reserved bits"));
            }
            let width = 70 - bits;
            let at = entry & ((1 << width) - 1) & 0x00ff_ffff_ffff_ffff;
            let sectors = ((entry & (COMPRESSED - 1)) >> width) + 1;
            let first = at >> bits << bits;
            let end = (at & !511) + sectors * 512;
            (first, (end - first).div_ceil(self.header.cluster()))
        };
        for place in self.places(at, count)? {
            if *place == TABLE {
                return Err(format!("data overlaps the table at or after {at:#x}"));
            }
            *place = (*place + 1).min(TABLE - 1);
        }
        Ok(())
    }

    /// Compares the references with the image's refcounts.
    fn count(&self, blocks: &[u64]) -> Result<(), String> {
        let order = self.header.refcount_order;
        let in_block = 1_usize << (self.header.cluster_bits + 3 - order);
        for (number, references) in self.references.chunks(in_block).enumerate() {
            let block = blocks.get(number).copied().unwrap_or(0) & OFFSET;
            let counts = match block {
                0 => Vec::new(),
                at => self.bytes(at, self.header.cluster())?,
            };
            for (index, references) in references.iter().enumerate() {
                let needed = if *references == TABLE { 1 } else { u64::from(*references) };
                if needed > refcount(&counts, index, order) {
                    let cluster = number * in_block + index;
                    return Err(format!("cluster {cluster} has more references than its refcount"));
                }
            }
        }
        Ok(())
    }
}

/// The refcount `index` of a block of refcounts of `1 << order` bits; zero beyond its end.
fn refcount(block: &[u8], index: usize, order: u32) -> u64 {
    if order < 3 {
        let in_byte = 8 >> order;
        let byte = block.get(index / in_byte).copied().unwrap_or(0);
        let shift = (index % in_byte) << order;
        return u64::from(byte >> shift) & ((1 << (1 << order)) - 1);
    }
    let bytes = 1 << (order - 3);
    let count = block.get(index * bytes..(index + 1) * bytes).unwrap_or_default();
    count.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
