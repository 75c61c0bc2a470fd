//! The initrd: a file of any content, or the pieces of a generated archive.

use std::path::Path;

use crate::error::{BootError, FileName, Role};
use crate::source::Source;

/// The contents of the initrd: one file, or the pieces of a [`crate::Cpio`] archive.
#[derive(Clone, Debug)]
pub struct Initrd {
    name: FileName,
    sources: Vec<Source>,
}

impl Initrd {
    /// Opens an initrd file. Its contents are not checked, except that it is not empty.
    ///
    /// # Errors
    /// [`BootError::Open`], or [`BootError::Unusable`] for an empty file and for everything that is not a
    /// regular file.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let source = Source::open_as(path, Role::Initrd)?;
        Ok(Self { name: path.into(), sources: vec![source] })
    }

    /// An initrd of these consecutive `sources`, without gaps; `name` is for messages.
    #[must_use]
    pub fn from_sources(name: &str, sources: Vec<Source>) -> Self {
        Self { name: name.into(), sources }
    }

    /// The name of the file, or a description, safe to print.
    #[must_use]
    pub fn name(&self) -> &FileName {
        &self.name
    }

    /// Its pieces, to be placed consecutively without gaps.
    #[must_use]
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.sources.iter().fold(0, |sum, source| sum.saturating_add(source.len()))
    }

    /// True if it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
