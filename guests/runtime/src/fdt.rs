//! Reading a flattened device tree (Devicetree specification 0.4, chapter 5) in place, as far as needed to find devices.

/// A device tree in memory.
#[derive(Clone, Copy)]
pub struct Fdt {
    structure: &'static [u8],
    strings: &'static [u8],
    total: usize,
}

/// A node: the start of its properties, and its parent's address and size cells.
#[derive(Clone, Copy)]
pub struct Node {
    fdt: Fdt,
    /// The name with its unit address; empty for the root.
    pub name: &'static str,
    /// 0 for the root.
    pub depth: usize,
    props: usize,
    cells: Cells,
}

#[derive(Clone, Copy)]
struct Cells {
    address: usize,
    size: usize,
}

const MAGIC: u32 = 0xd00d_feed;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const MAX_DEPTH: usize = 16;

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn text(bytes: &'static [u8], at: usize) -> Option<&'static str> {
    let bytes = bytes.get(at..)?;
    let end = bytes.iter().position(|&b| b == 0)?;
    core::str::from_utf8(&bytes[..end]).ok()
}

impl Fdt {
    /// The tree at `addr`, if there is a header.
    ///
    /// # Safety
    /// `addr` must be the value of a1 at the start of the boot hart.
    #[must_use]
    pub unsafe fn at(addr: usize) -> Option<Self> {
        // SAFETY: the caller guarantees 40 bytes of header, and the header gives the length of the rest.
        let blob = unsafe {
            let head = core::slice::from_raw_parts(addr as *const u8, 40);
            if be32(head, 0)? != MAGIC {
                return None;
            }
            core::slice::from_raw_parts(addr as *const u8, be32(head, 4)? as usize)
        };
        let block = |offset, size| {
            let offset = be32(blob, offset)? as usize;
            blob.get(offset..offset + be32(blob, size)? as usize)
        };
        Some(Self { structure: block(8, 36)?, strings: block(12, 32)?, total: blob.len() })
    }

    /// Size of the tree in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.total
    }

    /// True for a tree of size 0.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// All nodes in the order of the tree.
    pub fn nodes(self) -> impl Iterator<Item = Node> {
        let mut at = 0;
        let mut depth = 0;
        let mut cells = [Cells { address: 2, size: 1 }; MAX_DEPTH + 1];
        core::iter::from_fn(move || {
            loop {
                match be32(self.structure, at)? {
                    BEGIN_NODE => {
                        let name = text(self.structure, at + 4)?;
                        at += 4 + (name.len() + 1).next_multiple_of(4);
                        let node = Node { fdt: self, name, depth, props: at, cells: cells[depth] };
                        depth += 1;
                        assert!(depth < MAX_DEPTH, "device tree deeper than {MAX_DEPTH}");
                        cells[depth] = node.child_cells();
                        return Some(node);
                    }
                    END_NODE => {
                        depth = depth.checked_sub(1)?;
                        at += 4;
                    }
                    PROP => at += 12 + (be32(self.structure, at + 4)? as usize).next_multiple_of(4),
                    NOP => at += 4,
                    _ => return None,
                }
            }
        })
    }

    /// The first enabled node whose `compatible` contains `what`.
    #[must_use]
    pub fn compatible(self, what: &str) -> Option<Node> {
        self.nodes().find(|node| node.is_enabled() && node.strings("compatible").any(|s| s == what))
    }

    /// The first node of this name (without unit address) right below the root.
    #[must_use]
    pub fn top(self, name: &str) -> Option<Node> {
        self.nodes().find(|node| node.depth == 1 && node.name.split('@').next() == Some(name))
    }
}

impl Node {
    /// Properties as (name, value).
    pub fn props(self) -> impl Iterator<Item = (&'static str, &'static [u8])> {
        let Fdt { structure, strings, .. } = self.fdt;
        let mut at = self.props;
        core::iter::from_fn(move || {
            while be32(structure, at)? == NOP {
                at += 4;
            }
            if be32(structure, at)? != PROP {
                return None;
            }
            let len = be32(structure, at + 4)? as usize;
            let name = text(strings, be32(structure, at + 8)? as usize)?;
            let value = structure.get(at + 12..at + 12 + len)?;
            at += 12 + len.next_multiple_of(4);
            Some((name, value))
        })
    }

    /// The value of a property.
    #[must_use]
    pub fn prop(self, name: &str) -> Option<&'static [u8]> {
        self.props().find(|(n, _)| *n == name).map(|(_, value)| value)
    }

    /// The cells of a property.
    pub fn cells(self, name: &str) -> impl Iterator<Item = u32> {
        let value = self.prop(name).unwrap_or_default();
        value.chunks_exact(4).filter_map(|cell| be32(cell, 0))
    }

    /// The first cell of a property.
    #[must_use]
    pub fn cell(self, name: &str) -> Option<u32> {
        self.cells(name).next()
    }

    /// The strings of a property.
    pub fn strings(self, name: &str) -> impl Iterator<Item = &'static str> {
        let value = self.prop(name).unwrap_or_default();
        value
            .split(|&b| b == 0)
            .filter(|s| !s.is_empty())
            .filter_map(|s| core::str::from_utf8(s).ok())
    }

    /// Entry `index` of `reg`: (address, size).
    #[must_use]
    pub fn reg(self, index: usize) -> Option<(u64, u64)> {
        let Cells { address, size } = self.cells;
        let mut cells = self.cells("reg").skip(index * (address + size));
        let mut number =
            |count| (0..count).try_fold(0, |n, _| Some(n << 32 | u64::from(cells.next()?)));
        Some((number(address)?, number(size)?))
    }

    /// False if there is a `status` other than `okay`.
    #[must_use]
    pub fn is_enabled(self) -> bool {
        self.strings("status").next().is_none_or(|status| status == "okay" || status == "ok")
    }

    fn child_cells(self) -> Cells {
        let count = |name, default| self.cell(name).map_or(default, |n| n as usize);
        Cells { address: count("#address-cells", 2), size: count("#size-cells", 1) }
    }
}
