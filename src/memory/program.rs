//! The program's own memory: pages that are not needed for the moment are returned to the host.
#![expect(unsafe_code, reason = "the program's own mapping is found by address")]

use std::{fs, ptr, slice};

use rustix::mm::{Advice, madvise};

use super::PAGE;
use super::pagemap::PageMap;

/// Returns the memory of the program's code and constants to the host; pages that are used afterwards are read again from the
/// program's file, usually from the host's page cache. To be called by a program that only runs a machine, after the start, since
/// parsing a command line needs more code than running a guest, and when the guest has become idle.
///
/// Pages that were written stay: relocated constants, and a breakpoint of a debugger or a uprobe, are in private copies of their pages.
/// While a debugger is attached everything stays.
///
/// Unused heap memory is returned, too. Only a hint: if the program cannot be found in memory its code stays.
pub fn discard_program_pages() {
    // SAFETY: has no preconditions; the allocator's own lock is taken.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
    let Ok(map) = PageMap::open() else { return };
    if fs::read_to_string("/proc/self/status").map_or(true, |status| is_traced(&status)) {
        return;
    }
    for (address, len) in read_only() {
        // Pages whose entries cannot be read stay.
        let _ = map.for_runs(
            address,
            len,
            |entry| !entry.is_private(),
            |address, len| {
                // SAFETY: the kernel removes unmodified pages of a private file mapping, and the file cannot change while it is
                // executed: they are read again with the same contents.
                let _ = unsafe {
                    madvise(ptr::with_exposed_provenance_mut(address), len, Advice::LinuxDontNeed)
                };
            },
        );
    }
}

/// True if a status file (proc_pid_status(5)) names a tracer, or has no such line.
fn is_traced(status: &str) -> bool {
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    tracer.is_none_or(|tracer| tracer.trim() != "0")
}

/// Whole pages of the program that nobody writes after its start, as addresses and lengths: the segments that can be executed and not
/// written, and what is written only by relocations (PT_GNU_RELRO).
fn read_only() -> Vec<(usize, usize)> {
    // SAFETY: has no side effects; a missing entry reads as zero.
    let (headers, count) =
        unsafe { (libc::getauxval(libc::AT_PHDR), libc::getauxval(libc::AT_PHNUM)) };
    let (Ok(start), Ok(count)) = (usize::try_from(headers), usize::try_from(count)) else {
        return Vec::new();
    };
    let headers = ptr::with_exposed_provenance::<libc::Elf64_Phdr>(start);
    if headers.is_null() || !headers.is_aligned() {
        return Vec::new();
    }
    // SAFETY: getauxval(3): AT_PHNUM program headers are at AT_PHDR, mapped as long as the program runs.
    let headers = unsafe { slice::from_raw_parts(headers, count) };
    let program = headers.iter().find(|header| header.p_type == libc::PT_PHDR);
    // Only a program that is loaded at its link address has no PT_PHDR.
    let shift = program.map_or(0, |header| (start as u64).wrapping_sub(header.p_vaddr));
    let fixed = headers.iter().filter(|h| {
        h.p_type == libc::PT_GNU_RELRO
            || h.p_type == libc::PT_LOAD && h.p_flags & (libc::PF_X | libc::PF_W) == libc::PF_X
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
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn only_pages_that_lie_inside_are_taken() {
        assert_eq!(whole_pages(0x1000, 0x2000), Some((0x1000, 0x2000)));
        assert_eq!(whole_pages(0x1001, 0x2fff), Some((0x2000, 0x2000)));
        assert_eq!(whole_pages(0x1001, 0x1000), None);
        assert_eq!(whole_pages(0x1000, 0), None);
        assert_eq!(whole_pages(u64::MAX, 1), None);
    }

    #[inline(never)]
    extern "C" fn uncalled() -> u32 {
        std::hint::black_box(0x6272_6b70)
    }

    #[test]
    fn a_breakpoint_in_the_program_stays_after_the_start() {
        let address = uncalled as *const () as u64;
        // As a debugger writes it: despite the protection, into a private copy of the page.
        let memory = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
        let mut before = [0];
        memory.read_exact_at(&mut before, address).unwrap();
        if let Err(error) = memory.write_all_at(&[!before[0]], address) {
            // The kernel allows it only to debuggers.
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
            return rvmm_devices::testing::skip("only debuggers write a program's text");
        }
        discard_program_pages();
        let mut after = [0];
        memory.read_exact_at(&mut after, address).unwrap();
        memory.write_all_at(&before, address).unwrap();
        assert_eq!(after, [!before[0]]);
    }

    // Not `uncalled`, which another test changes.
    static RELOCATED: [&(dyn Fn(u32) -> u32 + Sync); 1] = [&|number| number + 1];

    #[test]
    fn relocated_constants_stay() {
        let address = (&raw const RELOCATED).addr();
        let is_inside = |(start, len): (usize, usize)| (start..start + len).contains(&address);
        assert!(read_only().into_iter().any(is_inside), "{address:#x} in {:x?}", read_only());
        discard_program_pages();
        assert_eq!(std::hint::black_box(&RELOCATED)[0](1), 2);
    }

    #[test]
    fn only_a_status_without_a_tracer_is_not_traced() {
        assert!(!is_traced("Name:\trvmm\nTracerPid:\t0\nUid:\t0\n"));
        for status in ["Name:\trvmm\nTracerPid:\t17\n", "TracerPid:\n", ""] {
            assert!(is_traced(status), "{status:?}");
        }
    }

    #[test]
    fn the_program_finds_its_code_and_runs_after_dropping_it() {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
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
            // A segment need not begin or end at a page boundary: a page at each end of its mapping may stay.
            let found = read_only().into_iter().any(|(start, len)| {
                let (start, end) = (start as u64, (start + len) as u64);
                start >= from && start - from <= PAGE && end <= to && to - end <= PAGE
            });
            assert!(found, "{from:#x}-{to:#x} is not among {:x?}", read_only());
        }
        discard_program_pages();
        assert_eq!(format!("{:?}", whole_pages(0, PAGE)), "Some((0, 4096))");
    }
}
