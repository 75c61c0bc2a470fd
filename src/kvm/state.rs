//! Saves and restores the registers and the run state of a hart.

use std::io;

use super::regs;
use super::snapshot;
use super::vcpu::Vcpu;
use crate::error::VmError;
use crate::hypervisor::{HartState, Register};

/// `SEIP` in `sip`: an external interrupt is pending.
const SEIP: u64 = 1 << 9;

/// Reads the state of the hart `id`, which is out of the guest.
pub(super) fn save(id: u32, vcpu: &Vcpu) -> io::Result<HartState> {
    Ok(HartState { id, mp_state: vcpu.mp_state()?, registers: registers(vcpu)? })
}

fn registers(vcpu: &Vcpu) -> io::Result<Vec<Register>> {
    let read = |id: u64| match vcpu.value(id) {
        Ok(value) => Ok(Register { id, value }),
        Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", snapshot::name(id)))),
    };
    snapshot::saved(&vcpu.reg_list()?).into_iter().map(read).collect()
}

/// Compares what describes the hart.
///
/// # Errors
/// Names what differs.
pub(super) fn check(state: &HartState, vcpu: &Vcpu) -> Result<(), VmError> {
    let existing = registers(vcpu)
        .map_err(|e| VmError::io(format!("Cannot read the registers of hart {}", state.id), e))?;
    let differences = snapshot::differences(&state.registers, &existing);
    if differences.is_empty() {
        return Ok(());
    }
    Err(VmError::new(format!(
        "Hart {} cannot be restored on this host, since it was saved with other features: {}",
        state.id,
        differences.join(", ")
    )))
}

/// Writes the registers; the run state is set last, by [`start`].
pub(super) fn restore(state: &HartState, vcpu: &Vcpu) -> Result<(), VmError> {
    let has_sstc = vcpu.reg(regs::SSTC).is_ok_and(|on| on == 1);
    for Register { id, value } in snapshot::writes(&state.registers, has_sstc) {
        vcpu.set_value(*id, value).map_err(|e| {
            let name = snapshot::name(*id);
            VmError::io(format!("Cannot restore {name} of hart {}", state.id), e)
        })?;
    }
    Ok(())
}

/// Sets the run state.
pub(super) fn start(state: &HartState, vcpu: &Vcpu) -> Result<(), VmError> {
    vcpu.set_mp_state(state.mp_state)
        .map_err(|e| VmError::io(format!("Cannot set the run state of hart {}", state.id), e))
}

/// True if an external interrupt was pending.
pub(super) fn has_external_interrupt(vcpu: &Vcpu) -> io::Result<bool> {
    Ok(vcpu.reg(regs::SIP)? & SEIP != 0)
}
