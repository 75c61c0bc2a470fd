//! Command lines in, tasks or one-line mistakes out.

use std::ffi::OsString;

use clap::CommandFactory;
use log::LevelFilter;

use super::command::Cli;
use super::{Task, task};
use crate::config::{
    CpuId, ExtensionChange, GdbAddress, GdbConfig, InitrdConfig, IrqchipChoice, LoadConfig,
    OnReset, SerialConfig, Unassigned, ValidConfig,
};

fn parse(args: &[&str]) -> Result<Task, String> {
    let words = std::iter::once("rvmm").chain(args.iter().copied());
    task(words.map(OsString::from), None)
}

fn config(args: &[&str]) -> ValidConfig {
    match parse(args) {
        Ok(Task::Run(config, _)) => *config,
        other => panic!("{args:?}: {other:?}"),
    }
}

fn mistake(args: &[&str]) -> String {
    let line = parse(args).expect_err("a mistake");
    assert!(!line.is_empty() && !line.contains('\n'), "one line: {line:?}");
    line
}

#[test]
fn the_flags_of_the_command_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn a_kernel_alone_is_a_machine_with_the_defaults() {
    let config = config(&["--kernel", "Image"]);
    assert_eq!((config.mem, config.cpus.count, config.name.as_str()), (512 << 20, 1, "rvmm"));
    assert_eq!(config.boot.cmdline, "earlycon=sbi console=ttyS0");
    assert_eq!(config.boot.initrd, InitrdConfig::Builtin("/proc/self/exe".into()));
    assert_eq!((config.irqchip, config.unassigned), (IrqchipChoice::Auto, Unassigned::Zero));
    assert_eq!((config.on_reset, &config.serial), (OnReset::Restart, &SerialConfig::Stdio));
}

#[test]
fn vsock_is_short_for_a_device() {
    let with = |flag: &str| config(&["--kernel", "Image", "--vsock", flag]).devices.clone();
    assert_eq!(with("/run/guest.vsock"), ["vsock,path=/run/guest.vsock"]);
    assert_eq!(with("/run/v,cid=7"), ["vsock,path=/run/v,cid=7"]);
    assert!(mistake(&["--kernel", "Image", "--vsock", "/run/v,sid=7"]).contains("sid"));
}

