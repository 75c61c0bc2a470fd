//! Ring 3: Debian's own drivers against rvmm's virtio devices, with every interrupt controller that the host can give.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a panic is how a test fails"
)]

mod harness;
#[path = "linux/initramfs.rs"]
mod initramfs;

use harness::{Session, host, kernel, rvmm};

/// Boots Debian's kernel with these modules loaded and these arguments, up to its shell.
fn boot(irqchip: &str, modules: &[&str], arguments: &[&str]) -> (Session, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let initrd = initramfs::build(folder.path(), &[], modules);
    let session = rvmm(&["--mem", "256M", "--irqchip", irqchip])
        .args(&["--cmdline", "console=ttyS0 quiet"])
        .args(arguments)
        .path("--initrd=", &initrd, "")
        .kernel(&kernel())
        .start();
    session.expect("own initramfs is up\r\n");
    (session, folder)
}

fn power_off(mut session: Session) {
    session.send("poweroff -f\n");
    assert_eq!(session.exit_code(), 0);
}

#[test]
fn debians_driver_draws_random_numbers_through_both_controllers() {
    let Some(host) = host() else { return };
    for irqchip in &host.irqchips {
        let (mut session, _folder) =
            boot(irqchip, &["virtio_mmio", "virtio-rng"], &["--device", "rng"]);
        let current = session.ask("cat /sys/class/misc/hw_random/rng_current");
        assert_eq!(current, "virtio_rng.0\n");
        let counts = session.ask("dd if=/dev/hwrng bs=4096 count=16 2>/dev/null | wc -c");
        assert_eq!(counts.trim(), "65536");
        let interrupts = session.ask("grep virtio /proc/interrupts");
        let taken =
            interrupts.split_whitespace().nth(1).and_then(|count| count.parse::<u32>().ok());
        assert!(taken.is_some_and(|count| count > 0), "{interrupts}");
        power_off(session);
    }
}
