//! Flash memory: a file of the host, or the host's own flash, that the guest reads as memory.
//!
//! Three modes give access to the same bytes, for comparison in exercises. `map`: they are guest memory from the start, no load exits.
//! `lazy`: the first load of each page exits and is emulated; from then on the page is guest memory. `passthrough`: as
//! `map`, but the bytes are the host's physical memory (/dev/mem).
//!
//! It is read-only: a store exits in every mode and is refused. The commands of CFI (JEDEC 68.01), with which a driver
//! programs the chip, are not implemented, so the device tree calls it a ROM (`mtd-rom`).

use std::io;
use std::sync::Arc;

use log::warn;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::number::number;
use crate::config::{FilePath, ModelConfig};
use crate::device::{Access, AccessError, FdtDesc, FdtProperty, MmioDevice, RegisterName};
use crate::options::OptionError;
use crate::stateless;

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "flash",
    summary: "flash memory that the guest can read: a file, or the host's own flash",
    keys: &[
        Key {
            name: "addr",
            value: "ADDR",
            help: "guest-physical address, a multiple of 4096 (needed)",
        },
        Key {
            name: "file",
            value: "PATH",
            help: "the contents (needed, except with mode=passthrough)",
        },
        Key {
            name: "mode",
            value: "map|lazy|passthrough",
            help: "how the guest reads it (default map)",
        },
        Key {
            name: "host",
            value: "ADDR",
            help: "passthrough: the host's physical address (default addr)",
        },
        Key { name: "size", value: "BYTES", help: "passthrough: its size (default 32 MiB)" },
    ],
    placement: Placement::AtAddress,
    irqs: 0,
    shares_ram: false,
};

/// Size in bytes of the pages that are mapped into the guest.
const PAGE: u64 = 4096;

/// Maximum size of a flash: two banks of QEMU's `virt`.
pub const MAX_SIZE: u64 = 64 << 20;

/// Default size of the host's flash: one bank of QEMU's `virt`.
const HOST_SIZE: u64 = 32 << 20;

number! {
    /// The address of a page.
    PageAddress(u64), 0, u64::MAX, PAGE, "a multiple of 4096"
}

number! {
    /// The size of a flash in bytes.
    FlashSize(u64), PAGE, MAX_SIZE, PAGE, "a multiple of 4096 up to 67108864"
}

/// The way the guest reads a flash.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FlashMode {
    /// As memory from the start.
    #[default]
    Map,
    /// As memory once it has loaded from a page.
    Lazy,
    /// As `Map`, from the host's physical memory.
    Passthrough,
}

/// The configuration of a flash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FlashConfig {
    /// The guest-physical address.
    pub addr: PageAddress,
    /// The contents; `None` with [`FlashMode::Passthrough`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<FilePath>,
    /// The way the guest reads it.
    #[serde(default)]
    pub mode: FlashMode,
    /// [`FlashMode::Passthrough`]: the host's physical address; `None` for `addr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<PageAddress>,
    /// [`FlashMode::Passthrough`]: the size; `None` for 32 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<FlashSize>,
}

/// The source of a flash's contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlashPlan {
    /// A file of at most [`MAX_SIZE`] bytes, padded with zeroes to a whole page.
    File(FilePath),
    /// The host's physical memory.
    Physical {
        /// Its address, a multiple of 4096.
        addr: u64,
        /// Its size, a multiple of 4096, at most [`MAX_SIZE`].
        size: u64,
    },
}

/// The contents of a flash on the host. They stay mapped until the value is dropped.
pub trait FlashMemory: Send {
    /// Size in bytes: a multiple of 4096, at least one page.
    fn size(&self) -> u64;

    /// Copies the bytes from `offset` on.
    ///
    /// # Errors
    /// The file cannot be read, or has become shorter.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Address of the first byte in this process.
    fn host_address(&self) -> u64;
}

