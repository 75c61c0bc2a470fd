//! Free page reporting (virtio 1.3, section 5.5.6.5): free pages that the guest does not give up are released to the host, a bounded
//! number in a pass. One buffer may be as large as RAM.

use super::{PAGE, answer};
use crate::virtio::{Chain, DmaMemory, Segment, VirtioError, Work, pieces};

/// The reports of a guest.
#[derive(Debug, Default)]
pub(super) struct Reports {
    /// A report with more pages than one pass handles, and its next offset.
    pub(super) unfinished: Option<(Chain, u32)>,
}

impl Reports {
    /// Drops an unfinished report.
    pub(super) fn reset(&mut self) {
        self.unfinished = None;
    }

    /// Releases the pages reported in `queue` to the host, at most `left`, which decreases.
    pub(super) fn take(
        &mut self,
        queue: u16,
        work: &mut Work<'_>,
        memory: &dyn DmaMemory,
        left: &mut u64,
    ) -> Result<(), VirtioError> {
        while *left > 0 {
            let (chain, mut offset) = match self.unfinished.take() {
                Some(unfinished) => unfinished,
                None => match work.pop(queue)? {
                    Some(chain) => (chain, 0),
                    None => break,
                },
            };
            while let Some(piece) = next_piece(&chain, offset, *left) {
                memory.release(piece.addr.0, piece.len.into());
                *left = left.saturating_sub(u64::from(piece.len).div_ceil(PAGE));
                offset = offset.saturating_add(piece.len);
            }
            if offset < chain.writable_bytes() {
                self.unfinished = Some((chain, offset));
            } else {
                answer(chain, work);
            }
        }
        Ok(())
    }
}

/// The piece at `offset` of a report: at most `most` pages, and whole ones if the report continues behind it; `None` if `most` is
/// 0 or the report is at its end.
fn next_piece(chain: &Chain, offset: u32, most: u64) -> Option<Segment> {
    let rest = usize::try_from(chain.writable_bytes()).unwrap_or(usize::MAX);
    let Segment { addr, len } = pieces(chain.writable(), offset, rest).next()?;
    let most = most.checked_mul(PAGE)?.saturating_sub(addr.0 % PAGE);
    let len = len.min(u32::try_from(most).unwrap_or(u32::MAX));
    (len > 0).then_some(Segment { addr, len })
}
