//! Values of flags other than numbers and paths: each function parses one kind, or returns the reason for which it is invalid.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use log::LevelFilter;
use rvmm_devices::number::address;
use rvmm_devices::options;

use crate::config::{
    CpuId, CsrValue, Endpoint, ExtensionChange, GdbConfig, LoadConfig, MAX_CPUS, TraceConfig,
    TraceFormat, quoted,
};
use crate::sockets::{LocalAddress, unix_path};

/// A list in one flag's value. (A bare `Vec` in clap's structs is a flag that may be given several times.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct List<T>(pub(super) Vec<T>);

/// `--cpus`: 1 to [`MAX_CPUS`].
pub(super) fn cpus(text: &str) -> Result<u32, String> {
    let number = text.parse::<u32>().ok().filter(|count| (1..=MAX_CPUS).contains(count));
    number.ok_or_else(|| format!("it is not a number from 1 to {MAX_CPUS}"))
}

/// `--load FILE@ADDR`: the address follows the last `@`.
pub(super) fn load(text: OsString) -> Result<LoadConfig, String> {
    let bytes = text.as_bytes();
    let at = bytes.iter().rposition(|byte| *byte == b'@');
    let parts = at.and_then(|at| Some((bytes.get(..at)?, bytes.get(at + 1..)?)));
    let Some((file, addr)) = parts.filter(|(file, _)| !file.is_empty()) else {
        return Err("it is not of the form FILE@ADDR (write fw.bin@0x8000_0000)".into());
    };
    let addr = std::str::from_utf8(addr).map_err(|_| "its address is not a number".to_owned());
    let addr = addr.and_then(address).map_err(|reason| format!("after the '@', {reason}"))?;
    Ok(LoadConfig { file: OsStr::from_bytes(file).into(), addr })
}

/// `--csr NAME=VALUE`.
pub(super) fn csr(text: &str) -> Result<CsrValue, String> {
    let (name, value) =
        text.split_once('=').ok_or("it is not of the form NAME=VALUE (write mhartid=0x1234)")?;
    let number = CsrValue::number(name)?;
    let value = address(value).map_err(|reason| format!("after the '=', {reason}"))?;
    Ok(CsrValue { number, value })
}

/// `--serial stdio|null|pty|file:PATH|unix:PATH`.
pub(super) fn serial(text: OsString) -> Result<Endpoint, String> {
    Endpoint::parse(&text).map_err(Into::into)
}

/// `--trace FILE[,format=chrome|lines][,pc=on|off][,ring=N]`.
pub(super) fn trace(text: OsString) -> Result<TraceConfig, String> {
    let mut parts = options::split(&text).into_iter();
    let file = parts.next().unwrap_or_default();
    if file.is_empty() {
        return Err("the file is missing (write exits.json or exits.jsonl,pc=on)".into());
    }
    let mut trace = TraceConfig { file: file.into(), ..TraceConfig::default() };
    for part in parts {
        let part = part.to_string_lossy();
        match part.split_once('=') {
            Some(("format", "chrome")) => trace.format = Some(TraceFormat::Chrome),
            Some(("format", "lines")) => trace.format = Some(TraceFormat::Lines),
            Some(("pc", "on")) => trace.pc = true,
            Some(("pc", "off")) => trace.pc = false,
            Some(("ring", number)) => {
                let number = number.parse().map_err(|_| "its ring is not a number")?;
                trace.ring = Some(number);
            }
            _ => {
                let part = quoted(&part);
                return Err(format!(
                    "unknown option {part} (use format=chrome, format=lines, pc=on, pc=off or ring=N)"
                ));
            }
        }
    }
    Ok(trace)
}

/// `--gdb tcp:PORT|tcp:HOST:PORT|unix:PATH[,wait=on|off]`.
pub(super) fn gdb(text: OsString) -> Result<GdbConfig, String> {
    GdbConfig::parse(&text).map_err(Into::into)
}

/// `--serve` and `--from` of a pager: `unix:PATH`, `tcp:HOST:PORT`.
pub(super) fn socket_address(text: OsString) -> Result<LocalAddress, String> {
    LocalAddress::parse(&text).map_err(Into::into)
}

/// `--pager unix:PATH`.
pub(super) fn unix_socket(text: OsString) -> Result<PathBuf, String> {
    unix_path(&text).map_err(Into::into)
}

