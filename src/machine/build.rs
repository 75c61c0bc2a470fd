//! The boot story: from a configuration to a board whose harts only have to be let go. One step a line, in the order
//! that KVM and the files impose.

use std::sync::Arc;

use rvmm_devices::virtio::DmaMemory;
use rvmm_devices::virtio::balloon::BalloonControl;
use rvmm_devices::{Bus, Host, Model, Options, Placement, PowerRequest, PowerSwitch};

use super::attach::{Attached, Hookup, attach};
use super::fdt::{Facts, board};
use super::firmware::{self, Stage};
use super::hypervisor::{AiaPlan, CpuKnobs, Hypervisor, Irqchip, RAM_SLOT, Vm};
use super::irqchip::Lines;
use super::load::{Files, Start};
use super::shared_console::SharedConsole;
use crate::button::Button;
use crate::config::{VmConfig, slots};
use crate::error::Error;
use crate::gdb;
use crate::layout::{self, RAM_BASE, Span};
use crate::memory::{GuestRam, Rom};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::observer::{ExitObserver, ObservedHart};
use crate::vcpu::restarts::{self, Restarts};
use crate::vcpu::stop::StopReason;
use crate::vcpu::{Control, Debugger, World};

/// One life of the guest, from reset to stop. A restart drops it and builds the next.
///
/// Fields are dropped in this order: harts and devices let go of the VM before the RAM under it is unmapped.
pub(super) struct Board {
    pub(super) harts: Vec<Box<dyn Hart>>,
    pub(super) world: Arc<World>,
    pub(super) bus: Arc<Bus>,
    pub(super) control: Arc<Control>,
    /// What a debugger shares with the harts, where the machine may have one.
    pub(super) debug_context: Option<Arc<gdb::DebugContext>>,
    pub(super) vm: Arc<dyn Vm>,
    _shim: Option<Rom>,
    _ram: Arc<GuestRam>,
}

/// What outlives a board: the other ends of its devices.
#[derive(Clone)]
pub(super) struct Ends {
    /// Of the first UART.
    pub(super) console: SharedConsole,
    /// Of the first input device.
    pub(super) button: Option<Arc<Button>>,
    /// Of the first balloon.
    pub(super) balloon: BalloonControl,
    /// Who opens those of the others.
    pub(super) host: Arc<dyn Host>,
    /// Who is told of every exit.
    pub(super) observer: Option<Arc<dyn ExitObserver>>,
}

impl Board {
    /// Builds a board of `config`, whose files are open, on `host`, its devices wired to `ends`.
    pub(super) fn build(
        config: &VmConfig,
        files: &Files,
        host: &dyn Hypervisor,
        ends: &Ends,
    ) -> Result<Self, Error> {
        let span = Span { base: RAM_BASE, size: config.mem };
        // Shared memory costs copies of the user's files: it is there only where another program serves a device.
        let is_shared = config.devices.iter().any(|text| is_served_elsewhere(text));
        let ram = if is_shared { GuestRam::shared } else { GuestRam::new };
        let ram = Arc::new(ram(span, config.hugepages)?);
        let vm = host.create_vm()?;
        vm.limit_addresses(reach(config, span));
        vm.map_memory(RAM_SLOT, RAM_BASE, ram.host_address(), config.mem)
            .map_err(|e| no_memory(config.mem, e))?;
        // The first hart made is the boot hart; the in-kernel irqchip wants all harts to exist.
        let mut harts = make_harts(config, vm.as_ref())?;
        let irqchip = vm.create_irqchip(config.irqchip, &aia_plan(config)?)?;
        let cpu = vm.cpu_facts()?;
        let control = Arc::new(Control::new());
        let lines = Lines::new(&vm, irqchip, config.cpus.count, &control)?;
        let power: Arc<dyn PowerSwitch> = Arc::new(SysconPower(Arc::clone(&control)));
        let hookup = Hookup {
            lines: &lines,
            power,
            console: Box::new(ends.console.waking(&control)),
            button: ends.button.as_deref(),
            balloon: &ends.balloon,
            host: Arc::clone(&ends.host),
            ram: span,
            memory: Arc::clone(&ram) as Arc<dyn DmaMemory>,
            vm: &vm,
        };
        let Attached { bus, nodes, roms } = attach(&config.devices, hookup)?;
        let facts = Facts {
            harts: config.cpus.count,
            cpu: &cpu,
            irqchip,
            ram: ram.span(),
            cmdline: &config.boot.cmdline,
        };
        let start = files.load(&config.boot, board(&facts, nodes)?, &ram, &roms)?;
        let opens = point_boot_hart(&mut harts, &start)?;
        let stage = Stage {
            config,
            host,
            vm: &vm,
            ram: &ram,
            control: &control,
            timebase_hz: cpu.timebase_hz,
            observer: ends.observer.clone(),
        };
        let (firmware, shim) = firmware::wire(&stage, &mut harts, &start.code)?.unzip();
        let uart = layout::span("serial")?.base;
        let mut world =
            World::new(Arc::clone(&bus), Arc::clone(&ram), config.unassigned, Some(uart));
        world.firmware = firmware;
        world.timebase_hz = cpu.timebase_hz;
        world.restarts = watch_starts(&vm, harts.len(), irqchip, opens, &control)?;
        let ebreaks = world.firmware.is_some();
        let debug_context =
            config.gdb.as_ref().map(|_| make_post(&control, &ram, &vm, ebreaks)).transpose()?;
        world.debugger =
            debug_context.clone().map(|debug_context| debug_context as Arc<dyn Debugger>);
        if let Some(observer) = &ends.observer {
            let told =
                |hart| Box::new(ObservedHart::new(hart, Arc::clone(observer))) as Box<dyn Hart>;
            harts = harts.into_iter().map(told).collect();
        }
        let world = Arc::new(world);
        Ok(Self { harts, world, bus, control, debug_context, vm, _shim: shim, _ram: ram })
    }
}

