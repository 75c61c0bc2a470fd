//! Names for the subject of an exit: a device and its register, an SBI function, a CSR. Only functions that KVM can pass to user space have
//! names; others are numbers.

use std::fmt::{self, Display};

use rvmm_devices::{Bus, RegisterName};

use super::record::{ExitKind, Record};
use crate::riscv::{csr, sbi};

/// A device's address range on the bus.
#[derive(Debug, Clone)]
struct Place {
    base: u64,
    size: u64,
    label: String,
    registers: RegisterName,
}

/// The devices of a machine by address.
#[derive(Debug, Clone, Default)]
pub struct DeviceMap(Vec<Place>);

impl DeviceMap {
    /// The devices of `bus`. If there are several of a model, their labels have the address.
    #[must_use]
    pub fn of(bus: &Bus) -> Self {
        let slots: Vec<_> = bus.devices().collect();
        let label = |name: &str, base: u64| match slots.iter().filter(|s| s.name == name).count() {
            1 => name.to_owned(),
            _ => format!("{name}@{base:x}"),
        };
        let places = slots.iter().map(|slot| Place {
            base: slot.base,
            size: slot.size,
            label: label(slot.name, slot.base),
            registers: slot.registers,
        });
        Self(places.collect())
    }

    /// The label of the device at a guest-physical address, the offset in it, and the register for reads at this offset.
    pub(crate) fn at(&self, addr: u64) -> Option<(&str, u64, Option<&'static str>)> {
        let (place, offset) = self.find(addr)?;
        Some((&place.label, offset, (place.registers)(offset, false)))
    }

    /// The device at a guest-physical address, and the offset in it.
    fn find(&self, addr: u64) -> Option<(&Place, u64)> {
        let index = self.0.partition_point(|place| place.base <= addr).checked_sub(1)?;
        let place = self.0.get(index)?;
        let offset = addr.wrapping_sub(place.base);
        (offset < place.size).then_some((place, offset))
    }
}

/// The subject of an exit, for display: `serial LSR`, `DBCN console_write_byte`, `kick`.
pub(super) struct Subject<'a> {
    record: &'a Record,
    place: Option<(&'a Place, u64)>,
}

impl<'a> Subject<'a> {
    pub(super) fn new(record: &'a Record, places: &'a DeviceMap) -> Self {
        let is_access = matches!(record.kind, ExitKind::MmioRead | ExitKind::MmioWrite);
        Self { record, place: is_access.then(|| places.find(record.a)).flatten() }
    }

    /// The device that was accessed.
    pub(super) fn device(&self) -> Option<&'a str> {
        self.place.map(|(place, _)| place.label.as_str())
    }

    /// The register that was accessed.
    pub(super) fn register(&self) -> Option<&'static str> {
        let (place, offset) = self.place?;
        (place.registers)(offset, self.record.kind == ExitKind::MmioWrite)
    }
}

impl Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Record { kind, a, b, .. } = *self.record;
        match kind {
            ExitKind::MmioRead | ExitKind::MmioWrite => match (self.place, self.register()) {
                (Some((place, _)), Some(register)) => write!(f, "{} {register}", place.label),
                (Some((place, offset)), None) => write!(f, "{} +{offset:#x}", place.label),
                (None, _) => f.write_str("no device"),
            },
            ExitKind::Sbi => call(f, a, b),
            ExitKind::Csr => match u16::try_from(a).ok().and_then(csr::name) {
                Some(name) => f.write_str(name),
                None => write!(f, "CSR {a:#x}"),
            },
            ExitKind::System if a == 0 => f.write_str("shutdown"),
            ExitKind::System if a == 1 => f.write_str("reset"),
            ExitKind::System => write!(f, "event {b}"),
            ExitKind::Debug => f.write_str("ebreak"),
            ExitKind::Interrupted => f.write_str("kick"),
            ExitKind::Fault => match a {
                0 => f.write_str("unemulated access"),
                1 => f.write_str("misaligned access"),
                2 => f.write_str("memory"),
                3 => f.write_str("refused entry"),
                _ => write!(f, "errno {b}"),
            },
            ExitKind::Unknown => write!(f, "exit {a}"),
        }
    }
}

/// Writes an SBI call by extension and function.
fn call(f: &mut fmt::Formatter<'_>, extension: u64, function: u64) -> fmt::Result {
    if let Some(name) = sbi::v01::name(extension) {
        return write!(f, "legacy {name}");
    }
    match sbi::extension_name(extension) {
        Some(name) => f.write_str(&name)?,
        None => write!(f, "extension {extension:#x}")?,
    }
    match sbi::function_name(extension, function) {
        Some(name) => write!(f, " {name}"),
        None => write!(f, " {function:#x}"),
    }
}
