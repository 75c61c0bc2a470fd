//! Changes to an existing blob: properties of `/chosen` and free space at the end; everything else is kept.

use std::ops::Range;

use super::blob::{self, BEGIN_NODE, BlobHeader, END_NODE, HEADER_LEN, Item, MAGIC, PROPERTY};
use super::{MAX_LEN, writer::ROOM};
use crate::region::Region;

/// The names of the two properties, as in the strings block.
const NAMES: &[u8] = b"linux,initrd-start\0linux,initrd-end\0";
const END_NAME: usize = b"linux,initrd-start\0".len();

/// Returns a valid blob with its initrd in `/chosen` replaced by `initrd`, if there is one, and with at least [`ROOM`]
/// unused bytes at the end, as far as [`MAX_LEN`] allows.
pub(super) fn completed(blob: &[u8], initrd: Option<Region>) -> Vec<u8> {
    let Ok(header) = BlobHeader::parse(blob) else { return blob.to_vec() };
    let mut blob = match initrd {
        Some(initrd) => with_initrd(blob, &header, initrd),
        None => blob.to_vec(),
    };
    let used = BlobHeader::parse(&blob).map_or(blob.len(), |header| header.used());
    let most = usize::try_from(MAX_LEN).unwrap_or(usize::MAX);
    let total = blob.len().max((used + ROOM).min(most));
    blob.resize(total, 0);
    let size = u32::try_from(total);
    if let (Some(field), Ok(size)) = (blob.get_mut(4..8), size) {
        field.copy_from_slice(&size.to_be_bytes());
    }
    blob
}

/// The positions in a blob of the properties to add and to replace.
#[derive(Default)]
struct Places {
    /// The end of `/chosen`'s name.
    chosen: Option<usize>,
    /// The end of the root's last child.
    root_end: usize,
    /// The properties to replace.
    replaced: Vec<Range<usize>>,
}

fn places(blob: &[u8]) -> Places {
    let mut places = Places::default();
    let mut path: Vec<&str> = Vec::new();
    let walked = blob::walk_spans(blob, |span, item| match item {
        Item::Begin(name) => {
            path.push(name);
            if path == ["", "chosen"] && places.chosen.is_none() {
                places.chosen = Some(span.end);
            }
        }
        Item::Property(name, _) => {
            if path == ["", "chosen"] && matches!(name, "linux,initrd-start" | "linux,initrd-end") {
                places.replaced.push(span);
            }
        }
        Item::End => {
            path.pop();
            places.root_end = span.start;
        }
    });
    debug_assert!(walked.is_ok(), "the blob was checked when it was opened");
    places
}

fn with_initrd(blob: &[u8], header: &BlobHeader, initrd: Region) -> Vec<u8> {
    let places = places(blob);
    let part = |range: Range<usize>| blob.get(range).unwrap_or_default();
    let mut strings = part(header.strings.clone()).to_vec();
    let names = strings.len();
    strings.extend(NAMES);
    let mut added = property(names, initrd.base);
    added.extend(property(names + END_NAME, initrd.end()));
    if places.chosen.is_none() {
        let begin = [&BEGIN_NODE.to_be_bytes()[..], b"chosen\0\0"].concat();
        added = [begin, added, END_NODE.to_be_bytes().to_vec()].concat();
    }
    let at = places.chosen.unwrap_or(places.root_end);
    let mut structure = part(header.structure.start..at).to_vec();
    structure.extend(added);
    let mut next = at;
    for replaced in places.replaced {
        structure.extend(part(next..replaced.start));
        next = replaced.end;
    }
    structure.extend(part(next..header.structure.end));
    join(header.boot_cpu, part(header.reservations.clone()), &structure, &strings)
}

/// A property of 8 bytes whose name is at offset `name` of the strings block.
fn property(name: usize, value: u64) -> Vec<u8> {
    let words = [PROPERTY, 8, number(name)].map(u32::to_be_bytes).concat();
    [words, value.to_be_bytes().to_vec()].concat()
}

/// The blob with these blocks (Devicetree Specification 0.4, sections 5.1 and 5.2).
fn join(boot_cpu: u32, reservations: &[u8], structure: &[u8], strings: &[u8]) -> Vec<u8> {
    let structure_at = HEADER_LEN + reservations.len();
    let strings_at = structure_at + structure.len();
    let total = strings_at + strings.len();
    let header = [
        MAGIC,
        number(total),
        number(structure_at),
        number(strings_at),
        number(HEADER_LEN),
        17,
        16,
        boot_cpu,
        number(strings.len()),
        number(structure.len()),
    ];
    [&header.map(u32::to_be_bytes).concat(), reservations, structure, strings].concat()
}

/// Converts a length; blobs are shorter than 4 GiB, as the original was at most [`MAX_LEN`] long.
fn number(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
