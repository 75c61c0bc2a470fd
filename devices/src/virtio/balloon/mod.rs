//! Memory balloon device (virtio 1.3, section 5.5): a guest that cooperates gives memory back to the host.
//!
//! * Inflated pages are released to the host at once ([`DmaMemory::release`]). After deflation they read as zero or as before, and
//!   the device does nothing for that: the host provides memory as it is touched. So a guest can use inflated pages all the same,
//!   and the limit of a machine's memory is its `--mem`.
//! * The target is `size=MIB` at first; a [`BalloonControl`] changes it while the guest runs.
//! * With `stats=SECONDS` the guest's memory statistics are logged (level `info`).
//! * With `reporting=on` the guest reports free pages without giving them up.
//!
//! Left out: free page hinting, which serves migration, and page poisoning. Queues are numbered without gaps, as in Linux and
//! the devices it supports: the reporting queue has the number 3 with statistics and 2 without, where the specification has 4.
//!
//! A pass handles `PAGES_PER_PASS` pages; a longer request is continued after the other devices of the I/O thread.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::{Chain, DeviceType, DmaMemory, VirtioDevice, VirtioError, Work};
use crate::catalog::{BuildError, Built, Device, Key, Model, Placement, Wiring};
use crate::config::{ModelConfig, Slot};
use crate::device::{Interest, Source};

mod control;
mod lifecycle;
mod pages;
mod reports;
mod settings;
mod stats;

pub use control::{BalloonControl, BalloonTooLarge};
use pages::{List, PAGE};
use reports::Reports;
use settings::f;
pub use settings::{BalloonConfig, BalloonSize, Interval};
use stats::{MAX_BYTES, numbers};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "balloon",
    summary: "virtio memory balloon: the guest gives memory back to the host",
    keys: &[
        Key { name: "size", value: "MIB", help: "initial target of the balloon (default: 0)" },
        Key {
            name: "stats",
            value: "SECONDS",
            help: "interval for logging the guest's memory statistics (default: never)",
        },
        Key {
            name: "reporting",
            value: "on|off",
            help: "take back pages that the guest reports as free (default: off)",
        },
        Key {
            name: "deflate_on_oom",
            value: "on|off",
            help: "the guest may deflate the balloon when it runs out of memory (default: on)",
        },
    ],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
};

/// Maximum length of one request in bytes: page numbers for a GiB.
const MAX_REQUEST: u32 = 1 << 20;

/// Maximum number of pages released in one pass, inflated or reported.
const PAGES_PER_PASS: u64 = 4096;

/// Page numbers that are read at once.
const CHUNK: usize = 1024;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// The first queue that depends on a feature.
const FIRST_OPTIONAL: u16 = 2;

const TOKEN_RESUME: u32 = 0;
const TOKEN_STATS: u32 = 1;
const TOKEN_TARGET: u32 = 2;

struct Balloon {
    features: u64,
    queue_sizes: Vec<u16>,
    memory: Arc<dyn DmaMemory>,
    stats_every: Option<Duration>,
    /// Readable when a pass has left requests unfinished.
    resume: EventFd,
    timer: TimerFd,
    /// Sets the target; without one the target is constant.
    control: Option<BalloonControl>,
    has_warned: bool,
    /// Number of page numbers that were not in RAM.
    ignored: u64,

    /// Negotiated features.
    active: u64,
    config: [u8; 8],
    /// A request with more pages than one pass handles, and its next offset.
    unfinished: Option<(Chain, u32)>,
    reports: Reports,
    /// The guest's statistics buffer; returning it requests new statistics.
    stats: Option<Chain>,
    is_asked: bool,
}

impl ModelConfig for BalloonConfig {
    fn slot(&self) -> Option<Slot> {
        self.slot
    }

