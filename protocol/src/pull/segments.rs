//! The segments of a range, as two bits each: asked for and under way, arrived. What is neither is wanted.
//!
//! A PULL covers at most 64 consecutive segments, so that what it asks for is one word beside its first segment.

/// The state of 64 segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Word {
    /// Here.
    pub(crate) arrived: u64,
    /// Asked for, and neither arrived nor given up.
    pub(crate) asked: u64,
}

impl Word {
    fn wanted(self) -> u64 {
        !(self.arrived | self.asked)
    }
}

/// Word and bit of a segment.
#[inline(always)]
pub(crate) fn place(segment: u32) -> (usize, u64) {
    ((segment / 64) as usize, 1 << (segment % 64))
}

/// The first wanted segment from `from` on, or `end`.
pub(crate) fn next_wanted(map: &[Word], from: u32, end: u32) -> u32 {
    let mut at = from;
    while at < end {
        let rest = map[(at / 64) as usize].wanted() >> (at % 64);
        if rest != 0 {
            return (at + rest.trailing_zeros()).min(end);
        }
        at = (at / 64 + 1) * 64;
    }
    end
}

/// The first segment from `from` on that is asked for, or `end`.
pub(crate) fn next_asked(map: &[Word], from: u32, end: u32) -> u32 {
    let mut at = from;
    while at < end {
        let rest = map[(at / 64) as usize].asked >> (at % 64);
        if rest != 0 {
            return (at + rest.trailing_zeros()).min(end);
        }
        at = (at / 64 + 1) * 64;
    }
    end
}

/// Which of the 64 segments from `base` on are wanted and below `end`, which is above `base`: bit 0 is `base`.
pub(crate) fn wanted_from(map: &[Word], base: u32, end: u32) -> u64 {
    let (word, shift) = ((base / 64) as usize, base % 64);
    let mut wanted = map[word].wanted() >> shift;
    if shift > 0 && word + 1 < map.len() {
        wanted |= map[word + 1].wanted() << (64 - shift);
    }
    match end - base {
        left @ 0..64 => wanted & ((1 << left) - 1),
        _ => wanted,
    }
}

/// Notes that the segments `base` + bits of `mask` are asked for.
pub(crate) fn set_asked(map: &mut [Word], base: u32, mask: u64) {
    each_word(map, base, mask, |word, bits| word.asked |= bits);
}

/// Notes that they are no longer asked for.
pub(crate) fn clear_asked(map: &mut [Word], base: u32, mask: u64) {
    each_word(map, base, mask, |word, bits| word.asked &= !bits);
}

fn each_word(map: &mut [Word], base: u32, mask: u64, change: impl Fn(&mut Word, u64)) {
    let (word, shift) = ((base / 64) as usize, base % 64);
    change(&mut map[word], mask << shift);
    if shift > 0 && mask >> (64 - shift) != 0 {
        change(&mut map[word + 1], mask >> (64 - shift));
    }
}

/// The lowest `count` bits of `mask` that are set.
pub(crate) fn lowest(mask: u64, count: u32) -> u64 {
    let mut left = mask;
    for _ in 0..count.min(64) {
        left &= left.wrapping_sub(1);
    }
    mask & !left
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn get(map: &[Word], segment: u32) -> bool {
        let (word, bit) = place(segment);
        (map[word].arrived | map[word].asked) & bit == 0
    }

    proptest! {
        #[test]
        fn masks_equal_segment_by_segment(
            words in proptest::collection::vec(any::<(u64, u64)>(), 3), sparse in any::<bool>(),
            base in 0_u32..191, end in 1_u32..=192, count in 0_u32..70,
        ) {
            let full = u64::MAX * u64::from(sparse);
            let mut map: Vec<Word> = words.iter().map(|(a, b)| Word { arrived: *a | full, asked: *b }).collect();
            let slow = |map: &[Word]| (base..end).find(|s| get(map, *s)).unwrap_or(end.max(base));
            prop_assert_eq!(next_wanted(&map, base, end).max(base), slow(&map));
            let asked = (base..end).find(|s| map[place(*s).0].asked & place(*s).1 != 0);
            prop_assert_eq!(next_asked(&map, base, end).max(base), asked.unwrap_or(end.max(base)));
            let end = end.max(base + 1);
            let wanted = wanted_from(&map, base, end);
            for bit in 0..64 {
                let here = base + bit < end && get(&map, base + bit);
                prop_assert_eq!(wanted >> bit & 1 == 1, here, "bit {}", bit);
            }
            let some = lowest(wanted, count);
            prop_assert_eq!(some.count_ones(), wanted.count_ones().min(count));
            prop_assert_eq!(some & !wanted, 0);
            let before = map.clone();
            set_asked(&mut map, base, some);
            prop_assert_eq!(wanted_from(&map, base, end), wanted & !some);
            clear_asked(&mut map, base, some);
            prop_assert_eq!(map, before);
        }
    }

    #[test]
    fn the_lowest_bits_are_taken() {
        assert_eq!(lowest(0b1011_0100, 2), 0b1_0100);
        assert_eq!(lowest(u64::MAX, 64), u64::MAX);
        assert_eq!(lowest(5, 0), 0);
    }
}
