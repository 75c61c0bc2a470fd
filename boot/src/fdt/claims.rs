//! The description of a machine in a device tree (Devicetree Specification 0.4, chapter 3).

use std::collections::BTreeSet;

use super::blob::{self, Fault, Item};
use crate::region::Region;

/// The facts in a tree that have to match the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Claims {
    /// Memory that is not disabled, in ascending order, without empty ranges.
    pub(super) memory: Vec<Region>,
    /// The ids of harts that are not disabled, in ascending order.
    pub(super) harts: Vec<u64>,
    /// The ISA extensions of these harts, in lower case, without duplicates.
    pub(super) extensions: BTreeSet<String>,
    /// `linux,initrd-start` and `linux,initrd-end`.
    pub(super) initrd: Option<Region>,
    /// `timebase-frequency` of `/cpus`, in Hz.
    pub(super) timebase: Option<u64>,
    /// True if there is an APLIC.
    pub(super) has_aplic: bool,
    /// True if there is a PLIC.
    pub(super) has_plic: bool,
}

impl Claims {
    /// Reads a blob.
    ///
    /// # Errors
    /// As [`blob::walk`].
    pub(super) fn read(blob: &[u8]) -> Result<Self, Fault> {
        let mut reader = Reader::default();
        blob::walk(blob, |item| reader.visit(item))?;
        let mut claims = reader.claims;
        claims.memory.sort_by_key(|region| region.base);
        claims.harts.sort_unstable();
        let (start, end) = reader.initrd;
        claims.initrd =
            start.zip(end).map(|(start, end)| Region::new(start, end.saturating_sub(start)));
        Ok(claims)
    }
}

/// The state of a walk through a tree.
#[derive(Default)]
struct Reader<'a> {
    claims: Claims,
    initrd: (Option<u64>, Option<u64>),
    /// The names of the nodes that are open; the root's is empty.
    path: Vec<&'a str>,
    /// The relevant properties of the innermost one, until it ends or has a child: no property follows a child.
    node: Node<'a>,
    /// Cells of an address and of a size below the root, and of an address below `/cpus`, if given by the tree.
    root_cells: (Option<u64>, Option<u64>),
    cpu_cells: Option<u64>,
}

#[derive(Default)]
struct Node<'a> {
    device_type: &'a [u8],
    reg: &'a [u8],
    isa: &'a [u8],
    extensions: &'a [u8],
    is_disabled: bool,
}

impl<'a> Reader<'a> {
    fn visit(&mut self, item: Item<'a>) {
        match item {
            Item::Begin(name) => {
                self.finish_node();
                self.path.push(name);
            }
            Item::Property(name, value) => self.property(name, value),
            Item::End => {
                self.finish_node();
                self.path.pop();
            }
        }
    }

    fn property(&mut self, name: &str, value: &'a [u8]) {
        match (self.path.as_slice(), name) {
            (_, "device_type") => self.node.device_type = value,
            (_, "reg") => self.node.reg = value,
            (_, "riscv,isa") => self.node.isa = value,
            (_, "riscv,isa-extensions") => self.node.extensions = value,
            // Linux accepts "okay" and "ok" (drivers/of/base.c), and a node without a status.
            (_, "status") => self.node.is_disabled = !matches!(value, b"okay\0" | b"ok\0"),
            (_, "compatible") => {
                let mut names = value.split(|byte| *byte == 0);
                self.claims.has_aplic |= names.clone().any(|name| name == b"riscv,aplic");
                self.claims.has_plic |=
                    names.any(|name| matches!(name, b"riscv,plic0" | b"sifive,plic-1.0.0"));
            }
            ([""], "#address-cells") => self.root_cells.0 = number(value),
            ([""], "#size-cells") => self.root_cells.1 = number(value),
            (["", "cpus"], "#address-cells") => self.cpu_cells = number(value),
            (["", "cpus"], "timebase-frequency") => self.claims.timebase = number(value),
            (["", "chosen"], "linux,initrd-start") => self.initrd.0 = number(value),
            (["", "chosen"], "linux,initrd-end") => self.initrd.1 = number(value),
            _ => {}
        }
    }

    /// Records the facts of the node whose properties are all read.
    fn finish_node(&mut self) {
        let node = std::mem::take(&mut self.node);
        if node.is_disabled {
            return;
        }
        // The specification's defaults (2.3.5).
        match (self.path.as_slice(), node.device_type) {
            (["", _], b"memory\0") => {
                let (address, size) = (cells(self.root_cells.0, 2), cells(self.root_cells.1, 1));
                let len = (address + size).max(1);
                let ranges = node.reg.chunks_exact(len).filter_map(|range| {
                    let (base, size) = range.split_at_checked(address)?;
                    Some(Region::new(number(base)?, number(size)?))
                });
                self.claims.memory.extend(ranges.filter(|range| range.size != 0));
            }
            (["", "cpus", _], b"cpu\0") => {
                let len = cells(self.cpu_cells, 2).max(1);
                self.claims.harts.extend(node.reg.chunks_exact(len).filter_map(number));
                self.claims.extensions.extend(node.extensions());
            }
            _ => {}
        }
    }
}

impl Node<'_> {
    /// The names of a hart's extensions: the list, which has precedence, or the older string, `rv64imac_zicsr`
    /// (Documentation/devicetree/bindings/riscv/extensions.yaml).
    fn extensions(&self) -> Vec<String> {
        let is_name = |name: &String| {
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).to_ascii_lowercase();
        if !self.extensions.is_empty() {
            return self.extensions.split(|byte| *byte == 0).map(text).filter(is_name).collect();
        }
        let isa = text(self.isa.strip_suffix(b"\0").unwrap_or(self.isa));
        let mut parts = isa.strip_prefix("rv64").unwrap_or_default().split('_');
        // G is not an extension, but an abbreviation for several.
        let letters = parts.next().unwrap_or_default().chars().filter(|letter| *letter != 'g');
        let letters: Vec<String> = letters.map(String::from).collect();
        letters.into_iter().chain(parts.map(String::from)).filter(is_name).collect()
    }
}

/// Number of bytes of this many cells; 0 for more cells than an address has.
fn cells(given: Option<u64>, default: usize) -> usize {
    let count = given.map_or(Some(default), |given| usize::try_from(given).ok());
    count.filter(|count| *count <= 2).unwrap_or(0) * 4
}

/// A number of one or two cells.
fn number(bytes: &[u8]) -> Option<u64> {
    match bytes.len() {
        4 => bytes.first_chunk().map(|bytes| u32::from_be_bytes(*bytes).into()),
        8 => bytes.first_chunk().map(|bytes| u64::from_be_bytes(*bytes)),
        _ => None,
    }
}
