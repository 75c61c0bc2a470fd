//! Devices in JSON: objects, or the texts of `--device`.

use std::fmt;

use rvmm_devices::DeviceConfig;
use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::quoted;

/// A device as it may be given.
#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used")]
pub(super) enum Given {
    /// The model and its options.
    Typed(Box<DeviceConfig>),
    /// The text of `--device`: `NAME,key=value,...`.
    Text(String),
}

/// Reads a list of devices.
pub(super) fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<DeviceConfig>, D::Error> {
    let devices: Vec<Device> = Vec::deserialize(from)?;
    Ok(devices.into_iter().map(|Device(device)| device).collect())
}

struct Device(DeviceConfig);

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(DeviceVisitor).map(Self)
    }
}

struct DeviceVisitor;

impl<'de> Visitor<'de> for DeviceVisitor {
    type Value = DeviceConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a device: an object with its model, or a text NAME,key=value,...")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<DeviceConfig, E> {
        DeviceConfig::parse(text)
            .map_err(|error| E::custom(format!("device {}: {error}", quoted(text))))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DeviceConfig, A::Error> {
        DeviceConfig::deserialize(MapAccessDeserializer::new(map))
    }
}
