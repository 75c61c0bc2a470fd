//! Device nodes that rvmm opens, and advice for one that cannot be opened. The advice differs in a container, where no module can be
//! loaded and no group joined.

use std::env;
use std::fs;
use std::io;
use std::path::Path;

/// A device node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceNode {
    pub(crate) path: &'static str,
    /// The kernel module that provides it.
    pub(crate) module: &'static str,
    /// Command that permits a user to open it, outside of containers.
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
    grant: "sudo chmod 0666 /dev/net/tun; the kernel checks access for each tap",
};
/// The kernel's backend of virtio-net.
pub(crate) const VHOST_NET: DeviceNode = DeviceNode {
    path: "/dev/vhost-net",
    module: "vhost_net",
    grant: "sudo setfacl -m u:$USER:rw /dev/vhost-net",
};
/// The kernel's backend of virtio-vsock.
pub(crate) const VHOST_VSOCK: DeviceNode = DeviceNode {
    path: "/dev/vhost-vsock",
    module: "vhost_vsock",
    grant: "sudo setfacl -m u:$USER:rw /dev/vhost-vsock",
};

/// The environment of a process, which decides how a device node is provided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A machine, real or virtual.
    Machine,
    /// A container: its nodes are those that it was started with.
    Container,
}

impl Place {
    /// The environment of this process.
    pub(crate) fn here() -> Self {
        Self::below(Path::new("/"), |name| env::var_os(name).is_some())
    }

    /// The environment of a process with the root directory `root` and these variables, detected by the marks of container engines.
    pub(crate) fn below(root: &Path, has_variable: impl Fn(&str) -> bool) -> Self {
        // Docker; Podman; systemd-nspawn and every container whose process 1 is systemd.
        const FILES: [&str; 3] = [".dockerenv", "run/.containerenv", "run/systemd/container"];
        // Podman, LXC and systemd-nspawn; Kubernetes.
        const VARIABLES: [&str; 2] = ["container", "KUBERNETES_SERVICE_HOST"];
        // Process 1 has the variable `container`, also if a user's shell has lost it.
        let first = fs::read(root.join("proc/1/environ")).unwrap_or_default();
        let is_marked = first.split(|byte| *byte == 0).any(|word| word.starts_with(b"container="));
        let is_container = is_marked
            || FILES.iter().any(|file| root.join(file).exists())
            || VARIABLES.iter().any(|name| has_variable(name));
        if is_container { Self::Container } else { Self::Machine }
    }
}

impl DeviceNode {
    /// Advice for a node that does not exist, or has no driver.
    pub(crate) fn remedy_for_absence(self, place: Place) -> String {
        let Self { path, module, .. } = self;
        match place {
            Place::Machine => format!("sudo modprobe {module}"),
            Place::Container => format!(
                "this is a container: start it with --device {path}, and load the module {module} on the host if the node is missing there"
            ),
        }
    }

    /// Advice for a user who may not open the node.
    pub(crate) fn remedy_for_denial(self, place: Place) -> String {
        let Self { path, grant, .. } = self;
        match place {
            Place::Machine => grant.to_owned(),
            Place::Container => format!(
                "this is a container: start it with --device {path}, and if rvmm does not run as root, with --group-add and the node's group on the host"
            ),
        }
    }

    /// Advice for a node whose opening failed with `error`, if there is some.
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
    fn a_container_is_detected_by_the_marks_of_its_engine() {
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
    fn advice_in_a_container_is_to_start_it_otherwise() {
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
