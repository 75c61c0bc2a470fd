//! The layout of guest memory: pure arithmetic from sizes to guest-physical addresses.
//!
//! Three kinds of piece have a fixed address: an `Image` (the start of RAM plus its text offset), the
//! segments of an ELF file, and flat files. The device tree and the initrd are then placed as high as possible,
//! so that they do not obstruct a kernel that grows upwards, but within the first GiB of RAM if there is
//! room: QEMU's `virt` places them there too, and a guest that maps one GiB page sees everything. They start on
//! 2 MiB boundaries if there is room, so that the rest of RAM can still be mapped with huge pages.
//!
//! A device tree of at most 2 MiB has no further constraints: wherever it starts, it ends within 4 MiB of the
//! 2 MiB boundary below, which Linux maps (arch/riscv/mm/init.c, create_fdt_early_page_table).

use std::path::Path;

use crate::error::{BootError, Role, Size};
use crate::fdt;
use crate::image;
use crate::initrd::Initrd;
use crate::kernel::{Format, Kernel};
pub use crate::region::Region;
use crate::region::{Free, round_up};
use crate::source::Source;

const PAGE: u64 = 4 << 10;
const HUGE_PAGE: u64 = 2 << 20;

/// The device tree and the initrd are kept this close to the start of RAM if there is room.
const NEAR: u64 = 1 << 30;

/// A flat file at an address: `--load FILE@ADDR`.
#[derive(Clone, Debug)]
pub struct Load {
    /// The name of the file, as it may be printed.
    pub name: String,
    /// Its guest-physical address; any alignment.
    pub address: u64,
    /// Its contents.
    pub source: Source,
}

impl Load {
    /// Opens a flat file that is to be loaded at the guest-physical address `address`.
    ///
    /// # Errors
    /// [`BootError::Open`], or [`BootError::Unusable`] for an empty file and for everything that is not a
    /// regular file.
    pub fn open(path: &Path, address: u64) -> Result<Self, BootError> {
        let source = Source::open_as(path, Role::Data)?;
        Ok(Self { name: crate::FileName::from(path).to_string(), address, source })
    }
}

/// The pieces to place, and the memory for them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// The ranges of guest RAM, in ascending order, without overlap; each base and size a multiple of
    /// 4 KiB, the first base a multiple of 2 MiB.
    pub ram: &'a [Region],
    /// The parts of `ram` that the device tree and the initrd may use, in ascending order: the memory in a tree supplied by
    /// the user. Empty: all of it.
    pub memory: &'a [Region],
    /// The kernel, if there is one.
    pub kernel: Option<&'a Kernel>,
    /// Memory outside of `ram` that holds instructions from the start: flash. A guest may start there.
    pub roms: &'a [Region],
    /// Flat files at fixed addresses.
    pub loads: &'a [Load],
    /// `--entry`: the guest-physical address of the first instruction. By default that of the kernel, or,
    /// without a kernel, the address of the first load. Required if there is neither.
    pub entry: Option<u64>,
    /// The initrd, if there is one.
    pub initrd: Option<&'a Initrd>,
    /// An upper bound of the length of the device tree in bytes; at most [`fdt::MAX_LEN`].
    pub fdt_len: u64,
    /// The address of the device tree, a multiple of 8, if the user has fixed it.
    pub fdt_at: Option<u64>,
}

/// One piece that the caller maps or copies into guest RAM.
#[derive(Clone, Debug)]
pub struct Blob<'a> {
    /// Its name for messages: that of its file.
    pub name: String,
    /// Its guest-physical address.
    pub address: u64,
    /// Its contents.
    pub source: &'a Source,
    /// Its size in memory in bytes, at least `source.len()`; the rest has to be zero.
    pub mem_len: u64,
}

impl Blob<'_> {
    /// The memory that belongs to it.
    #[must_use]
    pub fn region(&self) -> Region {
        Region::new(self.address, self.mem_len)
    }
}

/// The addresses of all pieces. The blobs and the device tree do not overlap, and all of them are in RAM.
#[derive(Clone, Debug)]
pub struct Placement<'a> {
    /// The guest-physical address of the first instruction.
    pub entry: u64,
    /// The kernel with its BSS, from its lowest to its highest address.
    pub kernel: Option<Region>,
    /// The initrd's bytes, from a page boundary on: `linux,initrd-start` and `-end`.
    pub initrd: Option<Region>,
    /// The device tree, page-aligned unless the user has fixed its address: its address (for a1) and [`Request::fdt_len`].
    pub fdt: Region,
    /// All pieces except the device tree, ready to be mapped or copied; sorted by address.
    pub blobs: Vec<Blob<'a>>,
}

