//! A set of interrupt sources, as a bitmap of 32-bit words as in the PLIC's registers.

use crate::lifecycle::RestoreError;

/// The highest source number in the register map.
pub(super) const SOURCES_MAX: u32 = 1023;

/// A set of sources 1 to `last`; bits of other numbers stay clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sources {
    last: u32,
    words: Box<[u32]>,
}

impl Sources {
    /// The empty set of a PLIC with this many sources.
    pub(super) fn none(last: u32) -> Self {
        Self { last, words: (0..Self::word_count(last)).map(|_| 0).collect() }
    }

    /// Number of words in the set.
    pub(super) fn word_count(last: u32) -> usize {
        place(last).0 + 1
    }

    /// All words.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    /// Replaces all words, except for the bits without a source.
    pub(super) fn restore(&mut self, words: &[u32]) -> Result<(), RestoreError> {
        if words.len() != self.words.len() {
            return Err(RestoreError::invalid("the number of interrupt sources"));
        }
        (0..).zip(words).for_each(|(index, word)| self.set_word(index, *word));
        Ok(())
    }

    pub(super) fn contains(&self, source: u32) -> bool {
        let (index, bit) = place(source);
        self.word(index) & bit != 0
    }

    pub(super) fn set(&mut self, source: u32, member: bool) {
        let (index, bit) = place(source);
        let word = self.word(index);
        self.set_word(index, if member { word | bit } else { word & !bit });
    }

    /// The sources `32 * index` to `32 * index + 31`, as bits from the lowest on.
    pub(super) fn word(&self, index: usize) -> u32 {
        self.words.get(index).copied().unwrap_or(0)
    }

    /// Replaces a word, except for the bits without a source.
    pub(super) fn set_word(&mut self, index: usize, value: u32) {
        let last = place(self.last);
        let Some(word) = self.words.get_mut(index) else { return };
        // Up to and including the last source; number 0 is not a source.
        let below = if index == last.0 { last.1 | (last.1 - 1) } else { u32::MAX };
        let above = if index == 0 { !1 } else { u32::MAX };
        *word = value & below & above;
    }

    /// Adds every source of the other set.
    pub(super) fn add_all(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, more)| *word |= more);
    }

    /// Iterates over the sources in both sets, in order.
    pub(super) fn both<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = u32> + 'a {
        let words = self.words.iter().zip(&other.words).map(|(a, b)| a & b);
        words.zip((0..).step_by(32)).flat_map(|(mut word, first)| {
            std::iter::from_fn(move || {
                let bit = (word != 0).then(|| word.trailing_zeros())?;
                word &= word - 1;
                Some(first + bit)
            })
        })
    }
}

/// The index of a source's word, and its bit in that word.
fn place(source: u32) -> (usize, u32) {
    ((source / 32) as usize, 1 << (source % 32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_keeps_no_bit_without_a_source() {
        for last in [1, 30, 31, 32, 33, 63, 64, 95, 96, 1023] {
            let mut sources = Sources::none(last);
            (0..40).for_each(|index| sources.set_word(index, u32::MAX));
            let all: Vec<u32> = sources.both(&sources).collect();
            assert_eq!(all, (1..=last).collect::<Vec<_>>(), "{last} sources");
        }
    }

    #[test]
    fn a_number_outside_the_set_is_never_a_member() {
        let mut sources = Sources::none(40);
        for source in [0, 41, 63, 64, 1024, u32::MAX] {
            sources.set(source, true);
            assert!(!sources.contains(source), "source {source}");
        }
        sources.set(40, true);
        assert!(sources.contains(40));
    }
}
