//! The statistics of a trace for a report, gathered in one pass and in bounded memory, whatever the trace has: 240 columns of time a hart,
//! 512 causes, histograms, and the ten slowest exits.

use std::collections::BTreeMap;

use super::read::{Event, Exit};
use crate::trace::record::ExitKind;

/// Columns of the time line. When the trace exceeds the last one, each two are merged.
pub(super) const COLUMNS: usize = 240;

/// The initial width of a column, in nanoseconds.
const FIRST_WIDTH: u64 = 1024;

/// Maximum number of separate causes; further ones are counted together.
const MAX_CAUSES: usize = 512;

/// Maximum length in characters of the names of causes and machines, and of values.
const MAX_NAME: usize = 64;

/// Number of slowest exits that are listed.
const SLOWEST: usize = 10;

/// Steps of a histogram in an octave.
const STEPS: u64 = 4;

/// Statistics of the durations of exits.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stat {
    pub(super) count: u64,
    pub(super) total_ns: u64,
    pub(super) max_ns: u64,
    /// By [`step`].
    steps: Box<[u64]>,
}

impl Default for Stat {
    fn default() -> Self {
        let steps = vec![0; usize::try_from(64 * STEPS).unwrap_or(0)].into();
        Self { count: 0, total_ns: 0, max_ns: 0, steps }
    }
}

/// The step of a histogram that `ns` falls into: a quarter of an octave.
fn step(ns: u64) -> usize {
    let octave = u64::from(63 - ns.max(1).leading_zeros());
    let rest = if octave < 2 { 0 } else { ns.max(1) >> (octave - 2) & (STEPS - 1) };
    usize::try_from(octave * STEPS + rest).unwrap_or(0)
}

/// The first nanosecond of a step.
pub(super) fn step_start(step: usize) -> u64 {
    let (octave, rest) = (step as u64 / STEPS, step as u64 % STEPS);
    let octave = u32::try_from(octave).unwrap_or(63).min(63);
    if octave < 2 { 1 << octave } else { (STEPS + rest) << (octave - 2) }
}

impl Stat {
    fn add(&mut self, ns: u64) {
        self.count = self.count.saturating_add(1);
        self.total_ns = self.total_ns.saturating_add(ns);
        self.max_ns = self.max_ns.max(ns);
        if let Some(count) = self.steps.get_mut(step(ns)) {
            *count = count.saturating_add(1);
        }
    }

    pub(super) fn mean_ns(&self) -> u64 {
        self.total_ns.checked_div(self.count).unwrap_or(0)
    }

    /// The duration below which this percentage of the exits is, rounded up by a fifth at most.
    pub(super) fn percentile_ns(&self, percent: u64) -> u64 {
        let wanted = (u128::from(self.count) * u128::from(percent)).div_ceil(100);
        let mut seen = 0_u128;
        for (index, count) in self.steps.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= wanted && seen > 0 {
                return step_start(index + 1).min(self.max_ns);
            }
        }
        self.max_ns
    }

    /// The steps from the first to the last that is not empty: their numbers and counts.
    pub(super) fn histogram(&self) -> Vec<(usize, u64)> {
        let all: Vec<_> = self.steps.iter().copied().enumerate().collect();
        let first = all.iter().position(|(_, count)| *count > 0).unwrap_or(0);
        let last = all.iter().rposition(|(_, count)| *count > 0).map_or(0, |last| last + 1);
        all.get(first..last).unwrap_or_default().to_vec()
    }
}

/// Statistics of a hart.
#[derive(Debug, Clone, Default)]
pub(super) struct HartTally {
    pub(super) stat: Stat,
    pub(super) lost: u64,
    /// Number of exits by column and kind.
    pub(super) columns: Vec<[u32; ExitKind::ALL.len()]>,
}

/// One of the slowest exits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slow {
    pub(super) cost_ns: u64,
    pub(super) left_ns: u64,
    pub(super) hart: u32,
    pub(super) kind: ExitKind,
    pub(super) what: String,
    pub(super) value: String,
    pub(super) pc: String,
}

