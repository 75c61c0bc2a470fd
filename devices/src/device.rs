//! The interface between a device model and the rest of the machine: register accesses, event sources,
//! and the device tree description.

use std::os::fd::RawFd;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::irq::PendingInterrupt;
use crate::lifecycle::Lifecycle;

/// The result of an access: done, or refused without any effect on the device.
pub type Access = Result<(), AccessError>;

/// The reason for which a device refuses an access.
///
/// Small and `Copy`: the bus knows the address and the width, and refusals are guest-triggered, so
/// they must stay cheap. A refused access has changed nothing; the bus returns zeroes to the guest for
/// a read and drops a write.
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
    /// Write to a read-only register.
    #[error("Register is read-only")]
    ReadOnly,
    /// Read of a write-only register.
    #[error("Register is write-only")]
    WriteOnly,
    /// The access begins inside the device and ends past it. Only the bus returns this.
    #[error("Access reaches past the end of the device")]
    PastEnd,
}

/// The name of the register at an offset (bytes from the device's base), as its specification spells it, for a read or a
/// write; `None` if there is none. Only for logs and traces, so it needs no device and no lock.
pub type RegisterName = fn(offset: u64, is_write: bool) -> Option<&'static str>;

/// A device with registers in guest-physical memory.
///
/// A device knows neither its address nor its interrupt number, and holds no reference to the bus or the
/// machine. It is called by vCPU threads (`read`, `write`) and by the I/O thread (`sources`,
/// `ready`), always under the bus's lock for this device, and must not block in any of them.
///
/// # The I/O loop's contract
///
/// One thread owns the only epoll set, level-triggered but for [`Interest::Signal`]. It calls [`list_sources`](Self::list_sources) once
/// the device is built, and again after every [`ready`](Self::ready), and applies the difference.
/// So a device whose interest changes on a vCPU thread (its FIFO is full: stop reading; output is
/// blocked: wait for room) owns an eventfd, lists it in its sources, and writes it; after the `ready` that
/// follows, the loop updates its set. The same applies if a reset on a vCPU thread closes a listed descriptor; until the update the loop
/// may see the number reused by another device, and finds its owner by the lists. A new descriptor with the number of a closed one must have
/// another token, unless the loop has updated its set in between. `ready` may be called without cause (a stale event in
/// the same epoll batch, an error or hang-up condition): it must check, not assume. A source that
/// reports only `EPOLLHUP`/`EPOLLERR` counts as ready.
///
/// A source with an interest in writing means pending output: bytes that the guest has sent and the
/// host has not accepted. When the machine stops, such devices get a bounded time to write it (the loop
/// keeps polling while any device lists one).
pub trait MmioDevice: Lifecycle + Send {
    /// The model's name, as in the catalog (`serial`) and in logs.
    fn name(&self) -> &'static str;

    /// Bytes of address space that the device answers to; constant, at least 1.
    fn size(&self) -> u64;

    /// Reads `data.len()` bytes at `offset` (bytes from the device's base, below
    /// [`size`](Self::size)); little-endian.
    ///
    /// # Errors
    /// An [`AccessError`] if the device does not support the access; `data` is then unspecified and the bus
    /// clears it.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access;

    /// Writes `data.len()` bytes at `offset` (bytes from the device's base, below
    /// [`size`](Self::size)); little-endian.
    ///
    /// # Errors
    /// An [`AccessError`] if the device does not support the access; nothing has changed then.
    fn write(&mut self, offset: u64, data: &[u8]) -> Access;

    /// Returns the function that names the device's registers.
    fn register_names(&self) -> RegisterName {
        |_, _| None
    }

    /// The device's node in the device tree, without `reg` and `interrupts` (the board adds
    /// those), or `None`.
    fn fdt(&self) -> Option<FdtDesc>;

    /// The line of a serial port, which the SBI debug console shares with the guest's driver.
    fn serial_line(&mut self) -> Option<&mut dyn SerialLine> {
        None
    }

    /// Adds the descriptors for the I/O loop to watch now. See the contract above. A list that is passed in costs no allocation per
    /// event.
    fn list_sources(&self, list: &mut Vec<Source>) {
        let _ = list;
    }

    /// The descriptors for the I/O loop to watch now.
    fn sources(&self) -> Vec<Source> {
        let mut list = Vec::new();
        self.list_sources(&mut list);
        list
    }

    /// A source with this token may be ready. Unknown tokens are ignored.
    fn ready(&mut self, token: u32) {
        let _ = token;
    }

    /// The interrupt that [`ready`](Self::ready) has raised and not delivered: the caller delivers it after releasing the
    /// device's lock.
    fn take_pending_irq(&mut self) -> Option<PendingInterrupt> {
        None
    }

