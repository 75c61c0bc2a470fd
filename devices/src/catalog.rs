//! The list of all device models: options, requirements and constructor of each.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::console::ConsoleBackend;
use crate::device::MmioDevice;
use crate::flash::{NoWindow, Window};
use crate::host::{Host, HostError, NoHost};
use crate::irq::{IrqLine, NoIrq};
use crate::options::{OptionError, Options};
use crate::power::PowerSwitch;
use crate::rtc::{Clock, WallClock};
use crate::virtio::balloon::BalloonControl;
use crate::virtio::{DmaMemory, GuestMemoryMmap};

/// Every device model of rvmm. A new one adds its file and a line here.
pub const CATALOG: &[Model] = &[
    crate::serial::MODEL,
    crate::serial::UART,
    crate::rtc::MODEL,
    crate::power::MODEL,
    crate::constant::MODEL,
    crate::flash::MODEL,
    crate::virtio::rng::MODEL,
    crate::virtio::blk::MODEL,
    crate::virtio::net::MODEL,
    crate::virtio::vsock::MODEL,
    crate::virtio::input::MODEL,
    crate::virtio::balloon::MODEL,
    crate::virtio::console::MODEL,
    crate::virtio::vhost_user::fs::MODEL,
    crate::virtio::vhost_user::net::USER,
    crate::virtio::vhost_user::net::MODEL,
    crate::virtio::vhost_user::blk::MODEL,
    crate::virtio::vhost_user::vsock::MODEL,
];

/// The result of building a device.
pub type Built = Result<Box<dyn MmioDevice>, BuildError>;

/// A kind of device: its name, its options, what it needs from the board, and its constructor.
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
    /// Builds one from options whose keys are all in `keys`; callers use
    /// [`Model::create`], which checks that.
    pub build: fn(&Options, Wiring) -> Built,
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
    /// The device's interrupt line; [`NoIrq`] if the model has none.
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
        }
    }
}

/// An error while building a device.
#[derive(Debug, Error)]
pub enum BuildError {
    /// No model has this name.
    #[error("Unknown device {name:?} (known: {known})")]
    UnknownModel {
        /// The name as given.
        name: String,
        /// The names of the catalog.
        known: String,
    },
    /// An option is invalid.
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
    ///
    /// # Errors
    /// [`BuildError::UnknownModel`], which lists the known ones.
    pub fn find(name: &str) -> Result<&'static Self, BuildError> {
        CATALOG.iter().find(|model| model.name == name).ok_or_else(|| BuildError::UnknownModel {
            name: name.to_owned(),
            known: CATALOG.iter().map(|model| model.name).collect::<Vec<_>>().join(", "),
        })
    }

    /// Checks that every option is one of the model or, for a device in a slot, [`SLOT`].
    ///
    /// # Errors
    /// [`OptionError::UnknownKey`], which lists the known ones.
    pub fn check(&self, options: &Options) -> Result<(), OptionError> {
        let boards: &[Key] = if self.placement == Placement::Slot { &[SLOT] } else { &[] };
        options.check(&[self.keys, boards].concat())
    }

    /// Builds a device of this model.
    ///
    /// # Errors
    /// [`BuildError`] for an unknown or invalid option, a backend that is not available, or a resource
    /// that the host cannot create.
    pub fn create(&self, options: &Options, wiring: Wiring) -> Built {
        self.check(options).map_err(|source| BuildError::Option { model: self.name, source })?;
        (self.build)(options, wiring)
    }
}
