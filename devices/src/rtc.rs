//! Goldfish real-time clock (`google,goldfish-rtc`): the time of day in nanoseconds, and one alarm.
//!
//! Source: "Goldfish virtual hardware", section Timer/RTC, and the behaviour of Linux's `rtc-goldfish`.
//! All registers are 32 bits wide; an access of 8 bytes accesses two, the lower first, as on QEMU's `virt`. A 64-bit time is
//! read low half first, which latches the high half. It is written high half first: writing the low half takes effect (for the
//! alarm, arms it).
//!
//! The guest may set the clock; that changes an offset in this device, never the host's clock. An
//! armed alarm uses a timer on the host's monotonic clock and is checked against the time of day when that
//! expires: after a step of the host's clock it is late by at most [`RECHECK`], and never early.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::warn;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::ModelConfig;
use crate::config::number::number;
use crate::device::{
    Access, AccessError, FdtDesc, Interest, MmioDevice, RegisterName, Source, read_words,
    write_words,
};
use crate::irq::IrqPin;
use crate::lifecycle::{Lifecycle, PauseError, RestoreError, SaveError, SavedState};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "rtc",
    summary: "Goldfish real-time clock",
    keys: &[Key {
        name: "offset",
        value: "SECONDS",
        help: "the guest's clock at power-on, relative to the host's; may be negative",
    }],
    placement: Placement::Fixed,
    irqs: 1,
    shares_ram: false,
};

number! {
    /// Seconds between two clocks: as many as 64 bits have in nanoseconds.
    ClockOffset(i64), -9_223_372_036, 9_223_372_036, 1, "a whole number of seconds, at most 9223372036 either way"
}

/// The configuration of the clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RtcConfig {
    /// The guest's clock at power-on, relative to the host's, in seconds; `None` for 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<ClockOffset>,
}

mod reg {
    pub(super) const TIME_LOW: u64 = 0x00;
    pub(super) const TIME_HIGH: u64 = 0x04;
    pub(super) const ALARM_LOW: u64 = 0x08;
    pub(super) const ALARM_HIGH: u64 = 0x0c;
    pub(super) const IRQ_ENABLED: u64 = 0x10;
    pub(super) const CLEAR_ALARM: u64 = 0x14;
    pub(super) const ALARM_STATUS: u64 = 0x18;
    pub(super) const CLEAR_INTERRUPT: u64 = 0x1c;
}

fn register_name(offset: u64, _: bool) -> Option<&'static str> {
    Some(match offset {
        reg::TIME_LOW => "TIME_LOW",
        reg::TIME_HIGH => "TIME_HIGH",
        reg::ALARM_LOW => "ALARM_LOW",
        reg::ALARM_HIGH => "ALARM_HIGH",
        reg::IRQ_ENABLED => "IRQ_ENABLED",
        reg::CLEAR_ALARM => "CLEAR_ALARM",
        reg::ALARM_STATUS => "ALARM_STATUS",
        reg::CLEAR_INTERRUPT => "CLEAR_INTERRUPT",
        _ => return None,
    })
}

const TOKEN_ALARM: u32 = 0;

/// The longest time between checks of the clock for an armed alarm.
pub const RECHECK: Duration = Duration::from_secs(60);

/// Nanoseconds in a second.
const NANOS: i64 = 1_000_000_000;

/// The time of day.
pub trait Clock: Send + Sync {
    /// Nanoseconds since 1970-01-01 00:00 UTC.
    fn now_ns(&self) -> u64;
}

/// The host's time of day; setting the host's clock changes it.
#[derive(Debug, Clone, Copy, Default)]
pub struct WallClock;

