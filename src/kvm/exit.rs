//! Decodes the shared page after KVM_RUN, and the errors of KVM_RUN, into an [`Exit`].
#![expect(unsafe_code, reason = "the page is a C union; the exit reason selects the member")]

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTR, KVM_EXIT_MMIO, KVM_EXIT_RISCV_CSR,
    KVM_EXIT_RISCV_SBI, KVM_EXIT_SYSTEM_EVENT, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
    kvm_run__bindgen_ty_1,
};

use crate::vcpu::exit::{CsrAccess, Exit, Fault, SbiCall, SystemEvent};

/// The union in the shared page, not the whole page: a signal handler may write its first bytes at any time.
pub(super) type Body = kvm_run__bindgen_ty_1;

/// Decodes the exit of a successful KVM_RUN from `reason` and the rest of the shared page.
#[inline]
pub(super) fn decode(reason: u32, body: &mut Body) -> Exit<'_> {
    // Most exits are MMIO, and a comparison costs less than a jump table.
    if reason == KVM_EXIT_MMIO { mmio(body) } else { decode_rare(reason, body) }
}

/// Decodes every other exit. Out of line, or the compiler builds one jump table for all.
#[inline(never)]
fn decode_rare(reason: u32, body: &mut Body) -> Exit<'_> {
    match reason {
        KVM_EXIT_RISCV_SBI => {
            // SAFETY: the exit reason says that this member is the one filled in; any bits are valid integers.
            let call = unsafe { &mut body.riscv_sbi };
            Exit::Sbi(SbiCall {
                extension: call.extension_id,
                function: call.function_id,
                args: &call.args,
                ret: &mut call.ret,
            })
        }
        KVM_EXIT_RISCV_CSR => {
            // SAFETY: as above.
            let access = unsafe { &mut body.riscv_csr };
            Exit::Csr(CsrAccess {
                csr: access.csr_num,
                new_value: access.new_value,
                write_mask: access.write_mask,
                ret: &mut access.ret_value,
            })
        }
        KVM_EXIT_SYSTEM_EVENT => Exit::System(system_event(body)),
        KVM_EXIT_DEBUG => Exit::Debug,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let entry = unsafe { &body.fail_entry };
            Exit::Fault(Fault::Entry {
                reason: entry.hardware_entry_failure_reason,
                cpu: entry.cpu,
            })
        }
        other => Exit::Unknown(other),
    }
}

#[inline]
fn mmio(body: &mut Body) -> Exit<'_> {
    // SAFETY: the exit reason says that this member is the one filled in; any bits are valid integers.
    let access = unsafe { &mut body.mmio };
    let data = match access.len {
        len @ (1 | 2 | 4 | 8) => access.data.get_mut(..len as usize),
        // No kernel reports another width; it must not reach a device.
        _ => None,
    };
    let addr = access.phys_addr;
    match data {
        Some(data) if access.is_write == 0 => Exit::MmioRead { addr, data },
        Some(data) => Exit::MmioWrite { addr, data },
        None => Exit::Unknown(KVM_EXIT_MMIO),
    }
}

fn system_event(body: &Body) -> SystemEvent {
    // SAFETY: the exit reason says that this member is the one filled in; any bits are valid integers.
    let event = unsafe { &body.system_event };
    // SAFETY: both members of this inner union are integers; any bits are valid.
    let first = unsafe { event.__bindgen_anon_1.data[0] };
    let reason = if event.ndata == 0 { 0 } else { first };
    match event.type_ {
        KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::Shutdown(reason),
        KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset(reason),
        other => SystemEvent::Other(other),
    }
}

/// The exit for a KVM_RUN that failed with `errno`. The program counter still points to the instruction.
pub(super) fn fault(errno: i32) -> Exit<'static> {
    Exit::Fault(match errno {
        libc::EOPNOTSUPP => Fault::Unemulated,
        libc::EIO => Fault::Misaligned,
        libc::EFAULT => Fault::Memory,
        other => Fault::Host(other),
    })
}

