//! The description of the machine from the device tree, read once at boot.

use core::cell::UnsafeCell;

use crate::entry::MAX_HARTS;
use crate::fdt::Fdt;
use crate::irqchip::Irqchip;
use crate::uart;

/// One hart of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    /// Hart id (`reg`).
    pub hart: usize,
    /// Phandle of its `riscv,cpu-intc`, to which interrupt controllers refer.
    pub intc: u32,
}

/// The machine.
pub struct Board {
    /// The device tree.
    pub fdt: Fdt,
    /// The boot hart.
    pub boot_hart: usize,
    /// `bootargs`
    pub bootargs: &'static str,
    /// First address and size of RAM.
    pub ram: (usize, usize),
    /// Ticks of `time` per second.
    pub timebase_hz: u64,
    cpus: [Cpu; MAX_HARTS],
    cpu_count: usize,
    /// The interrupt controller that delivers to S-mode.
    pub irqchip: Irqchip,
}

struct Once(UnsafeCell<Option<Board>>);

// SAFETY: written once, by the boot hart, before any other hart runs.
unsafe impl Sync for Once {}

static BOARD: Once = Once(UnsafeCell::new(None));

impl Board {
    /// Reads the tree at `fdt`. Called once, by the boot hart, before any other hart runs.
    pub(crate) fn init(boot_hart: usize, fdt: usize) -> &'static Self {
        uart::init();
        // SAFETY: the value of a1 at boot.
        let fdt = unsafe { Fdt::at(fdt) }.expect("no device tree in a1");
        let mut board = Self {
            fdt,
            boot_hart,
            bootargs: fdt.top("chosen").and_then(|c| c.strings("bootargs").next()).unwrap_or(""),
            ram: fdt
                .top("memory")
                .and_then(|m| m.reg(0))
                .map_or((0, 0), |(a, s)| (a as usize, s as usize)),
            timebase_hz: fdt
                .top("cpus")
                .and_then(|c| c.cell("timebase-frequency"))
                .unwrap_or(0)
                .into(),
            cpus: [Cpu { hart: 0, intc: 0 }; MAX_HARTS],
            cpu_count: 0,
            irqchip: Irqchip::None,
        };
        board.read_cpus();
        board.irqchip = Irqchip::find(&board);
        // SAFETY: one hart runs, and this is called once.
        unsafe { *BOARD.0.get() = Some(board) };
        Self::get()
    }

    /// The board, for code that has no reference to it (interrupt hooks).
    #[must_use]
    pub fn get() -> &'static Self {
        // SAFETY: written once by `init` before anything else runs.
        unsafe { (*BOARD.0.get()).as_ref() }.expect("the board is read first")
    }

    fn read_cpus(&mut self) {
        for node in self.fdt.nodes() {
            if node.strings("device_type").next() == Some("cpu") && node.is_enabled() {
                assert!(self.cpu_count < MAX_HARTS, "more harts than the runtime has stacks for");
                self.cpus[self.cpu_count].hart =
                    node.cell("reg").expect("cpu without reg") as usize;
                self.cpu_count += 1;
            }
            if node.strings("compatible").any(|s| s == "riscv,cpu-intc") && self.cpu_count > 0 {
                self.cpus[self.cpu_count - 1].intc = node.cell("phandle").unwrap_or(0);
            }
        }
    }

    /// The harts, in the order of the tree.
    #[must_use]
    pub fn cpus(&self) -> &[Cpu] {
        &self.cpus[..self.cpu_count]
    }

    /// The value of `key=value` in the boot arguments.
    #[must_use]
    pub fn arg(&self, key: &str) -> Option<&'static str> {
        self.bootargs
            .split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// The number in `key=NUMBER` in the boot arguments.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<usize> {
        self.arg(key)?.parse().ok()
    }

    /// True if the first hart's node has the ISA extension `name` (lower case).
    #[must_use]
    pub fn has_extension(&self, name: &str) -> bool {
        let cpu = self.fdt.nodes().find(|n| n.strings("device_type").next() == Some("cpu"));
        let Some(cpu) = cpu else { return false };
        cpu.strings("riscv,isa-extensions").any(|s| s == name)
            || cpu.strings("riscv,isa").any(|isa| isa.split('_').skip(1).any(|s| s == name))
    }
}
