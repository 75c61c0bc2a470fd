//! The one message of a machine to its pager, that of Firecracker: where the guest's memory is in the machine's process, in JSON, and
//! with it the userfaultfd.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::wire::wait;
use crate::memory::{GuestRam, PAGE};

/// Maximum length of the message in bytes, and of its list. Firecracker's handlers take 1024 bytes.
const MOST_BYTES: usize = 64 << 10;
const MOST_REGIONS: usize = 64;

/// A part of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Region {
    /// Its address in the machine's process.
    pub(super) base_host_virt_addr: u64,
    /// Bytes.
    pub(super) size: u64,
    /// Where its contents are in the saved memory.
    pub(super) offset: u64,
    /// Bytes of a page.
    #[serde(default)]
    pub(super) page_size: u64,
    /// The same, in bytes, too: an older name, which some programs still read.
    #[serde(default)]
    pub(super) page_size_kib: u64,
}

impl Region {
    /// All of RAM.
    pub(super) fn of(ram: &GuestRam) -> Self {
        Self {
            base_host_virt_addr: ram.host_address(),
            size: ram.span().size,
            offset: 0,
            page_size: PAGE,
            page_size_kib: PAGE,
        }
    }

    /// True if pages of 4096 bytes of a memory of this size can fill it.
    fn is_valid(&self, memory: u64) -> bool {
        let Self { base_host_virt_addr: base, size, offset, page_size, page_size_kib } = *self;
        let is_page = |number: u64| number.is_multiple_of(PAGE);
        let page = if page_size == 0 { page_size_kib } else { page_size };
        matches!(page, 0 | PAGE)
            && is_page(base)
            && is_page(offset)
            && is_page(size)
            && size > 0
            && base.checked_add(size).is_some()
            && offset.checked_add(size).is_some_and(|end| end <= memory)
    }
}

/// Sends the message. Does not wait: a new socket takes it.
///
/// # Errors
/// The pager has closed the connection.
pub(super) fn send(socket: &impl AsFd, regions: &[Region], faults: &impl AsFd) -> io::Result<()> {
    let body = serde_json::to_vec(regions).map_err(io::Error::other)?;
    let descriptors = [faults.as_fd()];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let sent = sendmsg(socket, &[IoSlice::new(&body)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == body.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives the message within a time.
///
/// # Errors
/// `TimedOut`; `UnexpectedEof` if the machine ends before; `InvalidData` for anything else than such a message.
pub(super) fn receive(socket: &impl AsFd, limit: Duration) -> io::Result<(Vec<Region>, OwnedFd)> {
    let until = Instant::now() + limit;
    let (mut body, mut faults) = (Vec::new(), None);
    loop {
        wait(socket, PollFlags::IN, Some(until))?;
        let mut part = [0; 4096];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let count = match recvmsg(socket, &mut [IoSliceMut::new(&mut part)], &mut control, flags) {
            Ok(received) => received.bytes,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                // More than one are closed.
                faults = faults.or(descriptors.last());
            }
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        body.extend_from_slice(part.get(..count).unwrap_or_default());
        match serde_json::from_slice::<Vec<Region>>(&body) {
            Ok(regions) => {
                let faults = faults.ok_or_else(|| invalid("it has no userfaultfd"))?;
                return Ok((regions, faults));
            }
            Err(error) if error.is_eof() && body.len() <= MOST_BYTES => {}
            Err(error) => return Err(invalid(&error.to_string())),
        }
    }
}

/// Checks the regions of a machine whose memory has this size.
///
/// # Errors
/// `InvalidData` with what is wrong.
pub(super) fn check(regions: &[Region], memory: u64) -> io::Result<()> {
    if regions.is_empty() || regions.len() > MOST_REGIONS {
        return Err(invalid(&format!("it has {} regions", regions.len())));
    }
    let total = regions.iter().fold(0, |sum: u64, region| sum.saturating_add(region.size));
    if total != memory {
        return Err(invalid(&format!(
            "its memory has {total} bytes, and the snapshot's {memory}: they do not belong together"
        )));
    }
    match regions.iter().find(|region| !region.is_valid(memory)) {
        None => Ok(()),
        Some(region) => Err(invalid(&format!(
            "a region is outside of the memory or has pages of another size than {PAGE} bytes: {region:?}"
        ))),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MIB: u64 = 1 << 20;

    fn region() -> Region {
        Region {
            base_host_virt_addr: 0x7f00_0000_0000,
            size: MIB,
            offset: 0,
            page_size: 4096,
            page_size_kib: 4096,
        }
    }

    #[test]
    fn the_message_is_firecrackers() {
        let (near, far) = UnixStream::pair().unwrap();
        send(&near, &[region()], &tempfile::tempfile().unwrap()).unwrap();
        let (regions, _) = receive(&far, SECOND).unwrap();
        assert_eq!(regions, [region()]);
        let text = serde_json::to_string(&regions).unwrap();
        assert_eq!(
            text,
            "[{\"base_host_virt_addr\":139637976727552,\"size\":1048576,\"offset\":0,\"page_size\":4096,\"page_size_kib\":4096}]"
        );
        // Of one whose list is older or newer.
        let older: Vec<Region> = serde_json::from_str(
            "[{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0,\"new\":[1]}]",
        )
        .unwrap();
        check(&older, 4096).unwrap();
    }

    #[test]
    fn a_message_that_is_cut_or_is_none_is_refused() {
        let message = |bytes: &[u8]| {
            let (mut near, far) = UnixStream::pair().unwrap();
            near.write_all(bytes).unwrap();
            drop(near);
            receive(&far, SECOND).unwrap_err()
        };
        assert_eq!(message(b"").kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(message(b"[{\"base_host").kind(), io::ErrorKind::UnexpectedEof);
        for text in ["GET / HTTP/1.1\r\n", "{}", "[1]", "[{\"size\":1}]", "[]"] {
            assert_eq!(message(text.as_bytes()).kind(), io::ErrorKind::InvalidData, "{text}");
        }
        let long = format!("[{}", " ".repeat(MOST_BYTES + 1));
        assert_eq!(message(long.as_bytes()).kind(), io::ErrorKind::InvalidData);
        let (_near, far) = UnixStream::pair().unwrap();
        let late = receive(&far, Duration::from_millis(10)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn regions_that_are_not_the_snapshots_memory_are_refused() {
        check(&[region()], MIB).unwrap();
        let half = Region { size: MIB / 2, ..region() };
        check(&[half, Region { offset: MIB / 2, ..half }], MIB).unwrap();
        for regions in [
            &[][..],
            &[half],
            &[region(), region()],
            &[Region { size: u64::MAX, ..half }, Region { size: MIB + 1, ..half }],
            &[Region { offset: 4096, ..region() }],
            &[Region { offset: u64::MAX - 4095, ..region() }],
            &[Region { base_host_virt_addr: u64::MAX - 4095, ..region() }],
            &[Region { base_host_virt_addr: 1, ..region() }],
            &[Region { page_size: 2 << 20, ..region() }],
            &[Region { page_size: 0, page_size_kib: 2 << 20, ..region() }],
            &[Region { size: 0, ..region() }, region()],
            &[Region { size: 100, ..half }, Region { size: MIB - 100, ..half }],
            &[Region { size: MIB / 64 - 4096, ..half }; 65],
        ] {
            assert!(check(regions, MIB).is_err(), "{regions:?}");
        }
    }
}
