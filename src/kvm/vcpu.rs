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

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED, KVMIO, kvm_guest_debug,
    kvm_interrupt, kvm_mp_state, kvm_run,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

use super::exit::Body;
use super::regs;
use crate::hypervisor::{MpState, RegisterValue};

const KVM_RUN: u64 = ioctl_expr(_IOC_NONE, KVMIO, 0x80, 0);
/// Its argument is a `kvm_interrupt`, which is one `u32`.
const KVM_INTERRUPT: u64 = ioctl_expr(_IOC_WRITE, KVMIO, 0x86, u32::BITS / 8);

/// Its argument is a `kvm_guest_debug`: two 32-bit words, without an architecture-specific part.
const KVM_SET_GUEST_DEBUG: u64 = ioctl_expr(_IOC_WRITE, KVMIO, 0x9b, u64::BITS / 8);

/// Its argument is a `kvm_signal_mask`: 4 bytes with the length of the set, followed by the set.
const KVM_SET_SIGNAL_MASK: u64 = ioctl_expr(_IOC_WRITE, KVMIO, 0x8b, u32::BITS / 8);

/// Number of the kernel's signals, one bit each.
const SIGNALS: libc::c_int = u64::BITS.cast_signed();

/// Returns a descriptor of the counters.
const KVM_GET_STATS_FD: u64 = ioctl_expr(_IOC_NONE, KVMIO, 0xce, 0);

/// Its argument is a `kvm_reg_list`: a 64-bit count, followed by as many ids.
const KVM_GET_REG_LIST: u64 = ioctl_expr(_IOC_READ | _IOC_WRITE, KVMIO, 0xb0, u64::BITS / 8);

/// Level of the external interrupt: high. The kernel's header has -1.
const INTERRUPT_SET: u32 = u32::MAX;
/// Level of the external interrupt: low. The kernel's header has -2.
const INTERRUPT_UNSET: u32 = u32::MAX - 1;

/// A vCPU. Shared by the hart that runs it, the thread that the hart is bound to and its external interrupt line;
/// only the hart runs it and accesses the page.
pub(super) struct Vcpu {
    /// Points into the mapping that `fd` owns.
    page: NonNull<kvm_run>,
    raw: RawFd,
    fd: VcpuFd,
    /// The last requested level of the external interrupt. Held during the system call, so that the kernel sees levels in the order of
    /// the requests.
    external: Mutex<bool>,
}

