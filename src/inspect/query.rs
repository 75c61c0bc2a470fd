//! Queries, orders and replies: one line of text each way. A query is short enough to be typed (`echo regs | nc -U SOCKET`); an order and
//! the reply are JSON (`echo '"pause"' | nc -U SOCKET`).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use rvmm_devices::number::number;
use serde::{Deserialize, Serialize};

use super::walk::Walk;
use crate::migration::{MigrationProgress, MigrationReport, MigrationRequest};
use crate::snapshot::{SnapshotReport, SnapshotRequest};

/// A query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Query {
    /// The properties and the state.
    Info,
    /// The counters.
    Stat,
    /// The registers of all harts. The machine is paused for that.
    Registers,
    /// The walk of a virtual address. The machine is paused for that.
    Walk {
        /// The address.
        address: u64,
        /// The hart under whose `satp` it is looked up.
        hart: u32,
    },
}

impl Query {
    /// The query as a line, without its end.
    #[must_use]
    pub fn line(self) -> String {
        match self {
            Self::Info => "info".into(),
            Self::Stat => "stat".into(),
            Self::Registers => "regs".into(),
            Self::Walk { address, hart } => format!("walk {address:#x} {hart}"),
        }
    }

    /// Parses a line.
    pub(super) fn read(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let query = match words.next()? {
            "info" => Self::Info,
            "stat" => Self::Stat,
            "regs" => Self::Registers,
            "walk" => {
                let address = number(words.next()?).ok()?;
                let hart = words.next().map_or(Ok(0), str::parse).ok()?;
                Self::Walk { address, hart }
            }
            _ => return None,
        };
        words.next().is_none().then_some(query)
    }
}

/// An order: it changes the machine's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Pause the machine until [`Order::Resume`].
    Pause,
    /// End a pause.
    Resume,
    /// Reset the machine in place, as a guest does that reboots.
    Reset,
    /// Press the power button, so that the guest powers off.
    PowerButton,
    /// End the machine. The guest is not asked.
    Stop,
    /// Have the guest give this number of bytes of its memory to the host.
    Balloon(u64),
    /// Save the machine in a folder of this host.
    Snapshot(SnapshotRequest),
    /// Move the machine to the process at the other end of the stream socket that comes with this line (SCM_RIGHTS of unix(7)).
    Migrate(MigrationRequest),
}

impl Order {
    /// Parses a line; `None` for a line that is no order.
    pub(super) fn read(line: &str) -> Option<Result<Self, String>> {
        let is_json = line.starts_with(['"', '{']);
        is_json.then(|| serde_json::from_str(line).map_err(|error| error.to_string()))
    }
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    /// To [`Query::Info`].
    Info(Description),
    /// To [`Query::Stat`].
    Stat(Stat),
    /// To [`Query::Registers`].
    Registers(Vec<HartRegisters>),
    /// To [`Query::Walk`].
    Walk(Walk),
    /// To an order without another reply: it was carried out.
    Done {
        /// Nanoseconds that it has taken.
        took_ns: u64,
    },
    /// To [`Order::Snapshot`].
    Snapshot(SnapshotReport),
    /// To [`Order::Migrate`], after each round: more lines follow.
    Progress(MigrationProgress),
    /// To [`Order::Migrate`], last.
    Migrated(MigrationReport),
    /// A message: the query is invalid, the order was not carried out, or the machine is just restarting or ending.
    Error(String),
}

/// The properties and the state of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The machine's name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// The guest runs, or is paused.
    pub state: GuestState,
    /// Number of harts.
    pub harts: u32,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// The interrupt controller: `aia` or `plic`.
    pub irqchip: String,
    /// The kernel's path; `None` for a machine without one.
    pub kernel: Option<String>,
    /// Nanoseconds since its last reset.
    pub age_ns: u64,
    /// It has a power button.
    pub power_button: bool,
    /// Its balloon, if it has one.
    pub balloon: Option<BalloonSizes>,
}

/// The state of a machine that has a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestState {
    /// The guest runs.
    #[default]
    Running,
    /// The harts are out of the guest, and the devices at rest.
    Paused,
}

/// A balloon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonSizes {
    /// The bytes that the guest is to give to the host.
    pub target: u64,
    /// The bytes that it has given.
    pub actual: u64,
}

/// Counters of a machine, since its last reset.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// The machine's name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Nanoseconds since its last reset.
    pub age_ns: u64,
    /// Its harts.
    pub harts: Vec<HartCount>,
    /// Its devices, in order of address.
    pub devices: Vec<DeviceCount>,
    /// Reads of addresses without a device.
    pub unassigned_reads: u64,
    /// Writes to such addresses.
    pub unassigned_writes: u64,
}

/// Counters of a hart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HartCount {
    /// Its number.
    pub hart: u32,
    /// KVM's counters, by KVM's names.
    pub counters: BTreeMap<String, u64>,
}

/// Counters of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCount {
    /// Its model.
    pub name: String,
    /// Its guest-physical address.
    pub base: u64,
    /// Reads of its registers.
    pub reads: u64,
    /// Writes to its registers.
    pub writes: u64,
    /// Accesses that it refused.
    pub refused: u64,
}

/// The registers of a hart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HartRegisters {
    /// Its number.
    pub hart: u32,
    /// Names and values in their usual order; no value where the hart has no such register.
    pub registers: Vec<(String, Option<u64>)>,
}

/// A machine that answers queries and takes orders.
pub trait Inspectable: Send + Sync {
    /// Answers a query. May pause the machine for a moment; waits for nothing else.
    fn answer(&self, query: Query) -> Reply;

    /// Carries out an order, which may take as long as writing the machine's memory. `attached` is the descriptor that came with it, and
    /// `tell` sends a reply before the last one: false if the client has gone.
    fn carry_out(
        &self,
        order: Order,
        attached: Option<OwnedFd>,
        tell: &mut dyn FnMut(&Reply) -> bool,
    ) -> Reply;
}