impl Clock for WallClock {
    fn now_ns(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The device.
pub struct Rtc {
    /// Offset from the host's clock at power-on, in nanoseconds.
    initial_offset: u64,

    clock: Arc<dyn Clock>,
    irq: IrqPin,
    timer: TimerFd,

    state: RtcState,
}

/// The guest-visible state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RtcState {
    /// Offset from the clock, modulo 2^64 nanoseconds.
    offset: u64,
    /// The latched high half of the time, returned by `TIME_HIGH`.
    time_high: u32,
    /// The time of the alarm, by the guest's clock.
    alarm: u64,
    alarm_armed: bool,
    irq_enabled: bool,
    irq_pending: bool,
}

impl ModelConfig for RtcConfig {
    fn build(&self, wiring: Wiring) -> Built {
        let nanos = self.offset.map_or(0, ClockOffset::get).saturating_mul(NANOS);
        let timer = TimerFd::new().map_err(|error| BuildError::Host {
            model: MODEL.name,
            what: "timer",
            source: error.into(),
        })?;
        let state = RtcState::at_power_on(nanos.cast_unsigned());
        Ok(Device::Mmio(Box::new(Rtc {
            initial_offset: nanos.cast_unsigned(),
            clock: wiring.clock,
            irq: IrqPin::new(wiring.irq),
            timer,
            state,
        })))
    }
}

impl Lifecycle for Rtc {
    fn pause(&mut self) -> Result<(), PauseError> {
        Ok(())
    }

    /// An alarm whose time has come meanwhile fires at once: the time of day does not stand still.
    fn resume(&mut self) {
        self.check_alarm();
        self.sync_irq();
    }

    fn reset(&mut self) {
        self.state = RtcState::at_power_on(self.initial_offset);
        self.check_alarm();
        self.irq.reset();
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        let Self { initial_offset: _, clock: _, irq: _, timer: _, state } = self;
        SavedState::of(state)
    }

    fn restore(&mut self, state: SavedState) -> Result<(), RestoreError> {
        self.state = state.read()?;
        self.sync_irq();
        Ok(())
    }
}

impl MmioDevice for Rtc {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn size(&self) -> u64 {
        0x1000
    }

    fn register_names(&self) -> RegisterName {
        register_name
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        read_words(offset, data, |register| self.read_register(register))
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        write_words(offset, data, |register, value| self.write_register(register, value))
    }

    fn fdt(&self) -> Option<FdtDesc> {
        Some(FdtDesc {
            name: "rtc",
            compatible: vec!["google,goldfish-rtc"],
            properties: Vec::new(),
            companions: Vec::new(),
        })
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        let fd = self.timer.as_raw_fd();
        list.push(Source { fd, token: TOKEN_ALARM, interest: Interest::Read });
    }

    fn ready(&mut self, _token: u32) {
        self.check_alarm();
        self.sync_irq();
    }
}

impl Rtc {
    fn read_register(&mut self, register: u64) -> Result<u32, AccessError> {
        Ok(match register {
            reg::TIME_LOW => {
                let [low, high] = halves(self.now());
                self.state.time_high = high;
                low
            }
            reg::TIME_HIGH => self.state.time_high,
            reg::ALARM_LOW => halves(self.state.alarm)[0],
            reg::ALARM_HIGH => halves(self.state.alarm)[1],
            reg::IRQ_ENABLED => self.state.irq_enabled.into(),
            reg::ALARM_STATUS => self.state.alarm_armed.into(),
            reg::CLEAR_ALARM | reg::CLEAR_INTERRUPT => return Err(AccessError::WriteOnly),
            _ => return Err(AccessError::NoRegister),
        })
    }

    fn write_register(&mut self, register: u64, value: u32) -> Access {
        match register {
            reg::TIME_HIGH => self.set_time(|[low, _]| [low, value]),
            reg::TIME_LOW => {
                self.set_time(|[_, high]| [value, high]);
                self.check_alarm();
            }
            reg::ALARM_LOW => {
                self.state.alarm = whole([value, halves(self.state.alarm)[1]]);
                self.state.alarm_armed = true;
                self.check_alarm();
            }
            reg::ALARM_HIGH => self.state.alarm = whole([halves(self.state.alarm)[0], value]),
            reg::IRQ_ENABLED => self.state.irq_enabled = value & 1 != 0,
            reg::CLEAR_ALARM => {
                self.state.alarm_armed = false;
                self.check_alarm();
            }
            reg::CLEAR_INTERRUPT => self.state.irq_pending = false,
            reg::ALARM_STATUS => return Err(AccessError::ReadOnly),
            _ => return Err(AccessError::NoRegister),
        }
        self.sync_irq();
        Ok(())
    }

