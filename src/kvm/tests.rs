//! Tests on a real KVM: each runs a page of hand-assembled instructions.

mod aia;
mod asm;
mod harts;
mod knobs;
mod report;
mod reset;
mod state;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::open;
use super::vcpu::Vcpu;
use crate::hypervisor::{CpuSettings, Hypervisor, Vm};
use crate::vcpu::exit::{Exit, SbiCall};
use crate::vcpu::hart::{Hart, Reg};

/// The start of the guests' memory and code.
const BASE: u64 = 0x8000_0000;
/// An address without memory.
const HOLE: u64 = 0x1000_0000;
/// An SBI extension of the vendor range, which the kernel passes to user space.
const VENDOR: u64 = 0x0900_0000;

/// A VM with 64 KiB of memory; the memory outlives the VM.
struct Guest {
    vm: Arc<dyn Vm>,
    memory: GuestMemoryMmap,
}

impl Guest {
    fn new(code: &[u32]) -> Self {
        let vm = open().unwrap().create_vm().unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), 0x1_0000)]).unwrap();
        let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(BASE)).unwrap();
        let host = memory.get_host_address(GuestAddress(BASE)).unwrap() as u64;
        vm.map_memory(0, BASE, host, 0x1_0000).unwrap();
        Self { vm, memory }
    }

    /// A vCPU of a VM of its own, without the traits.
    fn raw_vcpu(&self) -> Vcpu {
        let host = self.memory.get_host_address(GuestAddress(BASE)).unwrap() as u64;
        let vm = open().unwrap().new_vm().unwrap();
        vm.map_memory(0, BASE, host, 0x1_0000).unwrap();
        vm.make_vcpu(0).unwrap()
    }

    fn hart(&self, id: u32) -> Box<dyn Hart> {
        self.hart_with(id, &CpuSettings::default())
    }

    fn hart_with(&self, id: u32, knobs: &CpuSettings) -> Box<dyn Hart> {
        let mut hart = self.vm.create_hart(id, knobs).unwrap();
        if id == 0 {
            hart.set(Reg::Pc, BASE).unwrap();
        }
        hart
    }
}

/// Runs until the guest makes an SBI call, answers it with `answer`, and returns extension and arguments.
fn called(hart: &mut dyn Hart, answer: [u64; 2]) -> (u64, [u64; 6]) {
    loop {
        match hart.enter().unwrap() {
            Exit::Sbi(SbiCall { extension, args, ret, .. }) => {
                *ret = answer;
                return (extension, *args);
            }
            Exit::Interrupted => {}
            other => panic!("not a call: {other:?}"),
        }
    }
}
