//! A VM without a hypervisor, whose hart runs a script: its state is plain data.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};

use rvmm_devices::IoEvent;
use rvmm_devices::irq::{IrqLine, NoIrq};

use crate::config::IrqchipChoice;
use crate::error::VmError;
use crate::hypervisor::{
    AiaPlan, CpuFacts, CpuSettings, HartState, Hypervisor, Irqchip, MpState, Register,
    RegisterValue, Vm, VmLifecycle, VmState,
};
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::testing::{ScriptHart, Step};

/// Creates VMs whose one hart runs the next of these scripts: one for each VM, and one for each reset.
pub(crate) struct ScriptHypervisor {
    scripts: Arc<Mutex<Vec<Vec<Step>>>>,
    pub(crate) created: Arc<AtomicUsize>,
    /// Number of resets of its VMs.
    pub(crate) resets: Arc<AtomicUsize>,
}

impl ScriptHypervisor {
    pub(crate) fn new(scripts: impl IntoIterator<Item = Vec<Step>>) -> Self {
        let scripts = Arc::new(Mutex::new(scripts.into_iter().collect()));
        Self { scripts, created: Arc::default(), resets: Arc::default() }
    }
}

impl Hypervisor for ScriptHypervisor {
    fn create_vm(&self) -> Result<Arc<dyn Vm>, VmError> {
        self.created.fetch_add(1, SeqCst);
        let (scripts, resets) = (Arc::clone(&self.scripts), Arc::clone(&self.resets));
        let vm = ScriptVm { scripts, resets, inner: Mutex::default() };
        vm.take_script();
        Ok(Arc::new(vm))
    }
}

struct ScriptVm {
    scripts: Arc<Mutex<Vec<Vec<Step>>>>,
    resets: Arc<AtomicUsize>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The script of the hart that is created next.
    script: Option<Vec<Step>>,
    harts: Vec<HartState>,
    time: u64,
    /// Size of each memory slot.
    slots: BTreeMap<u32, u64>,
    /// The slots whose log is on.
    logged: Vec<u32>,
}

impl ScriptVm {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    fn take_script(&self) {
        self.inner().script = Some(self.scripts.lock().unwrap().remove(0));
    }
}

impl VmLifecycle for ScriptVm {
    fn save(&self) -> io::Result<VmState> {
        let inner = self.inner();
        Ok(VmState { time: inner.time, harts: inner.harts.clone(), irqchip: None })
    }

    fn starting(&self) -> io::Result<Vec<u32>> {
        Ok(Vec::new())
    }

    fn restore(&self, state: &VmState) -> Result<Vec<u32>, VmError> {
        let ids = |harts: &[HartState]| harts.iter().map(|hart| hart.id).collect::<Vec<_>>();
        let mut inner = self.inner();
        if ids(&inner.harts) != ids(&state.harts) || state.irqchip.is_some() {
            return Err(VmError::new("The machine was saved with other harts or an AIA"));
        }
        inner.time = state.time;
        inner.harts.clone_from(&state.harts);
        Ok(Vec::new())
    }

    fn reset(&self) -> Result<(), VmError> {
        self.resets.fetch_add(1, SeqCst);
        let mut inner = self.inner();
        inner.harts.clear();
        inner.time = 0;
        drop(inner);
        self.take_script();
        Ok(())
    }

    fn log_dirty(&self, slot: u32, on: bool) -> Result<(), VmError> {
        let mut inner = self.inner();
        if !inner.slots.contains_key(&slot) {
            return Err(VmError::new(format!("There is no memory slot {slot}")));
        }
        inner.logged.retain(|logged| *logged != slot);
        if on {
            inner.logged.push(slot);
        }
        Ok(())
    }

    fn dirty_pages(&self, slot: u32) -> io::Result<Vec<u64>> {
        let inner = self.inner();
        let size = inner.slots.get(&slot).filter(|_| inner.logged.contains(&slot));
        let words = size.ok_or(io::ErrorKind::NotFound)?.div_ceil(64 << 12);
        // A scripted guest writes nothing.
        Ok(vec![0; usize::try_from(words).unwrap()])
    }
}

