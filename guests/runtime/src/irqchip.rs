//! One interface to the interrupt controller in the device tree.

use crate::aia::Aia;
use crate::board::Board;
use crate::plic::Plic;

/// An interrupt controller that delivers wired sources to S-mode.
pub enum Irqchip {
    /// None in the tree.
    None,
    /// A PLIC.
    Plic(Plic),
    /// An APLIC that sends MSIs to IMSICs.
    Aia(Aia),
}

impl Irqchip {
    pub(crate) fn find(board: &Board) -> Self {
        if let Some(aia) = Aia::find(board) {
            return Self::Aia(aia);
        }
        Plic::find(board).map_or(Self::None, Self::Plic)
    }

    /// `plic`, `aia` or `none`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Plic(_) => "plic",
            Self::Aia(_) => "aia",
        }
    }

    /// Prepares the controller and this hart's context: all sources are disabled, enabled ones are delivered.
    pub fn init(&self, hart: usize) {
        match self {
            Self::None => {}
            Self::Plic(plic) => plic.init(hart),
            Self::Aia(aia) => aia.init(),
        }
    }

    /// Configures the level-triggered `source` for `hart` (which must be the calling hart), still masked. Its line should be low.
    pub fn route(&self, source: u32, hart: usize) {
        match self {
            Self::None => {}
            Self::Plic(plic) => plic.route(source, hart),
            Self::Aia(aia) => aia.route(source, hart),
        }
    }

    /// Enables a routed `source` for `hart`.
    pub fn unmask(&self, source: u32, hart: usize) {
        match self {
            Self::None => {}
            Self::Plic(plic) => plic.unmask(source, hart),
            Self::Aia(aia) => aia.unmask(source),
        }
    }

    /// Disables `source` for `hart`.
    pub fn mask(&self, source: u32, hart: usize) {
        match self {
            Self::None => {}
            Self::Plic(plic) => plic.mask(source, hart),
            Self::Aia(aia) => aia.mask(source),
        }
    }

    /// True if `source` is pending in the controller.
    #[must_use]
    pub fn is_pending(&self, source: u32) -> bool {
        match self {
            Self::None => false,
            Self::Plic(plic) => plic.is_pending(source),
            Self::Aia(aia) => aia.is_pending(source),
        }
    }

    /// Claims the source of `hart` (which must be the calling hart) with the highest priority; 0 if none is pending.
    #[must_use]
    pub fn claim(&self, hart: usize) -> u32 {
        match self {
            Self::None => 0,
            Self::Plic(plic) => plic.claim(hart),
            Self::Aia(aia) => aia.claim(),
        }
    }

    /// Completes a claimed level-triggered source: it is pending again if its line is still high.
    pub fn complete(&self, source: u32, hart: usize) {
        match self {
            Self::None => {}
            Self::Plic(plic) => plic.complete(source, hart),
            Self::Aia(aia) => aia.complete(source),
        }
    }
}
