//! A virtual machine on KVM: memory, harts, irqchip and lines, in the order that KVM requires.
#![expect(unsafe_code, reason = "a system call without a safe interface")]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_MAX_VCPUS, KVM_CAP_NR_VCPUS, KVM_CAP_VM_GPA_BITS, KVM_MEM_READONLY,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use rvmm_devices::IoEvent;
use rvmm_devices::irq::IrqLine;

use super::Kvm;
use super::aia::{self, Aia};
use super::clock;
use super::deadline::Deadlines;
use super::hart::KvmHart;
use super::irq::Lines;
use super::irqchip;
use super::isa::names_in;
use super::knobs::{self, Applied};
use super::regs;
use super::renew::VmSettings;
use super::slots::Slots;
use super::stats::HartCounters;
use super::vcpu::Vcpu;
use crate::config::IrqchipChoice;
use crate::error::VmError;
use crate::hypervisor::{AiaPlan, Counters, CpuFacts, CpuSettings, Irqchip, Vm};
use crate::vcpu::hart::{Hart, Reg};
use crate::vcpu::record::Ticks;

/// Maximum number of words of 64 ISA extensions that are read. Kernels have two; reading ends at the first missing one.
const ISA_WORDS: usize = 4;

/// Possible widths of a guest-physical address: with Sv39x4, Sv48x4 and Sv57x4, in three, four and five levels.
const ADDRESS_BITS: [u32; 3] = [41, 50, 59];

/// riscv_flush_icache(2) (kernel, `arch/riscv/include/uapi/asm/unistd.h`: `__NR_arch_specific_syscall + 15`).
const SYS_RISCV_FLUSH_ICACHE: libc::c_long = 244 + 15;

/// A VM of KVM. Its locks are taken in the order of the fields.
pub(super) struct KvmVm {
    pub(super) kvm: Kvm,
    /// The descriptor's number stays the same over resets.
    pub(super) fd: Arc<VmFd>,
    members: Mutex<Members>,
    slots: Mutex<Slots>,
    settings: Mutex<VmSettings>,
    lines: Mutex<Lines>,
    deadlines: Arc<Deadlines>,
}

/// The parts of a VM that a reset ends.
#[derive(Default)]
pub(super) struct Members {
    pub(super) harts: Vec<Member>,
    /// The result of the ISA knobs on the first hart; it is the same on the others.
    pub(super) applied: Option<Applied>,
    pub(super) aia: Option<Aia>,
}

/// The VM's record of a hart.
pub(super) struct Member {
    pub(super) id: u32,
    pub(super) vcpu: Arc<Vcpu>,
    /// True if the user has switched SBI SUSP on or off.
    pub(super) susp_chosen: bool,
}

impl Members {
    pub(super) fn first_vcpu(&self) -> Result<&Arc<Vcpu>, VmError> {
        let first = self.harts.first().ok_or_else(|| VmError::new("The VM has no hart yet"))?;
        Ok(&first.vcpu)
    }

    /// True if events may raise lines: an interrupt that the kernel raises by itself would not wake a suspended guest.
    pub(super) fn may_share_lines(&self) -> bool {
        !self.harts.iter().any(|member| member.susp_chosen)
    }
}

impl KvmVm {
    pub(super) fn new(kvm: Kvm, fd: VmFd) -> Self {
        Self {
            kvm,
            fd: Arc::new(fd),
            members: Mutex::default(),
            slots: Mutex::default(),
            settings: Mutex::default(),
            lines: Mutex::default(),
            deadlines: Arc::default(),
        }
    }

    pub(super) fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn settings(&self) -> MutexGuard<'_, VmSettings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn first_vcpu(&self) -> Result<Arc<Vcpu>, VmError> {
        self.members().first_vcpu().cloned()
    }

    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Creates a vCPU with the kernel's defaults.
    pub(super) fn make_vcpu(&self, id: u32) -> Result<Vcpu, VmError> {
        let fd = self.fd.create_vcpu(id.into());
        fd.map(Vcpu::new).map_err(|e| VmError::io(format!("Cannot create hart {id}"), e.into()))
    }

    fn map(&self, slot: u32, flags: u32, guest_addr: u64, host: (u64, u64)) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: guest_addr,
            memory_size: host.1,
            userspace_addr: host.0,
        };
        self.slots().map(&self.fd, region)
    }
}

impl Vm for KvmVm {
    fn max_harts(&self) -> u32 {
        [KVM_CAP_MAX_VCPUS, KVM_CAP_NR_VCPUS]
            .into_iter()
            .find_map(|cap| {
                u32::try_from(self.fd.check_extension_raw(cap.into())).ok().filter(|n| *n > 0)
            })
            // The default in the kernel's API document where neither capability exists.
            .unwrap_or(4)
    }

