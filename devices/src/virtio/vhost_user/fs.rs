//! A folder of the host (virtio 1.3, section 5.11), served by virtiofsd: one that rvmm starts, or one that listens on a socket.
//!
//! There is one queue for requests, since virtiofsd has no more, and no DAX window.

use super::front::Front;
use super::peer::Peer;
use super::{PeerKind, Sandbox, Service};
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::text::{Textual, text};
use crate::config::{FilePath, ModelConfig, Slot};
use crate::options::OptionError;

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
};

/// Bytes of a tag, padded with zeroes.
const TAG: usize = 36;

/// The mount tag of a shared folder: 1 to 36 bytes without control characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountTag(String);

impl MountTag {
    /// `None` for an invalid tag.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        Self::textual(text)
    }

    /// The configuration space: the tag, and one request queue.
    fn space(&self) -> Vec<u8> {
        let mut space = self.0.as_bytes().to_vec();
        space.resize(TAG, 0);
        space.extend(1_u32.to_le_bytes());
        space
    }
}

impl Textual for MountTag {
    const EXPECTED: &'static str = "a name of 1 to 36 bytes without control characters";

    fn textual(text: &str) -> Option<Self> {
        let is_good = (1..=TAG).contains(&text.len()) && !text.chars().any(char::is_control);
        is_good.then(|| Self(text.into()))
    }
}

impl fmt::Display for MountTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

text!(MountTag, "^[^\\u0000-\\u001f\\u007f-\\u009f]{1,36}$");

/// The configuration of a shared folder: `path`, or `socket`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Mount tag in the guest.
    pub tag: MountTag,
    /// The folder, for a virtiofsd that rvmm starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<FilePath>,
    /// The folder is read-only.
    #[serde(default)]
    pub ro: bool,
    /// The way virtiofsd is confined to the folder; `None` for a namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<Sandbox>,
    /// The socket of a virtiofsd that runs already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<FilePath>,
    /// The slot on the board; `None` for the first free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

/// The program behind a shared folder.
#[derive(Debug, PartialEq, Eq)]
enum Server<'a> {
    Started(Service),
    At(&'a FilePath),
}

impl FsConfig {
    /// A folder that a virtiofsd of its own shares, with the defaults.
    pub fn new(tag: MountTag, path: impl Into<FilePath>) -> Self {
        Self { tag, path: Some(path.into()), ro: false, sandbox: None, socket: None, slot: None }
    }

    fn server(&self) -> Result<Server<'_>, OptionError> {
        match (&self.path, &self.socket) {
            (Some(path), None) => Ok(Server::Started(Service::Folder {
                path: path.clone().into(),
                read_only: self.ro,
                sandbox: self.sandbox.unwrap_or_default(),
            })),
            (None, Some(socket)) if self.ro || self.sandbox.is_some() => {
                Err(OptionError::bad_value(
                    "socket",
                    socket.display(),
                    "possible with ro or sandbox (set them on virtiofsd's command line)",
                ))
            }
            (None, Some(socket)) => Ok(Server::At(socket)),
            (path, _) => {
                let path = path.as_ref().map(|path| path.display().to_string());
                let expected =
                    "given (write path=FOLDER, or socket=PATH without path, ro and sandbox)";
                Err(OptionError::bad_value("path", path.unwrap_or_default(), expected))
            }
        }
    }
}

impl ModelConfig for FsConfig {
    fn paths(&mut self) -> Vec<&mut FilePath> {
        self.path.iter_mut().chain(&mut self.socket).collect()
    }

    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn check(&self) -> Result<(), OptionError> {
        self.server().map(|_| ())
    }

    fn build(&self, wiring: Wiring) -> Built {
        let host = wiring.host.as_ref();
        let server =
            self.server().map_err(|source| BuildError::Option { model: MODEL.name, source })?;
        let peer = match server {
            Server::Started(service) => Peer::start(host, &service),
            Server::At(socket) => Peer::connect(host, socket.clone().into(), 0),
        };
        let peer = peer.map_err(|source| BuildError::Backend { model: MODEL.name, source })?;
        let kind = PeerKind {
            model: MODEL.name,
            id: 26,
            features: 0,
            own: 0,
            // The high-priority queue, and the request queue.
            sizes: vec![256, 1024],
            remote: 2,
            config: self.tag.space(),
            asked: 0,
            adapt: |_, _| {},
        };
        Ok(Device::Virtio(Box::new(Front::create(kind, peer, &wiring)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DeviceConfig;

    #[test]
    fn a_tag_has_36_bytes_at_most() {
        let good = MountTag::new("home").unwrap().space();
        assert_eq!((good.len(), &good[..5], good[36]), (40, &b"home\0"[..], 1));
        assert!(MountTag::new(&"x".repeat(36)).is_some());
        for text in ["", &"x".repeat(37), "a\nb"] {
            assert_eq!(MountTag::new(text), None, "{text}");
        }
    }

    #[test]
    fn a_folder_is_served_by_a_program_of_its_own() {
        let config = |text: &str| match DeviceConfig::parse(format!("fs,tag=t,{text}")) {
            Ok(DeviceConfig::Fs(config)) => Some(config),
            _ => None,
        };
        let folder = |read_only, sandbox| {
            Server::Started(Service::Folder { path: "/srv".into(), read_only, sandbox })
        };
        let default = config("path=/srv").unwrap();
        assert_eq!(default.server(), Ok(folder(false, Sandbox::Namespace)));
        let chroot = config("path=/srv,ro=on,sandbox=chroot").unwrap();
        assert_eq!(chroot.server(), Ok(folder(true, Sandbox::Chroot)));
        assert_eq!(config("socket=/s").unwrap().server(), Ok(Server::At(&"/s".into())));
        for text in [
            "path=/srv,ro=yes",
            "path=/srv,sandbox=jail",
            "socket=/s,ro=on",
            "path=/srv,socket=/s",
            "ro=on",
        ] {
            assert!(config(text).is_none(), "{text}");
        }
    }
}
