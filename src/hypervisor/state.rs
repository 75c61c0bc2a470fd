//! The saved state of a VM but its memory: plain data with names that a person can read.

use serde::{Deserialize, Serialize};

/// The state of a VM but its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// The guest's `time`, which all harts share.
    pub time: u64,
    /// The harts, in the order of their creation.
    pub harts: Vec<HartState>,
    /// The in-kernel interrupt controller; `None` without one: then the machine has a PLIC, whose state is not the VM's.
    pub irqchip: Option<IrqchipState>,
}

/// The state of a hart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HartState {
    /// The hart's id.
    pub id: u32,
    /// Its run state.
    pub mp_state: MpState,
    /// Its registers, in the order in which the hypervisor lists them.
    pub registers: Vec<Register>,
}

/// The run state of a hart, as SBI HSM knows it. A hart that waits or is suspended in HSM is runnable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MpState {
    /// Runs, or waits for an interrupt.
    Runnable,
    /// Waits for SBI HSM to start it.
    Stopped,
}

/// A register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Register {
    /// The hypervisor's id: for KVM that of KVM_GET_ONE_REG, which includes the size.
    pub id: u64,
    /// Its value.
    pub value: RegisterValue,
}

/// The value of a register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum RegisterValue {
    /// Of a register of at most 64 bits.
    Word(u64),
    /// Of a wider one, little-endian.
    Bytes(Vec<u8>),
}

/// The state of the in-kernel AIA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IrqchipState {
    /// The controller of wired interrupts.
    pub aplic: AplicState,
    /// The interrupt file of each hart, in the order of their creation.
    pub imsics: Vec<ImsicState>,
}

/// The state of the APLIC (AIA 1.0, chapter 4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AplicState {
    /// Number of sources: 1 to this number.
    pub source_count: u32,
    /// `domaincfg`
    pub domaincfg: u32,
    /// The sources that are not as after a reset, in ascending order.
    pub sources: Vec<SourceState>,
}

/// The state of a source of the APLIC.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceState {
    /// The source's number.
    pub number: u32,
    /// `sourcecfg`
    pub sourcecfg: u32,
    /// `target`
    pub target: u32,
    /// True if its interrupt is enabled.
    pub enabled: bool,
    /// True if its interrupt is pending.
    pub pending: bool,
    /// True if its line is high.
    pub high: bool,
}

/// The state of an interrupt file (AIA 1.0, section 3.8).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImsicState {
    /// The id of the hart.
    pub hart: u32,
    /// `eidelivery`
    pub eidelivery: u64,
    /// `eithreshold`
    pub eithreshold: u64,
    /// Pending bits, 64 identities a word.
    pub pending: Vec<u64>,
    /// Enable bits, 64 identities a word.
    pub enabled: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_survives_json_with_every_bit() {
        let state = VmState {
            time: u64::MAX - 1,
            harts: vec![HartState {
                id: 3,
                mp_state: MpState::Stopped,
                registers: vec![
                    Register { id: 0x8030_0000_0200_0000, value: RegisterValue::Word(u64::MAX) },
                    Register {
                        id: 0x8040_0000_0900_0006,
                        value: RegisterValue::Bytes(vec![1; 16]),
                    },
                ],
            }],
            irqchip: Some(IrqchipState {
                aplic: AplicState {
                    source_count: 95,
                    domaincfg: 0x8000_0104,
                    sources: vec![SourceState { number: 7, high: true, ..SourceState::default() }],
                },
                imsics: vec![ImsicState {
                    hart: 3,
                    eidelivery: 1,
                    eithreshold: 0,
                    pending: vec![1 << 63, 0],
                    enabled: vec![u64::MAX, 1],
                }],
            }),
        };
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<VmState>(&text).unwrap(), state);
        assert!(text.contains(r#""mp_state":"stopped""#), "{text}");
        let more = text.replacen(r#""time""#, r#""unknown":0,"time""#, 1);
        assert!(serde_json::from_str::<VmState>(&more).is_err());
    }
}
