//! The seam between a device model and the rest of the machine: what a chip answers to, and what it
//! says about itself.

use std::os::fd::RawFd;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::irq::StatusPin;

/// How an access ended: done, or refused without any effect on the device.
pub type Access = Result<(), AccessError>;

/// Why a device refused an access.
///
/// Small and `Copy`: the bus knows the address and the width, and refusals are guest-triggered, so
/// they must stay cheap. A refused access has changed nothing; the bus gives the guest zeroes for a
/// read and drops a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
pub enum AccessError {
    /// The register exists, but not for an access of this many bytes.
    #[error("Unsupported access width")]
    Width,
    /// The offset is not a multiple of the register's width.
    #[error("Misaligned access")]
    Misaligned,
    /// Nothing is implemented at this offset.
    #[error("No register at this offset")]
    NoRegister,
    /// A write to a register that can only be read.
    #[error("Register is read-only")]
    ReadOnly,
    /// A read of a register that can only be written.
    #[error("Register is write-only")]
    WriteOnly,
    /// The access begins inside the device and ends past it. Only the bus says this.
    #[error("Access reaches past the end of the device")]
    PastEnd,
}

/// The name of the register at an offset (bytes from the device's base), as its specification spells it, for a read or a
/// write; `None` where there is none. For people only, so it needs no device and no lock.
pub type RegisterName = fn(offset: u64, is_write: bool) -> Option<&'static str>;

/// A device with registers in guest-physical memory.
///
/// A device does not know its address or its interrupt number; it holds neither the bus nor the
/// machine. It is called by vCPU threads (`read`, `write`) and by the I/O thread (`sources`,
/// `ready`), always under the bus's lock for this device, and must not block in any of them.
///
/// # The I/O loop's contract
///
/// One thread owns the only epoll set, level-triggered. It calls [`sources`](Self::sources) once
/// the device is built, and again after every [`ready`](Self::ready), and applies the difference.
/// So a device whose interest changes on a vCPU thread (its FIFO is full: stop reading; output is
/// stuck: wait for room) owns an eventfd, lists it in its sources, and writes it; the `ready` that
/// follows makes the loop look again. So does one that closes a listed descriptor there, in a reset; until then the loop
/// may see the number in use by another device, and knows whose it is by the lists. A descriptor that comes in place of a closed one of its
/// number has another token, unless the loop has looked between the two. `ready` may be called without cause (a stale event in
/// the same epoll batch, an error or hang-up condition): it must check, not assume. A source that
/// reports only `EPOLLHUP`/`EPOLLERR` counts as ready.
///
/// A source with an interest in writing is a debt: bytes that the guest has handed over and the
/// host has not taken. A machine that ends gives such devices a bounded time to pay it (keep
/// polling while any device lists one).
pub trait MmioDevice: Send {
    /// The model's name, as in the catalog (`serial`) and in logs.
    fn name(&self) -> &'static str;

    /// Bytes of address space that the device answers to; constant, at least 1.
    fn size(&self) -> u64;

    /// Reads `data.len()` bytes at `offset` (bytes from the device's base, below
    /// [`size`](Self::size)); little-endian.
    ///
    /// # Errors
    /// An [`AccessError`] if the chip has no such access; `data` is then unspecified and the bus
    /// clears it.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access;

    /// Writes `data.len()` bytes at `offset` (bytes from the device's base, below
    /// [`size`](Self::size)); little-endian.
    ///
    /// # Errors
    /// An [`AccessError`] if the chip has no such access; nothing has changed then.
    fn write(&mut self, offset: u64, data: &[u8]) -> Access;

    /// Puts every guest-visible register back to its value after power-on, and the interrupt line
    /// low.
    fn reset(&mut self);

    /// What the device's registers are called.
    fn register_names(&self) -> RegisterName {
        |_, _| None
    }

    /// How the device appears in the device tree, without `reg` and `interrupts` (the board adds
    /// those), or `None`.
    fn fdt(&self) -> Option<FdtDesc>;

