//! `rvmm lab NAME --picture`: the steps of a lab as a sequence diagram. Four vertical lines are the modes, arrows between them are
//! transitions, boxes on them are actions; time runs down.
//!
//! The result is SVG 1.1 with one style sheet, light or dark by the reader's setting. Coordinates are whole pixels. The width of
//! a text depends on the reader's fonts: the lines are short enough for the widest of the usual ones.

use std::fmt::Write as _;

use super::catalog::{Lab, Variant};
use super::steps::{Mode, Step, steps};

/// Pixels between two modes' lines, left of the first one, and of the picture's width.
const GAP: i32 = 226;
const FIRST: i32 = 118;
const WIDTH: i32 = FIRST * 2 + GAP * 3;
/// Top of the first step.
const TOP: i32 = 96;
/// Height of a line of text.
const LINE: i32 = 16;
/// Maximum characters of a line, so that it fits between two modes' lines beside the number.
const CHARS: usize = 25;
/// Half the width of a box.
const HALF: i32 = 100;
const RADIUS: i32 = 10;

const STYLE: &str = "\
text{font:12px Verdana,'DejaVu Sans',sans-serif;text-anchor:middle;fill:#1f2328}\
.b{font-weight:bold}.n{font-size:11px;font-weight:bold;fill:#fff}\
.page{fill:#fff}.guest{fill:#fff4e5}.host{fill:#e8f1fd}.box{fill:#fff;stroke:#8c959f}\
.life{stroke:#8c959f;stroke-dasharray:3 4}line{stroke-width:1.5}\
.out{stroke:#bc4c00;fill:#bc4c00}.in{stroke:#0969da;fill:#0969da}.by{stroke:#59636e;fill:#59636e}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.n{fill:#0d1117}\
.page{fill:#0d1117}.guest{fill:#2b1d0e}.host{fill:#0f2238}.box{fill:#161b22;stroke:#6e7681}.life{stroke:#6e7681}\
.out{stroke:#f0883e;fill:#f0883e}.in{stroke:#58a6ff;fill:#58a6ff}.by{stroke:#9198a1;fill:#9198a1}}";

/// The modes, and the software that runs in them.
const MODES: [(Mode, &str, &str); 4] = [
    (Mode::Vu, "VU mode", "a program in the guest"),
    (Mode::Vs, "VS mode", "the guest's kernel"),
    (Mode::Hs, "HS mode", "Linux with KVM"),
    (Mode::U, "U mode", "rvmm"),
];

/// Lines of text, one below the other.
#[derive(Debug)]
struct Label {
    /// The middle of each line, and the base line of the first one.
    x: i32,
    y: i32,
    lines: Vec<String>,
}

/// A step and its position.
#[derive(Debug)]
struct Placed {
    step: Step,
    /// The arrow's position, or the middle of the box.
    y: i32,
    label: Label,
}

fn x_of(mode: Mode) -> i32 {
    FIRST
        + GAP
            * match mode {
                Mode::Vu => 0,
                Mode::Vs => 1,
                Mode::Hs => 2,
                Mode::U => 3,
            }
}

fn is_guest(mode: Mode) -> bool {
    mode < Mode::Hs
}

fn height_of(lines: usize) -> i32 {
    LINE.saturating_mul(i32::try_from(lines).unwrap_or(i32::MAX))
}

/// Wraps a text into lines that fit, unless a single word is longer.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= CHARS => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.into()),
        }
    }
    lines
}

/// The positions of the steps, and the height of the picture.
fn placed(steps: &[Step]) -> (Vec<Placed>, i32) {
    let mut top = TOP;
    let place = |step: &Step| {
        let lines = wrapped(step.text);
        let tall = height_of(lines.len());
        let (from, to) = (x_of(step.from), x_of(step.to));
        let (x, y) = if from == to {
            (from, top + tall / 2 + 6)
        } else {
            // In the first gap that the arrow crosses, so that no mode's line crosses the text.
            (from + (to - from).signum() * GAP / 2, top + tall + 4)
        };
        let label = Label { x, y: top + 12 + if from == to { 6 } else { 0 }, lines };
        top += tall + if from == to { 24 } else { 26 };
        Placed { step: *step, y, label }
    };
    let all = steps.iter().map(place).collect();
    (all, top + 8)
}

