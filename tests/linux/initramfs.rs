//! An initramfs as a user would create one: busybox, a script, and busybox's cpio to pack it.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::{busybox, modules};

/// Process 1 of the guest. With `flood` on the kernel's command line it sends the file `/data` before the shell starts.
const INIT: &str = r#"#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order 2>/dev/null); do insmod /modules/$module; done
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo own initramfs is up
if grep -q flood /proc/cmdline; then
    stty -opost
    echo begin
    cat /data
    echo end
    stty opost
fi
exec setsid -c sh
"#;

/// Creates an initramfs in `folder`, with these additional files, that loads these kernel modules (by file name without
/// `.ko.xz`) and their dependencies at the start.
pub(crate) fn build(folder: &Path, files: &[(&str, &[u8])], wanted: &[&str]) -> PathBuf {
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("modules")).expect("a folder");
    unpack_modules(&tree.join("modules"), wanted);
    for name in ["bin", "proc", "sys", "dev"] {
        fs::create_dir_all(tree.join(name)).expect("a folder");
    }
    fs::copy(busybox(), tree.join("bin/busybox")).expect("busybox");
    symlink("busybox", tree.join("bin/sh")).expect("a link");
    fs::write(tree.join("init"), INIT).expect("a file");
    fs::set_permissions(tree.join("init"), Permissions::from_mode(0o755)).expect("an executable");
    for (name, bytes) in files {
        fs::write(tree.join(name), bytes).expect("a file");
    }
    let archive = folder.join("initramfs.cpio");
    let packed = Command::new(busybox())
        .args(["sh", "-c", "find . | cpio -o -H newc"])
        .current_dir(&tree)
        .stdout(File::create(&archive).expect("a file"))
        .stderr(Stdio::null())
        .status();
    assert!(packed.expect("busybox starts").success(), "cpio failed");
    archive
}

/// Copies modules and their dependencies into a folder, with a list `order` in loading order.
fn unpack_modules(folder: &Path, wanted: &[&str]) {
    if wanted.is_empty() {
        return;
    }
    let from = modules();
    let dependencies = fs::read_to_string(from.join("modules.dep")).expect("modules.dep");
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let end = format!("/{name}.ko.xz");
        let line = dependencies
            .lines()
            .find(|line| line.split_once(':').is_some_and(|(module, _)| module.ends_with(&end)));
        let (module, needs) = line
            .and_then(|line| line.split_once(':'))
            .unwrap_or_else(|| panic!("there is no module {name} in {}", from.display()));
        // The last dependency is loaded first.
        for path in needs.split_whitespace().rev().chain([module]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    let mut list = String::new();
    for path in order {
        let name = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".xz");
        let unpacked = Command::new(busybox())
            .arg("xzcat")
            .arg(from.join(path))
            .output()
            .expect("busybox starts");
        assert!(unpacked.status.success(), "xzcat {path} failed");
        fs::write(folder.join(name), unpacked.stdout).expect("a file");
        list.push_str(name);
        list.push('\n');
    }
    fs::write(folder.join("order"), list).expect("a file");
}
