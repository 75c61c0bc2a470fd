//! SiFive test finisher ("syscon" to Linux): the register whose write powers the board off or
//! resets it.
//!
//! Source: SiFive Test finisher as on QEMU's `virt` board (bindings `sifive,test1`,
//! `syscon-poweroff`, `syscon-reboot`).

use std::sync::Arc;

use log::debug;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{Built, Device, Model, Placement, Wiring};
use crate::config::ModelConfig;
use crate::device::{
    Access, AccessError, FdtCompanion, FdtDesc, FdtProperty, FdtValue, MmioDevice, RegisterName,
};
use crate::stateless;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "power",
    summary: "SiFive test finisher: poweroff and reset by one register (syscon)",
    keys: &[],
    placement: Placement::Fixed,
    irqs: 0,
    shares_ram: false,
};

/// The configuration of the finisher.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PowerConfig {}

/// Receives the guest's power requests.
pub trait PowerSwitch: Send + Sync {
    /// Records the request. Called on a vCPU thread with the device's lock held: must not
    /// block, and the guest may still run some instructions, and repeat the request, before the
    /// machine acts on it; the first request counts.
    fn request(&self, request: PowerRequest);
}

/// A guest's power request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Power off without an error.
    Off,
    /// Reset the board.
    Reset,
    /// Power off and report a failure with this code, as guests under test do.
    Fail(u16),
}

mod reg {
    /// Finisher: the low 16 bits are the request, the high 16 bits a code.
    pub(super) const FINISHER: u64 = 0;
}

mod finisher {
    pub(super) const FAIL: u16 = 0x3333;
    pub(super) const PASS: u16 = 0x5555;
    pub(super) const RESET: u16 = 0x7777;
}

/// The device. Its register reads as zero, stores nothing, and accepts writes of 2 or 4 bytes.
pub struct Power {
    switch: Arc<dyn PowerSwitch>,
}

impl Power {
    /// A finisher that passes the guest's requests to `switch`.
    #[must_use]
    pub fn new(switch: Arc<dyn PowerSwitch>) -> Self {
        Self { switch }
    }
}

impl ModelConfig for PowerConfig {
    fn build(&self, wiring: Wiring) -> Built {
        Ok(Device::Mmio(Box::new(Power::new(wiring.power))))
    }
}

stateless!(Power);

impl MmioDevice for Power {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn size(&self) -> u64 {
        0x1000
    }

    fn register_names(&self) -> RegisterName {
        |offset, _| (offset == reg::FINISHER).then_some("FINISHER")
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        check(offset, data.len())?;
        data.fill(0);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        check(offset, data.len())?;
        let (what, code) = match *data {
            [a, b] => (u16::from_le_bytes([a, b]), 0),
            [a, b, c, d] => (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])),
            _ => return Err(AccessError::Width),
        };
        match what {
            finisher::PASS => self.switch.request(PowerRequest::Off),
            finisher::RESET => self.switch.request(PowerRequest::Reset),
            finisher::FAIL => self.switch.request(PowerRequest::Fail(code)),
            _ => debug!("{}: {what:#x} is not a request", MODEL.name),
        }
        Ok(())
    }

    fn fdt(&self) -> Option<FdtDesc> {
        let companion = |name, compatible, value: u16| FdtCompanion {
            name,
            properties: vec![
                FdtProperty::strings("compatible", &[compatible]),
                FdtProperty { name: "regmap", value: FdtValue::ThisDevice },
                FdtProperty::cells("offset", &[0]),
                FdtProperty::cells("value", &[value.into()]),
            ],
        };
        Some(FdtDesc {
            name: "test",
            compatible: vec!["sifive,test1", "sifive,test0", "syscon"],
            properties: Vec::new(),
            companions: vec![
                companion("poweroff", "syscon-poweroff", finisher::PASS),
                companion("reboot", "syscon-reboot", finisher::RESET),
            ],
        })
    }
}

fn check(offset: u64, width: usize) -> Access {
    match (offset, width) {
        (_, 0 | 1 | 3 | 5..) => Err(AccessError::Width),
        (reg::FINISHER, _) => Ok(()),
        (_, 4) if !offset.is_multiple_of(4) => Err(AccessError::Misaligned),
        (_, 2) if !offset.is_multiple_of(2) => Err(AccessError::Misaligned),
        _ => Err(AccessError::NoRegister),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakePower;

    fn requests(writes: &[(u64, &[u8])]) -> Vec<PowerRequest> {
        let switch = FakePower::default();
        let mut power = Power::new(Arc::new(switch.clone()));
        for (offset, data) in writes {
            let _ = power.write(*offset, data);
        }
        switch.requests()
    }

    #[test]
    fn each_value_of_the_finisher_makes_its_request() {
        assert_eq!(requests(&[(0, &0x5555_u32.to_le_bytes())]), [PowerRequest::Off]);
        assert_eq!(requests(&[(0, &0x7777_u32.to_le_bytes())]), [PowerRequest::Reset]);
        assert_eq!(requests(&[(0, &0x002a_3333_u32.to_le_bytes())]), [PowerRequest::Fail(42)]);
        assert_eq!(requests(&[(0, &0xffff_3333_u32.to_le_bytes())]), [PowerRequest::Fail(65535)]);
    }

    #[test]
    fn a_write_of_two_bytes_has_code_zero() {
        assert_eq!(requests(&[(0, &0x5555_u16.to_le_bytes())]), [PowerRequest::Off]);
        assert_eq!(requests(&[(0, &0x3333_u16.to_le_bytes())]), [PowerRequest::Fail(0)]);
    }

    #[test]
    fn other_values_offsets_and_widths_make_no_request() {
        let off = 0x5555_5555_5555_5555_u64.to_le_bytes();
        for width in [0, 1, 3, 5, 8] {
            assert_eq!(requests(&[(0, &off[..width])]), [], "{width} bytes");
        }
        for offset in [1, 2, 4, 8, 0xffc, 0xffe] {
            assert_eq!(requests(&[(offset, &off[..4]), (offset, &off[..2])]), [], "at {offset}");
        }
        for value in [0, 0x5554, 0x5556, 0xffff_u32] {
            assert_eq!(requests(&[(0, &value.to_le_bytes())]), [], "{value:#x}");
        }
    }

    #[test]
    fn the_register_reads_as_zero() {
        let mut power = Power::new(Arc::new(FakePower::default()));
        let mut data = [0xff; 4];
        assert_eq!(power.read(0, &mut data), Ok(()));
        assert_eq!(data, [0; 4]);
        assert_eq!(power.read(4, &mut data), Err(AccessError::NoRegister));
        assert_eq!(power.read(2, &mut data), Err(AccessError::Misaligned));
        assert_eq!(power.read(0, &mut data[..1]), Err(AccessError::Width));
    }
}
