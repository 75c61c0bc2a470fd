//! The requirements on every device, checked for every model of the catalog and the PLIC.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use proptest::prelude::*;
use rvmm_devices::testing::{MemoryConsole, TestIrq, create, dispatch_event, turn, wiring};
use rvmm_devices::virtio::vhost_user::testing::{Traits, serve_so_many_at, shared_memory};
use rvmm_devices::{
    Bus, CATALOG, Claim, DeviceConfig, FdtProperty, FdtValue, Interest, MmioDevice, Model,
    Placement, Plic, Wiring,
};

const WIDTHS: [usize; 4] = [1, 2, 4, 8];

/// A newly built device and its connections.
struct Built {
    device: Box<dyn MmioDevice>,
    irq: TestIrq,
    console: MemoryConsole,
}

/// The minimal options of a model.
fn least(model: &Model) -> String {
    match model.name {
        "net" => "net,tap=tap0".into(),
        "blk" => "blk,path=disk".into(),
        "vsock" => format!("vsock,path={}", socket_path()),
        "console" => "console,to=null".into(),
        "uart" => "uart,to=null".into(),
        "const" => "const,addr=0x40,value=0x6688".into(),
        "flash" => "flash,addr=0x22000000,file=image".into(),
        "fs" => "fs,tag=share,path=folder".into(),
        "vhost-user-blk" | "vhost-user-net" | "vhost-user-vsock" => {
            let path = socket_path();
            serve_so_many_at(path.as_ref(), 1, Traits::default()).unwrap();
            let mac = if model.name == "vhost-user-net" { ",mac=02:00:00:00:00:01" } else { "" };
            format!("{},socket={path}{mac}", model.name)
        }
        name => name.into(),
    }
}

fn build(model: &Model) -> Built {
    let (irq, console) = (TestIrq::default(), MemoryConsole::new().unwrap());
    let mut wiring =
        Wiring { irq: Arc::new(irq.clone()), console: Some(Box::new(console.clone())), ..wiring() };
    if model.shares_ram {
        wiring.memory = Arc::new(shared_memory(0x8000_0000, 1 << 20).unwrap());
    }
    let text = least(model);
    let device = create(&text, wiring).unwrap();
    if let (Some((_, path)), true) = (text.split_once("socket="), model.shares_ram) {
        std::fs::remove_file(path.split(',').next().unwrap()).unwrap();
    }
    Built { device, irq, console }
}

/// A path for one test only; the device deletes the file.
fn socket_path() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("rvmm-conformance-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
    std::env::temp_dir().join(name).display().to_string()
}

/// One of each model, and a PLIC.
fn devices() -> Vec<Built> {
    let mut devices: Vec<_> = CATALOG.iter().map(build).collect();
    let (irq, console) = (TestIrq::default(), MemoryConsole::new().unwrap());
    let plic = Plic::new(95, vec![Arc::new(irq.clone()), Arc::new(TestIrq::default())]).unwrap();
    devices.push(Built { device: Box::new(plic), irq, console });
    devices
}

/// Offsets to access: all of a small device; of a large one its edges and the boundaries in its register map.
fn offsets(device: &dyn MmioDevice) -> Vec<u64> {
    let size = device.size();
    let seams = [0, 0x1000, 0x2000, 0x20_0000, 0x20_1000, 0x20_3000, size.saturating_sub(0x100)];
    let around = seams.iter().flat_map(|seam| *seam..seam + 0x200);
    around.chain(size.saturating_sub(16)..size + 16).chain([u64::MAX - 8, u64::MAX]).collect()
}

/// Every register of a device, by the offsets that can be read with some width.
fn registers(device: &mut dyn MmioDevice) -> Vec<(u64, usize, Option<[u8; 8]>)> {
    let mut all = Vec::new();
    for offset in offsets(device) {
        for width in WIDTHS {
            let mut data = [0; 8];
            let read = device.read(offset, &mut data[..width]);
            all.push((offset, width, read.ok().map(|()| data)));
        }
    }
    all
}

