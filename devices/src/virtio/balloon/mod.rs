//! Memory balloon device (virtio 1.3, section 5.5): a guest that cooperates gives memory back to the host.
//!
//! * Pages that the guest puts into the balloon are given to the host at once ([`DmaMemory::release`]); they read as zero or as
//!   before when it takes them out again, and nothing has to be done for that: the host provides memory as it is touched.
//!   So a guest that goes on to use them gets them, and the limit of a machine's memory is its `--mem`.
//! * The target is `size=MIB` at first; a [`BalloonControl`] changes it while the guest runs.
//! * With `stats=SECONDS` the guest's own numbers are logged (level `info`).
//! * With `reporting=on` the guest tells of free pages without giving them up.
//!
//! Left out: free page hinting, which serves migration, and page poisoning. Queues are numbered without gaps, as Linux and
//! every device it knows do: the reporting queue has the number 3 with statistics and 2 without, where the specification has 4.
//!
//! A pass handles `PAGES_PER_PASS` pages; a request that has more is gone on with after everybody else had a turn.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::{Chain, DmaMemory, VirtioDevice, VirtioError, VirtioMmio, Work};
use crate::catalog::{BuildError, Built, Key, Model, Placement, Wiring};
use crate::device::{Interest, Source};
use crate::options::Options;

mod control;
mod pages;
mod reports;
mod settings;
mod stats;

pub use control::{BalloonControl, BalloonTooLarge};
use pages::{List, PAGE};
use reports::Reports;
use settings::{BalloonSettings, f};
use stats::{MAX_BYTES, numbers};

/// The catalog's entry.
pub(crate) const MODEL: Model = Model {
    name: "balloon",
    summary: "virtio memory balloon: the guest gives memory back to the host",
    keys: &[
        Key {
            name: "size",
            value: "MIB",
            help: "memory that the guest is to give at first (default: 0)",
        },
        Key {
            name: "stats",
            value: "SECONDS",
            help: "log the guest's numbers so often (default: never)",
        },
        Key {
            name: "reporting",
            value: "on|off",
            help: "take back what the guest reports as free (default: off)",
        },
        Key {
            name: "deflate_on_oom",
            value: "on|off",
            help: "the guest may take memory back when it runs out (default: on)",
        },
    ],
    placement: Placement::Slot,
    irqs: 1,
    shares_ram: false,
    build,
};

/// Bytes of page numbers in one request at most: a GiB of pages.
const MAX_REQUEST: u32 = 1 << 20;

/// Pages that one pass gives back at most, put into the balloon or reported.
const PAGES_PER_PASS: u64 = 4096;

/// Page numbers that are looked at together.
const CHUNK: usize = 1024;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// The first queue that is there only with a feature.
const FIRST_OPTIONAL: u16 = 2;

const TOKEN_AGAIN: u32 = 0;
const TOKEN_STATS: u32 = 1;
const TOKEN_TARGET: u32 = 2;

struct Balloon {
    features: u64,
    queue_sizes: Vec<u16>,
    memory: Arc<dyn DmaMemory>,
    stats_every: Option<Duration>,
    /// Readable when a pass has left something.
    again: EventFd,
    timer: TimerFd,
    /// Who sets the target; nobody does where there is none.
    control: Option<BalloonControl>,
    has_warned: bool,
    /// Page numbers that were no RAM.
    ignored: u64,

    /// What the driver has taken.
    active: u64,
    config: [u8; 8],
    /// A request that has more pages than a pass, and how far it is.
    unfinished: Option<(Chain, u32)>,
    reports: Reports,
    /// The buffer by which the guest is asked for its numbers.
    stats: Option<Chain>,
    is_asked: bool,
}

fn build(options: &Options, wiring: Wiring) -> Built {
    let settings = BalloonSettings::parse(options)
        .map_err(|source| BuildError::Option { model: MODEL.name, source })?;
    let BalloonSettings { pages, features, stats_every } = settings;
    let optional = [f::STATS_VQ, f::PAGE_REPORTING].iter().filter(|bit| features & **bit != 0);
    let failed = |what| move |source| BuildError::Host { model: MODEL.name, what, source };
    let target = wiring.balloon.as_ref().map_or(pages, |control| control.begin(pages));
    let mut balloon = Balloon {
        features,
        queue_sizes: vec![128; usize::from(FIRST_OPTIONAL) + optional.count()],
        memory: Arc::clone(&wiring.memory),
        stats_every,
        again: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed("event descriptor"))?,
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
    balloon.ask_for(target);
    VirtioMmio::create(Box::new(balloon), wiring)
}

