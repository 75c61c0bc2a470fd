//! The checksum of a snapshot's files. It detects what happens to files by accident: lost, torn, swapped and changed blocks. It does not
//! protect against somebody who changes a snapshot on purpose, who can write a new checksum.
//!
//! Guest RAM is summed by pages of 4096 bytes, in any order, zero pages left out: so the sum does not depend on whether they are holes in
//! the file, and a page that is saved again replaces its share. The function is that of wyhash: two words at a time are multiplied to 128
//! bits, whose halves are joined. It takes less than an instruction a byte where that costs most, on processors without vector instructions.

use crate::memory::PAGE;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Words of a page.
pub(crate) const PAGE_WORDS: usize = PAGE_BYTES / 8;

const _: () = assert!(PAGE_BYTES as u64 == PAGE);

/// Constants without a pattern, all different: the fractional parts of the square roots of the first eight primes.
const SALTS: [u64; 4] =
    [0x6a09_e667_f3bc_c909, 0xbb67_ae85_84ca_a73b, 0x3c6e_f372_fe94_f82b, 0xa54f_f53a_5f1d_36f1];
const LANES: [u64; 4] =
    [0x510e_527f_ade6_82d1, 0x9b05_688c_2b3e_6c1f, 0x1f83_d9ab_fb41_bd6b, 0x5be0_cd19_137e_2179];

/// The sum of the pages of guest RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PageSum(u64);

impl PageSum {
    /// Adds the page with this number, whose own checksum is `page`.
    pub(crate) fn add(&mut self, number: u64, page: u64) {
        self.0 = self.0.wrapping_add(share(number, page));
    }

    /// The whole sum.
    pub(crate) fn total(self) -> u64 {
        self.0
    }
}

/// The share of a page in the sum of all.
fn share(number: u64, page: u64) -> u64 {
    folded(page ^ SALTS[1], number ^ SALTS[2])
}

/// The checksum of a page; `None` if it is all zeroes.
pub(crate) fn of_page(words: &[u64]) -> Option<u64> {
    (!is_zero(words)).then(|| of_words(words))
}

/// True if all words are zero. Eight at a time: a third of the instructions.
pub(crate) fn is_zero(words: &[u64]) -> bool {
    let (blocks, rest) = words.as_chunks::<8>();
    let joined = |block: &[u64]| block.iter().fold(0, |all, word| all | word);
    blocks.iter().all(|block| joined(block) == 0) && joined(rest) == 0
}

