//! Every line of the report, from fake file trees and made-up facts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::TempDir;

use super::checks::all;
use super::host::{Host, Memory, Node};
use super::report::{Check, Report, Status};
use crate::host::node::Place;
use crate::kvm::report::{AiaSupport, GuestFiles, HostReport, LostWakeUps, SbiState, SbiSupport};

/// A RISC-V host with all that rvmm can use.
fn good_host() -> Host {
    Host {
        arch: "riscv64",
        place: Place::Machine,
        release: Some("7.3.4-riscv64".into()),
        isa: Some("rv64imafdch_zicbom_zicboz_sstc".into()),
        online_cpus: Some(4),
        memory: Some(Memory {
            total: 8 << 30,
            available: 6 << 30,
            huge_total: 512,
            huge_free: 256,
            huge_size: 2 << 20,
        }),
        thp: Some("madvise".into()),
        kvm: Node::Usable,
        tun: Node::Usable,
        vhost_net: Node::Usable,
        vhost_vsock: Node::Usable,
        io_uring_disabled: Some(0),
        has_virtiofsd: true,
        has_passt: true,
        open_files: Some(Some(1024)),
        locked_memory: Some(None),
        address_space: Some(None),
        cgroup_memory: None,
        cgroup_pids: None,
    }
}

fn names(list: &str) -> Vec<String> {
    list.split(' ').map(Into::into).collect()
}

