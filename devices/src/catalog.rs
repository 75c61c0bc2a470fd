//! The entry of a device model in the catalog: options and requirements; and the connections with which a device is built.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::config::CATALOG;
use crate::console::ConsoleBackend;
use crate::device::MmioDevice;
use crate::flash::{NoWindow, Window};
use crate::host::{Host, HostError, NoHost};
use crate::irq::{IrqLine, NoIrq};
use crate::options::OptionError;
use crate::power::PowerSwitch;
use crate::rtc::{Clock, WallClock};
use crate::virtio::balloon::BalloonControl;
use crate::virtio::{DmaMemory, GuestMemoryMmap, VirtioDevice};
use crate::vmgenid::GenerationControl;

/// A device that is not on a bus yet.
pub enum Device {
    /// A device with registers in guest-physical memory.
    Mmio(Box<dyn MmioDevice>),
    /// A virtio device, which needs a transport: [`VirtioMmio`](crate::virtio::VirtioMmio).
    Virtio(Box<dyn VirtioDevice>),
}

/// The result of building a device.
pub type Built = Result<Device, BuildError>;

/// A kind of device: its name, its options, and its requirements on the board.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// The name in `--device NAME`; lower case, unique in [`CATALOG`].
    pub name: &'static str,
    /// One line for the help, without a full stop.
    pub summary: &'static str,
    /// The options it takes; none is without effect.
    pub keys: &'static [Key],
    /// The way the board chooses its address.
    pub placement: Placement,
    /// Number of interrupt lines it drives: 0 or 1.
    pub irqs: u32,
    /// True if another program implements it, which needs guest RAM to be shared memory.
    pub shares_ram: bool,
}

/// An option of a model: `name=value` in `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// The name, left of `=`.
    pub name: &'static str,
    /// Placeholder of the value in the help: `SECONDS`.
    pub value: &'static str,
    /// One line for the help, without a full stop.
    pub help: &'static str,
}

/// The option for the slot of a device with [`Placement::Slot`], in addition to the model's own. The board evaluates it.
pub const SLOT: Key = Key {
    name: "slot",
    value: "N",
    help: "the slot on the board, 0 to 31 (default: the first free one)",
};

/// The way the board chooses a device's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// At the address that the board's map has under the model's name; at most one in a machine.
    Fixed,
    /// In the slot of the board's map given by its option [`SLOT`], else in the next free one; at most one per slot.
    Slot,
    /// At the address of its option `addr`; any number, as long as they do not overlap.
    AtAddress,
}

/// The connections of a device to the board and the host. Passed by value: backends have one owner.
pub struct Wiring {
    /// The interrupt line of a device without a transport of its own; [`NoIrq`] if the model has none.
    pub irq: Arc<dyn IrqLine>,
    /// The backend of the console; without one, output is discarded and there is no input.
    pub console: Option<Box<dyn ConsoleBackend>>,
    /// Receives the guest's requests to power off or reset.
    pub power: Arc<dyn PowerSwitch>,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// Guest RAM, for devices that do DMA.
    pub memory: Arc<dyn DmaMemory>,
    /// Opens the backends of devices.
    pub host: Arc<dyn Host>,
    /// Maps host memory into the device's address range.
    pub window: Arc<dyn Window>,
    /// Readable when the guest's power button is pressed; without one it never is.
    pub power_button: Option<EventFd>,
    /// Changes the balloon's target while the guest runs; without one the target stays as configured.
    pub balloon: Option<BalloonControl>,
    /// Renews the generation ID; without one it stays the same.
    pub generation: Option<GenerationControl>,
}

impl Wiring {
    /// Wiring without an interrupt, console, RAM or host, with the host's clock.
    #[must_use]
    pub fn new(power: Arc<dyn PowerSwitch>) -> Self {
        Self {
            irq: Arc::new(NoIrq),
            console: None,
            power,
            clock: Arc::new(WallClock),
            memory: Arc::new(GuestMemoryMmap::new()),
            host: Arc::new(NoHost),
            window: Arc::new(NoWindow),
            power_button: None,
            balloon: None,
            generation: None,
        }
    }
}

/// An error while building a device.
#[derive(Debug, Error)]
pub enum BuildError {
    /// Options exclude each other.
    #[error("Device {model}")]
    Option {
        /// The model's name.
        model: &'static str,
        /// The error of the option.
        #[source]
        source: OptionError,
    },
    /// The backend of the device is not available.
    #[error("Device {model}")]
    Backend {
        /// The model's name.
        model: &'static str,
        /// The backend, and the reason.
        #[source]
        source: HostError,
    },
    /// The host failed to create a resource of the device.
    #[error("Device {model}: cannot create its {what}")]
    Host {
        /// The model's name.
        model: &'static str,
        /// The resource.
        what: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

impl Model {
    /// Returns the model with this name.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        CATALOG.iter().find(|model| model.name == name)
    }

    /// The model's options, and [`SLOT`] for a device in a slot.
    #[must_use]
    pub fn all_keys(&self) -> Vec<Key> {
        let boards: &[Key] = if self.placement == Placement::Slot { &[SLOT] } else { &[] };
        [self.keys, boards].concat()
    }
}
