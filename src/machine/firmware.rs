//! Installs rvmm's replacements for firmware in a machine: the shim's page, breakpoints in place of calls, the timer.

use std::io;
use std::sync::Arc;

use super::load::Code;
use crate::config::{SbiV01, StartMode, TimerChoice, VmConfig};
use crate::error::{Error, VmError};
use crate::hypervisor::{CpuSettings, Hypervisor, SHIM_SLOT, Vm};
use crate::memory::{GuestRam, PAGE, Rom};
use crate::riscv::insn::ECALL;
use crate::riscv::sbi::{self, v01};
use crate::vcpu::Control;
use crate::vcpu::exit::Exit;
use crate::vcpu::firmware::patches::{self, Patches, Wanted};
use crate::vcpu::firmware::sites::{Number, Site};
use crate::vcpu::firmware::timer::UserTimer;
use crate::vcpu::firmware::{Firmware, shim, sites};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::observer::ExitObserver;

/// Maximum size of a file that is searched for calls, unless the user asks for patches: longer ones hold data.
const MAX_CODE: u64 = 16 << 20;

/// Bytes of a file that are searched at a time.
const CHUNK: u64 = 1 << 20;

/// The parts of the machine that exist at this stage.
pub(super) struct Stage<'a> {
    pub(super) config: &'a VmConfig,
    pub(super) host: &'a dyn Hypervisor,
    pub(super) vm: &'a Arc<dyn Vm>,
    pub(super) ram: &'a GuestRam,
    pub(super) control: &'a Arc<Control>,
    pub(super) timebase_hz: u64,
    pub(super) observer: Option<Arc<dyn ExitObserver>>,
}

/// Installs what the configuration asks for in the machine's memory and harts; `None` where it asks for nothing and the guest
/// makes no call that the kernel does not answer. `shim` is the page that it needs in the guest, which stays mapped.
pub(super) fn wire(
    stage: &Stage<'_>,
    harts: &mut [Box<dyn Hart>],
    code: &[Code],
    shim: &mut Option<Rom>,
) -> Result<Option<Firmware>, Error> {
    let config = stage.config;
    let is_bare = config.cpus.mode == StartMode::User || !config.cpus.csrs.is_empty();
    let patches = patch(stage, code)?;
    let is_timed = config.timer == TimerChoice::User;
    if !is_bare && patches.count() == 0 && !is_timed {
        return Ok(None);
    }
    if shim.is_none() {
        let page = Rom::page(&shim::code()).map_err(|e| failed("create the trap shim", e))?;
        stage
            .vm
            .map_rom(SHIM_SLOT, shim::PAGE, page.host_address(), PAGE)
            .map_err(|e| failed("map the trap shim into the guest", e))?;
        *shim = Some(page);
    }
    stage.vm.code_changed().map_err(|e| failed("make changed code visible to the harts", e))?;
    for hart in harts.iter_mut() {
        hart.trap_ebreaks(true)
            .map_err(|e| failed("make the guest's breakpoints exit (KVM_SET_GUEST_DEBUG)", e))?;
    }
    if let Some(boot) = harts.first_mut().filter(|_| is_bare) {
        let mode = u64::from(config.cpus.mode == StartMode::Supervisor);
        for (reg, value) in [(Reg::Csr(Csr::Stvec), shim::VECTOR), (Reg::Mode, mode)] {
            boot.set(reg, value).map_err(|e| failed("prepare the boot hart", e))?;
        }
    }
    let timer = is_timed.then(|| {
        UserTimer::start(
            config.cpus.count,
            stage.timebase_hz,
            stage.control,
            stage.observer.clone(),
        )
    });
    let timer = timer.transpose().map_err(|e| failed("start the timer", e))?.map(Arc::new);
    let csrs = config.cpus.csrs.clone();
    Ok(Some(Firmware::new(patches, csrs, timer)))
}

/// Replaces the guest's calls that the kernel does not answer with breakpoints.
fn patch(stage: &Stage<'_>, code: &[Code]) -> Result<Patches, Error> {
    let choice = stage.config.sbi_v01;
    if choice == SbiV01::Kernel && !kernel_has_v01(stage.host)? {
        return Err(Error::Config(
            "Cannot use --sbi-v01 kernel: this host's kernel has no SBI 0.1 (CONFIG_RISCV_SBI_V01; use auto or patch)".into(),
        ));
    }
    let may_patch = match choice {
        SbiV01::Patch => true,
        // In user mode the guest's calls trap to the shim anyway: its code is not patched.
        SbiV01::Auto => stage.config.cpus.mode != StartMode::User,
        SbiV01::Kernel | SbiV01::Off => false,
    };
    let timer = stage.config.timer == TimerChoice::User;
    let found = search(stage, code, Wanted { v01: may_patch, timer })?;
    // A call whose number is a constant in the code: a number that is moved into a7 may be any, and is no reason to start patching.
    let is_sure =
        |call: &Call| matches!(call.site.number, Number::Constant(number) if sbi::is_v01(number));
    let needs_v01 = found.iter().any(is_sure);
    if choice == SbiV01::Auto
        && !needs_v01
        && found.iter().any(|call| call.site.number.may_be(sbi::is_v01))
    {
        log::info!(
            "The guest has a call function with a variable extension number: if its calls are of SBI 0.1, --sbi-v01 patch answers them"
        );
    }
    let v01 = match choice {
        SbiV01::Auto => may_patch && needs_v01 && !kernel_has_v01(stage.host)?,
        _ => may_patch,
    };
    let (vm, wanted) = (Arc::clone(stage.vm), Wanted { v01, timer });
    let gives_up = choice == SbiV01::Auto && !timer;
    let mut patches = Patches::new(wanted, gives_up, Box::new(move || vm.code_changed()));
    for Call { base, around, site } in found {
        if !patches.insert(stage.ram, base, &around, site).map_err(memory)? {
            log::warn!(
                "The guest's code has more than {} calls: the others are not patched (--sbi-v01, --timer)",
                patches::MOST
            );
            break;
        }
    }
    if patches.count() > 0 {
        log::info!(
            "Replaced {} calls of the guest with breakpoints (--sbi-v01, --timer)",
            patches.count()
        );
    } else {
        warn_nothing_found(choice == SbiV01::Patch, timer);
    }
    Ok(patches)
}