/// Assigns an address to every piece.
///
/// # Errors
/// [`BootError::TooLittleMemory`] with a sufficient memory size, [`BootError::Overlap`] and
/// [`BootError::OutsideRam`] with the pieces whose fixed addresses conflict, [`BootError::Entry`] for an
/// entry without contents, [`BootError::Layout`] for a request that breaks the rules of [`Request`].
pub fn place<'a>(request: &Request<'a>) -> Result<Placement<'a>, BootError> {
    let start = check(request)?;
    let mut blobs = fixed_blobs(request, start);
    blobs.sort_by_key(|blob| blob.address);
    check_fixed(request, start, &blobs)?;
    check_tree(request, &blobs)?;
    let entry = entry(request, start, &blobs)?;
    let kernel = request.kernel.map(|kernel| extent(kernel, start));
    let floating = float(request, start, &blobs);
    let (fdt, initrd) = floating.ok_or_else(|| too_little(request, &blobs))?;
    let mut address = initrd.map_or(0, |region| region.base);
    for source in request.initrd.iter().flat_map(|initrd| initrd.sources()) {
        let (name, mem_len) = ("initrd".to_string(), source.len());
        blobs.push(Blob { name, address, source, mem_len });
        address = address.saturating_add(mem_len);
    }
    blobs.sort_by_key(|blob| blob.address);
    Ok(Placement { entry, kernel, initrd, fdt, blobs })
}

/// Checks the rules of [`Request`] and returns the start of RAM.
fn check(request: &Request<'_>) -> Result<u64, BootError> {
    let Some(first) = request.ram.first().filter(|first| first.base.is_multiple_of(HUGE_PAGE))
    else {
        return Err(BootError::Layout("RAM does not start at a multiple of 2 MiB".into()));
    };
    let mut end = first.base;
    for region in request.ram {
        let pages = region.base.is_multiple_of(PAGE) && region.size.is_multiple_of(PAGE);
        let ends = region.base.checked_add(region.size).filter(|_| pages && region.base >= end);
        end = ends.ok_or_else(|| {
            BootError::Layout(format!("the RAM at {region} is out of order or not page-aligned"))
        })?;
    }
    if request.fdt_len == 0 || request.fdt_len > fdt::MAX_LEN {
        let reason = format!("a device tree of {} bytes cannot be placed", request.fdt_len);
        return Err(BootError::Layout(reason));
    }
    if request.kernel.is_none() && request.loads.is_empty() && request.entry.is_none() {
        return Err(BootError::Layout("there is neither a kernel nor a file to load".into()));
    }
    Ok(first.base)
}

/// The pieces with fixed addresses: those of the kernel and the flat files.
fn fixed_blobs<'a>(request: &Request<'a>, start: u64) -> Vec<Blob<'a>> {
    let kernel = request.kernel.into_iter().flat_map(move |kernel| {
        let base = kernel_base(kernel, start);
        kernel.segments().iter().map(move |segment| Blob {
            name: kernel.name().to_string(),
            address: base.saturating_add(segment.address),
            source: &segment.source,
            mem_len: segment.mem_len,
        })
    });
    let loads = request.loads.iter().map(|load| Blob {
        name: load.name.clone(),
        address: load.address,
        source: &load.source,
        mem_len: load.source.len(),
    });
    kernel.chain(loads).collect()
}

/// The kernel, if it is an `Image`.
fn image<'a>(request: &Request<'a>) -> Option<&'a Kernel> {
    request.kernel.filter(|kernel| matches!(kernel.format(), Format::Image { .. }))
}

/// The address that those of a kernel's segments are relative to.
fn kernel_base(kernel: &Kernel, start: u64) -> u64 {
    match kernel.format() {
        Format::Image { .. } => start,
        Format::Elf { .. } => 0,
    }
}

