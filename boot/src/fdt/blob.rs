//! A reader of device tree blobs that is independent of the library that writes them.
//!
//! It implements the flattened format (Devicetree Specification 0.4, chapter 5) and trusts nothing: no size,
//! no offset, no string terminator. It reads every byte of the structure block at most once and builds no
//! tree, so a hostile blob costs neither time nor memory.

use std::ffi::CStr;
use std::fmt;
use std::ops::Range;

/// The first four bytes of every blob.
pub(super) const MAGIC: u32 = 0xd00d_feed;

/// The length of the header of version 17 in bytes.
pub(super) const HEADER_LEN: usize = 40;

/// Linux reads no deeper levels (FDT_MAX_DEPTH in drivers/of/fdt.c).
const MAX_DEPTH: usize = 64;

/// Property names are at most 31 characters by the specification; a few real ones are longer.
const MAX_NAME_LEN: usize = 255;

/// A fault in a blob; completes the sentence "Cannot use FILE as a device tree: ...".
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Fault {
    what: &'static str,
    /// Offset in the blob, in bytes.
    offset: usize,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at offset {:#x}", self.what, self.offset)
    }
}

impl std::error::Error for Fault {}

/// One step of a walk through a blob.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Item<'a> {
    /// A node begins; the root's name is empty.
    Begin(&'a str),
    /// A property of the innermost node that has begun: its name and its value.
    Property(&'a str, &'a [u8]),
    /// The innermost node ends.
    End,
}

/// Checks a whole blob and returns its length in bytes.
///
/// # Errors
/// The first [`Fault`].
pub fn check(blob: &[u8]) -> Result<usize, Fault> {
    walk(blob, |_| ())
}

/// Walks through a blob from the beginning of the root to its end, calls `visit` for every node and property,
/// and returns the length of the blob in bytes.
///
/// # Errors
/// The first [`Fault`]; `visit` has been called for everything before it.
pub fn walk<'a>(blob: &'a [u8], mut visit: impl FnMut(Item<'a>)) -> Result<usize, Fault> {
    walk_spans(blob, |_, item| visit(item))
}

/// As [`walk`], with the range of the blob of each item; a node's name belongs to its beginning.
pub(super) fn walk_spans<'a>(
    blob: &'a [u8],
    mut visit: impl FnMut(Range<usize>, Item<'a>),
) -> Result<usize, Fault> {
    let header = BlobHeader::parse(blob)?;
    let blob = blob.get(..header.total).unwrap_or(blob);
    let mut cursor = Cursor { blob, at: header.structure.start, end: header.structure.end };
    let mut depth = 0_usize;
    loop {
        let at = cursor.at;
        let fault = |what| Err(Fault { what, offset: at });
        match cursor.u32()? {
            NOP => {}
            BEGIN_NODE if depth == MAX_DEPTH => return fault("nodes are nested deeper than 64"),
            BEGIN_NODE => {
                depth += 1;
                let name = cursor.string()?;
                visit(at..cursor.at, Item::Begin(name));
            }
            PROPERTY if depth == 0 => return fault("there is a property outside of all nodes"),
            PROPERTY => {
                let (len, name) = (cursor.u32()?, cursor.u32()?);
                let name = property_name(blob, &header, name, at)?;
                let value = cursor.bytes(len)?;
                visit(at..cursor.at, Item::Property(name, value));
            }
            END_NODE if depth == 0 => return fault("there is a node end without a beginning"),
            END_NODE => {
                depth -= 1;
                visit(at..cursor.at, Item::End);
                if depth == 0 {
                    break;
                }
            }
            _ => return fault("there is an invalid token"),
        }
    }
    while cursor.peek() == Some(NOP) {
        cursor.u32()?;
    }
    let at = cursor.at;
    match cursor.u32()? {
        END => Ok(header.total),
        _ => Err(Fault { what: "the root node is not followed by the end", offset: at }),
    }
}

// Tokens of the structure block (Devicetree Specification 5.4.1).
pub(super) const BEGIN_NODE: u32 = 1;
pub(super) const END_NODE: u32 = 2;
pub(super) const PROPERTY: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;

/// The checked fields of a header.
pub(super) struct BlobHeader {
    /// The length of the blob in bytes.
    total: usize,
    /// The memory reservation block, including the empty entry at its end.
    pub(super) reservations: Range<usize>,
    pub(super) structure: Range<usize>,
    pub(super) strings: Range<usize>,
    /// The physical id of the boot hart.
    pub(super) boot_cpu: u32,
}