/// The picture of a variant of a lab; `None` if its steps are not described.
#[must_use]
pub fn picture(lab: &Lab, variant: &Variant) -> Option<String> {
    let steps = steps(lab, variant);
    if steps.is_empty() {
        return None;
    }
    let (all, height) = placed(steps);
    let mut svg = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>{}</title>\n<style>{STYLE}</style>",
        escaped(&format!("{}: {}", file_stem(lab, variant), lab.question))
    );
    ground(&mut svg, height);
    for (number, placed) in (1..).zip(&all) {
        draw(&mut svg, number, placed);
    }
    svg.push_str("</svg>\n");
    Some(svg)
}

/// Name of the picture's file, without its extension.
#[must_use]
pub fn file_stem(lab: &Lab, variant: &Variant) -> String {
    match lab.variants.len() {
        1 => lab.name.into(),
        _ => format!("{}-{}", lab.name, variant.name),
    }
}

/// Draws the areas of guest and host, and the line of each mode.
fn ground(svg: &mut String, height: i32) {
    let _ = writeln!(svg, "<rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\"/>");
    let half = WIDTH / 2;
    for (class, left, title) in
        [("guest", 6, "The guest: V = 1"), ("host", half + 3, "The host: V = 0")]
    {
        let (width, tall, middle) = (half - 9, height - 12, left + (half - 9) / 2);
        let _ = writeln!(
            svg,
            "<rect class=\"{class}\" x=\"{left}\" y=\"6\" width=\"{width}\" height=\"{tall}\" rx=\"8\"/>\n\
             <text class=\"b\" x=\"{middle}\" y=\"24\">{title}</text>"
        );
    }
    for (mode, name, who) in MODES {
        let (x, foot) = (x_of(mode), height - 14);
        let _ = writeln!(
            svg,
            "<line class=\"life\" x1=\"{x}\" y1=\"74\" x2=\"{x}\" y2=\"{foot}\"/>\n\
             <rect class=\"box\" x=\"{}\" y=\"34\" width=\"{}\" height=\"40\" rx=\"6\"/>\n\
             <text class=\"b\" x=\"{x}\" y=\"51\">{name}</text>\n<text x=\"{x}\" y=\"67\">{}</text>",
            x - HALF,
            2 * HALF,
            escaped(who)
        );
    }
}

