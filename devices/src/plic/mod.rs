//! Platform-level interrupt controller (SiFive PLIC 1.0.0), for hosts whose KVM has no in-kernel
//! interrupt controller.
//!
//! Source: RISC-V Platform-Level Interrupt Controller Specification 1.0.0. All registers are 32
//! bits wide. Priorities are 0 (never) to 7; further bits of a priority or a threshold read as
//! zero.
//!
//! Contexts are numbered as on QEMU's `virt` board, because guests written for it have these
//! addresses built in: hart `h` has context `2h` for machine mode and `2h + 1` for supervisor mode.
//! Under KVM there is no machine mode: the registers of those contexts read as zero and ignore
//! writes. (QEMU's `virt` under KVM numbers supervisor contexts only; Linux works with both, as it reads
//! the device tree.)
//!
//! If QEMU differs from the specification, this follows the specification: a request that has
//! been forwarded stays pending when its line falls before it is claimed (section "Interrupt
//! Gateways"), a claim ignores the threshold, and the completion of a source that is not
//! enabled for the context is ignored.
//!
//! Locks: a line is set with its device's lock held; that takes the PLIC's lock, under which the
//! lines of harts are driven. The PLIC never calls a device.

mod core;
mod sources;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use self::core::PlicCore;
use self::sources::{SOURCES_MAX, Sources};
use crate::device::{
    Access, AccessError, FdtDesc, FdtProperty, FdtValue, MmioDevice, RegisterName, register32,
};
use crate::irq::IrqLine;
use crate::lifecycle::{Lifecycle, PauseError, RestoreError, SaveError, SavedState};

mod reg {
    /// Priority of source `n` at `4n`.
    pub(super) const PRIORITY: u64 = 0;
    /// Pending bits, 32 sources to a word.
    pub(super) const PENDING: u64 = 0x1000;
    pub(super) const PENDING_END: u64 = 0x1080;
    /// Enable bits, 32 sources to a word, one block per context.
    pub(super) const ENABLE: u64 = 0x2000;
    pub(super) const ENABLE_STRIDE: u64 = 0x80;
    /// One page per context.
    pub(super) const CONTEXT: u64 = 0x20_0000;
    pub(super) const CONTEXT_STRIDE: u64 = 0x1000;
    /// In a context's page.
    pub(super) const THRESHOLD: u64 = 0;
    pub(super) const CLAIM: u64 = 4;
}

fn register_name(offset: u64, _: bool) -> Option<&'static str> {
    Some(match offset {
        reg::PRIORITY..reg::PENDING => "PRIORITY",
        reg::PENDING..reg::PENDING_END => "PENDING",
        reg::ENABLE..reg::CONTEXT => "ENABLE",
        reg::CONTEXT.. => match (offset - reg::CONTEXT) % reg::CONTEXT_STRIDE {
            reg::THRESHOLD => "THRESHOLD",
            reg::CLAIM => "CLAIM",
            _ => return None,
        },
        _ => return None,
    })
}

/// Maximum number of harts in the register map.
const HARTS_MAX: usize = 512;

/// A handle on a PLIC; every clone refers to the same PLIC. One of them is placed on the bus.
#[derive(Clone)]
pub struct Plic {
    shared: Arc<PlicShared>,
}

/// An error while building a PLIC.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlicError {
    /// The number of sources is outside 1 to 1023.
    #[error("A PLIC cannot have {0} sources (1 to 1023)")]
    Sources(u32),
    /// The number of harts is outside 1 to 512.
    #[error("A PLIC cannot serve {0} harts (1 to 512)")]
    Harts(usize),
}

struct PlicShared {
    sources: u32,
    harts: usize,
    core: Mutex<PlicCore>,
}

/// The register at an offset.
enum Register {
    Priority(u32),
    Pending {
        word: usize,
    },
    Enable {
        hart: usize,
        word: usize,
    },
    Threshold {
        hart: usize,
    },
    Claim {
        hart: usize,
    },
    /// A register of a context that is not connected.
    Unwired,
}

/// A device's interrupt line.
struct SourceLine {
    shared: Arc<PlicShared>,
    source: u32,
}

impl Plic {
    /// Size in bytes, as on QEMU's `virt`: enough for the contexts of 512 harts.
    pub const SIZE: u64 = 0x60_0000;

    /// A PLIC with sources 1 to `sources` (at most 1023; 95 on QEMU's `virt`) that drives the
    /// supervisor external interrupt of hart `h` through `outputs[h]` (1 to 512 of them).
    ///
    /// Outputs are driven under the PLIC's lock and only when their level changes.
    ///
    /// # Errors
    /// [`PlicError`] if either number is out of range.
    pub fn new(sources: u32, outputs: Vec<Arc<dyn IrqLine>>) -> Result<Self, PlicError> {
        let harts = outputs.len();
        if !(1..=SOURCES_MAX).contains(&sources) {
            return Err(PlicError::Sources(sources));
        }
        if !(1..=HARTS_MAX).contains(&harts) {
            return Err(PlicError::Harts(harts));
        }
        let core = Mutex::new(PlicCore::new(sources, outputs));
        Ok(Self { shared: Arc::new(PlicShared { sources, harts, core }) })
    }

