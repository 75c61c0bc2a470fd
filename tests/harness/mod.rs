//! A harness for the rvmm binary: starts it, writes its input, reads its output, and stops it.
//!
//! Nothing here depends on the speed of the machine: a wait ends with the expected event, when that has become impossible,
//! or after [`LIMIT`], which means a hang. When a test fails, the transcript is printed.

#![allow(dead_code, unused_imports, reason = "each test crate uses its part of this module")]

mod disk;
mod host;
mod launch;
mod screen;
mod session;

pub(crate) use disk::{blank_fat, blank_image};
pub(crate) use host::{
    Debian, Host, busybox, by_length, debian, foreign, guest, host, kernel, modules, one_host,
};
pub(crate) use launch::Launch;
pub(crate) use rvmm_devices::testing::{leave_out, skip};
pub(crate) use session::Session;

use std::fs;
use std::path::Path;
use std::time::Duration;

/// Time-out after which anything counts as hanging.
pub(crate) const LIMIT: Duration = Duration::from_secs(900);
/// Time-out for a machine to stop: it takes two seconds, but the host may be emulated and busy.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(60);

/// The rvmm binary with these arguments, not yet started.
pub(crate) fn rvmm(arguments: &[&str]) -> Launch {
    Launch::new(env!("CARGO_BIN_EXE_rvmm")).args(arguments)
}

/// True when a program listens on the Unix socket of this path. The file alone is not sufficient: it exists a moment earlier.
pub(crate) fn is_listening(path: &Path) -> bool {
    // Address, references, protocol, flags, type, state, inode, path; the flag is __SO_ACCEPTCON.
    const LISTENS: &str = "00010000";
    let path = path.to_str().expect("a path in UTF-8");
    let sockets = fs::read_to_string("/proc/net/unix").expect("the kernel's list of sockets");
    sockets.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words.nth(3) == Some(LISTENS) && words.nth(3) == Some(path)
    })
}

/// The checksum that the guests use: FNV-1a, 64 bits.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The first `count` bytes that the guest `flood` sends.
pub(crate) fn flood(count: usize) -> Vec<u8> {
    let mut state: u64 = 1;
    let letter = |at: usize| {
        if at % 64 == 63 {
            return b'\n';
        }
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        b'a' + state.to_be_bytes()[0] / 16
    };
    (0..count).map(letter).collect()
}
