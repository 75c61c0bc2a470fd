//! Prints the events of a guest in the words of its lab, and with `--explain` explanations of rvmm's own.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::stories;
use super::transcript::Transcript;
use crate::riscv::register::{A0, A1, A7};
use crate::riscv::sbi::v01;
use crate::riscv::trap::cause;
use crate::vcpu::firmware::shim;
use crate::vcpu::hart::{Csr, Hart, Reg};
use crate::vcpu::observer::{ExitObserver, ExitRecord, HartEvent};

/// The events that a lab prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Narration {
    /// None: the guest's own output is enough.
    Silent,
    /// h_1_0: the exit by which the guest asks for shutdown.
    Exit,
    /// simple_hv: every exit, and the two registers at the end.
    Exits,
    /// h_2_0: the first load of each page.
    Faults,
    /// h_3_0: the timer.
    Timer,
}

/// The guest's own code, for hosts that do not report the illegal instruction.
#[derive(Debug, Clone)]
pub(super) struct Code {
    pub(super) bytes: Vec<u8>,
    pub(super) addr: u64,
}

impl Code {
    fn word(&self, pc: u64) -> Option<u32> {
        let at = usize::try_from(pc.checked_sub(self.addr)?).ok()?;
        let bytes = self.bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }
}

/// The observer of a lab.
pub(super) struct Narrator {
    pub(super) transcript: Transcript,
    pub(super) narration: Narration,
    pub(super) explains: bool,
    pub(super) code: Code,
    /// Number of exits so far.
    pub(super) count: AtomicU64,
    /// The program counters of the exits that have been explained, and true for traps to the shim.
    pub(super) explained: Mutex<BTreeSet<(u64, bool)>>,
}

/// Maximum number of explained places; a reader hardly needs more.
const MAX_PLACES: usize = 256;

/// Reads a register for display; 0 if it cannot be read.
fn register(hart: &dyn Hart, reg: Reg) -> u64 {
    hart.get(reg).unwrap_or(0)
}

impl Narrator {
    /// Explains an exit, the first time that the guest makes one at this place: each printed byte is like the one before.
    fn explain(&self, hart: &dyn Hart, seen: &ExitRecord, pc: u64, is_shim: bool) {
        let story = if is_shim { stories::of_trap(hart) } else { stories::of_exit(hart, seen, pc) };
        let Some(story) = story else { return };
        let number = self.count.fetch_add(1, Relaxed) + 1;
        let place = (if is_shim { register(hart, Reg::Csr(Csr::Sepc)) } else { pc }, is_shim);
        let mut explained = self.explained.lock().unwrap_or_else(PoisonError::into_inner);
        if explained.len() < MAX_PLACES && explained.insert(place) {
            drop(explained);
            self.transcript.aside(&format!("[exit {number}, hart {}] {story}", hart.id()));
        }
    }

    /// Prints a trap of the guest to the shim.
    fn trap(&self, hart: &dyn Hart) {
        let csr = |csr| register(hart, Reg::Csr(csr));
        let (what, pc) = (csr(Csr::Scause), csr(Csr::Sepc));
        match what {
            cause::ILLEGAL_INSTRUCTION if self.narration == Narration::Exits => {
                let word = match csr(Csr::Stval) {
                    0 => self.code.word(pc).unwrap_or(0).into(),
                    word => word,
                };
                self.transcript.line(&format!("Bad instruction: {word:#x} sepc: {pc:#x}"));
            }
            cause::CALL_FROM_USER if register(hart, Reg::X(A7)) == v01::SHUTDOWN => {
                let name = match self.narration {
                    Narration::Exit => "VmExit",
                    Narration::Exits => "VmxExit",
                    _ => return,
                };
                self.transcript.line(&format!(
                    "{name} Reason: VSuperEcall: Some(Reset(Reset {{ reset_type: Shutdown, reason: NoReason }}))"
                ));
                if self.narration == Narration::Exits {
                    let (a0, a1) = (register(hart, Reg::X(A0)), register(hart, Reg::X(A1)));
                    self.transcript.line(&format!("a0 = {a0:#x}, a1 = {a1:#x}"));
                }
            }
            _ => {}
        }
    }
}

