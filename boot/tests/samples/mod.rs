//! Generated kernels, archives and boards for the tests.
#![allow(dead_code, reason = "each test file uses some of them")]

use std::fmt::{self, Debug, Formatter};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};
use rvmm_boot::Region;
use rvmm_boot::fdt::{
    Board, Chosen, Cpu, DeviceNode, Irqchip, Isa, MmuType, Node, PlicContexts, Property, Value,
};

/// 2 MiB.
pub(crate) const MIB2: u64 = 2 << 20;

/// The start of RAM.
pub(crate) const RAM: u64 = 0x8000_0000;

/// CPU time of the thread since the start, which does not depend on the machine's load.
pub(crate) struct Work(Timespec);

impl Work {
    pub(crate) fn begin() -> Self {
        Self(clock_gettime(ClockId::ThreadCPUTime))
    }

    fn done(&self) -> Duration {
        (clock_gettime(ClockId::ThreadCPUTime) - self.0).try_into().unwrap()
    }

    /// True if the CPU time is short; a malicious file without bounds takes minutes.
    pub(crate) fn is_little(&self) -> bool {
        self.done() < Duration::from_secs(5)
    }
}

impl Debug for Work {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "it took {:?}", self.done())
    }
}

/// A temporary folder, deleted at the end of the test.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// A sparse file of `len` bytes with `bytes` at the start.
    pub(crate) fn sparse(&self, name: &str, bytes: &[u8], len: u64) -> PathBuf {
        let path = self.write(name, bytes);
        std::fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        path
    }
}

/// A RISC-V `Image` without a PE header: a header and `body` bytes of counting numbers.
pub(crate) fn image(text_offset: u64, image_size: u64, body: usize) -> Vec<u8> {
    let mut image = vec![0; 64];
    image[0..4].copy_from_slice(&[0x4d, 0x5a, 0x6f, 0x10]);
    image[0x08..0x10].copy_from_slice(&text_offset.to_le_bytes());
    image[0x10..0x18].copy_from_slice(&image_size.to_le_bytes());
    image[0x20..0x24].copy_from_slice(&2_u32.to_le_bytes());
    image[0x30..0x35].copy_from_slice(b"RISCV");
    image[0x38..0x3c].copy_from_slice(b"RSC\x05");
    image.extend((0..body).map(|i| (i % 251) as u8));
    image
}

/// As [`image`], with an EFI stub's PE header for `machine` and a file length of `len` bytes.
pub(crate) fn efi_image(machine: u16, len: u32, body: usize) -> Vec<u8> {
    let mut image = image(MIB2, 4 * MIB2, body.max(256));
    image[0x3c..0x40].copy_from_slice(&0x40_u32.to_le_bytes());
    image[0x40..0x44].copy_from_slice(b"PE\0\0");
    image[0x44..0x46].copy_from_slice(&machine.to_le_bytes());
    image[0x46..0x48].copy_from_slice(&1_u16.to_le_bytes());
    image[0x54..0x56].copy_from_slice(&0_u16.to_le_bytes());
    image[0x68..0x6c].copy_from_slice(&(len - 64).to_le_bytes());
    image[0x6c..0x70].copy_from_slice(&64_u32.to_le_bytes());
    image
}

/// A program header: physical address, offset in the file, bytes in the file, bytes in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load(pub(crate) u64, pub(crate) u64, pub(crate) u64, pub(crate) u64);

/// A 64-bit little-endian RISC-V ELF file of `len` bytes with these segments.
pub(crate) fn elf(entry: u64, loads: &[Load], len: usize) -> Vec<u8> {
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2_u16.to_le_bytes());
    elf.extend(243_u16.to_le_bytes());
    elf.extend(1_u32.to_le_bytes());
    elf.extend(entry.to_le_bytes());
    elf.extend(64_u64.to_le_bytes());
    elf.extend(0_u64.to_le_bytes());
    elf.extend(0_u32.to_le_bytes());
    for half in [64, 56, u16::try_from(loads.len()).unwrap(), 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for Load(address, offset, file_len, mem_len) in loads {
        elf.extend(1_u32.to_le_bytes());
        elf.extend(7_u32.to_le_bytes());
        for value in [*offset, *address, *address, *file_len, *mem_len, 0x1000] {
            elf.extend(value.to_le_bytes());
        }
    }
    elf.resize(len.max(elf.len()), 0x5a);
    elf
}

