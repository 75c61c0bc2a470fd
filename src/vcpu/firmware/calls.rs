//! SBI calls that exit as breakpoints. The console and the shutdown are handled here; the others are forwarded to the kernel: the
//! hart makes the call from the shim's page with the registers that it needs, and the registers are restored.
//!
//! Source: SBI specification 3.0, chapter 5 (the calls of version 0.1, numbers 0 to 8) and chapters 6 to 8, which define the same
//! services under other numbers.

use std::io;

use super::{BreakpointOutcome, Firmware, shim};
use crate::riscv::register::{A0, A1, A6, A7};
use crate::riscv::sbi::error::{INVALID_ADDRESS, SUCCESS};
use crate::riscv::sbi::{eid, fid, v01};
use crate::riscv::trap::SUPERVISOR;
use crate::vcpu::context::MachineContext;
use crate::vcpu::dispatch::Flow;
use crate::vcpu::exit::SbiCall;
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::sbi;
use crate::vcpu::stop::StopReason;
use crate::vcpu::trap;
use crate::vcpu::walk::translate;

/// The state with which a hart continues after a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Return {
    pc: u64,
    mode: u64,
    sstatus: u64,
}

impl Return {
    /// At `pc`, in the hart's current mode.
    fn from_here(hart: &dyn Hart, pc: u64) -> io::Result<Self> {
        Ok(Self { pc, mode: hart.get(Reg::Mode)?, sstatus: hart.get(Reg::Csr(Csr::Sstatus))? })
    }

    /// At `pc`, in the mode before the hart's last trap, as with `sret`.
    pub(super) fn from_trap(hart: &dyn Hart, pc: u64) -> io::Result<Self> {
        let (mode, sstatus) = trap::after_return(hart.get(Reg::Csr(Csr::Sstatus))?);
        Ok(Self { pc, mode, sstatus })
    }

    pub(super) fn take(self, hart: &mut dyn Hart) -> io::Result<()> {
        hart.set(Reg::Csr(Csr::Sstatus), self.sstatus)?;
        hart.set(Reg::Mode, self.mode)?;
        hart.set(Reg::Pc, self.pc)
    }
}

/// A call to the kernel from the shim's page.
#[derive(Debug)]
pub(super) struct ShimCall {
    back: Return,
    satp: u64,
    /// a0 to a7 before the call.
    args: [u64; 8],
    /// A call of version 0.1, which returns its result in a0 alone.
    is_v01: bool,
}

impl Firmware {
    /// Handles the call that the hart's registers describe; the hart continues at `next`.
    pub(super) fn call(
        &self,
        hart: &mut dyn Hart,
        context: &MachineContext,
        next: u64,
    ) -> io::Result<BreakpointOutcome> {
        let back = Return::from_here(hart, next)?;
        self.call_from(hart, context, back)
    }

    /// The same, for a hart that continues at `back`.
    pub(super) fn call_from(
        &self,
        hart: &mut dyn Hart,
        context: &MachineContext,
        back: Return,
    ) -> io::Result<BreakpointOutcome> {
        let mut args = [0; 8];
        for (arg, number) in args.iter_mut().zip(A0..) {
            *arg = hart.get(Reg::X(number))?;
        }
        let [a0, a1, a2, a3, a4, a5, function, extension] = args;
        let shim_call = ShimCall { back, satp: hart.get(Reg::Csr(Csr::Satp))?, args, is_v01: true };
        let timer = self.timer.as_ref().filter(|_| {
            matches!((extension, function), (v01::SET_TIMER, _) | (eid::TIME, fid::SET_TIMER))
        });
        if let Some(timer) = timer {
            if !timer.set(hart, a0)? {
                // Only the guest can clear the pending interrupt, by a call that sets the kernel's timer to never.
                let shim_call = ShimCall { is_v01: extension == v01::SET_TIMER, ..shim_call };
                return self.send(
                    hart,
                    shim_call,
                    (shim::KERNEL_CALL, eid::TIME, fid::SET_TIMER),
                    [u64::MAX, 0, 0, 0],
                );
            }
            hart.set(Reg::X(A0), SUCCESS)?;
            if extension == eid::TIME {
                hart.set(Reg::X(A1), 0)?;
            }
            return resume_at(hart, back);
        }
        let v01_call = |a7, a6, now: [u64; 4]| (a7, a6, now, true);
        let (a7, a6, now, is_v01) = match extension {
            v01::PUTCHAR | v01::GETCHAR => return console_call(hart, context, back, &args),
            v01::SHUTDOWN => return Ok(BreakpointOutcome::Stop(StopReason::PowerOff)),
            v01::CLEAR_IPI => {
                return self.send(hart, shim_call, (shim::CLEAR_IPI, 0, 0), [SUCCESS, a1, a2, a3]);
            }
            v01::SET_TIMER => v01_call(eid::TIME, fid::SET_TIMER, [a0, a1, a2, a3]),
            v01::SEND_IPI..=v01::SFENCE_VMA_ASID => {
                let Some((mask, base)) = harts(hart, context, a0)? else {
                    hart.set(Reg::X(A0), INVALID_ADDRESS)?;
                    return resume_at(hart, back);
                };
                match extension {
                    v01::SEND_IPI => v01_call(eid::IPI, fid::SEND_IPI, [mask, base, 0, 0]),
                    v01::FENCE_I => v01_call(eid::RFENCE, fid::FENCE_I, [mask, base, 0, 0]),
                    v01::SFENCE_VMA => v01_call(eid::RFENCE, fid::SFENCE_VMA, [mask, base, a1, a2]),
                    _ => {
                        hart.set(Reg::X(A0 + 4), a3)?;
                        v01_call(eid::RFENCE, fid::SFENCE_VMA_ASID, [mask, base, a1, a2])
                    }
                }
            }
            _ => (extension, function, [a0, a1, a2, a3], false),
        };
        if !is_v01 {
            hart.set(Reg::X(A0 + 4), a4)?;
            hart.set(Reg::X(A0 + 5), a5)?;
        }
        self.send(hart, ShimCall { is_v01, ..shim_call }, (shim::KERNEL_CALL, a7, a6), now)
    }

