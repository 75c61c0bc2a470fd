//! The board as plain data, from which [`super::build`] generates a device tree.

use crate::region::Region;

/// The contents of a guest's device tree.
#[derive(Clone, Debug)]
pub struct Board {
    /// `model` of the root node: "rvmm".
    pub model: String,
    /// `compatible` of the root node, most specific first: "riscv-virtio".
    pub compatible: Vec<String>,
    /// The harts, the boot hart first, ids ascending.
    pub cpus: Vec<Cpu>,
    /// `compatible` of `/hypervisor`: "linux,kvm". `None`: no such node. systemd-detect-virt detects the virtual machine
    /// by it, and units depend on that (ConditionVirtualization=).
    pub hypervisor: Option<String>,
    /// Ticks per second of the `time` CSR, in Hz.
    pub timebase_frequency: u32,
    /// The ranges of RAM.
    pub memory: Vec<Region>,
    /// The boot loader's data for the kernel.
    pub chosen: Chosen,
    /// The interrupt controller that devices are wired to.
    pub irqchip: Irqchip,
    /// The devices, in the order of their nodes.
    pub devices: Vec<DeviceNode>,
}

/// One hart: a `/cpus/cpu@N` node (Documentation/devicetree/bindings/riscv/cpus.yaml).
#[derive(Clone, Debug)]
pub struct Cpu {
    /// The hart id: `reg`, and the value of a0 at boot.
    pub hartid: u32,
    /// Its instruction set.
    pub isa: Isa,
    /// Its largest virtual address space.
    pub mmu: MmuType,
    /// Bytes per block of cbo.clean, cbo.flush and cbo.inval, if it has Zicbom.
    pub cbom_block_size: Option<u32>,
    /// Bytes per block of cbo.zero, if it has Zicboz.
    pub cboz_block_size: Option<u32>,
    /// Bytes per block of the prefetches, if it has Zicbop.
    pub cbop_block_size: Option<u32>,
}

/// The instruction set of a hart (Documentation/devicetree/bindings/riscv/extensions.yaml).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Isa {
    /// The base: "rv64i".
    pub base: String,
    /// The extensions in lower case and in any order: "i", "m", "zicbom", "svpbmt". The base's own letter
    /// may be left out.
    pub extensions: Vec<String>,
}

/// `mmu-type` of a hart.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MmuType {
    /// No address translation.
    None,
    /// 39-bit virtual addresses (satp MODE 8).
    Sv39,
    /// 48-bit virtual addresses (satp MODE 9).
    Sv48,
    /// 57-bit virtual addresses (satp MODE 10).
    Sv57,
}

/// The `/chosen` node.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The kernel command line; see [`crate::Cmdline`].
    pub bootargs: String,
    /// The memory of the initrd, if there is one.
    pub initrd: Option<Region>,
    /// The label of the device that is the console, if there is one.
    pub stdout: Option<String>,
    /// Random bytes for the kernel's entropy pool. The kernel credits them and then erases them.
    pub rng_seed: [u8; 64],
    /// A random number for the kernel's address space layout. 0 means none.
    pub kaslr_seed: u64,
}

/// The interrupt controllers of a board.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Irqchip {
    /// An APLIC that sends MSIs to one IMSIC file per hart (RISC-V Advanced Interrupt Architecture).
    Aia {
        /// The supervisor-level APLIC domain's registers.
        aplic: Region,
        /// Wired interrupt sources of the APLIC, 1..=1023.
        sources: u32,
        /// The address of hart 0's IMSIC file. Hart `i` of the board has its file at
        /// `imsic_base + (i << (12 + guest_index_bits))`.
        imsic_base: u64,
        /// Interrupt identities per IMSIC file: 63, 127, ... 2047.
        num_ids: u32,
        /// Guest index bits in an MSI address: 0 to 7.
        guest_index_bits: u32,
        /// Hart index bits in an MSI address: 0 to 15, enough for every hart.
        hart_index_bits: u32,
    },
    /// A platform-level interrupt controller (RISC-V PLIC specification 1.0).
    Plic {
        /// Its registers.
        registers: Region,
        /// Interrupt sources, 1..=1023.
        sources: u32,
        /// The contexts of each hart.
        contexts: PlicContexts,
    },
}

/// The contexts of a PLIC, hart by hart.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PlicContexts {
    /// Context `i` is the supervisor level of hart `i`.
    Supervisor,
    /// Context `2 * i` is the machine level of hart `i`, context `2 * i + 1` its supervisor level, as on
    /// QEMU's `virt`.
    MachineAndSupervisor,
}

/// One device: its place on the board, and its `node`.
#[derive(Clone, Debug)]
pub struct DeviceNode {
    /// A name that is unique on the board, for [`Chosen::stdout`] and [`Value::Phandle`]: "serial0".
    pub label: String,
    /// The guest-physical address of its registers, which is also the unit address of its node.
    pub address: u64,
    /// The bytes of its registers.
    pub size: u64,
    /// Its interrupt sources on the [`Irqchip`], all of them level-triggered, active high.
    pub irqs: Vec<u32>,
    /// The device's own part of its node.
    pub node: Node,
    /// Nodes at the root that belong to it and have no registers of their own (syscon-poweroff).
    pub companions: Vec<Node>,
}

/// A node's own part: its name and properties.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Node {
    /// The node name without its unit address: "serial".
    pub name: String,
    /// Its properties, `compatible` first by custom; not `reg`, not `interrupts`.
    pub properties: Vec<Property>,
}

/// One property of a node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Property {
    /// Its name: "clock-frequency".
    pub name: String,
    /// Its value.
    pub value: Value,
}

/// The value of a property (Devicetree Specification 2.2.4).
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Value {
    /// Present, without a value.
    Empty,
    /// Cells.
    U32(Vec<u32>),
    /// Pairs of cells.
    U64(Vec<u64>),
    /// A list of strings.
    Strings(Vec<String>),
    /// A reference to the device with this label. The labels "irqchip" and "msi" (AIA only) are reserved.
    Phandle(String),
    /// A reference to the device that the node belongs to, for companions.
    Owner,
}

impl Property {
    /// A property with any value.
    #[must_use]
    pub fn new(name: &str, value: Value) -> Self {
        Self { name: name.into(), value }
    }

    /// A property without a value.
    #[must_use]
    pub fn empty(name: &str) -> Self {
        Self::new(name, Value::Empty)
    }

    /// One cell.
    #[must_use]
    pub fn u32(name: &str, value: u32) -> Self {
        Self::new(name, Value::U32(vec![value]))
    }

    /// A list of strings.
    #[must_use]
    pub fn strings(name: &str, values: &[&str]) -> Self {
        Self::new(name, Value::Strings(values.iter().map(ToString::to_string).collect()))
    }
}
