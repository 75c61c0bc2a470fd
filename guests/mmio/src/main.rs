//! Accesses of every width to every kind of address behave as documented: a register supports its own width; any other access
//! to a device reads zero and changes nothing; unassigned addresses read as zero and ignore writes.
//!
//! Boot argument `unassigned=fault`: unassigned addresses cause access faults instead, as on real hardware and on QEMU's
//! `virt` machine.

#![no_std]
#![no_main]

use core::arch::asm;

use runtime::uart::{self, reg};
use runtime::{Board, Failure, ensure, ensure_eq, mmio, report, rtc, sbi, trap};

runtime::guest!(run);

const FINISHER: usize = 0x10_0000;
const GENERATION_ID: usize = 0x10_2000;

fn run(board: &'static Board) {
    report::run(
        "mmio",
        board,
        &[
            ("UART in bytes", uart_bytes),
            ("UART in other widths", uart_wide),
            ("UART past its registers", uart_end),
            ("clock in words", rtc_words),
            ("clock in other widths", rtc_other),
            ("power register", power),
            ("generation ID", generation_id),
            ("nowhere", nowhere),
            ("reserved registers of the APLIC", aplic),
            ("compressed instructions", compressed),
            ("destination registers", destinations),
        ],
    );
}

/// Reads with one of the four widths.
fn read(addr: usize, width: usize) -> u64 {
    match width {
        1 => mmio::read8(addr).into(),
        2 => mmio::read16(addr).into(),
        4 => mmio::read32(addr).into(),
        _ => mmio::read64(addr),
    }
}

/// Writes with one of the four widths.
fn write(addr: usize, width: usize, value: u64) {
    match width {
        1 => mmio::write8(addr, value as u8),
        2 => mmio::write16(addr, value as u16),
        4 => mmio::write32(addr, value as u32),
        _ => mmio::write64(addr, value),
    }
}

fn uart_bytes(_: &'static Board) -> Result<(), Failure> {
    for value in 0..=255 {
        uart::write(reg::SCR, value);
        ensure_eq!(uart::read(reg::SCR), value, "the scratch register");
    }
    let lsr = uart::read(reg::LSR);
    ensure!(lsr & (uart::LSR_THRE | uart::LSR_TEMT) != 0 || lsr != 0, "LSR {lsr:#x}");
    ensure_eq!(uart::read(reg::LCR), uart::LCR_8N1, "LCR");
    // The divisor latch hides the data and interrupt enable registers.
    uart::write(reg::LCR, uart::LCR_8N1 | uart::LCR_DLAB);
    uart::write(reg::DLL, 0x34);
    uart::write(reg::DLM, 0x12);
    let divisor = (uart::read(reg::DLL), uart::read(reg::DLM));
    uart::write(reg::LCR, uart::LCR_8N1);
    ensure_eq!(divisor, (0x34, 0x12), "the divisor latch");
    ensure_eq!(uart::read(reg::IER), 0, "IER behind the divisor latch");
    Ok(())
}

fn uart_wide(_: &'static Board) -> Result<(), Failure> {
    if !sbi::is_kvm() {
        return Ok(());
    }
    uart::write(reg::SCR, 0x5a);
    uart::write(reg::MCR, 0x0b);
    for (width, at) in [(2, reg::MCR), (4, reg::MCR)] {
        ensure_eq!(read(uart::BASE + at, width), 0x0b, "{width} bytes at {at}");
        // The bytes above the low one would be visible in SCR.
        write(uart::BASE + at, width, 0x5858_5858_5858_580b);
    }
    ensure_eq!(uart::read(reg::MCR), 0x0b, "MCR after writes in other widths");
    ensure_eq!(uart::read(reg::SCR), 0x5a, "the scratch register after writes in other widths");
    // In loopback, each store returns one byte.
    uart::write(reg::MCR, uart::MCR_LOOP);
    for (byte, width) in [(0x31, 2), (0x32, 4), (0x33, 8)] {
        write(uart::BASE + reg::THR, width, 0xffff_ffff_ffff_ff00 | byte);
        ensure_eq!(uart::try_receive().map(u64::from), Some(byte), "{width} bytes to THR");
        write(uart::BASE + reg::THR, 1, byte);
        ensure_eq!(read(uart::BASE + reg::RBR, width), byte, "{width} bytes from RBR");
    }
    ensure_eq!(uart::try_receive(), None, "more in the receiver than was sent");
    uart::init();
    ensure_eq!(uart::read(reg::LCR), uart::LCR_8N1, "LCR after writes in other widths");
    ensure_eq!(uart::read(reg::IER), 0, "IER after writes in other widths");
    Ok(())
}

