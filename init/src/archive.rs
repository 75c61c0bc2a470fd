//! The default initramfs, which the host creates for a guest without one.

use std::env;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rvmm_boot::cpio::Node;
use rvmm_boot::error::Role;
use rvmm_boot::{BootError, Cpio, Initrd, Source};

/// Folders of the archive, each before its contents.
const FOLDERS: &[&str] = &[
    "bin", "dev", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "usr/bin", "usr/sbin",
];

/// Builds the initramfs: `exe` as its `/init`, and `busybox` as its shell if there is one. The files are not read, but mapped
/// when the guest is loaded.
///
/// # Errors
/// [`BootError::Unusable`] if `exe` cannot be a guest's init; else the error of the file that cannot be used.
pub fn initramfs(exe: &Path, busybox: Option<&Path>) -> Result<Initrd, BootError> {
    let unfit = |why: &str| BootError::Unusable {
        path: exe.into(),
        role: Role::Init,
        reason: format!("{why} (give --initrd FILE, or --no-initrd)"),
    };
    let kind = Program::of(exe).map_err(|source| BootError::Read { path: exe.into(), source })?;
    match kind {
        Program::Static => {}
        Program::Dynamic => {
            return Err(unfit(
                "it is dynamically linked; build rvmm with RUSTFLAGS=\"-C target-feature=+crt-static\"",
            ));
        }
        Program::Foreign => return Err(unfit("it is not a program for 64-bit RISC-V")),
    }
    let mut cpio = Cpio::new();
    for folder in FOLDERS {
        cpio.dir(folder, if *folder == "tmp" { 0o1777 } else { 0o755 })?;
    }
    // Both are needed before /dev is mounted: the kernel opens the console for init, and a program without one opens null.
    cpio.node("dev/console", 0o600, Node::Char, (5, 1))?.node(
        "dev/null",
        0o666,
        Node::Char,
        (1, 3),
    )?;
    cpio.file("init", 0o755, Source::open(exe)?)?;
    if let Some(busybox) = busybox {
        cpio.file("bin/busybox", 0o755, Source::open(busybox)?)?.symlink("bin/sh", "busybox")?;
    }
    Ok(cpio.into_initrd("built-in initramfs"))
}

/// The first busybox in PATH that a guest can run: static, and for 64-bit RISC-V.
#[must_use]
pub fn host_busybox() -> Option<PathBuf> {
    busybox_in(&env::var_os("PATH")?)
}

fn busybox_in(path: &std::ffi::OsStr) -> Option<PathBuf> {
    env::split_paths(path)
        .map(|folder| folder.join("busybox"))
        .find(|file| Program::of(file).is_ok_and(|kind| kind == Program::Static))
}

/// The kind of a program, which decides if a guest can run it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    /// Runs as it is.
    Static,
    /// Needs its interpreter and libraries.
    Dynamic,
    /// Cannot run: not ELF, or for another machine.
    Foreign,
}

/// Offsets and values of the ELF-64 header and the program header (System V ABI, gABI 4.1, chapters 4 and 5).
mod field {
    pub(super) const HEADER_LEN: usize = 64;
    /// Magic, 64 bits, little-endian.
    pub(super) const IDENT: &[u8] = b"\x7fELF\x02\x01";
    pub(super) const E_MACHINE: usize = 18;
    pub(super) const E_PHOFF: usize = 32;
    pub(super) const E_PHENTSIZE: usize = 54;
    pub(super) const E_PHNUM: usize = 56;
    pub(super) const EM_RISCV: u16 = 243;
    pub(super) const PT_INTERP: u32 = 3;
}

impl Program {
    fn of(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        // Nothing past the end is read, so a damaged file is no error, but no program either.
        let reaches = |end: Option<u64>| end.is_some_and(|end| end <= metadata.len());
        let mut header = [0; field::HEADER_LEN];
        if !metadata.is_file() || !reaches(Some(field::HEADER_LEN as u64)) {
            return Ok(Self::Foreign);
        }
        file.read_exact_at(&mut header, 0)?;
        if !header.starts_with(field::IDENT) || u16_at(&header, field::E_MACHINE) != field::EM_RISCV
        {
            return Ok(Self::Foreign);
        }
        let offset = header.get(field::E_PHOFF..).and_then(|rest| rest.first_chunk());
        let offset = u64::from_le_bytes(offset.copied().unwrap_or_default());
        let size = u64::from(u16_at(&header, field::E_PHENTSIZE));
        for index in 0..u64::from(u16_at(&header, field::E_PHNUM)) {
            let mut kind = [0; 4];
            // 65,535 entries of 65,535 bytes at most: only the sums can overflow.
            let at = offset.saturating_add(index * size);
            if !reaches(at.checked_add(4)) {
                return Ok(Self::Foreign);
            }
            file.read_exact_at(&mut kind, at)?;
            if u32::from_le_bytes(kind) == field::PT_INTERP {
                return Ok(Self::Dynamic);
            }
        }
        Ok(Self::Static)
    }
}