/// The range from a kernel's lowest to its highest address.
fn extent(kernel: &Kernel, start: u64) -> Region {
    let base = kernel_base(kernel, start);
    let regions = kernel.segments().iter().map(|s| Region::new(base + s.address, s.mem_len));
    let (low, high) = regions
        .fold((u64::MAX, 0), |(low, high), region| (low.min(region.base), high.max(region.end())));
    Region::new(low, high.saturating_sub(low))
}

/// Checks that the pieces with fixed addresses are in RAM and do not overlap.
fn check_fixed(request: &Request<'_>, start: u64, blobs: &[Blob<'_>]) -> Result<(), BootError> {
    for blob in blobs {
        let at = blob.region();
        let ram = request.ram.iter().find(|ram| ram.contains(at.base));
        // An Image has no absolute address: it only needs more RAM.
        let is_image = image(request).is_some_and(|kernel| extent(kernel, start).base == at.base);
        match ram {
            Some(ram) if ram.encloses(at) => {}
            None if !is_image => return Err(outside_ram(request, blob.name.clone(), at, blobs)),
            _ => return Err(too_little(request, blobs)),
        }
    }
    for (low, high) in blobs.iter().zip(blobs.iter().skip(1)) {
        if low.region().overlaps(high.region()) {
            return Err(BootError::Overlap {
                first: low.name.clone(),
                first_at: low.region(),
                second: high.name.clone(),
                second_at: high.region(),
            });
        }
    }
    Ok(())
}

/// Checks a device tree with a fixed address.
fn check_tree(request: &Request<'_>, blobs: &[Blob<'_>]) -> Result<(), BootError> {
    let Some(base) = request.fdt_at else { return Ok(()) };
    let at = Region::new(base, request.fdt_len);
    let what = "device tree".to_string();
    if base % 8 != 0 {
        return Err(BootError::Layout(format!(
            "a device tree at {base:#x} is not at a multiple of 8 bytes"
        )));
    }
    if !request.ram.iter().any(|ram| ram.encloses(at)) {
        return Err(outside_ram(request, what, at, blobs));
    }
    match blobs.iter().find(|blob| blob.region().overlaps(at)) {
        None => Ok(()),
        Some(blob) => Err(BootError::Overlap {
            first: blob.name.clone(),
            first_at: blob.region(),
            second: what,
            second_at: at,
        }),
    }
}

fn outside_ram(request: &Request<'_>, what: String, at: Region, blobs: &[Blob<'_>]) -> BootError {
    let ram: Vec<String> = request.ram.iter().map(ToString::to_string).collect();
    // More memory does not help for an address below RAM or above any machine's RAM.
    let start = request.ram.first().map_or(0, |ram| ram.base);
    let enough = enough(request, blobs);
    let more = (at.base >= start && enough <= image::ABSURD).then_some(enough);
    BootError::OutsideRam { what, at, ram: ram.join(", "), more }
}

/// The address of the first instruction, which has to be in the contents of a piece or in flash.
fn entry(request: &Request<'_>, start: u64, blobs: &[Blob<'_>]) -> Result<u64, BootError> {
    let entry = match (request.entry, request.kernel.map(Kernel::format)) {
        (Some(entry), _) | (None, Some(Format::Elf { entry: Some(entry), .. })) => entry,
        (None, Some(Format::Elf { entry: None, e_entry })) => {
            let reason = "the ELF file has nothing there, and nothing at its lowest address either \
                          (give --entry an address inside a loaded file)";
            return Err(BootError::Entry { entry: e_entry, reason: reason.into() });
        }
        (None, Some(Format::Image { text_offset, .. })) => start.saturating_add(text_offset),
        (None, None) => request.loads.first().map_or(start, |load| load.address),
    };
    let holds = |blob: &Blob<'_>| Region::new(blob.address, blob.source.len()).contains(entry);
    let is_rom = request.roms.iter().any(|rom| rom.contains(entry));
    let reason = if !is_rom && !blobs.iter().any(holds) {
        "nothing is loaded there (give --entry an address inside a loaded file, or a flash with mode=map)"
    } else if entry % 2 != 0 {
        "instructions have even addresses (give --entry one)"
    } else {
        return Ok(entry);
    };
    Err(BootError::Entry { entry, reason: reason.into() })
}