impl ExitObserver for Narrator {
    fn exit(&self, hart: &dyn Hart, seen: &ExitRecord) {
        let pc = register(hart, Reg::Pc);
        let is_shim = *seen == ExitRecord::Breakpoint && pc == shim::VECTOR;
        if self.explains {
            self.explain(hart, seen, pc, is_shim);
        }
        match *seen {
            ExitRecord::Breakpoint if is_shim => self.trap(hart),
            ExitRecord::MmioRead { addr, .. } if self.narration == Narration::Exits => {
                self.transcript.line(&format!("LoadGuestPageFault: stval{addr:#x} sepc: {pc:#x}"));
            }
            ExitRecord::MmioRead { addr, .. } if self.narration == Narration::Faults => {
                self.transcript.line(&format!("NestedPageFault addr {addr:#x}"));
            }
            _ => {}
        }
    }

    fn note(&self, _hart: u32, note: HartEvent) {
        if self.narration == Narration::Timer {
            self.transcript.line(match note {
                HartEvent::TimerSet => "Set timer...",
                HartEvent::TimerFired => "timer irq emulation",
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use super::*;
    use crate::vcpu::testing::ScriptHart;

    fn narrator(narration: Narration, explains: bool) -> Narrator {
        let code = Code { bytes: 0xf140_25f3_u32.to_le_bytes().to_vec(), addr: 0x8020_0000 };
        Narrator {
            transcript: Transcript::new(Box::new(io::sink())),
            narration,
            explains,
            code,
            count: AtomicU64::new(0),
            explained: Mutex::default(),
        }
    }

    fn trapped(cause: u64, tval: u64) -> ScriptHart {
        ScriptHart::new(0, []).with([
            (Reg::Pc, shim::VECTOR),
            (Reg::Csr(Csr::Scause), cause),
            (Reg::Csr(Csr::Sepc), 0x8020_0000),
            (Reg::Csr(Csr::Stval), tval),
            (Reg::X(A0), 0x6688),
            (Reg::X(A1), 0x1234),
            (Reg::X(A7), 8),
        ])
    }

    #[test]
    fn an_illegal_instruction_is_printed_also_where_the_host_does_not_report_it() {
        for tval in [0xf140_25f3, 0] {
            let narrator = narrator(Narration::Exits, false);
            narrator.exit(&trapped(2, tval), &ExitRecord::Breakpoint);
            assert_eq!(
                narrator.transcript.text(),
                "Bad instruction: 0xf14025f3 sepc: 0x80200000\n"
            );
        }
    }

    #[test]
    fn the_call_for_shutdown_is_printed_in_the_words_of_the_lab() {
        let reason =
            "Reason: VSuperEcall: Some(Reset(Reset { reset_type: Shutdown, reason: NoReason }))\n";
        for (narration, text) in [
            (Narration::Exit, format!("VmExit {reason}")),
            (Narration::Exits, format!("VmxExit {reason}a0 = 0x6688, a1 = 0x1234\n")),
            (Narration::Silent, String::new()),
        ] {
            let narrator = narrator(narration, false);
            narrator.exit(&trapped(8, 0), &ExitRecord::Breakpoint);
            assert_eq!(narrator.transcript.text(), text);
        }
    }

    /// An output that the test reads.
    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_exit_is_explained_once_with_its_number_and_beside_the_text() {
        let (output, mut narrator) = (Output::default(), narrator(Narration::Silent, true));
        narrator.transcript = Transcript::new(Box::new(output.clone()));
        let hart = trapped(2, 0xf140_25f3);
        narrator.exit(&hart, &ExitRecord::Breakpoint);
        narrator.exit(&hart, &ExitRecord::Breakpoint);
        narrator.exit(&hart, &ExitRecord::MmioRead { addr: 0x40, len: 8 });
        let shown = String::from_utf8(output.0.lock().unwrap().clone()).unwrap();
        assert!(
            shown.starts_with("[exit 1, hart 0] ")
                && shown.contains("\n[exit 3, hart 0] ")
                && !shown.contains("[exit 2"),
            "{shown}"
        );
        assert_eq!(narrator.transcript.text(), "");
    }
}
