//! vm-fdt's writer with nodes as closures, errors with their path, and a check for duplicate names.

use std::collections::BTreeSet;

use vm_fdt::FdtWriter;

use crate::error::BootError;

/// Free space at the end of the tree, in bytes, for firmware that adds to it in place. U-Boot adds the kernel's command
/// line and more without checking for space, and otherwise overwrites the data after the tree, which is its own.
pub(super) const ROOM: usize = 8192;

/// Writes nodes and properties, depth first.
pub(super) struct Writer {
    inner: FdtWriter,
    open: Vec<OpenNode>,
}

/// A node that is being written.
struct OpenNode {
    name: String,
    properties: BTreeSet<String>,
    children: BTreeSet<String>,
}

impl Writer {
    pub(super) fn new() -> Result<Self, BootError> {
        let inner = FdtWriter::new();
        let inner = inner.map_err(|source| BootError::Tree { at: "/".into(), source })?;
        Ok(Self { inner, open: Vec::new() })
    }

    /// Ends the tree and returns the blob, with free space at the end (Devicetree Specification 5.2, totalsize).
    pub(super) fn finish(self) -> Result<Vec<u8>, BootError> {
        let blob = self.inner.finish();
        let mut blob = blob.map_err(|source| BootError::Tree { at: "/".into(), source })?;
        blob.resize(blob.len() + ROOM, 0);
        let size = u32::try_from(blob.len());
        if let (Some(field), Ok(size)) = (blob.get_mut(4..8), size) {
            field.copy_from_slice(&size.to_be_bytes());
        }
        Ok(blob)
    }

    /// Writes a node with what `body` writes into it.
    pub(super) fn node(
        &mut self,
        name: &str,
        body: impl FnOnce(&mut Self) -> Result<(), BootError>,
    ) -> Result<(), BootError> {
        if self.open.last_mut().is_some_and(|parent| !parent.children.insert(name.into())) {
            return Err(BootError::Board(format!("there are two nodes {}", self.at(name))));
        }
        let at = self.at(name);
        let cannot_write = |source| BootError::Tree { at: at.clone(), source };
        let node = self.inner.begin_node(name).map_err(cannot_write)?;
        let (properties, children) = Default::default();
        self.open.push(OpenNode { name: name.into(), properties, children });
        body(self)?;
        self.open.pop();
        self.inner.end_node(node).map_err(cannot_write)
    }

    /// A property with any bytes.
    pub(super) fn bytes(&mut self, name: &str, value: &[u8]) -> Result<(), BootError> {
        self.property(name, |writer| writer.property(name, value))
    }

    pub(super) fn empty(&mut self, name: &str) -> Result<(), BootError> {
        self.property(name, |writer| writer.property_null(name))
    }

    pub(super) fn u32(&mut self, name: &str, value: u32) -> Result<(), BootError> {
        self.property(name, |writer| writer.property_u32(name, value))
    }

    pub(super) fn u32s(&mut self, name: &str, values: &[u32]) -> Result<(), BootError> {
        self.property(name, |writer| writer.property_array_u32(name, values))
    }

    /// Pairs of cells.
    pub(super) fn u64s(&mut self, name: &str, values: &[u64]) -> Result<(), BootError> {
        self.property(name, |writer| writer.property_array_u64(name, values))
    }

    pub(super) fn string(&mut self, name: &str, value: &str) -> Result<(), BootError> {
        self.property(name, |writer| writer.property_string(name, value))
    }

    pub(super) fn strings(&mut self, name: &str, values: &[String]) -> Result<(), BootError> {
        self.property(name, |writer| writer.property_string_list(name, values.to_vec()))
    }

    /// Gives the open node a phandle, so that others can refer to it.
    pub(super) fn phandle(&mut self, value: u32) -> Result<(), BootError> {
        self.property("phandle", |writer| writer.property_phandle(value))
    }

    fn property(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut FdtWriter) -> Result<(), vm_fdt::Error>,
    ) -> Result<(), BootError> {
        if self.open.last_mut().is_some_and(|node| !node.properties.insert(name.into())) {
            return Err(BootError::Board(format!("there are two properties {}", self.at(name))));
        }
        write(&mut self.inner).map_err(|source| BootError::Tree { at: self.at(name), source })
    }

    /// The path of `name` in the open node.
    fn at(&self, name: &str) -> String {
        let names = self.open.iter().map(|node| node.name.as_str());
        let names: Vec<&str> = names.chain([name]).skip(1).collect();
        format!("/{}", names.join("/"))
    }
}