fn uart_end(_: &'static Board) -> Result<(), Failure> {
    if !sbi::is_kvm() {
        return Ok(());
    }
    uart::write(reg::SCR, 0x5a);
    for at in (8..0x100).step_by(8).chain([9, 0x7f, 0xfe, 0xff]) {
        for width in [1, 2, 4, 8] {
            if at % width == 0 {
                write(uart::BASE + at, width, u64::MAX);
                ensure_eq!(read(uart::BASE + at, width), 0, "{width} bytes at {at:#x}");
            }
        }
    }
    ensure_eq!(uart::read(reg::SCR), 0x5a, "the scratch register");
    Ok(())
}

fn rtc_words(_: &'static Board) -> Result<(), Failure> {
    let first = rtc::now_ns();
    let second = rtc::now_ns();
    ensure!(first > 1_600_000_000_000_000_000, "the clock shows {first} ns, before 2020");
    ensure!(second >= first, "the clock runs backwards: {first}, {second}");
    for value in [0, 0x1234_5678, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff] {
        rtc::write(rtc::reg::ALARM_HIGH, value);
        ensure_eq!(rtc::read(rtc::reg::ALARM_HIGH), value, "the alarm's high half");
    }
    if sbi::is_kvm() {
        ensure_eq!(rtc::read(0xffc), 0, "the last word of the clock's window");
        rtc::write(0xffc, 0xffff_ffff);
    }
    Ok(())
}

fn rtc_other(_: &'static Board) -> Result<(), Failure> {
    if !sbi::is_kvm() {
        return Ok(());
    }
    rtc::write(rtc::reg::ALARM_HIGH, 0x1234_5678);
    for width in [1, 2] {
        for at in [0, 8, 0x10, 0x18, 0xff8] {
            ensure_eq!(read(rtc::BASE + at, width), 0, "{width} bytes at {at:#x}");
        }
        write(rtc::BASE + 8, width, u64::MAX);
    }
    write(rtc::BASE + rtc::reg::ALARM_HIGH, 1, 0);
    ensure_eq!(
        rtc::read(rtc::reg::ALARM_HIGH),
        0x1234_5678,
        "the alarm's high half after other widths"
    );
    ensure_eq!(rtc::read(rtc::reg::ALARM_STATUS), 0, "an alarm armed in another width");
    // Eight bytes are two registers.
    let first = rtc::now_ns();
    let second = read(rtc::BASE, 8);
    ensure!(second >= first, "eight bytes of the time are {second}, after {first}");
    // The low half is written first and arms the alarm, which must not expire with the old high half.
    rtc::write(rtc::reg::ALARM_HIGH, 0x7fff_ffff);
    write(rtc::BASE + 8, 8, u64::MAX);
    ensure_eq!(rtc::read(rtc::reg::ALARM_HIGH), u32::MAX, "the alarm's high half of eight bytes");
    ensure_eq!(rtc::read(rtc::reg::ALARM_STATUS), 1, "the alarm after eight bytes");
    rtc::write(rtc::reg::CLEAR_ALARM, 1);
    ensure_eq!(mmio::read8(rtc::BASE + 0xfff), 0, "the last byte of the clock's window");
    Ok(())
}

fn power(_: &'static Board) -> Result<(), Failure> {
    for width in [2, 4] {
        ensure_eq!(read(FINISHER, width), 0, "the power register, {width} bytes");
    }
    for junk in [0, 1, 0x5554, 0x1234_5556, 0xffff_ffff, 0x3332] {
        mmio::write32(FINISHER, junk);
    }
    if sbi::is_kvm() {
        // A write with another width than the register's, or next to it, is not a request.
        for (at, width) in [(0, 1), (0, 8), (4, 4), (8, 8), (0xffc, 4), (2, 2)] {
            ensure_eq!(read(FINISHER + at, width), 0, "{width} bytes at {at:#x}");
            write(FINISHER + at, width, 0x5555);
        }
    }
    Ok(())
}

fn generation_id(_: &'static Board) -> Result<(), Failure> {
    if !sbi::is_kvm() {
        return Ok(());
    }
    let id = [read(GENERATION_ID, 8), read(GENERATION_ID + 8, 8)];
    ensure!(id != [0, 0], "the id is zero");
    for width in [1, 2, 4, 8] {
        let mut parts = [0; 2];
        for at in (0..16).step_by(width) {
            write(GENERATION_ID + at, width, !0);
            parts[at / 8] |= read(GENERATION_ID + at, width) << (at % 8 * 8);
        }
        ensure_eq!(parts, id, "the id in reads of {width} bytes");
        for at in [16, 0xff8] {
            ensure_eq!(read(GENERATION_ID + at, width), 0, "{width} bytes at {at:#x}");
        }
    }
    Ok(())
}

/// Addresses without memory or a device.
fn holes(board: &'static Board) -> [usize; 14] {
    let end = board.ram.0 + board.ram.1;
    [
        0x8,
        0x10_3000,
        0x20_0000,
        0xbff_fff8,
        0x1000_0100,
        0x1fff_fff8,
        0x6000_0000,
        0x7fff_fff8,
        end,
        end + 0x1000,
        end + (1 << 30),
        1 << 36,
        (1 << 40) + 0x18,
        1 << 55,
    ]
}

