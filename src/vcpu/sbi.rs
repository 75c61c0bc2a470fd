//! SBI calls that KVM leaves to user space (SBI specification 3.0): the debug console, the legacy console, system suspend,
//! and the ranges of extensions that do not exist here.

use log::{Level, debug, info, log_enabled, warn};

use super::context::{MachineContext, Notice};
use super::dispatch::Flow;
use super::exit::SbiCall;
use super::stop::StopReason;
use crate::memory::RamError;
use crate::riscv::sbi::error::{INVALID_PARAM, NOT_SUPPORTED, SUCCESS};
use crate::riscv::sbi::{eid, fid, v01};

/// Maximum number of bytes per DBCN call: it returns to the guest in bounded time, and the guest calls again for the rest.
const MAX_BYTES: u64 = LARGE_CHUNK as u64;
/// Buffer sizes between guest memory and console, for calls of few bytes and of many.
const SMALL_CHUNK: usize = 256;
const LARGE_CHUNK: usize = 4096;

/// Handles a call. The work is out of line, to keep calls that only probe cheap.
pub(super) fn handle(call: &mut SbiCall<'_>, context: &MachineContext) -> Flow {
    match (call.extension, call.function) {
        (eid::DBCN | v01::PUTCHAR | v01::GETCHAR, _) => console_call(call, context),
        (eid::BASE, fid::PROBE_EXTENSION) => {
            *call.ret = [SUCCESS, 0];
            Flow::Resume
        }
        (eid::SUSP, fid::SYSTEM_SUSPEND) => suspend(call),
        (extension, function) => {
            let first = context.is_first(Notice::UnknownSbi);
            if first || log_enabled!(Level::Debug) {
                log_unknown(first, extension, function);
            }
            *call.ret = [NOT_SUPPORTED, 0];
            Flow::Resume
        }
    }
}

/// The calls that reach the console.
#[inline(never)]
fn console_call(call: &mut SbiCall<'_>, context: &MachineContext) -> Flow {
    let (error, value, flow) = match call.extension {
        v01::PUTCHAR => match put(context, call.args[0]) {
            true => (SUCCESS, call.args[1], Flow::Resume),
            false => return Flow::Retry,
        },
        // A legacy call returns its result in a0 alone; the kernel writes a1 as well.
        v01::GETCHAR => (get(context).map_or(u64::MAX, u64::from), call.args[1], Flow::Resume),
        _ => dbcn(call.function, call.args, context),
    };
    *call.ret = [error, value];
    flow
}

type CallResult = (u64, u64, Flow);

/// Logs an unknown call, the first as a warning.
#[cold]
#[inline(never)]
fn log_unknown(first: bool, extension: u64, function: u64) {
    if first {
        warn!(
            "The guest calls SBI extension {extension:#x}, function {function:#x}: not supported"
        );
    } else {
        debug!("SBI extension {extension:#x}, function {function:#x}: not supported");
    }
}

/// The kernel has checked the call and set up the resume address: the call can no longer be refused. The calling hart is the
/// only one still running.
#[cold]
#[inline(never)]
fn suspend(call: &mut SbiCall<'_>) -> Flow {
    info!("The guest suspends the system; its timer, console input or an interrupt wakes it");
    *call.ret = [SUCCESS, 0];
    Flow::Suspend
}

/// Debug Console (SBI chapter 12).
fn dbcn(function: u64, args: &[u64; 6], context: &MachineContext) -> CallResult {
    match function {
        fid::CONSOLE_WRITE | fid::CONSOLE_READ => {
            let [len, base, base_high, ..] = *args;
            if len == 0 {
                return (SUCCESS, 0, Flow::Resume);
            }
            if base_high != 0 || !context.ram.contains(base, len) {
                return (INVALID_PARAM, 0, Flow::Resume);
            }
            let len = len.min(MAX_BYTES);
            let moved = match function {
                fid::CONSOLE_WRITE if len <= SMALL_CHUNK as u64 => {
                    write::<SMALL_CHUNK>(context, base, len)
                }
                fid::CONSOLE_WRITE => write::<LARGE_CHUNK>(context, base, len),
                _ => read::<SMALL_CHUNK>(context, base, len),
            };
            match moved {
                Ok(done) => (SUCCESS, done, Flow::Resume),
                Err(RamError::NotRam) => (INVALID_PARAM, 0, Flow::Resume),
                Err(RamError::Lost) => {
                    let reason = StopReason::lost(&context.ram, Some(base));
                    (INVALID_PARAM, 0, reason.into())
                }
            }
        }
        // This call blocks until the byte is sent. The hart repeats the call, so that it still takes interrupts.
        fid::CONSOLE_WRITE_BYTE if put(context, args[0]) => (SUCCESS, 0, Flow::Resume),
        fid::CONSOLE_WRITE_BYTE => (SUCCESS, 0, Flow::Retry),
        _ => (NOT_SUPPORTED, 0, Flow::Resume),
    }
}

/// Copies guest memory to the console, as much as it takes now: one access per chunk.
fn write<const CHUNK: usize>(
    context: &MachineContext,
    base: u64,
    len: u64,
) -> Result<u64, RamError> {
    let mut buf = [0; CHUNK];
    let mut done = 0;
    while done < len {
        let chunk = chunk(&mut buf, len - done);
        context.ram.read(base + done, chunk)?;
        let taken = send(context, chunk);
        done += taken as u64;
        if taken < chunk.len() {
            break;
        }
    }
    Ok(done)
}

/// Copies available console input to guest memory.
fn read<const CHUNK: usize>(
    context: &MachineContext,
    base: u64,
    len: u64,
) -> Result<u64, RamError> {
    let mut buf = [0; CHUNK];
    let mut done = 0;
    while done < len {
        let chunk = chunk(&mut buf, len - done);
        let got = take(context, chunk);
        context.ram.write(base + done, chunk.get(..got).unwrap_or_default())?;
        done += got as u64;
        if got < chunk.len() {
            break;
        }
    }
    Ok(done)
}

fn chunk(buf: &mut [u8], len: u64) -> &mut [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
    buf.get_mut(..len).unwrap_or_default()
}

/// Sends one byte to the console; false if it is full. The other bits of the argument are ignored.
fn put(context: &MachineContext, arg: u64) -> bool {
    send(context, &[arg.to_le_bytes()[0]]) == 1
}

/// Takes one byte from the console, if there is one.
fn get(context: &MachineContext) -> Option<u8> {
    let mut byte = [0];
    (take(context, &mut byte) == 1).then_some(byte[0])
}

/// Sends bytes to the console and returns the number it took. A machine without one discards all.
fn send(context: &MachineContext, bytes: &[u8]) -> usize {
    let Some(addr) = console(context) else { return bytes.len() };
    context.bus.serial_line(addr, |line| line.send(bytes)).unwrap_or(bytes.len())
}

/// Takes bytes from the console and returns their number.
fn take(context: &MachineContext, buf: &mut [u8]) -> usize {
    let Some(addr) = console(context) else { return 0 };
    context.bus.serial_line(addr, |line| line.take(buf)).unwrap_or(0)
}

/// True if the console has input that the guest has not read. Input is requested from now on.
pub(super) fn has_input(context: &MachineContext) -> bool {
    let asked =
        context.console.and_then(|addr| context.bus.serial_line(addr, |line| line.has_input()));
    asked.unwrap_or(false)
}

fn console(context: &MachineContext) -> Option<u64> {
    if context.console.is_none() && context.is_first(Notice::ConsoleMissing) {
        warn!("The guest uses the SBI console of a machine without a UART: output is discarded");
    }
    context.console
}
