//! The typed configuration of every device: the same types for JSON and for `NAME,key=value,...`.
//!
//! | file | contents |
//! |---|---|
//! | `mod.rs` | [`DeviceConfig`]: one variant per model, and [`CATALOG`] |
//! | `path.rs` | [`FilePath`] |
//! | `endpoint.rs` | [`Endpoint`]: the host end of a console |
//! | `number.rs`, `text.rs` | numbers within bounds, texts with a form |

use std::ffi::OsStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{BuildError, Built, Model, Wiring};
use crate::options::{OptionError, Options};

mod endpoint;
pub(crate) mod number;
mod path;
pub(crate) mod text;

pub use endpoint::Endpoint;
pub use number::{ByteRate, Number, Slot};
pub use path::FilePath;
pub(crate) use path::decode as decode_hex;

pub use crate::constant::ConstConfig;
pub use crate::flash::{FlashConfig, FlashMode, FlashSize, PageAddress};
pub use crate::power::PowerConfig;
pub use crate::rtc::{ClockOffset, RtcConfig};
pub use crate::serial::{SerialConfig, UartConfig};
pub use crate::virtio::balloon::{BalloonConfig, BalloonSize, Interval};
pub use crate::virtio::blk::{
    BlkConfig, DiskCache, DiskQueues, DiskSerial, ImageFormat, RequestRate,
};
pub use crate::virtio::console::{ConsoleConfig, PortConfig, PortName};
pub use crate::virtio::input::InputConfig;
pub use crate::virtio::net::{Descriptor, FrameRate, MacAddress, Mtu, NetConfig, QueuePairs};
pub use crate::virtio::rng::RngConfig;
pub use crate::virtio::vhost_user::{
    Forwards, FsConfig, MountTag, NetUserConfig, Sandbox, ServedQueues, VhostUserBlkConfig,
    VhostUserNetConfig, VhostUserVsockConfig,
};
pub use crate::virtio::vsock::{Cid, ReplyTimeout, VsockBackend, VsockConfig};
pub use crate::vmgenid::VmGenIdConfig;

/// The configuration of one model.
pub(crate) trait ModelConfig {
    /// The slot that the user has chosen.
    fn slot(&self) -> Option<Slot> {
        None
    }

    /// The guest-physical address that the user has chosen.
    fn addr(&self) -> Option<u64> {
        None
    }

    /// The paths in it, of files, folders and sockets of the host.
    fn paths(&mut self) -> Vec<&mut FilePath> {
        Vec::new()
    }

    /// Checks values that exclude each other; each value by itself is valid by its type.
    ///
    /// # Errors
    /// [`OptionError`] with the first value that the others exclude.
    fn check(&self) -> Result<(), OptionError> {
        Ok(())
    }

    /// Builds the device. Its values have passed [`check`](Self::check).
    fn build(&self, wiring: Wiring) -> Built;
}

