//! Builds a board from a configuration, up to harts that only have to be started. One step a line, in the order that
//! KVM and the files require.

use std::sync::Arc;

use rvmm_boot::Region;
use rvmm_boot::fdt::DeviceNode;
use rvmm_devices::virtio::DmaMemory;
use rvmm_devices::virtio::balloon::BalloonControl;
use rvmm_devices::{
    Bus, ConsoleBackend, DeviceConfig, GenerationControl, Host, NullConsole, Placement,
    PowerRequest, PowerSwitch,
};

use super::attach::{Attached, Connections, attach};
use super::fdt::{Facts, board};
use super::firmware::{self, Stage};
use super::irqchip::Lines;
use super::load::{Files, Start};
use super::origin::Filling;
use super::waking_console::WakingConsole;
use crate::button::Button;
use crate::config::{ValidConfig, VmConfig};
use crate::error::Error;
use crate::gdb;
use crate::hypervisor::{AiaPlan, CpuSettings, Hypervisor, Irqchip, RAM_SLOT, Vm};
use crate::layout::{self, RAM_BASE, Span};
use crate::memory::{GuestRam, Rom};
use crate::vcpu::firmware::Firmware;
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::observer::{ExitObserver, ObservedHart};
use crate::vcpu::restarts::{self, Restarts};
use crate::vcpu::stop::StopReason;
use crate::vcpu::{Control, Debugger, MachineContext};

/// The parts of a machine that stay when the guest is reset.
///
/// Fields are dropped in this order: devices release the VM before its RAM is unmapped.
pub(super) struct Board {
    pub(super) bus: Arc<Bus>,
    pub(super) control: Arc<Control>,
    pub(super) vm: Arc<dyn Vm>,
    pub(super) irqchip: Irqchip,
    nodes: Vec<DeviceNode>,
    /// The ranges that devices map as guest memory.
    roms: Vec<Region>,
    shim: Option<Rom>,
    pub(super) ram: Arc<GuestRam>,
}

/// One run of the guest, from reset to stop.
pub(super) struct Run {
    pub(super) harts: Vec<Box<dyn Hart>>,
    pub(super) context: Arc<MachineContext>,
    /// The state that a debugger shares with the harts, where one is configured.
    pub(super) debug_context: Option<Arc<gdb::DebugContext>>,
    /// What fills the memory of a restored machine meanwhile.
    pub(super) filling: Option<Filling>,
}

/// What is known of a run before its harts are connected.
pub(super) struct RunFacts {
    /// Ticks of the guest's `time` per second.
    pub(super) timebase_hz: u64,
    /// The kernel starts harts with counters that user mode cannot read.
    pub(super) opens_counters: bool,
    /// Emulated firmware, if the guest needs it.
    pub(super) firmware: Option<Firmware>,
}

/// The machine's connections to the host, besides the files that the guest starts from.
pub(super) struct Backends {
    /// Of the first UART; connected once.
    pub(super) console: Option<Box<dyn ConsoleBackend>>,
    /// Of the first input device.
    pub(super) button: Option<Arc<Button>>,
    /// Of the first balloon.
    pub(super) balloon: BalloonControl,
    /// Of the generation ID.
    pub(super) generation: GenerationControl,
    /// Opens those of the others.
    pub(super) host: Arc<dyn Host>,
    /// Receives every exit of every hart.
    pub(super) observer: Option<Arc<dyn ExitObserver>>,
}

impl Board {
    /// Allocates the memory of a board of `config`.
    pub(super) fn ram(config: &VmConfig) -> Result<Arc<GuestRam>, Error> {
        let span = Span { base: RAM_BASE, size: config.mem };
        // Shared memory costs copies of the user's files: it is used only where another program serves a device.
        let is_shared = config.devices.iter().any(|device| device.model().shares_ram);
        let ram = if is_shared { GuestRam::shared } else { GuestRam::new };
        ram(span, config.hugepages).map(Arc::new)
    }

    /// Builds a board of `config` on `host`, with this memory, its devices connected to `backends`. Its harts have not run.
    pub(super) fn build(
        config: &ValidConfig,
        host: &dyn Hypervisor,
        backends: &mut Backends,
        control: &Arc<Control>,
        ram: Arc<GuestRam>,
    ) -> Result<(Self, Vec<Box<dyn Hart>>), Error> {
        let span = ram.span();
        let vm = host.create_vm()?;
        vm.limit_addresses(reach(config, span));
        vm.map_memory(RAM_SLOT, RAM_BASE, ram.host_address(), config.mem)
            .map_err(|e| cannot_map(config.mem, e))?;
        let (harts, irqchip) = make_harts(config, vm.as_ref())?;
        let lines = Lines::new(&vm, irqchip, config.cpus.count, control)?;
        let power: Arc<dyn PowerSwitch> = Arc::new(SysconPower(Arc::clone(control)));
        let console = backends.console.take().unwrap_or_else(|| Box::new(NullConsole));
        let connections = Connections {
            lines: &lines,
            power,
            console: Box::new(WakingConsole::new(console, control)),
            button: backends.button.as_deref(),
            balloon: &backends.balloon,
            generation: &backends.generation,
            host: Arc::clone(&backends.host),
            ram: span,
            memory: Arc::clone(&ram) as Arc<dyn DmaMemory>,
            vm: &vm,
        };
        let Attached { bus, nodes, roms } = attach(config, connections)?;
        let control = Arc::clone(control);
        Ok((Self { bus, control, vm, irqchip, nodes, roms, shim: None, ram }, harts))
    }

