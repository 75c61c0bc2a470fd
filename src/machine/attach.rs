//! Attaches devices to the bus: the board's own and the user's, each with its address, its interrupt and its tree node.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rvmm_boot::Region;
use rvmm_boot::fdt::{DeviceNode, Node, Property, Value};
use rvmm_devices::flash::Window;
use rvmm_devices::virtio::balloon::BalloonControl;
use rvmm_devices::virtio::{DmaMemory, VirtioMmio};
use rvmm_devices::{
    BuildError, Bus, ConsoleBackend, Device, DeviceConfig, FdtDesc, FdtProperty, FdtValue,
    GenerationControl, Host, Interrupt, MmioDevice, Placement, PowerSwitch, Wiring,
};

use super::irqchip::Lines;
use crate::button::Button;
use crate::config::ValidConfig;
use crate::error::Error;
use crate::hypervisor::{FIRST_WINDOW_SLOT, Vm};
use crate::layout::{self, SLOT_SIZE, SLOTS, Span};

/// The bus with all devices, and their device tree nodes.
pub(super) struct Attached {
    pub(super) bus: Arc<Bus>,
    pub(super) nodes: Vec<DeviceNode>,
    /// The ranges that devices map as guest memory from the start.
    pub(super) roms: Vec<Region>,
}

/// The parts of the machine that devices are connected to.
pub(super) struct Connections<'a> {
    pub(super) lines: &'a Lines,
    pub(super) power: Arc<dyn PowerSwitch>,
    /// The backend of the first UART.
    pub(super) console: Box<dyn ConsoleBackend>,
    /// The backend of the first input device.
    pub(super) button: Option<&'a Button>,
    /// Sets the target of the first balloon.
    pub(super) balloon: &'a BalloonControl,
    /// Renews the generation ID.
    pub(super) generation: &'a GenerationControl,
    /// Opens the backends of the other devices.
    pub(super) host: Arc<dyn Host>,
    /// The address range of guest RAM.
    pub(super) ram: Span,
    /// Guest RAM, for devices with DMA.
    pub(super) memory: Arc<dyn DmaMemory>,
    /// Handles ioeventfds without an exit, and maps guest memory.
    pub(super) vm: &'a Arc<dyn Vm>,
}

/// A device to be created: its configuration and its address.
struct DevicePlan {
    device: DeviceConfig,
    label: String,
    base: u64,
    irq: u32,
}

/// Creates the board's devices and those of the configuration on a bus.
pub(super) fn attach(config: &ValidConfig, machine: Connections<'_>) -> Result<Attached, Error> {
    let (mut console, mut button) = (Some(machine.console), machine.button);
    let mut balloon = Some(machine.balloon);
    let mut devices: Vec<(u64, Box<dyn MmioDevice>)> = Vec::new();
    let mut nodes = Vec::new();
    let slots = Arc::new(AtomicU32::new(FIRST_WINDOW_SLOT));
    let roms = Arc::new(Mutex::new(Vec::new()));
    for plan in plan(config)? {
        let mut wiring = Wiring::new(Arc::clone(&machine.power));
        wiring.memory = Arc::clone(&machine.memory);
        wiring.host = Arc::clone(&machine.host);
        wiring.window = Arc::new(DeviceWindow {
            vm: Arc::clone(machine.vm),
            base: plan.base,
            slots: Arc::clone(&slots),
            mapped: Arc::downgrade(&roms),
        });
        if plan.irq != 0 {
            wiring.irq = machine.lines.source(plan.irq)?;
        }
        match plan.device {
            DeviceConfig::Serial(_) => wiring.console = console.take(),
            DeviceConfig::Balloon(_) => wiring.balloon = balloon.take().cloned(),
            DeviceConfig::VmGenId(_) => wiring.generation = Some(machine.generation.clone()),
            DeviceConfig::Input(_) => {
                let event = button.take().map(Button::device_event).transpose();
                wiring.power_button = event.map_err(|source| Error::Host {
                    what: "Cannot connect the power button".into(),
                    source,
                })?;
            }
            _ => {}
        }
        let irq = Arc::clone(&wiring.irq);
        let device = match plan.device.build(wiring).map_err(not_built)? {
            Device::Mmio(device) => device,
            Device::Virtio(device) => {
                let (memory, interrupt) = (Arc::clone(&machine.memory), Interrupt::Line(irq));
                Box::new(VirtioMmio::create(device, memory, interrupt).map_err(not_built)?)
            }
        };
        for ioevent in device.ioeventfds() {
            machine.vm.register_ioeventfd(plan.base, ioevent)?;
        }
        check_place(&plan, device.size(), &machine.ram)?;
        nodes.extend(device.fdt().map(|desc| node(&plan, device.size(), desc)));
        devices.push((plan.base, device));
    }
    devices.push(machine.lines.registers()?);
    let bus = Bus::new(devices).map_err(refused)?;
    let roms = std::mem::take(&mut *roms.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Attached { bus: Arc::new(bus), nodes, roms })
}