/// A device's own address range, into which memory can be mapped.
pub trait Window: Send + Sync {
    /// Maps `len` bytes of this process's memory from `host_address` on read-only at `offset` of the device's range: loads no longer
    /// exit, stores still reach the device. All three are multiples of 4096.
    ///
    /// # Errors
    /// The hypervisor refuses: too many memory slots, or the range is already mapped.
    fn map(&self, offset: u64, host_address: u64, len: u64) -> io::Result<()>;
}

/// A window into which nothing can be mapped: every access reaches the device.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoWindow;

impl Window for NoWindow {
    fn map(&self, _offset: u64, _host_address: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

struct Flash {
    memory: Box<dyn FlashMemory>,
    window: Arc<dyn Window>,
    /// True for each page to be mapped at its first load; empty if all are mapped.
    unmapped: Vec<bool>,
}

impl ModelConfig for FlashConfig {
    fn paths(&mut self) -> Vec<&mut FilePath> {
        self.file.iter_mut().collect()
    }

    fn addr(&self) -> Option<u64> {
        Some(self.addr.get())
    }

    fn check(&self) -> Result<(), OptionError> {
        self.plan().map(|_| ())
    }

    fn build(&self, wiring: Wiring) -> Built {
        let plan =
            self.plan().map_err(|source| BuildError::Option { model: MODEL.name, source })?;
        let memory = wiring
            .host
            .flash(&plan)
            .map_err(|source| BuildError::Backend { model: MODEL.name, source })?;
        let mut flash = Flash { memory, window: wiring.window, unmapped: Vec::new() };
        if self.mode == FlashMode::Lazy {
            flash.unmapped = vec![true; usize::try_from(flash.memory.size() / PAGE).unwrap_or(0)];
        } else {
            let mapped = flash.window.map(0, flash.memory.host_address(), flash.memory.size());
            mapped.map_err(|source| BuildError::Host {
                model: MODEL.name,
                what: "memory",
                source,
            })?;
        }
        Ok(Device::Mmio(Box::new(flash)))
    }
}

impl FlashConfig {
    /// The source of the contents; an error if the options exclude each other.
    fn plan(&self) -> Result<FlashPlan, OptionError> {
        let only = "allowed (only with mode=passthrough)";
        let is_physical = self.mode == FlashMode::Passthrough;
        match (&self.file, self.host, self.size) {
            (None, ..) if !is_physical => Err(OptionError::bad_value(
                "file",
                "",
                "a path (needed, except with mode=passthrough)",
            )),
            (Some(file), ..) if is_physical => {
                Err(OptionError::bad_value("file", file.display(), "allowed with mode=passthrough"))
            }
            (Some(_), Some(host), _) => Err(OptionError::bad_value("host", host.get(), only)),
            (Some(_), None, Some(size)) => Err(OptionError::bad_value("size", size.get(), only)),
            (Some(file), None, None) => Ok(FlashPlan::File(file.clone())),
            (None, host, size) => Ok(FlashPlan::Physical {
                addr: host.unwrap_or(self.addr).get(),
                size: size.map_or(HOST_SIZE, FlashSize::get),
            }),
        }
    }
}

impl Flash {
    /// Maps the page of `offset`, once. If that fails, its loads continue to exit.
    fn map_page(&mut self, offset: u64) {
        let index = usize::try_from(offset / PAGE).unwrap_or(usize::MAX);
        let Some(page) = self.unmapped.get_mut(index).filter(|page| **page) else { return };
        *page = false;
        let at = offset / PAGE * PAGE;
        if let Err(error) = self.window.map(at, self.memory.host_address().saturating_add(at), PAGE)
        {
            warn!(
                "Cannot map page {at:#x} of device flash into the guest, every load exits instead: {error}"
            );
            self.unmapped.clear();
        }
    }
}

stateless!(Flash);

impl MmioDevice for Flash {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn register_names(&self) -> RegisterName {
        |offset, _| (offset < MAX_SIZE).then_some("DATA")
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > self.memory.size()) {
            return Err(AccessError::NoRegister);
        }
        // Bytes that the host cannot read any more are zero.
        if self.memory.read(offset, data).is_err() {
            data.fill(0);
        }
        self.map_page(offset);
        Ok(())
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Access {
        Err(AccessError::ReadOnly)
    }

    fn fdt(&self) -> Option<FdtDesc> {
        Some(FdtDesc {
            name: "flash",
            compatible: vec!["mtd-rom"],
            properties: vec![FdtProperty::cells("bank-width", &[4])],
            companions: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::testing::{MemoryHost, create, wiring};

    /// Records the mappings; refuses more than `room` of them.
    struct Mappings {
        mapped: Mutex<Vec<(u64, u64)>>,
        room: usize,
    }

    impl Window for Mappings {
        fn map(&self, offset: u64, _: u64, len: u64) -> io::Result<()> {
            let mut mapped = self.mapped.lock().unwrap();
            if mapped.len() == self.room {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            mapped.push((offset, len));
            Ok(())
        }
    }

    fn made(text: &str, room: usize) -> (Result<Box<dyn MmioDevice>, BuildError>, Arc<Mappings>) {
        let window = Arc::new(Mappings { mapped: Mutex::default(), room });
        let host = MemoryHost::with_flash(&[b"pfld".as_slice(), &[0; 8192]].concat());
        let wiring =
            Wiring { window: Arc::<Mappings>::clone(&window), host: Arc::new(host), ..wiring() };
        (create(text, wiring), window)
    }

    fn word(device: &mut dyn MmioDevice, offset: u64) -> Result<[u8; 4], AccessError> {
        let mut data = [0xee; 4];
        device.read(offset, &mut data).map(|()| data)
    }

    #[test]
    fn a_mapped_flash_is_guest_memory_from_the_start_and_refuses_stores() {
        let (device, window) = made("flash,addr=0x22000000,file=x", 9);
        let mut device = device.unwrap();
        assert_eq!(*window.mapped.lock().unwrap(), [(0, 3 * PAGE)]);
        assert_eq!(word(device.as_mut(), 0), Ok(*b"pfld"));
        assert_eq!(device.write(0, &[1]), Err(AccessError::ReadOnly));
        assert_eq!(word(device.as_mut(), 3 * PAGE - 2), Err(AccessError::NoRegister));
        assert_eq!(window.mapped.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_lazy_flash_emulates_the_first_load_of_a_page_and_then_maps_the_page() {
        let (device, window) = made("flash,addr=0x22000000,file=x,mode=lazy", 9);
        let mut device = device.unwrap();
        assert!(window.mapped.lock().unwrap().is_empty());
        for offset in [0, 4, 2 * PAGE + 8, 0] {
            word(device.as_mut(), offset).unwrap();
        }
        assert_eq!(*window.mapped.lock().unwrap(), [(0, PAGE), (2 * PAGE, PAGE)]);
    }

    #[test]
    fn a_lazy_flash_that_cannot_be_mapped_emulates_every_load() {
        let (device, window) = made("flash,addr=0x22000000,file=x,mode=lazy", 1);
        let mut device = device.unwrap();
        for _ in 0..2 {
            assert_eq!(word(device.as_mut(), 0), Ok(*b"pfld"));
            assert_eq!(word(device.as_mut(), PAGE), Ok([0; 4]));
        }
        assert_eq!(window.mapped.lock().unwrap().len(), 1);
    }

    #[test]
    fn mode_map_fails_if_the_flash_cannot_be_mapped() {
        assert!(made("flash,addr=0x22000000,file=x", 0).0.is_err());
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        for text in [
            "flash,addr=0",
            "flash,addr=8,file=x",
            "flash,addr=0,file=x,mode=copy",
            "flash,addr=0,file=x,host=0",
            "flash,addr=0,file=x,size=4096",
            "flash,addr=0,file=x,mode=passthrough",
            "flash,mode=passthrough",
            "flash,addr=0,mode=passthrough,size=0",
            "flash,addr=0,mode=passthrough,size=0x800_0000",
        ] {
            assert!(made(text, 9).0.is_err(), "{text}");
        }
    }
}