    /// Resets everything but the host's side: devices, memory, the VM. The harts of the last run are dropped, its threads have ended, and
    /// the devices are at rest. Returns new harts, which have not run.
    pub(super) fn reset(&self, config: &ValidConfig) -> Result<Vec<Box<dyn Hart>>, Error> {
        self.bus.reset();
        self.vm.reset()?;
        self.ram.clear()?;
        let (harts, irqchip) = make_harts(config, self.vm.as_ref())?;
        if irqchip != self.irqchip {
            let what =
                "The host's interrupt controller is another one than when the machine was built";
            return Err(Error::Config(what.into()));
        }
        Ok(harts)
    }

    /// Loads the files and prepares the harts for a run.
    pub(super) fn load(
        &mut self,
        config: &ValidConfig,
        files: &Files,
        host: &dyn Hypervisor,
        backends: &Backends,
        mut harts: Vec<Box<dyn Hart>>,
    ) -> Result<Run, Error> {
        let cpu = self.vm.cpu_facts()?;
        let facts = Facts {
            harts: config.cpus.count,
            cpu: &cpu,
            irqchip: self.irqchip,
            ram: self.ram.span(),
            cmdline: &config.boot.cmdline,
        };
        let tree = board(&facts, self.nodes.clone())?;
        let start = files.load(&config.boot, tree, &self.ram, &self.roms)?;
        let opens_counters = prepare_boot_hart(&mut harts, &start)?;
        let stage = Stage {
            config,
            host,
            vm: &self.vm,
            ram: &self.ram,
            control: &self.control,
            timebase_hz: cpu.timebase_hz,
            observer: backends.observer.clone(),
        };
        let firmware = firmware::wire(&stage, &mut harts, &start.code, &mut self.shim)?;
        let facts = RunFacts { timebase_hz: cpu.timebase_hz, opens_counters, firmware };
        self.connect(config, backends, harts, facts)
    }

    /// Connects the harts of a run to what they need besides themselves.
    pub(super) fn connect(
        &self,
        config: &ValidConfig,
        backends: &Backends,
        mut harts: Vec<Box<dyn Hart>>,
        facts: RunFacts,
    ) -> Result<Run, Error> {
        let RunFacts { timebase_hz, opens_counters, firmware } = facts;
        let uart = layout::span("serial")?.base;
        let (bus, ram) = (Arc::clone(&self.bus), Arc::clone(&self.ram));
        let mut context = MachineContext::new(bus, ram, config.unassigned, Some(uart));
        context.firmware = firmware;
        context.timebase_hz = timebase_hz;
        context.restarts =
            watch_starts(&self.vm, harts.len(), self.irqchip, opens_counters, &self.control)?;
        let ebreaks = context.firmware.is_some();
        let debug_context = config
            .gdb
            .as_ref()
            .map(|_| create_debug_context(&self.control, &self.ram, &self.vm, ebreaks))
            .transpose()?;
        context.debugger =
            debug_context.clone().map(|debug_context| debug_context as Arc<dyn Debugger>);
        if let Some(observer) = &backends.observer {
            let observed =
                |hart| Box::new(ObservedHart::new(hart, Arc::clone(observer))) as Box<dyn Hart>;
            harts = harts.into_iter().map(observed).collect();
        }
        Ok(Run { harts, context: Arc::new(context), debug_context, filling: None })
    }
}

/// Creates the state that a debugger shares with the harts. With `ebreaks` every `ebreak` of the guest exits anyway.
fn create_debug_context(
    control: &Arc<Control>,
    ram: &Arc<GuestRam>,
    vm: &Arc<dyn Vm>,
    ebreaks: bool,
) -> Result<Arc<gdb::DebugContext>, Error> {
    let vm = Arc::clone(vm);
    let sync_code = Box::new(move || vm.code_changed());
    let debug_context =
        gdb::DebugContext::new(Arc::clone(control), Arc::clone(ram), sync_code, ebreaks);
    debug_context.map(Arc::new).map_err(|source| Error::Host {
        what: "Cannot create the debugger's event descriptor".into(),
        source,
    })
}

fn interrupts_from_a_slot(device: &DeviceConfig) -> bool {
    device.model().irqs > 0 && device.model().placement == Placement::Slot
}

