//! Platform-level interrupt controller (SiFive PLIC 1.0.0): from device lines to harts, for hosts
//! whose KVM has no interrupt controller of its own.
//!
//! Source: RISC-V Platform-Level Interrupt Controller Specification 1.0.0. All registers are 32
//! bits wide. Priorities are 0 (never) to 7; further bits of a priority or a threshold read as
//! zero.
//!
//! Contexts are numbered as on QEMU's `virt` board, because guests written for it have these
//! addresses built in: hart `h` has context `2h` for machine mode and `2h + 1` for supervisor mode.
//! Under KVM there is no machine mode: the registers of those contexts read as zero and ignore
//! writes. (QEMU's `virt` under KVM numbers supervisor contexts only; Linux does not mind, it reads
//! the device tree.)
//!
//! Where QEMU differs from the specification, this follows the specification: a request that has
//! been forwarded stays pending when its line falls before it is claimed (section "Interrupt
//! Gateways"), a claim does not look at the threshold, and the completion of a source that is not
//! enabled for the context is ignored.
//!
//! Locks: a line is set with its device's lock held; that takes the PLIC's lock, under which the
//! lines of harts are driven. The PLIC never calls a device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::device::{Access, AccessError, FdtDesc, FdtProperty, FdtValue, MmioDevice, register32};
use crate::irq::IrqLine;

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

/// The highest priority; a power of two less one, and so the mask of the bits that are kept.
const PRIORITY_MAX: u32 = 7;

/// A handle on a PLIC; every clone is the same PLIC. One of them goes on the bus.
#[derive(Clone)]
pub struct Plic {
    shared: Arc<Shared>,
}

/// Why a PLIC cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlicError {
    /// The number of sources is outside 1 to 1023.
    #[error("A PLIC cannot have {0} sources (1 to 1023)")]
    Sources(u32),
    /// The number of harts is outside 1 to 512.
    #[error("A PLIC cannot serve {0} harts (1 to 512)")]
    Harts(usize),
}

struct Shared {
    sources: u32,
    /// The supervisor external interrupt of each hart.
    outputs: Box<[Arc<dyn IrqLine>]>,
    state: Mutex<State>,
}

/// All that the guest can see, and the levels of the lines.
struct State {
    /// By source; number 0 is not a source.
    priorities: Box<[u8]>,
    level: Bits,
    /// Forwarded by the gateway and not claimed yet.
    pending: Bits,
    /// Claimed and not completed: the gateway forwards nothing.
    claimed: Bits,
    /// The supervisor context of each hart.
    contexts: Box<[Context]>,
    /// After a reset the gateways have not looked at the lines yet.
    gateways_shut: bool,
}

struct Context {
    enabled: Bits,
    threshold: u8,
    /// The level that the hart's line has.
    output: bool,
}

/// One bit per source.
#[derive(Clone)]
struct Bits(Box<[u32]>);

/// What an offset means.
enum Register {
    Priority(usize),
    Pending(usize),
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
    /// Of a context that is not wired to anything.
    Unwired,
}

/// A device's line into the PLIC.
struct SourceLine {
    shared: Arc<Shared>,
    source: u32,
}

impl Plic {
    /// Bytes of address space, as on QEMU's `virt`: room for the contexts of 512 harts.
    pub const SIZE: u64 = 0x60_0000;

    /// A PLIC with sources 1 to `sources` (at most 1023; 95 on QEMU's `virt`) that drives the
    /// supervisor external interrupt of hart `h` through `outputs[h]` (1 to 512 of them).
    ///
    /// Outputs are driven under the PLIC's lock and only when their level changes.
    ///
    /// # Errors
    /// [`PlicError`] if either number is out of range.
    pub fn new(sources: u32, outputs: Vec<Arc<dyn IrqLine>>) -> Result<Self, PlicError> {
        if !(1..=1023).contains(&sources) {
            return Err(PlicError::Sources(sources));
        }
        if !(1..=512).contains(&outputs.len()) {
            return Err(PlicError::Harts(outputs.len()));
        }
        let state = Mutex::new(State::at_power_on(sources, outputs.len()));
        Ok(Self { shared: Arc::new(Shared { sources, outputs: outputs.into(), state }) })
    }

    /// The line of a source, from 1 on; `None` if the PLIC has no such source.
    #[must_use]
    pub fn source(&self, number: u32) -> Option<Arc<dyn IrqLine>> {
        (1..=self.shared.sources)
            .contains(&number)
            .then(|| Arc::new(SourceLine { shared: self.shared.clone(), source: number }) as _)
    }
}

