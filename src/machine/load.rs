//! The user's files: opened and checked before anything is built, then loaded according to the placement.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Once;

use rvmm_boot::fdt::{self, Board, UserTree};
use rvmm_boot::{Blob, Cmdline, Initrd, Kernel, Load, Placement, Region, Request, Source, place};

use rvmm_boot::compressed::Compression;
use rvmm_boot::kernel::Format;

use super::fdt::region;
use crate::config::{BootConfig, InitrdConfig, VmConfig};
use crate::error::Error;
use crate::host::write_file;
use crate::memory::GuestRam;

/// The files of a machine, open and checked.
#[derive(Debug)]
pub(super) struct Files {
    kernel: Option<Kernel>,
    /// The file of a compressed kernel, and its maximum uncompressed size.
    compressed: Option<(File, u64)>,
    initrd: Option<Initrd>,
    loads: Vec<Load>,
    dtb: Option<UserTree>,
    /// Logs the remarks on them once, and not again at a reboot.
    logged: Once,
}

/// The start state of the boot hart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Start {
    /// The address of its first instruction.
    pub(super) entry: u64,
    /// The address of the device tree.
    pub(super) fdt: u64,
    /// The loaded code of the user's files: the kernel and the flat files.
    pub(super) code: Vec<Code>,
}

/// The bytes of a file in guest memory, without the zeros after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Code {
    /// Their address range.
    pub(super) region: Region,
    /// True for an `Image`, which is taken for Linux.
    pub(super) is_image: bool,
}

impl Files {
    /// Opens every file that `config` names.
    pub(super) fn open(config: &VmConfig) -> Result<Self, Error> {
        let boot = &config.boot;
        Cmdline::new(&boot.cmdline)?;
        let dtb = boot.dtb.as_ref().map(|path| UserTree::open(path)).transpose()?;
        let mut files = Self {
            kernel: boot.kernel.as_ref().map(|path| kernel(path, config.mem)).transpose()?,
            compressed: None,
            initrd: initrd(boot, dtb.as_ref())?,
            loads: boot
                .load
                .iter()
                .map(|l| Load::open(&l.file, l.addr))
                .collect::<Result<_, _>>()?,
            dtb,
            logged: Once::new(),
        };
        let is_compressed =
            files.kernel.as_ref().is_some_and(|kernel| kernel.compression().is_some());
        if is_compressed && let Some(path) = &boot.kernel {
            let failed = |source| Error::File { verb: "open", path: path.to_path_buf(), source };
            files.compressed = Some((File::open(path).map_err(failed)?, config.mem));
        }
        Ok(files)
    }

    /// Frees an uncompressed kernel, which is in guest memory by now.
    pub(super) fn free_uncompressed(&mut self) {
        if self.compressed.is_some() {
            self.kernel = None;
        }
    }

    /// Prepares one more [`Files::load`] after [`Files::free_uncompressed`], from the open files, whatever their paths now lead
    /// to.
    pub(super) fn uncompress_again(&mut self) -> Result<(), Error> {
        if let Some((file, limit)) = &self.compressed {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            self.kernel = Some(Kernel::open(path.as_ref(), *limit)?);
        }
        Ok(())
    }

    /// Places everything, completes the device tree and fills `ram`. A guest may also start in `roms`.
    pub(super) fn load(
        &self,
        boot: &BootConfig,
        mut board: Board,
        ram: &GuestRam,
        roms: &[Region],
    ) -> Result<Start, Error> {
        // The length does not depend on the initrd's address.
        board.chosen.initrd = self.initrd.as_ref().map(|_| region(ram.span()));
        let differences =
            self.dtb.as_ref().map_or(Ok(Vec::new()), |given| given.compare(&board))?;
        let memory = [region(ram.span())];
        let placement = place(&Request {
            ram: &memory,
            memory: self.dtb.as_ref().map_or(&[], UserTree::memory),
            kernel: self.kernel.as_ref(),
            roms,
            loads: &self.loads,
            entry: boot.entry,
            initrd: self.initrd.as_ref(),
            fdt_len: self.tree(&board)?.len() as u64,
            fdt_at: boot.dtb_addr,
        })?;
        board.chosen.initrd = placement.initrd;
        let tree = self.tree(&board)?;
        if let Some(path) = &boot.dump_dtb {
            dump(path, &tree)?;
        }
        fill(ram, &placement, &tree)?;
        self.logged.call_once(|| {
            differences.iter().for_each(|difference| log::warn!("{difference}"));
            self.log_initrd(&placement);
            self.log_entry(boot, placement.entry);
        });
        let code = self.code(placement.kernel);
        Ok(Start { entry: placement.entry, fdt: placement.fdt.base, code })
    }
}

