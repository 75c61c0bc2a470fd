//! Snapshots in folders: whole or not at all, and refused if anything has changed.
#![allow(clippy::cast_possible_truncation, reason = "a test's sizes are small")]

use std::os::unix::fs::{FileExt, PermissionsExt};

use super::*;
use crate::config::VmConfig;
use crate::hypervisor::VmState;
use crate::layout::Span;

const SPAN: Span = Span { base: 0x8000_0000, size: 16 << 20 };

fn machine() -> SavedMachine {
    let vm = VmState { time: 5, harts: Vec::new(), irqchip: None };
    let config = VmConfig { mem: SPAN.size, ..VmConfig::default() };
    SavedMachine { saved_at_ns: 7, config, disks: Vec::new(), vm, devices: Vec::new() }
}

/// Saves RAM, whole or the pages in `ranges` as a difference to `parent`.
fn save(
    folder: &Path,
    ram: &GuestRam,
    difference: Option<(Parent, Vec<Range<u64>>)>,
) -> Result<Parent, Error> {
    let read = |at: u64, to: &mut [u8]| ram.read(SPAN.base + at, to).map_err(io::Error::other);
    let (parent, ranges) = match difference {
        Some((parent, ranges)) => (Some(parent), ranges),
        None => (None, ram.occupied().unwrap()),
    };
    let mut writer = SnapshotWriter::create(folder, SPAN.size, parent)?;
    writer.add_pages(&ranges, &read).unwrap();
    writer.finish_memory(&read).unwrap().finish(machine(), folder)
}

fn new_ram() -> GuestRam {
    GuestRam::new(SPAN, false).unwrap()
}

fn restored(snapshot: &Snapshot) -> GuestRam {
    let ram = new_ram();
    snapshot.fill(&ram).unwrap();
    ram
}

fn refusal(folder: &Path) -> String {
    let error = Snapshot::open(folder).unwrap_err();
    assert_eq!(error.exit_code(), crate::error::EXIT_SNAPSHOT, "{error}");
    error.to_string()
}

fn all(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; SPAN.size as usize];
    ram.read(SPAN.base, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_snapshot_has_the_memory_and_the_state_that_were_saved() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("snapshot");
    let ram = new_ram();
    ram.write(SPAN.base, b"first").unwrap();
    ram.write(SPAN.end() - 4, b"last").unwrap();
    save(&folder, &ram, None).unwrap();
    let snapshot = Snapshot::open(&folder).unwrap();
    assert_eq!(snapshot.machine(), &machine());
    // It contains the guest's memory: nobody else may read it.
    assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
    let again = restored(&snapshot);
    assert!(all(&again) == all(&ram));
    // What the new guest writes does not reach the file.
    again.write(SPAN.base, b"other").unwrap();
    assert!(all(&restored(&Snapshot::open(&folder).unwrap())) == all(&ram));
}

#[test]
fn a_chain_of_differences_has_the_last_contents_of_every_page() {
    let temporary = tempfile::tempdir().unwrap();
    let place = |number: u64| temporary.path().join(number.to_string());
    let ram = new_ram();
    ram.write(SPAN.base, &vec![1; 1 << 20]).unwrap();
    let mut parent = save(&place(0), &ram, None).unwrap();
    for number in 1..=10 {
        // Other pages each time, some of them zero again.
        let byte = if number % 3 == 0 { 0 } else { number as u8 };
        let dirty = [number, number + 3, 200 + number].map(|page| page * 4096..(page + 1) * 4096);
        for range in &dirty {
            ram.write(SPAN.base + range.start, &[byte; 4096]).unwrap();
        }
        parent = save(&place(number), &ram, Some((parent, dirty.to_vec()))).unwrap();
        let snapshot = Snapshot::open(&place(number)).unwrap();
        assert!(all(&restored(&snapshot)) == all(&ram), "difference {number}");
        assert_eq!(*parent.folder, fs::canonicalize(place(number)).unwrap());
    }
    // A snapshot in the middle that was replaced.
    save(&place(4), &new_ram(), None).unwrap();
    assert!(refusal(&place(10)).contains("was replaced by another one"));
    fs::remove_dir_all(place(4)).unwrap();
    assert!(refusal(&place(10)).contains("/4: cannot read its state.json"));
    let itself = SnapshotWriter::create(&place(10), SPAN.size, Some(parent)).unwrap_err();
    assert!(itself.to_string().contains("a difference to itself"), "{itself}");
}