fn offers(names: &[&'static str]) -> Vec<SbiSupport> {
    names.iter().map(|name| SbiSupport { name, state: SbiState::On }).collect()
}

fn good_kvm() -> HostReport {
    HostReport {
        max_vcpus: 1024,
        recommended_vcpus: 4,
        address_bits: Some(59),
        memory_slots: Some(32767),
        aia: Some(AiaSupport { guest_files: GuestFiles::Used, ids: 255, all_ids_work: true }),
        isa: names("i m a f d c ssaia sstc smstateen"),
        satp_mode: 10,
        timebase_hz: 10_000_000,
        sbi: offers(&[
            "time", "ipi", "rfence", "srst", "hsm", "pmu", "dbcn", "sta", "susp", "fwft", "mpxy",
        ]),
        sbi_v01: Some(true),
        guest_debug: true,
        irqfd: true,
        ioeventfd: true,
    }
}

/// The lines about `topic` of a good host after `change`.
fn lines(topic: &str, change: impl FnOnce(&mut Host, &mut HostReport)) -> Vec<Check> {
    let (mut host, mut kvm) = (good_host(), good_kvm());
    change(&mut host, &mut kvm);
    all(&host, &Ok(kvm)).into_iter().filter(|check| check.topic == topic).collect()
}

/// The only line about `topic`.
fn line(topic: &str, change: impl FnOnce(&mut Host, &mut HostReport)) -> Check {
    let mut lines = lines(topic, change);
    assert_eq!(lines.len(), 1, "{topic}: {lines:?}");
    lines.remove(0)
}

fn runs(host: &Host, kvm: Result<HostReport, String>) -> bool {
    Report::new(all(host, &kvm)).can_run()
}

#[test]
fn a_good_host_has_nothing_but_ok() {
    for check in all(&good_host(), &Ok(good_kvm())) {
        assert_eq!(check.status, Status::Ok, "{check:?}");
        assert_eq!(check.advice, None, "{check:?}");
    }
    assert!(runs(&good_host(), Ok(good_kvm())));
}

#[test]
fn everything_that_is_missing_has_advice() {
    let nothing = Host {
        arch: "riscv64",
        place: Place::Machine,
        release: Some("6.1.0".into()),
        isa: Some("rv64imafdc".into()),
        online_cpus: None,
        memory: Some(Memory { huge_size: 2 << 20, ..Memory::default() }),
        thp: Some("never".into()),
        kvm: Node::Absent,
        tun: Node::Absent,
        vhost_net: Node::Denied,
        vhost_vsock: Node::Absent,
        io_uring_disabled: None,
        has_virtiofsd: false,
        has_passt: false,
        open_files: Some(Some(20)),
        locked_memory: Some(Some(0)),
        address_space: Some(Some(1 << 30)),
        cgroup_memory: Some(1 << 28),
        cgroup_pids: Some(5),
    };
    for check in all(&nothing, &Err("unused".into())) {
        assert!(check.status != Status::Missing || check.advice.is_some(), "{check:?}");
    }
    assert!(!runs(&nothing, Err("unused".into())));
}

#[test]
fn a_machine_of_another_kind_cannot_run_guests() {
    let mut host = good_host();
    host.arch = "x86_64";
    let checks = all(&host, &Err("not here".into()));
    let first = checks.first().expect("a line");
    assert_eq!((first.topic, first.status), ("host", Status::Missing));
    assert!(
        first.found.contains("x86_64")
            && first.advice.as_deref().is_some_and(|a| a.contains("scripts/host"))
    );
    assert!(checks.iter().all(|check| check.topic != "kvm-api" && check.topic != "h-extension"));
    assert!(!Report::new(checks).can_run());
}

#[test]
fn a_cpu_without_the_hypervisor_extension_cannot_run_guests() {
    // The h of zicbom_zihpm and the like does not count.
    let check = line("h-extension", |host, _| host.isa = Some("rv64imafdc_zihpm_sstc".into()));
    assert_eq!((check.status, check.required), (Status::Missing, true));
    assert!(lines("h-extension", |host, _| host.isa = None).is_empty());
}

#[test]
fn each_way_not_to_open_kvm_has_its_own_advice() {
    for (node, advice) in [
        (Node::Absent, "modprobe kvm"),
        (Node::Denied, "usermod"),
        (Node::Refused("busy".into()), "dmesg"),
    ] {
        let check = line("kvm", |host, _| host.kvm = node);
        assert_eq!((check.status, check.required), (Status::Missing, true));
        assert!(check.advice.is_some_and(|text| text.contains(advice)), "{advice}");
    }
}

#[test]
fn in_a_container_the_advice_is_to_pass_the_device_in() {
    for topic in ["kvm", "tun", "vhost-net", "vhost-vsock"] {
        for node in [Node::Absent, Node::Denied] {
            let check = line(topic, |host, _| {
                host.place = Place::Container;
                match topic {
                    "kvm" => host.kvm = node,
                    "tun" => host.tun = node,
                    "vhost-net" => host.vhost_net = node,
                    _ => host.vhost_vsock = node,
                }
            });
            let advice = check.advice.unwrap();
            assert!(advice.contains("start it with --device /dev/"), "{topic}: {advice}");
            assert!(!advice.contains("sudo"), "{topic}: {advice}");
        }
    }
    let root = tree(&[(".dockerenv", "")]);
    assert_eq!(Host::read(root.path()).place, Place::Container);
}

#[test]
fn an_error_of_kvm_is_shown_if_its_node_can_be_opened() {
    let checks = all(&good_host(), &Err("Cannot create a virtual machine: out of memory".into()));
    let check = checks.iter().find(|check| check.topic == "kvm-api").expect("a line");
    assert!(check.found.contains("out of memory"));
    assert!(!Report::new(checks).can_run());
}

#[test]
fn limits_of_the_kernel_are_those_of_its_release() {
    let limits = |release: &str| lines("kernel", |host, _| host.release = Some(release.into()));
    assert_eq!(limits("7.3.4").len(), 1);
    let debian = limits("6.12.107+deb13-riscv64");
    assert_eq!(debian[0].status, Status::Ok);
    for what in ["sign-extended", "SUSP", "4 KiB pages"] {
        assert!(debian.iter().any(|check| check.found.contains(what)), "{what}");
    }
    assert!(debian.len() > limits("6.18.1").len());
    assert!(!limits("6.14.0").iter().any(|check| check.found.contains("SUSP")));
    let offline = |release| limits(release).iter().any(|check| check.found.contains("offline"));
    assert!(offline("7.1.0") && offline("7.2.13+deb14-riscv64"));
    assert!(!offline("6.19.1") && !offline("7.0.9") && !offline("7.3.4"));
    let old = limits("6.6.1");
    assert_eq!(old[0].status, Status::Note);
    assert!(old[0].advice.as_deref().is_some_and(|advice| advice.contains("6.12")));
    assert_eq!(limits("next")[0].status, Status::Note);
}

#[test]
fn a_host_without_aia_gives_guests_the_plic() {
    let check = line("aia", |_, kvm| kvm.aia = None);
    assert_eq!((check.status, check.required), (Status::Missing, false));
    assert!(check.found.contains("PLIC"));
    for (guest_files, words) in [
        (GuestFiles::Absent, "no guest interrupt files"),
        (GuestFiles::Unsafe(LostWakeUps::Kernel), "this kernel does not always wake harts"),
        (GuestFiles::Unsafe(LostWakeUps::Qemu), "QEMU, which emulates this host"),
    ] {
        let check = line("aia", |_, kvm| {
            kvm.aia = Some(AiaSupport { guest_files, ids: 255, all_ids_work: true })
        });
        assert_eq!(check.status, Status::Ok);
        assert!(check.found.contains(words), "{}", check.found);
    }
}

#[test]
fn a_host_whose_emulated_controller_loses_interrupts_gives_many_devices_the_plic() {
    let check = line("aia-identities", |_, kvm| {
        kvm.aia = kvm.aia.map(|aia| AiaSupport { all_ids_work: false, ..aia });
    });
    assert_eq!(check.status, Status::Note);
    assert!(check.found.contains("all but 31") && check.found.contains("PLIC"), "{check:?}");
    assert!(lines("aia-identities", |_, kvm| kvm.aia = None).is_empty());
}

#[test]
fn an_sbi_extension_that_could_harm_the_kernel_is_reported_as_off() {
    let sbi = lines("sbi", |_, kvm| {
        for offer in kvm.sbi.iter_mut().filter(|offer| offer.name == "pmu") {
            offer.state = SbiState::Withheld;
        }
    });
    assert!(sbi[0].found.contains("pmu(by --sbi +pmu)"), "{sbi:?}");
    assert_eq!((sbi.len(), sbi[1].status), (2, Status::Note));
    assert!(sbi[1].found.contains("pmu is off"), "{sbi:?}");
    assert!(sbi[1].advice.as_deref().is_some_and(|advice| advice.contains("--sbi +pmu")));
}

#[test]
fn each_sbi_extension_that_kvm_lacks_is_a_line_with_the_release_that_brings_it() {
    let sbi = lines("sbi", |_, kvm| {
        kvm.sbi = offers(&["time", "ipi", "rfence", "srst", "hsm", "pmu", "dbcn", "sta"]);
    });
    assert_eq!(sbi[0].found, "time ipi rfence srst hsm pmu dbcn sta");
    let lacking: Vec<&str> = sbi[1..].iter().map(|check| check.found.as_str()).collect();
    assert_eq!(lacking.len(), 3);
    assert!(lacking[0].contains("susp") && lacking[0].contains("6.14"));
}

#[test]
fn an_sbi_extension_that_a_guest_gets_on_demand_only_is_marked() {
    let off = |name| SbiSupport { name, state: SbiState::Off };
    let sbi = lines("sbi", |_, kvm| kvm.sbi = vec![off("dbcn"), off("mpxy")]);
    assert_eq!(sbi[0].found, "dbcn mpxy(by --sbi +mpxy)");
}

#[test]
fn cpu_extensions_that_matter_to_guests_have_lines_of_their_own() {
    assert_eq!(line("sstc", |_, kvm| kvm.isa = names("i m a")).status, Status::Note);
    assert_eq!(line("smstateen", |_, kvm| kvm.isa = names("i m a")).status, Status::Note);
    assert_eq!(line("isa", |_, kvm| kvm.isa = names("i m a")).found, "i m a");
}

#[test]
fn numbers_of_harts_and_address_bits_are_kvms() {
    assert_eq!(
        line("vcpus", |_, _| ()).found,
        "up to 1024 harts in a machine, 4 with a host CPU each"
    );
    assert!(line("addresses", |_, kvm| kvm.address_bits = Some(41)).found.contains("41 bits"));
    assert!(lines("addresses", |_, kvm| kvm.address_bits = None).is_empty());
}

#[test]
fn too_little_memory_is_noted() {
    let check = line("memory", |host, _| {
        host.memory = Some(Memory { available: 100 << 20, ..Memory::default() })
    });
    assert_eq!(check.status, Status::Note);
    assert!(check.found.contains("100 MiB"));
    assert_eq!(line("memory", |host, _| host.memory = None).status, Status::Note);
}

#[test]
fn huge_pages_are_counted_and_their_size_matters() {
    let pages = |free, size| {
        line("huge-pages", |host, _| {
            host.memory = Some(Memory {
                huge_total: 8,
                huge_free: free,
                huge_size: size,
                ..Memory::default()
            });
        })
    };
    assert_eq!(pages(3, 2 << 20).found, "3 of 8 pages of 2 MiB are free");
    assert_eq!(pages(0, 2 << 20).status, Status::Missing);
    assert_eq!(pages(3, 1 << 30).status, Status::Note);
    assert_eq!(line("thp", |host, _| host.thp = Some("never".into())).status, Status::Note);
}

#[test]
fn tun_and_vhost_are_optional() {
    let host = Host {
        tun: Node::Absent,
        vhost_net: Node::Denied,
        vhost_vsock: Node::Refused("busy".into()),
        ..good_host()
    };
    assert!(runs(&host, Ok(good_kvm())));
    let advice = |topic, node: Node| {
        line(topic, |host, _| match topic {
            "tun" => host.tun = node,
            "vhost-net" => host.vhost_net = node,
            _ => host.vhost_vsock = node,
        })
    };
    assert_eq!(advice("tun", Node::Absent).advice.as_deref(), Some("sudo modprobe tun"));
    assert!(advice("vhost-net", Node::Denied).advice.is_some_and(|text| text.contains("setfacl")));
    assert!(advice("vhost-vsock", Node::Refused("busy".into())).found.contains("busy"));
}

#[test]
fn limits_of_the_process_are_shown_and_noted_if_they_are_low() {
    assert_eq!(line("open-files", |host, _| host.open_files = Some(Some(64))).status, Status::Note);
    assert_eq!(line("open-files", |host, _| host.open_files = Some(None)).status, Status::Ok);
    assert!(
        line("locked-memory", |host, _| host.locked_memory = Some(Some(8 << 20)))
            .found
            .contains("8M")
    );
    assert_eq!(
        line("address-space", |host, _| host.address_space = Some(Some(1 << 30))).status,
        Status::Note
    );
    assert!(lines("address-space", |host, _| host.address_space = None).is_empty());
    assert!(
        line("cgroup-memory", |host, _| host.cgroup_memory = Some(1 << 30))
            .found
            .contains("1024 MiB")
    );
    assert!(line("cgroup-pids", |host, _| host.cgroup_pids = Some(9)).found.contains("9 threads"));
}

/// A root with these files in it.
fn tree(files: &[(&str, &str)]) -> TempDir {
    let root = TempDir::new().expect("a temporary folder");
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, text).expect("a file");
    }
    root
}