impl IrqLine for SourceLine {
    fn set_level(&self, high: bool) {
        let mut state = self.shared.lock();
        state.level.set(self.source, high);
        if high && !state.claimed.get(self.source) && !state.pending.get(self.source) {
            state.pending.set(self.source, true);
            state.drive_all(&self.shared.outputs);
        }
    }
}

impl MmioDevice for Plic {
    fn name(&self) -> &'static str {
        "plic"
    }

    fn size(&self) -> u64 {
        Self::SIZE
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let register = self.shared.register(register32(offset, data.len())?)?;
        let mut state = self.shared.lock();
        state.open_gateways(&self.shared.outputs);
        let value = match register {
            Register::Priority(source) => state.priorities.get(source).copied().map(u32::from),
            Register::Pending(word) => Some(state.pending.word(word)),
            Register::Enable { hart, word } => {
                state.contexts.get(hart).map(|context| context.enabled.word(word))
            }
            Register::Threshold { hart } => {
                state.contexts.get(hart).map(|context| context.threshold.into())
            }
            Register::Claim { hart } => Some(state.claim(hart, &self.shared.outputs)),
            Register::Unwired => Some(0),
        };
        data.copy_from_slice(&value.ok_or(AccessError::NoRegister)?.to_le_bytes());
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        let register = self.shared.register(register32(offset, data.len())?)?;
        let value = u32::from_le_bytes(data.try_into().map_err(|_| AccessError::Width)?);
        let mut state = self.shared.lock();
        state.open_gateways(&self.shared.outputs);
        match register {
            Register::Pending(_) => return Err(AccessError::ReadOnly),
            Register::Unwired => {}
            Register::Priority(source) => {
                if let Some(priority) = state.priorities.get_mut(source) {
                    *priority = legal(value);
                }
                state.drive_all(&self.shared.outputs);
            }
            Register::Enable { hart, word } => {
                let value = value & sources_in_word(self.shared.sources, word);
                if let Some(context) = state.contexts.get_mut(hart) {
                    context.enabled.set_word(word, value);
                }
                state.drive(hart, &self.shared.outputs);
            }
            Register::Threshold { hart } => {
                if let Some(context) = state.contexts.get_mut(hart) {
                    context.threshold = legal(value);
                }
                state.drive(hart, &self.shared.outputs);
            }
            Register::Claim { hart } => state.complete(hart, value, &self.shared.outputs),
        }
        Ok(())
    }

    /// Lines keep their levels, as they belong to the devices; one that is still high when the
    /// guest next touches the PLIC is forwarded then.
    fn reset(&mut self) {
        let mut state = self.shared.lock();
        let level = state.level.clone();
        let fresh = State::at_power_on(self.shared.sources, self.shared.outputs.len());
        *state = State { level, gateways_shut: true, ..fresh };
        for output in &self.shared.outputs {
            output.set_level(false);
        }
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

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The register at this offset, a multiple of 4.
    fn register(&self, offset: u64) -> Result<Register, AccessError> {
        let words = u64::from(self.sources / 32) + 1;
        match offset {
            reg::CONTEXT.. => {
                let at = offset - reg::CONTEXT;
                let hart = self.hart(at / reg::CONTEXT_STRIDE)?;
                match (at % reg::CONTEXT_STRIDE, hart) {
                    (reg::THRESHOLD, Some(hart)) => Ok(Register::Threshold { hart }),
                    (reg::CLAIM, Some(hart)) => Ok(Register::Claim { hart }),
                    (reg::THRESHOLD | reg::CLAIM, None) => Ok(Register::Unwired),
                    _ => Err(AccessError::NoRegister),
                }
            }
            reg::ENABLE.. => {
                let at = offset - reg::ENABLE;
                let hart = self.hart(at / reg::ENABLE_STRIDE)?;
                let word = at % reg::ENABLE_STRIDE / 4;
                match hart {
                    _ if word >= words => Err(AccessError::NoRegister),
                    Some(hart) => Ok(Register::Enable { hart, word: index(word)? }),
                    None => Ok(Register::Unwired),
                }
            }
            reg::PENDING..reg::PENDING_END => {
                let word = (offset - reg::PENDING) / 4;
                if word < words { Ok(Register::Pending(index(word)?)) } else { none() }
            }
            reg::PRIORITY..reg::PENDING => {
                let source = offset / 4;
                let exists = (1..=u64::from(self.sources)).contains(&source);
                if exists { Ok(Register::Priority(index(source)?)) } else { none() }
            }
            _ => none(),
        }
    }

    /// The hart whose supervisor context this is; `None` for a machine context.
    fn hart(&self, context: u64) -> Result<Option<usize>, AccessError> {
        let hart = index(context / 2)?;
        match hart < self.outputs.len() {
            true => Ok((context % 2 == 1).then_some(hart)),
            false => Err(AccessError::NoRegister),
        }
    }
}