/// `--isa host,-v,+zbb`: the changes. `host` may come first and is the default anyway.
pub(super) fn isa(text: &str) -> Result<List<ExtensionChange>, String> {
    match text {
        "host" => Ok(List(Vec::new())),
        _ => knobs(text.strip_prefix("host,").unwrap_or(text)),
    }
}

/// `--sbi -pmu,-sta`.
pub(super) fn sbi(text: &str) -> Result<List<ExtensionChange>, String> {
    knobs(text)
}

fn knobs(text: &str) -> Result<List<ExtensionChange>, String> {
    text.split(',').map(knob).collect::<Result<_, _>>().map(List)
}

fn knob(text: &str) -> Result<ExtensionChange, String> {
    let (on, name) = match (text.strip_prefix('-'), text.strip_prefix('+')) {
        (Some(name), _) => (false, name),
        (_, Some(name)) => (true, name),
        _ => return Err("an extension is given without its sign (write -NAME to switch it off, +NAME to switch it on)".into()),
    };
    let good = |c: char| c.is_ascii_alphanumeric();
    if name.is_empty() || !name.chars().all(good) {
        return Err("it is not a list of -NAME and +NAME with commas between them".into());
    }
    Ok(ExtensionChange { name: name.to_ascii_lowercase(), on })
}

/// `--cpu-id vendor=N,arch=N,impl=N`, each at most once.
pub(super) fn cpu_id(text: &str) -> Result<CpuId, String> {
    let mut id = CpuId::default();
    for part in text.split(',') {
        let (key, value) =
            part.split_once('=').ok_or("it is not a list of vendor=N, arch=N and impl=N")?;
        let field = match key {
            "vendor" => &mut id.vendor,
            "arch" => &mut id.arch,
            "impl" => &mut id.imp,
            _ => return Err("it has a key other than vendor, arch and impl".into()),
        };
        let number = address(value).map_err(|reason| format!("after {key}=, {reason}"))?;
        if field.replace(number).is_some() {
            return Err(format!("{key} is given twice (leave one out)"));
        }
    }
    Ok(id)
}

/// `--affinity 0=2,1=3`: hart on the left, host CPU on the right.
pub(super) fn affinity(text: &str) -> Result<List<(u32, u32)>, String> {
    let pair = |part: &str| {
        let (hart, cpu) = part.split_once('=')?;
        Some((hart.parse().ok()?, cpu.parse().ok()?))
    };
    let pairs: Option<Vec<_>> = text.split(',').map(pair).collect();
    pairs.map(List).ok_or_else(|| {
        "it is not a list of HART=CPU with commas between them (write 0=2,1=3)".into()
    })
}

