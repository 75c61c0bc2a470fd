//! Flags that describe a device: each is parsed once, into the configuration of its model.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use rvmm_devices::config::{ConsoleConfig, FsConfig, MountTag, PortConfig, PortName};
use rvmm_devices::options;

use crate::config::{DeviceConfig, Endpoint};

/// `--device`: a device, or `help` for the list of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum DeviceFlag {
    Help,
    Device(Box<DeviceConfig>),
}

/// `--device NAME,key=value,...` or `--device help`.
pub(super) fn device(text: OsString) -> Result<DeviceFlag, String> {
    if text == "help" {
        return Ok(DeviceFlag::Help);
    }
    parsed(&text).map(|device| DeviceFlag::Device(Box::new(device)))
}

/// The device of these parts of a text.
fn device_of(parts: &[&OsStr]) -> Result<DeviceConfig, String> {
    let text: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
    parsed(OsStr::from_bytes(&text.concat()))
}

fn parsed(text: &OsStr) -> Result<DeviceConfig, String> {
    DeviceConfig::parse(text).map_err(|error| error.to_string())
}

/// The rest of a text after `prefix`.
fn after<'a>(text: &'a OsStr, prefix: &str) -> Option<&'a OsStr> {
    text.as_bytes().strip_prefix(prefix.as_bytes()).map(OsStr::from_bytes)
}

/// The first part of a list with commas.
fn first(text: &OsStr) -> OsString {
    options::split(text).into_iter().next().unwrap_or_default()
}

/// `--disk PATH[,key=value...]`, as `--device` takes it.
pub(super) fn disk(text: OsString) -> Result<DeviceConfig, String> {
    if first(&text).is_empty() {
        return Err("the path is missing (write disk.img or disk.img,ro=on)".into());
    }
    if let Some(socket) = after(&text, "vhost-user=") {
        return device_of(&["vhost-user-blk,socket=".as_ref(), socket]);
    }
    if after(&text, "path=").is_some() {
        return Err("the path has no key before it (write disk.img,ro=on)".into());
    }
    device_of(&["blk,path=".as_ref(), &text])
}

/// `--net tap=NAME,KEY=VALUE,...`, `--net user,...`, `--net vhost-user=PATH,...`: the device that it is short for.
pub(super) fn net(text: OsString) -> Result<DeviceConfig, String> {
    if first(&text) == "user" {
        return device_of(&["net-".as_ref(), &text]);
    }
    if let Some(socket) = after(&text, "vhost-user=") {
        return device_of(&["vhost-user-net,socket=".as_ref(), socket]);
    }
    if text.is_empty() {
        return Err("its value is missing (write user, or tap=NAME)".into());
    }
    device_of(&["net,".as_ref(), &text])
}

/// `--vsock PATH[,cid=N]`, `--vsock backend=kernel,cid=N`: the device that it is short for.
pub(super) fn vsock(text: OsString) -> Result<DeviceConfig, String> {
    // A file with such a name is written ./cid=7.
    if after(&text, "backend=").is_none() && after(&text, "cid=").is_none() {
        return device_of(&["vsock,path=".as_ref(), &text]);
    }
    let is_kernel = options::split(&text).iter().any(|part| part == "backend=kernel");
    if !is_kernel {
        return Err("its socket is missing (write PATH,cid=N, or backend=kernel,cid=N)".into());
    }
    device_of(&["vsock,".as_ref(), &text])
}

/// One `--console`: the console itself if it names no port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ConsoleEnd {
    pub(super) port: Option<PortName>,
    pub(super) to: Endpoint,
}

