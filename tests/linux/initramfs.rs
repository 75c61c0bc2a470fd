//! An initramfs as a user would make one: busybox, a script, and busybox's own cpio to pack it.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::busybox;

/// Process 1 of the guest. With `flood` on the kernel's command line it sends the file `/data` before the shell starts.
const INIT: &str = r#"#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
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

/// Makes an initramfs in `folder`, with these files beside the usual ones.
pub(crate) fn build(folder: &Path, files: &[(&str, &[u8])]) -> PathBuf {
    let tree = folder.join("tree");
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