    fn map_memory(&self, slot: u32, guest_addr: u64, host_addr: u64, size: u64) -> io::Result<()> {
        self.map(slot, 0, guest_addr, (host_addr, size))
    }

    fn map_rom(&self, slot: u32, guest_addr: u64, host_addr: u64, size: u64) -> io::Result<()> {
        self.map(slot, KVM_MEM_READONLY, guest_addr, (host_addr, size))
    }

    fn code_changed(&self) -> io::Result<()> {
        // SAFETY: riscv_flush_icache(2) with all addresses and flags 0 (every thread of the process) touches no memory.
        match unsafe { libc::syscall(SYS_RISCV_FLUSH_ICACHE, 0_usize, usize::MAX, 0_usize) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn create_hart(&self, id: u32, knobs: &CpuSettings) -> Result<Box<dyn Hart>, VmError> {
        let mut members = self.members();
        if members.aia.is_some() {
            // Linux 6.12 assumes that a vCPU created after the AIA has an IMSIC, and dereferences a null pointer.
            return Err(VmError::new(format!("Hart {id} is created after the irqchip")));
        }
        if members.harts.last().is_some_and(|last| last.id >= id) {
            return Err(VmError::new(format!("Hart {id} is not created in ascending order")));
        }
        let vcpu = Arc::new(self.make_vcpu(id)?);
        let applied = knobs::apply(&vcpu, knobs)?;
        let susp_chosen = knobs.sbi.iter().any(|change| change.name == "susp");
        members.harts.push(Member { id, vcpu: Arc::clone(&vcpu), susp_chosen });
        if members.applied.is_none() {
            report(&applied);
            members.applied = Some(applied);
        }
        self.lines().connect_external(&vcpu, id)?;
        Ok(Box::new(KvmHart::new(id, vcpu, Arc::clone(&self.deadlines))))
    }

    fn cpu_facts(&self) -> Result<CpuFacts, VmError> {
        let members = self.members();
        let vcpu = members.first_vcpu()?;
        let mut extensions = shown(vcpu, members.applied.as_ref())?;
        if members.aia.is_none() {
            // Without an interrupt controller the guest's AIA registers have no effect.
            extensions.retain(|name| *name != "ssaia");
        }
        let read = |what: &str, id| {
            vcpu.reg(id).map_err(|e| VmError::io(format!("Cannot read {what} from KVM"), e))
        };
        let block = |extension, id| {
            let size = extensions.contains(&extension).then(|| vcpu.reg(id).ok());
            size.flatten().and_then(|size| u32::try_from(size).ok()).filter(|size| *size > 0)
        };
        Ok(CpuFacts {
            satp_mode: read("the MMU mode", regs::SATP_MODE)?,
            cbom_block: block("zicbom", regs::ZICBOM_BLOCK),
            cboz_block: block("zicboz", regs::ZICBOZ_BLOCK),
            cbop_block: block("zicbop", regs::ZICBOP_BLOCK),
            timebase_hz: read("the timebase", regs::TIMEBASE)?,
            extensions: extensions.into_iter().map(String::from).collect(),
        })
    }

    fn ticks(&self) -> Result<Ticks, VmError> {
        // The host's counter; the guest's has the same rate.
        let hz = self.first_vcpu()?.reg(regs::TIMEBASE);
        let hz = hz.map_err(|e| VmError::io("Cannot read the timebase from KVM", e))?;
        Ok(Ticks { now: clock::ticks, hz })
    }

    fn counters(&self) -> Vec<Box<dyn Counters>> {
        let members = self.members();
        let open = |member: &Member| match member.vcpu.stats() {
            Ok(file) => Some(Box::new(HartCounters::new(member.id, file)) as _),
            Err(error) => {
                log::debug!("Cannot open KVM's counters of hart {}: {error}", member.id);
                None
            }
        };
        members.harts.iter().filter_map(open).collect()
    }

    fn reg(&self, hart: u32, reg: Reg) -> io::Result<u64> {
        let vcpu = self
            .members()
            .harts
            .iter()
            .find(|member| member.id == hart)
            .map(|m| Arc::clone(&m.vcpu));
        let id = regs::guest(reg).ok_or(io::ErrorKind::InvalidInput)?;
        vcpu.ok_or(io::ErrorKind::NotFound)?.reg(id)
    }

    fn address_bits(&self) -> Option<u32> {
        let bits = self.fd.check_extension_raw(KVM_CAP_VM_GPA_BITS.into());
        u32::try_from(bits).ok().filter(|bits| *bits > 0)
    }

    fn limit_addresses(&self, end: u64) {
        // Linux up to 7.2 refuses a slot that includes the last page of the address space.
        let narrow = ADDRESS_BITS.iter().find(|bits| end < 1 << **bits);
        let Some(bits) = narrow.filter(|bits| self.address_bits().is_some_and(|now| now > **bits))
        else {
            return;
        };
        // Older kernels support one width only, the widest.
        if let Err(error) = self.settings().narrow(&self.fd, *bits) {
            log::debug!("Cannot narrow guest-physical addresses: {error}");
        }
    }

    fn create_irqchip(&self, choice: IrqchipChoice, plan: &AiaPlan) -> Result<Irqchip, VmError> {
        let mut members = self.members();
        if !irqchip::is_aia(&self.kvm, &self.fd, &members, (choice, plan))? {
            return Ok(Irqchip::None);
        }
        if members.aia.is_some() {
            return Err(VmError::new("The irqchip exists already"));
        }
        let aia = aia::create(&self.fd, plan)?;
        let facts = aia.facts;
        members.aia = Some(aia);
        // The kernel resets the IMSIC of a hart that resumes, which guests do not expect: no interrupt would wake them again.
        for member in members.harts.iter().filter(|member| !member.susp_chosen) {
            knobs::without_suspend(&member.vcpu)?;
        }
        self.lines().connect_sources()?;
        Ok(Irqchip::Aia(facts))
    }

    fn has_set_up_irqchip(&self) -> Option<bool> {
        match self.members().aia.as_ref()?.is_set_up() {
            Ok(is_set_up) => Some(is_set_up),
            Err(error) => {
                log::debug!("{error}");
                None
            }
        }
    }

    fn register_ioeventfd(&self, base: u64, ioevent: IoEvent<'_>) -> Result<(), VmError> {
        self.settings()
            .register(&self.fd, base, &ioevent)
            .map_err(|e| VmError::io("Cannot register a device's ioevent (KVM_IOEVENTFD)", e))
    }

    fn irq_line(&self, source: u32) -> Result<Arc<dyn IrqLine>, VmError> {
        let members = self.members();
        let sources = members.aia.as_ref().map_or(0, |aia| aia.facts.sources);
        if (1..=sources).contains(&source) {
            return Ok(self.lines().source(&self.fd, source, members.may_share_lines()));
        }
        Err(VmError::new(format!(
            "The APLIC has no interrupt source {source} (it has 1 to {sources})"
        )))
    }

    fn external_line(&self, hart: u32) -> Result<Arc<dyn IrqLine>, VmError> {
        let members = self.members();
        if members.aia.is_some() {
            return Err(VmError::new("The in-kernel AIA owns the harts' external interrupts"));
        }
        let member = members.harts.iter().find(|member| member.id == hart);
        let member = member.ok_or_else(|| VmError::new(format!("The VM has no hart {hart}")))?;
        Ok(self.lines().external(&member.vcpu, hart))
    }
}

/// The extensions of `vcpu` that are not hidden, in the order of KVM's numbers.
pub(super) fn shown(vcpu: &Vcpu, applied: Option<&Applied>) -> Result<Vec<&'static str>, VmError> {
    let mut names = Vec::new();
    for word in 0..ISA_WORDS {
        match vcpu.reg(regs::isa_word(word as u64)) {
            Ok(bits) => names.extend(names_in(bits, word * 64)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) && word > 0 => break,
            Err(e) => {
                return Err(VmError::io(
                    "Cannot read the ISA from KVM (this needs Linux 6.6 or newer)",
                    e,
                ));
            }
        }
    }
    names.retain(|name| applied.is_none_or(|applied| !applied.hidden.contains(name)));
    Ok(names)
}

/// Logs the effect of the ISA knobs.
fn report(applied: &Applied) {
    let Applied { disabled, hidden, withheld } = applied;
    for name in withheld {
        log::info!(
            "SBI extension {name} is off, since with it a guest could harm this kernel (--sbi +{name} switches it on)"
        );
    }
    if !disabled.is_empty() {
        log::info!("Switched off in KVM: {}", disabled.join(", "));
    }
    if !hidden.is_empty() {
        log::warn!(
            "Hidden from the device tree only, since KVM cannot switch it off: {}",
            hidden.join(", ")
        );
    }
    if hidden.contains(&"sstc") {
        log::warn!(
            "Without Sstc a guest sets its timer through SBI, and KVM up to Linux 7.3 loses that at times on a host with Sstc: Linux may hang"
        );
    }
}