/// `--console to=WHERE`, `--console port=NAME,path=PATH` or `--console port=NAME,to=WHERE`.
pub(super) fn console(text: OsString) -> Result<ConsoleEnd, String> {
    const FORMS: &str = "it is not of the form to=WHERE, port=NAME,path=PATH or port=NAME,to=WHERE";
    let (mut port, mut to) = (None, None);
    for part in options::split(&text) {
        let (key, value) = options::split_pair(&part).ok_or(FORMS)?;
        let is_again = match key.as_bytes() {
            _ if value.is_empty() => return Err(FORMS.into()),
            b"port" => {
                let name = value.to_str().and_then(PortName::new);
                let name =
                    name.ok_or("a port's name has 1 to 63 letters, digits, '-', '_' and '.'")?;
                port.replace(name).is_some()
            }
            b"to" => to.replace(Endpoint::parse(value)?).is_some(),
            b"path" => to.replace(Endpoint::Unix(value.into())).is_some(),
            _ => return Err(FORMS.into()),
        };
        if is_again {
            return Err(FORMS.into());
        }
    }
    let to = to.ok_or(FORMS)?;
    if port.is_none() && after(&text, "path=").is_some() {
        return Err("a path needs a port (write port=NAME,path=PATH, or to=unix:PATH)".into());
    }
    Ok(ConsoleEnd { port, to })
}

/// The device that all `--console` together describe; `None` without any.
pub(super) fn consoles(ends: Vec<ConsoleEnd>) -> Result<Option<DeviceConfig>, String> {
    if ends.is_empty() {
        return Ok(None);
    }
    let (mut console, mut ports) = (None, Vec::new());
    for ConsoleEnd { port, to } in ends {
        match port {
            Some(name) => ports.push(PortConfig { name, to }),
            None if console.replace(to).is_some() => {
                return Err("there is only one console without port=NAME (name the others)".into());
            }
            None => {}
        }
    }
    let config = ConsoleConfig::new(console, ports);
    let device =
        DeviceConfig::from(config.ok_or("a console has at most 7 ports (leave some out)")?);
    device.check().map_err(|error| error.to_string())?;
    Ok(Some(device))
}