fn nowhere(board: &'static Board) -> Result<(), Failure> {
    let faults = board.arg("unassigned") == Some("fault");
    for hole in holes(board) {
        // On QEMU's machine some of these are devices that rvmm lacks.
        if !sbi::is_kvm() && !(0x8000_0000..1 << 55).contains(&hole) {
            continue;
        }
        for width in [1, 2, 4, 8] {
            let mut value = 0;
            let on_read = trap::expect(|| value = read(hole, width));
            let on_write = trap::expect(|| write(hole, width, u64::MAX));
            if faults {
                let read = on_read.map(|trap| (trap.cause, trap.tval));
                let write = on_write.map(|trap| (trap.cause, trap.tval));
                ensure_eq!(
                    read,
                    Some((trap::LOAD_ACCESS, hole)),
                    "read of {width} bytes at {hole:#x}"
                );
                ensure_eq!(
                    write,
                    Some((trap::STORE_ACCESS, hole)),
                    "write of {width} bytes at {hole:#x}"
                );
            } else {
                ensure_eq!((on_read, on_write), (None, None), "traps at {hole:#x}");
                ensure_eq!(value, 0, "{width} bytes at {hole:#x}");
            }
        }
    }
    Ok(())
}

/// Reserved registers of the controller are registers, not holes, for every implementation.
fn aplic(board: &'static Board) -> Result<(), Failure> {
    let Some((base, _)) = board.fdt.compatible("riscv,aplic").and_then(|node| node.reg(0)) else {
        return Ok(());
    };
    // Between sourcecfg and mmsiaddrcfg.
    let reserved = base as usize + 0x1000;
    let mut value = 0;
    let on_write = trap::expect(|| write(reserved, 4, u64::MAX));
    let on_read = trap::expect(|| value = read(reserved, 4));
    ensure_eq!((on_read, on_write), (None, None), "traps at {reserved:#x}");
    ensure_eq!(value, 0, "{reserved:#x}");
    Ok(())
}

/// `c.lw`, `c.sw`, `c.lwsp`, `c.swsp` and similar, which the kernel decodes separately.
fn compressed(_: &'static Board) -> Result<(), Failure> {
    let alarm_high = rtc::BASE + rtc::reg::ALARM_HIGH;
    let (value, by_stack): (u64, u64);
    // SAFETY: stores and loads of a device register, at `base` and through a borrowed stack pointer; nothing can interrupt
    // the hart here, and the trap vector does not need the stack pointer.
    unsafe {
        asm!(
            ".option push",
            ".option arch, +c",
            "c.sw a4, 12(a5)",
            "c.lw a3, 12(a5)",
            "mv t0, sp",
            "mv sp, a5",
            "c.swsp a5, 12(sp)",
            "c.lwsp t1, 12(sp)",
            "mv sp, t0",
            ".option pop",
            in("a4") 0x0765_4321,
            in("a5") alarm_high - 12,
            out("a3") value,
            out("t0") _,
            out("t1") by_stack,
        );
    }
    ensure_eq!(value, 0x0765_4321, "what c.sw stored");
    ensure_eq!(by_stack, (alarm_high - 12) as u64, "what c.swsp stored");
    Ok(())
}

/// Every destination register of a load, and every source register of a store.
fn destinations(_: &'static Board) -> Result<(), Failure> {
    macro_rules! each {
        ($($register:literal)*) => {
            $({
                let got: u64;
                // SAFETY: a store to and a load from the UART's scratch register.
                unsafe {
                    asm!(
                        concat!("mv t1, ", $register),
                        concat!("mv ", $register, ", t2"),
                        concat!("sb ", $register, ", 7(t0)"),
                        concat!("mv ", $register, ", zero"),
                        concat!("lbu ", $register, ", 7(t0)"),
                        concat!("mv t2, ", $register),
                        concat!("mv ", $register, ", t1"),
                        in("t0") uart::BASE,
                        out("t1") _,
                        inout("t2") 0x6bu64 => got,
                    );
                }
                ensure_eq!(got, 0x6b, "through {}", $register);
            })*
        };
    }
    each!("ra" "gp" "s0" "s1" "s2" "s3" "s4" "s5" "s6" "s7" "s8" "s9" "s10" "s11");
    each!("a0" "a1" "a2" "a3" "a4" "a5" "a6" "a7" "t3" "t4" "t5" "t6");
    // A load into x0 is still executed: it removes the byte from the receiver.
    uart::write(reg::MCR, uart::MCR_LOOP);
    uart::write(reg::THR, b'x');
    // SAFETY: a load from a device register.
    unsafe { asm!("lbu zero, 0({})", in(reg) uart::BASE) }
    let left = uart::try_receive();
    uart::init();
    ensure_eq!(left, None, "the receiver after a load into zero");
    Ok(())
}