impl Files {
    /// The user's own tree, or that of the board.
    fn tree(&self, board: &Board) -> Result<Vec<u8>, Error> {
        match &self.dtb {
            Some(given) => Ok(given.completed(board.chosen.initrd)),
            None => Ok(fdt::build(board)?),
        }
    }

    /// Logs that a user's own tree names an initrd at another address, or one that is not loaded.
    fn log_initrd(&self, placement: &Placement<'_>) {
        let Some(named) = self.dtb.as_ref().and_then(UserTree::initrd) else { return };
        let is_there = |blob: &Blob<'_>| blob.region().encloses(named);
        match placement.initrd {
            Some(ours) if ours != named => {
                log::info!("The device tree names an initrd at {named}; the guest's is at {ours}");
            }
            None if !placement.blobs.iter().any(is_there) => log::warn!(
                "The device tree names an initrd at {named}, and nothing is loaded there (give it with --initrd, or remove linux,initrd-start from the tree)"
            ),
            _ => {}
        }
    }

    /// Logs that an ELF file's own entry is not used, as on QEMU's `virt`.
    fn log_entry(&self, boot: &BootConfig, entry: u64) {
        let Some(kernel) = self.kernel.as_ref().filter(|_| boot.entry.is_none()) else { return };
        match kernel.format() {
            Format::Elf { e_entry, .. } if e_entry != entry => log::info!(
                "{} starts at {entry:#x}; the entry it names is {e_entry:#x} (--entry ADDR starts it elsewhere)",
                kernel.name(),
            ),
            _ => {}
        }
    }

    /// The segments of the kernel, which is loaded at `kernel`, and the flat files.
    fn code(&self, kernel: Option<Region>) -> Vec<Code> {
        let segments = self.kernel.iter().flat_map(|file| {
            let is_image = matches!(file.format(), Format::Image { .. });
            // An Image is one segment, and has no address of its own.
            let image_at = kernel.filter(|_| is_image).map(|region| region.base);
            file.segments().iter().map(move |segment| Code {
                region: Region::new(image_at.unwrap_or(segment.address), segment.source.len()),
                is_image,
            })
        });
        let loads = self.loads.iter().map(|load| Code {
            region: Region::new(load.address, load.source.len()),
            is_image: false,
        });
        segments.chain(loads).collect()
    }
}

/// Opens the kernel, of at most `limit` bytes uncompressed.
fn kernel(path: &Path, limit: u64) -> Result<Kernel, Error> {
    let kernel = Kernel::open(path, limit)?;
    if kernel.left_out() > 0 {
        log::warn!(
            "Ignored {} bytes at the end of {}, which are not {} (was the file truncated or joined wrongly?)",
            kernel.left_out(),
            kernel.name(),
            kernel.compression().map_or("part of it", Compression::name),
        );
    }
    Ok(kernel)
}

/// Opens the configured initrd. A user's own tree that names none has a command line that does not fit the built-in one.
fn initrd(boot: &BootConfig, dtb: Option<&UserTree>) -> Result<Option<Initrd>, Error> {
    match &boot.initrd {
        InitrdConfig::Builtin(_) if dtb.is_some_and(|tree| tree.initrd().is_none()) => Ok(None),
        InitrdConfig::None => Ok(None),
        InitrdConfig::File(path) => Ok(Some(Initrd::open(path)?)),
        InitrdConfig::Builtin(exe) => {
            Ok(Some(rvmm_init::initramfs(exe, rvmm_init::host_busybox().as_deref())?))
        }
    }
}

fn fill(ram: &GuestRam, placement: &Placement<'_>, tree: &[u8]) -> Result<(), Error> {
    for Blob { name, address, source, .. } in &placement.blobs {
        match source {
            Source::File { file, offset, len } => ram.place_file(*address, file, *offset, *len)?,
            Source::Bytes(bytes) => write(ram, *address, bytes, name)?,
        }
    }
    write(ram, placement.fdt.base, tree, "The device tree")
}

fn write(ram: &GuestRam, addr: u64, bytes: &[u8], name: &str) -> Result<(), Error> {
    ram.write(addr, bytes).map_err(|e| Error::Memory {
        what: format!("{name} does not fit at {addr:#x}: {}", ram.explain(e)),
        source: None,
    })
}

fn dump(path: &Path, tree: &[u8]) -> Result<(), Error> {
    write_file(path, tree).map_err(|source| Error::File {
        verb: "write",
        path: PathBuf::from(path),
        source,
    })
}
