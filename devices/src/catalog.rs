//! The one list of devices, what each takes, and how it is built.

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

/// Every device that rvmm can build. A new one adds its file and a line here.
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

/// A device that was built, or why it was not.
pub type Built = Result<Box<dyn MmioDevice>, BuildError>;

/// A kind of device: its name, its options, what it needs from the board, and its constructor.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// The name in `--device NAME`; lower case, unique in [`CATALOG`].
    pub name: &'static str,
    /// One line for the help, without a full stop.
    pub summary: &'static str,
    /// The options it takes; each does something.
    pub keys: &'static [Key],
    /// Where the board puts it.
    pub placement: Placement,
    /// How many interrupt lines it drives: 0 or 1.
    pub irqs: u32,
    /// Another program does its work, and needs guest RAM as memory that can be shared.
    pub shares_ram: bool,
    /// Builds one from options whose keys are known to be in `keys`; callers use
    /// [`Model::create`], which sees to that.
    pub build: fn(&Options, Wiring) -> Built,
}

/// An option of a model: `name=value` in `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// The name, left of `=`.
    pub name: &'static str,
    /// What the value is, for the help: `SECONDS`.
    pub value: &'static str,
    /// One line for the help, without a full stop.
    pub help: &'static str,
}

/// The option that a device with [`Placement::Slot`] takes beside its own: which slot it stands in. The board reads it.
pub const SLOT: Key = Key {
    name: "slot",
    value: "N",
    help: "the slot to stand in, 0 to 31 (default: the first that is free)",
};

/// Where the board puts a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// At the address that the board's map has under the model's name; at most one in a machine.
    Fixed,
    /// In the slot of the board's map that its option [`SLOT`] names, else in the next free one; as many as there are slots.
    Slot,
    /// Where its option `addr` says; as many as there is room for.
    Asked,
}

/// What a device is connected to. Handed over by value: host ends have one owner.
pub struct Wiring {
    /// The device's interrupt line; [`NoIrq`] where the model has none.
    pub irq: Arc<dyn IrqLine>,
    /// The host's end of the console; without one, output is swallowed and no input comes.
    pub console: Option<Box<dyn ConsoleBackend>>,
    /// Who is told that the guest wants to power off or reset.
    pub power: Arc<dyn PowerSwitch>,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// Guest RAM, for devices that reach into it.
    pub memory: Arc<dyn DmaMemory>,
    /// Who opens the host's ends of devices.
    pub host: Arc<dyn Host>,
    /// Who can put the host's memory into the device's address range.
    pub window: Arc<dyn Window>,
    /// Readable when somebody presses the guest's power button; without one nobody does.
    pub power_button: Option<EventFd>,
    /// Who sets the balloon's target while the guest runs; without one it stays as it was built.
    pub balloon: Option<BalloonControl>,
}

impl Wiring {
    /// Wiring without an interrupt, without a console, RAM and host, on the host's clock.
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

/// Why a device could not be built.
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
    /// An option cannot be used.
    #[error("Device {model}")]
    Option {
        /// The model's name.
        model: &'static str,
        /// What is wrong with it.
        #[source]
        source: OptionError,
    },
    /// The host's end of the device cannot be had.
    #[error("Device {model}")]
    End {
        /// The model's name.
        model: &'static str,
        /// What was to be had, and why it cannot be.
        #[source]
        source: HostError,
    },
    /// The host refused something that the device needs.
    #[error("Device {model}: cannot create its {what}")]
    Host {
        /// The model's name.
        model: &'static str,
        /// What was to be created.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

impl Model {
    /// The model with this name.
    ///
    /// # Errors
    /// [`BuildError::UnknownModel`], which lists the known ones.
    pub fn find(name: &str) -> Result<&'static Self, BuildError> {
        CATALOG.iter().find(|model| model.name == name).ok_or_else(|| BuildError::UnknownModel {
            name: name.to_owned(),
            known: CATALOG.iter().map(|model| model.name).collect::<Vec<_>>().join(", "),
        })
    }

    /// Whether every option is one that the model takes, or the board on its behalf.
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
    /// An option that the model does not know or cannot use, or a descriptor that the host does not
    /// grant.
    pub fn create(&self, options: &Options, wiring: Wiring) -> Built {
        self.check(options).map_err(|source| BuildError::Option { model: self.name, source })?;
        (self.build)(options, wiring)
    }
}
