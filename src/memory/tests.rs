//! Tests of guest RAM on any machine.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rvmm_devices::testing::skip;

use super::*;

const SPAN: Span = Span { base: 0x8000_0000, size: 4 << 20 };

fn file_of(bytes: &[u8]) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Arc::new(file)
}

#[test]
fn cleared_memory_is_zero_and_has_no_file_over_it() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.write_all_at(&[7; 8192], 0).unwrap();
    let span = Span { base: 0x8000_0000, size: 1 << 20 };
    for ram in [GuestRam::new(span, false).unwrap(), GuestRam::shared(span, false).unwrap()] {
        ram.place_file(span.base + 4096, &file, 0, 8192).unwrap();
        ram.write(span.base + 100, &[9; 10]).unwrap();
        ram.clear().unwrap();
        let mut all = vec![1; 1 << 20];
        ram.read(span.base, &mut all).unwrap();
        assert!(all.iter().all(|byte| *byte == 0));
        // A file that has shrunk since no longer matters.
        file.set_len(100).unwrap();
        assert!(!ram.is_lost());
        file.write_all_at(&[7; 8192], 0).unwrap();
        ram.place_file(span.base, &file, 0, 8192).unwrap();
        ram.read(span.base, &mut all[..8192]).unwrap();
        assert!(all[..8192].iter().all(|byte| *byte == 7));
    }
}

#[test]
fn ram_is_zero_at_first_and_keeps_what_is_written() {
    let ram = GuestRam::new(SPAN, false).unwrap();
    let mut buf = [1; 8];
    ram.read(SPAN.end() - 8, &mut buf).unwrap();
    assert_eq!(buf, [0; 8]);
    ram.write(SPAN.base, b"rvmm").unwrap();
    let mut buf = [0; 4];
    ram.read(SPAN.base, &mut buf).unwrap();
    assert_eq!(&buf, b"rvmm");
}

#[test]
fn a_range_that_leaves_ram_or_wraps_is_refused_whole() {
    let ram = GuestRam::new(SPAN, false).unwrap();
    let mut buf = [0; 16];
    for addr in [0, SPAN.base - 1, SPAN.end() - 15, SPAN.end(), u64::MAX - 8, u64::MAX] {
        assert_eq!(ram.read(addr, &mut buf), Err(RamError::NotRam), "{addr:#x}");
        assert_eq!(ram.write(addr, &buf), Err(RamError::NotRam), "{addr:#x}");
    }
    assert!(ram.contains(SPAN.end(), 0));
    assert!(!ram.contains(SPAN.base, u64::MAX));
}

#[test]
fn a_file_is_seen_whole_whether_its_pages_can_be_mapped_or_not() {
    let bytes: Vec<u8> = (0..=250).cycle().take(20_000).collect();
    let file = file_of(&bytes);
    for (addr, offset, len) in
        [(0, 0, 20_000), (0x1234, 0, 20_000), (0x10, 0x10, 12_000), (0x2000, 1, 9_000), (5, 7, 3)]
    {
        let ram = GuestRam::new(SPAN, false).unwrap();
        ram.place_file(SPAN.base + addr, &file, offset as u64, len as u64).unwrap();
        let mut got = vec![0; len];
        ram.read(SPAN.base + addr, &mut got).unwrap();
        assert_eq!(got, bytes[offset..offset + len], "{addr:#x} {offset} {len}");
        let mut after = [7];
        ram.read(SPAN.base + addr + len as u64, &mut after).unwrap();
        assert_eq!(after, [0], "a byte after the file is not zero");
    }
}

#[test]
fn what_the_guest_writes_never_reaches_the_file() {
    let file = file_of(&[1; 8192]);
    let ram = GuestRam::new(SPAN, false).unwrap();
    ram.place_file(SPAN.base, &file, 0, 8192).unwrap();
    ram.write(SPAN.base + 100, &[9; 5000]).unwrap();
    let mut back = vec![0; 8192];
    file.read_exact_at(&mut back, 0).unwrap();
    assert_eq!(back, [1; 8192]);
}