/// Creates the harts and the irqchip. The first hart created is the boot hart; the in-kernel irqchip requires all harts to exist.
fn make_harts(config: &ValidConfig, vm: &dyn Vm) -> Result<(Vec<Box<dyn Hart>>, Irqchip), Error> {
    let knobs = CpuSettings {
        isa: config.cpus.isa.clone(),
        sbi: config.cpus.sbi.clone(),
        id: config.cpus.id,
    };
    if config.cpus.count > vm.max_harts() {
        return Err(Error::Config(format!(
            "{} harts are more than this host's KVM allows (--cpus {} at most)",
            config.cpus.count,
            vm.max_harts()
        )));
    }
    let harts: Result<_, Error> =
        (0..config.cpus.count).map(|id| Ok(vm.create_hart(id, &knobs)?)).collect();
    let harts = harts?;
    Ok((harts, vm.create_irqchip(config.irqchip, &aia_plan(config)?)?))
}

fn aia_plan(config: &ValidConfig) -> Result<AiaPlan, Error> {
    let (aplic, imsics) = (layout::span("aplic")?, layout::span("imsics")?);
    // The kernel scans all sources at every write to the APLIC, such as the end of each interrupt.
    let sources = layout::last_source(config.slot_reach());
    let in_slots = config.devices.iter().filter(|device| interrupts_from_a_slot(device)).count();
    // Linux allocates identities from 1 on, the first for inter-processor interrupts; simpler guests use the numbers of the sources.
    let identities = layout::sources_in_use(in_slots).saturating_add(1).max(sources);
    Ok(AiaPlan { harts: config.cpus.count, sources, identities, aplic, imsics })
}

/// The first address after RAM and all devices; the maximum where the user has placed a device above RAM.
fn reach(config: &VmConfig, ram: Span) -> u64 {
    let is_behind = |device: &DeviceConfig| device.addr().is_some_and(|addr| addr >= ram.end());
    if config.devices.iter().any(is_behind) { u64::MAX } else { ram.end() }
}

/// Sets the state in which firmware enters a supervisor: a0 = hart id, a1 = device tree, and counters readable in user mode. True if
/// the kernel starts harts with counters that are not.
///
/// A Linux guest whose host lacks Sscofpmf has no PMU driver, so it never enables the counters, but its C library reads `time`.
/// KVM enabled them up to Linux 6.15. On harts that the guest starts later [`Restarts`] does.
fn prepare_boot_hart(harts: &mut [Box<dyn Hart>], start: &Start) -> Result<bool, Error> {
    let Some(boot) = harts.first_mut() else {
        return Err(Error::Config("A machine needs at least one hart".into()));
    };
    let failed = |what: &str, source| Error::Host {
        what: format!("Cannot {what} of the boot hart"),
        source,
    };
    let id = u64::from(boot.id());
    let opens_counters = has_closed_counters(boot.as_ref())?;
    for (reg, value) in [
        (Reg::Pc, start.entry),
        (Reg::X(10), id),
        (Reg::X(11), start.fdt),
        (Reg::Csr(Csr::Scounteren), restarts::COUNTERS),
    ] {
        boot.set(reg, value).map_err(|e| failed(&format!("set {reg:?}"), e))?;
    }
    Ok(opens_counters)
}

/// True if the kernel has created the hart with counters that user mode cannot read, as it starts others.
pub(super) fn has_closed_counters(hart: &dyn Hart) -> Result<bool, Error> {
    let counters = hart.get(Reg::Csr(Csr::Scounteren)).map_err(|source| Error::Host {
        what: format!("Cannot read scounteren of hart {}", hart.id()),
        source,
    })?;
    Ok(counters == 0)
}

/// Starts the thread that sets in harts what the kernel leaves out when it starts them; `None` where it leaves nothing out. (With the
/// in-kernel interrupt controller a guest does not suspend itself, and its lines are the kernel's.)
fn watch_starts(
    vm: &Arc<dyn Vm>,
    harts: usize,
    irqchip: Irqchip,
    opens_counters: bool,
    control: &Arc<Control>,
) -> Result<Option<Restarts>, Error> {
    let failed = |source| Error::Host { what: "Cannot watch for hart starts".into(), source };
    if !opens_counters && matches!(irqchip, Irqchip::Aia(_)) {
        return Ok(None);
    }
    let mut counters = vm.counters();
    counters.sort_by_key(|counters| counters.hart());
    let exits: Result<Vec<_>, _> = counters.iter().map(|counters| counters.exits()).collect();
    let exits = exits.ok().filter(|exits| exits.len() == harts).unwrap_or_else(|| {
        if opens_counters && harts > 1 {
            log::warn!(
                "This host's KVM does not count exits, so rvmm cannot detect that the guest starts harts: user mode may not be able to read the time on any hart but the first"
            );
        }
        Vec::new()
    });
    Restarts::watch(exits, opens_counters, control).map(Some).map_err(failed)
}

fn cannot_map(size: u64, source: std::io::Error) -> Error {
    Error::Memory {
        what: format!("Cannot map {} MiB of guest memory", size >> 20),
        source: Some(source),
    }
}

/// The backend of the power device: the guest's writes stop the machine.
struct SysconPower(Arc<Control>);

impl PowerSwitch for SysconPower {
    fn request(&self, request: PowerRequest) {
        self.0.stop(match request {
            PowerRequest::Off => StopReason::PowerOff,
            PowerRequest::Reset => StopReason::Reset,
            PowerRequest::Fail(code) => StopReason::GuestFailure(code),
        });
    }
}
