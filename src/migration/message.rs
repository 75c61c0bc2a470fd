//! The messages, and what they carry.
//!
//! ```text
//! source                                  target
//!   Hello ---------------------------------->   builds the memory
//!   <------------------------------- Welcome
//!   Pages, Zeroes, ..., Round -------------->   while the guest runs, until little is left
//!   <------------------------------ Received
//!   (the guest stands still)
//!   Pages, Zeroes, ..., State -------------->   builds the machine
//!   <--------------------------------- Ready
//!   Go ------------------------------------->
//!   <------------------------------- Running    the guest runs
//! ```
//!
//! In a post-copy the state comes after the first round, and `left` in it says what is missing. From then on the target sends `Want` for a
//! page that somebody waits for; the source sends those first, and all others after `Running`. `Complete` is the last message.
//!
//! Each side may send `Refused` instead of what is expected, up to `Go`: then the source goes on.

use serde::{Deserialize, Serialize};

use super::process::Process;
use crate::memory::PAGE;
use crate::snapshot::{Format, Preamble, SavedMachine};

/// The format of what is sent.
pub(super) const FORMAT: Format = Format { name: "rvmm-migration", version: 1, what: "migration" };

/// Pages in a message at most.
pub(super) const MOST_PAGES: u64 = 64;

/// Bytes of a message at most.
pub(super) const MOST_PAYLOAD: u32 = 256 << 20;

/// Bytes of a message with pages at most: their offset, and they.
const MOST_PAGE_BYTES: u32 = 8 + 64 * 4096;

const _: () = assert!(MOST_PAGE_BYTES as u64 == 8 + MOST_PAGES * PAGE);

/// Bytes at most of messages that only say something.
const MOST_WORDS: u32 = 64 << 10;

/// The kind of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// From the source, first: [`Hello`].
    Hello,
    /// From the target, if it can receive the machine: its [`Process`].
    Welcome,
    /// Pages: the offset of the first one from the start of RAM, and their bytes.
    Pages,
    /// Pages that are zero again: the offset of the first one, and the number of bytes.
    Zeroes,
    /// The end of a round.
    Round,
    /// From the target: it has all pages of the round.
    Received,
    /// [`State`]; the memory is complete.
    State,
    /// From the target: the machine is built, and waits.
    Ready,
    /// From the source: the guest is the target's.
    Go,
    /// From the target: the guest runs there.
    Running,
    /// A reason, as text: the guest stays with the source.
    Refused,
    /// From the target, from the state on: the offset of a page that somebody waits for.
    Want,
    /// From the target: it has all pages that were left.
    Complete,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::Hello,
        Self::Welcome,
        Self::Pages,
        Self::Zeroes,
        Self::Round,
        Self::Received,
        Self::State,
        Self::Ready,
        Self::Go,
        Self::Running,
        Self::Refused,
        Self::Want,
        Self::Complete,
    ];

    /// The number in a frame.
    pub(super) fn number(self) -> u32 {
        self as u32
    }

    /// The kind with this number.
    pub(super) fn of(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| u64::from(kind.number()) == number)
    }

    /// Maximum number of its bytes.
    pub(super) fn most(self) -> u32 {
        match self {
            Self::Hello | Self::Welcome | Self::Refused => MOST_WORDS,
            Self::Pages => MOST_PAGE_BYTES,
            Self::Zeroes => 16,
            Self::Want => 8,
            Self::State => MOST_PAYLOAD,
            Self::Round
            | Self::Received
            | Self::Ready
            | Self::Go
            | Self::Running
            | Self::Complete => 0,
        }
    }
}

/// What the source says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    #[serde(flatten)]
    pub(super) preamble: Preamble,
    /// The machine's name.
    pub(super) name: String,
    /// Size of RAM in bytes.
    pub(super) mem: u64,
    /// RAM is in huge pages of the host's pool.
    pub(super) hugepages: bool,
    /// The source.
    pub(super) process: Process,
}

/// Everything of the machine but RAM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// The machine.
    pub(super) machine: SavedMachine,
    /// The guest waits for a resume, as it did at the source.
    pub(super) is_paused: bool,
    /// Offset and length of the parts of RAM that come later (post-copy); none if the memory is complete.
    pub(super) left: Vec<(u64, u64)>,
}

/// Both numbers of [`Kind::Zeroes`].
pub(super) fn zeroes(bytes: &[u8]) -> Option<(u64, u64)> {
    let (at, len) = bytes.split_at_checked(8)?;
    Some((u64::from_le_bytes(at.try_into().ok()?), u64::from_le_bytes(len.try_into().ok()?)))
}

/// The offset of [`Kind::Want`].
pub(super) fn want(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// The offset and the bytes of [`Kind::Pages`].
pub(super) fn pages(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (at, pages) = bytes.split_at_checked(8)?;
    Some((u64::from_le_bytes(at.try_into().ok()?), pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_number_of_its_own() {
        for (number, kind) in (0..).zip(Kind::ALL) {
            assert_eq!((kind.number(), Kind::of(u64::from(kind.number()))), (number, Some(kind)));
            assert!(kind.most() <= MOST_PAYLOAD);
        }
        assert_eq!(Kind::of(13), None);
        assert_eq!(Kind::of(1 << 32), None);
    }
}