    /// The guest's time of day.
    fn now(&self) -> u64 {
        self.clock.now_ns().wrapping_add(self.state.offset)
    }

    /// Replaces one half of the time. The new time is only complete with the low half, written last, so
    /// the caller then checks the alarm.
    fn set_time(&mut self, change: impl FnOnce([u32; 2]) -> [u32; 2]) {
        let now = self.now();
        let new = whole(change(halves(now)));
        self.state.offset = self.state.offset.wrapping_add(new.wrapping_sub(now));
    }

    /// Fires the alarm if its time is reached; otherwise sets the timer for it.
    ///
    /// Every call sets the timer: that also clears an expiry, so that it is never
    /// read, and a stale event can never block.
    fn check_alarm(&mut self) {
        let left = self.state.alarm.saturating_sub(self.now());
        if self.state.alarm_armed && left == 0 {
            self.state.alarm_armed = false;
            self.state.irq_pending = true;
        }
        let wait = match self.state.alarm_armed {
            true => until_next_check(left),
            false => Duration::ZERO,
        };
        if let Err(error) = self.timer.reset(wait, None) {
            // Not expected with a valid timer and a valid time.
            warn!("{}: cannot set the alarm's timer: {error}", MODEL.name);
        }
    }

    fn sync_irq(&mut self) {
        self.irq.set(self.state.irq_enabled && self.state.irq_pending);
    }
}

impl RtcState {
    fn at_power_on(offset: u64) -> Self {
        Self {
            offset,
            time_high: 0,
            alarm: 0,
            alarm_armed: false,
            irq_enabled: false,
            irq_pending: false,
        }
    }
}

/// Time until the next check of the clock, for an alarm in `left` nanoseconds.
fn until_next_check(left: u64) -> Duration {
    Duration::from_nanos(left).min(RECHECK)
}

/// A 64-bit value as its low and high half.
fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// The 64-bit value with this low and high half.
fn whole([low, high]: [u32; 2]) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ManualClock, TestIrq, create, turn, wiring};

    const START: u64 = 1_700_000_000_123_456_789;

    struct Board {
        rtc: Box<dyn MmioDevice>,
        irq: TestIrq,
        clock: ManualClock,
    }

    fn board(options: &str) -> Board {
        let (irq, clock) = (TestIrq::default(), ManualClock::default());
        clock.set_ns(START);
        let wiring =
            Wiring { irq: Arc::new(irq.clone()), clock: Arc::new(clock.clone()), ..wiring() };
        let rtc = create(options, wiring).unwrap();
        Board { rtc, irq, clock }
    }

    impl Board {
        fn read(&mut self, offset: u64) -> u32 {
            let mut data = [0; 4];
            self.rtc.read(offset, &mut data).unwrap();
            u32::from_le_bytes(data)
        }

        fn write(&mut self, offset: u64, value: u32) {
            self.rtc.write(offset, &value.to_le_bytes()).unwrap();
        }

        /// As Linux does: the low half first.
        fn time(&mut self) -> u64 {
            whole([self.read(reg::TIME_LOW), self.read(reg::TIME_HIGH)])
        }

        /// As Linux does: the high half first.
        fn set(&mut self, low: u64, high: u64, value: u64) {
            let [l, h] = halves(value);
            self.write(high, h);
            self.write(low, l);
        }

        fn set_alarm(&mut self, alarm: u64) {
            self.set(reg::ALARM_LOW, reg::ALARM_HIGH, alarm);
            self.write(reg::IRQ_ENABLED, 1);
        }
    }

    #[test]
    fn the_time_is_the_clock_s_in_nanoseconds() {
        let mut board = board("rtc");
        assert_eq!(board.time(), START);
        board.clock.advance_ns(1);
        assert_eq!(board.time(), START + 1);
    }

    #[test]
    fn the_low_half_latches_the_high_half() {
        let mut board = board("rtc");
        board.clock.set_ns(0x1_ffff_ffff);
        assert_eq!(board.read(reg::TIME_LOW), 0xffff_ffff);
        board.clock.advance_ns(1);
        assert_eq!(board.read(reg::TIME_HIGH), 1);
        assert_eq!(board.time(), 0x2_0000_0000);
    }

    #[test]
    fn the_guest_sets_its_clock_and_not_the_host_s() {
        let mut board = board("rtc");
        board.set(reg::TIME_LOW, reg::TIME_HIGH, 42_000_000_000);
        board.clock.advance_ns(5);
        assert_eq!(board.time(), 42_000_000_005);
        assert_eq!(board.clock.now_ns(), START + 5);
        board.rtc.reset();
        assert_eq!(board.time(), START + 5);
    }

    #[test]
    fn an_offset_moves_the_clock_either_way_and_survives_a_reset() {
        for (options, nanos) in [("rtc,offset=3600", 3600 * NANOS), ("rtc,offset=-1", -NANOS)] {
            let mut board = board(options);
            let expected = START.wrapping_add_signed(nanos);
            assert_eq!(board.time(), expected, "{options}");
            board.set(reg::TIME_LOW, reg::TIME_HIGH, 7);
            board.rtc.reset();
            assert_eq!(board.time(), expected, "{options}");
        }
    }

    #[test]
    fn an_offset_that_is_no_number_of_seconds_is_refused() {
        for value in ["", "x", "1.5", "9223372037", "-9223372037", "99999999999999999999"] {
            let error = create(&format!("rtc,offset={value}"), wiring()).err().unwrap();
            assert!(matches!(error, BuildError::Option { .. }), "{value}: {error}");
        }
    }

    #[test]
    fn an_alarm_in_the_past_fires_at_once() {
        let mut board = board("rtc");
        board.set_alarm(START);
        assert!(board.irq.is_high());
        assert_eq!(board.read(reg::ALARM_STATUS), 0);
        board.write(reg::CLEAR_INTERRUPT, 1);
        assert!(!board.irq.is_high());
    }

    #[test]
    fn an_alarm_fires_at_its_time_and_not_before() {
        let mut board = board("rtc");
        board.set_alarm(START + 1_000_000);
        assert_eq!(board.read(reg::ALARM_STATUS), 1);
        // The timer expires by the host's monotonic clock; the guest's clock has not advanced.
        assert_eq!(turn(board.rtc.as_mut(), 1000).unwrap(), 1);
        assert!(!board.irq.is_high());
        board.clock.advance_ns(1_000_000);
        assert_eq!(turn(board.rtc.as_mut(), 1000).unwrap(), 1);
        assert!(board.irq.is_high());
        assert_eq!(board.read(reg::ALARM_STATUS), 0);
        // One alarm is one interrupt, and the loop is idle again.
        assert_eq!(turn(board.rtc.as_mut(), 10).unwrap(), 0);
    }

    #[test]
    fn a_distant_alarm_is_checked_against_the_clock_periodically() {
        assert_eq!(until_next_check(1), Duration::from_nanos(1));
        assert_eq!(until_next_check(u64::MAX), RECHECK);
    }

    #[test]
    fn a_cleared_alarm_does_not_fire() {
        let mut board = board("rtc");
        board.set_alarm(START + 1_000_000);
        board.write(reg::CLEAR_ALARM, 1);
        board.clock.advance_ns(2_000_000);
        assert_eq!(turn(board.rtc.as_mut(), 10).unwrap(), 0);
        board.rtc.ready(TOKEN_ALARM);
        assert!(!board.irq.is_high());
        assert_eq!(board.read(reg::ALARM_STATUS), 0);
    }

    #[test]
    fn an_interrupt_that_is_not_enabled_waits_until_it_is() {
        let mut board = board("rtc");
        board.write(reg::ALARM_LOW, 1);
        assert!(!board.irq.is_high());
        board.write(reg::IRQ_ENABLED, 0xffff_ffff);
        assert!(board.irq.is_high());
        assert_eq!(board.read(reg::IRQ_ENABLED), 1);
        board.write(reg::IRQ_ENABLED, 2);
        assert!(!board.irq.is_high());
    }

    #[test]
    fn setting_the_clock_past_the_alarm_fires_it() {
        let mut board = board("rtc");
        board.set_alarm(START + 3600 * 1_000_000_000);
        let later = START + 7200 * 1_000_000_000;
        let [low, high] = halves(later);
        board.write(reg::TIME_HIGH, high);
        assert!(!board.irq.is_high(), "the time is not complete");
        board.write(reg::TIME_LOW, low);
        assert!(board.irq.is_high());
    }

    #[test]
    fn the_alarm_reads_back_and_extreme_ones_do_no_harm() {
        let mut board = board("rtc");
        for alarm in [0, 1, u64::MAX, 1 << 63, START] {
            board.set_alarm(alarm);
            let read = whole([board.read(reg::ALARM_LOW), board.read(reg::ALARM_HIGH)]);
            assert_eq!(read, alarm);
            board.set(reg::TIME_LOW, reg::TIME_HIGH, alarm);
            board.write(reg::CLEAR_INTERRUPT, 0);
        }
    }

    #[test]
    fn a_reset_clears_the_alarm_and_the_interrupt() {
        let mut board = board("rtc");
        board.set_alarm(START);
        board.set_alarm(START + 1_000_000);
        board.rtc.reset();
        assert!(!board.irq.is_high());
        board.clock.advance_ns(2_000_000);
        assert_eq!(turn(board.rtc.as_mut(), 10).unwrap(), 0);
        for offset in [reg::ALARM_LOW, reg::ALARM_HIGH, reg::IRQ_ENABLED, reg::ALARM_STATUS] {
            assert_eq!(board.read(offset), 0, "at {offset:#x}");
        }
    }

    #[test]
    fn refusals_say_why() {
        let mut rtc = board("rtc").rtc;
        let mut word = [0; 4];
        assert_eq!(rtc.read(reg::CLEAR_ALARM, &mut word), Err(AccessError::WriteOnly));
        assert_eq!(rtc.read(reg::CLEAR_INTERRUPT, &mut word), Err(AccessError::WriteOnly));
        assert_eq!(rtc.write(reg::ALARM_STATUS, &word), Err(AccessError::ReadOnly));
        assert_eq!(rtc.read(0x20, &mut word), Err(AccessError::NoRegister));
        assert_eq!(rtc.read(0x02, &mut word), Err(AccessError::Misaligned));
        for width in [1, 2] {
            assert_eq!(rtc.read(0x00, &mut word[..width]), Err(AccessError::Width));
            assert_eq!(rtc.write(0x00, &word[..width]), Err(AccessError::Width));
        }
        assert_eq!(rtc.read(0x04, &mut [0; 8]), Err(AccessError::Misaligned));
        assert_eq!(rtc.read(0x20, &mut [0; 8]), Err(AccessError::NoRegister));
    }

    #[test]
    fn eight_bytes_are_two_registers_as_on_qemus_virt() {
        let mut board = board("rtc");
        let mut data = [0; 8];
        board.rtc.read(reg::TIME_LOW, &mut data).unwrap();
        assert_eq!(u64::from_le_bytes(data), START);
        let alarm = START + 1_000_000;
        board.rtc.write(reg::ALARM_LOW, &alarm.to_le_bytes()).unwrap();
        board.rtc.read(reg::ALARM_LOW, &mut data).unwrap();
        assert_eq!(u64::from_le_bytes(data), alarm);
        // The alarm's status, and a write-only register.
        board.rtc.read(reg::ALARM_STATUS, &mut data).unwrap();
        assert_eq!(data, [0; 8]);
    }
}