#[test]
fn facts_are_read_from_the_hosts_files() {
    let root = tree(&[
        ("proc/sys/kernel/osrelease", "6.12.107+deb13-riscv64\n"),
        ("proc/sys/kernel/io_uring_disabled", "1\n"),
        (
            "proc/cpuinfo",
            "processor\t: 0\nhart\t\t: 1\nisa\t\t: rv64imafdch_sstc\nmmu\t\t: sv57\n\nprocessor\t: 1\nisa\t\t: rv64i\n",
        ),
        ("sys/devices/system/cpu/online", "0-1,4\n"),
        (
            "proc/meminfo",
            "MemTotal:        4028412 kB\nMemFree: 1 kB\nMemAvailable:    3901912 kB\nHugePages_Total:       4\nHugePages_Free:        3\nHugepagesize:       2048 kB\n",
        ),
        ("sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n"),
        ("dev/kvm", ""),
        ("dev/net/tun", ""),
        (
            "proc/self/limits",
            "Limit                     Soft Limit           Hard Limit           Units     \nMax locked memory         8388608              8388608              bytes     \nMax open files            1024                 524288               files     \nMax address space         unlimited            unlimited            bytes     \n",
        ),
        ("proc/self/cgroup", "0::/user.slice/session.scope\n"),
        ("sys/fs/cgroup/user.slice/session.scope/memory.max", "max\n"),
        ("sys/fs/cgroup/user.slice/memory.max", "1073741824\n"),
        ("sys/fs/cgroup/user.slice/session.scope/pids.max", "100\n"),
        ("sys/fs/cgroup/user.slice/pids.max", "900\n"),
    ]);
    let host = Host::read(root.path());
    let expected = Host {
        arch: std::env::consts::ARCH,
        place: Place::Machine,
        release: Some("6.12.107+deb13-riscv64".into()),
        isa: Some("rv64imafdch_sstc".into()),
        online_cpus: Some(3),
        memory: Some(Memory {
            total: 4_028_412 * 1024,
            available: 3_901_912 * 1024,
            huge_total: 4,
            huge_free: 3,
            huge_size: 2 << 20,
        }),
        thp: Some("always".into()),
        kvm: Node::Usable,
        tun: Node::Usable,
        vhost_net: Node::Absent,
        vhost_vsock: Node::Absent,
        io_uring_disabled: Some(1),
        has_virtiofsd: false,
        has_passt: false,
        open_files: Some(Some(1024)),
        locked_memory: Some(Some(8 << 20)),
        address_space: Some(None),
        cgroup_memory: Some(1 << 30),
        cgroup_pids: Some(100),
    };
    assert_eq!(host, expected);
}

