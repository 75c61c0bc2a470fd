//! Saves and restores the registers of the in-kernel AIA.
//!
//! The order of the writes is the one in which nothing is lost and nothing interrupts twice (`arch/riscv/kvm/aia_aplic.c`): the lines of all
//! sources while they are inactive, then their configuration, then what is pending, since a level source refuses that while its line is
//! low, then the IMSICs, and the APLIC's `domaincfg` last. `genmsi` is left out: writing it sends a message.

use kvm_bindings::{
    KVM_DEV_RISCV_AIA_GRP_APLIC, KVM_DEV_RISCV_AIA_GRP_IMSIC, KVM_DEV_RISCV_AIA_IMSIC_ISEL_BITS,
};

use super::Kvm;
use super::aia::{Aia, get, set};
use super::identities;
use crate::error::VmError;
use crate::hypervisor::{AplicState, ImsicState, IrqchipState, SourceState};

/// Registers of the APLIC (AIA 1.0, section 4.5). Those of sources are arrays: of words from source 1 on, or of bits from source 0 on.
const DOMAINCFG: u64 = 0;
const DOMAINCFG_IE: u32 = 1 << 8;
const SOURCECFG: u64 = 0x0004;
const SETIP: u64 = 0x1c00;
const IN_CLRIP: u64 = 0x1d00;
const SETIE: u64 = 0x1e00;
const TARGET: u64 = 0x3004;

/// Source modes (AIA 1.0, section 4.5.2) whose input is inverted before it is read: falling edge and low level.
const INVERTED: [u32; 2] = [5, 7];
/// The mode in `sourcecfg`.
const MODE_MASK: u32 = 0x7;

/// Registers of an IMSIC (AIA 1.0, section 3.8); the arrays have a 64-bit register for each two numbers.
const EIDELIVERY: u64 = 0x70;
const EITHRESHOLD: u64 = 0x72;
const EIP: u64 = 0x80;
const EIE: u64 = 0xc0;

impl Aia {
    /// The state of the AIA and of the IMSICs of these harts, none of which runs. `is_high` is the level of a source's line as its device
    /// drives it.
    pub(super) fn save(
        &self,
        kvm: &Kvm,
        harts: &[u32],
        is_high: impl Fn(u32) -> bool,
    ) -> Result<IrqchipState, VmError> {
        let aplic = self.save_aplic(is_high)?;
        let mut imsics = Vec::new();
        for hart in harts {
            imsics.push(self.save_imsic(*hart)?);
        }
        if self.is_emulated()? && has_upper_halves(&imsics) && !identities::all_work(kvm)? {
            // The kernel has 32 bits of each word and reads the others as copies of bit 31.
            let words = imsics
                .iter_mut()
                .flat_map(|imsic| imsic.pending.iter_mut().chain(&mut imsic.enabled));
            words.for_each(|word| *word &= u64::from(u32::MAX));
        }
        Ok(IrqchipState { aplic, imsics })
    }

    /// Compares the sizes of a saved AIA with this one's.
    ///
    /// # Errors
    /// Names what differs.
    pub(super) fn check(
        &self,
        kvm: &Kvm,
        state: &IrqchipState,
        harts: &[u32],
    ) -> Result<(), VmError> {
        let (sources, saved) = (self.facts.sources, state.aplic.source_count);
        if sources != saved {
            return Err(VmError::new(format!(
                "The AIA was saved with {saved} interrupt sources, and this one has {sources}"
            )));
        }
        if let Some(source) =
            state.aplic.sources.iter().find(|s| !(1..=sources).contains(&s.number))
        {
            return Err(VmError::new(format!("The APLIC has no source {}", source.number)));
        }
        if !state.imsics.iter().map(|imsic| imsic.hart).eq(harts.iter().copied()) {
            return Err(VmError::new("The IMSICs were saved for other harts"));
        }
        let words = self.words();
        let fits =
            |imsic: &ImsicState| imsic.pending.len() == words && imsic.enabled.len() == words;
        if !state.imsics.iter().all(fits) {
            return Err(VmError::new(format!(
                "The IMSICs were saved with another number of identities than {}",
                self.facts.ids
            )));
        }
        if has_upper_halves(&state.imsics) && !identities::all_work(kvm)? {
            // Even where the host has guest files: until the first entry an IMSIC is an emulated one.
            return Err(VmError::new(
                "The guest uses interrupt identities above 31, which this kernel cannot restore (Linux 7.3 can)",
            ));
        }
        Ok(())
    }

    /// Restores the state, after the `sip` of each hart. The lines have their levels, and no hart runs.
    pub(super) fn restore(&self, state: &IrqchipState) -> Result<(), VmError> {
        self.restore_sources(&state.aplic)?;
        state.imsics.iter().try_for_each(|imsic| self.restore_imsic(imsic))?;
        // From now on the APLIC sends messages to the IMSICs.
        self.set_aplic(DOMAINCFG, state.aplic.domaincfg & DOMAINCFG_IE)
    }

    fn restore_sources(&self, state: &AplicState) -> Result<(), VmError> {
        for source in &state.sources {
            self.set_aplic(SOURCECFG + of_source(source.number), source.sourcecfg)?;
        }
        for source in state.sources.iter().filter(|source| source.target != 0) {
            self.set_aplic(TARGET + of_source(source.number), source.target)?;
        }
        self.set_bits(SETIE, state, |source| source.enabled)?;
        self.set_bits(SETIP, state, |source| source.pending)
    }