/// `--share TAG=PATH[:ro]`: the device that it is short for. It takes no options, so a comma is part of the path.
pub(super) fn share(text: OsString) -> Result<DeviceConfig, String> {
    let Some((tag, path)) = options::split_pair(&text).filter(|(tag, _)| !tag.is_empty()) else {
        return Err(
            "it is not of the form TAG=PATH (write home=/srv/home, or home=/srv/home:ro)".into()
        );
    };
    let bytes = path.as_bytes();
    let (path, ro) = match bytes.strip_suffix(b":ro") {
        Some(path) => (path, true),
        None => (bytes, false),
    };
    if path.is_empty() {
        return Err("the folder is missing after the '=' (write TAG=PATH)".into());
    }
    let tag = tag.to_str().and_then(MountTag::new);
    let tag = tag.ok_or("its tag is not a name of 1 to 36 bytes without control characters")?;
    Ok(FsConfig { ro, ..FsConfig::new(tag, OsStr::from_bytes(path)) }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(text: &str) -> Result<DeviceConfig, String> {
        Ok(DeviceConfig::parse(text).unwrap())
    }

    fn mistake<T: std::fmt::Debug>(read: fn(OsString) -> Result<T, String>, text: &str) -> String {
        read(text.into()).expect_err(text)
    }

    #[test]
    fn a_disk_is_a_device_with_a_path() {
        assert_eq!(disk("a.img".into()), same("blk,path=a.img"));
        let long = "/x=y/a,ro=on,queues=2";
        assert_eq!(disk(long.into()), same(&format!("blk,path={long}")));
        for text in ["", ",ro=on"] {
            assert!(mistake(disk, text).contains("missing"), "{text}");
        }
        assert!(mistake(disk, "path=a.img").contains("no key"));
        assert!(mistake(disk, "a.img,ro").contains("key=value"));
        assert!(mistake(disk, "a.img,path=b").contains("twice"));
    }

    #[test]
    fn a_disk_may_be_another_programs() {
        assert_eq!(disk("vhost-user=/s".into()), same("vhost-user-blk,socket=/s"));
        let queues = disk("vhost-user=/s,queues=2".into());
        assert_eq!(queues, same("vhost-user-blk,socket=/s,queues=2"));
        assert!(mistake(disk, "vhost-user=/s,ro=on").contains("ro"));
    }

    #[test]
    fn the_path_of_a_flag_may_have_commas_and_any_bytes() {
        let of = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        let Ok(DeviceConfig::Blk(blk)) = disk(of(b"a,,b \xff.img,ro=on")) else { panic!("a disk") };
        assert_eq!((blk.path.as_bytes(), blk.ro), (&b"a,b \xff.img"[..], true));
        let Ok(DeviceConfig::Vsock(vsock)) = vsock(of(b"/run/,,\xfe,cid=7")) else {
            panic!("sockets")
        };
        assert_eq!(vsock.path.map(|path| path.as_bytes().to_vec()), Some(b"/run/,\xfe".to_vec()));
        let Ok(DeviceConfig::Fs(fs)) = share(of(b"t=/a,b=\xfd:ro")) else { panic!("a folder") };
        assert_eq!(
            (fs.path.map(|path| path.as_bytes().to_vec()), fs.ro),
            (Some(b"/a,b=\xfd".to_vec()), true)
        );
        let Ok(DeviceConfig::VhostUserNet(net)) = net(of(b"vhost-user=/n,,\xfc")) else {
            panic!("a card")
        };
        assert_eq!(net.socket.as_bytes(), b"/n,\xfc");
        let end = console(of(b"port=agent,path=/c,,\xfb")).unwrap();
        assert_eq!(end.to, Endpoint::Unix(OsStr::from_bytes(b"/c,\xfb").into()));
        let flag = device(of(b"uart,to=file:log,,\xfa")).unwrap();
        let DeviceFlag::Device(uart) = flag else { panic!("a port") };
        let DeviceConfig::Uart(uart) = *uart else { panic!("a port") };
        assert_eq!(uart.to, Endpoint::File(OsStr::from_bytes(b"log,\xfa").into()));
    }

    #[test]
    fn a_network_is_short_for_a_device() {
        for (text, long) in [
            ("tap=tap0", "net,tap=tap0"),
            ("fd=3,mtu=9000", "net,fd=3,mtu=9000"),
            ("user", "net-user"),
            ("user,forward=1:2", "net-user,forward=1:2"),
            ("vhost-user=/s", "vhost-user-net,socket=/s"),
        ] {
            assert_eq!(net(text.into()), same(long));
        }
        for (text, part) in [
            ("user,hostfwd=1", "hostfwd"),
            ("users", "key=value"),
            ("", "missing"),
            ("tap0", "key=value"),
            ("mtu=1500", "tap=NAME or fd=N"),
            ("tap=a,colour=red", "colour"),
            ("tap=a,tap=b", "twice"),
        ] {
            assert!(mistake(net, text).contains(part), "{text}");
        }
    }

    #[test]
    fn sockets_are_at_a_path_or_in_the_kernel() {
        for (text, long) in [
            ("/run/v", "vsock,path=/run/v"),
            ("./cid=7,cid=8", "vsock,path=./cid=7,cid=8"),
            ("cid=7,backend=kernel", "vsock,cid=7,backend=kernel"),
            ("backend=kernel", "vsock,backend=kernel"),
        ] {
            assert_eq!(vsock(text.into()), same(long));
        }
        for (text, part) in [
            ("cid=7", "missing"),
            ("backend=unix", "missing"),
            ("/run/v,sid=7", "sid"),
            ("cid=7,backend=kernel,cid=8", "twice"),
        ] {
            assert!(mistake(vsock, text).contains(part), "{text}");
        }
    }

    #[test]
    fn a_folder_is_shared_by_its_tag() {
        assert_eq!(share("home=/srv".into()), same("fs,tag=home,path=/srv"));
        assert_eq!(share("home=/a=b:ro".into()), same("fs,tag=home,path=/a=b,ro=on"));
        assert_eq!(share("home=/a,b".into()), same("fs,tag=home,path=/a,,b"));
        for (text, part) in [
            ("", "TAG=PATH"),
            ("/srv", "TAG=PATH"),
            ("=/srv", "TAG=PATH"),
            ("home=", "missing"),
            ("home=:ro", "missing"),
            ("a\u{7}=/srv", "its tag"),
        ] {
            assert!(mistake(share, text).contains(part), "{text}");
        }
    }
}
