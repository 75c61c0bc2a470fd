//! Flash memory: a file, or the host's own flash through /dev/mem (mem(4)).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::OFlags;
use rvmm_devices::HostError;
use rvmm_devices::flash::{FlashMemory, FlashPlan, MAX_SIZE};

use crate::config::quoted;
use crate::memory::{PAGE, Rom};

/// Maps the file or the physical memory that `plan` names.
pub(super) fn open(plan: &FlashPlan) -> Result<Box<dyn FlashMemory>, HostError> {
    match plan {
        FlashPlan::File(path) => {
            let name = quoted(&path.to_string_lossy());
            let refused =
                |error| HostError::os(format!("Cannot use {name} as flash memory"), error);
            // Without NONBLOCK, opening a FIFO would block.
            let flags = OFlags::NONBLOCK.bits().cast_signed();
            let file =
                OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(refused)?;
            let metadata = file.metadata().map_err(refused)?;
            if !metadata.is_file() || !(1..=MAX_SIZE).contains(&metadata.len()) {
                let what = format!(
                    "Cannot use {name} as flash memory: it is not a file of 1 to {MAX_SIZE} bytes"
                );
                return Err(HostError::invalid(what));
            }
            let size = metadata.len().next_multiple_of(PAGE);
            let rom = map(file.try_clone().map_err(refused)?, 0, size).map_err(refused)?;
            Ok(Box::new(FileFlash { file, rom }))
        }
        FlashPlan::Physical { addr, size } => {
            let refused = |error| {
                let what = "Cannot map the host's flash (this needs root, and a range that no kernel driver has reserved)";
                HostError::os(format!("{what}: {size:#x} bytes at {addr:#x} of /dev/mem"), error)
            };
            let memory = File::open("/dev/mem").map_err(refused)?;
            Ok(Box::new(HostFlash { rom: map(memory, *addr, *size).map_err(refused)? }))
        }
    }
}

fn map(file: File, offset: u64, size: u64) -> io::Result<Rom> {
    Rom::of(file, offset, size)
}

/// A file. It is read by pread(2) and not through its mapping, so that rvmm gets no SIGBUS if the file is truncated.
struct FileFlash {
    file: File,
    rom: Rom,
}

impl FlashMemory for FileFlash {
    fn size(&self) -> u64 {
        self.rom.size() as u64
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            match self.file.read_at(rest, at) {
                // The last page extends beyond the file.
                Ok(0) => {
                    rest.fill(0);
                    return Ok(());
                }
                Ok(done) => {
                    at = at.saturating_add(done as u64);
                    rest = rest.get_mut(done..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn host_address(&self) -> u64 {
        self.rom.host_address()
    }
}

/// The host's physical memory.
struct HostFlash {
    rom: Rom,
}

impl FlashMemory for HostFlash {
    fn size(&self) -> u64 {
        self.rom.size() as u64
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.rom.read(usize::try_from(offset).map_err(io::Error::other)?, data)
    }

    fn host_address(&self) -> u64 {
        self.rom.host_address()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn of(path: &Path) -> Result<Box<dyn FlashMemory>, HostError> {
        open(&FlashPlan::File(path.into()))
    }

    #[test]
    fn a_file_is_read_with_zeroes_up_to_a_whole_page_also_after_it_was_cut_short() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [7; 5000]).unwrap();
        let flash = of(file.path()).unwrap();
        assert_eq!(flash.size(), 8192);
        let read = |offset| {
            let mut data = [0xee; 4];
            flash.read(offset, &mut data).unwrap();
            data
        };
        assert_eq!((read(0), read(4998), read(8188)), ([7; 4], [7, 7, 0, 0], [0; 4]));
        fs::write(file.path(), [7; 2]).unwrap();
        assert_eq!((read(0), read(4998)), ([7, 7, 0, 0], [0; 4]));
    }

    #[test]
    fn a_file_that_cannot_be_flash_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty");
        fs::write(&empty, "").unwrap();
        for path in [empty.as_path(), folder.path(), Path::new("/nowhere"), Path::new("/dev/null")]
        {
            let what = of(path).err().unwrap().to_string();
            assert!(what.starts_with("Cannot use ") && what.contains("as flash memory"), "{what}");
        }
    }
}
