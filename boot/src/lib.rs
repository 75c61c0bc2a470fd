//! Kernel, initrd, command line and device tree: files in, bytes at addresses out.
//!
//! This crate decides the contents of guest memory before the first instruction, and nothing else: it
//! uses no KVM, no threads and no terminal, and it never writes guest memory itself. It reads the
//! user's files, refuses those that cannot boot with a one-line error, assigns the addresses, and
//! returns a list of [`Blob`]s that the caller maps or copies. In boot order:
//!
//! 1. [`Kernel::open`] detects the format of a kernel file by its magic ([`image`], [`elf`], [`compressed`])
//!    and, for a file that cannot boot, reports what it is instead ([`foreign`]).
//! 2. [`Initrd::open`] takes an initrd file as it is; [`Cpio`] generates one.
//! 3. [`Cmdline::new`] checks the kernel command line against the limits of RISC-V Linux.
//! 4. [`place()`] assigns a guest-physical address to every piece.
//! 5. [`fdt::build`] writes the device tree of a [`fdt::Board`], and [`fdt::UserTree`] is a tree supplied by the user.
//!
//! Every error is a [`BootError`]: one line, with advice.
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
