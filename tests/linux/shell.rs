//! Debian with a shell as process 1.

use crate::harness::{Launch, Session, debian};

/// Boots Debian's disk, which it only reads, up to the shell, with these modules.
pub(crate) fn boot(machine: Launch, modules: &str) -> Session {
    let debian = debian();
    let session = machine
        .args(&["--cmdline", "console=ttyS0 quiet root=/dev/vda1 init=/bin/sh"])
        .path("--initrd=", &debian.initrd, "")
        .kernel(&debian.kernel)
        .start();
    set_up(session, modules)
}

/// Waits for the shell, also after a reboot, and loads these modules.
pub(crate) fn set_up(mut session: Session, modules: &str) -> Session {
    // Only a new shell prints this.
    session.expect("job control turned off");
    session.expect("# ");
    session.ask(&format!(
        "export PATH=/usr/sbin:/usr/bin:/sbin:/bin; mount -t tmpfs tmp /tmp; modprobe -a {modules}; dmesg -n 1"
    ));
    session
}
