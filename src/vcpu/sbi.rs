//! SBI calls that KVM leaves to user space (SBI specification 3.0): the debug console, the legacy console, system suspend,
//! and the ranges in which the guest has nothing to find.

use log::{Level, debug, info, log_enabled, warn};
use rvmm_devices::Bus;

use super::dispatch::Flow;
use super::exit::SbiCall;
use super::stop::StopReason;
use super::world::{Notice, World};
use crate::memory::RamError;

mod eid {
    pub(super) const LEGACY_PUTCHAR: u64 = 0x01;
    pub(super) const LEGACY_GETCHAR: u64 = 0x02;
    pub(super) const BASE: u64 = 0x10;
    pub(super) const DBCN: u64 = 0x4442_434e;
    pub(super) const SUSP: u64 = 0x5355_5350;
}

/// `sbi_probe_extension` of BASE.
const PROBE: u64 = 3;

const SUCCESS: u64 = 0;
const NOT_SUPPORTED: u64 = (-2_i64).cast_unsigned();
const INVALID_PARAM: u64 = (-3_i64).cast_unsigned();

/// Bytes that one DBCN call moves at most: the guest gets the hart back in bounded time and asks for the rest.
const MOST_BYTES: u64 = 4096;
/// Bytes between guest memory and UART at a time.
const CHUNK: usize = 256;

/// Answers a call. Whatever has work to do stands out of line: a guest that probes pays for the way here alone.
pub(super) fn answer(call: &mut SbiCall<'_>, world: &World) -> Flow {
    match (call.extension, call.function) {
        (eid::DBCN | eid::LEGACY_PUTCHAR | eid::LEGACY_GETCHAR, _) => talk(call, world),
        (eid::BASE, PROBE) => {
            *call.ret = [SUCCESS, 0];
            Flow::Resume
        }
        (eid::SUSP, 0) => suspend(call),
        (extension, function) => {
            let first = world.first(Notice::UnknownSbi);
            if first || log_enabled!(Level::Debug) {
                tell_unknown(first, extension, function);
            }
            *call.ret = [NOT_SUPPORTED, 0];
            Flow::Resume
        }
    }
}

/// The calls that reach the console.
#[inline(never)]
fn talk(call: &mut SbiCall<'_>, world: &World) -> Flow {
    let (error, value, flow) = match call.extension {
        eid::LEGACY_PUTCHAR => match put(world, call.args[0]) {
            true => (SUCCESS, call.args[1], Flow::Resume),
            false => return Flow::Retry,
        },
        // A legacy call answers in a0 alone; the kernel writes a1 as well.
        eid::LEGACY_GETCHAR => {
            let byte = console(world).and_then(|uart| uart.get());
            (byte.map_or(u64::MAX, u64::from), call.args[1], Flow::Resume)
        }
        _ => dbcn(call.function, call.args, world),
    };
    *call.ret = [error, value];
    flow
}

type Answer = (u64, u64, Flow);

/// The first such call is worth a warning.
#[cold]
#[inline(never)]
fn tell_unknown(first: bool, extension: u64, function: u64) {
    if first {
        warn!(
            "The guest calls SBI extension {extension:#x}, function {function:#x}: not supported"
        );
    } else {
        debug!("SBI extension {extension:#x}, function {function:#x}: not supported");
    }
}

/// The kernel has checked the call and queued the restart at the address that the guest named: it cannot be refused any
/// more, only be honoured. The calling hart is the last one that runs.
#[cold]
#[inline(never)]
fn suspend(call: &mut SbiCall<'_>) -> Flow {
    info!("The guest suspends the system; console input or an interrupt wakes it");
    *call.ret = [SUCCESS, 0];
    Flow::Suspend
}

/// Debug Console (SBI chapter 12).
fn dbcn(function: u64, args: &[u64; 6], world: &World) -> Answer {
    match function {
        0 | 1 => {
            let [len, base, base_high, ..] = *args;
            if len == 0 {
                return (SUCCESS, 0, Flow::Resume);
            }
            if base_high != 0 || !world.ram.contains(base, len) {
                return (INVALID_PARAM, 0, Flow::Resume);
            }
            let len = len.min(MOST_BYTES);
            let moved =
                if function == 0 { write(world, base, len) } else { read(world, base, len) };
            match moved {
                Ok(done) => (SUCCESS, done, Flow::Resume),
                Err(RamError::NotRam) => (INVALID_PARAM, 0, Flow::Resume),
                Err(RamError::Lost) => {
                    let reason = StopReason::MemoryLost { addr: Some(base) };
                    (INVALID_PARAM, 0, reason.into())
                }
            }
        }
        // This one waits until the byte is out. The hart waits, by calling again: its interrupts stay alive.
        2 if put(world, args[0]) => (SUCCESS, 0, Flow::Resume),
        2 => (SUCCESS, 0, Flow::Retry),
        _ => (NOT_SUPPORTED, 0, Flow::Resume),
    }
}

