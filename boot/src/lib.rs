//! Kernel, initrd, command line and device tree: files in, bytes at addresses out.
//!
//! What stands in guest memory before the first instruction is decided here, and nothing else is:
//! this crate knows no KVM, no threads and no terminal, and it never writes guest memory itself. It
//! reads the files a user named, refuses what cannot boot in one line, decides who goes where, and
//! hands back a list of [`Blob`]s that the caller maps or copies. In boot order:
//!
//! 1. [`Kernel::open`] finds out by magic what a kernel file is ([`image`], [`elf`], [`compressed`])
//!    and, when it is none that can boot, says what it is instead ([`foreign`]).
//! 2. [`Initrd::open`] takes an initrd file as it is; [`Cpio`] writes one on the fly.
//! 3. [`Cmdline::new`] checks the kernel command line against what RISC-V Linux takes.
//! 4. [`place()`] gives every piece its guest-physical address.
//! 5. [`fdt::build`] writes the device tree of a [`fdt::Board`], or [`fdt::GivenTree`] is a user's own.
//!
//! Every error is a [`BootError`]: one line, with what to do.
#![forbid(unsafe_code)]

pub mod cmdline;
pub mod compressed;
pub mod cpio;
pub mod elf;
pub mod error;
pub mod fdt;
pub mod foreign;
pub mod image;
pub mod initrd;
pub mod kernel;
pub mod place;
mod region;
pub mod source;

pub use cmdline::Cmdline;
pub use cpio::Cpio;
pub use error::{BootError, FileName};
pub use initrd::Initrd;
pub use kernel::Kernel;
pub use place::{Blob, Load, Placement, Region, Request, place};
pub use source::{Segment, Source};
