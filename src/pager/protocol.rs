//! The messages between a pager and the host that it fetches pages from: little endian, of fixed sizes but for the pages.
//!
//! ```text
//! server  "rvmmpage"  version: u32 = 1  page: u32 = 4096  RAM: u64                          once
//! pager   offset: u64  length: u32  0: u32                                                  for each request
//! server  kind: u32  length: u32  offset: u64  checksum: u64, then with kind 1 the bytes    for each reply
//! ```

use std::ops::Range;

use crate::memory::PAGE;

const MAGIC: [u8; 8] = *b"rvmmpage";
const VERSION: u32 = 1;
const PAGE_SIZE: u32 = 4096;

/// Maximum length of a request in bytes.
pub(super) const MOST: u32 = 1 << 20;

pub(super) const GREETING: usize = 24;
pub(super) const REQUEST: usize = 16;
pub(super) const REPLY: usize = 24;

/// Kind of a reply: all zeroes, without bytes.
const ZEROES: u32 = 0;
/// Bytes follow.
const BYTES: u32 = 1;
/// The request is invalid, or the server cannot read the pages.
const REFUSED: u32 = 2;

/// What a server begins with: the size of RAM in bytes.
pub(super) fn greeting(size: u64) -> [u8; GREETING] {
    join([MAGIC, pair(VERSION, PAGE_SIZE), size.to_le_bytes()])
}

/// The size of RAM in a greeting.
pub(super) fn read_greeting(bytes: &[u8; GREETING]) -> Result<u64, String> {
    let [magic, format, size] = split(bytes);
    if magic != MAGIC {
        return Err("it is no rvmm pager --serve".into());
    }
    let (version, page) = halves(format);
    if (version, page) != (VERSION, PAGE_SIZE) {
        return Err(format!(
            "it has version {version} of the protocol and pages of {page} bytes, and this program version {VERSION} and {PAGE_SIZE} bytes"
        ));
    }
    let size = u64::from_le_bytes(size);
    if size == 0 || !size.is_multiple_of(PAGE) || size > 1 << 48 {
        return Err(format!("its memory has {size} bytes"));
    }
    Ok(size)
}

/// A request of a range of RAM.
pub(super) fn request(offset: u64, len: u32) -> [u8; REQUEST] {
    join([offset.to_le_bytes(), pair(len, 0)])
}

/// The range that is requested, if it is one of whole pages inside RAM of this size.
pub(super) fn read_request(bytes: &[u8; REQUEST], size: u64) -> Option<Range<u64>> {
    let [offset, len] = split(bytes);
    let (offset, (len, zero)) = (u64::from_le_bytes(offset), halves(len));
    let end = offset.checked_add(len.into())?;
    let is_whole = offset.is_multiple_of(PAGE) && u64::from(len).is_multiple_of(PAGE);
    (is_whole && len > 0 && len <= MOST && zero == 0 && end <= size).then_some(offset..end)
}

/// A reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    Zeroes,
    /// The bytes, with this checksum, follow.
    Bytes(u64),
    Refused,
}

/// A reply to a request.
pub(super) fn reply(reply: Reply, offset: u64, len: u32) -> [u8; REPLY] {
    let (kind, checksum) = match reply {
        Reply::Zeroes => (ZEROES, 0),
        Reply::Bytes(checksum) => (BYTES, checksum),
        Reply::Refused => (REFUSED, 0),
    };
    join([pair(kind, len), offset.to_le_bytes(), checksum.to_le_bytes()])
}

/// The reply to the request of this range; `None` if it is another one's.
pub(super) fn read_reply(bytes: &[u8; REPLY], offset: u64, len: u32) -> Option<Reply> {
    let [head, at, checksum] = split(bytes);
    let (kind, length) = halves(head);
    if u64::from_le_bytes(at) != offset || length != len {
        return None;
    }
    match kind {
        ZEROES => Some(Reply::Zeroes),
        BYTES => Some(Reply::Bytes(u64::from_le_bytes(checksum))),
        REFUSED => Some(Reply::Refused),
        _ => None,
    }
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    (u64::from(first) | u64::from(second) << 32).to_le_bytes()
}

#[expect(clippy::cast_possible_truncation, reason = "the halves")]
fn halves(bytes: [u8; 8]) -> (u32, u32) {
    let both = u64::from_le_bytes(bytes);
    (both as u32, (both >> 32) as u32)
}

fn join<const WORDS: usize, const BYTES: usize>(words: [[u8; 8]; WORDS]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes.iter_mut().zip(words.iter().flatten()).for_each(|(to, from)| *to = *from);
    bytes
}

fn split<const WORDS: usize, const BYTES: usize>(bytes: &[u8; BYTES]) -> [[u8; 8]; WORDS] {
    let mut words = [[0; 8]; WORDS];
    words.iter_mut().flatten().zip(bytes).for_each(|(to, from)| *to = *from);
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_greeting_of_something_else_is_refused() {
        assert_eq!(read_greeting(&greeting(MIB)), Ok(MIB));
        let mut other = greeting(MIB);
        other[8] = 2;
        assert!(read_greeting(&other).unwrap_err().contains("version 2"));
        assert!(read_greeting(b"HTTP/1.1 400 Bad Request").unwrap_err().contains("no rvmm pager"));
        for size in [0, 100, u64::MAX, 1 << 60] {
            assert!(read_greeting(&greeting(size)).is_err());
        }
    }

    #[test]
    fn a_request_that_leaves_ram_or_is_not_of_whole_pages_is_invalid() {
        assert_eq!(read_request(&request(4096, 8192), MIB), Some(4096..12288));
        assert_eq!(read_request(&request(0, MOST), MIB), Some(0..MIB));
        for (offset, len) in
            [(1, 4096), (0, 1), (0, 0), (MIB, 4096), (MIB - 4096, 8192), (u64::MAX - 4095, 4096)]
        {
            assert_eq!(read_request(&request(offset, len), MIB), None, "{offset} {len}");
        }
        for len in [MOST + 4096, u32::MAX, u32::MAX - 4095] {
            assert_eq!(read_request(&request(0, len), 1 << 40), None, "{len}");
        }
        let mut reserved = request(0, 4096);
        reserved[12] = 1;
        assert_eq!(read_request(&reserved, MIB), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_none(bytes in prop::array::uniform24(any::<u8>()), short in prop::array::uniform16(any::<u8>())) {
            let _ = read_greeting(&bytes);
            let _ = read_reply(&bytes, 0, 4096);
            if let Some(range) = read_request(&short, MIB) {
                prop_assert!(range.end <= MIB && range.start < range.end);
            }
        }

        #[test]
        fn a_reply_is_only_taken_for_its_own_request(at in 0_u64..100, len in 1_u32..100, sum in any::<u64>()) {
            let bytes = reply(Reply::Bytes(sum), at * 4096, len * 4096);
            prop_assert_eq!(read_reply(&bytes, at * 4096, len * 4096), Some(Reply::Bytes(sum)));
            prop_assert_eq!(read_reply(&bytes, at * 4096 + 4096, len * 4096), None);
            prop_assert_eq!(read_reply(&bytes, at * 4096, len * 4096 + 4096), None);
        }
    }
}
