//! CSR accesses that KVM leaves to user space: `seed`, and on some hosts the AIA's indirect CSRs of a guest without an AIA.

use log::warn;
use rustix::rand::{GetRandomFlags, getrandom};

use super::context::{MachineContext, Notice};
use super::exit::CsrAccess;
use crate::riscv::csr;

/// State ES16 of `seed` (Unprivileged specification, Zkr: two bits of state at the top, 16 bits of entropy at the bottom): the entropy is valid.
const ES16: u64 = 0x8000_0000;
/// State WAIT: no entropy yet, poll again.
const WAIT: u64 = 0x4000_0000;

/// Handles an access. An unknown register reads as zero and ignores writes: the kernel has already decided that
/// the access is legal.
#[cold]
pub(super) fn handle(access: &mut CsrAccess<'_>, context: &MachineContext) {
    *access.ret = match u16::try_from(access.csr) {
        Ok(csr::SEED) => seed(),
        _ => {
            let csr = access.csr;
            if context.is_first(Notice::UnknownCsr) {
                warn!(
                    "The guest uses CSR {csr:#x}, which this machine does not have: it reads as zero"
                );
            }
            0
        }
    };
}

/// Reads `seed`. Writes to it have no effect.
fn seed() -> u64 {
    let mut entropy = [0; 2];
    match getrandom(&mut entropy[..], GetRandomFlags::NONBLOCK) {
        Ok(2) => ES16 | u64::from(u16::from_le_bytes(entropy)),
        _ => WAIT,
    }
}