/// Guest memory to console, as far as the UART takes it now.
fn write(world: &World, base: u64, len: u64) -> Result<u64, RamError> {
    let Some(uart) = console(world) else { return Ok(len) };
    let mut buf = [0; CHUNK];
    let mut done = 0;
    while done < len {
        let chunk = chunk(&mut buf, len - done);
        world.ram.read(base + done, chunk)?;
        let taken = chunk.iter().take_while(|byte| uart.put(**byte)).count();
        done += taken as u64;
        if taken < chunk.len() {
            break;
        }
    }
    Ok(done)
}

/// Console to guest memory, as much as there is.
fn read(world: &World, base: u64, len: u64) -> Result<u64, RamError> {
    let Some(uart) = console(world) else { return Ok(0) };
    let mut buf = [0; CHUNK];
    let mut done = 0;
    while done < len {
        let chunk = chunk(&mut buf, len - done);
        let mut got = 0;
        for (slot, byte) in chunk.iter_mut().zip(std::iter::from_fn(|| uart.get())) {
            *slot = byte;
            got += 1;
        }
        world.ram.write(base + done, chunk.get(..got).unwrap_or_default())?;
        done += got as u64;
        if got < chunk.len() {
            break;
        }
    }
    Ok(done)
}

fn chunk(buf: &mut [u8; CHUNK], len: u64) -> &mut [u8] {
    let len = usize::try_from(len).unwrap_or(CHUNK).min(CHUNK);
    buf.get_mut(..len).unwrap_or_default()
}

/// One byte to the console; false where it is full. The other bits of the argument mean nothing.
fn put(world: &World, arg: u64) -> bool {
    console(world).is_none_or(|uart| uart.put(arg.to_le_bytes()[0]))
}

/// True where the console has input that the guest has not read.
pub(super) fn has_input(world: &World) -> bool {
    let uart = world.console.map(|base| Uart { bus: &world.bus, base });
    uart.is_some_and(|uart| uart.ready(uart::LSR_DATA_READY))
}

fn console(world: &World) -> Option<Uart<'_>> {
    let uart = world.console.map(|base| Uart { bus: &world.bus, base });
    if uart.is_none() && world.first(Notice::ConsoleMissing) {
        warn!("The guest uses the SBI console of a machine without a UART: output vanishes");
    }
    uart
}

/// The first UART as firmware uses it: polled, next to whatever the guest does with it.
struct Uart<'a> {
    bus: &'a Bus,
    base: u64,
}

/// ns16550a, one byte apart.
mod uart {
    /// Transmit and receive; the divisor's low byte while `LCR_DLAB` is set.
    pub(super) const DATA: u64 = 0;
    pub(super) const LCR: u64 = 3;
    pub(super) const LCR_DLAB: u8 = 0x80;
    pub(super) const LSR: u64 = 5;
    pub(super) const LSR_DATA_READY: u8 = 0x01;
    pub(super) const LSR_THR_EMPTY: u8 = 0x20;
}

impl Uart<'_> {
    fn put(&self, byte: u8) -> bool {
        let room = self.ready(uart::LSR_THR_EMPTY);
        if room {
            self.bus.write(self.base.wrapping_add(uart::DATA), &[byte]);
        }
        room
    }

    fn get(&self) -> Option<u8> {
        self.ready(uart::LSR_DATA_READY).then(|| self.register(uart::DATA))
    }

    /// Whether the data register is there (the guest may be setting the divisor) and `condition` holds.
    fn ready(&self, condition: u8) -> bool {
        self.register(uart::LCR) & uart::LCR_DLAB == 0 && self.register(uart::LSR) & condition != 0
    }

    fn register(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.bus.read(self.base.wrapping_add(offset), &mut byte);
        byte[0]
    }
}
