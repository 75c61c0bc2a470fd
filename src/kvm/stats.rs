//! KVM's own counters of a vCPU (kernel, `Documentation/virt/kvm/api.rst` 4.135, KVM_GET_STATS_FD): reading them costs the guest
//! nothing. Histograms are left out: they do not fit into a table of numbers.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::hypervisor::Counters;
use crate::vcpu::restarts::Exits;

/// Maximum number of bytes that are read of such a file. Kernels have some 4 KiB.
const MAX_FILE: usize = 256 << 10;

/// Bytes of the file's header, and of a descriptor without its name.
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;

/// The counters of one vCPU.
pub(super) struct HartCounters {
    hart: u32,
    file: File,
}

impl HartCounters {
    pub(super) fn new(hart: u32, file: File) -> Self {
        Self { hart, file }
    }
}

impl HartCounters {
    /// Reads all of the file.
    fn read_file(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; MAX_FILE];
        let mut have = 0;
        while let Some(rest) = bytes.get_mut(have..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, have as u64)? {
                0 => break,
                count => have += count,
            }
        }
        bytes.truncate(have);
        Ok(bytes)
    }
}

impl Counters for HartCounters {
    fn hart(&self) -> u32 {
        self.hart
    }

    fn read(&self) -> io::Result<Vec<(String, u64)>> {
        parse(&self.read_file()?).ok_or_else(malformed)
    }

    fn exits(&self) -> io::Result<Box<dyn Exits>> {
        let offsets = offsets(&self.read_file()?).ok_or_else(malformed)?;
        let exits = offsets.into_iter().find(|(name, _)| name == "exits");
        let (_, offset) = exits.ok_or_else(|| io::Error::other("KVM does not count exits"))?;
        Ok(Box::new(ExitCounter { file: self.file.try_clone()?, offset: offset as u64 }))
    }
}

/// The exit counter of a vCPU, read without the others.
struct ExitCounter {
    file: File,
    offset: u64,
}

impl Exits for ExitCounter {
    fn count(&self) -> io::Result<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.offset)?;
        Ok(u64::from_le_bytes(value))
    }
}

fn malformed() -> io::Error {
    io::Error::other("KVM's counters are malformed")
}

/// The scalar counters in the file, by name and in the file's order.
fn parse(bytes: &[u8]) -> Option<Vec<(String, u64)>> {
    let value = |(name, at): (String, usize)| {
        let value = bytes.get(at..at.checked_add(8)?)?;
        Some((name, u64::from_le_bytes(value.try_into().ok()?)))
    };
    offsets(bytes)?.into_iter().map(value).collect()
}

/// The file offsets of the scalar counters, by name.
fn offsets(bytes: &[u8]) -> Option<Vec<(String, usize)>> {
    let word = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(4)?)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let (name_size, count, descriptors, data) = (word(4)?, word(8)?, word(16)?, word(20)?);
    let stride = DESCRIPTOR.checked_add(name_size)?;
    if bytes.len() < HEADER || count > MAX_FILE / DESCRIPTOR {
        return None;
    }
    let mut counters = Vec::new();
    for index in 0..count {
        let at = descriptors.checked_add(index.checked_mul(stride)?)?;
        let flags = word(at)?;
        let size = word(at.checked_add(4)?)? >> 16;
        let offset = word(at.checked_add(8)?)?;
        let name = bytes.get(at.checked_add(DESCRIPTOR)?..at.checked_add(stride)?)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let value = data.checked_add(offset)?;
        bytes.get(value..value.checked_add(8)?)?;
        // Types above 2 are histograms.
        if flags & 0xf <= 2 && size == 1 {
            counters.push((String::from_utf8_lossy(name).into_owned(), value));
        }
    }
    Some(counters)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with names of 16 bytes, from (flags, size, offset, name), with the numbers 100, 101, ... as data.
    fn file(counters: &[(u32, u16, u32, &str)]) -> Vec<u8> {
        let (names, count) = (16, u32::try_from(counters.len()).unwrap());
        let data = 24 + 16 + count * 32;
        let mut bytes: Vec<u8> = [0, names, count, 24, 40, data].map(u32::to_le_bytes).concat();
        bytes.extend(b"kvm-1/vcpu-0\0\0\0\0");
        for (flags, size, offset, name) in counters {
            bytes.extend(flags.to_le_bytes());
            bytes.extend([0, 0]);
            bytes.extend(size.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            bytes.extend([0; 4]);
            let mut padded = name.as_bytes().to_vec();
            padded.resize(16, 0);
            bytes.extend(padded);
        }
        bytes.extend((100_u64..110).flat_map(u64::to_le_bytes));
        bytes
    }

    #[test]
    fn scalar_counters_are_read_by_name_and_histograms_are_not() {
        let bytes = file(&[(0, 1, 0, "exits"), (4, 8, 8, "halt_hist"), (1, 1, 72, "blocking")]);
        assert_eq!(parse(&bytes), Some(vec![("exits".into(), 100), ("blocking".into(), 109)]));
        let data = bytes.len() - 80;
        assert_eq!(
            offsets(&bytes),
            Some(vec![("exits".into(), data), ("blocking".into(), data + 72)])
        );
    }

    #[test]
    fn a_malformed_file_is_refused() {
        let bytes = file(&[(0, 1, 0, "exits")]);
        for length in 0..bytes.len() - 80 {
            assert_eq!(parse(&bytes[..length]), None, "{length}");
        }
        for at in [4, 8, 16, 20, 48] {
            let mut broken = bytes.clone();
            broken[at..at + 4].fill(0xff);
            assert_eq!(parse(&broken), None, "{at}");
        }
    }
}