#[test]
fn an_old_snapshot_is_replaced_whole_or_stays() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("snapshot");
    let (old, new) = (new_ram(), new_ram());
    old.write(SPAN.base, b"old").unwrap();
    new.write(SPAN.base + 8192, b"new").unwrap();
    save(&folder, &old, None).unwrap();
    // One that is not finished, whatever the reason.
    let mut writer = SnapshotWriter::create(&folder, SPAN.size, None).unwrap();
    let unreadable = |_: u64, _: &mut [u8]| Err(io::ErrorKind::Other.into());
    writer.add_pages(std::slice::from_ref(&(0..4096)), &unreadable).unwrap_err();
    drop(writer);
    assert!(all(&restored(&Snapshot::open(&folder).unwrap())) == all(&old));
    save(&folder, &new, None).unwrap();
    assert!(all(&restored(&Snapshot::open(&folder).unwrap())) == all(&new));
    let left: Vec<_> = fs::read_dir(temporary.path()).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn what_a_killed_program_has_left_is_removed_and_what_a_running_one_writes_is_not() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("snapshot");
    let abandoned = temporary.path().join(".snapshot.partial-1");
    fs::create_dir(&abandoned).unwrap();
    fs::write(abandoned.join(MEMORY), b"half").unwrap();
    let busy = temporary.path().join(".snapshot.partial-2");
    fs::create_dir(&busy).unwrap();
    let lock = File::open(&busy).unwrap();
    lock.lock().unwrap();
    save(&folder, &new_ram(), None).unwrap();
    assert!(!abandoned.exists() && busy.exists());
    // The second of two at once in one process.
    let first = SnapshotWriter::create(&folder, SPAN.size, None).unwrap();
    assert!(SnapshotWriter::create(&folder, SPAN.size, None).is_err());
    drop(first);
    assert!(Snapshot::open(&folder).is_ok());
}

#[test]
fn something_else_than_a_snapshot_is_never_replaced() {
    let temporary = tempfile::tempdir().unwrap();
    let file = temporary.path().join("file");
    fs::write(&file, b"precious").unwrap();
    for place in [&file, temporary.path(), Path::new("/"), Path::new("/nowhere/at/all")] {
        assert!(SnapshotWriter::create(place, SPAN.size, None).is_err(), "{}", place.display());
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[test]
fn a_full_disk_leaves_the_old_snapshot_and_nothing_else() {
    crate::host::on_a_small_file_system(|small| {
        let folder = small.join("snapshot");
        let ram = new_ram();
        save(&folder, &ram, None).unwrap();
        let read = |at: u64, to: &mut [u8]| {
            ram.read(SPAN.base + at, to).unwrap();
            to.fill(7);
            Ok(())
        };
        let mut writer = SnapshotWriter::create(&folder, SPAN.size, None).unwrap();
        let error = writer.add_pages(std::slice::from_ref(&(0..SPAN.size)), &read).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
        drop(writer);
        assert!(Snapshot::open(&folder).is_ok());
        assert_eq!(fs::read_dir(small).unwrap().count(), 1);
    });
}

#[test]
fn every_byte_that_is_changed_or_missing_is_noticed() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("snapshot");
    let ram = new_ram();
    ram.write(SPAN.base + 4096, &[0x5a; 4096]).unwrap();
    save(&folder, &ram, None).unwrap();
    for name in [STATE, CHECKSUM, MEMORY] {
        let path = folder.join(name);
        let whole = fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let places = (0..whole.len()).step_by(if name == MEMORY { 4096 * 37 + 11 } else { 1 });
        for at in places.chain([4096, 8191, whole.len() - 1]).filter(|at| *at < whole.len()) {
            file.write_all_at(&[whole[at] ^ 0x20], at as u64).unwrap();
            refusal(&folder);
            file.write_all_at(&whole[at..=at], at as u64).unwrap();
        }
        for len in [0, 1, whole.len() / 2, whole.len() - 1] {
            file.set_len(len as u64).unwrap();
            refusal(&folder);
        }
        file.set_len(whole.len() as u64 + 1).unwrap();
        refusal(&folder);
        file.set_len(0).unwrap();
        file.write_all_at(&whole, 0).unwrap();
        Snapshot::open(&folder).unwrap();
        fs::rename(&path, folder.join("gone")).unwrap();
        refusal(&folder);
        fs::rename(folder.join("gone"), &path).unwrap();
    }
    // Without the stamp, or with a wrong one, the memory is read.
    for stamp in ["", "1 2 3 4.5 6.7\n"] {
        fs::write(folder.join(STAMP), stamp).unwrap();
        Snapshot::open(&folder).unwrap();
    }
}

#[test]
fn a_copy_is_checked_once_and_a_wrong_one_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let (folder, copy) = (temporary.path().join("snapshot"), temporary.path().join("copy"));
    let ram = new_ram();
    ram.write(SPAN.base + 4096, &[0x5a; 4096]).unwrap();
    save(&folder, &ram, None).unwrap();
    fs::create_dir(&copy).unwrap();
    for name in [STATE, CHECKSUM, MEMORY, STAMP] {
        fs::copy(folder.join(name), copy.join(name)).unwrap();
    }
    let stamp = || fs::read_to_string(copy.join(STAMP)).unwrap();
    let before = stamp();
    Snapshot::open(&copy).unwrap();
    assert_ne!(stamp(), before);
    let checked = stamp();
    Snapshot::open(&copy).unwrap();
    assert_eq!(stamp(), checked);
}