/// True if the next KVM_RUN after an exit with `reason` completes an instruction: a destination register or the program
/// counter is still to be written.
pub(super) fn is_open(reason: u32) -> bool {
    matches!(reason, KVM_EXIT_MMIO | KVM_EXIT_RISCV_SBI | KVM_EXIT_RISCV_CSR)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{
        kvm_run__bindgen_ty_1__bindgen_ty_2 as FailEntry,
        kvm_run__bindgen_ty_1__bindgen_ty_6 as Mmio, kvm_run__bindgen_ty_1__bindgen_ty_24 as Sbi,
        kvm_run__bindgen_ty_1__bindgen_ty_25 as Csr,
    };

    use super::*;
    use crate::riscv::sbi::eid;

    fn access(len: u32, is_write: u8) -> Body {
        let data = [1, 2, 3, 4, 5, 6, 7, 8];
        Body { mmio: Mmio { phys_addr: 0x1000_0005, data, len, is_write } }
    }

    #[test]
    fn a_load_is_answered_in_the_page() {
        for len in [1, 2, 4, 8] {
            let mut body = access(len, 0);
            let Exit::MmioRead { addr: 0x1000_0005, data } = decode(KVM_EXIT_MMIO, &mut body)
            else {
                panic!("not a load of {len} bytes")
            };
            assert_eq!(data.len(), len as usize);
            data.fill(0xee);
            // SAFETY: this test filled the member.
            let data = unsafe { body.mmio.data };
            assert_eq!(data.iter().filter(|byte| **byte == 0xee).count(), len as usize);
        }
    }

    #[test]
    fn a_store_carries_as_many_bytes_as_it_is_wide() {
        let mut body = access(2, 1);
        let Exit::MmioWrite { data, .. } = decode(KVM_EXIT_MMIO, &mut body) else {
            panic!("not a store")
        };
        assert_eq!(data, [1, 2]);
    }

    #[test]
    fn an_access_of_a_width_that_does_not_exist_reaches_no_device() {
        for len in [0, 3, 5, 9, u32::MAX] {
            let mut body = access(len, 0);
            assert!(
                matches!(decode(KVM_EXIT_MMIO, &mut body), Exit::Unknown(KVM_EXIT_MMIO)),
                "{len}"
            );
        }
    }

    #[test]
    fn an_sbi_call_is_answered_in_the_page() {
        let args = [1, 2, 3, 4, 5, 6];
        let sbi = Sbi { extension_id: eid::DBCN, function_id: 2, args, ret: [0; 2] };
        let mut body = Body { riscv_sbi: sbi };
        let Exit::Sbi(call) = decode(KVM_EXIT_RISCV_SBI, &mut body) else { panic!("not a call") };
        assert_eq!((call.extension, call.function, call.args), (eid::DBCN, 2, &args));
        *call.ret = [7, 8];
        // SAFETY: this test filled the member.
        assert_eq!(unsafe { body.riscv_sbi.ret }, [7, 8]);
    }

    #[test]
    fn a_csr_access_is_answered_in_the_page() {
        let csr = Csr { csr_num: 0x15, new_value: 3, write_mask: 1, ret_value: 0 };
        let mut body = Body { riscv_csr: csr };
        let Exit::Csr(access) = decode(KVM_EXIT_RISCV_CSR, &mut body) else {
            panic!("not an access")
        };
        assert_eq!((access.csr, access.new_value, access.write_mask), (0x15, 3, 1));
        *access.ret = 9;
        // SAFETY: this test filled the member.
        assert_eq!(unsafe { body.riscv_csr.ret_value }, 9);
    }

    #[test]
    fn a_shutdown_and_a_reset_carry_their_reason() {
        let event = |type_: u32, ndata: u32| {
            let mut body = Body::default();
            body.system_event.type_ = type_;
            body.system_event.ndata = ndata;
            body.system_event.__bindgen_anon_1.data = [5; 16];
            match decode(KVM_EXIT_SYSTEM_EVENT, &mut body) {
                Exit::System(event) => event,
                other => panic!("not a system event: {other:?}"),
            }
        };
        assert_eq!(event(KVM_SYSTEM_EVENT_SHUTDOWN, 0), SystemEvent::Shutdown(0));
        assert_eq!(event(KVM_SYSTEM_EVENT_SHUTDOWN, 1), SystemEvent::Shutdown(5));
        assert_eq!(event(KVM_SYSTEM_EVENT_RESET, 1), SystemEvent::Reset(5));
        assert_eq!(event(77, 1), SystemEvent::Other(77));
    }

    #[test]
    fn a_refused_entry_says_why() {
        let entry = FailEntry { hardware_entry_failure_reason: 1, cpu: 3 };
        let mut body = Body { fail_entry: entry };
        let Exit::Fault(fault) = decode(KVM_EXIT_FAIL_ENTRY, &mut body) else {
            panic!("not a fault")
        };
        assert_eq!(fault, Fault::Entry { reason: 1, cpu: 3 });
    }

    #[test]
    fn the_exits_without_a_payload_are_known_and_others_are_numbered() {
        let mut body = Body::default();
        assert!(matches!(decode(KVM_EXIT_DEBUG, &mut body), Exit::Debug));
        assert!(matches!(decode(KVM_EXIT_INTR, &mut body), Exit::Interrupted));
        assert!(matches!(decode(0, &mut body), Exit::Unknown(0)));
        assert!(matches!(decode(31, &mut body), Exit::Unknown(31)));
    }

    #[test]
    fn only_accesses_and_calls_are_left_open() {
        let open: Vec<u32> = (0..64).filter(|reason| is_open(*reason)).collect();
        assert_eq!(open, [KVM_EXIT_MMIO, KVM_EXIT_RISCV_SBI, KVM_EXIT_RISCV_CSR]);
    }

    #[test]
    fn every_errno_of_a_run_has_its_meaning() {
        for (errno, expected) in [
            (libc::EOPNOTSUPP, Fault::Unemulated),
            (libc::EIO, Fault::Misaligned),
            (libc::EFAULT, Fault::Memory),
            (libc::ENOMEM, Fault::Host(libc::ENOMEM)),
        ] {
            assert!(matches!(fault(errno), Exit::Fault(fault) if fault == expected), "{errno}");
        }
    }
}
