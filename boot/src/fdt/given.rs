//! A device tree supplied by the user (`--dtb`): checked against the machine, and completed with the initrd.
//!
//! A tree that was dumped from another machine is valid, but boots a guest with memory that does not exist, a clock
//! that is wrong or an initrd that is not loaded. So its memory, harts, clock and interrupt controller are compared with
//! the board, and the addresses of the initrd are written into it.

use std::path::Path;

use super::board::{Board, Irqchip};
use super::claims::Claims;
use super::splice;
use super::{MAX_LEN, blob};
use crate::error::{BootError, FileName, Role, Size};
use crate::region::Region;
use crate::source::{Source, unusable};

/// A device tree supplied by the user: a valid blob, and the facts in it.
#[derive(Clone, Debug)]
pub struct UserTree {
    name: FileName,
    blob: Vec<u8>,
    claims: Claims,
}

impl UserTree {
    /// Reads a device tree blob; data after the end given by its header is ignored.
    ///
    /// # Errors
    /// [`BootError::Open`], [`BootError::Changed`], or [`BootError::Unusable`] for a file that is not a valid device
    /// tree blob of at most [`MAX_LEN`] bytes.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let refuse = |reason| unusable(path, Role::DeviceTree, reason);
        let source = Source::open_as(path, Role::DeviceTree)?;
        let len = usize::try_from(source.len()).ok().filter(|len| *len as u64 <= MAX_LEN);
        let Some(len) = len else {
            let max = Size(MAX_LEN);
            return Err(refuse(format!("it is larger than {max} (give a .dtb file)")));
        };
        let mut bytes = vec![0; len];
        source.read_exact_at(0, &mut bytes)?;
        if bytes.starts_with(b"/dts-v1/") {
            let advice = "compile it first: dtc -I dts -O dtb -o FILE.dtb FILE.dts";
            return Err(refuse(format!("it is device tree source ({advice})")));
        }
        let damaged = |fault| refuse(format!("{fault} (build it again with dtc)"));
        let total = blob::check(&bytes).map_err(damaged)?;
        bytes.truncate(total);
        let claims = Claims::read(&bytes).map_err(damaged)?;
        Ok(Self { name: path.into(), blob: bytes, claims })
    }

    /// The unchanged blob of the file.
    #[must_use]
    pub fn blob(&self) -> &[u8] {
        &self.blob
    }

    /// The ranges of memory that it describes, in ascending order.
    #[must_use]
    pub fn memory(&self) -> &[Region] {
        &self.claims.memory
    }

    /// The initrd that it describes.
    #[must_use]
    pub fn initrd(&self) -> Option<Region> {
        self.claims.initrd
    }

    /// The tree for the guest: with free space at the end, as a generated one has, and, if there is an `initrd`, with its
    /// addresses in `/chosen`. Its length does not depend on these addresses.
    #[must_use]
    pub fn completed(&self, initrd: Option<Region>) -> Vec<u8> {
        splice::completed(&self.blob, initrd)
    }

    /// Compares the tree with the guest's board; returns a warning for each difference that may be harmless.
    ///
    /// # Errors
    /// [`BootError::Unusable`] for a difference with which no guest can run: memory that does not exist, or no boot hart.
    pub fn compare(&self, board: &Board) -> Result<Vec<String>, BootError> {
        let memory = self.compare_memory(board)?;
        let harts = self.compare_harts(board)?;
        let others = [
            memory,
            harts,
            self.compare_isa(board),
            self.compare_clock(board),
            self.compare_irqchip(board),
        ];
        let named = |what: String| format!("The device tree {} {what}", self.name);
        Ok(others.into_iter().flatten().map(named).collect())
    }

    fn refuse(&self, reason: String) -> BootError {
        unusable(self.name.path(), Role::DeviceTree, reason)
    }

    fn compare_memory(&self, board: &Board) -> Result<Option<String>, BootError> {
        let ram = listed(&board.memory);
        let is_there = |range: &&Region| board.memory.iter().any(|ram| ram.encloses(**range));
        if let Some(range) = self.memory().iter().find(|range| !is_there(range)) {
            return Err(self.refuse(format!(
                "it describes memory at {range}, but the machine's is {ram} (change --mem, or the tree)"
            )));
        }
        let total =
            |ranges: &[Region]| ranges.iter().fold(0_u64, |sum, r| sum.saturating_add(r.size));
        let (named, there) = (total(self.memory()), total(&board.memory));
        Ok(match named {
            0 => Some(format!("describes no memory, but the machine's is {ram}")),
            named if named < there => Some(format!(
                "describes {} of memory, but the machine has {}: the guest does not see the rest",
                Size(named),
                Size(there)
            )),
            _ => None,
        })
    }

    fn compare_harts(&self, board: &Board) -> Result<Option<String>, BootError> {
        let there: Vec<u64> = board.cpus.iter().map(|cpu| cpu.hartid.into()).collect();
        let named = &self.claims.harts;
        if *named == there {
            return Ok(None);
        }
        let machine = format!("the machine has {} (--cpus)", there.len());
        match there.first() {
            _ if named.is_empty() => Ok(Some(format!("describes no harts, but {machine}"))),
            Some(boot) if !named.contains(boot) => Err(self.refuse(format!(
                "boot hart {boot} is not among the {} that it describes (change the tree)",
                named.len()
            ))),
            _ if named.len() == there.len() => Ok(Some(format!(
                "describes other harts than 0 to {}, but {machine}",
                there.len() - 1
            ))),
            _ => Ok(Some(format!("describes {} harts, but {machine}", named.len()))),
        }
    }

    fn compare_isa(&self, board: &Board) -> Option<String> {
        /// Maximum number of names in the warning.
        const MOST: usize = 8;
        let there = board.cpus.first()?.isa.names().ok()?;
        let lacking = self.claims.extensions.iter().filter(|name| !there.contains(name));
        let lacking: Vec<&str> = lacking.map(String::as_str).collect();
        let more = lacking.len().saturating_sub(MOST);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let names = lacking.get(..MOST).unwrap_or(&lacking).join(", ");
        (!lacking.is_empty())
            .then(|| format!("describes extensions that the machine's harts lack: {names}{more}"))
    }

    fn compare_clock(&self, board: &Board) -> Option<String> {
        let (named, there) = (self.claims.timebase?, u64::from(board.timebase_frequency));
        (named != there).then(|| {
            format!("describes a timebase of {named} Hz, but the host's is {there} Hz: the guest's clock is wrong")
        })
    }

    fn compare_irqchip(&self, board: &Board) -> Option<String> {
        let (named, there) = match board.irqchip {
            Irqchip::Aia { .. } if self.claims.has_plic && !self.claims.has_aplic => {
                ("a PLIC", "an AIA")
            }
            Irqchip::Plic { .. } if self.claims.has_aplic => ("an AIA", "a PLIC"),
            _ => return None,
        };
        Some(format!(
            "describes {named}, but the machine has {there} (--irqchip): the guest gets no interrupts"
        ))
    }
}

/// `0x80000000..0x90000000, ...`
fn listed(ranges: &[Region]) -> String {
    let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
    ranges.join(", ")
}