#[test]
fn what_another_program_or_a_newer_one_has_written_is_refused_with_the_reason() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("snapshot");
    save(&folder, &new_ram(), None).unwrap();
    let text = fs::read_to_string(folder.join(STATE)).unwrap();
    let refuse = |from: &str, to: &str, part: &str| {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from}");
        fs::write(folder.join(STATE), &changed).unwrap();
        fs::write(folder.join(CHECKSUM), checksum_line(changed.as_bytes())).unwrap();
        let refusal = refusal(&folder);
        assert!(refusal.contains(part), "{refusal}");
    };
    refuse("rvmm-snapshot", "qcow", "it is no snapshot of rvmm");
    refuse("\"version\": 1,\n  \"arch\"", "\"version\": 2,\n  \"arch\"", "reads version 1");
    refuse(std::env::consts::ARCH, "s390x", "it comes from s390x");
    refuse("\"harts\"", "\"hearts\"", "unknown field `hearts`");
    refuse("\"size\": 16777216", "\"size\": 16773120", "its memory has");
    refuse("{", "[", "is invalid");
    refuse("\"mem\": 16777216", "\"mem\": 33554432", "has another size than its machine");
}

#[test]
fn a_stamp_that_leads_to_another_file_does_not_change_it() {
    let temporary = tempfile::tempdir().unwrap();
    let (folder, other) = (temporary.path().join("snapshot"), temporary.path().join("other"));
    save(&folder, &new_ram(), None).unwrap();
    fs::write(&other, b"precious").unwrap();
    fs::remove_file(folder.join(STAMP)).unwrap();
    std::os::unix::fs::symlink(&other, folder.join(STAMP)).unwrap();
    Snapshot::open(&folder).unwrap();
    assert_eq!(fs::read(&other).unwrap(), b"precious");
    assert!(fs::symlink_metadata(folder.join(STAMP)).unwrap().is_file());
}

#[test]
fn a_snapshot_of_pipes_folders_and_devices_is_refused_at_once() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("snapshot");
    for name in [STATE, CHECKSUM, MEMORY, STAMP] {
        save(&folder, &new_ram(), None).unwrap();
        let path = folder.join(name);
        let replace: [&dyn Fn(); 3] = [
            &|| {
                let mode = rustix::fs::Mode::from_raw_mode(0o600);
                let kind = rustix::fs::FileType::Fifo;
                rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
            },
            &|| std::os::unix::fs::symlink("/dev/zero", &path).unwrap(),
            &|| fs::create_dir(&path).unwrap(),
        ];
        for replace in replace {
            let _ = fs::remove_file(&path);
            replace();
            // Without a stamp the memory is read.
            match name {
                STAMP => _ = Snapshot::open(&folder).unwrap(),
                _ => _ = refusal(&folder),
            }
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
