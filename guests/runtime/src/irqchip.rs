//! The interrupt controller that the tree shows, behind one set of verbs.

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

    /// Prepares the controller and this hart's side of it: nothing enabled, everything enabled gets through.
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

    /// Lets a routed `source` through to `hart`.
    pub fn unmask(&self, source: u32, hart: usize) {
        match self {
            Self::None => {}
            Self::Plic(plic) => plic.unmask(source, hart),
            Self::Aia(aia) => aia.unmask(source),
        }
    }

    /// Keeps `source` from `hart`.
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

    /// Takes the most urgent source of `hart` (which must be the calling hart); 0 if none is pending.
    #[must_use]
    pub fn claim(&self, hart: usize) -> u32 {
        match self {
            Self::None => 0,
            Self::Plic(plic) => plic.claim(hart),
            Self::Aia(aia) => aia.claim(),
        }
    }

    /// Ends the handling of a claimed level-triggered source: it comes again if its line is still up.
    pub fn complete(&self, source: u32, hart: usize) {
        match self {
            Self::None => {}
            Self::Plic(plic) => plic.complete(source, hart),
            Self::Aia(aia) => aia.complete(source),
        }
    }
}