#[test]
fn an_empty_host_has_no_facts_and_no_panic() {
    let host = Host::read(tree(&[]).path());
    assert_eq!((host.release.as_ref(), host.memory, &host.kvm), (None, None, &Node::Absent));
    assert!(!Report::new(all(&host, &Err("none".into()))).can_run());
}

#[test]
fn files_full_of_nonsense_give_no_facts_and_no_panic() {
    let root = tree(&[
        ("proc/sys/kernel/osrelease", ""),
        ("proc/cpuinfo", "isa\n:::\n"),
        ("sys/devices/system/cpu/online", "3-1,x"),
        (
            "proc/meminfo",
            "MemTotal: 99999999999999999999 kB\nMemAvailable: 18446744073709551615 kB\n",
        ),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always"),
        ("proc/self/limits", "Max open files\nMax address space x\n"),
        ("proc/self/cgroup", "0::/../../etc\n1:x:/\n"),
        ("dev/kvm/a", "a folder is no device"),
    ]);
    let host = Host::read(root.path());
    assert_eq!((host.isa.as_ref(), host.online_cpus, host.thp.as_ref()), (None, None, None));
    assert_eq!((host.open_files, host.address_space, host.cgroup_memory), (None, None, None));
    assert!(matches!(host.kvm, Node::Refused(_)));
    assert!(!all(&host, &Err("none".into())).is_empty());
}

