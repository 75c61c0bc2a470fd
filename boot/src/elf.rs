//! ELF files with physical addresses: 64-bit, little-endian, RISC-V (gABI chapters 4 and 5).
//!
//! Bare-metal programs, teaching kernels and boot loaders such as U-Boot are ELF files. Each PT_LOAD segment
//! is loaded at its `p_paddr`, and the guest starts at the lowest of these: QEMU's `virt` ignores `e_entry`,
//! and files of guests that were written for it have 0 or a virtual address there. Linux's `vmlinux` is linked
//! at virtual addresses and has no load address, so it is refused with a hint at the `Image`.

use elf::abi;
use elf::endian::AnyEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::parse::ParsingTable;
use elf::segment::ProgramHeader;

use crate::error::BootError;
use crate::kernel::{Format, KernelFile};
use crate::region::Region;
use crate::source::{Segment, Source};

/// The length of a 64-bit program header in bytes.
const PHDR_LEN: u64 = 56;

/// Start of the kernel half of the virtual address space in every RISC-V MMU mode.
const KERNEL_HALF: u64 = 1 << 63;

const DAMAGED: &str = "(the file is damaged: copy or build it again)";

/// True if a file that starts with `head` is an ELF file of any kind.
#[must_use]
pub fn is_elf(head: &[u8]) -> bool {
    head.starts_with(&abi::ELFMAGIC)
}

/// Checks an ELF file and creates its segments, sorted by address.
pub(crate) fn open(file: &KernelFile<'_>) -> Result<(Format, Vec<Segment>), BootError> {
    let unusable = |reason| file.unusable(reason);
    let header = file_header(&file.head).map_err(unusable)?;
    let table = table(&header, file.len).map_err(unusable)?;
    let mut bytes = vec![0; table.len];
    let source = Source::File { file: file.file.clone(), offset: 0, len: file.len };
    source.read_exact_at(table.offset, &mut bytes)?;
    let loads = loads(&header, &bytes);
    check(&loads, file.len).map_err(unusable)?;
    let format = Format::Elf { entry: entry(&header, &loads), e_entry: header.e_entry };
    let segment = |load: &ProgramHeader| Segment {
        address: load.p_paddr,
        source: Source::File { file: file.file.clone(), offset: load.p_offset, len: load.p_filesz },
        mem_len: load.p_memsz,
    };
    Ok((format, loads.iter().map(segment).collect()))
}

/// Parses the file header and checks that it is that of a program for a 64-bit little-endian RISC-V machine.
fn file_header(head: &[u8]) -> Result<FileHeader<AnyEndian>, String> {
    let cut_short = || "it is an ELF file cut short inside its header (copy it again)".to_string();
    let (ident, tail) = head.split_at_checked(abi::EI_NIDENT).ok_or_else(cut_short)?;
    let ident = parse_ident::<AnyEndian>(ident).map_err(|_| {
        format!("it is an ELF file of unknown class, byte order or version {DAMAGED}")
    })?;
    let header = FileHeader::parse_tail(ident, tail).map_err(|_| cut_short())?;
    let machine = match (header.e_machine, header.class, header.endianness) {
        (abi::EM_RISCV, Class::ELF64, AnyEndian::Little) => return is_program(header),
        (abi::EM_RISCV, Class::ELF32, _) => "32-bit RISC-V".into(),
        (abi::EM_RISCV, ..) => "big-endian RISC-V".into(),
        (abi::EM_X86_64, ..) => "x86-64".into(),
        (abi::EM_386, ..) => "32-bit x86".into(),
        (abi::EM_AARCH64, ..) => "arm64".into(),
        (abi::EM_ARM, ..) => "32-bit arm".into(),
        (number, ..) => format!("another machine (number {number})"),
    };
    Err(format!("it is an ELF file for {machine} (give one built for riscv64)"))
}

fn is_program(header: FileHeader<AnyEndian>) -> Result<FileHeader<AnyEndian>, String> {
    let what = match header.e_type {
        abi::ET_EXEC | abi::ET_DYN => return Ok(header),
        abi::ET_REL => "an object file (link it first)",
        abi::ET_CORE => "a core dump (give the program itself)",
        _ => "an ELF file that is not a program (give a linked one)",
    };
    Err(format!("it is {what}"))
}

/// The position of the program headers in the file.
struct Table {
    offset: u64,
    len: usize,
}

