//! The properties of the machine that the tests run on, and the files of the guests.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::skip;

/// A host that can run guests.
pub(crate) struct Host {
    /// The interrupt controllers that are available to a guest.
    pub(crate) irqchips: Vec<&'static str>,
    /// Number of host CPUs.
    pub(crate) cpus: usize,
    /// True if an emulated AIA on this host loses interrupts above 31 of a hart.
    pub(crate) loses_identities: bool,
    /// Version of the host's Linux: (6, 12).
    pub(crate) linux: (u32, u32),
}

/// The host, or `None` if no guest can run: then the test is skipped. Only this function decides that.
pub(crate) fn host() -> Option<&'static Host> {
    static HOST: OnceLock<Option<Host>> = OnceLock::new();
    let host = HOST.get_or_init(|| {
        let can = std::env::consts::ARCH == "riscv64" && Path::new("/dev/kvm").exists();
        can.then(Host::examine)
    });
    if host.is_none() {
        skip("no RISC-V machine with /dev/kvm (ring 2 runs in the RISC-V host: scripts/test)");
    }
    host.as_ref()
}

/// The host, for a test that does not depend on the interrupt controller: a short run executes it on one of its two hosts
/// only, the one whose usual controller is `irqchip`. Any other run executes it on every host.
pub(crate) fn one_host(irqchip: &str) -> Option<&'static Host> {
    let host = host()?;
    if length() == Some(Length::Short) && host.irqchips[0] != irqchip {
        skip(&format!("in a short run only the host with {irqchip} runs it (scripts/test long)"));
        return None;
    }
    Some(host)
}

/// The extent of a run of `scripts/test`.
#[derive(PartialEq, Eq)]
enum Length {
    /// On two hosts, between which the tests of [`one_host`] are divided.
    Short,
    /// All tests on all hosts, with more repetitions.
    Long,
}

/// The extent requested by `scripts/test`; `None` if it has only one host, or for another test runner.
fn length() -> Option<Length> {
    match std::env::var("RVMM_TEST_RUN").ok()?.as_str() {
        "short" => Some(Length::Short),
        "long" => Some(Length::Long),
        other => panic!("RVMM_TEST_RUN={other} is neither short nor long"),
    }
}

/// A number of repetitions or bytes: `long` in a long run, `otherwise` in any other.
pub(crate) fn by_length(long: usize, otherwise: usize) -> usize {
    if length() == Some(Length::Long) { long } else { otherwise }
}

impl Host {
    /// The default controller only, for slow tests: the run on a host without AIA tests the other one.
    pub(crate) fn usual_irqchip(&self) -> &[&'static str] {
        &self.irqchips[..1]
    }

    fn examine() -> Self {
        let output = Command::new(env!("CARGO_BIN_EXE_rvmm"))
            .args(["doctor", "--json"])
            .output()
            .expect("rvmm doctor starts");
        let report: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
                panic!("rvmm doctor --json: {error}: {}", String::from_utf8_lossy(&output.stdout))
            });
        assert_eq!(report["can_run"], true, "rvmm doctor: {report:#}");
        let checks = report["checks"].as_array().expect("a list of checks");
        let aia = checks.iter().any(|check| check["topic"] == "aia" && check["status"] == "ok");
        let loses_identities = checks.iter().any(|check| check["topic"] == "aia-identities");
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
        Self {
            irqchips: if aia { vec!["aia", "plic"] } else { vec!["plic"] },
            loses_identities,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            linux: (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)),
        }
    }
}

/// A guest of `guests/`, built by `scripts/guests`: `hello`, or `hello.elf`.
pub(crate) fn guest(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests").join(name);
    if let Err(error) = path.metadata() {
        panic!("{}: {error} (scripts/guests builds it)", path.display());
    }
    path
}

/// A guest of `guests/foreign/`, a flat binary for 0x8020_0000, built by `scripts/foreign`; or `None` if it is not available: then
/// the test is skipped.
pub(crate) fn foreign(name: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests/foreign");
    if let Ok(why) = std::fs::read_to_string(folder.join("skipped")) {
        skip(why.trim());
        return None;
    }
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing (scripts/foreign builds it)", path.display());
    Some(path)
}

/// Debian's kernel for guests.
pub(crate) fn kernel() -> PathBuf {
    file("RVMM_GUEST_KERNEL", "/boot/Image")
}

/// A static busybox for guests.
pub(crate) fn busybox() -> PathBuf {
    file("RVMM_GUEST_BUSYBOX", "/bin/busybox")
}

/// The modules of Debian's kernel: a folder with `modules.dep`.
pub(crate) fn modules() -> PathBuf {
    file("RVMM_GUEST_MODULES", "/lib/modules")
}

/// The Debian disk for guests, in a folder that `scripts/debian` creates.
pub(crate) struct Debian {
    /// The file system. Many guests share it: they get it with `ro=on`, and keep their changes in memory.
    pub(crate) disk: PathBuf,
    /// Its kernel.
    pub(crate) kernel: PathBuf,
    /// The initramfs that mounts the disk.
    pub(crate) initrd: PathBuf,
    /// Debian's U-Boot, unchanged from its package.
    pub(crate) firmware: PathBuf,
}

/// Debian's system on a disk, with its kernel and firmware.
pub(crate) fn debian() -> Debian {
    let folder = file("RVMM_GUEST_DEBIAN", "/usr/local/share/rvmm-debian");
    Debian {
        disk: folder.join("root.img"),
        kernel: folder.join("Image"),
        initrd: folder.join("initrd.img"),
        firmware: folder.join("uboot.elf"),
    }
}

fn file(variable: &str, usual: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or_else(|| usual.into(), PathBuf::from);
    assert!(
        path.exists(),
        "{} is missing (scripts/host brings it; or set {variable})",
        path.display()
    );
    path
}
