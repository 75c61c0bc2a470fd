//! A vCPU's file descriptor and the page that it shares with the kernel, owned together.
#![expect(
    unsafe_code,
    reason = "KVM_RUN, KVM_INTERRUPT and the shared page have no safe interface"
)]

use std::arch::asm;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVMIO, kvm_guest_debug, kvm_interrupt, kvm_run};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_WRITE, ioctl_expr};

use super::exit::Body;
use super::regs;

const KVM_RUN: u64 = ioctl_expr(_IOC_NONE, KVMIO, 0x80, 0);
/// Its argument is a `kvm_interrupt`, which is one `u32`.
const KVM_INTERRUPT: u64 = ioctl_expr(_IOC_WRITE, KVMIO, 0x86, u32::BITS / 8);

/// Its argument is a `kvm_guest_debug`: two words of 32 bits, nothing of the architecture's.
const KVM_SET_GUEST_DEBUG: u64 = ioctl_expr(_IOC_WRITE, KVMIO, 0x9b, u64::BITS / 8);

/// Its argument is a `kvm_signal_mask`: 4 bytes that say how long the set is, and the set behind them.
const KVM_SET_SIGNAL_MASK: u64 = ioctl_expr(_IOC_WRITE, KVMIO, 0x8b, u32::BITS / 8);

/// The kernel's signals, one bit each.
const SIGNALS: libc::c_int = u64::BITS.cast_signed();

/// Gives a descriptor of the counters.
const KVM_GET_STATS_FD: u64 = ioctl_expr(_IOC_NONE, KVMIO, 0xce, 0);

/// Level of the external interrupt: high. The kernel's header has -1.
const INTERRUPT_SET: u32 = u32::MAX;
/// Level of the external interrupt: low. The kernel's header has -2.
const INTERRUPT_UNSET: u32 = u32::MAX - 1;

/// A vCPU. Shared by the hart that runs it, the thread that the hart is bound to and its external interrupt line;
/// running it and touching the page are the hart's alone.
pub(super) struct Vcpu {
    /// Points into the mapping that `fd` owns.
    page: NonNull<kvm_run>,
    raw: RawFd,
    fd: VcpuFd,
    /// The level of the external interrupt that was asked for last. Held over the system call: the kernel never hears of two levels in
    /// another order.
    external: Mutex<bool>,
}