    /// Returns the line of a source, from 1 on; `None` if the PLIC has no such source.
    #[must_use]
    pub fn source(&self, number: u32) -> Option<Arc<dyn IrqLine>> {
        (1..=self.shared.sources)
            .contains(&number)
            .then(|| Arc::new(SourceLine { shared: self.shared.clone(), source: number }) as _)
    }
}

impl IrqLine for SourceLine {
    fn set_level(&self, high: bool) {
        self.shared.lock().set_level(self.source, high);
    }
}

impl Lifecycle for Plic {
    fn pause(&mut self) -> Result<(), PauseError> {
        Ok(())
    }

    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.shared.lock().reset();
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        SavedState::of(&self.shared.lock().save())
    }

    /// The levels of the sources are part of the state: the devices' own restores, before or after this one, drive the same.
    fn restore(&mut self, state: SavedState) -> Result<(), RestoreError> {
        self.shared.lock().restore(&state.read()?)
    }
}

impl MmioDevice for Plic {
    fn name(&self) -> &'static str {
        "plic"
    }

    fn size(&self) -> u64 {
        Self::SIZE
    }

    fn register_names(&self) -> RegisterName {
        register_name
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let register = self.shared.register(register32(offset, data.len())?)?;
        let mut core = self.shared.lock();
        core.sample_lines();
        let value = match register {
            Register::Priority(source) => core.priority(source),
            Register::Pending { word } => core.pending(word),
            Register::Enable { hart, word } => core.enabled(hart, word),
            Register::Threshold { hart } => core.threshold(hart),
            Register::Claim { hart } => core.claim(hart),
            Register::Unwired => 0,
        };
        data.copy_from_slice(&value.to_le_bytes());
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        let register = self.shared.register(register32(offset, data.len())?)?;
        let value = u32::from_le_bytes(data.try_into().map_err(|_| AccessError::Width)?);
        let mut core = self.shared.lock();
        core.sample_lines();
        match register {
            Register::Priority(source) => core.set_priority(source, value),
            Register::Pending { .. } => return Err(AccessError::ReadOnly),
            Register::Enable { hart, word } => core.set_enabled(hart, word, value),
            Register::Threshold { hart } => core.set_threshold(hart, value),
            Register::Claim { hart } => core.complete(hart, value),
            Register::Unwired => {}
        }
        Ok(())
    }

    fn fdt(&self) -> Option<FdtDesc> {
        Some(FdtDesc {
            name: "interrupt-controller",
            compatible: vec!["sifive,plic-1.0.0", "riscv,plic0"],
            properties: vec![
                FdtProperty { name: "interrupt-controller", value: FdtValue::Empty },
                FdtProperty::cells("#interrupt-cells", &[1]),
                FdtProperty::cells("#address-cells", &[0]),
                FdtProperty::cells("riscv,ndev", &[self.shared.sources]),
            ],
            companions: Vec::new(),
        })
    }
}

impl PlicShared {
    fn lock(&self) -> MutexGuard<'_, PlicCore> {
        // A test that panicked must not block the PLIC.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The register at this offset, a multiple of 4.
    fn register(&self, offset: u64) -> Result<Register, AccessError> {
        match offset {
            reg::PRIORITY..reg::PENDING => {
                let source = u32::try_from(offset / 4).unwrap_or(0);
                let exists = (1..=self.sources).contains(&source);
                exists.then_some(Register::Priority(source)).ok_or(AccessError::NoRegister)
            }
            reg::PENDING..reg::PENDING_END => {
                Ok(Register::Pending { word: self.word(offset - reg::PENDING)? })
            }
            reg::PENDING_END..reg::ENABLE => Err(AccessError::NoRegister),
            reg::ENABLE..reg::CONTEXT => {
                let hart = self.hart((offset - reg::ENABLE) / reg::ENABLE_STRIDE)?;
                let word = self.word((offset - reg::ENABLE) % reg::ENABLE_STRIDE)?;
                Ok(hart.map_or(Register::Unwired, |hart| Register::Enable { hart, word }))
            }
            reg::CONTEXT.. => {
                let hart = self.hart((offset - reg::CONTEXT) / reg::CONTEXT_STRIDE)?;
                match ((offset - reg::CONTEXT) % reg::CONTEXT_STRIDE, hart) {
                    (reg::THRESHOLD, Some(hart)) => Ok(Register::Threshold { hart }),
                    (reg::CLAIM, Some(hart)) => Ok(Register::Claim { hart }),
                    (reg::THRESHOLD | reg::CLAIM, None) => Ok(Register::Unwired),
                    _ => Err(AccessError::NoRegister),
                }
            }
        }
    }

    /// The index of the word at byte `at` of a set of sources.
    fn word(&self, at: u64) -> Result<usize, AccessError> {
        let word = usize::try_from(at / 4).ok();
        word.filter(|&word| word < Sources::word_count(self.sources)).ok_or(AccessError::NoRegister)
    }

    /// The hart whose supervisor context this is; `None` for a machine context.
    fn hart(&self, context: u64) -> Result<Option<usize>, AccessError> {
        let hart = usize::try_from(context / 2).ok().filter(|&hart| hart < self.harts);
        hart.map(|hart| (context % 2 == 1).then_some(hart)).ok_or(AccessError::NoRegister)
    }
}
