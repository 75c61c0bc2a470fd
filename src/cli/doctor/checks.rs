//! Turns facts into lines: each function checks one topic. It opens no files and makes no queries.

use rvmm_boot::error::Size;

use super::host::{Host, Limit, Memory, Node};
use super::kernel::{FAULTS, LIMITS, OLDEST};
use super::report::Check;
use super::virtualization;
use crate::config::DEFAULT_MEM;
use crate::host::node::{self, DeviceNode};
use crate::kvm::release;
use crate::kvm::report::HostReport;

/// All lines of the report, the most important ones first.
pub(super) fn all(host: &Host, kvm: &Result<HostReport, String>) -> Vec<Check> {
    let mut checks = vec![arch(host)];
    checks.extend(kernel(host));
    checks.extend(hypervisor(host));
    checks.push(kvm_node(host));
    match kvm {
        Ok(kvm) => checks.extend(virtualization::checks(kvm)),
        Err(reason) if host.kvm == Node::Usable && host.arch == "riscv64" => {
            checks.push(Check::missing("kvm-api", reason).required());
        }
        // Another line reports it.
        Err(_) => {}
    }
    checks.extend(memory(host));
    checks.extend(nodes(host));
    checks.push(io_uring(host));
    checks.extend(programs(host));
    checks.extend(limits(host));
    checks
}

fn arch(host: &Host) -> Check {
    let cpus = match host.online_cpus {
        Some(1) => ", 1 CPU".to_owned(),
        Some(count) => format!(", {count} CPUs"),
        None => String::new(),
    };
    if host.arch == "riscv64" {
        return Check::ok("host", format!("riscv64{cpus}")).required();
    }
    Check::missing(
        "host",
        format!(
            "this rvmm is built for {}{cpus}, and KVM only runs guests of the host's architecture",
            host.arch
        ),
    )
    .required()
    .advise("run it on a RISC-V machine, or in the one that scripts/host boots with QEMU")
}

fn kernel(host: &Host) -> Vec<Check> {
    let Some(release) = &host.release else {
        return vec![Check::note("kernel", "the kernel does not report its release")];
    };
    let Some(version) = release::version(release) else {
        return vec![Check::note(
            "kernel",
            format!("Linux {release}, a release that does not begin with two numbers"),
        )];
    };
    let mut checks = vec![if version < OLDEST {
        Check::note("kernel", format!("Linux {release}, older than any that rvmm is tested with"))
            .advise(format!("use Linux {}.{} or newer", OLDEST.0, OLDEST.1))
    } else {
        Check::ok("kernel", format!("Linux {release}"))
    }];
    if host.arch == "riscv64" {
        let lacking = LIMITS.iter().filter(|(since, _)| version < *since);
        checks.extend(lacking.map(|((major, minor), what)| {
            Check::note("kernel", format!("before Linux {major}.{minor}, {what}"))
        }));
        let met = FAULTS.iter().filter(|(since, until, _)| (*since..*until).contains(&version));
        checks.extend(met.map(|((major, minor), until, what)| {
            let (until_major, until_minor) = until;
            Check::note(
                "kernel",
                format!(
                    "from Linux {major}.{minor} on and before {until_major}.{until_minor}, {what}"
                ),
            )
        }));
    }
    checks
}

/// The hypervisor extension, according to /proc/cpuinfo.
fn hypervisor(host: &Host) -> Option<Check> {
    if host.arch != "riscv64" {
        return None;
    }
    let letters = host.isa.as_deref()?.split('_').next()?.to_ascii_lowercase();
    let letters = letters.strip_prefix("rv64").unwrap_or(&letters);
    Some(if letters.contains('h') {
        Check::ok("h-extension", "the CPU has the hypervisor extension").required()
    } else {
        Check::missing("h-extension", "the CPU has no hypervisor extension (H)")
            .required()
            .advise("rvmm needs a CPU that has it")
    })
}

fn kvm_node(host: &Host) -> Check {
    let check = match &host.kvm {
        Node::Usable => Check::ok("kvm", "/dev/kvm can be opened"),
        Node::Absent => Check::missing("kvm", "there is no /dev/kvm")
            .advise(node::KVM.remedy_for_absence(host.place)),
        Node::Denied => Check::missing("kvm", "this user may not open /dev/kvm")
            .advise(node::KVM.remedy_for_denial(host.place)),
        Node::Refused(why) => Check::missing("kvm", format!("/dev/kvm cannot be opened: {why}"))
            .advise("sudo dmesg | grep kvm may say why"),
    };
    check.required()
}

fn memory(host: &Host) -> Vec<Check> {
    let Some(memory) = host.memory else {
        return vec![Check::note("memory", "the kernel does not report the amount of memory")];
    };
    let mut checks = vec![free_memory(memory), huge_pages(memory)];
    if let Some(mode) = &host.thp {
        checks.push(match mode.as_str() {
            "never" => Check::note("thp", "transparent huge pages are off")
                .advise("echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"),
            mode => Check::ok("thp", format!("transparent huge pages: {mode}")),
        });
    }
    checks
}

fn free_memory(memory: Memory) -> Check {
    let found = format!("{} MiB available of {} MiB", memory.available >> 20, memory.total >> 20);
    if memory.available < DEFAULT_MEM {
        return Check::note("memory", found)
            .advise("give guests less than the default of 512M: --mem 256M");
    }
    Check::ok("memory", found)
}