#[test]
fn a_file_that_shrinks_under_the_guest_loses_memory_but_not_the_process() {
    let file = file_of(&[1; 4 * 4096]);
    let ram = GuestRam::new(SPAN, false).unwrap();
    ram.place_file(SPAN.base, &file, 0, 4 * 4096).unwrap();
    assert!(!ram.is_lost());
    file.set_len(4096).unwrap();
    assert!(ram.is_lost(), "a shrunk file is noticed before a page is touched");
    let mut buf = [1; 16];
    assert_eq!(ram.read(SPAN.base + 2 * 4096, &mut buf), Err(RamError::Lost));
    assert_eq!(buf, [0; 16]);
}

#[test]
fn two_guests_lose_memory_apart_from_each_other() {
    let file = file_of(&[1; 2 * 4096]);
    let one = GuestRam::new(SPAN, false).unwrap();
    let two = GuestRam::new(SPAN, false).unwrap();
    one.place_file(SPAN.base, &file, 0, 2 * 4096).unwrap();
    file.set_len(0).unwrap();
    let mut buf = [0; 4];
    assert_eq!(one.read(SPAN.base, &mut buf), Err(RamError::Lost));
    assert_eq!(two.read(SPAN.base, &mut buf), Ok(()));
    assert!(!two.is_lost());
}

/// RAM in huge pages that the host does not have; reports a skip if it has some.
pub(crate) fn without_huge_pages(span: Span, shared: bool) -> Option<GuestRam> {
    let pool = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let more = std::fs::read_to_string(
        "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages",
    );
    if ![pool, more].iter().all(|count| count.as_deref().is_ok_and(|count| count.trim() == "0")) {
        skip("this host has huge pages of 2 MiB, or no pool of them");
        return None;
    }
    let reservation = Reservation::of_absent_pages(span.size, shared).unwrap();
    Some(GuestRam::over(span, reservation).unwrap())
}

#[test]
fn a_missing_huge_page_is_an_error_and_does_not_end_the_process() {
    for shared in [false, true] {
        let Some(ram) = without_huge_pages(SPAN, shared) else { return };
        let mut buf = [1; 16];
        assert_eq!(ram.read(SPAN.base + HUGE_PAGE + 4096, &mut buf), Err(RamError::Lost));
        assert_eq!(buf, [0; 16]);
        assert_eq!(ram.write(SPAN.base, &[1]), Err(RamError::Lost));
        assert!(ram.failure().unwrap().contains("no huge page is left"));
        let Some(other) = without_huge_pages(SPAN, shared) else { return };
        assert!(other.is_lost(), "found without an access of the test's");
        let error = other.place_file(SPAN.base, &file_of(&[1; 4096]), 0, 4096).unwrap_err();
        assert_eq!(error.exit_code(), crate::error::EXIT_HOST);
        let what = error.to_string();
        assert!(what.contains("huge page") && what.contains("vm.nr_hugepages"), "{what}");
    }
}

#[test]
fn more_memory_than_the_address_space_holds_is_refused_with_advice() {
    let error = GuestRam::new(Span { base: 0x8000_0000, size: 1 << 62 }, false).unwrap_err();
    assert!(error.to_string().contains("--mem"), "{error}");
}

/// The first byte of each of the first pages of RAM.
fn first_bytes(ram: &GuestRam, pages: u64) -> Vec<u8> {
    let byte = |page: u64| {
        let mut byte = [0];
        ram.read(SPAN.base + page * PAGE, &mut byte).unwrap();
        byte[0]
    };
    (0..pages).map(byte).collect()
}

#[test]
fn whole_pages_that_are_given_back_read_as_zero_and_can_be_used_again() {
    let ram = GuestRam::new(SPAN, false).unwrap();
    ram.write(SPAN.base, &[1; 8 * 4096]).unwrap();
    ram.release(SPAN.base + 1, 2 * PAGE);
    ram.release(SPAN.base + 4 * PAGE, 2 * PAGE);
    ram.release(SPAN.base + 7 * PAGE, PAGE - 1);
    assert_eq!(first_bytes(&ram, 9), [1, 0, 1, 1, 0, 0, 1, 1, 0]);
    ram.write(SPAN.base + 4 * PAGE, &[2]).unwrap();
    assert_eq!(first_bytes(&ram, 6), [1, 0, 1, 1, 2, 0]);
}