    fn build(&self, wiring: Wiring) -> Built {
        let (pages, features, stats_every) = (self.pages(), self.features(), self.stats_every());
        let optional = [f::STATS_VQ, f::PAGE_REPORTING].iter().filter(|bit| features & **bit != 0);
        let failed = |what| move |source| BuildError::Host { model: MODEL.name, what, source };
        let target = wiring.balloon.as_ref().map_or(pages, |control| control.begin(pages));
        let mut balloon = Balloon {
            features,
            queue_sizes: vec![128; usize::from(FIRST_OPTIONAL) + optional.count()],
            memory: Arc::clone(&wiring.memory),
            stats_every,
            resume: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed("event descriptor"))?,
            timer: TimerFd::new().map_err(|error| failed("timer")(error.into()))?,
            has_warned: false,
            ignored: 0,
            active: 0,
            config: [0; 8],
            control: wiring.balloon.clone(),
            unfinished: None,
            reports: Reports::default(),
            stats: None,
            is_asked: false,
        };
        balloon.set_target(target);
        Ok(Device::Virtio(Box::new(balloon)))
    }
}

impl Balloon {
    /// Writes the target, in pages, to the configuration space. True if it has changed.
    fn set_target(&mut self, pages: u32) -> bool {
        let field = self.config.first_chunk_mut::<4>();
        field.is_some_and(|field| {
            std::mem::replace(field, pages.to_le_bytes()) != pages.to_le_bytes()
        })
    }

    fn stats_queue(&self) -> Option<u16> {
        (self.active & f::STATS_VQ != 0).then_some(FIRST_OPTIONAL)
    }

    fn reporting_queue(&self) -> Option<u16> {
        let before = u16::from(self.stats_queue().is_some());
        (self.active & f::PAGE_REPORTING != 0).then_some(FIRST_OPTIONAL + before)
    }

    fn serve(&mut self, work: &mut Work<'_>) -> Result<(), VirtioError> {
        let mut left = PAGES_PER_PASS;
        self.inflate(work, &mut left)?;
        while let Some(chain) = work.pop(DEFLATE)? {
            // The host provides the pages as the guest touches them.
            answer(chain, work);
        }
        if let Some(queue) = self.stats_queue() {
            self.take_stats(queue, work)?;
        }
        if let Some(queue) = self.reporting_queue() {
            self.reports.take(queue, work, self.memory.as_ref(), &mut left)?;
        }
        if left == 0 {
            // An error means that it is readable already.
            let _ = self.resume.write(1);
        }
        Ok(())
    }

    fn inflate(&mut self, work: &mut Work<'_>, left: &mut u64) -> Result<(), VirtioError> {
        while *left > 0 {
            let (chain, mut offset) = match self.unfinished.take() {
                Some(unfinished) => unfinished,
                None => match work.pop(INFLATE)? {
                    Some(chain) if is_list(&chain) => (chain, 0),
                    Some(chain) => {
                        work.refuse(chain);
                        continue;
                    }
                    None => break,
                },
            };
            while *left > 0 && offset < chain.readable_bytes() {
                let pages = self.take_pages(&chain, offset, *left, work);
                *left = left.saturating_sub(pages.into());
                offset = offset.saturating_add(4 * pages);
            }
            if offset < chain.readable_bytes() {
                self.unfinished = Some((chain, offset));
            } else {
                work.complete(chain, 0);
            }
        }
        Ok(())
    }

    /// Releases at most `most` pages, whose numbers begin at `offset`, and returns the count of numbers: at least one.
    fn take_pages(&mut self, chain: &Chain, offset: u32, most: u64, work: &Work<'_>) -> u32 {
        let mut raw = [0; 4 * CHUNK];
        let most = usize::try_from(most).map_or(CHUNK, |most| most.min(CHUNK));
        let room = raw.get_mut(..4 * most).unwrap_or_default();
        let read = chain.read_at(work.memory(), offset, room);
        let is_ram = |page| work.memory().check_range(GuestAddress(page), 4096);
        let list = List::parse(room.get(..read).unwrap_or_default(), is_ram);
        self.ignore(list.ignored);
        list.runs().for_each(|(first, pages)| self.memory.release(first, PAGE * pages));
        u32::try_from(list.count.max(1)).unwrap_or(u32::MAX)
    }