#[test]
fn names_are_unique_and_fit_on_a_command_line() {
    let mut names = HashSet::new();
    for model in CATALOG {
        assert!(names.insert(model.name), "{} twice", model.name);
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(!model.name.is_empty() && model.name.chars().all(plain), "{:?}", model.name);
        assert!(!model.summary.is_empty() && !model.summary.ends_with('.'), "{}", model.name);
        assert!(model.irqs <= 1, "{}", model.name);
        let is_asked = model.placement == Placement::AtAddress;
        assert_eq!(is_asked, model.keys.iter().any(|key| key.name == "addr"), "{}", model.name);
        assert_eq!(Model::find(model.name).unwrap().name, model.name);
    }
}

#[test]
fn an_unknown_model_is_refused_with_the_known_ones() {
    for name in ["Serial", "Uart", "serial "] {
        let error = DeviceConfig::parse(name).unwrap_err().to_string();
        assert!(error.contains(&format!("{name:?}")), "{error}");
        assert!(CATALOG.iter().all(|model| error.contains(model.name)), "{error}");
    }
}

#[test]
fn every_model_builds_with_minimal_options_and_has_its_name() {
    for model in CATALOG {
        let device = build(model).device;
        assert_eq!(device.name(), model.name);
        assert!(device.size() > 0 && device.size() <= 0x1000_0000, "{}", model.name);
    }
}

#[test]
fn every_register_that_can_be_read_has_a_name() {
    for Built { mut device, .. } in devices() {
        let name = device.register_names();
        for (offset, width, data) in registers(device.as_mut()) {
            // Eight bytes may cover two registers of which only one is readable.
            let second = || name(offset.wrapping_add(4), false).filter(|_| width == 8);
            let named = name(offset, false).or_else(second);
            assert!(data.is_none() || named.is_some(), "{} {offset:#x}/{width}", device.name());
            assert!(named.is_none_or(|name| !name.is_empty()), "{} {offset:#x}", device.name());
        }
        assert_eq!(name(u64::MAX - 2, true), None, "{}", device.name());
    }
}

#[test]
fn keys_are_unique_and_explained() {
    for model in CATALOG {
        let mut names = HashSet::new();
        for key in model.keys {
            assert!(names.insert(key.name), "{}: {} twice", model.name, key.name);
            assert!(!key.name.is_empty() && !key.name.contains(['=', ',']), "{}", model.name);
            assert!(!key.value.is_empty() && !key.help.is_empty(), "{}: {}", model.name, key.name);
        }
    }
}

#[test]
fn an_unknown_key_is_refused_with_the_known_ones() {
    for model in CATALOG {
        let error = DeviceConfig::parse(format!("{},no-such-key=1", model.name)).unwrap_err();
        let keys: Vec<_> = model.all_keys().iter().map(|key| key.name).collect();
        let known = match keys.as_slice() {
            [] => format!("{} takes none", model.name),
            keys => format!("known: {}", keys.join(", ")),
        };
        assert_eq!(error.to_string(), format!("Unknown option \"no-such-key\" ({known})"));
    }
}

#[test]
fn an_invalid_value_is_refused_without_a_panic() {
    for model in CATALOG {
        for key in model.keys {
            for value in ["", "\0", "-", "99999999999999999999999", "🦀", "%s", " 1"] {
                let text = format!("{},{}={value}", model.name, key.name);
                drop(create(&text, wiring()));
            }
        }
    }
}

#[test]
fn a_register_reads_the_same_until_it_is_written() {
    for mut built in devices() {
        let (first, second) = (registers(built.device.as_mut()), registers(built.device.as_mut()));
        assert!(first == second, "{}", built.device.name());
        assert!(first.iter().any(|(_, _, read)| read.is_some()), "{}", built.device.name());
    }
}

#[test]
fn an_access_past_the_end_is_refused() {
    for mut built in devices() {
        for offset in [built.device.size(), built.device.size() + 4, u64::MAX - 7, u64::MAX] {
            for width in WIDTHS {
                let name = built.device.name();
                assert!(built.device.read(offset, &mut [0; 8][..width]).is_err(), "{name}");
                assert!(built.device.write(offset, &[0; 8][..width]).is_err(), "{name}");
            }
        }
    }
}

