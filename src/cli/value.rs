//! Values of flags other than numbers and paths: each function parses one kind, or returns the reason for which it is invalid.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use log::LevelFilter;
use rvmm_devices::number::address;
use rvmm_devices::{Model, Options};

use crate::config::{
    CpuId, CsrValue, ExtensionChange, GdbConfig, LoadConfig, MAX_CPUS, SerialConfig, TraceConfig,
    TraceFormat, quoted,
};

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

/// `--disk PATH[,key=value...]`, as `--device` takes it.
pub(super) fn disk(text: &str) -> Result<String, String> {
    let path = text.split(',').next().unwrap_or_default();
    if path.is_empty() {
        return Err("the path is missing (write disk.img or disk.img,ro=on)".into());
    }
    if let Some(socket) = text.strip_prefix("vhost-user=") {
        let text = format!("vhost-user-blk,socket={socket}");
        return device(&text).map(|_| text);
    }
    if path.starts_with("path=") {
        return Err("the path has no key before it (write disk.img,ro=on)".into());
    }
    let text = format!("blk,path={text}");
    device(&text)?;
    Ok(text)
}

/// `--serial stdio|null|pty|file:PATH|unix:PATH`.
pub(super) fn serial(text: OsString) -> Result<SerialConfig, String> {
    SerialConfig::parse(&text).map_err(Into::into)
}

/// `--trace FILE[,format=chrome|lines][,pc=on|off][,ring=N]`.
pub(super) fn trace(text: &str) -> Result<TraceConfig, String> {
    let mut parts = text.split(',');
    let file = parts.next().unwrap_or_default();
    if file.is_empty() {
        return Err("the file is missing (write exits.json or exits.jsonl,pc=on)".into());
    }
    let mut trace = TraceConfig { file: file.into(), ..TraceConfig::default() };
    for part in parts {
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
                let part = quoted(part);
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

/// Parses a device's text, and checks its names and keys.
fn device(text: &str) -> Result<Options, String> {
    let options = Options::parse(text).map_err(|error| error.to_string())?;
    let model = Model::find(options.name()).map_err(|error| error.to_string())?;
    model.check(&options).map_err(|error| error.to_string())?;
    Ok(options)
}

/// `--net tap=NAME,KEY=VALUE,...`, `--net user,...`, `--net vhost-user=PATH,...`: the text of the device that it is short for.
pub(super) fn net(text: &str) -> Result<String, String> {
    if text == "user" || text.starts_with("user,") {
        let text = format!("net-{text}");
        return device(&text).map(|_| text);
    }
    if let Some(socket) = text.strip_prefix("vhost-user=") {
        let text = format!("vhost-user-net,socket={socket}");
        return device(&text).map(|_| text);
    }
    if text.is_empty() {
        return Err("its value is missing (write user, or tap=NAME)".into());
    }
    let text = format!("net,{text}");
    let options = device(&text)?;
    if options.get("tap").is_none() && options.get("fd").is_none() {
        return Err("it names no backend (write tap=NAME or fd=N)".into());
    }
    Ok(text)
}

/// `--vsock PATH[,cid=N]`, `--vsock backend=kernel,cid=N`: the text of the device that it is short for.
pub(super) fn vsock(text: &str) -> Result<String, String> {
    let first = text.split(',').next().unwrap_or_default();
    // A file with such a name is written ./cid=7.
    let is_option = ["backend=", "cid="].iter().any(|key| first.starts_with(key));
    let text = if is_option { format!("vsock,{text}") } else { format!("vsock,path={text}") };
    let options = device(&text)?;
    if is_option && options.get("backend") != Some("kernel") {
        return Err("its socket is missing (write PATH,cid=N, or backend=kernel,cid=N)".into());
    }
    Ok(text)
}

/// One `--console`: the console itself if it names no port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ConsoleEnd {
    pub(super) port: Option<String>,
    pub(super) to: String,
}

/// `--console to=WHERE`, `--console port=NAME,path=PATH` or `--console port=NAME,to=WHERE`.
pub(super) fn console(text: &str) -> Result<ConsoleEnd, String> {
    const FORMS: &str = "it is not of the form to=WHERE, port=NAME,path=PATH or port=NAME,to=WHERE";
    let mut end = (None, None);
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or(FORMS)?;
        let (field, value) = match key {
            "port" => (&mut end.0, value.to_owned()),
            "to" => (&mut end.1, value.to_owned()),
            "path" => (&mut end.1, format!("unix:{value}")),
            _ => return Err(FORMS.into()),
        };
        if value.is_empty() || field.replace(value).is_some() {
            return Err(FORMS.into());
        }
    }
    let (port, to) = (end.0, end.1.ok_or(FORMS)?);
    if port.is_none() && text.starts_with("path=") {
        return Err("a path needs a port (write port=NAME,path=PATH, or to=unix:PATH)".into());
    }
    Ok(ConsoleEnd { port, to })
}

