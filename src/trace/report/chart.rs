//! The charts of a report, as SVG: a time line for each hart, and a histogram for each kind of exit.

use std::fmt::Write;

use super::tally::{COLUMNS, HartTally, Stat, Tally, step_start};
use super::text::{count, part_of, percent, time};
use crate::trace::record::ExitKind;

/// Maximum number of time lines; a machine may have more harts than fit on a page.
pub(super) const MAX_LANES: usize = 32;

/// Number of time lines whose columns have tooltips with their numbers.
const TOOLTIP_LANES: usize = 8;

/// Width of the chart, and height of a time line.
const WIDTH: u64 = 960;
const LANE: u64 = 44;

/// Width and height of a histogram.
const SMALL_WIDTH: u64 = 300;
const SMALL_HEIGHT: u64 = 96;

/// Draws the time lines of the busiest harts, in order of their numbers, and the time axis below. All have the same scale.
pub(super) fn lanes(out: &mut String, tally: &Tally) {
    let mut harts: Vec<_> = tally.harts.iter().collect();
    harts.sort_by_key(|(_, hart)| std::cmp::Reverse(hart.stat.count));
    harts.truncate(MAX_LANES);
    harts.sort_by_key(|(number, _)| **number);
    let sums = harts.iter().flat_map(|(_, hart)| &hart.columns).map(sum);
    let highest = sums.max().unwrap_or(0).max(1);
    let used = (tally.span_ns() / tally.width_ns.max(1)).saturating_add(1).min(COLUMNS as u64);
    let _ = write!(
        out,
        r#"<p class="note">Exits in columns of {}; the highest column is {} exits.</p>"#,
        time(tally.width_ns),
        count(highest)
    );
    for (index, (number, hart)) in harts.iter().enumerate() {
        let busy = percent(hart.stat.total_ns, tally.span_ns());
        let lost =
            if hart.lost > 0 { format!(", {} missing", count(hart.lost)) } else { String::new() };
        let _ = write!(
            out,
            r#"<div class="lane"><p><b>hart {number}</b> <span>{} exits, {busy} of its time outside of the guest{lost}</span></p><svg viewBox="0 0 {WIDTH} {LANE}" preserveAspectRatio="none" role="img" aria-label="Exits of hart {number} over time"><rect class="ground" width="{WIDTH}" height="{LANE}"/>"#,
            count(hart.stat.count)
        );
        lane(out, hart, used, highest);
        if index < TOOLTIP_LANES {
            tooltips(out, hart, used, tally.width_ns);
        }
        out.push_str("</svg></div>");
    }
    axis(out, used.saturating_mul(tally.width_ns));
}

fn sum(column: &[u32; ExitKind::ALL.len()]) -> u64 {
    column.iter().map(|count| u64::from(*count)).sum()
}

/// Draws one path for each kind, each column a box stacked on those of the kinds before.
fn lane(out: &mut String, hart: &HartTally, used: u64, highest: u64) {
    let mut paths = vec![String::new(); ExitKind::ALL.len()];
    for (index, column) in (0..used).zip(&hart.columns) {
        let (x, next) = (part_of(WIDTH, index, used), part_of(WIDTH, index + 1, used));
        let width = next.saturating_sub(x).max(1);
        let mut below = 0_u64;
        for (path, exits) in paths.iter_mut().zip(column) {
            if *exits == 0 {
                continue;
            }
            let above = below.saturating_add(u64::from(*exits));
            let (low, high) = (part_of(LANE, below, highest), part_of(LANE, above, highest));
            // Even a single exit is visible.
            let height = high.saturating_sub(low).max(1);
            let y = LANE.saturating_sub(low).saturating_sub(height);
            let _ = write!(path, "M{x} {y}h{width}v{height}h-{width}z");
            below = above;
        }
    }
    for (kind, path) in ExitKind::ALL.iter().zip(&paths).filter(|(_, path)| !path.is_empty()) {
        let _ = write!(out, r#"<path class="{}" d="{path}"/>"#, kind.name());
    }
}

/// Adds tooltips with the numbers of each column.
fn tooltips(out: &mut String, hart: &HartTally, used: u64, width_ns: u64) {
    for (index, column) in (0..used).zip(&hart.columns).filter(|(_, column)| sum(column) > 0) {
        let (x, next) = (part_of(WIDTH, index, used), part_of(WIDTH, index + 1, used));
        let _ = write!(
            out,
            r#"<rect class="told" x="{x}" width="{}" height="{LANE}"><title>at {}:"#,
            next.saturating_sub(x).max(1),
            time(index.saturating_mul(width_ns))
        );
        for (kind, exits) in ExitKind::ALL.iter().zip(column).filter(|(_, exits)| **exits > 0) {
            let _ = write!(out, " {} {},", count((*exits).into()), kind.name());
        }
        out.pop();
        out.push_str("</title></rect>");
    }
}

fn axis(out: &mut String, span_ns: u64) {
    out.push_str(r#"<div class="axis">"#);
    for quarter in 0..=4 {
        let _ = write!(out, "<span>{}</span>", time(part_of(span_ns, quarter, 4)));
    }
    out.push_str("</div>");
}

/// Draws the durations of a kind of exit: a bar for each quarter of an octave.
pub(super) fn histogram(out: &mut String, kind: ExitKind, stat: &Stat) {
    let steps = stat.histogram();
    let highest = steps.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let bars = (steps.len() as u64).max(1);
    let (first, last) = (steps.first().map_or(0, |s| s.0), steps.last().map_or(0, |s| s.0));
    let _ = write!(
        out,
        r#"<figure><figcaption><i class="{0}"></i>{0} <span>{1}</span></figcaption><svg viewBox="0 0 {SMALL_WIDTH} {SMALL_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="Durations of exits of the kind {0}"><rect class="ground" width="{SMALL_WIDTH}" height="{SMALL_HEIGHT}"/>"#,
        kind.name(),
        count(stat.count)
    );
    for (index, (step, exits)) in (0..bars).zip(&steps).filter(|(_, (_, exits))| *exits > 0) {
        let x = part_of(SMALL_WIDTH, index, bars);
        let width =
            part_of(SMALL_WIDTH, index + 1, bars).saturating_sub(x).saturating_sub(1).max(1);
        let height = part_of(SMALL_HEIGHT - 4, *exits, highest).max(1);
        let _ = write!(
            out,
            r#"<rect class="{}" x="{x}" y="{}" width="{width}" height="{height}"><title>{} to {}: {} exits</title></rect>"#,
            kind.name(),
            SMALL_HEIGHT - height,
            time(step_start(*step)),
            time(step_start(step + 1)),
            count(*exits)
        );
    }
    let _ = write!(
        out,
        r#"</svg><div class="axis"><span>{}</span><span>{}</span></div><p class="note">50 % below {}, 99 % below {}, all below {}</p></figure>"#,
        time(step_start(first)),
        time(step_start(last + 1)),
        time(stat.percentile_ns(50)),
        time(stat.percentile_ns(99)),
        time(stat.max_ns.saturating_add(1))
    );
}