// SAFETY: `page` points into a mapping that lives as long as `fd` and belongs to the process, not to a thread. The methods
// that reach it say who may call them.
unsafe impl Send for Vcpu {}
// SAFETY: as above; `VcpuFd` is `Sync` itself.
unsafe impl Sync for Vcpu {}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd) -> Self {
        Self {
            page: NonNull::from(fd.get_kvm_run()),
            raw: fd.as_raw_fd(),
            fd,
            external: Mutex::new(false),
        }
    }

    /// Runs the vCPU until there is an exit in the page, or fails with an errno.
    ///
    /// The system call is made here and not by the C library, whose way to it (a variable number of arguments, a guarded
    /// stack, `errno`) is a third of all instructions that rvmm spends on an exit before a device sees it.
    #[inline]
    pub(super) fn run(&self) -> Result<(), i32> {
        let answer: i64;
        // SAFETY: ioctl(fd, KVM_RUN, 0) on a vCPU descriptor that this owns. The kernel lets one thread in at a time, and
        // writes only guest memory and the shared page. A system call leaves the stack and all registers but a0 and the
        // vector ones alone, and those of a call of C are given up.
        unsafe {
            asm!(
                "ecall",
                in("a7") libc::SYS_ioctl,
                inlateout("a0") i64::from(self.raw) => answer,
                in("a1") KVM_RUN,
                in("a2") 0,
                clobber_abi("C"),
                options(nostack),
            );
        }
        match i32::try_from(answer) {
            Ok(0) => Ok(()),
            Ok(error) => Err(error.saturating_neg()),
            Err(_) => Err(libc::EIO),
        }
    }

    /// The flag that makes KVM_RUN return at once where it is not zero.
    pub(super) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the mapping, which lives as long as `self`; nobody makes a reference to it but
        // through here, and the kernel only reads it.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) }
    }

    /// The reason of the last exit.
    ///
    /// # Safety
    /// The caller is the hart that runs this vCPU, outside of KVM_RUN.
    pub(super) unsafe fn exit_reason(&self) -> u32 {
        // SAFETY: mapped, aligned, and by the contract nobody writes it now.
        unsafe { (*self.page.as_ptr()).exit_reason }
    }

    /// Makes the kernel forget that an exit is to be completed.
    ///
    /// # Safety
    /// As for [`Vcpu::exit_reason`].
    pub(super) unsafe fn clear_exit_reason(&self) {
        // SAFETY: as in `exit_reason`.
        unsafe { (*self.page.as_ptr()).exit_reason = 0 }
    }

    /// The part of the page that describes the last exit.
    ///
    /// # Safety
    /// As for [`Vcpu::exit_reason`], and the reference is gone before the next KVM_RUN or the next call.
    #[expect(clippy::mut_from_ref, reason = "exclusive by contract: the page belongs to the hart")]
    pub(super) unsafe fn body(&self) -> &mut Body {
        // SAFETY: mapped, aligned, any bits are valid, exclusive by the contract.
        unsafe { &mut (*self.page.as_ptr()).__bindgen_anon_1 }
    }

    /// Has KVM_RUN come back for one signal, blocked or not, and for no other.
    pub(super) fn let_in(&self, signal: libc::c_int) -> io::Result<()> {
        #[repr(C, packed)]
        struct SignalMask {
            length: u32,
            blocked: u64,
        }
        if !(1..=SIGNALS).contains(&signal) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mask = SignalMask { length: u64::BITS / 8, blocked: !(1 << (signal - 1)) };
        // SAFETY: the kernel reads the length and as many bytes behind it, and keeps a copy.
        match unsafe { libc::ioctl(self.raw, KVM_SET_SIGNAL_MASK, &raw const mask) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Reads a register of 64 bits, or of 32 with zeros above. Waits while the vCPU is inside KVM_RUN.
    pub(super) fn reg(&self, id: u64) -> io::Result<u64> {
        let mut value = [0; 8];
        self.fd.get_one_reg(id, &mut value).map_err(io::Error::from)?;
        Ok(u64::from_le_bytes(value))
    }

    /// Writes a register of 64 bits, or the lower half of the value to one of 32. Waits while the vCPU is inside KVM_RUN.
    pub(super) fn set_reg(&self, id: u64, value: u64) -> io::Result<()> {
        self.fd.set_one_reg(id, &value.to_le_bytes()).map_err(io::Error::from)?;
        Ok(())
    }

    /// Sends every `ebreak` of the guest to user space, or to the guest again. Waits while the vCPU is inside KVM_RUN.
    pub(super) fn trap_ebreaks(&self, on: bool) -> io::Result<()> {
        // On RISC-V breakpoints of software are the only kind that there is: no further bit asks for them.
        let control = if on { KVM_GUESTDBG_ENABLE } else { 0 };
        let debug = kvm_guest_debug { control, ..kvm_guest_debug::default() };
        // SAFETY: the kernel reads a structure of the size that the request's number has, and keeps no pointer to it.
        match unsafe { libc::ioctl(self.raw, KVM_SET_GUEST_DEBUG, &raw const debug) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Has the guest's timer interrupt pending, or not pending, until the guest sets its timer; false where only the guest can do that.
    ///
    /// Its `sip` is not written: the kernel takes that register as a whole, and forgets what other harts and devices raise meanwhile
    /// (`kvm_riscv_vcpu_general_set_csr`). The timer is this vCPU's alone.
    pub(super) fn set_timer_pending(&self, on: bool) -> io::Result<bool> {
        let has_sstc = self.reg(regs::SSTC).is_ok_and(|on| on == 1);
        if has_sstc {
            // `vstimecmp`, which the next entry compares with the time.
            self.set_reg(regs::TIMER_COMPARE, if on { 0 } else { u64::MAX })?;
        } else if on {
            // Linux 6.12 waits for tick 1 whatever the time says; either has passed. To take it back there is nothing.
            self.set_reg(regs::TIMER_COMPARE, 0)?;
            self.set_reg(regs::TIMER_STATE, 1)?;
        }
        Ok(has_sstc || on)
    }

    /// The file of what KVM counts of this vCPU. Waits while the vCPU is inside KVM_RUN; the file can be read at any time.
    pub(super) fn stats(&self) -> io::Result<File> {
        // SAFETY: KVM_GET_STATS_FD takes no argument and makes a new descriptor.
        match unsafe { libc::ioctl(self.raw, KVM_GET_STATS_FD, 0) } {
            // SAFETY: the kernel has just made it, and nobody else knows it.
            fd @ 0.. => Ok(unsafe { File::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Drives the external interrupt of the vCPU; from any thread, also while it runs.
    pub(super) fn interrupt(&self, high: bool) -> io::Result<()> {
        let mut external = self.external.lock().unwrap_or_else(PoisonError::into_inner);
        *external = high;
        self.send_interrupt(high)
    }

    /// Drives a high external interrupt once more.
    pub(super) fn interrupt_again(&self) -> io::Result<()> {
        let external = self.external.lock().unwrap_or_else(PoisonError::into_inner);
        if *external { self.send_interrupt(true) } else { Ok(()) }
    }

    fn send_interrupt(&self, high: bool) -> io::Result<()> {
        let level = kvm_interrupt { irq: if high { INTERRUPT_SET } else { INTERRUPT_UNSET } };
        // SAFETY: a KVM_INTERRUPT on a vCPU descriptor that this owns; the kernel reads one structure that outlives it.
        match unsafe { libc::ioctl(self.raw, KVM_INTERRUPT, &raw const level) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
