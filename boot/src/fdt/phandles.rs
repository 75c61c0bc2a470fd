//! The phandles: harts first, then the interrupt controllers, then the devices.

use super::board::{Board, DeviceNode, Irqchip, Value};
use crate::error::BootError;

/// The label of the interrupt controller that devices are wired to.
const IRQCHIP: &str = "irqchip";

/// The label of the interrupt controller that receives MSIs.
const MSI: &str = "msi";

/// The phandles of a board; they depend only on its structure, so the same board gives the same tree.
pub(super) struct Phandles {
    harts: u32,
    has_msi: bool,
    labels: Vec<String>,
}

impl Phandles {
    /// Numbers the nodes of `board`.
    pub(super) fn new(board: &Board) -> Result<Self, BootError> {
        let labels: Vec<String> = board.devices.iter().map(|device| device.label.clone()).collect();
        for (index, label) in labels.iter().enumerate() {
            let taken = [IRQCHIP, MSI].contains(&label.as_str());
            if taken || labels.iter().take(index).any(|other| other == label) {
                return Err(BootError::Board(format!("the label {label:?} is taken")));
            }
        }
        let harts = u32::try_from(board.cpus.len());
        let harts = harts.map_err(|_| BootError::Board("there are too many harts".into()))?;
        let has_msi = matches!(board.irqchip, Irqchip::Aia { .. });
        Ok(Self { harts, has_msi, labels })
    }

    /// The node of the hart with this index.
    pub(super) fn cpu(&self, index: usize) -> u32 {
        1 + 2 * number(index)
    }

    /// The interrupt controller of the hart with this index.
    pub(super) fn intc(&self, index: usize) -> u32 {
        2 + 2 * number(index)
    }

    /// The interrupt controllers of all harts.
    pub(super) fn intcs(&self) -> impl Iterator<Item = u32> {
        (0..self.harts).map(|index| 2 + 2 * index)
    }

    /// The interrupt controller that devices are wired to.
    pub(super) fn irqchip(&self) -> u32 {
        1 + 2 * self.harts
    }

    /// The interrupt controller that receives MSIs.
    pub(super) fn msi(&self) -> u32 {
        2 + 2 * self.harts
    }

    /// The node of the device with this index.
    pub(super) fn device(&self, index: usize) -> u32 {
        3 + 2 * self.harts + number(index)
    }

    /// The node with this label.
    pub(super) fn of(&self, label: &str) -> Result<u32, BootError> {
        match label {
            IRQCHIP => Ok(self.irqchip()),
            MSI if self.has_msi => Ok(self.msi()),
            _ => self.index(label).map(|index| self.device(index)),
        }
    }

    /// The index of the device with this label.
    pub(super) fn index(&self, label: &str) -> Result<usize, BootError> {
        let found = self.labels.iter().position(|other| other == label);
        found.ok_or_else(|| BootError::Board(format!("there is no device {label:?}")))
    }
}

/// True if any property of the board refers to `device`.
pub(super) fn is_referred_to(board: &Board, device: &DeviceNode) -> bool {
    let owns = device.companions.iter().flat_map(|node| &node.properties);
    let mut owners = owns.chain(&device.node.properties);
    let nodes = board.devices.iter().flat_map(|d| d.companions.iter().chain([&d.node]));
    let mut values = nodes.flat_map(|node| &node.properties).map(|property| &property.value);
    owners.any(|property| property.value == Value::Owner)
        || values.any(|value| matches!(value, Value::Phandle(label) if *label == device.label))
}

/// Converts an index; 2 MiB hold fewer than 2^32 nodes.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX / 4)
}
