//! A hart on KVM: the loop's side of a vCPU. [`KvmHart::enter`] is the one hot path of rvmm.
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

/// What [`KvmHart::settle`] writes into `immediate_exit`; a kick that comes meanwhile overwrites it.
const SETTLING: u8 = 1;

/// The reason in the page after [`KvmHart::failed`], and no exit's (`KVM_EXIT_UNKNOWN`).
const NO_EXIT: u32 = 0;

/// A vCPU of KVM.
pub(super) struct KvmHart {
    id: u32,
    /// Nobody but this hart runs it or touches its page.
    vcpu: Arc<Vcpu>,
    /// Of the last KVM_RUN that failed.
    errno: i32,
    /// What the harts of its machine leave in the host's CPUs.
    deadlines: Arc<Deadlines>,
    is_bound: bool,
}

impl KvmHart {
    pub(super) fn new(id: u32, vcpu: Arc<Vcpu>, deadlines: Arc<Deadlines>) -> Self {
        Self { id, vcpu, errno: libc::EINTR, deadlines, is_bound: false }
    }

    /// What the page says after a KVM_RUN that succeeded.
    #[inline]
    fn page(&mut self) -> Exit<'_> {
        // SAFETY: this is the hart that runs the vCPU, it is not running, and the borrow of `self` in the result keeps it
        // from running before the reference is gone.
        let (reason, body) = unsafe { (self.vcpu.exit_reason(), self.vcpu.body()) };
        decode(reason, body)
    }

    /// What a KVM_RUN that failed with `errno` means; nothing is left to be completed. Out of the way of the others.
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
                    // A kick between here and the store needs no second look: what it announces is visible already, and
                    // the loop looks after this return.
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

    fn drive_external(&mut self) -> io::Result<()> {
        self.vcpu.interrupt_again()
    }

    fn settle(&mut self) -> io::Result<()> {
        self.complete()?;
        // Whoever settles may be away for long. Linux 7.1 and 7.2 load nothing of a hart that comes back to the CPU where it was last,
        // though the CPU may have been off meanwhile; they do where a CSR was written.
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
        match self.place(reg)? {
            Some(id) => self.vcpu.reg(id),
            None if reg == Reg::X(0) => Ok(0),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn set(&mut self, reg: Reg, value: u64) -> io::Result<()> {
        match self.place(reg)? {
            Some(id) => self.vcpu.set_reg(id, value),
            None if reg == Reg::X(0) => Ok(()),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl KvmHart {
    /// Completes the last exit, if that is still to be done.
    fn complete(&mut self) -> io::Result<()> {
        // SAFETY: this is the hart that runs the vCPU, and it is not running.
        if !is_open(unsafe { self.vcpu.exit_reason() }) {
            return Ok(());
        }
        let flag = self.vcpu.immediate_exit();
        // Either of the two exchanges fails where a kick has set the flag; then the flag stays for the next `enter`.
        let _ = flag.compare_exchange(0, SETTLING, Relaxed, Relaxed);
        let ran = self.vcpu.run();
        let _ = flag.compare_exchange(SETTLING, 0, Relaxed, Relaxed);
        // SAFETY: as above.
        unsafe { self.vcpu.clear_exit_reason() };
        match ran {
            Err(libc::EINTR) => Ok(()),
            Err(errno) => Err(io::Error::from_raw_os_error(errno)),
            Ok(()) => Err(io::Error::other("KVM_RUN ran the guest in spite of immediate_exit")),
        }
    }

    /// The id of a register. Without an AIA the kernel takes any value for the AIA's CSRs, says that all is well, and keeps nothing
    /// (6.12): so the vCPU is asked whether it has the extension.
    fn place(&self, reg: Reg) -> io::Result<Option<u64>> {
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
        // Neither a kick that came just before nor an exit that nobody answers keeps KVM_RUN from loading the vCPU.
        self.vcpu.immediate_exit().store(0, Relaxed);
        self.abandon();
        self.deadlines.leave(&self.vcpu);
    }
}