/// All statistics.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) machine: String,
    pub(super) start_ns: u64,
    pub(super) last_ns: u64,
    pub(super) all: Stat,
    pub(super) lost: u64,
    pub(super) is_complete: bool,
    /// Nanoseconds of a column.
    pub(super) width_ns: u64,
    pub(super) harts: BTreeMap<u32, HartTally>,
    pub(super) kinds: BTreeMap<ExitKind, Stat>,
    pub(super) causes: BTreeMap<(ExitKind, String), Stat>,
    /// The slowest first.
    pub(super) slowest: Vec<Slow>,
}

impl Tally {
    /// An empty tally, with columns of the initial width.
    pub(super) fn new() -> Self {
        Self { width_ns: FIRST_WIDTH, ..Self::default() }
    }

    pub(super) fn take(&mut self, event: Event<'_>) {
        match event {
            Event::TraceHeader { machine, harts, start_ns } => {
                self.machine = short(&machine);
                self.start_ns = start_ns;
                let most = harts.min(crate::config::MAX_CPUS);
                self.harts = (0..most).map(|hart| (hart, HartTally::default())).collect();
            }
            Event::Exit(exit) => self.exit(&exit),
            Event::Lost { hart, count } => {
                self.lost = self.lost.saturating_add(count);
                let tally = self.harts.entry(hart).or_default();
                tally.lost = tally.lost.saturating_add(count);
            }
            Event::End => self.is_complete = true,
            Event::Other => {}
        }
    }

    /// The duration of the trace, in nanoseconds.
    pub(super) fn span_ns(&self) -> u64 {
        self.last_ns.saturating_sub(self.start_ns)
    }

    fn exit(&mut self, exit: &Exit<'_>) {
        let cost = exit.cost_ns;
        self.all.add(cost);
        self.last_ns = self.last_ns.max(exit.left_ns.saturating_add(cost));
        self.kinds.entry(exit.kind).or_default().add(cost);
        self.cause(exit).add(cost);
        self.column(exit);
        if self.slowest.len() < SLOWEST || self.slowest.last().is_some_and(|s| s.cost_ns < cost) {
            let text = |text: &Option<_>| text.as_deref().map(short).unwrap_or_default();
            let slow = Slow {
                cost_ns: cost,
                left_ns: exit.left_ns,
                hart: exit.hart,
                kind: exit.kind,
                what: short(&exit.what),
                value: text(&exit.value),
                pc: text(&exit.pc),
            };
            let place = self.slowest.partition_point(|other| other.cost_ns >= cost);
            self.slowest.insert(place, slow);
            self.slowest.truncate(SLOWEST);
        }
    }

    fn cause(&mut self, exit: &Exit<'_>) -> &mut Stat {
        let key = (exit.kind, short(&exit.what));
        let is_known = self.causes.len() < MAX_CAUSES || self.causes.contains_key(&key);
        // These are outside of the limit: one per kind.
        let key = if is_known { key } else { (exit.kind, "others".into()) };
        self.causes.entry(key).or_default()
    }

    fn column(&mut self, exit: &Exit<'_>) {
        let since = exit.left_ns.saturating_sub(self.start_ns);
        while since / self.width_ns >= COLUMNS as u64 {
            self.harts.values_mut().for_each(HartTally::fold);
            self.width_ns = self.width_ns.saturating_mul(2);
        }
        let hart = self.harts.entry(exit.hart).or_default();
        hart.stat.add(exit.cost_ns);
        hart.columns.resize(COLUMNS, [0; ExitKind::ALL.len()]);
        let column = usize::try_from(since / self.width_ns).ok();
        let column = column.and_then(|column| hart.columns.get_mut(column));
        if let Some(count) = column.and_then(|column| column.get_mut(exit.kind as usize)) {
            *count = count.saturating_add(1);
        }
    }
}

impl HartTally {
    /// Merges each two columns.
    fn fold(&mut self) {
        let sum = |pair: &[[u32; ExitKind::ALL.len()]]| {
            let mut sum = [0_u32; ExitKind::ALL.len()];
            for column in pair {
                sum.iter_mut()
                    .zip(column)
                    .for_each(|(sum, count)| *sum = sum.saturating_add(*count));
            }
            sum
        };
        self.columns = self.columns.chunks(2).map(sum).collect();
        if !self.columns.is_empty() {
            self.columns.resize(COLUMNS, [0; ExitKind::ALL.len()]);
        }
    }
}

fn short(text: &str) -> String {
    text.chars().take(MAX_NAME).collect()
}
