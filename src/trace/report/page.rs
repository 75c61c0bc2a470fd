//! The report as one page: no script, nothing from anywhere else, light or dark as the reader has it.

use std::fmt::Write;

use super::chart::{self, MOST_LANES};
use super::explain;
use super::tally::{Stat, Tally};
use super::text::{count, escaped, part_of, percent, time};
use crate::trace::record::Kind;

const STYLE: &str = include_str!("page.css");

/// Rows of the table of causes.
const MOST_ROWS: usize = 40;

/// Causes of a kind that are explained, besides the kind itself.
const MOST_EXPLAINED: usize = 24;

/// The whole page.
pub(super) fn page(tally: &Tally) -> String {
    let mut out = String::new();
    let name = escaped(&tally.machine);
    // Writing into a String cannot fail: results are dropped, here and below.
    let _ = write!(
        out,
        r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Exits of {name}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>Exits of <em>{name}</em></h1><p>What made its harts leave the guest, and how long each time rvmm took until they went back.</p></header>
"#
    );
    cards(&mut out, tally);
    if tally.all.count == 0 {
        out.push_str("<section><h2>No exits</h2><p>The trace holds none.</p></section>");
    } else {
        section(&mut out, "Time line", |out| {
            legend(out, tally);
            chart::lanes(out, tally);
            if tally.harts.len() > MOST_LANES {
                let _ = write!(
                    out,
                    "<p class=\"note\">The {MOST_LANES} busiest of {} harts.</p>",
                    tally.harts.len()
                );
            }
        });
        section(&mut out, "By kind", |out| kinds(out, tally));
        section(&mut out, "How long they took", |out| {
            out.push_str(r#"<p class="note">From the end of KVM_RUN to the next, on a scale of octaves.</p><div class="figures">"#);
            for (kind, stat) in &tally.kinds {
                chart::histogram(out, *kind, stat);
            }
            out.push_str("</div>");
        });
        section(&mut out, "By device register and call", |out| causes(out, tally));
        section(&mut out, "The ten slowest", |out| slowest(out, tally));
        section(&mut out, "What they are", |out| explanations(out, tally));
    }
    out.push_str("<footer>Made by rvmm trace report. Times are CLOCK_MONOTONIC's, no finer than the counter that the harts read.</footer>\n</main>\n</body>\n</html>\n");
    out
}

fn section(out: &mut String, title: &str, body: impl FnOnce(&mut String)) {
    let _ = write!(out, "<section><h2>{title}</h2>");
    body(out);
    out.push_str("</section>\n");
}

fn cards(out: &mut String, tally: &Tally) {
    let span = tally.span_ns();
    let rate = part_of(1_000_000_000, tally.all.count, span);
    let harts = (tally.harts.len() as u64).max(1);
    let busy = percent(tally.all.total_ns, span.saturating_mul(harts));
    let missing = match (tally.lost, tally.is_complete) {
        (0, true) => "none".into(),
        (0, false) => "the end".into(),
        (lost, _) => count(lost),
    };
    out.push_str("<dl class=\"cards\">");
    for (term, value) in [
        ("exits", count(tally.all.count)),
        ("harts", count(harts)),
        ("time", time(span)),
        ("exits a second", count(rate)),
        ("outside of the guest", busy),
        ("half of them below", time(tally.all.percentile_ns(50))),
        ("missing", missing),
    ] {
        let _ = write!(out, "<div><dt>{term}</dt><dd>{value}</dd></div>");
    }
    out.push_str("</dl>\n");
    if tally.lost > 0 {
        out.push_str("<p class=\"warn\">Harts were faster than the writer of the trace: what is missing was counted, and everything below is of what is there. A larger ring (--trace FILE,ring=N) or a CPU for the writer helps.</p>");
    }
    if !tally.is_complete {
        out.push_str(
            "<p class=\"warn\">The trace has no end: rvmm was killed, or its disk was full.</p>",
        );
    }
}

fn legend(out: &mut String, tally: &Tally) {
    out.push_str("<p class=\"legend\">");
    for kind in tally.kinds.keys() {
        let _ = write!(out, r#"<span><i class="{0}"></i>{0}</span>"#, kind.name());
    }
    out.push_str("</p>");
}

const HEAD: &str = r#"<th class="n">exits</th><th class="wide">of all</th><th class="n">time</th><th class="n">mean</th><th class="n">half below</th><th class="n">99 % below</th><th class="n">longest</th></tr></thead><tbody>"#;

fn kinds(out: &mut String, tally: &Tally) {
    let _ = write!(out, "<div class=\"scroll\"><table><thead><tr><th>kind</th>{HEAD}");
    let mut all: Vec<_> = tally.kinds.iter().collect();
    all.sort_by_key(|(_, stat)| std::cmp::Reverse(stat.count));
    for (kind, stat) in all {
        let _ = write!(out, r#"<tr><td><i class="{0}"></i>{0}</td>"#, kind.name());
        numbers(out, *kind, stat, tally);
    }
    out.push_str("</tbody></table></div>");
}

fn causes(out: &mut String, tally: &Tally) {
    let mut all: Vec<_> = tally.causes.iter().collect();
    all.sort_by_key(|(_, stat)| std::cmp::Reverse(stat.count));
    let _ =
        write!(out, "<div class=\"scroll\"><table><thead><tr><th>cause</th><th>kind</th>{HEAD}");
    for ((kind, what), stat) in all.iter().take(MOST_ROWS) {
        let _ = write!(
            out,
            r#"<tr><td class="what">{}</td><td><i class="{1}"></i>{1}</td>"#,
            escaped(what),
            kind.name()
        );
        numbers(out, *kind, stat, tally);
    }
    out.push_str("</tbody></table></div>");
    if all.len() > MOST_ROWS {
        let _ = write!(out, "<p class=\"note\">And {} more.</p>", all.len() - MOST_ROWS);
    }
}

fn numbers(out: &mut String, kind: Kind, stat: &Stat, tally: &Tally) {
    let width = part_of(100, stat.count, tally.all.count).max(1);
    let _ = write!(
        out,
        r#"<td class="n">{}</td><td class="wide"><svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"><rect class="{}" width="{width}" height="8" rx="1"/></svg><small>{}</small></td><td class="n">{}</td><td class="n">{}</td><td class="n">{}</td><td class="n">{}</td><td class="n">{}</td></tr>"#,
        count(stat.count),
        kind.name(),
        percent(stat.count, tally.all.count),
        time(stat.total_ns),
        time(stat.mean_ns()),
        time(stat.percentile_ns(50)),
        time(stat.percentile_ns(99)),
        time(stat.max_ns),
    );
}

fn slowest(out: &mut String, tally: &Tally) {
    out.push_str("<div class=\"scroll\"><table><thead><tr><th class=\"n\">took</th><th class=\"n\">at</th><th class=\"n\">hart</th><th>cause</th><th>kind</th><th>value</th><th>pc</th></tr></thead><tbody>");
    for slow in &tally.slowest {
        let _ = write!(
            out,
            r#"<tr><td class="n">{}</td><td class="n">{}</td><td class="n">{}</td><td class="what">{}</td><td><i class="{5}"></i>{5}</td><td><code>{4}</code></td><td><code>{6}</code></td></tr>"#,
            time(slow.cost_ns),
            time(slow.left_ns.saturating_sub(tally.start_ns)),
            slow.hart,
            escaped(&slow.what),
            escaped(&slow.value),
            slow.kind.name(),
            escaped(&slow.pc),
        );
    }
    out.push_str("</tbody></table></div>");
}

fn explanations(out: &mut String, tally: &Tally) {
    for (kind, stat) in &tally.kinds {
        let text = explain::of(*kind);
        let _ = write!(
            out,
            r#"<article><h3><i class="{0}"></i>{1} <span>{0}, {2}</span></h3><dl><dt>hardware</dt><dd>{3}</dd><dt>KVM</dt><dd>{4}</dd><dt>rvmm</dt><dd>{5}</dd><dt>read on</dt><dd>{6}</dd></dl>"#,
            kind.name(),
            text.title,
            count(stat.count),
            text.hardware,
            text.kvm,
            text.rvmm,
            text.read
        );
        let told = told(tally, *kind);
        if !told.is_empty() {
            out.push_str("<ul>");
            for (names, about) in told {
                let _ = write!(out, "<li><b>{}</b> {about}</li>", escaped(&names));
            }
            out.push_str("</ul>");
        }
        out.push_str("</article>");
    }
}

/// The causes of a kind of which there is something to say, the most frequent first; those that share a sentence together.
fn told(tally: &Tally, kind: Kind) -> Vec<(String, &'static str)> {
    let mut own: Vec<_> = tally.causes.iter().filter(|((of, _), _)| *of == kind).collect();
    own.sort_by_key(|(_, stat)| std::cmp::Reverse(stat.count));
    let told = own.iter().filter_map(|((_, what), _)| Some((what, explain::about(kind, what)?)));
    let mut groups: Vec<(String, &'static str)> = Vec::new();
    for (what, about) in told.take(MOST_EXPLAINED) {
        match groups.iter_mut().find(|(_, same)| *same == about) {
            Some((names, _)) => {
                names.push_str(", ");
                names.push_str(what);
            }
            None => groups.push((what.clone(), about)),
        }
    }
    groups
}