impl BlobHeader {
    pub(super) fn parse(blob: &[u8]) -> Result<Self, Fault> {
        let fault = |what, offset| Err(Fault { what, offset });
        if be_u32(blob, 0) != Some(MAGIC) {
            return fault("there is no magic number of a device tree blob", 0);
        }
        if blob.len() < HEADER_LEN {
            return fault("the header is cut short", blob.len());
        }
        let field = |at| be_u32(blob, at).and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        let total = field(4);
        if total < HEADER_LEN || total > blob.len() {
            return fault("the total size does not fit the file", 4);
        }
        if field(20) < 17 || field(24) > 17 {
            return fault("the format version is not 17", 20);
        }
        let block = |start: usize, len: usize, align: usize| {
            let end = start.checked_add(len).filter(|end| *end <= total)?;
            start.is_multiple_of(align).then_some(start..end)
        };
        let Some(structure) = block(field(8), field(36), 4) else {
            return fault("the structure block is not inside the blob", 8);
        };
        let Some(strings) = block(field(12), field(32), 1) else {
            return fault("the strings block is not inside the blob", 12);
        };
        let Some(reservations) = block(field(16), 16, 8) else {
            return fault("the memory reservations are not inside the blob", 16);
        };
        let reservations =
            reservations_from(blob.get(..total).unwrap_or(blob), reservations.start)?;
        let boot_cpu = be_u32(blob, 28).unwrap_or(0);
        Ok(Self { total, reservations, structure, strings, boot_cpu })
    }

    /// The end of the last block.
    pub(super) fn used(&self) -> usize {
        self.structure.end.max(self.strings.end).max(self.reservations.end)
    }
}

/// The memory reservation block that starts at `start`, if it has an end.
fn reservations_from(blob: &[u8], start: usize) -> Result<Range<usize>, Fault> {
    let mut entries = blob.get(start..).unwrap_or_default().chunks_exact(16);
    match entries.position(|entry| entry.iter().all(|byte| *byte == 0)) {
        Some(last) => Ok(start..start + 16 * (last + 1)),
        None => Err(Fault { what: "the list of memory reservations has no end", offset: start }),
    }
}

/// The name at `offset` of the strings block, for the property at `at`.
fn property_name<'a>(
    blob: &'a [u8],
    header: &BlobHeader,
    offset: u32,
    at: usize,
) -> Result<&'a str, Fault> {
    let fault = Fault { what: "a property's name is not in the strings block", offset: at };
    let strings = blob.get(header.strings.clone()).unwrap_or_default();
    let rest = usize::try_from(offset).ok().and_then(|offset| strings.get(offset..));
    let rest = rest.ok_or_else(|| fault.clone())?;
    let name = CStr::from_bytes_until_nul(rest.get(..=MAX_NAME_LEN).unwrap_or(rest)).ok();
    let name = name.and_then(|name| name.to_str().ok()).filter(|name| !name.is_empty());
    name.ok_or(fault)
}

/// A position in the structure block.
struct Cursor<'a> {
    blob: &'a [u8],
    at: usize,
    end: usize,
}

impl<'a> Cursor<'a> {
    /// The rest of the block.
    fn rest(&self) -> &'a [u8] {
        self.blob.get(self.at..self.end).unwrap_or_default()
    }

    fn peek(&self) -> Option<u32> {
        be_u32(self.rest(), 0)
    }

    fn cut_short(&self) -> Fault {
        Fault { what: "the structure block is cut short", offset: self.at }
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        let value = self.peek().ok_or_else(|| self.cut_short())?;
        self.at += 4;
        Ok(value)
    }

    /// Reads the next `len` bytes and skips the padding after them.
    fn bytes(&mut self, len: u32) -> Result<&'a [u8], Fault> {
        let len = usize::try_from(len).ok();
        let bytes = len.and_then(|len| self.rest().get(..len)).ok_or_else(|| self.cut_short())?;
        self.at = (self.at + bytes.len()).next_multiple_of(4);
        Ok(bytes)
    }

    /// Reads the name of a node and skips the padding after it.
    fn string(&mut self) -> Result<&'a str, Fault> {
        let at = self.at;
        let name = CStr::from_bytes_until_nul(self.rest()).map_err(|_| self.cut_short())?;
        self.at = (at + name.count_bytes() + 1).next_multiple_of(4);
        name.to_str().map_err(|_| Fault { what: "a node's name is not UTF-8", offset: at })
    }
}

/// The big-endian number of 4 bytes at `at`, if `bytes` are long enough.
fn be_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_be_bytes)
}
