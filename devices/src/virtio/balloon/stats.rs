//! The guest's memory statistics (virtio 1.3, section 5.5.6.3), as a text.

/// Statistics that are logged: tag and name (section 5.5.6.3).
const TAGS: [(u16, &str); 7] = [
    (4, "free"),
    (5, "total"),
    (6, "available"),
    (7, "caches"),
    (0, "swapped in"),
    (1, "swapped out"),
    (2, "major faults"),
];

/// Bytes of one statistic.
const STAT: usize = 10;

/// Maximum length of statistics read, in bytes.
pub(super) const MAX_BYTES: usize = 32 * STAT;

/// Formats the guest's statistics: the known ones, once each.
pub(super) fn numbers(raw: &[u8]) -> String {
    let stat = |raw: &[u8]| {
        let (tag, value) = raw.split_at_checked(2)?;
        let tag = tag.try_into().map(u16::from_le_bytes).ok()?;
        Some((tag, value.try_into().map(u64::from_le_bytes).ok()?))
    };
    let stats: Vec<(u16, u64)> = raw.chunks_exact(STAT).filter_map(stat).collect();
    let words = TAGS.iter().filter_map(|(tag, word)| {
        let (_, value) = stats.iter().find(|(known, _)| known == tag)?;
        Some(format!("{word} {value}"))
    });
    let words: Vec<String> = words.collect();
    if words.is_empty() { "the guest reports no statistics".into() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(tag: u16, value: u64) -> Vec<u8> {
        tag.to_le_bytes().into_iter().chain(value.to_le_bytes()).collect()
    }

    #[test]
    fn known_statistics_are_shown_and_unknown_and_truncated_ones_are_not() {
        let raw = [stat(4, 1000), stat(77, 5), stat(6, 2000), stat(4, 9), vec![5, 0, 1]].concat();
        assert_eq!(numbers(&raw), "free 1000, available 2000");
        assert_eq!(numbers(&raw[..9]), "the guest reports no statistics");
        assert_eq!(numbers(&stat(u16::MAX, 1)), "the guest reports no statistics");
    }
}
