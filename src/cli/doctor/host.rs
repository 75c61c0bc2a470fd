//! Facts from the host's files: /proc, /sys and /dev below a root, which is `/` except in tests.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::host::node::Place;

/// The state of a device node, from an attempt to open it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    /// It can be opened for reading and writing.
    Usable,
    /// There is none, or it has no driver.
    Absent,
    /// This user may not open it.
    Denied,
    /// The kernel refused for another reason.
    Refused(String),
}

/// The host's memory in bytes (proc_meminfo(5)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) total: u64,
    pub(super) available: u64,
    /// Pages in the pool of the default huge page size, how many are free, and the size.
    pub(super) huge_total: u64,
    pub(super) huge_free: u64,
    pub(super) huge_size: u64,
}

/// A soft limit of this process (getrlimit(2)); `None` for no limit.
pub(super) type Limit = Option<u64>;

/// The facts. `None` if the host does not report one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    /// The instruction set that rvmm is built for, as Rust calls it.
    pub(super) arch: &'static str,
    /// A machine or a container.
    pub(super) place: Place,
    /// Release of the kernel: `6.12.107+deb13-riscv64`.
    pub(super) release: Option<String>,
    /// The first hart's ISA string.
    pub(super) isa: Option<String>,
    pub(super) online_cpus: Option<u32>,
    pub(super) memory: Option<Memory>,
    /// Mode of transparent huge pages: `always`, `madvise` or `never`.
    pub(super) thp: Option<String>,
    pub(super) kvm: Node,
    pub(super) tun: Node,
    pub(super) vhost_net: Node,
    pub(super) vhost_vsock: Node,
    /// Users that may not use io_uring (Documentation/admin-guide/sysctl/kernel.rst): 0 for none, 1 for unprivileged ones, 2 for all.
    pub(super) io_uring_disabled: Option<u8>,
    /// True if the programs that rvmm starts for shared folders and for networks without a tap are installed.
    pub(super) has_virtiofsd: bool,
    pub(super) has_passt: bool,
    pub(super) open_files: Option<Limit>,
    pub(super) locked_memory: Option<Limit>,
    pub(super) address_space: Option<Limit>,
    /// Limits of the process's control group (cgroup v2) or of one above it: the smallest.
    pub(super) cgroup_memory: Limit,
    pub(super) cgroup_pids: Limit,
}

impl Host {
    /// Reads the facts below `root`.
    pub(super) fn read(root: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(root.join(path)).ok();
        let limits = text("proc/self/limits").unwrap_or_default();
        let groups = cgroups(root, &text("proc/self/cgroup").unwrap_or_default());
        Self {
            arch: env::consts::ARCH,
            place: Place::below(root, |name| root == Path::new("/") && env::var_os(name).is_some()),
            release: text("proc/sys/kernel/osrelease").map(|release| release.trim().to_owned()),
            isa: text("proc/cpuinfo").and_then(|cpuinfo| isa(&cpuinfo)),
            online_cpus: text("sys/devices/system/cpu/online").and_then(|list| count_cpus(&list)),
            memory: text("proc/meminfo").map(|meminfo| memory(&meminfo)),
            thp: text("sys/kernel/mm/transparent_hugepage/enabled")
                .and_then(|modes| chosen(&modes)),
            kvm: node(root, "dev/kvm"),
            tun: node(root, "dev/net/tun"),
            vhost_net: node(root, "dev/vhost-net"),
            vhost_vsock: node(root, "dev/vhost-vsock"),
            io_uring_disabled: text("proc/sys/kernel/io_uring_disabled")
                .and_then(|number| number.trim().parse().ok()),
            has_virtiofsd: has_program(root, "virtiofsd", &["usr/libexec", "usr/lib"]),
            has_passt: has_program(root, "passt", &[]),
            open_files: limit(&limits, "Max open files"),
            locked_memory: limit(&limits, "Max locked memory"),
            address_space: limit(&limits, "Max address space"),
            cgroup_memory: smallest(&groups, "memory.max"),
            cgroup_pids: smallest(&groups, "pids.max"),
        }
    }
}

/// Opens the node and closes it. Opening loads a module that the kernel can load by itself.
fn node(root: &Path, path: &str) -> Node {
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::CLOEXEC).bits()).unwrap_or(0);
    match OpenOptions::new().read(true).write(true).custom_flags(flags).open(root.join(path)) {
        Ok(_) => Node::Usable,
        Err(error) => match error.kind() {
            ErrorKind::NotFound => Node::Absent,
            ErrorKind::PermissionDenied => Node::Denied,
            // ENODEV, ENXIO: a node without a driver.
            _ if matches!(error.raw_os_error(), Some(6 | 19)) => Node::Absent,
            _ => Node::Refused(error.to_string()),
        },
    }
}

/// True if a program is in a folder of PATH, or in one of `more`, where Debian installs those that only programs start.
fn has_program(root: &Path, name: &str, more: &[&str]) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let below = |folder: PathBuf| root.join(folder.strip_prefix("/").unwrap_or(&folder));
    let mut folders = env::split_paths(&path).chain(more.iter().map(PathBuf::from)).map(below);
    folders.any(|folder| {
        let file = fs::metadata(folder.join(name));
        file.is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    })
}

/// The value of the first `isa` line of /proc/cpuinfo.
fn isa(cpuinfo: &str) -> Option<String> {
    cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "isa").then(|| value.trim().to_owned())
    })
}

/// Number of CPUs in a list such as `0-3,6`.
fn count_cpus(list: &str) -> Option<u32> {
    let mut count = 0_u32;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(count)
}

fn memory(meminfo: &str) -> Memory {
    let number = |key: &str| {
        let value = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        value
            .and_then(|value| value.trim().trim_end_matches(" kB").parse::<u64>().ok())
            .unwrap_or(0)
    };
    let bytes = |key: &str| number(key).saturating_mul(1024);
    Memory {
        total: bytes("MemTotal"),
        available: bytes("MemAvailable"),
        huge_total: number("HugePages_Total"),
        huge_free: number("HugePages_Free"),
        huge_size: bytes("Hugepagesize"),
    }
}

/// The word in brackets: `always [madvise] never`.
fn chosen(modes: &str) -> Option<String> {
    let (_, rest) = modes.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// The soft limit in the line of /proc/self/limits that begins with `name`.
fn limit(limits: &str, name: &str) -> Option<Limit> {
    let rest = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match rest.split_whitespace().next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

/// The folders of this process's control group and of those above it, from the `0::PATH` line of /proc/self/cgroup.
fn cgroups(root: &Path, own: &str) -> Vec<PathBuf> {
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Vec::new();
    };
    let base = root.join("sys/fs/cgroup");
    // A path outside this process's namespace begins with ".." and cannot be read.
    if path.starts_with("..") {
        return Vec::new();
    }
    let folder = base.join(path);
    folder.ancestors().take_while(|folder| folder.starts_with(&base)).map(Path::to_owned).collect()
}

/// The smallest limit in `file` of the folders; `max` and a missing file are no limit.
fn smallest(folders: &[PathBuf], file: &str) -> Limit {
    let limits = folders.iter().filter_map(|folder| fs::read_to_string(folder.join(file)).ok());
    limits.filter_map(|text| text.trim().parse().ok()).min()
}