/// What a debugger shares with the harts, whose `ebreak`s come out anyway where there are `ebreaks` of others.
fn make_post(
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
        what: "Cannot make what a debugger shares with the harts".into(),
        source,
    })
}

fn is_served_elsewhere(device: &str) -> bool {
    model_of(device).is_some_and(|model| model.shares_ram)
}

fn interrupts_from_a_slot(device: &str) -> bool {
    model_of(device).is_some_and(|model| model.irqs > 0 && model.placement == Placement::Slot)
}

fn model_of(device: &str) -> Option<&'static Model> {
    Model::find(device.split(',').next().unwrap_or_default()).ok()
}

fn make_harts(config: &VmConfig, vm: &dyn Vm) -> Result<Vec<Box<dyn Hart>>, Error> {
    let knobs =
        CpuKnobs { isa: config.cpus.isa.clone(), sbi: config.cpus.sbi.clone(), id: config.cpus.id };
    if config.cpus.count > vm.max_harts() {
        return Err(Error::Config(format!(
            "{} harts are more than this host's KVM allows (--cpus {} at most)",
            config.cpus.count,
            vm.max_harts()
        )));
    }
    (0..config.cpus.count).map(|id| Ok(vm.create_hart(id, &knobs)?)).collect()
}

fn aia_plan(config: &VmConfig) -> Result<AiaPlan, Error> {
    let (aplic, imsics) = (layout::span("aplic")?, layout::span("imsics")?);
    // The kernel looks at all sources at every write to the APLIC, such as the end of each interrupt.
    let sources = layout::last_source(slots::reach(&config.devices)?);
    let in_slots = config.devices.iter().filter(|text| interrupts_from_a_slot(text)).count();
    // Linux gives out identities from 1 on, the first for what harts send each other; simpler guests take sources' numbers for them.
    let identities = layout::sources_in_use(in_slots).saturating_add(1).max(sources);
    Ok(AiaPlan { harts: config.cpus.count, sources, identities, aplic, imsics })
}

/// The first address behind everything: RAM, or a device that its user has put behind it.
fn reach(config: &VmConfig, ram: Span) -> u64 {
    let is_behind = |text: &String| {
        let addr = Options::parse(text).ok().and_then(|options| options.number("addr").ok());
        addr.flatten().is_some_and(|addr| addr >= ram.end())
    };
    if config.devices.iter().any(is_behind) { u64::MAX } else { ram.end() }
}

/// The state in which firmware hands over to a supervisor: a0 = hart id, a1 = device tree, and counters open to user mode. True where
/// the kernel starts harts with them closed.
///
/// A Linux guest whose host lacks Sscofpmf gets no PMU, so nothing in it opens the counters; its C library reads `time`
/// though. KVM opened them up to Linux 6.15. Harts that the guest starts later get theirs by [`Restarts`].
fn point_boot_hart(harts: &mut [Box<dyn Hart>], start: &Start) -> Result<bool, Error> {
    let Some(boot) = harts.first_mut() else {
        return Err(Error::Config("A machine needs at least one hart".into()));
    };
    let failed = |what: &str, source| Error::Host {
        what: format!("Cannot {what} of the boot hart"),
        source,
    };
    let id = u64::from(boot.id());
    let scounteren = Reg::Csr(Csr::Scounteren);
    let counters = boot.get(scounteren).map_err(|e| failed("read scounteren", e))?;
    for (reg, value) in [
        (Reg::Pc, start.entry),
        (Reg::X(10), id),
        (Reg::X(11), start.fdt),
        (scounteren, restarts::COUNTERS),
    ] {
        boot.set(reg, value).map_err(|e| failed(&format!("set {reg:?}"), e))?;
    }
    Ok(counters == 0)
}

/// Who gives harts what the kernel leaves out when it starts them; nobody where it leaves nothing out. (With the in-kernel
/// interrupt controller a guest does not suspend itself, and its lines are the kernel's.)
fn watch_starts(
    vm: &Arc<dyn Vm>,
    harts: usize,
    irqchip: Irqchip,
    opens: bool,
    control: &Arc<Control>,
) -> Result<Option<Restarts>, Error> {
    let failed = |source| Error::Host { what: "Cannot watch harts start".into(), source };
    if !opens && matches!(irqchip, Irqchip::Aia(_)) {
        return Ok(None);
    }
    let mut counters = vm.counters();
    counters.sort_by_key(|counters| counters.hart());
    let exits: Result<Vec<_>, _> = counters.iter().map(|counters| counters.exits()).collect();
    let exits = exits.ok().filter(|exits| exits.len() == harts).unwrap_or_else(|| {
        if opens && harts > 1 {
            log::warn!(
                "This host's KVM does not count exits, so nobody sees the guest start harts: user mode may not read the time on all but the first"
            );
        }
        Vec::new()
    });
    Restarts::watch(exits, opens, control).map(Some).map_err(failed)
}

fn no_memory(size: u64, source: std::io::Error) -> Error {
    Error::Memory {
        what: format!("Cannot give the guest {} MiB of memory", size >> 20),
        source: Some(source),
    }
}

/// The far end of the power device: what the guest writes there ends the machine.
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