    /// Redirects the hart to an instruction of the shim, without translation and with its interrupts disabled.
    fn send(
        &self,
        hart: &mut dyn Hart,
        shim_call: ShimCall,
        (to, a7, a6): (u64, u64, u64),
        now: [u64; 4],
    ) -> io::Result<BreakpointOutcome> {
        for (value, number) in now.into_iter().zip(A0..) {
            hart.set(Reg::X(number), value)?;
        }
        hart.set(Reg::X(A7), a7)?;
        hart.set(Reg::X(A6), a6)?;
        hart.set(Reg::Csr(Csr::Sstatus), trap::without_interrupts(shim_call.back.sstatus))?;
        hart.set(Reg::Csr(Csr::Satp), 0)?;
        hart.set(Reg::Mode, SUPERVISOR)?;
        hart.set(Reg::Pc, to)?;
        let id = hart.id();
        let mut shim_calls = self.shim_calls();
        // A call from which the hart never returned is void: the kernel has stopped the hart meanwhile.
        shim_calls.retain(|(owner, _)| *owner != id);
        shim_calls.push((id, shim_call));
        Ok(BreakpointOutcome::Done)
    }

    pub(super) fn has_shim_call(&self, hart: u32) -> bool {
        self.shim_calls().iter().any(|(owner, _)| *owner == hart)
    }

    /// Completes a call to the kernel, whose result is in a0 and a1.
    pub(super) fn finish(&self, hart: &mut dyn Hart) -> io::Result<BreakpointOutcome> {
        let id = hart.id();
        let mut shim_calls = self.shim_calls();
        let found = shim_calls.iter().position(|(owner, _)| *owner == id);
        let Some((_, shim_call)) = found.map(|index| shim_calls.swap_remove(index)) else {
            return Ok(BreakpointOutcome::NotFirmware);
        };
        drop(shim_calls);
        // a0 contains the result; for the newer calls a1 as well.
        let kept = if shim_call.is_v01 { A1 } else { A1 + 1 };
        for (value, number) in
            shim_call.args.into_iter().zip(A0..).filter(|(_, number)| *number >= kept)
        {
            hart.set(Reg::X(number), value)?;
        }
        hart.set(Reg::Csr(Csr::Satp), shim_call.satp)?;
        // A timer interrupt that became due meanwhile was deferred: the call may have been the one that clears an older interrupt.
        self.handle_kick(hart)?;
        resume_at(hart, shim_call.back)
    }
}

fn resume_at(hart: &mut dyn Hart, back: Return) -> io::Result<BreakpointOutcome> {
    back.take(hart)?;
    Ok(BreakpointOutcome::Done)
}

/// Handles a console call of version 0.1. If the console is full, the hart hits the same breakpoint again.
fn console_call(
    hart: &mut dyn Hart,
    context: &MachineContext,
    back: Return,
    args: &[u64; 8],
) -> io::Result<BreakpointOutcome> {
    let [a0, a1, a2, a3, a4, a5, function, extension] = *args;
    let mut ret = [0; 2];
    let args = [a0, a1, a2, a3, a4, a5];
    let mut call = SbiCall { extension, function, args: &args, ret: &mut ret };
    let flow = sbi::handle(&mut call, context);
    match flow {
        Flow::Retry => {
            std::thread::yield_now();
            Ok(BreakpointOutcome::Done)
        }
        Flow::Stop(reason) => Ok(BreakpointOutcome::Stop(*reason)),
        _ => {
            hart.set(Reg::X(A0), ret[0])?;
            resume_at(hart, back)
        }
    }
}

/// The harts of a call of version 0.1: the mask at the guest-virtual address `pointer`, or all; `None` if the address has no
/// translation.
fn harts(
    hart: &dyn Hart,
    context: &MachineContext,
    pointer: u64,
) -> io::Result<Option<(u64, u64)>> {
    if pointer == 0 {
        // A base of all ones means every hart, whatever the mask.
        return Ok(Some((0, u64::MAX)));
    }
    let satp = hart.get(Reg::Csr(Csr::Satp))?;
    let mut mask = [0; 8];
    let read = translate(&context.ram, satp, pointer)
        .is_ok_and(|addr| context.ram.read(addr, &mut mask).is_ok());
    Ok(read.then_some((u64::from_le_bytes(mask), 0)))
}
