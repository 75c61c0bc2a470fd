//! Saves and restores the registers and the run state of a hart.

use std::io;

use super::regs;
use super::snapshot;
use super::vcpu::Vcpu;
use crate::error::VmError;
use crate::hypervisor::{HartState, MpState, Register};
use crate::riscv::sbi::{eid, fid};

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

/// True if the guest has started the hart (SBI HSM), and it has not begun: KVM shows it as runnable, with the registers that it had
/// before. A hart that was never started has none; one that was stopped is behind its call of `sbi_hart_stop`, which only returns with an
/// error.
pub(super) fn is_starting(vcpu: &Vcpu) -> io::Result<bool> {
    let register = |number| vcpu.reg(regs::core(number));
    if vcpu.mp_state()? != MpState::Runnable {
        return Ok(false);
    }
    let [extension, function, error] = [register(17)?, register(16)?, register(10)?];
    let has_stopped = (extension, function, error) == (eid::HSM, fid::HART_STOP, 0);
    Ok(has_stopped || vcpu.reg(regs::PC)? == 0)
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
