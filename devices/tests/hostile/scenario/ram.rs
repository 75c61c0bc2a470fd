//! Guest RAM in two ranges with a hole between them, and a copy of the driver's contents: differences were written by the
//! device, which has to have noted them ([`DmaMemory::note_written`]).

use std::ops::Range;
use std::sync::{Arc, Mutex};

use rvmm_devices::virtio::{DmaMemory, GuestMemoryMmap, WriteLog};
use vm_memory::{Bytes, GuestAddress};

/// The ranges of RAM: rings and buffers in the first, indirect tables in the second.
pub(crate) const LOW: Range<u64> = 0x8000_0000..0x8004_0000;
pub(crate) const HIGH: Range<u64> = 0x8010_0000..0x8011_0000;

/// Number of bytes that are compared at once.
const BLOCK: usize = 256;

/// Guest RAM and the driver's copy of it.
pub(crate) struct Ram {
    pub(crate) memory: GuestMemoryMmap,
    pieces: [(Range<u64>, Vec<u8>); 2],
    /// As large as the larger range.
    scratch: Vec<u8>,
}

impl Ram {
    pub(crate) fn new() -> Self {
        let ranges = [LOW, HIGH]
            .map(|piece| (GuestAddress(piece.start), (piece.end - piece.start) as usize));
        let copy = |piece: Range<u64>| (piece.clone(), vec![0; (piece.end - piece.start) as usize]);
        Self {
            memory: GuestMemoryMmap::from_ranges(&ranges).unwrap(),
            pieces: [copy(LOW), copy(HIGH)],
            scratch: vec![0; (LOW.end - LOW.start) as usize],
        }
    }

    /// True if this range is RAM without a hole.
    pub(crate) fn holds(&self, addr: u64, len: u64) -> bool {
        let Some(end) = addr.checked_add(len) else { return false };
        self.pieces.iter().any(|(piece, _)| piece.contains(&addr) && end <= piece.end)
    }

    /// Writes as the driver; bytes outside of RAM are left out.
    pub(crate) fn poke(&mut self, addr: u64, bytes: &[u8]) {
        if !self.holds(addr, bytes.len() as u64) {
            let one_by_one = bytes.iter().enumerate();
            let there = one_by_one.map(|(at, byte)| (addr.wrapping_add(at as u64), *byte));
            let there: Vec<_> = there.filter(|(at, _)| self.holds(*at, 1)).collect();
            return there.into_iter().for_each(|(at, byte)| self.poke(at, &[byte]));
        }
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
        let home = self.pieces.iter_mut().find(|(piece, _)| piece.contains(&addr));
        let Some((piece, copy)) = home else { return };
        let at = (addr - piece.start) as usize;
        copy[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Reads as the driver.
    pub(crate) fn peek<const N: usize>(&self, addr: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).ok()?;
        Some(bytes)
    }

    pub(crate) fn peek16(&self, addr: u64) -> u16 {
        self.peek(addr).map_or(0, u16::from_le_bytes)
    }

    /// The ranges that the device has changed since the last call.
    pub(crate) fn changes(&mut self) -> Vec<Range<u64>> {
        let mut changes: Vec<Range<u64>> = Vec::new();
        for (piece, copy) in &mut self.pieces {
            let now = &mut self.scratch[..copy.len()];
            self.memory.read_slice(now, GuestAddress(piece.start)).unwrap();
            if now == copy {
                continue;
            }
            let blocks = now.chunks(BLOCK).zip(copy.chunks(BLOCK));
            for (start, (now, before)) in (piece.start..).step_by(BLOCK).zip(blocks) {
                if now == before {
                    continue;
                }
                let bytes = (start..).zip(now.iter().zip(before));
                for (at, _) in bytes.filter(|(_, (now, before))| now != before) {
                    match changes.last_mut() {
                        Some(last) if last.end == at => last.end = at + 1,
                        _ => changes.push(at..at + 1),
                    }
                }
            }
            copy.copy_from_slice(now);
        }
        changes
    }
}

/// The device's RAM. It counts the bytes that are released to the host, and keeps them; and it records what the device notes as
/// written. A clone has the same records.
#[derive(Clone)]
pub(crate) struct Watched {
    memory: GuestMemoryMmap,
    released: Arc<Mutex<u64>>,
    noted: Arc<Mutex<Vec<Range<u64>>>>,
}

impl Watched {
    pub(crate) fn new(memory: GuestMemoryMmap) -> Self {
        Self { memory, released: Arc::default(), noted: Arc::default() }
    }

    /// Number of bytes that were released since the last call.
    pub(crate) fn take_released(&self) -> u64 {
        std::mem::take(&mut *self.released.lock().unwrap())
    }

    /// The ranges that were noted since the last call: ascending, and apart from each other.
    pub(crate) fn take_noted(&self) -> Vec<Range<u64>> {
        let mut noted = std::mem::take(&mut *self.noted.lock().unwrap());
        noted.sort_unstable_by_key(|range| range.start);
        let mut united: Vec<Range<u64>> = Vec::new();
        for range in noted {
            match united.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => united.push(range),
            }
        }
        united
    }
}

impl DmaMemory for Watched {
    fn view(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn records_writes(&self) -> bool {
        true
    }

    fn note_written(&self, addr: u64, len: u64) {
        self.noted.lock().unwrap().push(addr..addr.saturating_add(len));
    }

    fn write_log(&self) -> Option<WriteLog> {
        None
    }

    fn release(&self, _addr: u64, len: u64) {
        *self.released.lock().unwrap() += len;
    }
}

/// The first range of `changes` that is not within one of `noted`, which are apart from each other.
pub(crate) fn not_noted<'a>(
    changes: &'a [Range<u64>],
    noted: &[Range<u64>],
) -> Option<&'a Range<u64>> {
    changes.iter().find(|change| {
        let before = noted.partition_point(|range| range.start <= change.start);
        let around = before.checked_sub(1).map(|at| &noted[at]);
        around.is_none_or(|range| range.end < change.end)
    })
}