impl Vm for ScriptVm {
    fn max_harts(&self) -> u32 {
        1
    }

    fn map_memory(&self, slot: u32, _: u64, _: u64, size: u64) -> io::Result<()> {
        self.inner().slots.insert(slot, size);
        Ok(())
    }

    fn map_rom(&self, slot: u32, _: u64, _: u64, size: u64) -> io::Result<()> {
        self.inner().slots.insert(slot, size);
        Ok(())
    }

    fn code_changed(&self) -> io::Result<()> {
        Ok(())
    }

    fn create_hart(&self, id: u32, _: &CpuSettings) -> Result<Box<dyn Hart>, VmError> {
        let mut inner = self.inner();
        let script = inner.script.take().unwrap();
        let registers = vec![
            Register { id: 1, value: RegisterValue::Word(id.into()) },
            Register { id: 2, value: RegisterValue::Bytes(vec![0; 16]) },
        ];
        inner.harts.push(HartState { id, mp_state: MpState::Runnable, registers });
        Ok(Box::new(ScriptHart::new(id, script)))
    }

    fn cpu_facts(&self) -> Result<CpuFacts, VmError> {
        Ok(CpuFacts {
            extensions: ["i", "m", "a"].map(String::from).to_vec(),
            satp_mode: 8,
            cbom_block: None,
            cboz_block: None,
            cbop_block: None,
            timebase_hz: 10_000_000,
        })
    }

    fn reg(&self, hart: u32, reg: Reg) -> io::Result<u64> {
        assert_eq!(hart, 0);
        Ok(if reg == Reg::Csr(Csr::Satp) { 0 } else { 7 })
    }

    fn create_irqchip(&self, _: IrqchipChoice, _: &AiaPlan) -> Result<Irqchip, VmError> {
        Ok(Irqchip::None)
    }

    fn register_ioeventfd(&self, _: u64, _: IoEvent<'_>) -> Result<(), VmError> {
        Ok(())
    }

    fn irq_line(&self, _: u32) -> Result<Arc<dyn IrqLine>, VmError> {
        Ok(Arc::new(NoIrq))
    }

    fn external_line(&self, _: u32) -> Result<Arc<dyn IrqLine>, VmError> {
        Ok(Arc::new(NoIrq))
    }
}

#[test]
fn a_saved_state_survives_json_and_is_restored_into_another_vm() {
    let host = ScriptHypervisor::new([vec![], vec![]]);
    let (first, second) = (host.create_vm().unwrap(), host.create_vm().unwrap());
    first.create_hart(0, &CpuSettings::default()).unwrap();
    let mut state = first.save().unwrap();
    state.time = 5;
    state.harts[0].mp_state = MpState::Stopped;
    state.harts[0].registers[0].value = RegisterValue::Word(u64::MAX);
    let text = serde_json::to_string(&state).unwrap();
    let read: VmState = serde_json::from_str(&text).unwrap();
    assert_eq!(read, state);
    assert!(second.restore(&read).is_err(), "it has no hart yet");
    second.create_hart(0, &CpuSettings::default()).unwrap();
    second.restore(&read).unwrap();
    assert_eq!(second.save().unwrap(), state);
}

#[test]
fn a_reset_ends_the_hart_and_keeps_memory_and_its_log() {
    let host = ScriptHypervisor::new([vec![], vec![]]);
    let vm = host.create_vm().unwrap();
    vm.map_memory(0, 0x8000_0000, 0x1000, 16 << 20).unwrap();
    assert!(vm.log_dirty(1, true).is_err() && vm.dirty_pages(0).is_err());
    vm.log_dirty(0, true).unwrap();
    vm.create_hart(0, &CpuSettings::default()).unwrap();
    vm.reset().unwrap();
    assert!(vm.save().unwrap().harts.is_empty());
    vm.create_hart(0, &CpuSettings::default()).unwrap();
    assert_eq!(vm.dirty_pages(0).unwrap(), vec![0; 64]);
    vm.log_dirty(0, false).unwrap();
    assert!(vm.dirty_pages(0).is_err());
    assert_eq!((host.created.load(SeqCst), host.resets.load(SeqCst)), (1, 1));
}
