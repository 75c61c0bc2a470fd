//! The pages of the labs: their fenced blocks, and the exercises with the commands that grade them.

/// The fenced blocks of a page, each with the number of its first line (from 0) and without the indent of its fence.
pub(crate) fn blocks(page: &str) -> Vec<(usize, String)> {
    let (mut blocks, mut open) = (Vec::new(), None);
    for (index, line) in page.lines().enumerate() {
        let text = line.trim_start();
        match (&mut open, text.starts_with("```")) {
            (None, true) => open = Some((index + 1, line.len() - text.len(), String::new())),
            (None, false) => {}
            (Some(_), true) => {
                blocks.extend(open.take().map(|(first, _, block)| (first, block)));
            }
            (Some((_, indent, block)), false) => {
                block.push_str(line.get(*indent..).unwrap_or(text));
                block.push('\n');
            }
        }
    }
    blocks
}

/// The exercises of a page, each with its number and the command that grades it: the blocks after the heading.
pub(crate) fn exercises(page: &str) -> Vec<(usize, String)> {
    let heading = page.lines().position(|line| matches!(line, "## Exercises" | "## 练习"));
    let Some(heading) = heading else { return Vec::new() };
    let commands = blocks(page).into_iter().filter(|(first, _)| *first > heading);
    (1..).zip(commands).map(|(number, (_, command))| (number, command)).collect()
}
