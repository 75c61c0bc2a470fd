//! Command lines in, tasks or one-line mistakes out.

use std::ffi::OsString;

use clap::CommandFactory;
use log::LevelFilter;
use rvmm_devices::CATALOG;

use super::command::Cli;
use super::{Task, task};
use crate::config::{
    CpuId, DeviceConfig, Endpoint, ExtensionChange, GdbAddress, GdbConfig, InitrdConfig,
    IrqchipChoice, LoadConfig, OnReset, StartMode, Unassigned, ValidConfig,
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

fn devices(texts: &[&str]) -> Vec<DeviceConfig> {
    texts.iter().map(|text| DeviceConfig::parse(text).unwrap()).collect()
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
    assert_eq!((config.on_reset, &config.serial), (OnReset::Restart, &Endpoint::Stdio));
}

#[test]
fn vsock_is_short_for_a_device() {
    let with = |flag: &str| config(&["--kernel", "Image", "--vsock", flag]).devices.clone();
    assert_eq!(with("/run/guest.vsock"), devices(&["vsock,path=/run/guest.vsock"]));
    assert_eq!(with("/run/v,cid=7"), devices(&["vsock,path=/run/v,cid=7"]));
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
    assert_eq!(with(&["to=pty"]).unwrap(), devices(&["console,to=pty"]));
    assert_eq!(
        with(&["port=agent,path=/run/a=b", "to=null", "to=file:log,port=x.1"]).unwrap(),
        devices(&["console,to=null,port1=agent=unix:/run/a=b,port2=x.1=file:log"])
    );
    for wrong in ["", "pty", "port=a", "path=/x", "to=", "to=null,to=pty", "name=a,to=null"] {
        let line = with(&[wrong]).unwrap_err();
        assert!(line.contains("--console") && !line.contains('\n'), "{wrong}: {line}");
    }
    let ports: Vec<String> = (0..8).map(|number| format!("port=p{number},to=null")).collect();
    let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
    assert!(with(&ports).unwrap_err().contains("at most 7 ports"));
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
    assert_eq!(patience(&["--device", "input", "--shutdown-timeout", "3"]), Some(3));
    assert_eq!(patience(&["--power-button", "--shutdown-timeout", "0"]), None);
    let both = config(&["--kernel", "Image", "--power-button", "--device", "input"]);
    assert_eq!(both.devices, devices(&["input"]), "one button is enough");
    assert!(mistake(&["--kernel", "Image", "--shutdown-timeout", "3"]).contains("--power-button"));
    assert!(
        mistake(&["--kernel", "Image", "--power-button", "--shutdown-timeout", "x"])
            .contains("--shutdown-timeout 'x'")
    );
}

#[test]
fn flags_of_old_names_are_taken_and_not_shown() {
    let old = ["--kernel", "Image", "--power-button", "--grace", "3", "--mode", "vu"];
    let new =
        ["--kernel", "Image", "--power-button", "--shutdown-timeout", "3", "--start-mode", "vu"];
    assert_eq!(config(&old), config(&new));
    assert_eq!(config(&old).cpus.mode, StartMode::User);
    let Ok(Task::Show(help)) = parse(&["--help"]) else { panic!("help") };
    assert!(help.contains("--start-mode") && !help.contains("--mode") && !help.contains("--grace"));
}

#[test]
fn a_dumped_configuration_is_taken_back_by_config() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.json");
    let flags = [
        "--kernel",
        "Image",
        "--disk",
        "a,,b.img,ro=on",
        "--net",
        "user",
        "--share",
        "t=/x",
        "--console",
        "to=pty",
        "--vsock",
        "/v",
        "--power-button",
        "--shutdown-timeout",
        "7",
        "--serial",
        "unix:/s",
        "--gdb",
        "unix:/g",
        "--trace",
        "t.jsonl",
        "--isa",
        "-v",
        "--csr",
        "mhartid=1",
        "--start-mode",
        "vu",
        "--affinity",
        "0=1",
        "--load",
        "p@2G",
        "--no-reboot",
    ];
    let Ok(Task::Show(text)) = parse(&[&flags[..], &["--dump-config"]].concat()) else {
        panic!("a text")
    };
    assert!(text.starts_with("{\n  \"version\": 1,\n"), "{text}");
    assert!(text.contains("\"path\": \"a,b.img\""), "{text}");
    std::fs::write(&path, &text).unwrap();
    assert_eq!(config(&["--config", path.to_str().unwrap()]), config(&flags));
}

