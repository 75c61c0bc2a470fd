//! The program's own memory: what only the start needed can go again.
#![expect(unsafe_code, reason = "the program's own mapping is found by address")]

use std::{ptr, slice};

use rustix::mm::{Advice, madvise};

use super::PAGE;

/// Gives back the memory of the program's code and constants; what is used afterwards is read again from the program's file,
/// from the host's page cache as a rule. To be called once, after the start, by a program that is nothing but a machine:
/// taking a command line apart needs more code than running a guest.
///
/// What the heap no longer uses goes as well. Only a hint: where the program cannot be found in memory its code stays.
pub fn drop_start_up() {
    // SAFETY: has no preconditions; the allocator's own lock is taken.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
    for (address, len) in code() {
        // SAFETY: the kernel removes pages of a private mapping of a file. Nobody can have written them, since the segment
        // is not writable, and the file cannot change while it is executed: they come back as they were.
        let _ = unsafe {
            madvise(ptr::with_exposed_provenance_mut(address), len, Advice::LinuxDontNeed)
        };
    }
}

/// Whole pages of the program's segments that can be executed and not written, as addresses and lengths.
fn code() -> Vec<(usize, usize)> {
    // SAFETY: only asks; an entry that is missing reads as zero.
    let (headers, count) =
        unsafe { (libc::getauxval(libc::AT_PHDR), libc::getauxval(libc::AT_PHNUM)) };
    let (Ok(start), Ok(count)) = (usize::try_from(headers), usize::try_from(count)) else {
        return Vec::new();
    };
    let headers = ptr::with_exposed_provenance::<libc::Elf64_Phdr>(start);
    if headers.is_null() || !headers.is_aligned() {
        return Vec::new();
    }
    // SAFETY: getauxval(3): AT_PHNUM program headers lie at AT_PHDR, mapped as long as the program runs.
    let headers = unsafe { slice::from_raw_parts(headers, count) };
    let program = headers.iter().find(|header| header.p_type == libc::PT_PHDR);
    // Only a program that is loaded where it was linked for has no PT_PHDR.
    let shift = program.map_or(0, |header| (start as u64).wrapping_sub(header.p_vaddr));
    let fixed = headers.iter().filter(|h| {
        h.p_type == libc::PT_LOAD && h.p_flags & (libc::PF_X | libc::PF_W) == libc::PF_X
    });
    fixed
        .filter_map(|header| whole_pages(shift.wrapping_add(header.p_vaddr), header.p_filesz))
        .collect()
}

/// The whole pages inside `len` bytes from `start`.
fn whole_pages(start: u64, len: u64) -> Option<(usize, usize)> {
    let end = start.checked_add(len)? / PAGE * PAGE;
    let start = start.checked_next_multiple_of(PAGE)?;
    let len = end.checked_sub(start).filter(|len| *len > 0)?;
    Some((usize::try_from(start).ok()?, usize::try_from(len).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_that_lie_inside_are_taken() {
        assert_eq!(whole_pages(0x1000, 0x2000), Some((0x1000, 0x2000)));
        assert_eq!(whole_pages(0x1001, 0x2fff), Some((0x2000, 0x2000)));
        assert_eq!(whole_pages(0x1001, 0x1000), None);
        assert_eq!(whole_pages(0x1000, 0), None);
        assert_eq!(whole_pages(u64::MAX, 1), None);
    }

    #[test]
    fn the_program_finds_its_code_and_goes_on_without_it() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let program = std::env::current_exe().unwrap().display().to_string();
        let mapped: Vec<(u64, u64)> = maps
            .lines()
            .filter(|line| line.contains(" r-xp ") && line.ends_with(&program))
            .filter_map(|line| line.split(' ').next()?.split_once('-'))
            .map(|(from, to)| {
                let address = |text| u64::from_str_radix(text, 16).unwrap();
                (address(from), address(to))
            })
            .collect();
        assert!(!mapped.is_empty(), "{maps}");
        for &(from, to) in &mapped {
            // A segment need not begin or end with a page: of the kernel's mapping of it a page at each end may stay.
            let found = code().into_iter().any(|(start, len)| {
                let (start, end) = (start as u64, (start + len) as u64);
                start >= from && start - from <= PAGE && end <= to && to - end <= PAGE
            });
            assert!(found, "{from:#x}-{to:#x} is not among {:x?}", code());
        }
        drop_start_up();
        assert_eq!(format!("{:?}", whole_pages(0, PAGE)), "Some((0, 4096))");
    }
}
