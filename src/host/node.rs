//! Device nodes that rvmm opens, and what to do where one cannot be opened. In a container that is something else than on a machine of
//! its own: no module can be loaded there, and no group joined.

use std::env;
use std::fs;
use std::io;
use std::path::Path;

/// A device node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceNode {
    /// Where it lies.
    pub(crate) path: &'static str,
    /// The kernel's module that makes it.
    pub(crate) module: &'static str,
    /// How a user gets the right to open it, outside of containers.
    pub(crate) grant: &'static str,
}

/// KVM.
pub(crate) const KVM: DeviceNode = DeviceNode {
    path: "/dev/kvm",
    module: "kvm",
    grant: "sudo usermod -aG kvm $USER, then log in again",
};
/// Tap interfaces.
pub(crate) const TUN: DeviceNode = DeviceNode {
    path: "/dev/net/tun",
    module: "tun",
    grant: "sudo chmod 0666 /dev/net/tun; what each user may do is checked per tap",
};
/// Networks in the kernel.
pub(crate) const VHOST_NET: DeviceNode = DeviceNode {
    path: "/dev/vhost-net",
    module: "vhost_net",
    grant: "sudo setfacl -m u:$USER:rw /dev/vhost-net",
};
/// Sockets in the kernel.
pub(crate) const VHOST_VSOCK: DeviceNode = DeviceNode {
    path: "/dev/vhost-vsock",
    module: "vhost_vsock",
    grant: "sudo setfacl -m u:$USER:rw /dev/vhost-vsock",
};

/// Where a process runs, as far as that matters to who can make a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// On a machine, real or virtual.
    Machine,
    /// In a container: its nodes are those that it was started with.
    Container,
}

impl Place {
    /// Where this process runs.
    pub(crate) fn here() -> Self {
        Self::below(Path::new("/"), |name| env::var_os(name).is_some())
    }

    /// Where a process runs that sees the files below `root` and has these variables: what container engines leave for their guests to find.
    pub(crate) fn below(root: &Path, has_variable: impl Fn(&str) -> bool) -> Self {
        // Docker; Podman; systemd-nspawn and all whose process 1 is systemd.
        const FILES: [&str; 3] = [".dockerenv", "run/.containerenv", "run/systemd/container"];
        // Podman, LXC and systemd-nspawn; Kubernetes.
        const VARIABLES: [&str; 2] = ["container", "KUBERNETES_SERVICE_HOST"];
        // Of those, process 1 has the first, also where a user's shell has lost it.
        let first = fs::read(root.join("proc/1/environ")).unwrap_or_default();
        let is_marked = first.split(|byte| *byte == 0).any(|word| word.starts_with(b"container="));
        let is_container = is_marked
            || FILES.iter().any(|file| root.join(file).exists())
            || VARIABLES.iter().any(|name| has_variable(name));
        if is_container { Self::Container } else { Self::Machine }
    }
}

impl DeviceNode {
    /// What to do where the node is not there, or nothing is behind it.
    pub(crate) fn remedy_for_absence(self, place: Place) -> String {
        let Self { path, module, .. } = self;
        match place {
            Place::Machine => format!("sudo modprobe {module}"),
            Place::Container => format!(
                "this is a container: start it with --device {path}, and load the module {module} on its host where that has none"
            ),
        }
    }

    /// What to do where this user may not open the node.
    pub(crate) fn remedy_for_denial(self, place: Place) -> String {
        let Self { path, grant, .. } = self;
        match place {
            Place::Machine => grant.to_owned(),
            Place::Container => format!(
                "this is a container: start it with --device {path}, and for another user than root with --group-add and the group that the node has on the host"
            ),
        }
    }

    /// What to do where opening it failed with `error`, if that is known.
    pub(crate) fn remedy(self, error: &io::Error, place: Place) -> Option<String> {
        match error.raw_os_error()? {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => Some(self.remedy_for_absence(place)),
            libc::EACCES | libc::EPERM => Some(self.remedy_for_denial(place)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn with(path: &str, text: &str) -> TempDir {
        let root = TempDir::new().unwrap();
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        root
    }

    #[test]
    fn a_container_is_known_by_what_its_engine_leaves_in_it() {
        let place =
            |root: &TempDir, variable: &str| Place::below(root.path(), |name| name == variable);
        let bare = with("proc/1/environ", "HOME=/\0TERM=linux\0no_container=x\0");
        assert_eq!(place(&bare, ""), Place::Machine);
        assert_eq!(place(&TempDir::new().unwrap(), "HOME"), Place::Machine);
        assert_eq!(place(&bare, "container"), Place::Container);
        assert_eq!(place(&bare, "KUBERNETES_SERVICE_HOST"), Place::Container);
        for (path, text) in [
            (".dockerenv", ""),
            ("run/.containerenv", "engine=\"podman-5.4\"\n"),
            ("run/systemd/container", "systemd-nspawn\n"),
            ("proc/1/environ", "PATH=/bin\0container=lxc\0"),
        ] {
            assert_eq!(place(&with(path, text), ""), Place::Container, "{path}");
        }
    }

    #[test]
    fn in_a_container_nobody_is_told_to_load_modules_or_join_groups_there() {
        for node in [KVM, TUN, VHOST_NET, VHOST_VSOCK] {
            for errno in [libc::ENOENT, libc::ENODEV, libc::EACCES, libc::EPERM] {
                let error = io::Error::from_raw_os_error(errno);
                let inside = node.remedy(&error, Place::Container).unwrap();
                assert!(inside.contains(&format!("--device {}", node.path)), "{inside}");
                assert!(!inside.contains("sudo"), "{inside}");
                let outside = node.remedy(&error, Place::Machine).unwrap();
                assert!(outside.contains("sudo") && !outside.contains("--device"), "{outside}");
            }
            assert_eq!(
                node.remedy(&io::Error::from_raw_os_error(libc::EMFILE), Place::Machine),
                None
            );
        }
    }
}