    /// The registers that can be accessed without the device's lock. Called once.
    fn unlocked(&self) -> Option<Arc<dyn Unlocked>> {
        None
    }

    /// The registers that only signal an eventfd: the board may register them with the kernel (ioeventfd) instead of calling
    /// [`write`](Self::write), which has the same effect. Called once.
    fn ioeventfds(&self) -> Vec<IoEvent<'_>> {
        Vec::new()
    }
}

/// A serial port's line, bypassing its registers: many bytes in one access. They keep their order with those sent through the registers.
pub trait SerialLine {
    /// Sends bytes in order, as many as the line accepts now, and returns their number. They count for the flow control of the driver.
    fn send(&mut self, bytes: &[u8]) -> usize;

    /// Reads received bytes, as many as are available, at most `buffer.len()`, and returns their number. The first call enables input
    /// from the host.
    fn take(&mut self, buffer: &mut [u8]) -> usize;

    /// Returns true if [`take`](Self::take) would return bytes now. Enables input, too.
    fn has_input(&mut self) -> bool;
}

/// Registers of a device that a hart can access while another thread holds the device's lock. The
/// device also implements them itself ([`MmioDevice::read`], [`MmioDevice::write`]), with the same effect.
pub trait Unlocked: Send + Sync {
    /// Reads `data.len()` bytes at `offset`; returns false, without any effect, if the access needs the device.
    fn read(&self, offset: u64, data: &mut [u8]) -> bool;

    /// Writes `data` at `offset`; returns false, without any effect, if the access needs the device.
    fn write(&self, offset: u64, data: &[u8]) -> bool;
}

/// A file descriptor that the I/O loop watches for a device.
///
/// The device keeps the descriptor: the loop neither reads nor closes it. One descriptor appears
/// at most once per device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// The descriptor; epoll must accept it (never a regular file).
    pub fd: RawFd,
    /// The argument of [`MmioDevice::ready`]; unique within the device.
    pub token: u32,
    /// The conditions to wait for.
    pub interest: Interest,
}

/// A register of four bytes that only signals an eventfd when a certain value is written to it (ioeventfd).
#[derive(Debug, Clone, Copy)]
pub struct IoEvent<'a> {
    /// Bytes from the device's base.
    pub offset: u64,
    /// The value that signals the eventfd.
    pub value: u32,
    /// The eventfd.
    pub event: &'a EventFd,
}

/// The conditions to wait for on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interest {
    /// Readable (`EPOLLIN`).
    Read,
    /// Writable (`EPOLLOUT`).
    Write,
    /// Either.
    ReadWrite,
    /// Signalled (`EPOLLIN | EPOLLET`): an eventfd, reported once for each write since the last report. Nobody reads its counter, which
    /// saves a system call; the kernel reports a write also if the counter is at its limit.
    Signal,
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

    /// Returns true if readability is of interest.
    #[must_use]
    pub fn reads(self) -> bool {
        matches!(self, Self::Read | Self::ReadWrite | Self::Signal)
    }

    /// Returns true if writability is of interest.
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
    /// Nodes without `reg` that belong to the device, its siblings in the tree.
    pub companions: Vec<FdtCompanion>,
}

/// A node without `reg` that belongs to a device: `poweroff { compatible = "syscon-poweroff"; regmap
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
    /// No value: a boolean property, true by its presence.
    Empty,
    /// Cells of 32 bits.
    U32(Vec<u32>),
    /// A list of strings.
    Strings(Vec<&'static str>),
    /// One cell: the phandle of the device that this description belongs to.
    ThisDevice,
}

/// Returns the offset, if it is valid for a 32-bit access to a device whose registers are all 32 bits wide.
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

/// Reads 32-bit registers: one, or two for an access of 8 bytes, the lower offset first, as QEMU's `virt` board splits it. If one
/// of two registers refuses, its half is zero.
///
/// # Errors
/// [`AccessError::Width`], [`AccessError::Misaligned`], or the first error if all registers refuse.
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

/// Writes 32-bit registers: one, or two for an access of 8 bytes, the lower offset first. One of two registers may refuse.
///
/// # Errors
/// [`AccessError::Width`], [`AccessError::Misaligned`], or the first error if all registers refuse.
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

/// The offsets of the two registers of an access of 8 bytes; `None` for one of 4.
fn halves_of(offset: u64, width: usize) -> Result<Option<(u64, u64)>, AccessError> {
    if width == 8 && offset.is_multiple_of(8) {
        return Ok(Some((offset, offset | 4)));
    }
    if width == 8 { Err(AccessError::Misaligned) } else { register32(offset, width).map(|_| None) }
}
