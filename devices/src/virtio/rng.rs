//! Entropy device (virtio 1.3, section 5.4): random numbers from the host's kernel.
//!
//! A request gets at most [`MAX_BYTES`] whatever its size, as the specification allows: the driver sends another one.

use rustix::rand::{GetRandomFlags, getrandom};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bucket::{Limit, Limiter};
use super::{Chain, DeviceType, VirtioDevice, VirtioError, VirtioLifecycle, Work};
use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::{ByteRate, ModelConfig, Slot};
use crate::device::{Interest, Source};
use crate::lifecycle::{PauseError, RestoreError, SaveError, SavedState};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "rng",
    summary: "virtio entropy device: random numbers from the host",
    keys: &[Key {
        name: "bps",
        value: "BYTES",
        help: "bytes a second at most (default: no limit)",
    }],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
};

/// The configuration of an entropy device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RngConfig {
    /// Limit of bytes per second; `None` for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps: Option<ByteRate>,
    /// The slot on the board; `None` for the first free one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

/// Maximum number of bytes for one request.
const MAX_BYTES: usize = 64 << 10;

/// Number of bytes after which a pass ends: generating them keeps the I/O thread busy.
const PASS: usize = 256 << 10;

/// Bytes per system call.
const CHUNK: usize = 4096;

const QUEUE: u16 = 0;
const TOKEN_LIMIT: u32 = 0;

struct Rng {
    limiter: Limiter,
}

impl ModelConfig for RngConfig {
    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn build(&self, _wiring: Wiring) -> Built {
        let limit = self.bps.map(|bps| Limit::per_second(bps.get()));
        let limiter = Limiter::new(limit, None).map_err(|source| BuildError::Host {
            model: MODEL.name,
            what: "timer",
            source,
        })?;
        Ok(Device::Virtio(Box::new(Rng { limiter })))
    }
}

impl Rng {
    /// Processes requests until there are no more, the rate limit is reached, or the pass has reached its own limit.
    fn serve(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let mut drawn = 0;
        while !self.limiter.is_waiting() {
            if drawn >= PASS {
                work.end_pass(QUEUE);
                break;
            }
            let Some(chain) = work.pop(QUEUE)? else { break };
            let wanted = MAX_BYTES.min(chain.writable_bytes() as usize);
            if wanted == 0 {
                work.refuse(chain);
            } else if self.limiter.allows(wanted as u64) {
                let filled = fill(&chain, wanted, work);
                drawn += wanted;
                work.complete(chain, filled);
            } else {
                work.put_back(chain);
            }
        }
        Ok(())
    }
}

/// Fills the chain with up to `wanted` random bytes, and returns their number.
fn fill(chain: &Chain, wanted: usize, work: &Work<'_>) -> u32 {
    let mut chunk = [0; CHUNK];
    let mut filled = 0;
    while let Some(left) = wanted.checked_sub(filled as usize).filter(|left| *left > 0) {
        let part = chunk.get_mut(..left.min(CHUNK)).unwrap_or_default();
        // The kernel's generator is initialised long before guests run; a signal cannot interrupt so few bytes.
        let Ok(drawn) = getrandom(&mut *part, GetRandomFlags::empty()) else { break };
        let written = chain.write_at(work.memory(), filled, part.get(..drawn).unwrap_or_default());
        if written == 0 {
            break;
        }
        filled = filled.saturating_add(u32::try_from(written).unwrap_or(u32::MAX));
    }
    filled
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        // The data has the same format without it.
        DeviceType { version_1_is_optional: true, ..DeviceType::new(MODEL.name, 4, &[64], 0) }
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn kicked(&mut self, _queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.serve(work)
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        list.push(Source { fd: self.limiter.fd(), token: TOKEN_LIMIT, interest: Interest::Read });
    }

    fn ready(&mut self, _token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.limiter.expired();
        self.serve(work)
    }
}

impl VirtioLifecycle for Rng {
    fn pause(&mut self, _work: &mut Work<'_>) -> Result<(), PauseError> {
        Ok(())
    }

    fn resume(&mut self) {}

    fn reset(&mut self) {}

    fn reopen(&mut self) {}

    fn reset_queue(&mut self, _queue: u16) {}

    fn is_quiescent(&self) -> bool {
        true
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        let Self { limiter } = self;
        SavedState::of(&limiter.save())
    }

    fn restore(
        &mut self,
        state: SavedState,
        _features: Option<u64>,
        _work: &mut Work<'_>,
    ) -> Result<(), RestoreError> {
        self.limiter.restore(state.read()?)
    }
}