/// An ELF file like U-Boot: one segment at RAM + 2 MiB with a BSS.
pub(crate) fn u_boot() -> Vec<u8> {
    let at = RAM + MIB2;
    elf(at, &[Load(at, 0x1000, 0x2000, 0x5000)], 0x3000)
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// An APLIC and IMSICs at rvmm's addresses.
pub(crate) const AIA: Irqchip = Irqchip::Aia {
    aplic: Region::new(0x0d00_0000, 0x8000),
    sources: 96,
    imsic_base: 0x2800_0000,
    num_ids: 255,
    guest_index_bits: 0,
    hart_index_bits: 1,
};

/// A PLIC at the address of QEMU's `virt`.
pub(crate) const PLIC: Irqchip = Irqchip::Plic {
    registers: Region::new(0x0c00_0000, 0x60_0000),
    sources: 95,
    contexts: PlicContexts::MachineAndSupervisor,
};

/// A board with two harts and the devices that every guest has.
pub(crate) fn board(irqchip: Irqchip) -> Board {
    Board {
        model: "rvmm".into(),
        compatible: vec!["rvmm,virt".into(), "riscv-virtio".into()],
        cpus: vec![cpu(0), cpu(1)],
        hypervisor: Some("linux,kvm".into()),
        timebase_frequency: 10_000_000,
        memory: vec![Region::new(RAM, 512 << 20)],
        chosen: Chosen {
            bootargs: "console=ttyS0".into(),
            initrd: Some(Region::new(0x9fa0_0000, 0x12_3456)),
            stdout: Some("serial0".into()),
            rng_seed: std::array::from_fn(|i| i as u8),
            kaslr_seed: 0x0123_4567_89ab_cdef,
        },
        irqchip,
        devices: vec![power(), rtc(), serial()],
    }
}

fn cpu(hartid: u32) -> Cpu {
    let extensions = "m a f d c zicbom zicboz zicntr zicsr zifencei zba zbb sstc svpbmt ssaia";
    Cpu {
        hartid,
        isa: Isa {
            base: "rv64i".into(),
            extensions: extensions.split(' ').map(ToString::to_string).collect(),
        },
        mmu: MmuType::Sv57,
        cbom_block_size: Some(64),
        cboz_block_size: Some(64),
        cbop_block_size: None,
    }
}

fn node(name: &str, properties: Vec<Property>) -> Node {
    Node { name: name.into(), properties }
}

/// A node that writes `value` to the owner's first register.
fn syscon(name: &str, compatible: &str, value: u32) -> Node {
    let properties = vec![
        Property::strings("compatible", &[compatible]),
        Property::new("regmap", Value::Owner),
        Property::u32("offset", 0),
        Property::u32("value", value),
    ];
    node(name, properties)
}

pub(crate) fn power() -> DeviceNode {
    let compatible = Property::strings("compatible", &["sifive,test1", "sifive,test0", "syscon"]);
    DeviceNode {
        label: "power".into(),
        address: 0x10_0000,
        size: 0x1000,
        irqs: vec![],
        node: node("test", vec![compatible]),
        companions: vec![
            syscon("poweroff", "syscon-poweroff", 0x5555),
            syscon("reboot", "syscon-reboot", 0x7777),
        ],
    }
}

pub(crate) fn rtc() -> DeviceNode {
    DeviceNode {
        label: "rtc".into(),
        address: 0x10_1000,
        size: 0x1000,
        irqs: vec![11],
        node: node("rtc", vec![Property::strings("compatible", &["google,goldfish-rtc"])]),
        companions: vec![],
    }
}

pub(crate) fn serial() -> DeviceNode {
    let properties = vec![
        Property::strings("compatible", &["ns16550a"]),
        Property::u32("clock-frequency", 3_686_400),
    ];
    DeviceNode {
        label: "serial0".into(),
        address: 0x1000_0000,
        size: 0x100,
        irqs: vec![10],
        node: node("serial", properties),
        companions: vec![],
    }
}
