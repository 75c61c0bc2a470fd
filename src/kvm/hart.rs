//! A hart on KVM: a vCPU as the run loop uses it. [`KvmHart::enter`] is the only hot path of rvmm.
#![expect(unsafe_code, reason = "the page shared with the kernel")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::deadline::Deadlines;
use super::exit::{decode, fault, is_open};
use super::kick;
use super::regs;
use super::vcpu::Vcpu;
use crate::vcpu::exit::Exit;
use crate::vcpu::hart::{Csr, Hart, Kick, Reg};

/// The value that [`KvmHart::settle`] writes into `immediate_exit`; a concurrent kick overwrites it.
const SETTLING: u8 = 1;

/// The exit reason in the page after [`KvmHart::failed`]; no exit has it (`KVM_EXIT_UNKNOWN`).
const NO_EXIT: u32 = 0;

/// A vCPU of KVM.
pub(super) struct KvmHart {
    id: u32,
    /// Only this hart runs it and accesses its page.
    vcpu: Arc<Vcpu>,
    /// The errno of the last KVM_RUN that failed.
    errno: i32,
    /// The deadlines that the machine's harts leave in the host's CPUs.
    deadlines: Arc<Deadlines>,
    is_bound: bool,
}

impl KvmHart {
    pub(super) fn new(id: u32, vcpu: Arc<Vcpu>, deadlines: Arc<Deadlines>) -> Self {
        Self { id, vcpu, errno: libc::EINTR, deadlines, is_bound: false }
    }

    /// The exit in the page after a successful KVM_RUN.
    #[inline]
    fn page(&mut self) -> Exit<'_> {
        // SAFETY: this is the hart that runs the vCPU, it is not running, and the borrow of `self` in the result keeps it
        // from running before the reference is gone.
        let (reason, body) = unsafe { (self.vcpu.exit_reason(), self.vcpu.body()) };
        decode(reason, body)
    }

    /// The exit for a KVM_RUN that failed with `errno`; no instruction is left to be completed. Kept out of the hot path.
    #[cold]
    #[inline(never)]
    fn failed(&mut self, mut errno: i32) -> Exit<'_> {
        loop {
            // SAFETY: this is the hart that runs the vCPU, and it is not running.
            unsafe { self.vcpu.clear_exit_reason() };
            match errno {
                libc::EAGAIN => match self.vcpu.run() {
                    Ok(()) => return self.page(),
                    Err(again) => errno = again,
                },
                libc::EINTR => {
                    self.errno = libc::EINTR;
                    // The store may erase a kick. That is no loss: what the kick announces is already visible, and the run
                    // loop checks for it after this return.
                    self.vcpu.immediate_exit().store(0, Relaxed);
                    return Exit::Interrupted;
                }
                other => {
                    self.errno = other;
                    return fault(other);
                }
            }
        }
    }
}

impl Hart for KvmHart {
    fn id(&self) -> u32 {
        self.id
    }

    fn bind(&mut self) -> io::Result<Arc<dyn Kick>> {
        let kick = kick::bind(&self.vcpu)?;
        if !self.is_bound {
            self.deadlines.enter();
            self.is_bound = true;
        }
        Ok(kick)
    }

    #[inline]
    fn enter(&mut self) -> io::Result<Exit<'_>> {
        match self.vcpu.run() {
            Ok(()) => Ok(self.page()),
            Err(errno) => Ok(self.failed(errno)),
        }
    }

    fn last_exit(&mut self) -> Exit<'_> {
        // SAFETY: this is the hart that runs the vCPU, and it is outside of KVM_RUN.
        match (unsafe { self.vcpu.exit_reason() }, self.errno) {
            (NO_EXIT, libc::EINTR) => Exit::Interrupted,
            (NO_EXIT, errno) => fault(errno),
            _ => self.page(),
        }
    }

    fn set_timer_pending(&mut self, on: bool) -> io::Result<bool> {
        self.vcpu.set_timer_pending(on)
    }

    fn sync_external_interrupt(&mut self) -> io::Result<()> {
        self.vcpu.interrupt_again()
    }

    fn settle(&mut self) -> io::Result<()> {
        self.complete()?;
        // The next entry may be much later. Linux 7.1 and 7.2 load no state of a hart that returns to the CPU that ran it last, though
        // the CPU may have been powered down meanwhile; they do where a CSR was written.
        let scratch = self.vcpu.reg(regs::SSCRATCH)?;
        self.vcpu.set_reg(regs::SSCRATCH, scratch)
    }

    fn abandon(&mut self) {
        // SAFETY: this is the hart that runs the vCPU, and it is not running.
        unsafe { self.vcpu.clear_exit_reason() };
    }

    fn trap_ebreaks(&mut self, on: bool) -> io::Result<()> {
        self.vcpu.trap_ebreaks(on)
    }

    fn get(&self, reg: Reg) -> io::Result<u64> {
        match self.reg_id(reg)? {
            Some(id) => self.vcpu.reg(id),
            None if reg == Reg::X(0) => Ok(0),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn set(&mut self, reg: Reg, value: u64) -> io::Result<()> {
        match self.reg_id(reg)? {
            Some(id) => self.vcpu.set_reg(id, value),
            None if reg == Reg::X(0) => Ok(()),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl KvmHart {
    /// Completes the instruction of the last exit, if that is still to be done.
    fn complete(&mut self) -> io::Result<()> {
        // SAFETY: this is the hart that runs the vCPU, and it is not running.
        if !is_open(unsafe { self.vcpu.exit_reason() }) {
            return Ok(());
        }
        let flag = self.vcpu.immediate_exit();
        // Either of the two exchanges fails where a kick has set the flag, which then stays set for the next `enter`.
        let _ = flag.compare_exchange(0, SETTLING, Relaxed, Relaxed);
        let ran = self.vcpu.run();
        let _ = flag.compare_exchange(SETTLING, 0, Relaxed, Relaxed);
        // SAFETY: as above.
        unsafe { self.vcpu.clear_exit_reason() };
        match ran {
            Err(libc::EINTR) => Ok(()),
            Err(errno) => Err(io::Error::from_raw_os_error(errno)),
            Ok(()) => Err(io::Error::other("KVM_RUN ran the guest despite immediate_exit")),
        }
    }

    /// The id of a register. Without an AIA the kernel (6.12) accepts any value for the AIA's CSRs, reports success and keeps nothing:
    /// so the extension is checked first.
    fn reg_id(&self, reg: Reg) -> io::Result<Option<u64>> {
        let is_aia = matches!(reg, Reg::Csr(Csr::Siselect | Csr::Hviprio1 | Csr::Hviprio2));
        if is_aia && self.vcpu.reg(regs::SSAIA)? == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(regs::guest(reg))
    }
}

impl Drop for KvmHart {
    fn drop(&mut self) {
        kick::unbind(&self.vcpu);
        if !self.is_bound {
            return;
        }
        // Neither an earlier kick nor an unanswered exit may keep KVM_RUN from loading the vCPU.
        self.vcpu.immediate_exit().store(0, Relaxed);
        self.abandon();
        self.deadlines.leave(&self.vcpu);
    }
}
