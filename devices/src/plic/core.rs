//! The PLIC's gateways and core as a state machine: pending sources, and the level of each hart's line.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::sources::Sources;
use crate::irq::IrqLine;
use crate::lifecycle::RestoreError;

/// The highest priority; a power of two minus one, and so the mask of the implemented bits.
pub(super) const PRIORITY_MAX: u32 = 7;

/// The state machine and the harts' lines that it drives.
pub(super) struct PlicCore {
    sources: u32,
    /// The supervisor external interrupt of each hart.
    outputs: Box<[Arc<dyn IrqLine>]>,

    state: PlicRegisters,
}

/// The guest-visible state, and the levels of the lines.
struct PlicRegisters {
    /// By source; number 0 is not a source.
    priorities: Box<[u8]>,
    level: Sources,
    /// Forwarded by the gateway, not claimed yet.
    pending: Sources,
    /// Claimed, not completed: the gateway forwards nothing.
    claimed: Sources,
    /// The supervisor context of each hart.
    contexts: Box<[Context]>,
    /// The gateways have not sampled the lines since a reset.
    is_unsampled: bool,
}

/// The saved state: bitmaps of sources as in the registers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlicState {
    /// By source, from 0 on, which is none.
    priorities: Vec<u8>,
    level: Vec<u32>,
    pending: Vec<u32>,
    claimed: Vec<u32>,
    contexts: Vec<ContextState>,
    is_unsampled: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContextState {
    enabled: Vec<u32>,
    threshold: u8,
}

struct Context {
    enabled: Sources,
    threshold: u8,
    /// The level of the hart's line.
    output: bool,
}

impl PlicCore {
    pub(super) fn new(sources: u32, outputs: Vec<Arc<dyn IrqLine>>) -> Self {
        let state = PlicRegisters::at_power_on(sources, outputs.len());
        Self { sources, outputs: outputs.into(), state }
    }

    /// Resets everything but the lines' levels to its value after power-on. A line that is still
    /// high is forwarded at the guest's next access to the PLIC: until then devices are being reset.
    pub(super) fn reset(&mut self) {
        let fresh = PlicRegisters::at_power_on(self.sources, self.outputs.len());
        let old = std::mem::replace(&mut self.state, fresh);
        self.state.level = old.level;
        self.state.is_unsampled = true;
        for output in &self.outputs {
            output.set_level(false);
        }
    }

    pub(super) fn save(&self) -> PlicState {
        let Self { sources: _, outputs: _, state } = self;
        let PlicRegisters { priorities, level, pending, claimed, contexts, is_unsampled } = state;
        // The output follows from the rest.
        let context = |Context { enabled, threshold, output: _ }: &Context| ContextState {
            enabled: enabled.words().to_vec(),
            threshold: *threshold,
        };
        PlicState {
            priorities: priorities.to_vec(),
            level: level.words().to_vec(),
            pending: pending.words().to_vec(),
            claimed: claimed.words().to_vec(),
            contexts: contexts.iter().map(context).collect(),
            is_unsampled: *is_unsampled,
        }
    }

    pub(super) fn restore(&mut self, state: &PlicState) -> Result<(), RestoreError> {
        let PlicState { priorities, level, pending, claimed, contexts, is_unsampled } = state;
        let now = &mut self.state;
        if priorities.len() != now.priorities.len() || contexts.len() != now.contexts.len() {
            return Err(RestoreError::invalid("the number of interrupt sources or harts"));
        }
        let both = now.priorities.iter_mut().zip(priorities);
        both.for_each(|(to, from)| *to = legal((*from).into()));
        for (to, from) in
            [(&mut now.level, level), (&mut now.pending, pending), (&mut now.claimed, claimed)]
        {
            to.restore(from)?;
        }
        for (to, from) in now.contexts.iter_mut().zip(contexts) {
            to.enabled.restore(&from.enabled)?;
            to.threshold = legal(from.threshold.into());
        }
        now.is_unsampled = *is_unsampled;
        self.drive_all();
        Ok(())
    }

    /// Sets the level of a device's line.
    pub(super) fn set_level(&mut self, source: u32, high: bool) {
        self.state.level.set(source, high);
        if high && !self.state.claimed.contains(source) && !self.state.pending.contains(source) {
            self.forward(source);
        }
    }

    /// At the guest's first access after a reset, the gateways forward the lines that are high.
    pub(super) fn sample_lines(&mut self) {
        if std::mem::take(&mut self.state.is_unsampled) {
            self.state.pending.add_all(&self.state.level);
            self.drive_all();
        }
    }

    pub(super) fn priority(&self, source: u32) -> u32 {
        self.state.priority(source).into()
    }