/// `--log` and `RVMM_LOG`.
pub(super) fn level(text: &str) -> Result<LevelFilter, String> {
    text.parse().map_err(|_| "it is not one of off, error, warn, info, debug and trace".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn knob(name: &str, on: bool) -> ExtensionChange {
        ExtensionChange { name: name.into(), on }
    }

    #[test]
    fn a_machine_has_1_to_512_harts() {
        assert_eq!(cpus("1"), Ok(1));
        assert_eq!(cpus("512"), Ok(512));
        for text in ["0", "513", "-1", "", "four", "4294967297", "1.0"] {
            assert!(cpus(text).expect_err(text).contains("1 to 512"));
        }
    }

    #[test]
    fn a_flat_binary_is_split_at_the_last_at_sign() {
        let loaded =
            load("dir@host/a.bin@0x8000_0000".into()).expect("a file with an @ in its path");
        assert_eq!(loaded, LoadConfig { file: "dir@host/a.bin".into(), addr: 0x8000_0000 });
        assert_eq!(load("a@0".into()).expect("address 0").addr, 0);
    }

    #[test]
    fn a_file_name_need_not_be_utf_8() {
        let loaded = load(OsStr::from_bytes(b"\xff.bin@1M").to_owned()).expect("names are bytes");
        assert_eq!(loaded.file.as_bytes(), b"\xff.bin");
        let serial =
            serial(OsStr::from_bytes(b"file:/tmp/\xfe").to_owned()).expect("names are bytes");
        assert_eq!(serial, Endpoint::File(OsStr::from_bytes(b"/tmp/\xfe").into()));
    }

    #[test]
    fn a_flat_binary_without_an_address_is_refused() {
        for text in ["a.bin", "@0x1000", "", "@"] {
            assert!(load(text.into()).expect_err(text).contains("FILE@ADDR"), "{text}");
        }
        for text in ["a.bin@", "a.bin@here", "a.bin@-1"] {
            assert!(load(text.into()).expect_err(text).contains("after the '@'"), "{text}");
        }
        let text = OsStr::from_bytes(b"a@\xff");
        assert!(load(text.to_owned()).expect_err("not UTF-8").contains("not a number"));
    }

    #[test]
    fn a_trace_is_a_file_with_options() {
        let traced = trace("a.jsonl,pc=on,ring=4096".into()).expect("a trace");
        assert_eq!(
            (traced.format(), traced.pc, traced.ring),
            (TraceFormat::Lines, true, Some(4096))
        );
        let traced = trace("a.jsonl,format=chrome".into()).expect("a trace");
        assert_eq!((traced.format(), traced.pc), (TraceFormat::Chrome, false));
        assert_eq!(trace("a,,b".into()).expect("a trace").file, "a,b".into());
        for text in ["", ",pc=on", "a,pc", "a,format=xml", "a,ring=many", "a,"] {
            assert!(!trace(text.into()).expect_err(text).is_empty());
        }
    }

    #[test]
    fn the_serial_line_has_five_backends_of_its_own() {
        assert_eq!(serial("stdio".into()), Ok(Endpoint::Stdio));
        assert_eq!(serial("null".into()), Ok(Endpoint::Null));
        assert_eq!(serial("pty".into()), Ok(Endpoint::Pty));
        assert_eq!(serial("file:log:1".into()), Ok(Endpoint::File("log:1".into())));
        assert_eq!(serial("unix:/run/s".into()), Ok(Endpoint::Unix("/run/s".into())));
        for text in ["", "tcp:1", "stdio:", "STDIO", "file"] {
            assert!(serial(text.into()).expect_err(text).contains("not one of stdio"), "{text}");
        }
        for text in ["file:", "unix:"] {
            assert!(serial(text.into()).expect_err(text).contains("missing"), "{text}");
        }
    }

    #[test]
    fn extensions_are_switched_by_sign() {
        assert_eq!(isa("host"), Ok(List(vec![])));
        assert_eq!(isa("host,-v,-zicbom"), Ok(List(vec![knob("v", false), knob("zicbom", false)])));
        assert_eq!(isa("-V"), Ok(List(vec![knob("v", false)])));
        assert_eq!(sbi("-pmu,+susp"), Ok(List(vec![knob("pmu", false), knob("susp", true)])));
    }

    #[test]
    fn a_list_of_extensions_that_is_none_is_refused() {
        for text in ["", "v", "host,", "-v,host", "host-v", "-v,", "--cpus", "-", "+", "-v w", "-é"]
        {
            assert!(isa(text).is_err(), "{text}");
        }
        assert!(sbi("host").is_err(), "the SBI extensions are not the host's but KVM's");
    }

    #[test]
    fn identification_registers_are_given_by_key() {
        let id = cpu_id("vendor=0x5b7,impl=1").expect("two of three");
        assert_eq!(id, CpuId { vendor: Some(0x5b7), arch: None, imp: Some(1) });
        for text in ["", "vendor", "vendor=", "model=1", "arch=1,arch=2", "arch=x", "arch=1,"] {
            assert!(cpu_id(text).is_err(), "{text}");
        }
    }

    #[test]
    fn harts_are_pinned_in_pairs() {
        assert_eq!(affinity("0=2,1=3"), Ok(List(vec![(0, 2), (1, 3)])));
        for text in ["", "0", "0=", "=1", "0=1,", "0=-1", "a=b", "0=1=2", "0=99999999999"] {
            assert!(affinity(text).expect_err(text).contains("HART=CPU"), "{text}");
        }
    }

    #[test]
    fn there_are_six_log_levels() {
        assert_eq!(level("off"), Ok(LevelFilter::Off));
        assert_eq!(level("trace"), Ok(LevelFilter::Trace));
        assert_eq!(level("WARN"), Ok(LevelFilter::Warn));
        assert!(level("loud").expect_err("no level").contains("not one of off"));
    }
}