/// The device that all `--console` together describe; `None` without any.
pub(super) fn consoles(ends: &[ConsoleEnd]) -> Result<Option<String>, String> {
    let mut text = "console".to_owned();
    let (consoles, ports): (Vec<_>, Vec<_>) = ends.iter().partition(|end| end.port.is_none());
    if consoles.len() > 1 {
        return Err("there is only one console without port=NAME (name the others)".into());
    }
    for end in consoles {
        text.push_str(&format!(",to={}", end.to));
    }
    for (number, end) in ports.iter().enumerate() {
        let name = end.port.as_deref().unwrap_or_default();
        text.push_str(&format!(",port{}={name}={}", number + 1, end.to));
    }
    if ends.is_empty() {
        return Ok(None);
    }
    device(&text)?;
    Ok(Some(text))
}

/// `--share TAG=PATH[:ro]`: the text of the device that it is short for.
pub(super) fn share(text: &str) -> Result<String, String> {
    let Some((tag, path)) = text.split_once('=').filter(|(tag, _)| !tag.is_empty()) else {
        return Err(
            "it is not of the form TAG=PATH (write home=/srv/home, or home=/srv/home:ro)".into()
        );
    };
    let (path, access) = match path.strip_suffix(":ro") {
        Some(path) => (path, ",ro=on"),
        None => (path, ""),
    };
    if path.is_empty() {
        return Err("the folder is missing after the '=' (write TAG=PATH)".into());
    }
    if tag.contains(',') || path.contains(',') {
        return Err(
            "a tag or a path with a comma cannot be shared (rename it, or make a link without one)"
                .into(),
        );
    }
    let text = format!("fs,tag={tag},path={path}{access}");
    device(&text).map(|_| text)
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
        assert_eq!(loaded.file.as_os_str().as_bytes(), b"\xff.bin");
        let serial =
            serial(OsStr::from_bytes(b"file:/tmp/\xfe").to_owned()).expect("names are bytes");
        assert_eq!(serial, SerialConfig::File(OsStr::from_bytes(b"/tmp/\xfe").into()));
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
        let traced = trace("a.jsonl,pc=on,ring=4096").expect("a trace");
        assert_eq!(
            (traced.format(), traced.pc, traced.ring),
            (TraceFormat::Lines, true, Some(4096))
        );
        let traced = trace("a.jsonl,format=chrome").expect("a trace");
        assert_eq!((traced.format(), traced.pc), (TraceFormat::Chrome, false));
        assert_eq!(trace("a").expect("a trace").format(), TraceFormat::Chrome);
        for text in ["", ",pc=on", "a,pc", "a,format=xml", "a,ring=many", "a,"] {
            assert!(!trace(text).expect_err(text).is_empty());
        }
    }

    #[test]
    fn a_disk_is_a_device_with_a_path() {
        assert_eq!(disk("a.img"), Ok("blk,path=a.img".into()));
        assert_eq!(disk("/x=y/a,ro=on,queues=2"), Ok("blk,path=/x=y/a,ro=on,queues=2".into()));
        for text in ["", ",ro=on"] {
            assert!(disk(text).expect_err(text).contains("missing"), "{text}");
        }
        assert!(disk("path=a.img").expect_err("a key").contains("no key"));
        assert!(disk("a.img,ro").expect_err("no pair").contains("key=value"));
        assert!(disk("a.img,path=b").expect_err("twice").contains("twice"));
    }

    #[test]
    fn the_serial_line_has_five_backends_of_its_own() {
        assert_eq!(serial("stdio".into()), Ok(SerialConfig::Stdio));
        assert_eq!(serial("null".into()), Ok(SerialConfig::Null));
        assert_eq!(serial("pty".into()), Ok(SerialConfig::Pty));
        assert_eq!(serial("file:log:1".into()), Ok(SerialConfig::File("log:1".into())));
        assert_eq!(serial("unix:/run/s".into()), Ok(SerialConfig::Unix("/run/s".into())));
        for text in ["", "tcp:1", "stdio:", "STDIO", "file"] {
            assert!(serial(text.into()).expect_err(text).contains("not one of stdio"), "{text}");
        }
        for text in ["file:", "unix:"] {
            assert!(serial(text.into()).expect_err(text).contains("missing"), "{text}");
        }
    }

    #[test]
    fn a_network_is_short_for_a_device() {
        assert_eq!(net("tap=tap0"), Ok("net,tap=tap0".into()));
        assert_eq!(net("fd=3,mtu=9000"), Ok("net,fd=3,mtu=9000".into()));
        assert_eq!(net("user"), Ok("net-user".into()));
        assert_eq!(net("user,forward=1:2"), Ok("net-user,forward=1:2".into()));
        assert_eq!(net("vhost-user=/s"), Ok("vhost-user-net,socket=/s".into()));
        for (text, part) in [
            ("user,hostfwd=1", "hostfwd"),
            ("users", "key=value"),
            ("", "missing"),
            ("tap0", "key=value"),
            ("mtu=1500", "tap=NAME or fd=N"),
            ("tap=a,colour=red", "colour"),
            ("tap=a,tap=b", "twice"),
        ] {
            assert!(net(text).expect_err(text).contains(part), "{text}");
        }
    }

    #[test]
    fn sockets_are_at_a_path_or_in_the_kernel() {
        assert_eq!(vsock("/run/v"), Ok("vsock,path=/run/v".into()));
        assert_eq!(vsock("./cid=7,cid=8"), Ok("vsock,path=./cid=7,cid=8".into()));
        assert_eq!(vsock("cid=7,backend=kernel"), Ok("vsock,cid=7,backend=kernel".into()));
        assert_eq!(vsock("backend=kernel"), Ok("vsock,backend=kernel".into()));
        for (text, part) in [
            ("cid=7", "missing"),
            ("backend=unix", "missing"),
            ("/run/v,sid=7", "sid"),
            ("cid=7,backend=kernel,cid=8", "twice"),
        ] {
            assert!(vsock(text).expect_err(text).contains(part), "{text}");
        }
    }

    #[test]
    fn a_folder_is_shared_by_its_tag() {
        assert_eq!(share("home=/srv"), Ok("fs,tag=home,path=/srv".into()));
        assert_eq!(share("home=/a=b:ro"), Ok("fs,tag=home,path=/a=b,ro=on".into()));
        for (text, part) in [
            ("", "TAG=PATH"),
            ("/srv", "TAG=PATH"),
            ("=/srv", "TAG=PATH"),
            ("home=", "missing"),
            ("home=:ro", "missing"),
            ("home=/a,b", "comma"),
        ] {
            assert!(share(text).expect_err(text).contains(part), "{text}");
        }
    }

    #[test]
    fn a_disk_may_be_another_programs() {
        assert_eq!(disk("vhost-user=/s"), Ok("vhost-user-blk,socket=/s".into()));
        assert_eq!(disk("vhost-user=/s,queues=2"), Ok("vhost-user-blk,socket=/s,queues=2".into()));
        assert!(disk("vhost-user=/s,ro=on").expect_err("not its own").contains("ro"));
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