/// Places the device tree and the initrd around the fixed pieces, at the first choice that has room.
fn float(
    request: &Request<'_>,
    start: u64,
    blobs: &[Blob<'_>],
) -> Option<(Region, Option<Region>)> {
    let near = start.saturating_add(NEAR);
    let tries = [(near, HUGE_PAGE), (near, PAGE), (u64::MAX, HUGE_PAGE), (u64::MAX, PAGE)];
    tries.into_iter().find_map(|(ceiling, align)| {
        let mut free = Free::new(
            if request.memory.is_empty() { request.ram } else { request.memory },
            ceiling,
        );
        reserved(request, start, blobs).for_each(|region| free.take(region));
        let fixed = request.fdt_at.map(|base| Region::new(base, request.fdt_len));
        fixed.into_iter().for_each(|region| free.take(region));
        let initrd_len = request.initrd.map_or(0, Initrd::len);
        // The larger one first: then both fit whenever there is room for both.
        let initrd_first = align == PAGE && initrd_len > request.fdt_len;
        let before = if initrd_first { Some(free.take_highest(initrd_len, align)?) } else { None };
        let fdt = match fixed {
            Some(region) => region,
            None => free.take_highest(request.fdt_len, align)?,
        };
        let initrd = match (request.initrd, before) {
            (None, _) => None,
            (Some(_), Some(region)) => Some(region),
            (Some(_), None) => Some(free.take_highest(initrd_len, align)?),
        };
        Some((fdt, initrd))
    })
}

/// The memory that the device tree and the initrd may not use. An `Image` reserves whole 2 MiB pages, and
/// the memory below it, which old kernels do not map.
fn reserved<'b>(
    request: &Request<'_>,
    start: u64,
    blobs: &'b [Blob<'_>],
) -> impl Iterator<Item = Region> + 'b {
    let image = image(request).map(|kernel| {
        let end = round_up(extent(kernel, start).end(), image::ALIGN);
        Region::new(start, end.saturating_sub(start))
    });
    blobs.iter().map(Blob::region).chain(image)
}

/// The error with a memory size that is sufficient for the request.
fn too_little(request: &Request<'_>, blobs: &[Blob<'_>]) -> BootError {
    let start = request.ram.first().map_or(0, |ram| ram.base);
    if !request.memory.is_empty() && blobs.iter().all(|blob| in_ram(request, blob)) {
        let memory: Vec<String> = request.memory.iter().map(ToString::to_string).collect();
        return BootError::TreeMemoryTooSmall {
            what: pieces(request, start),
            named: memory.join(", "),
        };
    }
    BootError::TooLittleMemory {
        what: pieces(request, start),
        available: request.ram.iter().fold(0, |sum: u64, ram| sum.saturating_add(ram.size)),
        needed: enough(request, blobs),
    }
}

/// A sufficient size of RAM in one range: up to the end of the pieces with fixed addresses, and the rest after them.
/// A multiple of 2 MiB, which also suits huge pages.
fn enough(request: &Request<'_>, blobs: &[Blob<'_>]) -> u64 {
    let start = request.ram.first().map_or(0, |ram| ram.base);
    let tree = request.fdt_at.map(|base| base.saturating_add(request.fdt_len));
    let fixed = blobs.iter().map(|blob| blob.region().end()).chain(tree);
    let top = fixed.max().unwrap_or(start);
    let floating = if tree.is_some() { 0 } else { request.fdt_len };
    let needed = round_up(top, HUGE_PAGE)
        .saturating_add(round_up(request.initrd.map_or(0, Initrd::len), PAGE))
        .saturating_add(round_up(floating, PAGE));
    round_up(needed.saturating_sub(start), HUGE_PAGE)
}

fn in_ram(request: &Request<'_>, blob: &Blob<'_>) -> bool {
    request.ram.iter().any(|ram| ram.encloses(blob.region()))
}

/// The pieces to place, in words.
fn pieces(request: &Request<'_>, start: u64) -> String {
    let named = |what: &str, len| (what.to_string(), len);
    let kernel = request.kernel.map(|kernel| named("kernel", extent(kernel, start).size));
    let loads = request.loads.iter().map(|load| (load.name.to_string(), load.source.len()));
    let initrd = request.initrd.map(|initrd| named("initrd", initrd.len()));
    let pieces = kernel.into_iter().chain(loads).chain(initrd);
    let pieces: Vec<String> = pieces
        .chain([named("device tree", request.fdt_len)])
        .map(|(name, len)| format!("{name} ({})", Size(round_up(len, 1 << 10))))
        .collect();
    pieces.join(" + ")
}