    fn ignore(&mut self, count: usize) {
        if count > 0 && !std::mem::replace(&mut self.has_warned, true) {
            warn!("{}: the guest inflates pages outside its RAM: ignored", MODEL.name);
        }
        self.ignored = self.ignored.saturating_add(count as u64);
    }

    /// Keeps the guest's statistics buffer until the next request, and logs the statistics in it if they were requested.
    fn take_stats(&mut self, queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        while let Some(chain) = work.pop(queue)? {
            if std::mem::take(&mut self.is_asked) {
                let mut raw = [0; MAX_BYTES];
                let read = chain.read_at(work.memory(), 0, &mut raw);
                info!("{}: {}", MODEL.name, numbers(raw.get(..read).unwrap_or_default()));
            }
            if let Some(second) = self.stats.replace(chain) {
                work.refuse(second);
            }
        }
        Ok(())
    }

    fn ask_for_stats(&mut self, work: &mut Work<'_>) {
        if let Some(stats) = self.stats.take() {
            self.is_asked = true;
            work.complete(stats, 0);
        }
    }

    fn set_timer(&mut self) {
        let every = self.stats_every.filter(|_| self.stats_queue().is_some());
        // A valid timer and a valid time: the kernel has no reason to refuse.
        let _ = match every {
            Some(every) => self.timer.reset(every, None),
            None => self.timer.clear(),
        };
    }
}

/// Completes a request with nothing written, or refuses an empty one.
fn answer(chain: Chain, work: &mut Work<'_>) {
    if chain.readable_bytes() == 0 && chain.writable_bytes() == 0 {
        work.refuse(chain);
    } else {
        work.complete(chain, 0);
    }
}

/// True if a request is a list of page numbers of a valid length.
fn is_list(chain: &Chain) -> bool {
    let bytes = chain.readable_bytes();
    bytes > 0 && bytes.is_multiple_of(4) && bytes <= MAX_REQUEST
}

impl Drop for Balloon {
    fn drop(&mut self) {
        if self.ignored > 0 {
            info!("{}: {} inflated pages were outside the guest's RAM", MODEL.name, self.ignored);
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::new(MODEL.name, 5, &self.queue_sizes, self.features)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // Only `actual`, the second half, is writable.
        let bytes = self.config.iter_mut().enumerate().skip(offset).zip(data);
        bytes.filter(|((at, _), _)| *at >= 4).for_each(|((_, to), from)| *to = *from);
        if let (Some(control), Some(actual)) = (&self.control, self.config.last_chunk()) {
            control.set_actual(u32::from_le_bytes(*actual));
        }
    }

    fn activate(&mut self, features: u64) {
        self.active = features;
        self.set_timer();
    }

    fn kicked(&mut self, _queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.serve(work)
    }

    fn list_sources(&self, list: &mut Vec<Source>) {
        let read = |fd, token| Source { fd, token, interest: Interest::Read };
        list.extend([
            read(self.resume.as_raw_fd(), TOKEN_RESUME),
            read(self.timer.as_raw_fd(), TOKEN_STATS),
        ]);
        let control = self.control.as_ref();
        list.extend(control.map(|control| read(control.as_raw_fd(), TOKEN_TARGET)));
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match token {
            // Fails if the event was stale.
            TOKEN_RESUME => drop(self.resume.read()),
            TOKEN_STATS => {
                // Setting the timer clears its expiry, so it need not be read.
                self.set_timer();
                self.ask_for_stats(work);
            }
            TOKEN_TARGET => {
                let target = self.control.as_ref().and_then(|control| {
                    control.clear_event();
                    control.target_pages()
                });
                if target.is_some_and(|pages| self.set_target(pages)) {
                    work.config_changed();
                }
            }
            _ => {}
        }
        self.serve(work)
    }
}