fn draw(svg: &mut String, number: usize, placed: &Placed) {
    let Placed { step, y, label } = placed;
    let (from, to) = (x_of(step.from), x_of(step.to));
    let class = match (is_guest(step.from), is_guest(step.to)) {
        (true, false) => "out",
        (false, true) => "in",
        _ => "by",
    };
    let badge = if from == to {
        let tall = height_of(label.lines.len()) + 12;
        let _ = writeln!(
            svg,
            "<rect class=\"box\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{tall}\" rx=\"6\"/>",
            from - HALF,
            y - tall / 2,
            2 * HALF
        );
        from - HALF
    } else {
        let (tip, wing) = (to - (to - from).signum(), to - (to - from).signum() * 9);
        let _ = writeln!(
            svg,
            "<line class=\"{class}\" x1=\"{from}\" y1=\"{y}\" x2=\"{wing}\" y2=\"{y}\"/>\n\
             <path class=\"{class}\" stroke=\"none\" d=\"M{tip} {y}L{wing} {}L{wing} {}Z\"/>",
            y - 5,
            y + 5
        );
        from
    };
    let _ = writeln!(
        svg,
        "<circle class=\"{class}\" cx=\"{badge}\" cy=\"{y}\" r=\"{RADIUS}\"/>\n\
         <text class=\"n\" x=\"{badge}\" y=\"{}\">{number}</text>",
        y + 4
    );
    for (index, line) in label.lines.iter().enumerate() {
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\">{}</text>",
            label.x,
            label.y + height_of(index),
            escaped(line)
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::labs::LABS;

    /// Pixels of a character, on average over a line, in the widest of the usual fonts.
    const CHAR: i32 = 7;

    /// Left, top, right, bottom.
    type Area = (i32, i32, i32, i32);

    fn area(label: &Label) -> Area {
        let longest = label.lines.iter().map(|line| line.chars().count()).max().unwrap();
        let half = CHAR * i32::try_from(longest).unwrap() / 2 + 1;
        let foot = label.y + height_of(label.lines.len() - 1) + 4;
        (label.x - half, label.y - 10, label.x + half, foot)
    }

    fn badge(placed: &Placed) -> Area {
        let shift = if placed.step.from == placed.step.to { HALF } else { 0 };
        let (x, y) = (x_of(placed.step.from) - shift, placed.y);
        (x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)
    }

    fn overlap(a: Area, b: Area) -> bool {
        a.0 < b.2 && b.0 < a.2 && a.1 < b.3 && b.1 < a.3
    }

    fn drawn() -> impl Iterator<Item = (&'static Lab, &'static Variant)> {
        let all = LABS.iter().flat_map(|lab| lab.variants.iter().map(move |one| (lab, one)));
        all.filter(|(lab, variant)| !steps(lab, variant).is_empty())
    }

    #[test]
    fn the_pictures_of_the_pages_are_those_that_rvmm_prints() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/labs/pictures");
        let mut names = BTreeSet::new();
        for (lab, variant) in drawn() {
            let name = format!("{}.svg", file_stem(lab, variant));
            let there = fs::read_to_string(folder.join(&name)).unwrap_or_default();
            assert!(
                there == picture(lab, variant).unwrap(),
                "docs/labs/pictures/{name} is not what `rvmm lab {} --variant {} --picture` prints",
                lab.name,
                variant.name
            );
            for page in [format!("{}.md", lab.name), format!("zh/{}.md", lab.name)] {
                let text = fs::read_to_string(folder.with_file_name(&page)).unwrap_or_default();
                assert!(text.contains(&format!("pictures/{name})")), "{page} shows no {name}");
            }
            names.insert(name);
        }
        let there = fs::read_dir(folder).unwrap();
        let there = there.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert_eq!(there.collect::<BTreeSet<_>>(), names);
    }

    #[test]
    fn no_text_covers_another_or_a_line_or_leaves_the_picture() {
        for (lab, variant) in drawn() {
            let (all, height) = placed(steps(lab, variant));
            let mut taken: Vec<Area> = all.iter().map(badge).collect();
            for one in &all {
                let mine = area(&one.label);
                assert!(mine.0 > 0 && mine.2 < WIDTH && mine.3 < height, "{one:?}");
                assert!(taken.iter().all(|other| !overlap(mine, *other)), "{one:?}");
                let is_box = one.step.from == one.step.to;
                let crosses = |x: i32| mine.0 < x && x < mine.2;
                let fits = if is_box {
                    mine.2 - mine.0 <= 2 * (HALF - RADIUS)
                } else {
                    !MODES.iter().any(|(mode, ..)| crosses(x_of(*mode))) && mine.3 < one.y
                };
                assert!(fits, "{one:?}");
                taken.push(mine);
            }
        }
    }

    #[test]
    fn every_element_is_closed_and_every_step_is_in_the_picture() {
        for (lab, variant) in drawn() {
            let svg = picture(lab, variant).unwrap();
            let mut open = Vec::new();
            for tag in svg.split('<').skip(1) {
                let (tag, text) = tag.split_once('>').unwrap();
                assert!(!text.contains('>') && tag.matches('"').count() % 2 == 0, "{tag}>{text}");
                let name = tag.split(' ').next().unwrap();
                match name.strip_prefix('/') {
                    Some(name) => assert_eq!(open.pop(), Some(name)),
                    None if !tag.ends_with('/') => open.push(name),
                    None => {}
                }
            }
            assert!(open.is_empty());
            assert_eq!(svg.matches("class=\"n\"").count(), steps(lab, variant).len());
        }
    }

    #[test]
    fn long_texts_are_wrapped_between_words() {
        let lines = wrapped("a step whose text is much longer than one line of the picture");
        assert_eq!(lines[0], "a step whose text is much");
        assert!(lines.iter().all(|line| line.len() <= CHARS));
        assert_eq!(escaped("a<b & c>"), "a&lt;b &amp; c&gt;");
    }
}