    pub(super) fn set_priority(&mut self, source: u32, value: u32) {
        if let Some(priority) = self.state.priorities.get_mut(source as usize) {
            *priority = legal(value);
        }
        self.drive_all();
    }

    pub(super) fn pending(&self, word: usize) -> u32 {
        self.state.pending.word(word)
    }

    pub(super) fn enabled(&self, hart: usize, word: usize) -> u32 {
        self.state.contexts.get(hart).map_or(0, |context| context.enabled.word(word))
    }

    pub(super) fn set_enabled(&mut self, hart: usize, word: usize, value: u32) {
        if let Some(context) = self.state.contexts.get_mut(hart) {
            context.enabled.set_word(word, value);
        }
        self.drive(hart);
    }

    pub(super) fn threshold(&self, hart: usize) -> u32 {
        self.state.contexts.get(hart).map_or(0, |context| context.threshold.into())
    }

    pub(super) fn set_threshold(&mut self, hart: usize, value: u32) {
        if let Some(context) = self.state.contexts.get_mut(hart) {
            context.threshold = legal(value);
        }
        self.drive(hart);
    }

    /// Claims the most urgent pending source for the hart: the highest priority, then the lowest
    /// number; 0 if there is none.
    pub(super) fn claim(&mut self, hart: usize) -> u32 {
        let source = self.state.most_urgent(hart);
        if source != 0 {
            self.state.pending.set(source, false);
            self.state.claimed.set(source, true);
            self.drive_high();
        }
        source
    }

    /// Completes a source for the hart: its gateway samples the line again.
    pub(super) fn complete(&mut self, hart: usize, source: u32) {
        let context = self.state.contexts.get(hart);
        let enabled = context.is_some_and(|context| context.enabled.contains(source));
        if !enabled || !self.state.claimed.contains(source) {
            return;
        }
        self.state.claimed.set(source, false);
        if self.state.level.contains(source) {
            self.forward(source);
        }
    }

    /// Makes a source pending, and raises the lines of the harts that it interrupts.
    fn forward(&mut self, source: u32) {
        self.state.pending.set(source, true);
        let priority = self.state.priority(source);
        for (context, output) in self.state.contexts.iter_mut().zip(&self.outputs) {
            let interrupts = priority > context.threshold && context.enabled.contains(source);
            if interrupts && !context.output {
                context.output = true;
                output.set_level(true);
            }
        }
    }

    /// Updates the lines that are high, after a source is no longer pending.
    fn drive_high(&mut self) {
        for hart in 0..self.outputs.len() {
            if self.state.contexts.get(hart).is_some_and(|context| context.output) {
                self.drive(hart);
            }
        }
    }

    fn drive_all(&mut self) {
        for hart in 0..self.outputs.len() {
            self.drive(hart);
        }
    }

    /// Drives a hart's line to the level that follows from the state.
    fn drive(&mut self, hart: usize) {
        let high = self.state.interrupts(hart);
        let context = self.state.contexts.get_mut(hart);
        let (Some(context), Some(output)) = (context, self.outputs.get(hart)) else { return };
        if context.output != high {
            context.output = high;
            output.set_level(high);
        }
    }
}

impl PlicRegisters {
    fn at_power_on(sources: u32, harts: usize) -> Self {
        let none = Sources::none(sources);
        let context = || Context { enabled: none.clone(), threshold: 0, output: false };
        Self {
            priorities: (0..=sources).map(|_| 0).collect(),
            level: none.clone(),
            pending: none.clone(),
            claimed: none.clone(),
            contexts: (0..harts).map(|_| context()).collect(),
            is_unsampled: false,
        }
    }

    fn priority(&self, source: u32) -> u8 {
        self.priorities.get(source as usize).copied().unwrap_or(0)
    }

    /// The source that a claim of the hart returns; 0 for none. A claim ignores the threshold.
    fn most_urgent(&self, hart: usize) -> u32 {
        let Some(context) = self.contexts.get(hart) else { return 0 };
        let mut best = (0, 0);
        for source in self.pending.both(&context.enabled) {
            let priority = self.priority(source);
            if priority > best.0 {
                best = (priority, source);
            }
        }
        best.1
    }

    /// True if a source is pending that is enabled for the hart and has a priority above its
    /// threshold.
    fn interrupts(&self, hart: usize) -> bool {
        let Some(context) = self.contexts.get(hart) else { return false };
        let mut candidates = self.pending.both(&context.enabled);
        candidates.any(|source| self.priority(source) > context.threshold)
    }
}

/// A priority or threshold with only the implemented bits.
fn legal(value: u32) -> u8 {
    u8::try_from(value & PRIORITY_MAX).unwrap_or(0)
}