#[test]
fn every_device_with_every_key_survives_dump_config() {
    const DEVICES: [&str; 22] = [
        "serial",
        "power",
        "rtc,offset=-5",
        "uart,to=file:a,,b,slot=3",
        "const,addr=0x40,value=0xffff_ffff_ffff_ffff",
        "flash,addr=0x20000000,file=f,mode=lazy",
        "flash,addr=0x22000000,mode=passthrough,host=4096,size=4096",
        "rng,bps=9,slot=0",
        "blk,path=d,ro=on,serial=s,,1,cache=unsafe,queues=8,iops=1,bps=2,format=qcow2,backing=on,slot=1",
        "net,tap=t0,mac=02:00:00:00:00:01,mtu=1500,pin=on,queues=2,rx_bps=1,tx_bps=2,rx_pps=3,tx_pps=4,slot=2",
        "net,fd=3,vhost=on",
        "vsock,path=/v,cid=7,timeout=9,slot=4",
        "vsock,backend=kernel",
        "input,slot=5",
        "balloon,size=8,stats=1,reporting=on,deflate_on_oom=off,slot=6",
        "console,to=stdio,port1=a=null,port2=b=pty,port3=c=unix:/x,port4=d=connect:/y,port5=e=file:z,port6=f=null,port7=g=null,slot=7",
        "fs,tag=t,path=/p,ro=on,sandbox=chroot,slot=8",
        "fs,tag=t,socket=/s",
        "net-user,mac=02:00:00:00:00:02,forward=2222:22+8080:80,slot=9",
        "vhost-user-net,socket=/n,mac=02:00:00:00:00:03,slot=10",
        "vhost-user-blk,socket=/b,queues=16,slot=11",
        "vhost-user-vsock,socket=/w,slot=12",
    ];
    for model in CATALOG {
        for key in model.all_keys() {
            let has = |text: &&str| {
                text.starts_with(&format!("{},", model.name))
                    && text.contains(&format!(",{}=", key.name))
            };
            assert!(DEVICES.iter().any(has), "{} {}", model.name, key.name);
        }
    }
    let flags = DEVICES.iter().flat_map(|text| ["--device", text]);
    let flags: Vec<&str> = ["--kernel", "Image"].into_iter().chain(flags).collect();
    let Ok(Task::Show(text)) = parse(&[&flags[..], &["--dump-config"]].concat()) else {
        panic!("{:?}", parse(&flags))
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.json");
    std::fs::write(&path, text).unwrap();
    assert_eq!(config(&["--config", path.to_str().unwrap()]), config(&flags));
    assert_eq!(config(&flags).devices, devices(&DEVICES));
}

#[test]
fn a_configuration_of_another_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.json");
    let read = |text: &str| {
        std::fs::write(&path, text).unwrap();
        parse(&["--config", path.to_str().unwrap()])
    };
    for version in ["0", "2", "18446744073709551615"] {
        let line = read(&format!(r#"{{"new key":1,"version":{version}}}"#)).unwrap_err();
        let expected = format!("version {version} of the format is not supported");
        assert!(line.contains("--config") && line.contains(&expected), "{line}");
    }
    assert!(read(r#"{"version":"1"}"#).unwrap_err().contains("the version of the format, 1"));
    for text in [r#"{"version":1,"boot":{"kernel":"a"}}"#, r#"{"boot":{"kernel":"a"}}"#] {
        assert!(matches!(read(text), Ok(Task::Run(..))), "{text}");
    }
}

#[test]
fn a_device_in_a_configuration_is_an_object_or_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.json");
    let read = |devices: &str| {
        std::fs::write(&path, format!(r#"{{"boot":{{"kernel":"a"}},"devices":{devices}}}"#))
            .unwrap();
        parse(&["--config", path.to_str().unwrap()])
    };
    let text = r#"["rng","blk,path=a,,b",{"model":"blk","path":{"hex":"ff"},"queues":2}]"#;
    let Ok(Task::Run(config, _)) = read(text) else { panic!("{:?}", read(text)) };
    let Some(DeviceConfig::Blk(blk)) = config.devices.get(2) else { panic!("a disk") };
    assert_eq!(blk.path.as_bytes(), b"\xff");
    assert_eq!(config.devices[..2], devices(&["rng", "blk,path=a,,b"]));
    for (devices, part) in [
        (r#"["blk"]"#, "Option path= is missing"),
        (r#"["blk,path=a,queues=9"]"#, "queues=\"9\" is not a number of queues from 1 to 8"),
        (r#"[{"model":"blk","path":"a","queues":9}]"#, "a number of queues from 1 to 8"),
        (r#"[{"model":"blk","path":"a","colour":1}]"#, "unknown field `colour`"),
        (r#"[{"model":"floppy"}]"#, "unknown variant `floppy`"),
        (r#"[{"path":"a"}]"#, "model"),
        (r#"[{"model":"flash","addr":0}]"#, "needed, except with mode=passthrough"),
        ("[1]", "a device"),
    ] {
        let line = read(devices).unwrap_err();
        assert!(line.contains(part) && !line.contains('\n'), "{devices}: {line}");
    }
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
    assert_eq!(config.serial, Endpoint::Unix("/tmp/s".into()));
    assert_eq!((config.on_reset, config.name.as_str()), (OnReset::Exit, "web-1"));
    assert_eq!(config.devices, devices(&["net,tap=t0,mtu=9000", "rtc,offset=5", "serial"]));
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
    assert_eq!(config.devices, devices(&["blk,path=a.img,ro=on", "blk,path=b.img", "rng"]));
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
fn the_verbs_of_the_labs_belong_to_their_feature() {
    for (verb, args) in [("lab", ["lab", "--list"]), ("mkpflash", ["mkpflash", "--help"])] {
        let Ok(Task::Show(help)) = parse(&["--help"]) else { panic!("help") };
        assert_eq!(help.contains(&format!("\n  {verb} ")), cfg!(feature = "labs"), "{help}");
        assert_eq!(parse(&args).is_ok(), cfg!(feature = "labs"), "{args:?}");
        if cfg!(not(feature = "labs")) {
            assert!(!help.contains("lab") && mistake(&[verb]).contains(&format!("'{verb}'")));
        }
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
