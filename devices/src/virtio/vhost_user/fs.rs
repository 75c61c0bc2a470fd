//! A folder of the host (virtio 1.3, section 5.11), served by virtiofsd: one that rvmm starts, or one that listens on a socket.
//!
//! There is one queue for requests, since virtiofsd has no more, and no DAX window.

use super::front::Front;
use super::peer::Peer;
use super::{Kind, Sandbox, Service};
use crate::catalog::{BuildError, Built, Key, Model, Placement, Wiring};
use crate::options::{OptionError, Options};
use crate::virtio::VirtioMmio;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "fs",
    summary: "virtio file system: a folder of the host, through virtiofsd",
    keys: &[
        Key { name: "tag", value: "NAME", help: "mount tag in the guest (needed)" },
        Key { name: "path", value: "PATH", help: "the folder (this or socket is needed)" },
        Key { name: "ro", value: "on|off", help: "the folder is read-only (default: off)" },
        Key {
            name: "sandbox",
            value: "namespace|chroot|none",
            help: "how virtiofsd is confined to the folder (default: namespace)",
        },
        Key { name: "socket", value: "PATH", help: "socket of a virtiofsd that runs already" },
    ],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: true,
    build,
};

/// Bytes of a tag, padded with zeroes.
const TAG: usize = 36;

fn build(options: &Options, wiring: Wiring) -> Built {
    let bad = |source| BuildError::Option { model: MODEL.name, source };
    let config = config(options).map_err(bad)?;
    let service = service(options).map_err(bad)?;
    let host = wiring.host.as_ref();
    let peer = match (service, options.get("socket")) {
        (Some(service), None) => Peer::start(host, &service),
        (None, Some(socket)) if !socket.is_empty() => Peer::connect(host, socket.into(), 0),
        (_, _) => {
            let expected = "given (write path=FOLDER, or socket=PATH without path, ro and sandbox)";
            return Err(bad(options.bad_value("path", expected)));
        }
    };
    let peer = peer.map_err(|source| BuildError::Backend { model: MODEL.name, source })?;
    let kind = Kind {
        model: MODEL.name,
        id: 26,
        features: 0,
        own: 0,
        // The high-priority queue, and the request queue.
        sizes: vec![256, 1024],
        remote: 2,
        config,
        asked: 0,
        adapt: |_, _| {},
    };
    VirtioMmio::create(Box::new(Front::create(kind, peer, &wiring)?), wiring)
}

/// The configuration space: the tag, and one request queue.
fn config(options: &Options) -> Result<Vec<u8>, OptionError> {
    let expected = "a name of 1 to 36 bytes without control characters";
    let tag = options.get("tag").unwrap_or_default();
    if !(1..=TAG).contains(&tag.len()) || tag.chars().any(char::is_control) {
        return Err(options.bad_value("tag", expected));
    }
    let mut config = tag.as_bytes().to_vec();
    config.resize(TAG, 0);
    config.extend(1_u32.to_le_bytes());
    Ok(config)
}

/// The virtiofsd to start; `None` with `socket`.
fn service(options: &Options) -> Result<Option<Service>, OptionError> {
    let read_only = match options.get("ro") {
        None | Some("off") => false,
        Some("on") => true,
        Some(_) => return Err(options.bad_value("ro", "on or off")),
    };
    let sandbox = match options.get("sandbox") {
        None | Some("namespace") => Sandbox::Namespace,
        Some("chroot") => Sandbox::Chroot,
        Some("none") => Sandbox::None,
        Some(_) => return Err(options.bad_value("sandbox", "namespace, chroot or none")),
    };
    let only_own = ["ro", "sandbox"].into_iter().find(|key| options.get(key).is_some());
    match options.get("path").filter(|path| !path.is_empty()) {
        Some(path) => Ok(Some(Service::Folder { path: path.into(), read_only, sandbox })),
        None if only_own.is_some() && options.get("socket").is_some() => Err(options.bad_value(
            "socket",
            "possible with ro or sandbox (set them on virtiofsd's command line)",
        )),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Options {
        Options::parse(text).unwrap()
    }

    #[test]
    fn a_tag_has_36_bytes_at_most() {
        let config = |text: &str| config(&parse(text));
        let good = config("fs,tag=home").unwrap();
        assert_eq!((good.len(), &good[..5], good[36]), (40, &b"home\0"[..], 1));
        assert!(config(&format!("fs,tag={}", "x".repeat(36))).is_ok());
        for text in ["fs", "fs,tag=", &format!("fs,tag={}", "x".repeat(37)), "fs,tag=a\nb"] {
            assert!(config(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_folder_is_served_by_a_program_of_its_own() {
        let wanted = |text: &str| service(&parse(text));
        let folder =
            |read_only, sandbox| Service::Folder { path: "/srv".into(), read_only, sandbox };
        assert_eq!(wanted("fs,path=/srv"), Ok(Some(folder(false, Sandbox::Namespace))));
        assert_eq!(
            wanted("fs,path=/srv,ro=on,sandbox=chroot"),
            Ok(Some(folder(true, Sandbox::Chroot)))
        );
        assert_eq!(wanted("fs,socket=/s"), Ok(None));
        for text in ["fs,path=/srv,ro=yes", "fs,path=/srv,sandbox=jail", "fs,socket=/s,ro=on"] {
            assert!(wanted(text).is_err(), "{text}");
        }
    }
}
