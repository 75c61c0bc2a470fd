//! The stamp of a file whose contents were checked: as long as the file has it, nobody has changed the file since.
//!
//! The kernel sets the time of the last change of an inode (`ctime`), and nobody else can. So a memory file that is still the same inode
//! with the same times has the contents that it had when it was checked, and needs not be read again before it is used. A snapshot that
//! was copied has another inode: it is checked whole, once.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How long to wait for a tick of the kernel's clock, and how often at most.
const TICK: Duration = Duration::from_millis(1);
const MOST_TICKS: u32 = 100;

/// The identity and the times of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of a file now.
    ///
    /// # Errors
    /// The file cannot be examined.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    /// The stamp of a file that was just written or checked, once every later change gets another time: the clock of inodes goes in steps
    /// of milliseconds. `None` if it does not go on.
    ///
    /// # Errors
    /// As for [`Stamp::of`].
    pub(super) fn of_settled(file: &File) -> io::Result<Option<Self>> {
        let stamp = Self::of(file)?;
        for _ in 0..MOST_TICKS {
            let now = clock_gettime(ClockId::RealtimeCoarse);
            if (now.tv_sec, now.tv_nsec) > stamp.changed {
                // What was changed during the wait has another time.
                return Self::of(file).map(|later| (later == stamp).then_some(stamp));
            }
            thread::sleep(TICK);
        }
        Ok(None)
    }

    /// The stamp as a line.
    pub(super) fn text(&self) -> String {
        let Self { device, inode, size, modified, changed } = self;
        let ((modified, modified_ns), (changed, changed_ns)) = (modified, changed);
        format!("{device} {inode} {size} {modified}.{modified_ns:09} {changed}.{changed_ns:09}\n")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn every_change_of_a_file_changes_its_stamp_however_soon_it_is() {
        let file = tempfile::tempfile().unwrap();
        for round in 0..20_u8 {
            file.write_all_at(&[round], 0).unwrap();
            let stamp = Stamp::of_settled(&file).unwrap().unwrap();
            assert_eq!(Stamp::of(&file).unwrap().text(), stamp.text());
            file.write_all_at(&[round ^ 0x80], 0).unwrap();
            assert_ne!(Stamp::of(&file).unwrap().text(), stamp.text());
        }
    }
}