#[test]
fn consoles_and_ports_are_short_for_one_device() {
    let with = |flags: &[&str]| {
        let flags = flags.iter().flat_map(|flag| ["--console", flag]);
        let args: Vec<&str> = ["--kernel", "Image"].into_iter().chain(flags).collect();
        parse(&args).map(|task| match task {
            Task::Run(config, _) => config.devices.clone(),
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(with(&["to=pty"]).unwrap(), ["console,to=pty"]);
    assert_eq!(
        with(&["port=agent,path=/run/a=b", "to=null", "to=file:log,port=x.1"]).unwrap(),
        ["console,to=null,port1=agent=unix:/run/a=b,port2=x.1=file:log"]
    );
    for wrong in ["", "pty", "port=a", "path=/x", "to=", "to=null,to=pty", "name=a,to=null"] {
        let line = with(&[wrong]).unwrap_err();
        assert!(line.contains("--console") && !line.contains('\n'), "{wrong}: {line}");
    }
    let ports: Vec<String> = (0..8).map(|number| format!("port=p{number},to=null")).collect();
    let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
    assert!(with(&ports).unwrap_err().contains("port8"));
    assert!(with(&["to=null", "to=pty"]).unwrap_err().contains("one console without port=NAME"));
}

#[test]
fn the_guest_waits_for_a_debugger_by_default() {
    let with = |flag: &str| config(&["--kernel", "Image", "--gdb", flag]).gdb.clone().unwrap();
    let at = |text: &str| GdbAddress::Tcp(text.parse().unwrap());
    assert_eq!(with("tcp:1234"), GdbConfig { at: at("127.0.0.1:1234"), wait: true });
    assert_eq!(with("tcp:[::]:7,wait=off"), GdbConfig { at: at("[::]:7"), wait: false });
    let unix = GdbAddress::Unix("/run/guest.gdb".into());
    assert_eq!(with("unix:/run/guest.gdb"), GdbConfig { at: unix, wait: true });
    assert_eq!(config(&["--kernel", "Image"]).gdb, None);
}

#[test]
fn a_power_button_gives_the_guest_time() {
    let patience = |args: &[&str]| {
        let args: Vec<&str> = ["--kernel", "Image"].iter().chain(args).copied().collect();
        config(&args).shutdown_timeout().map(|patience| patience.as_secs())
    };
    assert_eq!(patience(&[]), None);
    assert_eq!(patience(&["--power-button"]), Some(10));
    assert_eq!(patience(&["--device", "input", "--grace", "3"]), Some(3));
    assert_eq!(patience(&["--power-button", "--grace", "0"]), None);
    let both = config(&["--kernel", "Image", "--power-button", "--device", "input"]);
    assert_eq!(both.devices, ["input"], "one button is enough");
    assert!(mistake(&["--kernel", "Image", "--grace", "3"]).contains("--power-button"));
    assert!(
        mistake(&["--kernel", "Image", "--power-button", "--grace", "x"]).contains("--grace 'x'")
    );
}

#[test]
fn a_configuration_that_is_too_long_or_no_text_is_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.json");
    let said = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        mistake(&["--config", path.to_str().unwrap()])
    };
    // Its first part would be a whole one.
    let mut long = b"{}".to_vec();
    long.resize((1 << 20) + 1, b' ');
    assert!(said(&long).contains("it has more than 1048576 bytes"));
    assert!(said(b"\xff\xfe").contains("Cannot use --config"));
    assert!(mistake(&["--config", "/dev/zero"]).contains("more than"));
}

#[test]
fn every_flag_reaches_the_configuration() {
    let line = "--kernel Image --mem 2G --cpus 4 --initrd root.cpio --irqchip plic --dump-dtb out.dtb \
                --load a@0x8100_0000 --load b@2G --entry 0x8020_0000 --serial unix:/tmp/s --no-reboot \
                --unassigned fault --hugepages --name web-1 --log debug --device rtc,offset=5 --device serial \
                --net tap=t0,mtu=9000 --isa host,-v,-zicbom --sbi -pmu,-sta --cpu-id vendor=1,arch=0x2,impl=3 --affinity 0=2,1=3";
    let args: Vec<&str> = line.split_whitespace().chain(["--cmdline", "quiet  -- x"]).collect();
    let Ok(Task::Run(config, level)) = parse(&args) else { panic!("{:?}", parse(&args)) };
    let knob = |name: &str| ExtensionChange { name: name.into(), on: false };
    assert_eq!(level, LevelFilter::Debug);
    assert_eq!((config.mem, config.cpus.count, config.hugepages), (2 << 30, 4, true));
    assert_eq!(config.boot.kernel, Some("Image".into()));
    assert_eq!(config.boot.initrd, InitrdConfig::File("root.cpio".into()));
    assert_eq!(config.boot.cmdline, "quiet  -- x");
    assert_eq!((&config.boot.dtb, &config.boot.dump_dtb), (&None, &Some("out.dtb".into())));
    let loads = [
        LoadConfig { file: "a".into(), addr: 0x8100_0000 },
        LoadConfig { file: "b".into(), addr: 0x8000_0000 },
    ];
    assert_eq!(config.boot.load, loads);
    assert_eq!(config.boot.entry, Some(0x8020_0000));
    assert_eq!((config.irqchip, config.unassigned), (IrqchipChoice::Plic, Unassigned::Fault));
    assert_eq!(config.serial, SerialConfig::Unix("/tmp/s".into()));
    assert_eq!((config.on_reset, config.name.as_str()), (OnReset::Exit, "web-1"));
    assert_eq!(config.devices, ["net,tap=t0,mtu=9000", "rtc,offset=5", "serial"]);
    assert_eq!(config.cpus.isa, [knob("v"), knob("zicbom")]);
    assert_eq!(config.cpus.sbi, [knob("pmu"), knob("sta")]);
    assert_eq!(config.cpus.id, CpuId { vendor: Some(1), arch: Some(2), imp: Some(3) });
    assert_eq!(config.cpus.affinity, [(0, 2), (1, 3)]);
}

#[test]
fn the_verb_run_is_the_command_without_a_verb() {
    let flags = ["--kernel", "Image", "--mem", "1G", "--sbi", "-pmu"];
    let with_verb: Vec<&str> = std::iter::once("run").chain(flags).collect();
    assert_eq!(config(&with_verb), config(&flags));
}

#[test]
fn a_tree_of_the_users_own_is_taken_without_a_command_line() {
    assert_eq!(config(&["--kernel", "Image", "--dtb", "a.dtb"]).boot.dtb, Some("a.dtb".into()));
    let line = mistake(&["--kernel", "Image", "--dtb", "a.dtb", "--cmdline", "quiet"]);
    assert!(line.contains("--dtb") && line.contains("--cmdline"), "{line}");
}

#[test]
fn a_flat_binary_gets_no_built_in_prompt() {
    assert_eq!(config(&["--load", "a.bin@0x8000_0000"]).boot.initrd, InitrdConfig::None);
}

#[test]
fn a_disk_leaves_no_built_in_prompt_and_comes_before_other_devices() {
    for disk in [["--disk", "a.img"], ["--device", "blk,path=a.img"]] {
        let config = config(&["--kernel", "Image", "--device", "rng", disk[0], disk[1]]);
        assert_eq!(config.boot.initrd, InitrdConfig::None);
    }
    let line = "--kernel Image --device rng --disk a.img,ro=on --disk b.img --initrd x.cpio";
    let config = config(&line.split(' ').collect::<Vec<_>>());
    assert_eq!(config.devices, ["blk,path=a.img,ro=on", "blk,path=b.img", "rng"]);
    assert_eq!(config.boot.initrd, InitrdConfig::File("x.cpio".into()));
}

#[test]
fn a_root_on_the_command_line_leaves_no_built_in_prompt() {
    let config = config(&["--kernel", "Image", "--cmdline", "root=/dev/vda1"]);
    assert_eq!(config.boot.initrd, InitrdConfig::None);
}

#[test]
fn a_mistake_names_the_flag_the_value_and_what_to_do() {
    for (args, parts) in [
        (&["--kernle", "x"][..], &["--kernle", "--kernel"][..]),
        (&["--mem"], &["--mem", "missing"]),
        (&["--mem", "--cpus", "4"], &["--mem", "missing"]),
        (&["--mem", "5Q"], &["--mem", "'5Q'", "512M"]),
        (&["--mem", "0"], &["--mem", "'0'"]),
        (&["--mem=-5M"], &["--mem", "'-5M'", "negative"]),
        (&["--mem", "-5M"], &["negative"]),
        (&["--mem", "17M", "--hugepages", "--kernel", "x"], &["--mem 17M", "--hugepages", "2M"]),
        (&["--mem", "17825793", "--kernel", "x"], &["--mem 17825793", "4K"]),
        (&["--mem", "1G", "--mem", "2G"], &["--mem", "twice"]),
        (&["--no-initrd", "--no-initrd"], &["--no-initrd", "twice"]),
        (&["--cpus", "0"], &["--cpus", "'0'", "1 to 512"]),
        (&["--irqchip", "pic"], &["--irqchip", "'pic'", "auto, aia, plic"]),
        (&["--unassigned", "faul"], &["--unassigned", "'faul'", "fault"]),
        (&["--serial", "tcp:1"], &["--serial", "'tcp:1'", "file:PATH"]),
        (&["--gdb", "1234"], &["--gdb", "'1234'", "tcp:PORT"]),
        (&["--gdb", "tcp:1,nowait"], &["--gdb", "'tcp:1,nowait'", "wait=off"]),
        (&["--gdb", "tcp:host:1"], &["--gdb", "'tcp:host:1'", "localhost"]),
        (&["--load", "a.bin"], &["--load", "'a.bin'", "FILE@ADDR"]),
        (&["--net", "user,hostfwd=1"], &["--net", "'user,hostfwd=1'", "hostfwd", "forward"]),
        (&["--share", "/srv"], &["--share", "'/srv'", "TAG=PATH"]),
        (&["--net", "tap=a,b=c"], &["--net", "'tap=a,b=c'", "mtu"]),
        (&["--log", "loud"], &["--log", "'loud'", "trace"]),
        (&["--isa", "v"], &["--isa", "'v'", "sign"]),
        (&["--cpu-id", "model=1"], &["--cpu-id", "'model=1'", "vendor"]),
        (&["--affinity", "1"], &["--affinity", "'1'", "0=2"]),
        (&["--affinity", "1=1", "--kernel", "x"], &["--affinity 1=1", "no hart 1"]),
        (&["--initrd", "a", "--no-initrd"], &["--initrd", "--no-initrd"]),
        (&["--no-reboot=1"], &["--no-reboot", "none"]),
        (&["--name", "a/b", "--kernel", "x"], &["--name", "'a/b'", "letters"]),
        (&["--device", "floppy", "--kernel", "x"], &["--device", "floppy", "serial"]),
        (&["--device", "rtc,colour=1", "--kernel", "x"], &["--device", "colour", "offset"]),
        (&["--disk", ",ro=on"], &["--disk", "',ro=on'", "path"]),
        (&["--disk", "a,colour=1"], &["--disk", "'a,colour=1'", "colour", "serial"]),
        (&["--disk", "a,ro"], &["--disk", "'a,ro'", "key=value"]),
        (&["--entry", "0x8000_0000"], &["--entry 0x80000000", "--load"]),
        (&["--kernel", "x", "--cmdline", "ä"], &["command line", "ASCII"]),
        (&[], &["--kernel", "--help"]),
        (&["Image"], &["'Image'", "--kernel"]),
        (&["run", "Image"], &["'Image'", "--kernel"]),
        (&["docter"], &["'docter'", "doctor"]),
        (&["doctor", "--jsno"], &["'--jsno'", "--json"]),
        (&["--log", "info", "doctor"], &["--log", "doctor"]),
        (&["completions", "fsh"], &["'fsh'", "fish"]),
        (&["completions"], &["SHELL"]),
        (&["-k"], &["'-k'", "--help"]),
        (&["--\u{1b}[31m"], &["\\u{1b}"]),
    ] {
        let line = mistake(args);
        for part in parts {
            assert!(line.contains(part), "{args:?} should say {part:?}: {line}");
        }
    }
}

#[test]
fn a_word_of_a_megabyte_does_not_become_a_message_of_one() {
    let word = "x".repeat(1 << 20);
    for args in [
        &["--mem", word.as_str()][..],
        &[word.as_str()],
        &["--name", word.as_str(), "--kernel", "x"],
    ] {
        assert!(mistake(args).len() < 500);
    }
}

#[test]
fn help_version_catalog_manual_and_completions_are_texts() {
    let shown = |args: &[&str]| match parse(args) {
        Ok(Task::Show(text)) => text,
        other => panic!("{args:?}: {other:?}"),
    };
    assert!(shown(&["--help"]).contains("Examples:"));
    assert!(shown(&["-h"]).len() < shown(&["--help"]).len());
    assert_eq!(shown(&["--version"]), format!("rvmm {}\n", env!("CARGO_PKG_VERSION")));
    assert!(shown(&["help", "doctor"]).contains("--json"));
    assert_eq!(shown(&["--list-devices"]), shown(&["--device", "help"]));
    assert_eq!(shown(&["run", "--list-devices"]), shown(&["--list-devices"]));
    assert!(shown(&["man"]).contains(".TH rvmm"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(shown(&["completions", shell]).contains("dump-dtb"), "{shell}");
    }
}

#[test]
fn every_flag_has_a_help_text_and_the_guide_names_it() {
    let guide = include_str!("../../docs/cli.md");
    let command = Cli::command();
    let all = command
        .get_subcommands()
        .flat_map(|verb| verb.get_arguments())
        .chain(command.get_arguments());
    for arg in all {
        assert!(arg.get_help().is_some(), "{}", arg.get_id());
        if let Some(long) = arg.get_long() {
            assert!(guide.contains(&format!("`--{long}")), "docs/cli.md does not name --{long}");
        }
    }
    for verb in command.get_subcommands() {
        assert!(guide.contains(&format!("`rvmm {}", verb.get_name())), "{}", verb.get_name());
    }
}