#[test]
fn after_a_reset_everything_is_as_it_was_at_power_on() {
    for (mut built, mut fresh) in devices().into_iter().zip(devices()) {
        for fill in [0xff, 0x5a, 0x01, 0x80, 0x13] {
            for offset in offsets(built.device.as_ref()) {
                for width in WIDTHS {
                    let _ = built.device.write(offset, &[fill; 8][..width]);
                }
            }
        }
        built.console.type_in(b"input");
        while turn(built.device.as_mut(), 0).unwrap() != 0 {}
        built.device.reset();
        assert!(!built.irq.is_high(), "{}", built.device.name());
        let (reset, initial) = (registers(built.device.as_mut()), registers(fresh.device.as_mut()));
        for (reset, initial) in reset.iter().zip(&initial) {
            assert_eq!(reset, initial, "{}", built.device.name());
        }
    }
}

#[test]
fn the_line_of_a_new_device_is_low() {
    for built in devices() {
        assert!(!built.irq.is_high() && built.irq.changes() == 0, "{}", built.device.name());
    }
}

#[test]
fn sources_are_valid_for_epoll_and_a_new_device_is_idle() {
    for mut built in devices() {
        let sources = built.device.sources();
        let distinct = |key: fn(&rvmm_devices::Source) -> i64| {
            sources.iter().map(key).collect::<HashSet<_>>().len() == sources.len()
        };
        let name = built.device.name();
        assert!(distinct(|source| source.fd.into()), "{name}: a descriptor twice");
        assert!(distinct(|source| source.token.into()), "{name}: a token twice");
        assert!(
            sources.iter().all(|s| matches!(s.interest, Interest::Read | Interest::Signal)),
            "{name}"
        );
        assert_eq!(turn(built.device.as_mut(), 0).unwrap(), 0, "{name}");
    }
}

#[test]
fn a_spurious_event_is_harmless() {
    for mut built in devices() {
        for token in (0..10).chain([u32::MAX]) {
            dispatch_event(built.device.as_mut(), token);
        }
        assert!(!built.irq.is_high(), "{}", built.device.name());
    }
}

#[test]
fn the_tree_names_each_device_and_its_companions() {
    let mut names = HashSet::new();
    for built in devices() {
        let Some(fdt) = built.device.fdt() else { continue };
        assert!(!fdt.compatible.is_empty(), "{}", built.device.name());
        assert!(!fdt.name.contains('@') && !fdt.name.is_empty(), "{}", fdt.name);
        // Devices in slots differ by their address.
        let is_told_apart = matches!(fdt.name, "virtio_mmio" | "serial");
        assert!(names.insert(fdt.name) || is_told_apart, "{} twice", fdt.name);
        let board_s =
            ["reg", "interrupts", "interrupt-parent", "interrupts-extended", "compatible"];
        let own = |property: &FdtProperty| !board_s.contains(&property.name);
        assert!(fdt.properties.iter().all(own), "{}", fdt.name);
        for companion in &fdt.companions {
            assert!(names.insert(companion.name), "{} twice", companion.name);
            let compatible = companion.properties.iter().find(|p| p.name == "compatible");
            let value = &compatible.unwrap().value;
            assert!(matches!(value, FdtValue::Strings(names) if !names.is_empty()));
        }
    }
}

#[test]
fn all_models_share_a_bus() {
    let bases = (0..).map(|index| index * 0x1000_0000);
    let placed = bases.zip(devices()).map(|(base, built)| (base, built.device)).collect();
    let bus = Bus::new(placed).unwrap();
    for slot in bus.devices() {
        let mut data = [0xee; 8];
        assert_eq!(bus.read(slot.base + slot.size, &mut data), Claim::Unassigned);
        assert_eq!(data, [0; 8], "{}", slot.name);
        assert_eq!(bus.read(slot.base + slot.size - 1, &mut data), Claim::Refused);
        assert_eq!(data, [0; 8], "{}", slot.name);
    }
    bus.reset();
}

