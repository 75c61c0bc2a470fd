//! The chips without queues, and the text of `--device`, driven by bytes.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use rvmm_devices::testing::{
    ManualClock, MemoryConsole, MemoryHost, TestIrq, build, create, dispatch_event, turn, wiring,
};
use rvmm_devices::{CATALOG, DeviceConfig, IrqLine, Lifecycle, MmioDevice, Plic, Wiring};

use super::script::Script;

const ACTIONS: usize = 400;

/// Accesses with any width an offset below `near`, or any offset.
fn access(device: &mut dyn MmioDevice, near: usize, script: &mut Script<'_>) {
    let offset = if script.once_in(8) { script.odd() } else { script.below(near) as u64 };
    let width = script.pick(&[4, 1, 4, 2, 8, 4, 4, 1]);
    let mut data = script.odd().to_le_bytes();
    if script.flag() {
        let _ = device.write(offset, &data[..width]);
    } else {
        let _ = device.read(offset, &mut data[..width]);
    }
}

/// Checks that the device becomes idle.
fn rest(device: &mut dyn MmioDevice) {
    let is_awake = (0..1000).all(|_| turn(device, 0).unwrap() != 0);
    assert!(!is_awake, "{} never sleeps", device.name());
}

/// Drives interrupt lines and harts of a PLIC; a claim returns only sources that were raised.
pub fn plic(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let sources = script.pick(&[95, 1, 31, 32, 33, 1023]);
    let harts: Vec<TestIrq> = (0..=script.below(3)).map(|_| TestIrq::default()).collect();
    let outputs = harts.iter().map(|line| Arc::new(line.clone()) as Arc<dyn IrqLine>).collect();
    let mut plic = Plic::new(sources, outputs).unwrap();
    let mut raised = vec![false; sources as usize + 1];
    for _ in 0..ACTIONS {
        if script.is_over() {
            break;
        }
        let source = 1 + script.below(sources as usize);
        match script.below(8) {
            0 | 1 => {
                let high = script.flag();
                raised[source] |= high;
                plic.source(source as u32).unwrap().set_level(high);
            }
            2 => {
                // Priorities, enables, thresholds that exist.
                let hart = script.below(harts.len()) as u64;
                let word = source as u64 / 32;
                let (offset, value) = match script.below(3) {
                    0 => (4 * source as u64, script.below(9) as u32),
                    1 => (0x2000 + 0x80 * (2 * hart + 1) + 4 * word, script.odd32()),
                    _ => (0x20_0000 + 0x1000 * (2 * hart + 1), script.below(9) as u32),
                };
                plic.write(offset, &value.to_le_bytes()).unwrap();
            }
            3 | 4 => {
                let hart = script.below(harts.len()) as u64;
                let offset = 0x20_0004 + 0x1000 * (2 * hart + 1);
                let mut claim = [0; 4];
                plic.read(offset, &mut claim).unwrap();
                let claimed = u32::from_le_bytes(claim);
                assert!(claimed <= sources, "{claimed} of {sources}");
                assert!(claimed == 0 || raised[claimed as usize], "{claimed} was never raised");
                let complete = if script.flag() { claimed } else { script.odd32() };
                plic.write(offset, &complete.to_le_bytes()).unwrap();
            }
            5 if script.once_in(8) => plic.reset(),
            6 => access(&mut plic, 0x20_4008, &mut script),
            _ => access(&mut plic, 0x2200, &mut script),
        }
    }
    plic.reset();
    // Without enable bits nothing interrupts.
    assert!(harts.iter().all(|line| !line.is_high()));
}

/// Runs a driver and a console against the UART, whose buffers are bounded.
pub fn uart(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let (irq, console) = (TestIrq::default(), MemoryConsole::new().unwrap());
    let wiring =
        Wiring { irq: Arc::new(irq.clone()), console: Some(Box::new(console.clone())), ..wiring() };
    let mut device = create("serial", wiring).unwrap();
    for _ in 0..ACTIONS {
        match script.below(10) {
            _ if script.is_over() => break,
            0 => console.type_in(&vec![b'i'; script.below(300)]),
            1 => console.set_room(script.flag().then_some(script.below(300))),
            2 => match script.below(4) {
                0 => console.hang_up(),
                1 => console.connect(),
                2 => console.fail_writes(Some(std::io::ErrorKind::Other)),
                _ => console.fail_writes(None),
            },
            3 => rest(device.as_mut()),
            4 => {
                let byte = [script.byte()];
                for _ in 0..script.below(2000) {
                    let _ = device.write(0, &byte);
                }
            }
            5 if script.once_in(8) => device.reset(),
            6 => dispatch_event(device.as_mut(), script.below(8) as u32),
            _ => access(device.as_mut(), 9, &mut script),
        }
    }
    device.reset();
    assert!(!irq.is_high());
    console.connect();
    console.fail_writes(None);
    console.set_room(None);
    rest(device.as_mut());
    device.write(0, b"!").unwrap();
    let mut line = [0];
    device.read(5, &mut line).unwrap();
    assert!(console.output().ends_with(b"!"), "the UART is silent");
}

/// Accesses the registers of the RTC and sets the time.
pub fn rtc(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let (irq, clock) = (TestIrq::default(), ManualClock::default());
    let wiring = Wiring { irq: Arc::new(irq.clone()), clock: Arc::new(clock.clone()), ..wiring() };
    let text = format!("rtc,offset={}", script.pick(&["0", "-1", "9223372036854775807", "60"]));
    let Ok(mut device) = create(&text, wiring) else { return };
    for _ in 0..ACTIONS {
        match script.below(8) {
            _ if script.is_over() => break,
            0 => clock.set_ns(script.odd()),
            1 => {
                turn(device.as_mut(), 0).unwrap();
            }
            2 if script.once_in(8) => device.reset(),
            3 => dispatch_event(device.as_mut(), script.below(3) as u32),
            _ => access(device.as_mut(), 0x28, &mut script),
        }
    }
    device.reset();
    assert!(!irq.is_high());
    // A timer may be due repeatedly, but not without an alarm.
    rest(device.as_mut());
}

/// Builds a device from a user's text, or gets an error message.
pub fn options(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let model = CATALOG[script.below(CATALOG.len())];
    let pick = script.byte();
    let rest = script.rest();
    let begin = match pick % 4 {
        0 => String::new(),
        1 => format!("{},", model.name),
        // An existing key.
        _ => match model.keys.get(usize::from(pick / 4) % model.keys.len().max(1)) {
            Some(key) => format!("{},{}=", model.name, key.name),
            None => format!("{},", model.name),
        },
    };
    let text = OsString::from_vec([begin.as_bytes(), rest].concat());
    let Ok(config) = DeviceConfig::parse(&text) else { return };
    // What is valid survives JSON.
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<DeviceConfig>(&json).unwrap(), config);
    // Sockets would be files on the host.
    if matches!(&config, DeviceConfig::Vsock(vsock) if vsock.path.is_some()) {
        return;
    }
    let wiring = Wiring { host: Arc::new(MemoryHost::default()), ..wiring() };
    match build(&config, wiring) {
        Ok(device) => assert_eq!(device.name(), config.model().name),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