fn huge_pages(memory: Memory) -> Check {
    const SIZE: u64 = 2 << 20;
    if memory.huge_size != SIZE {
        let found = format!(
            "the default huge page is {} KiB, and --hugepages needs those of 2 MiB",
            memory.huge_size >> 10
        );
        return Check::note("huge-pages", found)
            .advise("boot the host with hugepagesz=2M default_hugepagesz=2M");
    }
    let found = format!("{} of {} pages of 2 MiB are free", memory.huge_free, memory.huge_total);
    if memory.huge_free > 0 {
        return Check::ok("huge-pages", found);
    }
    Check::missing("huge-pages", found).advise(
        "only for --hugepages, here for 512M: echo 256 | sudo tee /proc/sys/vm/nr_hugepages",
    )
}

/// Device nodes for the backends of a guest's devices.
fn nodes(host: &Host) -> [Check; 3] {
    let check = |topic, device: DeviceNode, found: &Node, what: &str| {
        let path = device.path;
        match found {
            Node::Usable => Check::ok(topic, format!("{path} can be opened: {what}")),
            Node::Absent => Check::missing(topic, format!("there is no {path}: no {what}"))
                .advise(device.remedy_for_absence(host.place)),
            Node::Denied => {
                Check::missing(topic, format!("this user may not open {path}: no {what}"))
                    .advise(device.remedy_for_denial(host.place))
            }
            Node::Refused(why) => {
                Check::missing(topic, format!("{path} cannot be opened ({why}): no {what}"))
            }
        }
    };
    [
        check("tun", node::TUN, &host.tun, "network through tap devices"),
        check("vhost-net", node::VHOST_NET, &host.vhost_net, "network in the kernel"),
        check("vhost-vsock", node::VHOST_VSOCK, &host.vhost_vsock, "vsock in the kernel"),
    ]
}

/// The fastest backend of disks.
fn io_uring(host: &Host) -> Check {
    const INSTEAD: &str = "disks use a thread each, which is slower";
    match host.io_uring_disabled {
        Some(0) => Check::ok("io_uring", "io_uring is available for disks"),
        Some(1) => Check::note(
            "io_uring",
            format!("io_uring is restricted to privileged users: {INSTEAD}"),
        )
        .advise(
            "sudo sysctl kernel.io_uring_disabled=0, or join the group of kernel.io_uring_group",
        ),
        Some(_) => Check::note("io_uring", format!("io_uring is switched off: {INSTEAD}"))
            .advise("sudo sysctl kernel.io_uring_disabled=0"),
        None => Check::note("io_uring", format!("the kernel has no io_uring: {INSTEAD}"))
            .advise("use a kernel with CONFIG_IO_URING if disks have to be fast"),
    }
}

/// Programs that rvmm starts for devices.
fn programs(host: &Host) -> [Check; 2] {
    let check = |topic, is_there, what: &str| match is_there {
        true => Check::ok(topic, format!("{topic} is installed: {what}")),
        false => Check::missing(topic, format!("there is no {topic}: no {what}"))
            .advise(format!("sudo apt install {topic}")),
    };
    [
        check("virtiofsd", host.has_virtiofsd, "folders shared with guests"),
        check("passt", host.has_passt, "networks without a tap and without root"),
    ]
}

fn limits(host: &Host) -> Vec<Check> {
    // rvmm itself has about ten descriptors and two for each hart; devices add theirs.
    const FEW_FILES: u64 = 256;
    let mut checks = Vec::new();
    if let Some(limit) = host.open_files {
        let check = number(limit, "descriptors a process");
        checks.push(match limit {
            Some(most) if most < FEW_FILES => Check::note("open-files", check)
                .advise("ulimit -n 1024, for machines with many harts or devices"),
            _ => Check::ok("open-files", check),
        });
    }
    if let Some(limit) = host.locked_memory {
        checks.push(Check::ok(
            "locked-memory",
            bytes(limit, "a process (guest memory is not locked)"),
        ));
    }
    if let Some(limit) = host.address_space {
        let found = bytes(limit, "a process");
        checks.push(match limit {
            Some(_) => Check::note("address-space", found)
                .advise("guest memory counts, too: ulimit -v unlimited"),
            None => Check::ok("address-space", found),
        });
    }
    checks.extend(cgroup(host));
    checks
}

fn cgroup(host: &Host) -> Vec<Check> {
    let memory = host.cgroup_memory.map(|most| {
        Check::note(
            "cgroup-memory",
            format!("this control group has at most {} MiB, guest memory included", most >> 20),
        )
    });
    let pids = host.cgroup_pids.map(|most| {
        Check::note(
            "cgroup-pids",
            format!(
                "this control group has at most {most} threads; a machine needs one for each hart and 2 more"
            ),
        )
    });
    memory.into_iter().chain(pids).collect()
}

fn number(limit: Limit, what: &str) -> String {
    limit.map_or_else(|| format!("no limit on {what}"), |most| format!("at most {most} {what}"))
}

fn bytes(limit: Limit, what: &str) -> String {
    limit.map_or_else(
        || format!("no limit for {what}"),
        |most| format!("at most {} for {what}", Size(most)),
    )
}
