//! What a format of rvmm begins with, so that another version or architecture is recognized before the rest is read.

use serde::{Deserialize, Serialize};

/// A format of rvmm, in the version that this program writes, which is the only one that it reads.
#[derive(Debug)]
pub(crate) struct Format {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its version.
    pub(crate) version: u32,
    /// What has this format: a noun.
    pub(crate) what: &'static str,
}

/// What every version of a format begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Preamble {
    /// [`Format::name`].
    pub(crate) format: String,
    /// [`Format::version`].
    pub(crate) version: u32,
    /// The architecture of the host, which is the guest's.
    pub(crate) arch: String,
    /// The version of rvmm that has written it.
    pub(crate) rvmm: String,
}

impl Preamble {
    /// The one that this program writes.
    pub(crate) fn of(format: &Format) -> Self {
        Self {
            format: format.name.into(),
            version: format.version,
            arch: std::env::consts::ARCH.into(),
            rvmm: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Refuses what this program cannot read, with the reason.
    pub(crate) fn check(&self, format: &Format) -> Result<(), String> {
        let here = Self::of(format);
        if self.format != here.format {
            return Err(format!("it is no {} of rvmm", format.what));
        }
        if self.version != here.version {
            return Err(format!(
                "its format has version {}, written by rvmm {}, and this program (rvmm {}) reads version {}",
                self.version, self.rvmm, here.rvmm, here.version
            ));
        }
        if self.arch != here.arch {
            return Err(format!("it comes from {}, and this host is {}", self.arch, here.arch));
        }
        Ok(())
    }
}
