//! An ELF file with only symbols, for a stripped kernel, by which GDB finds functions.

use std::path::Path;

/// The fields of a section header: name, type, flags, address, offset, size, link, first global symbol, bytes of an entry.
type Section = (u32, u32, u64, u64, u64, u64, u32, u32, u64);

/// The names of the sections: `.text`, `.symtab`, `.strtab`.
const NAMES: &[u8] = b"\0.text\0.symtab\0.strtab\0";

const NOBITS: u32 = 8;
const ALLOCATED_CODE: u64 = 6;
const SYMTAB: u32 = 2;
const STRTAB: u32 = 3;
/// A global function in section 1.
const FUNCTION: [u8; 4] = [0x12, 0, 1, 0];

const HEADER: u64 = 64;

/// Writes symbols, each of a function of unknown length, all in the `size` bytes from `base` on.
pub(crate) fn write(path: &Path, base: u64, size: u64, symbols: &[(String, u64)]) {
    let mut strings = NAMES.to_vec();
    let mut table = vec![0; 24];
    for (name, addr) in symbols {
        table.extend(u32::try_from(strings.len()).expect("few names").to_le_bytes());
        table.extend(FUNCTION);
        table.extend(addr.to_le_bytes());
        table.extend(0_u64.to_le_bytes());
        strings.extend(name.as_bytes());
        strings.push(0);
    }
    let (table_len, strings_len) = (table.len() as u64, strings.len() as u64);
    let table_at = HEADER;
    let strings_at = table_at + table_len;
    let sections_at = strings_at + strings_len;
    let sections: [Section; 4] = [
        (0, 0, 0, 0, 0, 0, 0, 0, 0),
        (1, NOBITS, ALLOCATED_CODE, base, HEADER, size, 0, 0, 0),
        (7, SYMTAB, 0, 0, table_at, table_len, 3, 1, 24),
        (15, STRTAB, 0, 0, strings_at, strings_len, 0, 0, 0),
    ];
    // 64 bits, little-endian, executable, RISC-V.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2_u16, 243].map(u16::to_le_bytes).concat());
    file.extend(1_u32.to_le_bytes());
    file.extend([base, 0, sections_at].map(u64::to_le_bytes).concat());
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 0, 64, 4, 3].map(u16::to_le_bytes).concat());
    file.extend(table);
    file.extend(strings);
    for (name, kind, flags, addr, offset, size, link, first, entry) in sections {
        file.extend([name, kind].map(u32::to_le_bytes).concat());
        file.extend([flags, addr, offset, size].map(u64::to_le_bytes).concat());
        file.extend([link, first].map(u32::to_le_bytes).concat());
        file.extend([1, entry].map(u64::to_le_bytes).concat());
    }
    std::fs::write(path, file).expect("a file");
}
