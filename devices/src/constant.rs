//! A constant: read-only addresses that hold a fixed value.
//!
//! Exercises put it where a guest expects a value. It is the smallest device: every load from it is an exit that
//! the hypervisor answers. It has no specification and no node in the device tree.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{Built, Device, Key, Model, Placement, Wiring};
use crate::config::{ModelConfig, Number};
use crate::device::{Access, AccessError, FdtDesc, MmioDevice, RegisterName};
use crate::stateless;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "const",
    summary: "read-only addresses that hold a fixed number",
    keys: &[
        Key { name: "addr", value: "ADDR", help: "guest-physical address (needed)" },
        Key { name: "value", value: "NUMBER", help: "the value, up to 64 bits (needed)" },
    ],
    placement: Placement::AtAddress,
    irqs: 0,
    shares_ram: false,
};

/// The configuration of a constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConstConfig {
    /// The guest-physical address.
    pub addr: Number,
    /// The value.
    pub value: Number,
}

/// Size in bytes: that of the widest load.
const SIZE: usize = 8;

#[derive(Debug)]
struct Constant {
    value: [u8; SIZE],
}

impl ModelConfig for ConstConfig {
    fn addr(&self) -> Option<u64> {
        Some(self.addr.get())
    }

    fn build(&self, _: Wiring) -> Built {
        Ok(Device::Mmio(Box::new(Constant { value: self.value.get().to_le_bytes() })))
    }
}

stateless!(Constant);

impl MmioDevice for Constant {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn register_names(&self) -> RegisterName {
        |offset, _| (offset < SIZE as u64).then_some("VALUE")
    }

    /// Reads any part of the value, little-endian.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let start = usize::try_from(offset).map_err(|_| AccessError::NoRegister)?;
        let end = start.checked_add(data.len()).ok_or(AccessError::NoRegister)?;
        let part = self.value.get(start..end).ok_or(AccessError::NoRegister)?;
        data.copy_from_slice(part);
        Ok(())
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Access {
        Err(AccessError::ReadOnly)
    }

    fn fdt(&self) -> Option<FdtDesc> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::BuildError;
    use crate::testing::{create, wiring};

    fn made(text: &str) -> Result<Box<dyn MmioDevice>, BuildError> {
        create(text, wiring())
    }

    #[test]
    fn every_part_of_it_reads_as_that_part_of_the_value() {
        let mut device = made("const,addr=0x40,value=0x1122_3344_5566_7788").unwrap();
        let mut read = |offset, width| {
            let mut data = [0; 8];
            device.read(offset, &mut data[..width]).map(|()| u64::from_le_bytes(data))
        };
        assert_eq!(read(0, 8), Ok(0x1122_3344_5566_7788));
        assert_eq!(read(4, 4), Ok(0x1122_3344));
        assert_eq!(read(1, 1), Ok(0x77));
        assert_eq!(read(6, 4), Err(AccessError::NoRegister));
        assert_eq!(read(u64::MAX, 8), Err(AccessError::NoRegister));
        assert_eq!(device.write(0, &[1]), Err(AccessError::ReadOnly));
    }

    #[test]
    fn without_a_value_there_is_no_constant() {
        for text in
            ["const,addr=0", "const,addr=0,value=", "const,addr=0,value=0x1_0000_0000_0000_0000"]
        {
            assert!(made(text).is_err(), "{text}");
        }
    }
}
