//! Whole machines on a hypervisor that only plays scripts.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use rvmm_devices::Doorbell;
use rvmm_devices::irq::{IrqLine, NoIrq};
use rvmm_devices::virtio::vhost_user::testing::{Traits, serve_at};
use tempfile::NamedTempFile;

use super::vm::{AiaPlan, CpuFacts, CpuKnobs, Hypervisor, Irqchip, Vm, VmError};
use super::{Machine, Parts};
use crate::config::{IrqchipChoice, LoadConfig, VmConfig};
use crate::error::{EXIT_HOST, EXIT_USAGE, Error};
use crate::host::in_a_namespace;
use crate::terminal::Console;
use crate::vcpu::exit::SystemEvent;
use crate::vcpu::hart::Hart;
use crate::vcpu::stop::StopReason;
use crate::vcpu::testing::{ScriptHart, Step};

/// Makes VMs whose one hart plays the next of these scripts.
struct Lives {
    scripts: Mutex<Vec<Vec<Step>>>,
    lived: Arc<AtomicUsize>,
}

struct ScriptVm {
    script: Mutex<Option<Vec<Step>>>,
}

impl Hypervisor for Lives {
    fn create_vm(&self) -> Result<Arc<dyn Vm>, VmError> {
        self.lived.fetch_add(1, SeqCst);
        let script = Mutex::new(Some(self.scripts.lock().unwrap().remove(0)));
        Ok(Arc::new(ScriptVm { script }))
    }
}

impl Vm for ScriptVm {
    fn max_harts(&self) -> u32 {
        1
    }

    fn map_memory(&self, _: u32, _: u64, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn create_hart(&self, id: u32, _: &CpuKnobs) -> Result<Box<dyn Hart>, VmError> {
        let script = self.script.lock().unwrap().take().unwrap();
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

    fn create_irqchip(&self, _: IrqchipChoice, _: &AiaPlan) -> Result<Irqchip, VmError> {
        Ok(Irqchip::None)
    }

    fn ring_in_kernel(&self, _: u64, _: Doorbell<'_>) -> Result<(), VmError> {
        Ok(())
    }

    fn irq_line(&self, _: u32) -> Result<Arc<dyn IrqLine>, VmError> {
        Ok(Arc::new(NoIrq))
    }

    fn external_line(&self, _: u32) -> Result<Arc<dyn IrqLine>, VmError> {
        Ok(Arc::new(NoIrq))
    }
}

/// A machine of 16 MiB with this device, whose hart plays one of `lives` after the other, how many it has begun,
/// and the file that it starts.
fn machine(
    device: &str,
    lives: impl IntoIterator<Item = Vec<Step>>,
) -> (Result<Machine, Error>, Arc<AtomicUsize>, NamedTempFile) {
    let program = NamedTempFile::new().unwrap();
    std::fs::write(program.path(), [0; 64]).unwrap();
    let mut config = VmConfig { mem: 16 << 20, ..VmConfig::default() };
    config.boot.load = vec![LoadConfig { file: program.path().into(), addr: 0x8000_0000 }];
    config.boot.entry = Some(0x8000_0000);
    config.devices = vec![device.into()];
    let lived = Arc::new(AtomicUsize::new(0));
    let scripts = Mutex::new(lives.into_iter().collect());
    let host = Lives { scripts, lived: Arc::clone(&lived) };
    let parts =
        Parts { console: Some(Console::null()), hypervisor: Some(Box::new(host)), signals: false };
    (Machine::build_with(config, parts), lived, program)
}

#[test]
fn a_restart_closes_the_hosts_ends_before_it_opens_them_again() {
    in_a_namespace(|| {
        let reset = || vec![Step::System(SystemEvent::Reset(0))];
        let lives = [reset(), reset(), vec![Step::System(SystemEvent::Shutdown(0))]];
        // A tap can be open once only.
        let (machine, lived, _program) = machine("net,tap=t0", lives);
        assert_eq!(machine.unwrap().run().unwrap(), StopReason::PowerOff);
        assert_eq!(lived.load(SeqCst), 3);
    });
}

#[test]
fn a_network_that_is_not_there_is_told_from_one_that_was_not_named() {
    in_a_namespace(|| {
        for (device, code, part) in [
            ("net", EXIT_USAGE, "add tap=NAME or fd=N"),
            ("net,tap=a/b", EXIT_USAGE, "1 to 15 letters"),
            ("net,tap=lo", EXIT_HOST, "Cannot use tap lo (there is"),
        ] {
            let error = machine(device, [Vec::new()]).0.err().unwrap();
            assert_eq!(error.exit_code(), code, "{device}");
            let text = error.to_string();
            assert!(text.starts_with("Device net: ") && text.contains(part), "{text}");
        }
    });
}

#[test]
fn a_machine_shares_its_memory_where_a_device_needs_it() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("peer.sock");
    let _heard = serve_at(&socket, Traits::default()).unwrap();
    let reset = || vec![Step::System(SystemEvent::Reset(0))];
    let lives = [reset(), vec![Step::System(SystemEvent::Shutdown(0))]];
    // A device of another program is not built in front of memory that is not shared.
    let device = format!("vhost-user-blk,socket={}", socket.display());
    let (machine, lived, _program) = machine(&device, lives);
    assert_eq!(machine.unwrap().run().unwrap(), StopReason::PowerOff);
    assert_eq!(lived.load(SeqCst), 2);
}
