//! Machine-mode CSRs and their values.

use rvmm_devices::number::number;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::riscv::csr;

/// A CSR and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CsrValue {
    /// Its number, up to 0xfff.
    pub number: u16,
    /// Its value, the same on every hart at the start.
    pub value: u64,
}

impl CsrValue {
    /// Parses the name of a CSR, or its number: hexadecimal after `0x`.
    ///
    /// # Errors
    /// The reason for which it is invalid. Only machine-mode CSRs (bits 9 and 8 of the number) are valid: the guest's hardware has none.
    pub fn number(name: &str) -> Result<u16, String> {
        if let Some(number) = csr::number(name).filter(|number| csr::is_machine(*number)) {
            return Ok(number);
        }
        let number = number(name).ok().filter(|_| name.starts_with("0x"));
        let number = number.and_then(|number| u16::try_from(number).ok());
        match number.filter(|number| *number <= csr::LAST) {
            Some(number) if csr::is_machine(number) => Ok(number),
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