/// A little-endian number in a header; zero past its end.
fn u16_at(header: &[u8], at: usize) -> u16 {
    let bytes = header.get(at..).and_then(|rest| rest.first_chunk());
    u16::from_le_bytes(bytes.copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// An ELF file for a machine with these program headers and nothing else.
    fn program(machine: u16, headers: &[u32]) -> Vec<u8> {
        let mut file = vec![0; field::HEADER_LEN];
        file[..6].copy_from_slice(field::IDENT);
        file[field::E_MACHINE..][..2].copy_from_slice(&machine.to_le_bytes());
        file[field::E_PHOFF..][..8].copy_from_slice(&64u64.to_le_bytes());
        file[field::E_PHENTSIZE..][..2].copy_from_slice(&56u16.to_le_bytes());
        file[field::E_PHNUM..][..2]
            .copy_from_slice(&u16::try_from(headers.len()).unwrap().to_le_bytes());
        for kind in headers {
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&[0; 52]);
        }
        file
    }

    const STATIC: &[u32] = &[1, 1, 2];
    const DYNAMIC: &[u32] = &[6, field::PT_INTERP, 1];

    fn written(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("busybox");
        fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    fn kind(bytes: &[u8]) -> Program {
        let (_folder, path) = written(bytes);
        Program::of(&path).unwrap()
    }

    #[test]
    fn programs_are_told_apart() {
        assert_eq!(kind(&program(field::EM_RISCV, STATIC)), Program::Static);
        assert_eq!(kind(&program(field::EM_RISCV, DYNAMIC)), Program::Dynamic);
        assert_eq!(kind(&program(62, STATIC)), Program::Foreign);
        assert_eq!(kind(b"#!/bin/sh\n"), Program::Foreign);
        assert_eq!(kind(b""), Program::Foreign);
        assert_eq!(Program::of(Path::new("/")).unwrap(), Program::Foreign);
        assert!(Program::of(Path::new("/no/such")).is_err());
    }

    #[test]
    fn a_damaged_program_is_refused_and_not_trusted() {
        let whole = program(field::EM_RISCV, DYNAMIC);
        assert_eq!(kind(&whole[..100]), Program::Foreign);
        let mut wild = whole.clone();
        wild[field::E_PHOFF..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(kind(&wild), Program::Foreign);
    }

    #[test]
    fn the_archive_has_init_the_console_and_the_shell() {
        let (_folder, exe) = written(&program(field::EM_RISCV, STATIC));
        let names = |initrd: &Initrd| {
            let mut bytes = Vec::new();
            for source in initrd.sources() {
                let mut piece = vec![0; usize::try_from(source.len()).unwrap()];
                source.read_exact_at(0, &mut piece).unwrap();
                bytes.extend_from_slice(&piece);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let without = names(&initramfs(&exe, None).unwrap());
        for name in ["init\0", "dev/console\0", "dev/null\0", "proc\0", "sys\0", "tmp\0", "root\0"]
        {
            assert!(without.contains(name), "{name}");
        }
        assert!(!without.contains("bin/busybox"));
        let with = names(&initramfs(&exe, Some(&exe)).unwrap());
        assert!(with.contains("bin/busybox\0") && with.contains("bin/sh\0"));
    }

    #[test]
    fn the_same_executable_gives_the_same_archive_and_stays_a_file() {
        let (_folder, exe) = written(&program(field::EM_RISCV, STATIC));
        let initrd = initramfs(&exe, None).unwrap();
        assert_eq!(initrd.len(), initramfs(&exe, None).unwrap().len());
        assert!(initrd.sources().iter().any(|source| matches!(source, Source::File { .. })));
    }

    #[test]
    fn an_executable_that_cannot_be_init_is_refused_with_what_to_do() {
        let (_folder, exe) = written(&program(field::EM_RISCV, DYNAMIC));
        let refusal = initramfs(&exe, None).unwrap_err();
        assert!(matches!(refusal, BootError::Unusable { role: Role::Init, .. }), "{refusal:?}");
        let text = refusal.to_string();
        assert!(text.contains("crt-static") && text.contains("--initrd"), "{text}");
        let (_folder, exe) = written(&program(62, STATIC));
        assert!(initramfs(&exe, None).unwrap_err().to_string().contains("RISC-V"));
        assert!(initramfs(Path::new("/no/such"), None).is_err());
    }

    #[test]
    fn only_a_busybox_that_the_guest_can_run_is_included() {
        let (foreign, _) = written(&program(62, STATIC));
        let (dynamic, _) = written(&program(field::EM_RISCV, DYNAMIC));
        let (fit, path) = written(&program(field::EM_RISCV, STATIC));
        let search = |folders: &[&tempfile::TempDir]| {
            busybox_in(&env::join_paths(folders.iter().map(|folder| folder.path())).unwrap())
        };
        assert_eq!(search(&[&foreign, &dynamic, &fit]), Some(path));
        assert_eq!(search(&[&foreign, &dynamic]), None);
        assert_eq!(search(&[]), None);
    }
}