impl Balloon {
    /// Writes the target, in pages, where the driver reads it. True where it was another.
    fn ask_for(&mut self, pages: u32) -> bool {
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
            // Refused means that it is readable already.
            let _ = self.again.write(1);
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

    /// Gives pages whose numbers begin at `offset` to the host, at most `most`, and says how many numbers that were: at
    /// least one.
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
            warn!("{}: the guest gives pages that it does not have: ignored", MODEL.name);
        }
        self.ignored = self.ignored.saturating_add(count as u64);
    }

    /// Keeps the guest's buffer until its numbers are wanted anew, and logs those in it if they were.
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

/// Gives back a request of which nothing is written, or refuses one that asks for nothing.
fn answer(chain: Chain, work: &mut Work<'_>) {
    if chain.readable_bytes() == 0 && chain.writable_bytes() == 0 {
        work.refuse(chain);
    } else {
        work.complete(chain, 0);
    }
}

/// Whether a request is a list of page numbers of a length that is served.
fn is_list(chain: &Chain) -> bool {
    let bytes = chain.readable_bytes();
    bytes > 0 && bytes.is_multiple_of(4) && bytes <= MAX_REQUEST
}

impl Drop for Balloon {
    fn drop(&mut self) {
        if self.ignored > 0 {
            info!("{}: {} pages were none of the guest's", MODEL.name, self.ignored);
        }
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &'static str {
        MODEL.name
    }

    fn id(&self) -> u32 {
        5
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // Only `actual`, the second half, is the driver's.
        let bytes = self.config.iter_mut().enumerate().skip(offset).zip(data);
        bytes.filter(|((at, _), _)| *at >= 4).for_each(|((_, to), from)| *to = *from);
        if let (Some(control), Some(actual)) = (&self.control, self.config.last_chunk()) {
            control.gave(u32::from_le_bytes(*actual));
        }
    }

    fn activate(&mut self, features: u64) {
        self.active = features;
        self.set_timer();
    }

    fn kicked(&mut self, _queue: u16, work: &mut Work<'_>) -> Result<(), VirtioError> {
        self.serve(work)
    }

    fn reset_queue(&mut self, queue: u16) {
        if queue == INFLATE {
            self.unfinished = None;
        }
        if Some(queue) == self.stats_queue() {
            self.stats = None;
        }
        if Some(queue) == self.reporting_queue() {
            self.reports.reset();
        }
    }

    fn reset(&mut self) {
        self.active = 0;
        self.unfinished = None;
        self.reports.reset();
        self.stats = None;
        self.is_asked = false;
        self.config.iter_mut().skip(4).for_each(|byte| *byte = 0);
        let _ = self.control.as_ref().map(|control| control.gave(0));
        self.set_timer();
    }

    fn sources(&self) -> Vec<Source> {
        let read = |fd, token| Source { fd, token, interest: Interest::Read };
        let mut sources = vec![
            read(self.again.as_raw_fd(), TOKEN_AGAIN),
            read(self.timer.as_raw_fd(), TOKEN_STATS),
        ];
        let control = self.control.as_ref();
        sources.extend(control.map(|control| read(control.as_raw_fd(), TOKEN_TARGET)));
        sources
    }

    fn ready(&mut self, token: u32, work: &mut Work<'_>) -> Result<(), VirtioError> {
        match token {
            // Drained; empty if the event was stale.
            TOKEN_AGAIN => drop(self.again.read()),
            TOKEN_STATS => {
                // Setting the timer takes back its expiry, so it need not be read.
                self.set_timer();
                self.ask_for_stats(work);
            }
            TOKEN_TARGET => {
                let asked = self.control.as_ref().and_then(|control| {
                    control.heard();
                    control.asked()
                });
                if asked.is_some_and(|pages| self.ask_for(pages)) {
                    work.config_changed();
                }
            }
            _ => {}
        }
        self.serve(work)
    }
}
