//! SBI calls that come out as breakpoints. The console and the end of the machine are answered here; the others are shim_calls to
//! the kernel, made in the guest's name from the shim's page with the registers that they need, and the registers put back.
//!
//! Source: SBI specification 3.0, chapter 5 (the calls of version 0.1, numbers 0 to 8) and chapters 6 to 8, which have the same
//! services under other numbers.

use std::io;

use super::{Firmware, TrapResult, shim};
use crate::vcpu::dispatch::Flow;
use crate::vcpu::exit::SbiCall;
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::sbi;
use crate::vcpu::stop::StopReason;
use crate::vcpu::trap;
use crate::vcpu::walk::translate;
use crate::vcpu::world::World;

/// Numbers of the calls of version 0.1 (chapter 5).
pub(super) mod v01 {
    pub(in super::super) const SET_TIMER: u64 = 0;
    pub(in super::super) const PUTCHAR: u64 = 1;
    pub(in super::super) const GETCHAR: u64 = 2;
    pub(in super::super) const CLEAR_IPI: u64 = 3;
    pub(in super::super) const SEND_IPI: u64 = 4;
    pub(in super::super) const FENCE_I: u64 = 5;
    pub(in super::super) const SFENCE_VMA: u64 = 6;
    pub(in super::super) const SFENCE_VMA_ASID: u64 = 7;
    pub(in super::super) const SHUTDOWN: u64 = 8;
}

/// Extensions with the same services.
pub(super) mod eid {
    pub(in super::super) const TIME: u64 = 0x5449_4d45;
    pub(in super::super) const IPI: u64 = 0x0073_5049;
    pub(in super::super) const RFENCE: u64 = 0x5246_4e43;
}

const A0: u8 = 10;
const A1: u8 = 11;
const A6: u8 = 16;
const A7: u8 = 17;

const SUCCESS: u64 = 0;
const INVALID_ADDRESS: u64 = (-5_i64).cast_unsigned();

/// How a hart goes back to where it made a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Return {
    pc: u64,
    mode: u64,
    sstatus: u64,
}

impl Return {
    /// To `pc`, in the mode in which the hart is.
    fn from_here(hart: &dyn Hart, pc: u64) -> io::Result<Self> {
        Ok(Self { pc, mode: hart.get(Reg::Mode)?, sstatus: hart.get(Reg::Csr(Csr::Sstatus))? })
    }

    /// To `pc`, in the mode from which the hart's last trap came, as `sret` would.
    pub(super) fn from_trap(hart: &dyn Hart, pc: u64) -> io::Result<Self> {
        let (mode, sstatus) = trap::before(hart.get(Reg::Csr(Csr::Sstatus))?);
        Ok(Self { pc, mode, sstatus })
    }

    pub(super) fn take(self, hart: &mut dyn Hart) -> io::Result<()> {
        hart.set(Reg::Csr(Csr::Sstatus), self.sstatus)?;
        hart.set(Reg::Mode, self.mode)?;
        hart.set(Reg::Pc, self.pc)
    }
}

/// A call that the kernel answers in the shim's page.
#[derive(Debug)]
pub(super) struct ShimCall {
    back: Return,
    satp: u64,
    /// a0 to a7 as they were.
    args: [u64; 8],
    /// A call of version 0.1, which answers in a0 alone.
    is_v01: bool,
}

impl Firmware {
    /// The call that the hart has made, with its registers as they are; it goes on at `next`.
    pub(super) fn call(
        &self,
        hart: &mut dyn Hart,
        world: &World,
        next: u64,
    ) -> io::Result<TrapResult> {
        let back = Return::from_here(hart, next)?;
        self.call_from(hart, world, back)
    }

    /// The same, for a hart that goes on as `back` says.
    pub(super) fn call_from(
        &self,
        hart: &mut dyn Hart,
        world: &World,
        back: Return,
    ) -> io::Result<TrapResult> {
        let mut args = [0; 8];
        for (arg, number) in args.iter_mut().zip(A0..) {
            *arg = hart.get(Reg::X(number))?;
        }
        let [a0, a1, a2, a3, a4, a5, function, extension] = args;
        let shim_call = ShimCall { back, satp: hart.get(Reg::Csr(Csr::Satp))?, args, is_v01: true };
        let timer = self
            .timer
            .as_ref()
            .filter(|_| matches!((extension, function), (v01::SET_TIMER, _) | (eid::TIME, 0)));
        if let Some(timer) = timer {
            if !timer.set(hart, a0)? {
                // What is pending only the guest can take back, by a call that sets the kernel's timer to never.
                let shim_call = ShimCall { is_v01: extension == v01::SET_TIMER, ..shim_call };
                return self.send(
                    hart,
                    shim_call,
                    (shim::ERRAND, eid::TIME, 0),
                    [u64::MAX, 0, 0, 0],
                );
            }
            hart.set(Reg::X(A0), SUCCESS)?;
            if extension == eid::TIME {
                hart.set(Reg::X(A1), 0)?;
            }
            return go_on(hart, back);
        }
        let old = |a7, a6, now: [u64; 4]| (a7, a6, now, true);
        let (a7, a6, now, is_v01) = match extension {
            v01::PUTCHAR | v01::GETCHAR => return talk(hart, world, back, &args),
            v01::SHUTDOWN => return Ok(TrapResult::Stop(StopReason::PowerOff)),
            v01::CLEAR_IPI => {
                return self.send(hart, shim_call, (shim::CLEAR_IPI, 0, 0), [SUCCESS, a1, a2, a3]);
            }
            v01::SET_TIMER => old(eid::TIME, 0, [a0, a1, a2, a3]),
            v01::SEND_IPI..=v01::SFENCE_VMA_ASID => {
                let Some((mask, base)) = harts(hart, world, a0)? else {
                    hart.set(Reg::X(A0), INVALID_ADDRESS)?;
                    return go_on(hart, back);
                };
                match extension {
                    v01::SEND_IPI => old(eid::IPI, 0, [mask, base, 0, 0]),
                    v01::FENCE_I => old(eid::RFENCE, 0, [mask, base, 0, 0]),
                    v01::SFENCE_VMA => old(eid::RFENCE, 1, [mask, base, a1, a2]),
                    _ => {
                        hart.set(Reg::X(A0 + 4), a3)?;
                        old(eid::RFENCE, 2, [mask, base, a1, a2])
                    }
                }
            }
            _ => (extension, function, [a0, a1, a2, a3], false),
        };
        if !is_v01 {
            hart.set(Reg::X(A0 + 4), a4)?;
            hart.set(Reg::X(A0 + 5), a5)?;
        }
        self.send(hart, ShimCall { is_v01, ..shim_call }, (shim::ERRAND, a7, a6), now)
    }