    /// The line of a serial port, for a firmware that shares it with the guest's driver.
    fn serial_line(&mut self) -> Option<&mut dyn SerialLine> {
        None
    }

    /// What the I/O loop has to watch now. See the contract above.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// A source with this token may be ready. Unknown tokens are ignored.
    fn ready(&mut self, token: u32) {
        let _ = token;
    }

    /// The interrupt whose level [`ready`](Self::ready) has changed and not driven: whoever called it drives it, once the device's lock
    /// is given back.
    fn undriven(&mut self) -> Option<Arc<StatusPin>> {
        None
    }

    /// Registers that are answered without the device's lock. Asked once.
    fn unlocked(&self) -> Option<Arc<dyn Unlocked>> {
        None
    }

    /// Registers that only wake somebody: the board may have the kernel write to their descriptors instead of calling
    /// [`write`](Self::write), which does the same. Asked once.
    fn doorbells(&self) -> Vec<Doorbell<'_>> {
        Vec::new()
    }
}

/// A serial port's line past its registers: many bytes in one access. They keep their order with those that go through the registers.
pub trait SerialLine {
    /// Sends bytes, as many as the line takes now, in order; says how many. The guest's driver is held back with them.
    fn send(&mut self, bytes: &[u8]) -> usize;

    /// Takes received bytes, as many as are there, at most `buffer.len()`; says how many. Who takes listens: from the first call on
    /// input is asked for from the host.
    fn take(&mut self, buffer: &mut [u8]) -> usize;

    /// Whether [`take`](Self::take) would get something now. Who asks listens, too.
    fn has_input(&mut self) -> bool;
}

/// Registers of a device that a hart reaches while somebody else works on the device, for whom it would have to wait otherwise. The
/// device answers them itself, too ([`MmioDevice::read`], [`MmioDevice::write`]), in the same way.
pub trait Unlocked: Send + Sync {
    /// Fills `data` with what is at `offset`; false, and nothing has happened, where the device has to be asked.
    fn read(&self, offset: u64, data: &mut [u8]) -> bool;

    /// Writes `data` at `offset`; false, and nothing has happened, where the device has to be asked.
    fn write(&self, offset: u64, data: &[u8]) -> bool;
}

/// A file descriptor that the I/O loop watches for a device.
///
/// The descriptor stays the device's: the loop neither reads nor closes it. One descriptor appears
/// at most once per device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// The descriptor; one that epoll accepts (never a regular file).
    pub fd: RawFd,
    /// Comes back in [`MmioDevice::ready`]; unique within the device.
    pub token: u32,
    /// What to wait for.
    pub interest: Interest,
}

/// A register of four bytes that only wakes somebody where one value is written to it.
#[derive(Debug, Clone, Copy)]
pub struct Doorbell<'a> {
    /// Bytes from the device's base.
    pub offset: u64,
    /// The value that rings it.
    pub value: u32,
    /// What is written to then.
    pub event: &'a EventFd,
}

/// What to wait for on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interest {
    /// Readable (`EPOLLIN`).
    Read,
    /// Writable (`EPOLLOUT`).
    Write,
    /// Either.
    ReadWrite,
}

impl Interest {
    /// The interest for the given directions, or `None` if there is none.
    #[must_use]
    pub fn of(read: bool, write: bool) -> Option<Self> {
        match (read, write) {
            (true, true) => Some(Self::ReadWrite),
            (true, false) => Some(Self::Read),
            (false, true) => Some(Self::Write),
            (false, false) => None,
        }
    }

    /// Whether readability is of interest.
    #[must_use]
    pub fn reads(self) -> bool {
        matches!(self, Self::Read | Self::ReadWrite)
    }

    /// Whether writability is of interest.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::ReadWrite)
    }
}

/// A device's part of the device tree (Devicetree Specification 0.4, section 2.3).
///
/// The board turns it into `name@base { compatible; reg; interrupts...; properties }` and adds the
/// companions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdtDesc {
    /// Node name without the unit address: `serial`.
    pub name: &'static str,
    /// `compatible`, most specific first; never empty.
    pub compatible: Vec<&'static str>,
    /// Further properties, in order.
    pub properties: Vec<FdtProperty>,
    /// Nodes without `reg` that go with the device, beside it in the tree.
    pub companions: Vec<FdtCompanion>,
}

