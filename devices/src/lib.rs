//! Device models of rvmm: the devices of a RISC-V board and its MMIO bus.
//!
//! The crate depends on neither KVM, addresses, threads nor the command line, and has no unsafe code:
//! it builds and tests on any machine. A device is an [`MmioDevice`]; it drives an [`IrqLine`], and
//! gets everything else it needs from the host in its [`Wiring`]. [`CATALOG`] is the list of all
//! devices.
//!
//! | file | contents |
//! |---|---|
//! | `device.rs` | [`MmioDevice`], access errors, the I/O loop's contract, device tree descriptions |
//! | `irq.rs` | [`Interrupt`]: lines and messages |
//! | `lifecycle.rs` | [`Lifecycle`]: pause, resume, reset, save, restore |
//! | `bus/` | [`Bus`]: dispatches accesses to devices by address |
//! | `config/`, `options.rs` | [`DeviceConfig`], [`CATALOG`], `NAME,key=value` |
//! | `catalog.rs` | [`Model`], [`Wiring`] |
//! | `number.rs` | numbers as users write them |
//! | `console.rs` | [`ConsoleBackend`]: the backend of a console |
//! | `host.rs` | [`Host`]: opens disks, networks, sockets |
//! | `serial.rs` | NS16550A UART |
//! | `rtc.rs` | Goldfish real-time clock |
//! | `power.rs` | SiFive test finisher: poweroff and reset |
//! | `vmgenid.rs` | virtual machine generation ID |
//! | `plic/` | SiFive PLIC, for hosts without an in-kernel interrupt controller |
//! | `constant.rs`, `flash.rs` | a constant and a flash memory that the guest reads |
//! | `reserved.rs` | registers that the kernel's interrupt controller leaves to user space |
//! | `virtio/` | virtio: transport, queues, and a file per device |
//! | `testing.rs` | test doubles, for this crate and others |
//!
//! # Locks
//!
//! The bus has one lock per device. With it held, a device may drive its line, which may take the
//! PLIC's own lock, which may drive a hart's line. Never the other way: a line calls no device, and
//! the PLIC calls only harts' lines.
#![forbid(unsafe_code)]

pub mod bus;
pub mod catalog;
pub mod config;
pub mod console;
mod constant;
pub mod device;
pub mod flash;
pub mod host;
pub mod irq;
pub mod lifecycle;
mod link;
mod ns16550;
pub mod number;
pub mod options;
pub mod plic;
pub mod power;
pub mod reserved;
pub mod rtc;
pub mod serial;
pub mod testing;
pub mod virtio;
pub mod vmgenid;

pub use bus::{Bus, BusCounters, BusError, BusView, Claim, DeviceState, StateError};
pub use catalog::{BuildError, Built, Device, Key, Model, Placement, SLOT, Wiring};
pub use config::{CATALOG, DeviceConfig, Endpoint, FilePath};
pub use console::{ConsoleBackend, NullConsole, Port, Ports};
pub use device::{
    Access, AccessError, FdtCompanion, FdtDesc, FdtProperty, FdtValue, Interest, IoEvent,
    MmioDevice, RegisterName, SerialLine, Source, Unlocked,
};
pub use host::{Host, HostError, Listener, NoHost};
pub use irq::{Interrupt, IrqLine, IrqPin, Messages, NoIrq, PendingInterrupt, StatusPin};
pub use lifecycle::{Lifecycle, PauseError, RestoreError, SaveError, SavedState};
pub use options::OptionError;
pub use plic::{Plic, PlicError};
pub use power::{PowerRequest, PowerSwitch};
pub use reserved::Reserved;
pub use rtc::{Clock, WallClock};
pub use vmgenid::GenerationControl;