fn plan(config: &ValidConfig) -> Result<Vec<DevicePlan>, Error> {
    let mut plans = Vec::new();
    for default in DeviceConfig::built_in() {
        let model = default.model();
        let given = config.devices.iter().find(|device| device.model().name == model.name);
        let row = layout::find(model.name).ok_or_else(|| no_address(&default))?;
        plans.push(DevicePlan {
            device: given.cloned().unwrap_or(default),
            label: model.name.into(),
            base: row.span.base,
            irq: row.irq,
        });
    }
    for (device, slot) in config.placed_devices() {
        let model = device.model();
        let (label, base, irq) = match model.placement {
            Placement::Fixed => continue,
            Placement::AtAddress => {
                let base = device.addr().ok_or_else(|| no_address(device))?;
                (format!("{}{base:x}", model.name), base, 0)
            }
            Placement::Slot => {
                let place = slot.and_then(|slot| Some((slot, layout::slot_irqs().nth(slot)?)));
                let (slot, irq) = place.ok_or_else(|| no_address(device))?;
                let base = SLOTS.base + slot as u64 * SLOT_SIZE;
                (format!("{}{slot}", model.name), base, if model.irqs == 0 { 0 } else { irq })
            }
        };
        plans.push(DevicePlan { device: device.clone(), label, base, irq });
    }
    Ok(plans)
}

fn no_address(device: &DeviceConfig) -> Error {
    Error::Device(format!("Device {} has no address in the memory map", device.model().name))
}

/// Refuses a device that overlaps RAM: the guest would access RAM there, whatever is on the bus.
fn check_place(plan: &DevicePlan, size: u64, ram: &Span) -> Result<(), Error> {
    let end = plan.base.checked_add(size);
    if end.is_some_and(|end| end <= ram.base) || plan.base >= ram.end() {
        return Ok(());
    }
    Err(Error::Device(format!(
        "Device {} at {:#x} ({size:#x} bytes) overlaps guest RAM, which begins at {:#x} (use another addr)",
        plan.device.model().name,
        plan.base,
        ram.base
    )))
}

/// A device's address range on the board.
struct DeviceWindow {
    vm: Arc<dyn Vm>,
    base: u64,
    /// The VM's next free memory slot.
    slots: Arc<AtomicU32>,
    /// The ranges that are mapped before the guest starts; dropped afterwards.
    mapped: Weak<Mutex<Vec<Region>>>,
}

impl Window for DeviceWindow {
    fn map(&self, offset: u64, host_address: u64, len: u64) -> io::Result<()> {
        let slot = self.slots.fetch_add(1, Relaxed);
        let addr = self.base.checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
        self.vm.map_rom(slot, addr, host_address, len)?;
        if let Some(mapped) = self.mapped.upgrade() {
            let mut mapped = mapped.lock().unwrap_or_else(PoisonError::into_inner);
            mapped.push(Region::new(addr, len));
        }
        Ok(())
    }
}

fn not_built(error: BuildError) -> Error {
    match error {
        BuildError::Backend { model, source } => match source.into_parts() {
            (what, Some(source)) => Error::Host { what: format!("Device {model}: {what}"), source },
            (what, None) => Error::Device(format!("Device {model}: {what}")),
        },
        BuildError::Host { model, what, source } => {
            Error::Host { what: format!("Device {model}: cannot create its {what}"), source }
        }
        BuildError::Option { model, source } => Error::Device(format!("Device {model}: {source}")),
    }
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::Device(error.to_string())
}

fn node(plan: &DevicePlan, size: u64, desc: FdtDesc) -> DeviceNode {
    let mut properties = vec![Property::strings("compatible", &desc.compatible)];
    properties.extend(desc.properties.into_iter().map(|p| property(p, &plan.label)));
    let companions = desc.companions.into_iter().map(|companion| Node {
        name: companion.name.into(),
        properties: companion.properties.into_iter().map(|p| property(p, &plan.label)).collect(),
    });
    DeviceNode {
        label: plan.label.clone(),
        address: plan.base,
        size,
        irqs: if plan.irq == 0 { Vec::new() } else { vec![plan.irq] },
        node: Node { name: desc.name.into(), properties },
        companions: companions.collect(),
    }
}

fn property(property: FdtProperty, owner: &str) -> Property {
    let value = match property.value {
        FdtValue::Empty => Value::Empty,
        FdtValue::U32(cells) => Value::U32(cells),
        FdtValue::Strings(strings) => Value::Strings(strings.into_iter().map(Into::into).collect()),
        FdtValue::ThisDevice => Value::Phandle(owner.into()),
    };
    Property::new(property.name, value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VmConfig;

    fn places(devices: &[&str]) -> Vec<(String, u64, u32)> {
        let mut config = VmConfig::default();
        config.boot.kernel = Some("Image".into());
        config.devices = devices.iter().map(|text| DeviceConfig::parse(text).unwrap()).collect();
        let slotted = |plan: &DevicePlan| plan.device.model().placement == Placement::Slot;
        let plans = plan(&config.validate().unwrap()).unwrap().into_iter().filter(slotted);
        plans.map(|plan| (plan.label, plan.base, plan.irq)).collect()
    }

    #[test]
    fn a_device_takes_the_slot_that_it_is_given_and_the_irq_of_that_slot() {
        let places = places(&["rng", "rng,slot=7", "rng,slot=9", "rng"]);
        let expected = [
            ("rng0", 0x1000_1000, 1),
            ("rng7", 0x1000_8000, 8),
            ("rng9", 0x1000_a000, 13),
            ("rng1", 0x1000_2000, 2),
        ];
        let expected = expected.map(|(label, base, irq)| (label.to_owned(), base, irq));
        assert_eq!(places, expected);
    }
}