/// Models whose state is out of reach, and a word of the reason.
const UNSAVABLE: [(&str, &str); 5] = [
    ("fs", "program"),
    ("net-user", "program"),
    ("vhost-user-net", "program"),
    ("vhost-user-blk", "program"),
    ("vhost-user-vsock", "program"),
];

/// Accesses a register, and returns what a driver sees.
fn access(
    built: &mut Built,
    (is_write, offset, width): (bool, u64, usize),
    value: u64,
) -> (bool, [u8; 8], bool) {
    let mut data = value.to_le_bytes();
    let result = if is_write {
        built.device.write(offset, &data[..width])
    } else {
        built.device.read(offset, &mut data[..width])
    };
    (result.is_ok(), data, built.irq.is_high())
}

proptest! {
    /// A restored device behaves as the saved one, whatever the driver has done before and does afterwards.
    #[test]
    fn a_device_that_is_saved_and_restored_behaves_as_before(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0_u64..0x30, 0_u64..0x110, 0x2000_u64..0x2010, 0x20_1000_u64..0x20_1008],
             prop::sample::select(vec![1_usize, 4, 4, 4, 8]), prop_oneof![0_u64..32, any::<u64>()]),
            1..60,
        ),
        at in 0_usize..60,
    ) {
        for (mut saved, mut restored) in devices().into_iter().zip(devices()) {
            let name = saved.device.name();
            let at = at.min(accesses.len());
            for (is_write, offset, width, value) in &accesses[..at] {
                access(&mut saved, (*is_write, *offset, *width), *value);
            }
            saved.device.pause().unwrap();
            let state = saved.device.save();
            if let Some((_, why)) = UNSAVABLE.iter().find(|(model, _)| *model == name) {
                prop_assert!(state.unwrap_err().to_string().contains(why), "{}", name);
                continue;
            }
            let text = serde_json::to_string(&state.unwrap()).unwrap();
            restored.device.restore(serde_json::from_str(&text).unwrap()).unwrap();
            prop_assert_eq!(saved.irq.is_high(), restored.irq.is_high(), "{}: {}", name, text);
            let again = serde_json::to_string(&restored.device.save().unwrap()).unwrap();
            prop_assert_eq!(&again, &text, "{}", name);
            saved.device.resume();
            restored.device.resume();
            for (is_write, offset, width, value) in &accesses[at..] {
                let what = (*is_write, *offset, *width);
                let before = access(&mut saved, what, *value);
                prop_assert_eq!(access(&mut restored, what, *value), before, "{}: {:x?}", name, what);
            }
        }
    }
}

/// `text` with the number at the position `at` (modulo the count of numbers) replaced.
fn with_another_number(text: &str, at: usize, number: i128) -> String {
    let starts: Vec<usize> = text
        .match_indices(|c: char| c.is_ascii_digit())
        .map(|(index, _)| index)
        .filter(|index| !text[..*index].ends_with(|c: char| c.is_ascii_alphanumeric()))
        .collect();
    let Some(&start) = starts.get(at.checked_rem(starts.len()).unwrap_or(0)) else {
        return text.to_owned();
    };
    let len = text[start..].find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len() - start);
    format!("{}{number}{}", &text[..start], &text[start + len..])
}

proptest! {
    /// A state that somebody has changed is refused, or is one that a driver can cause.
    #[test]
    fn no_state_makes_a_device_panic(
        accesses in prop::collection::vec((any::<bool>(), 0_u64..0x110, any::<u32>()), 0..30),
        changes in prop::collection::vec(
            (any::<usize>(), prop_oneof![-1_i128..70, 0_i128..0x1_0000, 0..=i128::from(u64::MAX), Just(i128::from(u64::MAX))]),
            1..6,
        ),
    ) {
        for (mut saved, mut restored) in devices().into_iter().zip(devices()) {
            for (is_write, offset, value) in &accesses {
                access(&mut saved, (*is_write, offset & !3, 4), u64::from(*value));
            }
            saved.device.pause().unwrap();
            let Ok(state) = saved.device.save() else { continue };
            let text = serde_json::to_string(&state).unwrap();
            let text = changes.iter().fold(text, |text, (at, number)| with_another_number(&text, *at, *number));
            if restored.device.restore(serde_json::from_str(&text).unwrap()).is_err() {
                continue;
            }
            restored.device.resume();
            for (is_write, offset, value) in &accesses {
                access(&mut restored, (*is_write, offset & !3, 4), u64::from(*value));
                restored.console.type_in(&value.to_le_bytes());
                dispatch_event(restored.device.as_mut(), *value);
            }
            let awake = (0..100).all(|_| turn(restored.device.as_mut(), 0).unwrap() != 0);
            prop_assert!(!awake, "{} spins: {}", restored.device.name(), text);
            restored.device.pause().unwrap();
            prop_assert!(restored.device.save().is_ok(), "{}: {}", restored.device.name(), text);
        }
    }
}

