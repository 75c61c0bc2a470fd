//! Saving, restoring and resetting a VM, and its dirty log.

use std::io;
use std::sync::Arc;

use super::vm::{KvmVm, Member, Members};
use super::{regs, renew, snapshot, state};
use crate::error::VmError;
use crate::hypervisor::{HartState, IrqchipState, SourceState, VmLifecycle, VmState};

impl VmLifecycle for KvmVm {
    fn save(&self) -> io::Result<VmState> {
        let members = self.members();
        let time = members.first_vcpu().map_err(io::Error::other)?.reg(regs::TIME)?;
        let save = |member: &Member| state::save(member.id, &member.vcpu);
        let harts = members.harts.iter().map(save).collect::<io::Result<_>>()?;
        let irqchip = members.aia.as_ref().map(|aia| {
            let lines = self.lines();
            aia.save(&self.kvm, &ids(&members), |source| lines.is_high(source))
        });
        Ok(VmState { time, harts, irqchip: irqchip.transpose().map_err(io::Error::other)? })
    }

    fn starting(&self) -> io::Result<Vec<u32>> {
        let members = self.members();
        let mut starting = Vec::new();
        // A single hart is the boot hart, which nobody starts.
        for member in members.harts.iter().filter(|_| members.harts.len() > 1) {
            if state::is_starting(&member.vcpu)? {
                starting.push(member.id);
            }
        }
        Ok(starting)
    }

    fn restore(&self, state: &VmState) -> Result<Vec<u32>, VmError> {
        let members = self.members();
        self.check(&members, state)?;
        let harts = || members.harts.iter().zip(&state.harts);
        for (member, hart) in harts() {
            state::restore(hart, &member.vcpu)?;
        }
        // Once, since it is the VM's.
        let set_time = members.first_vcpu()?.set_reg(regs::TIME, state.time);
        set_time.map_err(|e| VmError::io("Cannot restore the time of the guest", e))?;
        match (&members.aia, &state.irqchip) {
            (Some(_), Some(irqchip)) => self.restore_irqchip(&members, irqchip)?,
            _ => self.drive_external(&members)?,
        }
        let mut interrupted = Vec::new();
        for (member, hart) in harts() {
            state::start(hart, &member.vcpu)?;
            if snapshot::has_software_interrupt(&hart.registers) {
                interrupted.push(hart.id);
            }
        }
        Ok(interrupted)
    }

    fn reset(&self) -> Result<(), VmError> {
        let mut members = self.members();
        // The vCPUs are held by the lines and by harts that still exist.
        self.lines().disconnect();
        if let Some(hart) = members.harts.iter().find(|hart| Arc::strong_count(&hart.vcpu) > 1) {
            return Err(VmError::new(format!("Hart {} is still in use", hart.id)));
        }
        *members = Members::default();
        let renew = || -> io::Result<()> {
            let mut slots = self.slots();
            let settings = self.settings();
            slots.keep_logs(&self.fd)?;
            renew::replace(&self.kvm, &self.fd)?;
            settings.narrow_again(&self.fd)?;
            slots.map_again(&self.fd)?;
            settings.register_again(&self.fd)
        };
        renew().map_err(|e| VmError::io("Cannot reset the virtual machine", e))
    }

    fn log_dirty(&self, slot: u32, on: bool) -> Result<(), VmError> {
        let switched = self.slots().log_dirty(&self.fd, slot, on);
        let name = if on { "on" } else { "off" };
        switched.map_err(|e| {
            VmError::io(format!("Cannot switch the log of memory slot {slot} {name}"), e)
        })
    }

    fn dirty_pages(&self, slot: u32) -> io::Result<Vec<u64>> {
        self.slots().dirty_pages(&self.fd, slot)
    }
}

impl KvmVm {
    /// Compares a saved state with this VM, without changing anything.
    fn check(&self, members: &Members, state: &VmState) -> Result<(), VmError> {
        let ids = ids(members);
        let saved: Vec<u32> = state.harts.iter().map(|hart| hart.id).collect();
        if saved != ids || ids.is_empty() {
            return Err(VmError::new(format!(
                "The machine was saved with the harts {saved:?}, and this one has {ids:?}"
            )));
        }
        match (&members.aia, &state.irqchip) {
            (Some(aia), Some(irqchip)) => aia.check(&self.kvm, irqchip, &ids)?,
            (None, None) => {}
            (Some(_), None) => {
                return Err(VmError::new(
                    "The machine was saved with a PLIC, and this one has an AIA",
                ));
            }
            (None, Some(_)) => {
                return Err(VmError::new(
                    "The machine was saved with an AIA, and this one has a PLIC",
                ));
            }
        }
        let pairs = members.harts.iter().zip(&state.harts);
        pairs
            .into_iter()
            .try_for_each(|(member, hart): (&Member, &HartState)| state::check(hart, &member.vcpu))
    }

    fn restore_irqchip(&self, members: &Members, state: &IrqchipState) -> Result<(), VmError> {
        let Some(aia) = &members.aia else { return Ok(()) };
        let is_high = |number: u32| {
            let named = |source: &&SourceState| source.number == number;
            state.aplic.sources.iter().find(named).is_some_and(|source| source.high)
        };
        let levels = (1..=aia.facts.sources).map(|number| (number, is_high(number)));
        self.lines()
            .force_levels(&self.fd, levels, members.may_share_lines())
            .map_err(|e| VmError::io("Cannot restore the levels of interrupt lines", e))?;
        aia.restore(state)
    }

    /// Drives the external interrupts that `sip` has, since a hart that waits is woken only by the line.
    fn drive_external(&self, members: &Members) -> Result<(), VmError> {
        for Member { id, vcpu, .. } in &members.harts {
            let drive = state::has_external_interrupt(vcpu)
                .and_then(|high| self.lines().external(vcpu, *id).force(high));
            drive.map_err(|e| {
                VmError::io(format!("Cannot restore the external interrupt of hart {id}"), e)
            })?;
        }
        Ok(())
    }
}

fn ids(members: &Members) -> Vec<u32> {
    members.harts.iter().map(|member| member.id).collect()
}