/// Defines [`DeviceConfig`] and [`CATALOG`] from one list.
macro_rules! devices {
    ($($(#[$doc:meta])* $variant:ident($config:ty) = $name:literal, $model:path;)*) => {
        /// Every device model of rvmm. A new one adds its file and a line to the list in this file.
        pub const CATALOG: &[Model] = &[$($model),*];

        /// The configuration of a device. In JSON an object with the model's name: `{"model": "blk", "path": "disk.img"}`; its keys
        /// are those of `--device NAME,key=value,...`.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(tag = "model")]
        #[expect(clippy::large_enum_variant, reason = "a machine has few devices")]
        pub enum DeviceConfig {
            $($(#[$doc])* #[serde(rename = $name)] $variant($config),)*
        }

        impl DeviceConfig {
            /// The model.
            #[must_use]
            pub fn model(&self) -> &'static Model {
                match self {
                    $(Self::$variant(_) => const { &$model },)*
                }
            }

            fn inner(&self) -> &dyn ModelConfig {
                match self {
                    $(Self::$variant(config) => config,)*
                }
            }

            fn inner_mut(&mut self) -> &mut dyn ModelConfig {
                match self {
                    $(Self::$variant(config) => config,)*
                }
            }

            fn read(options: &Options) -> Result<Self, OptionError> {
                match options.name() {
                    $($name => options.read().map(Self::$variant),)*
                    name => Err(OptionError::UnknownModel {
                        name: name.to_owned(),
                        known: CATALOG.iter().map(|model| model.name).collect::<Vec<_>>().join(", "),
                    }),
                }
            }
        }

        $(impl From<$config> for DeviceConfig {
            fn from(config: $config) -> Self {
                Self::$variant(config)
            }
        })*
    };
}

devices! {
    /// The board's serial port.
    Serial(SerialConfig) = "serial", crate::serial::MODEL;
    /// An additional serial port.
    Uart(UartConfig) = "uart", crate::serial::UART;
    /// The board's real-time clock.
    Rtc(RtcConfig) = "rtc", crate::rtc::MODEL;
    /// The board's register for power off and reset.
    Power(PowerConfig) = "power", crate::power::MODEL;
    /// The board's generation ID.
    VmGenId(VmGenIdConfig) = "vmgenid", crate::vmgenid::MODEL;
    /// A constant.
    Const(ConstConfig) = "const", crate::constant::MODEL;
    /// A flash memory.
    Flash(FlashConfig) = "flash", crate::flash::MODEL;
    /// An entropy device.
    Rng(RngConfig) = "rng", crate::virtio::rng::MODEL;
    /// A disk.
    Blk(BlkConfig) = "blk", crate::virtio::blk::MODEL;
    /// A network card on a tap interface.
    Net(NetConfig) = "net", crate::virtio::net::MODEL;
    /// Sockets between guest and host.
    Vsock(VsockConfig) = "vsock", crate::virtio::vsock::MODEL;
    /// A power button.
    Input(InputConfig) = "input", crate::virtio::input::MODEL;
    /// A memory balloon.
    Balloon(BalloonConfig) = "balloon", crate::virtio::balloon::MODEL;
    /// A console with ports.
    Console(ConsoleConfig) = "console", crate::virtio::console::MODEL;
    /// A shared folder.
    Fs(FsConfig) = "fs", crate::virtio::vhost_user::fs::MODEL;
    /// A network card through passt.
    NetUser(NetUserConfig) = "net-user", crate::virtio::vhost_user::net::USER;
    /// A network card that another program serves.
    VhostUserNet(VhostUserNetConfig) = "vhost-user-net", crate::virtio::vhost_user::net::MODEL;
    /// A disk that another program serves.
    VhostUserBlk(VhostUserBlkConfig) = "vhost-user-blk", crate::virtio::vhost_user::blk::MODEL;
    /// Sockets that another program serves.
    VhostUserVsock(VhostUserVsockConfig) = "vhost-user-vsock", crate::virtio::vhost_user::vsock::MODEL;
}

impl DeviceConfig {
    /// Parses `NAME,key=value,...`; a comma in a value is written twice.
    ///
    /// # Errors
    /// [`OptionError`] for an unknown model or key, a value that is invalid or missing, and values that exclude each other.
    pub fn parse(text: impl AsRef<OsStr>) -> Result<Self, OptionError> {
        let config = Self::read(&Options::parse(text.as_ref())?)?;
        config.check()?;
        Ok(config)
    }

    /// The devices that every machine has, as they are without options.
    #[must_use]
    pub fn built_in() -> Vec<Self> {
        let (serial, rtc) = (SerialConfig::default(), RtcConfig::default());
        let (power, generation) = (PowerConfig::default(), VmGenIdConfig::default());
        vec![serial.into(), rtc.into(), power.into(), generation.into()]
    }

    /// The slot that the configuration names; `None` for the first free one, and for models without a slot.
    #[must_use]
    pub fn slot(&self) -> Option<Slot> {
        self.inner().slot()
    }

    /// The guest-physical address that the configuration names.
    #[must_use]
    pub fn addr(&self) -> Option<u64> {
        self.inner().addr()
    }

    /// The paths in it, of files, folders and sockets of the host.
    pub fn paths(&mut self) -> Vec<&mut FilePath> {
        self.inner_mut().paths()
    }

    /// Checks values that exclude each other. Each value by itself is valid by its type.
    ///
    /// # Errors
    /// [`OptionError`] with the first value that the others exclude.
    pub fn check(&self) -> Result<(), OptionError> {
        self.inner().check()
    }

    /// Builds the device.
    ///
    /// # Errors
    /// [`BuildError`] for values that exclude each other, a backend that is not available, or a resource that the host cannot
    /// create.
    pub fn build(&self, wiring: Wiring) -> Built {
        self.check().map_err(|source| BuildError::Option { model: self.model().name, source })?;
        self.inner().build(wiring)
    }
}