/// Warns of options that have no effect.
fn warn_nothing_found(patch: bool, timer: bool) {
    if patch {
        log::warn!(
            "--sbi-v01 patch has nothing to do: no call of SBI 0.1 was found in the guest's files, so those that it makes are answered with NOT_SUPPORTED. A call is found where its number (0 to 8) is put into a7 shortly before the ecall, as a constant, from another register or from the stack; have the guest do that, or use the debug console (DBCN) of SBI 2.0"
        );
    }
    if timer {
        log::warn!(
            "--timer user has nothing to do: no call that sets the timer was found in the guest's code"
        );
    }
}

/// An `ecall` in guest memory.
struct Call {
    /// The guest-physical address of `around`.
    base: u64,
    /// The call, the code that sets its number, and some bytes after it.
    around: Vec<u8>,
    /// Its place in `around`.
    site: Site,
}

/// The calls in the files that may be `wanted`, in ascending order, at most one more than can be patched.
fn search(stage: &Stage<'_>, code: &[Code], wanted: Wanted) -> Result<Vec<Call>, Error> {
    let is_asked = stage.config.sbi_v01 == SbiV01::Patch;
    let mut found = Vec::new();
    if wanted == (Wanted { v01: false, timer: false }) {
        return Ok(found);
    }
    for Code { region, is_image } in code {
        if !is_asked && *is_image {
            continue;
        }
        if !is_asked && region.size > MAX_CODE {
            log::info!(
                "The file at {region} is too long to be code: it is not searched for calls of SBI 0.1 (--sbi-v01 patch searches it)"
            );
            continue;
        }
        let mut start = 0;
        while start < region.size && found.len() <= patches::MOST {
            // Code before a chunk may set the number of its first call, and a call may end after it.
            let low = start.saturating_sub(sites::REACH as u64);
            let high = start.saturating_add(CHUNK + 8).min(region.size);
            let mut bytes = vec![0; usize::try_from(high - low).unwrap_or(0)];
            stage.ram.read(region.base + low, &mut bytes).map_err(memory)?;
            let chunk = start - low..start - low + CHUNK;
            let sites = sites::find(&bytes).into_iter();
            let sites = sites.filter(|site| chunk.contains(&(site.at as u64)));
            let sites = sites.filter(|site| site.number.may_be(|number| wanted.has(number)));
            found.extend(sites.map(|site| cut(region.base + low, &bytes, site)));
            start += CHUNK;
        }
    }
    found.truncate(patches::MOST + 1);
    Ok(found)
}

/// A call with the bytes around it that belong to it.
fn cut(base: u64, bytes: &[u8], site: Site) -> Call {
    let end = bytes.len().min(site.at + 8);
    let around = bytes.get(site.start..end).unwrap_or_default().to_vec();
    let base = base + site.start as u64;
    Call { base, around, site: Site { at: site.at - site.start, start: 0, ..site } }
}

/// True if the host's kernel passes calls of SBI 0.1 to user space. Its registers say so even where it does not, so a guest tries.
fn kernel_has_v01(host: &dyn Hypervisor) -> Result<bool, Error> {
    /// The address of the guest, three instructions, the last of which stores the answer.
    const AT: u64 = 0x8000_0000;
    // li a7,1; ecall; sd a0,0x100(zero)
    let code = [0x0010_0893, ECALL, 0x10a0_3023].map(u32::to_le_bytes).concat();
    let page =
        Rom::page(&code).map_err(|e| failed("create a page for a guest that tries SBI 0.1", e))?;
    let vm = host.create_vm()?;
    vm.map_rom(0, AT, page.host_address(), PAGE)
        .map_err(|e| failed("map a page into a guest that tries SBI 0.1", e))?;
    let mut hart = vm.create_hart(0, &CpuSettings::default())?;
    hart.set(Reg::Pc, AT).map_err(|e| failed("prepare a hart that tries SBI 0.1", e))?;
    loop {
        match hart.enter() {
            Ok(Exit::Sbi(call)) => return Ok(call.extension == v01::PUTCHAR),
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
    Error::Memory { what: format!("Cannot search the guest's code: {error}"), source: None }
}
