//! The goldfish real-time clock (QEMU: hw/rtc/goldfish_rtc.c names the registers; Linux: drivers/rtc/rtc-goldfish.c).

use crate::mmio;

/// Address of the RTC on QEMU's `virt` machine and on rvmm's.
pub const BASE: usize = 0x10_1000;
/// Its interrupt source there.
pub const IRQ: u32 = 11;

/// Register offsets.
pub mod reg {
    /// Low half of the time; reading it latches the high half
    pub const TIME_LOW: usize = 0x00;
    /// High half of the time
    pub const TIME_HIGH: usize = 0x04;
    /// Low half of the alarm; writing it arms the alarm
    pub const ALARM_LOW: usize = 0x08;
    /// High half of the alarm
    pub const ALARM_HIGH: usize = 0x0c;
    /// Interrupt enable
    pub const IRQ_ENABLED: usize = 0x10;
    /// Disarms the alarm
    pub const CLEAR_ALARM: usize = 0x14;
    /// 1 while an alarm is armed
    pub const ALARM_STATUS: usize = 0x18;
    /// Clears the interrupt
    pub const CLEAR_INTERRUPT: usize = 0x1c;
}

/// Reads a register.
#[must_use]
pub fn read(reg: usize) -> u32 {
    mmio::read32(BASE + reg)
}

/// Writes a register.
pub fn write(reg: usize, value: u32) {
    mmio::write32(BASE + reg, value);
}

/// Nanoseconds since 1970.
#[must_use]
pub fn now_ns() -> u64 {
    let low = read(reg::TIME_LOW);
    u64::from(read(reg::TIME_HIGH)) << 32 | u64::from(low)
}

/// Arms the alarm.
pub fn set_alarm_ns(time_ns: u64) {
    write(reg::ALARM_HIGH, (time_ns >> 32) as u32);
    write(reg::ALARM_LOW, time_ns as u32);
}
