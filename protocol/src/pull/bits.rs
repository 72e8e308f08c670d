//! Bitmaps in slices of 64-bit words: which segments have arrived, which planes are still to be pulled.

/// Words for `bits` bits.
pub(crate) const fn words(bits: u32) -> usize {
    bits.div_ceil(64) as usize
}

#[inline]
pub(crate) fn set(map: &mut [u64], bit: u32) {
    map[(bit / 64) as usize] |= 1 << (bit % 64);
}

#[inline]
pub(crate) fn clear(map: &mut [u64], bit: u32) {
    map[(bit / 64) as usize] &= !(1 << (bit % 64));
}

#[inline]
pub(crate) fn is_set(map: &[u64], bit: u32) -> bool {
    map[(bit / 64) as usize] >> (bit % 64) & 1 == 1
}

/// The first bit from `from` on that is set, or `end`.
pub(crate) fn next_set(map: &[u64], from: u32, end: u32) -> u32 {
    scan(map, from, end, 0)
}

/// The first bit from `from` on that is clear, or `end`.
pub(crate) fn next_clear(map: &[u64], from: u32, end: u32) -> u32 {
    scan(map, from, end, u64::MAX)
}

/// The first bit that differs from those of `skip`.
fn scan(map: &[u64], from: u32, end: u32, skip: u64) -> u32 {
    let mut at = from;
    while at < end {
        let rest = (map[(at / 64) as usize] ^ skip) >> (at % 64);
        if rest != 0 {
            return (at + rest.trailing_zeros()).min(end);
        }
        at = (at / 64 + 1) * 64;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn scans_equal_bit_by_bit(map in proptest::collection::vec(any::<u64>(), 3), mask in 0_u32..4, from in 0_u32..192, end in 0_u32..=192) {
            // Long runs of equal bits too, not only noise.
            let map: Vec<u64> = map.iter().map(|word| match mask { 0 => 0, 1 => u64::MAX, _ => *word }).collect();
            let slow = |want: bool| (from..end).find(|bit| is_set(&map, *bit) == want).unwrap_or(end);
            prop_assert_eq!(next_set(&map, from, end), slow(true));
            prop_assert_eq!(next_clear(&map, from, end), slow(false));
        }
    }
}