// SAFETY: `page` points into a mapping that exists as long as `fd` and belongs to the process, not to a thread. The methods
// that access it state their callers' obligations.
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
    /// The system call is made here and not by the C library, whose wrapper (a variable number of arguments, a guarded
    /// stack, `errno`) takes a third of all instructions that rvmm spends on an exit before it reaches a device.
    #[inline]
    pub(super) fn run(&self) -> Result<(), i32> {
        let answer: i64;
        // SAFETY: ioctl(fd, KVM_RUN, 0) on a vCPU descriptor that this owns. The kernel admits one thread at a time, and
        // writes only guest memory and the shared page. A system call preserves the stack and all registers but a0 and the
        // vector registers; everything that a C call may clobber is declared.
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
        // SAFETY: the byte is in the mapping, which exists as long as `self`; references to it are made only here, and the
        // kernel only reads it.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) }
    }

    /// The reason of the last exit.
    ///
    /// # Safety
    /// The caller is the hart that runs this vCPU, outside of KVM_RUN.
    pub(super) unsafe fn exit_reason(&self) -> u32 {
        // SAFETY: mapped, aligned, and by the contract not written concurrently.
        unsafe { (*self.page.as_ptr()).exit_reason }
    }

    /// Makes the kernel forget that an exit has to be completed.
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

    /// Makes KVM_RUN return for this signal, blocked or not, and for no other.
    pub(super) fn interrupt_only_by(&self, signal: libc::c_int) -> io::Result<()> {
        #[repr(C, packed)]
        struct SignalMask {
            length: u32,
            blocked: u64,
        }
        if !(1..=SIGNALS).contains(&signal) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mask = SignalMask { length: u64::BITS / 8, blocked: !(1 << (signal - 1)) };
        // SAFETY: the kernel reads the length and as many bytes after it, and keeps a copy.
        match unsafe { libc::ioctl(self.raw, KVM_SET_SIGNAL_MASK, &raw const mask) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Reads a 64-bit register, or a 32-bit one with zeros above. Blocks while the vCPU is inside KVM_RUN.
    pub(super) fn reg(&self, id: u64) -> io::Result<u64> {
        let mut value = [0; 8];
        self.fd.get_one_reg(id, &mut value).map_err(io::Error::from)?;
        Ok(u64::from_le_bytes(value))
    }

    /// Writes a 64-bit register, or the lower half of the value to a 32-bit one. Blocks while the vCPU is inside KVM_RUN.
    pub(super) fn set_reg(&self, id: u64, value: u64) -> io::Result<()> {
        self.fd.set_one_reg(id, &value.to_le_bytes()).map_err(io::Error::from)?;
        Ok(())
    }

    /// The ids of all registers. Blocks while the vCPU is inside KVM_RUN.
    pub(super) fn reg_list(&self) -> io::Result<Vec<u64>> {
        let mut list = vec![0; 1];
        // The first call finds the count, the second one the ids. kvm-ioctls has too small a maximum.
        for _ in 0..2 {
            // SAFETY: the kernel reads the count and writes no more than that many ids behind it, which the buffer has room for.
            match unsafe { libc::ioctl(self.raw, KVM_GET_REG_LIST, list.as_mut_ptr()) } {
                0 => return Ok(list.split_off(1)),
                _ => match io::Error::last_os_error() {
                    error if error.raw_os_error() == Some(libc::E2BIG) => {
                        let count = list.first().copied().and_then(|n| u16::try_from(n).ok());
                        let count = count.ok_or(io::ErrorKind::InvalidData)?;
                        // The kernel reads the count from the first word.
                        list = vec![count.into(); usize::from(count) + 1];
                    }
                    error => return Err(error),
                },
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// Reads a register of any size. Blocks while the vCPU is inside KVM_RUN.
    pub(super) fn value(&self, id: u64) -> io::Result<RegisterValue> {
        match regs::size_of_register(id) {
            0..=8 => self.reg(id).map(RegisterValue::Word),
            size => {
                let mut bytes = vec![0; size];
                self.fd.get_one_reg(id, &mut bytes).map_err(io::Error::from)?;
                Ok(RegisterValue::Bytes(bytes))
            }
        }
    }

    /// Writes a register of any size. Blocks while the vCPU is inside KVM_RUN.
    pub(super) fn set_value(&self, id: u64, value: &RegisterValue) -> io::Result<()> {
        match value {
            RegisterValue::Word(word) if regs::size_of_register(id) <= 8 => self.set_reg(id, *word),
            RegisterValue::Bytes(bytes) if bytes.len() == regs::size_of_register(id) => {
                self.fd.set_one_reg(id, bytes).map_err(io::Error::from)?;
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Reads the run state. Blocks while the vCPU is inside KVM_RUN.
    pub(super) fn mp_state(&self) -> io::Result<MpState> {
        match self.fd.get_mp_state().map_err(io::Error::from)?.mp_state {
            KVM_MP_STATE_RUNNABLE => Ok(MpState::Runnable),
            KVM_MP_STATE_STOPPED => Ok(MpState::Stopped),
            other => Err(io::Error::other(format!("unknown MP state {other}"))),
        }
    }

    /// Sets the run state. Blocks while the vCPU is inside KVM_RUN.
    pub(super) fn set_mp_state(&self, state: MpState) -> io::Result<()> {
        let mp_state = match state {
            MpState::Runnable => KVM_MP_STATE_RUNNABLE,
            MpState::Stopped => KVM_MP_STATE_STOPPED,
        };
        self.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(io::Error::from)
    }

    /// Makes every `ebreak` of the guest exit to user space, or trap in the guest again. Blocks while the vCPU is inside KVM_RUN.
    pub(super) fn trap_ebreaks(&self, on: bool) -> io::Result<()> {
        // On RISC-V software breakpoints are the only kind: no further bit selects them.
        let control = if on { KVM_GUESTDBG_ENABLE } else { 0 };
        let debug = kvm_guest_debug { control, ..kvm_guest_debug::default() };
        // SAFETY: the kernel reads a structure of the size in the request's number, and keeps no pointer to it.
        match unsafe { libc::ioctl(self.raw, KVM_SET_GUEST_DEBUG, &raw const debug) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes the guest's timer interrupt pending, or not pending, until the guest sets its timer; false where only the guest can do that.
    ///
    /// Its `sip` is not written: the kernel replaces that register as a whole, and loses what other harts and devices raise meanwhile
    /// (`kvm_riscv_vcpu_general_set_csr`). The timer belongs to this vCPU alone.
    pub(super) fn set_timer_pending(&self, on: bool) -> io::Result<bool> {
        let has_sstc = self.reg(regs::SSTC).is_ok_and(|on| on == 1);
        if has_sstc {
            // `vstimecmp`, which the next entry compares with the time.
            self.set_reg(regs::TIMER_COMPARE, if on { 0 } else { u64::MAX })?;
        } else if on {
            // Linux 6.12 waits for tick 1 whatever `compare` is; both have passed. It cannot be undone.
            self.set_reg(regs::TIMER_COMPARE, 0)?;
            self.set_reg(regs::TIMER_STATE, 1)?;
        }
        Ok(has_sstc || on)
    }

    /// Opens the file of KVM's counters of this vCPU. Blocks while the vCPU is inside KVM_RUN; the file can be read at any time.
    pub(super) fn stats(&self) -> io::Result<File> {
        // SAFETY: KVM_GET_STATS_FD takes no argument and returns a new descriptor.
        match unsafe { libc::ioctl(self.raw, KVM_GET_STATS_FD, 0) } {
            // SAFETY: the kernel has just created it, and nothing else owns it.
            fd @ 0.. => Ok(unsafe { File::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sets the level of the external interrupt of the vCPU; from any thread, also while it runs.
    pub(super) fn interrupt(&self, high: bool) -> io::Result<()> {
        let mut external = self.external.lock().unwrap_or_else(PoisonError::into_inner);
        *external = high;
        self.send_interrupt(high)
    }

    /// Sends a high external interrupt once more.
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
