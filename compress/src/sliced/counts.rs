//! How often each nibble occurs, without a table: of four words, the bits of their nibbles are put together by place, so that ones of a place, or of
//! several at once, are counted 64 and more at a time.

use crate::Isa;

/// How often each nibble occurs in `bytes`.
pub(super) fn histogram(isa: Isa, bytes: &[u8]) -> [u64; 16] {
    let mut sums = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this instruction set is chosen only where the CPU has it.
        Isa::Avx512 => unsafe { super::avx512::sums(bytes) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx2 => unsafe { sums_popcnt(bytes) },
        _ => sums(bytes),
    };
    sums[0] = 2 * bytes.len() as u64;
    // From how many nibbles have these bits to how many have no others.
    for bit in [1, 2, 4, 8] {
        for nibble in (0..16).filter(|nibble| nibble & bit == 0) {
            sums[nibble] -= sums[nibble | bit];
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,popcnt")]
fn sums_popcnt(bytes: &[u8]) -> [u64; 16] {
    sums(bytes)
}

/// How many nibbles have all the bits of each nibble but 0.
#[inline(always)]
pub(super) fn sums(bytes: &[u8]) -> [u64; 16] {
    let mut sums = [0_u64; 16];
    let (pieces, rest) = bytes.as_chunks::<32>();
    // Zeros have none of the bits.
    let mut last = [[0; 32]];
    last[0][..rest.len()].copy_from_slice(rest);
    for pieces in [pieces, &last] {
        for piece in pieces {
            let mut words = [0; 4];
            for (word, bytes) in words.iter_mut().zip(piece.as_chunks::<8>().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            let [a, b, c, d] = by_place(words);
            let (ab, cd) = (a & b, c & d);
            let having =
                [a, b, ab, c, a & c, b & c, ab & c, d, a & d, b & d, ab & d, cd, a & cd, b & cd, ab & cd];
            for (sum, having) in sums[1..].iter_mut().zip(having) {
                *sum += u64::from(having.count_ones());
            }
        }
    }
    sums
}

/// The lowest bits of all nibbles of four words, the second ones, and so on: a matrix of four by four bits transposed, sixteen times.
#[inline(always)]
fn by_place([a, b, c, d]: [u64; 4]) -> [u64; 4] {
    const ODD: u64 = 0x5555_5555_5555_5555;
    const PAIRS: u64 = 0x3333_3333_3333_3333;
    let swap = |low: u64, high: u64, shift: u32, mask: u64| {
        [low & mask | (high & mask) << shift, low >> shift & mask | high & !mask]
    };
    let ([a, b], [c, d]) = (swap(a, b, 1, ODD), swap(c, d, 1, ODD));
    let ([a, c], [b, d]) = (swap(a, c, 2, PAIRS), swap(b, d, 2, PAIRS));
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_nibble_is_counted(bytes in proptest::collection::vec(any::<u8>(), 0..1500), mask: u8) {
            let bytes: Vec<u8> = bytes.iter().map(|byte| byte & mask).collect();
            let mut expected = [0; 16];
            for byte in &bytes {
                expected[usize::from(byte & 15)] += 1;
                expected[usize::from(byte >> 4)] += 1;
            }
            for isa in Isa::supported() {
                prop_assert_eq!(histogram(isa, &bytes), expected);
            }
        }
    }
}
