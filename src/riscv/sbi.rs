//! SBI extensions, functions and errors (SBI specification 3.0).

/// Calls of version 0.1 (chapter 5): the extension is the call, and the result is in a0 alone.
pub mod v01 {
    /// Set Timer.
    pub const SET_TIMER: u64 = 0;
    /// Console Putchar.
    pub const PUTCHAR: u64 = 1;
    /// Console Getchar.
    pub const GETCHAR: u64 = 2;
    /// Clear IPI.
    pub const CLEAR_IPI: u64 = 3;
    /// Send IPI.
    pub const SEND_IPI: u64 = 4;
    /// Remote FENCE.I.
    pub const FENCE_I: u64 = 5;
    /// Remote SFENCE.VMA.
    pub const SFENCE_VMA: u64 = 6;
    /// Remote SFENCE.VMA with ASID.
    pub const SFENCE_VMA_ASID: u64 = 7;
    /// System Shutdown.
    pub const SHUTDOWN: u64 = 8;

    /// Returns the name of a call.
    #[must_use]
    pub fn name(number: u64) -> Option<&'static str> {
        Some(match number {
            SET_TIMER => "set_timer",
            PUTCHAR => "console_putchar",
            GETCHAR => "console_getchar",
            CLEAR_IPI => "clear_ipi",
            SEND_IPI => "send_ipi",
            FENCE_I => "remote_fence_i",
            SFENCE_VMA => "remote_sfence_vma",
            SFENCE_VMA_ASID => "remote_sfence_vma_asid",
            SHUTDOWN => "shutdown",
            _ => return None,
        })
    }
}

/// Extension ids: up to four letters in ASCII, except for the base extension.
pub mod eid {
    /// Base.
    pub const BASE: u64 = 0x10;
    /// Timer.
    pub const TIME: u64 = 0x5449_4d45;
    /// Inter-processor interrupts.
    pub const IPI: u64 = 0x0073_5049;
    /// Remote fences.
    pub const RFENCE: u64 = 0x5246_4e43;
    /// System reset.
    pub const SRST: u64 = 0x5352_5354;
    /// Performance monitoring unit.
    pub const PMU: u64 = 0x0050_4d55;
    /// Debug console.
    pub const DBCN: u64 = 0x4442_434e;
    /// System suspend.
    pub const SUSP: u64 = 0x5355_5350;
    /// Hart State Management.
    pub const HSM: u64 = 0x0048_534d;
}

/// Ids of the functions that are called or handled here.
pub mod fid {
    /// `sbi_probe_extension` of BASE.
    pub const PROBE_EXTENSION: u64 = 3;
    /// `sbi_set_timer` of TIME.
    pub const SET_TIMER: u64 = 0;
    /// `sbi_send_ipi` of IPI.
    pub const SEND_IPI: u64 = 0;
    /// `sbi_remote_fence_i` of RFENCE.
    pub const FENCE_I: u64 = 0;
    /// `sbi_remote_sfence_vma` of RFENCE.
    pub const SFENCE_VMA: u64 = 1;
    /// `sbi_remote_sfence_vma_asid` of RFENCE.
    pub const SFENCE_VMA_ASID: u64 = 2;
    /// `sbi_debug_console_write` of DBCN.
    pub const CONSOLE_WRITE: u64 = 0;
    /// `sbi_debug_console_read` of DBCN.
    pub const CONSOLE_READ: u64 = 1;
    /// `sbi_debug_console_write_byte` of DBCN.
    pub const CONSOLE_WRITE_BYTE: u64 = 2;
    /// `sbi_hart_stop` of HSM.
    pub const HART_STOP: u64 = 1;
    /// `sbi_system_suspend` of SUSP.
    pub const SYSTEM_SUSPEND: u64 = 0;
}

/// Errors, as in a0 (chapter 3).
pub mod error {
    /// `SBI_SUCCESS`
    pub const SUCCESS: u64 = 0;
    /// `SBI_ERR_NOT_SUPPORTED`
    pub const NOT_SUPPORTED: u64 = (-2_i64).cast_unsigned();
    /// `SBI_ERR_INVALID_PARAM`
    pub const INVALID_PARAM: u64 = (-3_i64).cast_unsigned();
    /// `SBI_ERR_INVALID_ADDRESS`
    pub const INVALID_ADDRESS: u64 = (-5_i64).cast_unsigned();
}