/// A node without `reg` that goes with a device: `poweroff { compatible = "syscon-poweroff"; regmap
/// = <&device>; ... }`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdtCompanion {
    /// Node name; unique in the tree.
    pub name: &'static str,
    /// All its properties, `compatible` included.
    pub properties: Vec<FdtProperty>,
}

/// One property of a device tree node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdtProperty {
    /// Property name.
    pub name: &'static str,
    /// Property value.
    pub value: FdtValue,
}

impl FdtProperty {
    /// A property with these cells.
    #[must_use]
    pub fn cells(name: &'static str, cells: &[u32]) -> Self {
        Self { name, value: FdtValue::U32(cells.to_vec()) }
    }

    /// A property with these strings.
    #[must_use]
    pub fn strings(name: &'static str, strings: &[&'static str]) -> Self {
        Self { name, value: FdtValue::Strings(strings.to_vec()) }
    }
}

/// The value of a device tree property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FdtValue {
    /// A property whose presence is the message.
    Empty,
    /// Cells of 32 bits.
    U32(Vec<u32>),
    /// A list of strings.
    Strings(Vec<&'static str>),
    /// One cell: the phandle of the device that this description belongs to.
    ThisDevice,
}

/// The offset, if it is that of a 32-bit access to a chip whose registers are all 32 bits wide.
///
/// # Errors
/// [`AccessError::Width`] or [`AccessError::Misaligned`].
pub(crate) fn register32(offset: u64, width: usize) -> Result<u64, AccessError> {
    match width {
        4 if offset.is_multiple_of(4) => Ok(offset),
        4 => Err(AccessError::Misaligned),
        _ => Err(AccessError::Width),
    }
}

/// Reads 32-bit registers: one, or by an access of 8 bytes two, the one at the lower offset first, as QEMU's `virt` board splits it. Of
/// two registers one may refuse: its half is zero then.
///
/// # Errors
/// [`AccessError::Width`], [`AccessError::Misaligned`], or why all of them refused.
pub(crate) fn read_words(
    offset: u64,
    data: &mut [u8],
    mut read: impl FnMut(u64) -> Result<u32, AccessError>,
) -> Access {
    let Some((low, high)) = halves_of(offset, data.len())? else {
        data.copy_from_slice(&read(offset)?.to_le_bytes());
        return Ok(());
    };
    let words = [read(low), read(high)];
    if let [Err(refusal), Err(_)] = words {
        return Err(refusal);
    }
    for (bytes, word) in data.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.unwrap_or(0).to_le_bytes());
    }
    Ok(())
}

/// Writes 32-bit registers: one, or by an access of 8 bytes two, the one at the lower offset first. Of two registers one may refuse.
///
/// # Errors
/// [`AccessError::Width`], [`AccessError::Misaligned`], or why all of them refused.
pub(crate) fn write_words(
    offset: u64,
    data: &[u8],
    mut write: impl FnMut(u64, u32) -> Access,
) -> Access {
    let halves = halves_of(offset, data.len())?;
    let mut words = data.chunks_exact(4).filter_map(|word| word.try_into().ok());
    let mut next = || words.next().map(u32::from_le_bytes).ok_or(AccessError::Width);
    let Some((low, high)) = halves else { return write(offset, next()?) };
    match [write(low, next()?), write(high, next()?)] {
        [Err(refusal), Err(_)] => Err(refusal),
        _ => Ok(()),
    }
}

/// The two registers of an access of 8 bytes; `None` for one of 4.
fn halves_of(offset: u64, width: usize) -> Result<Option<(u64, u64)>, AccessError> {
    if width == 8 && offset.is_multiple_of(8) {
        return Ok(Some((offset, offset | 4)));
    }
    if width == 8 { Err(AccessError::Misaligned) } else { register32(offset, width).map(|_| None) }
}