fn table(header: &FileHeader<AnyEndian>, file_len: u64) -> Result<Table, String> {
    let (offset, count) = (header.e_phoff, header.e_phnum);
    if count == 0 {
        return Err("it is an ELF file without program headers (link it first)".into());
    }
    if count == abi::PN_XNUM || u64::from(header.e_phentsize) != PHDR_LEN {
        return Err(format!("it is an ELF file with impossible program headers {DAMAGED}"));
    }
    let len = u64::from(count) * PHDR_LEN;
    let inside = offset.checked_add(len).is_some_and(|end| end <= file_len);
    match usize::try_from(len) {
        Ok(len) if inside => Ok(Table { offset, len }),
        _ => Err(format!("it is an ELF file whose program headers are past its end {DAMAGED}")),
    }
}

/// The headers of all non-empty PT_LOAD segments, sorted by physical address.
fn loads(header: &FileHeader<AnyEndian>, table: &[u8]) -> Vec<ProgramHeader> {
    let table = ParsingTable::new(header.endianness, header.class, table);
    let takes_memory = |ph: &ProgramHeader| ph.p_type == abi::PT_LOAD && ph.p_memsz != 0;
    let mut loads: Vec<ProgramHeader> = table.iter().filter(takes_memory).collect();
    loads.sort_by_key(|ph| ph.p_paddr);
    loads
}

/// Checks that the segments are inside the file and do not overlap.
fn check(loads: &[ProgramHeader], file_len: u64) -> Result<(), String> {
    let Some(first) = loads.first() else {
        return Err("it is an ELF file without anything to load (link it first)".into());
    };
    let is_virtual = |ph: &ProgramHeader| ph.p_paddr >= KERNEL_HALF;
    let is_unplaced = first.p_paddr == 0 && first.p_vaddr >= KERNEL_HALF;
    if is_unplaced || loads.iter().any(is_virtual) {
        return Err(format!(
            "it is a vmlinux linked at the virtual address {:#x}, without a load address \
             (give the Image made from it: arch/riscv/boot/Image)",
            first.p_vaddr
        ));
    }
    for ph in loads {
        let at = Region::new(ph.p_paddr, ph.p_memsz);
        if ph.p_filesz > ph.p_memsz || ph.p_paddr.checked_add(ph.p_memsz).is_none() {
            return Err(format!("it is an ELF file with an impossible segment at {at} {DAMAGED}"));
        }
        if ph.p_offset.checked_add(ph.p_filesz).is_none_or(|end| end > file_len) {
            return Err(format!(
                "it is an ELF file whose segment at {at} is past its end (copy or build it again)"
            ));
        }
    }
    for (low, high) in loads.iter().zip(loads.iter().skip(1)) {
        // The sum was checked above.
        if low.p_paddr.saturating_add(low.p_memsz) > high.p_paddr {
            return Err(format!(
                "it is an ELF file whose segments at {:#x} and {:#x} overlap (link it again)",
                low.p_paddr, high.p_paddr
            ));
        }
    }
    Ok(())
}

/// The guest-physical address of the first instruction: the lowest one loaded. If that is not code, or zeros that are not in
/// the file, no guest can start there, and `e_entry` is used, which is virtual by the specification.
fn entry(header: &FileHeader<AnyEndian>, loads: &[ProgramHeader]) -> Option<u64> {
    let is_code = |ph: &ProgramHeader| ph.p_flags & abi::PF_X != 0;
    let lowest = loads.first().filter(|ph| ph.p_filesz > 0);
    match (lowest, named_entry(header, loads)) {
        (Some(lowest), Some((entry, at))) if !is_code(lowest) && is_code(at) => Some(entry),
        (Some(lowest), _) => Some(lowest.p_paddr),
        (None, named) => named.map(|(entry, _)| entry),
    }
}

/// The guest-physical address of `e_entry`, and the segment whose contents include it, if there is one.
fn named_entry<'a>(
    header: &FileHeader<AnyEndian>,
    loads: &'a [ProgramHeader],
) -> Option<(u64, &'a ProgramHeader)> {
    let entry = header.e_entry;
    let offset_from = |start: u64, ph: &ProgramHeader| {
        entry.checked_sub(start).filter(|offset| *offset < ph.p_filesz)
    };
    let physical = loads.iter().find(|ph| offset_from(ph.p_paddr, ph).is_some());
    let translated = |ph: &'a ProgramHeader| Some((ph.p_paddr + offset_from(ph.p_vaddr, ph)?, ph));
    physical.map(|ph| (entry, ph)).or_else(|| loads.iter().find_map(translated))
}