    fn restore_imsic(&self, state: &ImsicState) -> Result<(), VmError> {
        let hart = state.hart;
        self.set_imsic(hart, EITHRESHOLD, state.eithreshold)?;
        for (base, words) in [(EIP, &state.pending), (EIE, &state.enabled)] {
            for (select, word) in (base..).step_by(2).zip(words) {
                self.set_imsic(hart, select, *word)?;
            }
        }
        self.set_imsic(hart, EIDELIVERY, state.eidelivery)
    }

    fn save_aplic(&self, is_high: impl Fn(u32) -> bool) -> Result<AplicState, VmError> {
        let source_count = self.facts.sources;
        let words = u64::from(source_count) / 32 + 1;
        let bits = |base: u64| -> Result<Vec<u32>, VmError> {
            (0..words).map(|word| self.aplic(base + 4 * word)).collect()
        };
        let (enabled, pending, inputs) = (bits(SETIE)?, bits(SETIP)?, bits(IN_CLRIP)?);
        let mut sources = Vec::new();
        for number in 1..=source_count {
            let sourcecfg = self.aplic(SOURCECFG + of_source(number))?;
            // The kernel reads 0 for an inactive source, and the level after the inversion for the others.
            let high = match sourcecfg & MODE_MASK {
                0 => is_high(number),
                mode => bit(&inputs, number) != INVERTED.contains(&mode),
            };
            let source = SourceState {
                number,
                sourcecfg,
                target: self.aplic(TARGET + of_source(number))?,
                enabled: bit(&enabled, number),
                pending: bit(&pending, number),
                high,
            };
            if source != (SourceState { number, ..SourceState::default() }) {
                sources.push(source);
            }
        }
        Ok(AplicState { source_count, domaincfg: self.aplic(DOMAINCFG)?, sources })
    }

    fn save_imsic(&self, hart: u32) -> Result<ImsicState, VmError> {
        let array = |base: u64| -> Result<Vec<u64>, VmError> {
            (base..).step_by(2).take(self.words()).map(|select| self.imsic(hart, select)).collect()
        };
        Ok(ImsicState {
            hart,
            eidelivery: self.imsic(hart, EIDELIVERY)?,
            eithreshold: self.imsic(hart, EITHRESHOLD)?,
            pending: array(EIP)?,
            enabled: array(EIE)?,
        })
    }

    /// Sets the bits of the sources for which `is_set` holds.
    fn set_bits(
        &self,
        base: u64,
        state: &AplicState,
        is_set: impl Fn(&SourceState) -> bool,
    ) -> Result<(), VmError> {
        for word in 0..=state.source_count / 32 {
            let numbers = state.sources.iter().filter(|source| is_set(source)).map(|s| s.number);
            let bits = numbers.filter(|n| n / 32 == word).fold(0, |bits, n| bits | 1 << (n % 32));
            if bits != 0 {
                self.set_aplic(base + 4 * u64::from(word), bits)?;
            }
        }
        Ok(())
    }

    /// Number of 64-bit words of an array of identities.
    fn words(&self) -> usize {
        usize::try_from(self.facts.ids / 64 + 1).unwrap_or(0)
    }

    fn aplic(&self, offset: u64) -> Result<u32, VmError> {
        get(&self.device, "a register of the APLIC", KVM_DEV_RISCV_AIA_GRP_APLIC, offset)
    }

    fn set_aplic(&self, offset: u64, value: u32) -> Result<(), VmError> {
        set(&self.device, "a register of the APLIC", KVM_DEV_RISCV_AIA_GRP_APLIC, offset, &value)
    }

    fn imsic(&self, hart: u32, select: u64) -> Result<u64, VmError> {
        let attr = of_hart(hart, select);
        get(&self.device, "a register of an IMSIC", KVM_DEV_RISCV_AIA_GRP_IMSIC, attr)
    }

    fn set_imsic(&self, hart: u32, select: u64, value: u64) -> Result<(), VmError> {
        let attr = of_hart(hart, select);
        set(&self.device, "a register of an IMSIC", KVM_DEV_RISCV_AIA_GRP_IMSIC, attr, &value)
    }
}

/// The offset of a source in an array of words.
fn of_source(number: u32) -> u64 {
    4 * u64::from(number.saturating_sub(1))
}

/// The attribute number of a register of a hart's IMSIC.
fn of_hart(hart: u32, select: u64) -> u64 {
    u64::from(hart) << KVM_DEV_RISCV_AIA_IMSIC_ISEL_BITS | select
}

/// The bit of a source in an array of bits.
fn bit(words: &[u32], number: u32) -> bool {
    let word = usize::try_from(number / 32).ok().and_then(|word| words.get(word));
    word.is_some_and(|word| word >> (number % 32) & 1 == 1)
}

/// True if an identity in the upper half of a word is in use.
fn has_upper_halves(imsics: &[ImsicState]) -> bool {
    let mut words = imsics.iter().flat_map(|imsic| imsic.pending.iter().chain(&imsic.enabled));
    words.any(|word| word >> 32 != 0)
}
