//! Configurations of all models: what is written in one form is read back from it, and from the other.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use proptest::prelude::*;
use rvmm_devices::config::{BlkConfig, FsConfig, MountTag};
use rvmm_devices::{CATALOG, DeviceConfig, Model, Placement};
use serde_json::{Map, Value, json};

/// A path of any bytes, as in JSON.
fn path() -> impl Strategy<Value = Value> {
    prop::collection::vec(prop_oneof![Just(b','), Just(b'='), 1_u8..], 1..12).prop_map(|bytes| {
        match String::from_utf8(bytes) {
            Ok(text) => json!(text),
            Err(error) => {
                let digits: String =
                    error.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
                json!({ "hex": digits })
            }
        }
    })
}

fn endpoint() -> impl Strategy<Value = Value> {
    let kind = prop::sample::select(vec!["file", "unix", "connect"]);
    prop_oneof![
        prop::sample::select(vec!["stdio", "null", "pty"]).prop_map(Value::from),
        (kind, path()).prop_map(|(kind, path)| json!({ kind: path })),
    ]
}

fn one_of(words: &'static [&'static str]) -> BoxedStrategy<Value> {
    prop::sample::select(words).prop_map(Value::from).boxed()
}

fn number<T: Copy + Into<Value> + 'static>(
    numbers: impl Strategy<Value = T> + 'static,
) -> BoxedStrategy<Value> {
    numbers.prop_map(Into::into).boxed()
}

/// The valid values of a key of the catalog.
fn values(model: &str, key: &str) -> BoxedStrategy<Value> {
    match (model, key) {
        ("flash", "addr" | "host") => number((0_u64..1 << 52).prop_map(|page| page * 4096)),
        ("flash", "size") => number((1_u64..=16 << 10).prop_map(|pages| pages * 4096)),
        ("const", "addr" | "value") => number(any::<u64>()),
        (_, "slot") => number(0_u8..32),
        ("rtc", "offset") => number(-9_223_372_036_i64..=9_223_372_036),
        (_, "bps" | "iops" | "rx_bps" | "tx_bps" | "rx_pps" | "tx_pps") => number(1_u64..),
        ("vhost-user-blk", "queues") => number(1_u8..=16),
        (_, "queues") => number(1_u8..=8),
        ("net", "fd") => number(any::<u16>()),
        ("net", "mtu") => number(68_u16..),
        ("net", "tap") => "[a-z0-9,= ]{1,15}".prop_map(Value::from).boxed(),
        ("vsock", "cid") => number(3_u32..u32::MAX),
        ("vsock", "timeout") => number(1_u32..=86_400),
        ("vsock", "backend") => one_of(&["unix", "kernel"]),
        ("balloon", "size") => number(0_u32..=16_777_215),
        ("balloon", "stats") => number(any::<u32>()),
        ("blk", "cache") => one_of(&["writeback", "none", "unsafe"]),
        ("blk", "format") => one_of(&["raw", "qcow2"]),
        ("blk", "serial") => "[ -~]{1,20}".prop_map(Value::from).boxed(),
        ("flash", "mode") => one_of(&["map", "lazy", "passthrough"]),
        ("fs", "sandbox") => one_of(&["namespace", "chroot", "none"]),
        ("fs", "tag") => "[ -~]{1,36}".prop_map(Value::from).boxed(),
        (_, "mac") => "02(:[0-9a-f]{2}){5}".prop_map(Value::from).boxed(),
        (_, "forward") => one_of(&["2222:22", "1:2+65535:65535"]),
        (_, "path" | "socket" | "file") => path().boxed(),
        (_, "to") => endpoint().boxed(),
        (_, port) if port.starts_with("port") => ("[a-z.]{1,3}", endpoint())
            .prop_map(|(name, to)| json!({ "name": name, "to": to }))
            .boxed(),
        (_, "ro" | "backing" | "pin" | "vhost" | "reporting" | "deflate_on_oom") => {
            any::<bool>().prop_map(Value::from).boxed()
        }
        other => panic!("no values for {other:?}"),
    }
}