/// Returns the name of a function. Only functions that KVM can pass to user space have names.
#[must_use]
pub fn function_name(extension: u64, function: u64) -> Option<&'static str> {
    Some(match (extension, function) {
        (eid::BASE, 0) => "get_spec_version",
        (eid::BASE, 1) => "get_impl_id",
        (eid::BASE, 2) => "get_impl_version",
        (eid::BASE, fid::PROBE_EXTENSION) => "probe_extension",
        (eid::BASE, 4) => "get_mvendorid",
        (eid::BASE, 5) => "get_marchid",
        (eid::BASE, 6) => "get_mimpid",
        (eid::DBCN, fid::CONSOLE_WRITE) => "console_write",
        (eid::DBCN, fid::CONSOLE_READ) => "console_read",
        (eid::DBCN, fid::CONSOLE_WRITE_BYTE) => "console_write_byte",
        (eid::SUSP, fid::SYSTEM_SUSPEND) => "system_suspend",
        (eid::SRST, 0) => "system_reset",
        _ => return None,
    })
}

/// Returns the name of an extension after version 0.1; `None` if its number has no letters. Not all names belong to an extension that
/// exists.
#[must_use]
pub fn extension_name(extension: u64) -> Option<String> {
    Some(match extension {
        eid::BASE => "BASE".to_owned(),
        0x0800_0000..=0x08ff_ffff => format!("experimental {extension:#x}"),
        0x0900_0000..=0x09ff_ffff => format!("vendor {extension:#x}"),
        0x0a00_0000..=0x0aff_ffff => format!("firmware {extension:#x}"),
        _ => letters(extension)?,
    })
}

/// The letters that the number of an extension consists of: three or four capitals or digits.
fn letters(extension: u64) -> Option<String> {
    let bytes = u32::try_from(extension).ok()?.to_be_bytes();
    let letters = bytes.strip_prefix(&[0]).unwrap_or(&bytes);
    let plain = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit();
    letters.iter().all(plain).then(|| letters.iter().map(|byte| char::from(*byte)).collect())
}

/// True if the number is one of SBI 0.1's (chapter 5).
#[must_use]
pub fn is_v01(number: u64) -> bool {
    number <= v01::SHUTDOWN
}

/// True if the number can be an extension id (chapters 3 to 19): the calls of SBI 0.1, the base, the vendor and firmware ranges, and
/// names in ASCII.
#[must_use]
pub fn is_sbi(number: u64) -> bool {
    let letters = number.to_be_bytes().into_iter().skip_while(|byte| *byte == 0);
    number <= eid::BASE
        || (0x0800_0000..0x0b00_0000).contains(&number)
        || (0x4141..=0x7a7a_7a7a).contains(&number)
            && letters.into_iter().all(|byte| byte.is_ascii_alphanumeric())
}

/// True if a call with this number sets the timer.
#[must_use]
pub fn is_set_timer(number: u64) -> bool {
    matches!(number, v01::SET_TIMER | eid::TIME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_are_known_by_their_numbers() {
        for number in [0, 8, 0x10, 0x73_5049, 0x5449_4d45, 0x4442_434e, 0x53_5441, 0x0a00_0000] {
            assert!(is_sbi(number), "{number:#x}");
        }
        for number in [0x11, 93, 220, 0x4100, 0x8000_0000, 0x1_5449_4d45, u64::MAX] {
            assert!(!is_sbi(number), "{number:#x}");
        }
    }

    #[test]
    fn the_ids_of_extensions_are_their_names() {
        let ids = [(eid::TIME, "TIME"), (eid::RFENCE, "RFNC"), (eid::SRST, "SRST")];
        let more = [(eid::PMU, "PMU"), (eid::DBCN, "DBCN"), (eid::SUSP, "SUSP")];
        for (id, name) in ids.into_iter().chain(more) {
            assert_eq!(extension_name(id).as_deref(), Some(name));
        }
        // The first letter of "sPI" is a small one.
        assert_eq!(extension_name(eid::IPI), None);
    }
}
