//! Machine-mode CSRs, by name and number.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A CSR and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CsrValue {
    /// Its number, up to 0xfff.
    pub number: u16,
    /// Its value, the same on every hart at the start.
    pub value: u64,
}

/// Names of machine-mode CSRs (Privileged specification, "Currently allocated RISC-V machine-level CSR addresses").
const NAMES: [(&str, u16); 18] = [
    ("mstatus", 0x300),
    ("misa", 0x301),
    ("medeleg", 0x302),
    ("mideleg", 0x303),
    ("mie", 0x304),
    ("mtvec", 0x305),
    ("mcounteren", 0x306),
    ("mscratch", 0x340),
    ("mepc", 0x341),
    ("mcause", 0x342),
    ("mtval", 0x343),
    ("mip", 0x344),
    ("menvcfg", 0x30a),
    ("mvendorid", 0xf11),
    ("marchid", 0xf12),
    ("mimpid", 0xf13),
    ("mhartid", 0xf14),
    ("mconfigptr", 0xf15),
];

impl CsrValue {
    /// Parses the name of a CSR, or its number: hexadecimal after `0x`.
    ///
    /// # Errors
    /// The reason for which it is invalid. Only machine-mode CSRs (bits 9 and 8 of the number) are valid: the guest's hardware has none.
    pub fn number(name: &str) -> Result<u16, String> {
        if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
            return Ok(*number);
        }
        let digits = name.strip_prefix("0x").filter(|digits| !digits.starts_with('+'));
        let number = digits.and_then(|digits| u16::from_str_radix(digits, 16).ok());
        match number.filter(|number| *number <= 0xfff) {
            Some(number) if number >> 8 & 3 == 3 => Ok(number),
            Some(_) => Err(format!("CSR {name} is not a machine-mode CSR: the guest has its own")),
            None => Err(format!(
                "there is no machine-mode CSR named {name} (write mhartid, or a number such as 0xf14)"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_and_numbers_of_machine_mode_are_accepted() {
        assert_eq!(CsrValue::number("mhartid"), Ok(0xf14));
        assert_eq!(CsrValue::number("0xf14"), Ok(0xf14));
        for name in ["", "sstatus", "0x100", "0x1000", "0x+f", "f14", "mhartid "] {
            assert!(CsrValue::number(name).is_err(), "{name}");
        }
    }
}