/// Keys without which a configuration does not exist.
fn is_needed(model: &str, key: &str) -> bool {
    matches!(
        (model, key),
        ("blk", "path") | ("uart", "to") | ("const", _) | ("flash", "addr") | ("fs", "tag")
    ) || (model.starts_with("vhost-user") && key == "socket")
}

/// A configuration with any of the model's keys, as JSON. Some exclude each other.
fn configuration() -> impl Strategy<Value = Value> {
    prop::sample::select(CATALOG).prop_flat_map(|model: Model| {
        let pairs: Vec<_> = model
            .all_keys()
            .into_iter()
            .map(|key| {
                let value = values(model.name, key.name);
                let value = if is_needed(model.name, key.name) {
                    value.prop_map(Some).boxed()
                } else {
                    prop::option::of(value).boxed()
                };
                value.prop_map(move |value| value.map(|value| (key.name.to_owned(), value)))
            })
            .collect();
        pairs.prop_map(move |pairs| {
            let model = ("model".to_owned(), model.name.into());
            Value::Object(pairs.into_iter().flatten().chain([model]).collect::<Map<_, _>>())
        })
    })
}

/// The text of a value in an option.
fn bytes_of(value: &Value) -> Vec<u8> {
    match value {
        Value::Bool(is) => if *is { "on" } else { "off" }.into(),
        Value::Number(number) => number.to_string().into(),
        Value::String(text) => text.clone().into(),
        Value::Object(fields) => match fields.iter().next().unwrap() {
            (key, Value::String(digits)) if key == "hex" => {
                let pair = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
                (0..digits.len()).step_by(2).map(pair).collect()
            }
            (key, name) if key == "name" => {
                [bytes_of(name), b"=".into(), bytes_of(&fields["to"])].concat()
            }
            (kind, path) => [kind.as_bytes(), b":", &bytes_of(path)].concat(),
        },
        other => panic!("{other}"),
    }
}

/// The same configuration as `NAME,key=value,...`.
fn text_of(json: &Value) -> OsString {
    let fields = json.as_object().unwrap();
    let mut text = fields["model"].as_str().unwrap().as_bytes().to_vec();
    for (key, value) in fields.iter().filter(|(key, _)| *key != "model") {
        text.extend(format!(",{key}=").bytes());
        for byte in bytes_of(value) {
            text.extend(std::iter::repeat_n(byte, if byte == b',' { 2 } else { 1 }));
        }
    }
    OsString::from_vec(text)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn a_configuration_is_the_same_as_text_and_as_json(json in configuration()) {
        let config: DeviceConfig = serde_json::from_value(json.clone()).unwrap();
        let written = serde_json::to_value(&config).unwrap();
        let again: DeviceConfig = serde_json::from_value(written.clone()).unwrap();
        prop_assert_eq!(&again, &config);
        let expected = config.check().map(|()| config);
        prop_assert_eq!(&DeviceConfig::parse(text_of(&json)), &expected);
        prop_assert_eq!(&DeviceConfig::parse(text_of(&written)), &expected);
    }
}

#[test]
fn the_boards_devices_have_a_configuration_without_options() {
    let built_in: Vec<_> = DeviceConfig::built_in().iter().map(|d| d.model().name).collect();
    let fixed = CATALOG.iter().filter(|model| model.placement == Placement::Fixed);
    assert_eq!(built_in, fixed.map(|model| model.name).collect::<Vec<_>>());
    for device in DeviceConfig::built_in() {
        assert_eq!(DeviceConfig::parse(device.model().name), Ok(device));
    }
}

#[test]
fn a_program_makes_configurations_without_texts() {
    let disk = DeviceConfig::from(BlkConfig { ro: true, ..BlkConfig::new("a,b") });
    assert_eq!(DeviceConfig::parse("blk,path=a,,b,ro=on"), Ok(disk));
    let folder = FsConfig::new(MountTag::new("home").unwrap(), "/srv");
    assert_eq!(DeviceConfig::parse("fs,tag=home,path=/srv"), Ok(folder.into()));
}