#[test]
fn what_is_not_ram_is_not_given_back() {
    let ram = GuestRam::new(SPAN, false).unwrap();
    ram.write(SPAN.base, &[1; 4096]).unwrap();
    ram.write(SPAN.end() - PAGE, &[1; 4096]).unwrap();
    for (addr, len) in [
        (0, 4096),
        (SPAN.base - PAGE, PAGE),
        (SPAN.end(), PAGE),
        (SPAN.end(), u64::MAX),
        (u64::MAX, 1),
        (u64::MAX - 5000, 5000),
        (SPAN.base, 0),
    ] {
        ram.release(addr, len);
        assert_eq!(first_bytes(&ram, 1), [1], "{addr:#x} {len:#x}");
    }
    ram.release(SPAN.end() - PAGE, u64::MAX);
    let mut last = [7];
    ram.read(SPAN.end() - PAGE, &mut last).unwrap();
    assert_eq!(last, [0]);
    ram.release(0, u64::MAX);
    assert_eq!(first_bytes(&ram, 1), [0]);
}

#[test]
fn pages_of_a_file_stay_when_they_are_given_back() {
    let file = file_of(&[1; 3 * 4096]);
    let ram = GuestRam::new(SPAN, false).unwrap();
    ram.write(SPAN.base, &[2; 12 * 4096]).unwrap();
    ram.place_file(SPAN.base + 2 * PAGE, &file, 0, 3 * PAGE).unwrap();
    ram.place_file(SPAN.base + 8 * PAGE, &file, 0, 2 * PAGE).unwrap();
    ram.write(SPAN.base + 3 * PAGE, &[3]).unwrap();
    ram.release(SPAN.base + PAGE, 8 * PAGE);
    assert_eq!(first_bytes(&ram, 12), [2, 0, 1, 3, 1, 0, 0, 0, 1, 1, 2, 2]);
    ram.release(SPAN.base, SPAN.size);
    assert_eq!(first_bytes(&ram, 12), [0, 0, 1, 3, 1, 0, 0, 0, 1, 1, 0, 0]);
    assert!(!ram.is_lost());
}

#[test]
fn shared_memory_is_a_file_that_has_everything_the_guest_has() {
    use std::os::unix::fs::FileExt;
    let bytes: Vec<u8> = (0..=250).cycle().take(20_000).collect();
    let ram = GuestRam::shared(SPAN, false).unwrap();
    ram.place_file(SPAN.base + 0x2000, &file_of(&bytes), 0, 20_000).unwrap();
    ram.write(SPAN.end() - 4, b"rvmm").unwrap();
    let regions: Vec<_> = vm_memory::GuestMemoryBackend::iter(ram.view()).collect();
    let file = vm_memory::GuestMemoryRegion::file_offset(regions[0]).unwrap();
    let mut got = vec![0; 20_000];
    file.file().read_exact_at(&mut got, 0x2000).unwrap();
    assert_eq!(got, bytes);
    file.file().read_exact_at(&mut got[..4], SPAN.size - 4).unwrap();
    assert_eq!(&got[..4], b"rvmm");
    file.file().write_all_at(b"peer", 0x9000).unwrap();
    ram.read(SPAN.base + 0x9000, &mut got[..4]).unwrap();
    assert_eq!(&got[..4], b"peer");
}

#[test]
fn pages_of_shared_memory_return_to_the_host_and_its_size_is_fixed() {
    let ram = GuestRam::shared(SPAN, false).unwrap();
    ram.write(SPAN.base, &[1; 8 * 4096]).unwrap();
    let regions: Vec<_> = vm_memory::GuestMemoryBackend::iter(ram.view()).collect();
    let file = vm_memory::GuestMemoryRegion::file_offset(regions[0]).unwrap().file();
    assert_eq!(file.metadata().unwrap().blocks(), 8 * 8);
    ram.release(SPAN.base + 1, 3 * PAGE);
    // Reading a page allocates it again.
    assert_eq!(file.metadata().unwrap().blocks(), 6 * 8);
    assert_eq!(first_bytes(&ram, 5), [1, 0, 0, 1, 1]);
    assert!(file.set_len(4096).is_err() && file.set_len(SPAN.size * 2).is_err());
}