#[test]
fn a_state_of_another_model_is_refused() {
    let states: Vec<_> = devices().iter().map(|built| built.device.save()).collect();
    for (index, built) in devices().iter_mut().enumerate() {
        let name = built.device.name();
        let accepted = states.iter().enumerate().filter(|(other, state)| {
            let Ok(state) = state else { return false };
            *other != index && built.device.restore(state.clone()).is_ok()
        });
        // Devices of the same kind: ports, and devices without a state.
        let same: &[&str] = match name {
            "serial" | "uart" => &["serial", "uart"],
            "power" | "const" | "flash" => &["power", "const", "flash"],
            _ => &[],
        };
        let names: Vec<_> = accepted.map(|(other, _)| devices()[other].device.name()).collect();
        assert!(names.iter().all(|other| same.contains(other)), "{name} accepts {names:?}");
    }
}

#[test]
fn a_bus_saves_and_restores_all_its_devices_by_their_places() {
    let saveable = |built: &Built| !UNSAVABLE.iter().any(|(name, _)| *name == built.device.name());
    let bus = |step: u64| {
        let bases = (0..).map(|index| index * step);
        let devices = devices().into_iter().filter(saveable).map(|built| built.device);
        Bus::new(bases.zip(devices).collect()).unwrap()
    };
    let (saved, restored) = (bus(0x1000_0000), bus(0x1000_0000));
    let rtc = saved.devices().find(|slot| slot.name == "rtc").unwrap().base;
    assert_eq!(saved.write(rtc + 0x0c, &7_u32.to_le_bytes()), Claim::Device);
    saved.pause().unwrap();
    restored.restore(saved.save().unwrap()).unwrap();
    restored.resume();
    let mut high = [0; 4];
    assert_eq!(restored.read(rtc + 0x0c, &mut high), Claim::Device);
    assert_eq!(u32::from_le_bytes(high), 7);
    let elsewhere = bus(0x2000_0000).restore(saved.save().unwrap()).unwrap_err().to_string();
    assert!(elsewhere.ends_with("the machine has no such device"), "{elsewhere}");
    let states = saved.save().unwrap();
    let refusal = |states| restored.restore(states).unwrap_err().to_string();
    assert!(refusal(states[1..].to_vec()).ends_with("it has no saved state"));
    let twice = [&states[..], &states[..1]].concat();
    assert!(refusal(twice).ends_with("it has two saved states"));
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_makes_a_device_panic_or_its_loop_spin(
        accesses in prop::collection::vec(
            (0_u8..8, prop_oneof![0_u64..0x30, 0_u64..0x400, any::<u64>()], 0_usize..9, any::<u64>()),
            1..100,
        )
    ) {
        for mut built in devices() {
            for (what, offset, width, value) in &accesses {
                let mut data = value.to_le_bytes();
                match what {
                    0..3 => drop(built.device.read(*offset, &mut data[..*width]).err()),
                    3..6 => drop(built.device.write(*offset, &data[..*width]).err()),
                    6 => built.console.type_in(&data),
                    _ => dispatch_event(built.device.as_mut(), data[0].into()),
                }
            }
            let awake = (0..100).all(|_| turn(built.device.as_mut(), 0).unwrap() != 0);
            prop_assert!(!awake, "{} spins", built.device.name());
        }
    }
}
