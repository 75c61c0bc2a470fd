//! A range of addresses whose registers are all reserved: they read as zero and ignore writes.
//!
//! An in-kernel device leaves the reserved registers of its range to user space. To the guest they are still
//! registers (AIA specification 1.0, section 4.5: reserved ones are read-only zeros), not unassigned addresses.

use crate::device::{Access, FdtDesc, MmioDevice};
use crate::stateless;

/// The reserved registers of a device whose other registers the kernel implements.
#[derive(Debug)]
pub struct Reserved {
    name: &'static str,
    size: u64,
}

impl Reserved {
    /// The reserved registers of the device `name`, whose range is `size` bytes.
    #[must_use]
    pub fn new(name: &'static str, size: u64) -> Self {
        Self { name, size }
    }
}

stateless!(Reserved);

impl MmioDevice for Reserved {
    fn name(&self) -> &'static str {
        self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Access {
        data.fill(0);
        Ok(())
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Access {
        Ok(())
    }

    /// None: the implementation of the other registers describes the device.
    fn fdt(&self) -> Option<FdtDesc> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{Bus, Claim};

    #[test]
    fn reserved_registers_are_zero_whatever_is_written() {
        let bus = Bus::new(vec![(0x1000, Box::new(Reserved::new("aplic", 0x4000)))]).unwrap();
        for (addr, width) in [(0x1000, 4), (0x1001, 1), (0x4ffe, 2), (0x3000, 8)] {
            let mut data = vec![0xee; width];
            assert_eq!(bus.write(addr, &data), Claim::Device);
            assert_eq!(bus.read(addr, &mut data), Claim::Device);
            assert_eq!(data, vec![0; width]);
        }
        assert_eq!(bus.read(0x5000, &mut [0; 4]), Claim::Unassigned);
    }
}