impl State {
    fn at_power_on(sources: u32, harts: usize) -> Self {
        let none = Bits::for_sources(sources);
        let context = || Context { enabled: none.clone(), threshold: 0, output: false };
        Self {
            priorities: (0..=sources).map(|_| 0).collect(),
            level: none.clone(),
            pending: none.clone(),
            claimed: none.clone(),
            contexts: (0..harts).map(|_| context()).collect(),
            gateways_shut: false,
        }
    }

    /// After a reset: forwards every source whose line is high.
    fn open_gateways(&mut self, outputs: &[Arc<dyn IrqLine>]) {
        if std::mem::take(&mut self.gateways_shut) {
            self.pending = self.level.clone();
            self.drive_all(outputs);
        }
    }

    /// Hands the most urgent pending source to the hart: the highest priority, then the lowest
    /// number; 0 if there is none.
    fn claim(&mut self, hart: usize, outputs: &[Arc<dyn IrqLine>]) -> u32 {
        let Some(context) = self.contexts.get(hart) else { return 0 };
        let mut best = (0, 0);
        for source in self.pending.both(&context.enabled) {
            let priority = self.priority(source);
            if priority > best.0 {
                best = (priority, source);
            }
        }
        let (_, source) = best;
        if source != 0 {
            self.pending.set(source, false);
            self.claimed.set(source, true);
            self.drive_all(outputs);
        }
        source
    }

    /// The hart is done with a source: its gateway looks at the line again.
    fn complete(&mut self, hart: usize, source: u32, outputs: &[Arc<dyn IrqLine>]) {
        let enabled = self.contexts.get(hart).is_some_and(|context| context.enabled.get(source));
        if !enabled || !self.claimed.get(source) {
            return;
        }
        self.claimed.set(source, false);
        if self.level.get(source) {
            self.pending.set(source, true);
            self.drive_all(outputs);
        }
    }

    fn drive_all(&mut self, outputs: &[Arc<dyn IrqLine>]) {
        for hart in 0..outputs.len() {
            self.drive(hart, outputs);
        }
    }

    /// Derives the level of a hart's line from the state.
    fn drive(&mut self, hart: usize, outputs: &[Arc<dyn IrqLine>]) {
        let Some(context) = self.contexts.get(hart) else { return };
        let high = self
            .pending
            .both(&context.enabled)
            .any(|source| self.priority(source) > context.threshold);
        let (Some(context), Some(output)) = (self.contexts.get_mut(hart), outputs.get(hart)) else {
            return;
        };
        if context.output != high {
            context.output = high;
            output.set_level(high);
        }
    }

    fn priority(&self, source: u32) -> u8 {
        self.priorities.get(source as usize).copied().unwrap_or(0)
    }
}

impl Bits {
    fn for_sources(sources: u32) -> Self {
        Self((0..=sources / 32).map(|_| 0).collect())
    }

    fn get(&self, source: u32) -> bool {
        self.word(source as usize / 32) >> (source % 32) & 1 != 0
    }

    fn set(&mut self, source: u32, on: bool) {
        if let Some(word) = self.0.get_mut(source as usize / 32) {
            let bit = 1 << (source % 32);
            *word = if on { *word | bit } else { *word & !bit };
        }
    }

    fn word(&self, index: usize) -> u32 {
        self.0.get(index).copied().unwrap_or(0)
    }

    fn set_word(&mut self, index: usize, value: u32) {
        if let Some(word) = self.0.get_mut(index) {
            *word = value;
        }
    }

    /// The sources whose bit is set in both, in order.
    fn both<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = u32> + 'a {
        self.0.iter().zip(&other.0).zip((0..).step_by(32)).flat_map(|((a, b), first)| {
            let mut left = a & b;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(first + bit)
            })
        })
    }
}

/// The bits of an enable word that stand for sources.
fn sources_in_word(sources: u32, word: usize) -> u32 {
    let bits =
        if word == (sources / 32) as usize { u32::MAX >> (31 - sources % 32) } else { u32::MAX };
    if word == 0 { bits & !1 } else { bits }
}

/// A priority or threshold as the register keeps it.
fn legal(value: u32) -> u8 {
    u8::try_from(value & PRIORITY_MAX).unwrap_or(0)
}

fn index(number: u64) -> Result<usize, AccessError> {
    usize::try_from(number).map_err(|_| AccessError::NoRegister)
}

fn none() -> Result<Register, AccessError> {
    Err(AccessError::NoRegister)
}
