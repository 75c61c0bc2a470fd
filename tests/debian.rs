//! Ring 3: a Debian that nobody here wrote, from its disk, by its own firmware, boot menu and init.
//!
//! The disk is `scripts/debian`'s. Guests only read it and keep what they change in their memory.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;

use harness::{debian, one_host, rvmm};

/// A machine with Debian's disk as its first.
fn machine(irqchip: &str) -> harness::Launch {
    let disk = debian().disk;
    rvmm(&["--mem", "512M", "--irqchip", irqchip]).path("--disk=", &disk, ",ro=on")
}

#[test]
fn debians_u_boot_reaches_its_prompt_and_starts_debian_by_its_menu() {
    let Some(host) = one_host("plic") else { return };
    for irqchip in host.usual_irqchip() {
        let mut session = machine(irqchip).kernel(&debian().firmware).start();
        // It waits for two seconds, which a busy host may miss: a key that has come before counts, too.
        session.expect("Net:");
        session.send("\n");
        session.expect("Hit any key to stop autoboot");
        session.send("\n");
        session.expect("=> ");
        session.send("virtio scan; virtio info; echo do''ne\n");
        let devices = session.expect("done\r\n");
        assert!(devices.contains("VirtIO Block Device"), "{devices}");
        session.send("boot\n");
        session.expect("Found /boot/extlinux/extlinux.conf");
        session.expect("1:\tDebian GNU/Linux 13 (trixie)");
        session.expect("Enter choice: ");
        session.send("1\n");
        session.expect("login: ");
        session.send("root\n");
        session.expect("Password: ");
        session.send("rvmm\n");
        session.expect(":~#");
        assert_eq!(session.ask("systemd-detect-virt"), "kvm\n");
        let checked = session.ask("rvmm-check");
        assert!(checked.ends_with("check: passed\n"), "{checked}");
        session.send("systemctl poweroff\n");
        assert_eq!(session.exit_code(), 0);
    }
}