    /// Sends the hart to an instruction of the shim, without translation and with its interrupts off.
    fn send(
        &self,
        hart: &mut dyn Hart,
        shim_call: ShimCall,
        (to, a7, a6): (u64, u64, u64),
        now: [u64; 4],
    ) -> io::Result<TrapResult> {
        for (value, number) in now.into_iter().zip(A0..) {
            hart.set(Reg::X(number), value)?;
        }
        hart.set(Reg::X(A7), a7)?;
        hart.set(Reg::X(A6), a6)?;
        hart.set(Reg::Csr(Csr::Sstatus), trap::without_interrupts(shim_call.back.sstatus))?;
        hart.set(Reg::Csr(Csr::Satp), 0)?;
        hart.set(Reg::Mode, trap::SUPERVISOR)?;
        hart.set(Reg::Pc, to)?;
        let id = hart.id();
        let mut shim_calls = self.shim_calls();
        // One that the hart never came back from is void: the kernel has stopped it meanwhile.
        shim_calls.retain(|(owner, _)| *owner != id);
        shim_calls.push((id, shim_call));
        Ok(TrapResult::Done)
    }

    pub(super) fn is_on_errand(&self, hart: u32) -> bool {
        self.shim_calls().iter().any(|(owner, _)| *owner == hart)
    }

    /// The hart is back with the kernel's answer in a0 and a1.
    pub(super) fn finish(&self, hart: &mut dyn Hart) -> io::Result<TrapResult> {
        let id = hart.id();
        let mut shim_calls = self.shim_calls();
        let found = shim_calls.iter().position(|(owner, _)| *owner == id);
        let Some((_, shim_call)) = found.map(|index| shim_calls.swap_remove(index)) else {
            return Ok(TrapResult::Strange);
        };
        drop(shim_calls);
        // a0 holds the answer; of the newer calls a1, too.
        let kept = if shim_call.is_v01 { A1 } else { A1 + 1 };
        for (value, number) in
            shim_call.args.into_iter().zip(A0..).filter(|(_, number)| *number >= kept)
        {
            hart.set(Reg::X(number), value)?;
        }
        hart.set(Reg::Csr(Csr::Satp), shim_call.satp)?;
        // A timer that has come meanwhile has waited: the shim_call may have been to take an older interrupt back.
        self.attend(hart)?;
        go_on(hart, shim_call.back)
    }
}

fn go_on(hart: &mut dyn Hart, back: Return) -> io::Result<TrapResult> {
    back.take(hart)?;
    Ok(TrapResult::Done)
}

/// The console of version 0.1. A console that is full is met again by the same breakpoint.
fn talk(
    hart: &mut dyn Hart,
    world: &World,
    back: Return,
    args: &[u64; 8],
) -> io::Result<TrapResult> {
    let [a0, a1, a2, a3, a4, a5, function, extension] = *args;
    let mut ret = [0; 2];
    let args = [a0, a1, a2, a3, a4, a5];
    let flow = sbi::answer(&mut SbiCall { extension, function, args: &args, ret: &mut ret }, world);
    match flow {
        Flow::Retry => {
            std::thread::yield_now();
            Ok(TrapResult::Done)
        }
        Flow::Stop(reason) => Ok(TrapResult::Stop(*reason)),
        _ => {
            hart.set(Reg::X(A0), ret[0])?;
            go_on(hart, back)
        }
    }
}

/// The harts of a call of version 0.1: the mask that `pointer` leads to in the guest's own addresses, or all; `None` where it leads
/// nowhere.
fn harts(hart: &dyn Hart, world: &World, pointer: u64) -> io::Result<Option<(u64, u64)>> {
    if pointer == 0 {
        // A base of all ones means every hart, whatever the mask.
        return Ok(Some((0, u64::MAX)));
    }
    let satp = hart.get(Reg::Csr(Csr::Satp))?;
    let mut mask = [0; 8];
    let read = translate(&world.ram, satp, pointer)
        .is_ok_and(|addr| world.ram.read(addr, &mut mask).is_ok());
    Ok(read.then_some((u64::from_le_bytes(mask), 0)))
}
