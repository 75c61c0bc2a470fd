//! What stands in for firmware, put into a machine: the shim's page, breakpoints in place of calls, the timer.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use rvmm_boot::Region;

use super::vm::{CpuKnobs, Hypervisor, SHIM_SLOT, Vm, VmError};
use crate::config::{SbiV01, StartMode, TimerChoice, VmConfig};
use crate::error::Error;
use crate::memory::{GuestRam, PAGE, Rom};
use crate::vcpu::Control;
use crate::vcpu::exit::Exit;
use crate::vcpu::firmware::timer::UserTimer;
use crate::vcpu::firmware::{Firmware, shim, sites};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::witness::Witness;

/// Files longer than this hold data, not code that calls an SBI of version 0.1.
const MOST_CODE: u64 = 16 << 20;

/// What the machine is by now.
pub(super) struct Stage<'a> {
    pub(super) config: &'a VmConfig,
    pub(super) host: &'a dyn Hypervisor,
    pub(super) vm: &'a dyn Vm,
    pub(super) ram: &'a GuestRam,
    pub(super) control: &'a Arc<Control>,
    pub(super) timebase_hz: u64,
    pub(super) witness: Option<Arc<dyn Witness>>,
}

/// The firmware, and the page that it needs in the guest.
pub(super) type Wired = Option<(Firmware, Rom)>;

/// Plants what the configuration asks for in the machine's memory and harts; `None` where it asks for nothing, and the guest
/// calls for nothing that the kernel does not have.
pub(super) fn wire(
    stage: &Stage<'_>,
    harts: &mut [Box<dyn Hart>],
    code: &[Region],
) -> Result<Wired, Error> {
    let config = stage.config;
    let is_bare = config.cpus.mode == StartMode::User || !config.cpus.csrs.is_empty();
    let sites = plant(stage, code)?;
    let is_timed = config.timer == TimerChoice::User;
    if !is_bare && sites.is_empty() && !is_timed {
        return Ok(None);
    }
    let page = Rom::page(&shim::code()).map_err(|e| failed("make the trap shim", e))?;
    stage
        .vm
        .map_rom(SHIM_SLOT, shim::PAGE, page.host_address(), PAGE)
        .map_err(|e| failed("show the trap shim to the guest", e))?;
    stage.vm.code_changed().map_err(|e| failed("make the harts see changed code", e))?;
    for hart in harts.iter_mut() {
        hart.trap_ebreaks(true).map_err(|e| {
            failed("have the guest's breakpoints come out (KVM_SET_GUEST_DEBUG)", e)
        })?;
    }
    if let Some(boot) = harts.first_mut().filter(|_| is_bare) {
        let mode = u64::from(config.cpus.mode == StartMode::Supervisor);
        for (reg, value) in [(Reg::Csr(Csr::Stvec), shim::VECTOR), (Reg::Mode, mode)] {
            boot.set(reg, value).map_err(|e| failed("prepare the boot hart", e))?;
        }
    }
    let timer = is_timed.then(|| {
        UserTimer::start(config.cpus.count, stage.timebase_hz, stage.control, stage.witness.clone())
    });
    let timer = timer.transpose().map_err(|e| failed("start the timer", e))?.map(Arc::new);
    let csrs = config.cpus.csrs.clone();
    Ok(Some((Firmware::new(sites, csrs, timer), page)))
}

/// Puts breakpoints in place of the guest's calls that nobody else answers, and says where.
fn plant(stage: &Stage<'_>, code: &[Region]) -> Result<BTreeSet<u64>, Error> {
    let choice = stage.config.sbi_v01;
    if choice == SbiV01::Kernel && !kernel_has_v01(stage.host)? {
        return Err(Error::Config(
            "Cannot use --sbi-v01 kernel: this host's kernel has no SBI 0.1 (CONFIG_RISCV_SBI_V01; use auto or patch)".into(),
        ));
    }
    let timed = stage.config.timer == TimerChoice::User;
    let is_timer = |number: u64| timed && sites::is_set_timer(number);
    let mut found = Vec::new();
    let mut is_v01_called = false;
    for region in code.iter().filter(|region| region.size <= MOST_CODE) {
        let mut bytes = vec![0; usize::try_from(region.size).unwrap_or(0)];
        stage.ram.read(region.base, &mut bytes).map_err(memory)?;
        for (offset, number) in sites::find(&bytes) {
            is_v01_called |= sites::is_v01(number);
            found.push((region.base + offset as u64, number));
        }
    }
    let patches_v01 = match choice {
        SbiV01::Patch => true,
        // In user mode the guest's calls come to the shim by themselves: its code stays as it is.
        SbiV01::Auto if stage.config.cpus.mode == StartMode::User => false,
        SbiV01::Auto => is_v01_called && !kernel_has_v01(stage.host)?,
        SbiV01::Kernel | SbiV01::Off => false,
    };
    let wanted = |number| is_timer(number) || patches_v01 && sites::is_v01(number);
    let mut planted = BTreeSet::new();
    for (addr, _) in found.into_iter().filter(|(_, number)| wanted(*number)) {
        stage.ram.write(addr, &sites::EBREAK).map_err(memory)?;
        planted.insert(addr);
    }
    if !planted.is_empty() {
        log::info!("{} calls of the guest are breakpoints now (--sbi-v01, --timer)", planted.len());
    }
    if timed && planted.is_empty() {
        log::warn!(
            "--timer user has nothing to do: no call that sets the timer was found in the guest's code"
        );
    }
    Ok(planted)
}

/// Whether the host's kernel hands the calls of SBI 0.1 out. Its registers say so even where it does not, so a guest tries.
fn kernel_has_v01(host: &dyn Hypervisor) -> Result<bool, Error> {
    /// Where the guest of three instructions is, and where it stores what it was answered.
    const AT: u64 = 0x8000_0000;
    // li a7,1; ecall; sd a0,0x100(zero)
    let code = [0x0010_0893_u32, 0x0000_0073, 0x10a0_3023].map(u32::to_le_bytes).concat();
    let page =
        Rom::page(&code).map_err(|e| failed("make a page for a guest that tries SBI 0.1", e))?;
    let vm = host.create_vm()?;
    vm.map_rom(0, AT, page.host_address(), PAGE)
        .map_err(|e| failed("show a page to a guest that tries SBI 0.1", e))?;
    let mut hart = vm.create_hart(0, &CpuKnobs::default())?;
    hart.set(Reg::Pc, AT).map_err(|e| failed("prepare a hart that tries SBI 0.1", e))?;
    loop {
        match hart.enter() {
            Ok(Exit::Sbi(call)) => return Ok(call.extension == 1),
            Ok(Exit::Interrupted) => {}
            Ok(_) => return Ok(false),
            Err(error) => return Err(failed("run a guest that tries SBI 0.1", error)),
        }
    }
}

fn failed(what: &str, source: io::Error) -> Error {
    VmError::io(format!("Cannot {what}"), source).into()
}

fn memory(error: crate::memory::RamError) -> Error {
    Error::Memory { what: format!("Cannot look through the guest's code: {error}"), source: None }
}
