//! What the machine that the tests run on has, and the files that guests are made of.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::skip;

/// A host that can run guests.
pub(crate) struct Host {
    /// The interrupt controllers that a guest can have here.
    pub(crate) irqchips: Vec<&'static str>,
    /// Host CPUs.
    pub(crate) cpus: usize,
    /// Whether an emulated AIA loses interrupts above 31 of a hart here.
    pub(crate) loses_identities: bool,
    /// Version of the host's Linux: (6, 12).
    pub(crate) linux: (u32, u32),
}

/// The host, or `None` where no guest can run: then the test has nothing to do and says so. The one place that decides.
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

/// The host, for a test to which the interrupt controller is all the same: a short run has such a test on one of its two hosts,
/// the one whose usual controller is `irqchip`. Any other run has it on every host.
pub(crate) fn one_host(irqchip: &str) -> Option<&'static Host> {
    let host = host()?;
    if length() == Some(Length::Short) && host.irqchips[0] != irqchip {
        skip(&format!("in a short run the host with {irqchip} has this test (scripts/test long)"));
        return None;
    }
    Some(host)
}

/// How much a run of `scripts/test` takes on.
#[derive(PartialEq, Eq)]
enum Length {
    /// On two hosts, which share the tests of [`one_host`].
    Short,
    /// Everything everywhere, and more often.
    Long,
}

/// What `scripts/test` asks for; it leaves that open where it has one host only, and so does everybody else.
fn length() -> Option<Length> {
    match std::env::var("RVMM_TEST_RUN").ok()?.as_str() {
        "short" => Some(Length::Short),
        "long" => Some(Length::Long),
        other => panic!("RVMM_TEST_RUN={other} is neither short nor long"),
    }
}

/// How often, or how much: one number for a long run, one for any other.
pub(crate) fn by_length(long: usize, otherwise: usize) -> usize {
    if length() == Some(Length::Long) { long } else { otherwise }
}

impl Host {
    /// The one that a guest gets unless it asks, for tests that take long: the run on a host without AIA has the other.
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

/// A guest of `guests/`, as `scripts/guests` left it: `hello`, or `hello.elf`.
pub(crate) fn guest(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests").join(name);
    if let Err(error) = path.metadata() {
        panic!("{}: {error} (scripts/guests builds it)", path.display());
    }
    path
}

/// A guest of `guests/foreign/`, a flat binary for 0x8020_0000, as `scripts/foreign` left it; or `None` where it could not be had: then the
/// test has nothing to do and says so.
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

/// The modules of that kernel: a folder with `modules.dep`.
pub(crate) fn modules() -> PathBuf {
    file("RVMM_GUEST_MODULES", "/lib/modules")
}

/// The Debian disk for guests, in a folder that `scripts/debian` makes.
pub(crate) struct Debian {
    /// The file system. Many guests share it: it is given to them with `ro=on`, and what they change stays in their memory.
    pub(crate) disk: PathBuf,
    /// Its kernel.
    pub(crate) kernel: PathBuf,
    /// The initramfs that finds it.
    pub(crate) initrd: PathBuf,
    /// Debian's U-Boot, as it comes in its package.
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