/// The checksum of bytes, their number included.
pub(crate) fn of_bytes(bytes: &[u8]) -> u64 {
    let (chunks, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    let words = chunks.iter().copied().chain([last, (bytes.len() as u64).to_le_bytes()]);
    of_words(&words.map(u64::from_le_bytes).collect::<Vec<_>>())
}

/// The checksum of a message that consists of a number and words, which have the same order of bytes on all hosts that run rvmm.
pub(crate) fn of_message(number: u64, words: &[u64]) -> u64 {
    share(number, of_words(words))
}

/// The checksum of a page whose words `load` reads, by their index; `None` if it is all zeroes. The same as that of [`of_page`].
pub(crate) fn of_page_in_place(load: impl Fn(usize) -> u64) -> Option<u64> {
    let is_zero = |first: usize| (first..first + 8).fold(0, |all, index| all | load(index)) == 0;
    if (0..PAGE_WORDS).step_by(8).all(is_zero) {
        return None;
    }
    let mut lanes = LANES;
    for first in (0..PAGE_WORDS).step_by(8) {
        for (pair, lane) in lanes.iter_mut().enumerate() {
            let index = first + 2 * pair;
            *lane = folded(load(index) ^ SALTS[0], load(index + 1) ^ *lane);
        }
    }
    let first = PAGE_WORDS as u64;
    Some(lanes.into_iter().fold(first, |sum, lane| folded(sum ^ SALTS[1], lane)))
}

fn of_words(words: &[u64]) -> u64 {
    let mut lanes = LANES;
    let (blocks, rest) = words.as_chunks::<8>();
    for block in blocks {
        let (pairs, _) = block.as_chunks::<2>();
        for (lane, [a, b]) in lanes.iter_mut().zip(pairs) {
            *lane = folded(*a ^ SALTS[0], *b ^ *lane);
        }
    }
    let first = rest.iter().fold(words.len() as u64, |sum, word| folded(*word ^ SALTS[3], sum));
    lanes.into_iter().fold(first, |sum, lane| folded(sum ^ SALTS[1], lane))
}

/// The halves of the product of two words, joined. With a word that is 0 the other one is lost: the words that come in are salted.
fn folded(a: u64, b: u64) -> u64 {
    let product = u128::from(a).wrapping_mul(u128::from(b | u64::from(b == 0)));
    #[expect(clippy::cast_possible_truncation, reason = "the halves")]
    let (low, high) = (product as u64, (product >> 64) as u64);
    low ^ high
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_checksum_stays_the_same_from_one_version_to_the_next() {
        assert_eq!(of_bytes(b"rvmm"), 0x9d03_0be8_3cc7_8eb8);
        let page: Vec<u64> = (0..512).collect();
        let mut sum = PageSum::default();
        sum.add(3, of_page(&page).unwrap());
        assert_eq!(sum.total(), 0x60ea_516c_c2dd_7025);
    }

    #[test]
    fn each_bit_of_a_page_counts_and_so_does_its_place() {
        let mut seen = HashSet::new();
        let mut page = vec![0; PAGE_WORDS];
        assert_eq!(of_page(&page), None);
        for word in 0..PAGE_WORDS {
            for bit in 0..64 {
                page[word] = 1 << bit;
                let mut sum = PageSum::default();
                sum.add(0, of_page(&page).unwrap());
                assert!(seen.insert(sum.total()), "bit {bit} of word {word}");
            }
            page[word] = 0;
        }
    }

    #[test]
    fn a_page_has_the_same_checksum_in_place() {
        let mut page = vec![0; PAGE_WORDS];
        assert_eq!(of_page_in_place(|index| page[index]), None);
        for word in [0, 1, 7, 8, 510, 511] {
            page[word] = word as u64 + 1;
            assert_eq!(of_page_in_place(|index| page[index]), of_page(&page));
        }
        page.fill(u64::MAX);
        assert_eq!(of_page_in_place(|index| page[index]), of_page(&page));
    }

    proptest! {
        #[test]
        fn pages_that_are_swapped_or_moved_change_the_sum(
            a in any::<u64>(), b in any::<u64>(), at in 0_u64..1 << 40, to in 0_u64..1 << 40,
        ) {
            prop_assume!(a != b && at != to);
            let total = |pages: [(u64, u64); 2]| {
                let mut sum = PageSum::default();
                pages.into_iter().for_each(|(number, page)| sum.add(number, page));
                sum.total()
            };
            prop_assert_ne!(total([(at, a), (to, b)]), total([(at, b), (to, a)]));
            prop_assert_eq!(total([(at, a), (to, b)]), total([(to, b), (at, a)]));
        }

        #[test]
        fn bytes_that_were_changed_cut_or_lengthened_have_another_checksum(
            bytes in prop::collection::vec(any::<u8>(), 1..200), at in any::<prop::sample::Index>(), bit in 0..8_u8,
        ) {
            let sum = of_bytes(&bytes);
            let mut changed = bytes.clone();
            changed[at.index(bytes.len())] ^= 1_u8 << bit;
            prop_assert_ne!(of_bytes(&changed), sum);
            prop_assert_ne!(of_bytes(&bytes[..at.index(bytes.len())]), sum);
            changed = bytes.clone();
            changed.push(0);
            prop_assert_ne!(of_bytes(&changed), sum);
        }
    }
}
