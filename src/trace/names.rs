//! Names for the numbers of an exit: SBI extensions and functions (SBI specification 3.0), CSRs (Privileged
//! specification, AIA specification). Only functions that KVM can pass to user space have names; others are numbers.

use std::fmt::{self, Display, Write};

use rvmm_devices::{Bus, RegisterName};

use super::record::{Kind, Record};

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
        let is_access = matches!(record.kind, Kind::MmioRead | Kind::MmioWrite);
        Self { record, place: is_access.then(|| places.find(record.a)).flatten() }
    }

    /// The device that was accessed.
    pub(super) fn device(&self) -> Option<&'a str> {
        self.place.map(|(place, _)| place.label.as_str())
    }

    /// The register that was accessed.
    pub(super) fn register(&self) -> Option<&'static str> {
        let (place, offset) = self.place?;
        (place.registers)(offset, self.record.kind == Kind::MmioWrite)
    }
}

impl Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Record { kind, a, b, .. } = *self.record;
        match kind {
            Kind::MmioRead | Kind::MmioWrite => match (self.place, self.register()) {
                (Some((place, _)), Some(register)) => write!(f, "{} {register}", place.label),
                (Some((place, offset)), None) => write!(f, "{} +{offset:#x}", place.label),
                (None, _) => f.write_str("no device"),
            },
            Kind::Sbi => call(f, a, b),
            Kind::Csr => match csr(a) {
                Some(name) => f.write_str(name),
                None => write!(f, "CSR {a:#x}"),
            },
            Kind::System if a == 0 => f.write_str("shutdown"),
            Kind::System if a == 1 => f.write_str("reset"),
            Kind::System => write!(f, "event {b}"),
            Kind::Debug => f.write_str("ebreak"),
            Kind::Interrupted => f.write_str("kick"),
            Kind::Fault => match a {
                0 => f.write_str("unemulated access"),
                1 => f.write_str("misaligned access"),
                2 => f.write_str("memory"),
                3 => f.write_str("refused entry"),
                _ => write!(f, "errno {b}"),
            },
            Kind::Unknown => write!(f, "exit {a}"),
        }
    }
}

/// Writes an SBI call by extension and function.
fn call(f: &mut fmt::Formatter<'_>, extension: u64, function: u64) -> fmt::Result {
    let legacy = [
        "set_timer",
        "console_putchar",
        "console_getchar",
        "clear_ipi",
        "send_ipi",
        "remote_fence_i",
        "remote_sfence_vma",
        "remote_sfence_vma_asid",
        "shutdown",
    ];
    if let Some(name) = usize::try_from(extension).ok().and_then(|number| legacy.get(number)) {
        return write!(f, "legacy {name}");
    }
    match extension {
        // The numbers of extensions are up to four letters (SBI specification, chapter 4 and on).
        0x10 => f.write_str("BASE")?,
        0x0800_0000..=0x08ff_ffff => write!(f, "experimental {extension:#x}")?,
        0x0900_0000..=0x09ff_ffff => write!(f, "vendor {extension:#x}")?,
        0x0a00_0000..=0x0aff_ffff => write!(f, "firmware {extension:#x}")?,
        _ => match letters(extension) {
            Some(letters) => letters.into_iter().try_for_each(|letter| f.write_char(letter))?,
            None => write!(f, "extension {extension:#x}")?,
        },
    }
    let name = match (extension, function) {
        (0x10, 0) => "get_spec_version",
        (0x10, 1) => "get_impl_id",
        (0x10, 2) => "get_impl_version",
        (0x10, 3) => "probe_extension",
        (0x10, 4) => "get_mvendorid",
        (0x10, 5) => "get_marchid",
        (0x10, 6) => "get_mimpid",
        (0x4442_434e, 0) => "console_write",
        (0x4442_434e, 1) => "console_read",
        (0x4442_434e, 2) => "console_write_byte",
        (0x5355_5350, 0) => "system_suspend",
        (0x5352_5354, 0) => "system_reset",
        _ => return write!(f, " {function:#x}"),
    };
    write!(f, " {name}")
}

/// The letters that the number of an extension consists of: three or four capitals or digits.
fn letters(extension: u64) -> Option<Vec<char>> {
    let bytes = u32::try_from(extension).ok()?.to_be_bytes();
    let letters = bytes.strip_prefix(&[0]).unwrap_or(&bytes);
    let plain = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit();
    letters.iter().all(plain).then(|| letters.iter().map(|byte| char::from(*byte)).collect())
}

/// Names of the CSRs that KVM can pass to user space.
fn csr(number: u64) -> Option<&'static str> {
    Some(match number {
        0x015 => "seed",
        0x150 => "siselect",
        0x151 => "sireg",
        0x15c => "stopei",
        0xdb0 => "stopi",
        _ => return None,
    })
}