#[test]
fn io_uring_is_available_restricted_switched_off_or_unknown() {
    for (disabled, status, part) in [
        (Some(0), Status::Ok, "is available"),
        (Some(1), Status::Note, "restricted to privileged users"),
        (Some(2), Status::Note, "switched off"),
        (None, Status::Note, "CONFIG_IO_URING"),
    ] {
        let line = line("io_uring", |host, _| host.io_uring_disabled = disabled);
        let text = format!("{} {:?}", line.found, line.advice);
        assert!(line.status == status && text.contains(part), "{disabled:?}: {line:?}");
    }
}

#[test]
fn programs_count_if_they_are_executable() {
    let root = tree(&[("usr/libexec/virtiofsd", "#!/bin/sh"), ("usr/bin/passt", "#!/bin/sh")]);
    let host = || Host::read(root.path());
    assert!(!host().has_virtiofsd && !host().has_passt, "not executable");
    for program in ["usr/libexec/virtiofsd", "usr/bin/passt"] {
        let path = root.path().join(program);
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    assert!(host().has_virtiofsd);
    let in_path = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder == Path::new("/usr/bin"))
    });
    assert_eq!(host().has_passt, in_path);
    for (topic, package) in [("virtiofsd", "folders"), ("passt", "without root")] {
        let line = line(topic, |host, _| (host.has_virtiofsd, host.has_passt) = (false, false));
        assert_eq!(line.status, Status::Missing);
        assert!(line.found.contains(package), "{line:?}");
        assert_eq!(line.advice, Some(format!("sudo apt install {topic}")));
    }
}

#[test]
fn this_machine_can_be_examined() {
    let host = Host::read(Path::new("/"));
    assert!(host.release.is_some() && host.memory.is_some_and(|memory| memory.total > 0));
}
