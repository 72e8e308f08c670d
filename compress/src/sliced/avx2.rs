//! AVX2 and BMI2: 64 nibbles in two registers, masks as bytes of ones.

use std::arch::x86_64::{
    __m256i, _mm_loadu_si128, _mm256_add_epi8, _mm256_and_si256, _mm256_broadcastsi128_si256,
    _mm256_cmpeq_epi8, _mm256_cmpgt_epi8, _mm256_loadu_si256, _mm256_movemask_epi8, _mm256_or_si256,
    _mm256_set1_epi8, _mm256_set1_epi64x, _mm256_setr_epi64x, _mm256_setzero_si256, _mm256_shuffle_epi8,
    _mm256_slli_epi16, _mm256_srli_epi16, _mm256_storeu_si256, _mm256_sub_epi8, _mm256_subs_epu8, _pdep_u64,
    _pext_u64,
};

use super::encode::{Code, Parts, Planes, cut_with};
use super::{BLOCK_BASE_BYTES, BLOCK_BYTES, LEVELS, Sliced, next_bits};

/// Decodes blocks; stops after one that takes a level beyond its end.
///
/// # Safety
/// The CPU has these features, the base has these blocks, and no level is beyond its end.
#[target_feature(enable = "avx2,bmi2,popcnt")]
pub(super) unsafe fn blocks(
    sliced: &Sliced<'_>,
    first: usize,
    out: &mut [[u8; BLOCK_BYTES]],
    at: &mut [usize; LEVELS],
) {
    // SAFETY: as this function demands.
    unsafe {
        if sliced.all_go_on() {
            blocks_from::<1>(sliced, first, out, at);
        } else {
            blocks_from::<0>(sliced, first, out, at);
        }
    }
}

/// Where all codewords go on at the first level, its bits are taken with the base: `FIRST` is the first level that isn't.
///
/// # Safety
/// As [`blocks`].
#[target_feature(enable = "avx2,bmi2,popcnt")]
#[inline]
unsafe fn blocks_from<const FIRST: usize>(
    sliced: &Sliced<'_>,
    first: usize,
    out: &mut [[u8; BLOCK_BYTES]],
    at: &mut [usize; LEVELS],
) {
    // SAFETY: sixteen bytes.
    let order = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(sliced.order.as_ptr().cast()) });
    let order_high = _mm256_slli_epi16::<4>(order);
    let levels = sliced.bytes.as_ptr();
    let mut here = *at;
    // SAFETY: the base has these blocks. Up to 128 bits and nine bytes beyond the end of a level are still in the section.
    unsafe {
        let mut base = levels.add(sliced.base_at + first * BLOCK_BASE_BYTES);
        for block in out {
            let mut nodes = [first_nodes(base), first_nodes(base.add(BLOCK_BASE_BYTES / 2))];
            if FIRST == 1 {
                for nodes in &mut nodes {
                    *nodes = with_bits(*nodes, levels.add(here[0] / 8));
                    here[0] += BLOCK_BYTES;
                }
            }
            #[expect(
                clippy::needless_range_loop,
                reason = "with `skip`, the compiler keeps no position in a register"
            )]
            for level in FIRST..LEVELS {
                let threshold = _mm256_set1_epi8(sliced.thresholds[level].cast_signed());
                for nodes in &mut nodes {
                    *nodes = next_nodes(*nodes, levels, &mut here[level], threshold);
                }
            }
            let [[low0, low1], [high0, high1]] = nodes;
            for (half, (low, high)) in [(low0, high0), (low1, high1)].into_iter().enumerate() {
                let bytes =
                    _mm256_or_si256(_mm256_shuffle_epi8(order, low), _mm256_shuffle_epi8(order_high, high));
                _mm256_storeu_si256(block.as_mut_ptr().cast::<__m256i>().add(half), bytes);
            }
            base = base.add(BLOCK_BASE_BYTES);
            if sliced.overrun(&here) {
                break;
            }
        }
    }
    *at = here;
}

/// The nodes that 64 codewords lead to with their first two bits.
///
/// # Safety
/// `base` has sixteen bytes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn first_nodes(base: *const u8) -> [__m256i; 2] {
    // SAFETY: as this function demands.
    let [ones, twos] = unsafe {
        let plane = base.cast::<u64>();
        [spread(plane.read_unaligned()), spread(plane.add(1).read_unaligned())]
    };
    let mut nodes = [_mm256_setzero_si256(); 2];
    for half in 0..2 {
        // A byte of ones is -1.
        nodes[half] = _mm256_sub_epi8(_mm256_and_si256(twos[half], _mm256_set1_epi8(2)), ones[half]);
    }
    nodes
}

/// The nodes that 64 nodes lead to, all of them with the next bit.
///
/// # Safety
/// `level` has eight bytes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn with_bits(mut nodes: [__m256i; 2], level: *const u8) -> [__m256i; 2] {
    // SAFETY: as this function demands.
    let bits = spread(unsafe { level.cast::<u64>().read_unaligned() });
    for half in 0..2 {
        nodes[half] = _mm256_sub_epi8(_mm256_add_epi8(nodes[half], nodes[half]), bits[half]);
    }
    nodes
}

/// The nodes one level further, of those that go on.
///
/// # Safety
/// `levels` has 64 bits and nine bytes more from bit `at`.
#[target_feature(enable = "avx2,bmi2,popcnt")]
#[inline]
unsafe fn next_nodes(
    mut nodes: [__m256i; 2],
    levels: *const u8,
    at: &mut usize,
    threshold: __m256i,
) -> [__m256i; 2] {
    // Nodes are at most 15, thresholds at most 16: bytes with a sign hold them.
    let below = _mm256_sub_epi8(threshold, _mm256_set1_epi8(1));
    let low = _mm256_movemask_epi8(_mm256_cmpgt_epi8(nodes[0], below)).cast_unsigned();
    let high = _mm256_movemask_epi8(_mm256_cmpgt_epi8(nodes[1], below)).cast_unsigned();
    let goes_on = u64::from(high) << 32 | u64::from(low);
    let count = goes_on.count_ones();
    // SAFETY: as this function demands.
    let bits = spread(_pdep_u64(unsafe { next_bits(levels, *at, count) }, goes_on));
    *at += count as usize;
    for half in 0..2 {
        // Nothing is added to nodes below the threshold. A byte of ones is -1.
        let more = _mm256_subs_epu8(nodes[half], threshold);
        nodes[half] = _mm256_sub_epi8(_mm256_add_epi8(nodes[half], more), bits[half]);
    }
    nodes
}

/// 64 bits as bytes of zeros or ones.
#[target_feature(enable = "avx2")]
#[inline]
fn spread(bits: u64) -> [__m256i; 2] {
    let each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
    let bits = _mm256_set1_epi64x(bits.cast_signed());
    // Both 16-byte lanes have all of the bits.
    let low = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let high = _mm256_add_epi8(low, _mm256_set1_epi8(4));
    let low = _mm256_and_si256(_mm256_shuffle_epi8(bits, low), each);
    let high = _mm256_and_si256(_mm256_shuffle_epi8(bits, high), each);
    [_mm256_cmpeq_epi8(low, each), _mm256_cmpeq_epi8(high, each)]
}

/// As [`cut_with`].
///
/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx2,bmi2,popcnt")]
pub(super) unsafe fn cut(code: &Code, bytes: &[u8], parts: &mut Parts) {
    // SAFETY: as this function demands.
    cut_with(
        code,
        bytes,
        parts,
        |code, blocks, out| unsafe { planes(code, blocks, out) },
        |bits, mask| _pext_u64(bits, mask),
    );
}

/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn planes(code: &Code, blocks: &[[u8; BLOCK_BYTES]], out: &mut [[Planes; 2]]) {
    // SAFETY: sixteen bytes each.
    let (shapes, bits) = unsafe {
        let table = |table: &[u8; 16]| _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        (table(&code.shapes), table(&code.bits))
    };
    let mask = _mm256_set1_epi8(0x0f);
    for (block, [low, high]) in blocks.iter().zip(out) {
        // SAFETY: 32 bytes twice.
        let bytes = unsafe {
            let block = block.as_ptr().cast::<__m256i>();
            [_mm256_loadu_si256(block), _mm256_loadu_si256(block.add(1))]
        };
        let shifted = [_mm256_srli_epi16::<4>(bytes[0]), _mm256_srli_epi16::<4>(bytes[1])];
        *low = planes_of(shapes, bits, [_mm256_and_si256(bytes[0], mask), _mm256_and_si256(bytes[1], mask)]);
        *high =
            planes_of(shapes, bits, [_mm256_and_si256(shifted[0], mask), _mm256_and_si256(shifted[1], mask)]);
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn planes_of(shapes: __m256i, bits: __m256i, [low, high]: [__m256i; 2]) -> Planes {
    let shapes = [_mm256_shuffle_epi8(shapes, low), _mm256_shuffle_epi8(shapes, high)];
    let bits = [_mm256_shuffle_epi8(bits, low), _mm256_shuffle_epi8(bits, high)];
    [
        [
            plane::<7>(shapes),
            plane::<6>(shapes),
            plane::<5>(shapes),
            plane::<4>(shapes),
            plane::<3>(shapes),
            plane::<2>(shapes),
            0,
            0,
        ],
        [plane::<7>(bits), plane::<6>(bits), plane::<5>(bits), plane::<4>(bits), 0, 0, 0, 0],
    ]
}

/// The bit of each byte that a shift makes the highest.
#[target_feature(enable = "avx2")]
#[inline]
fn plane<const SHIFT: i32>([low, high]: [__m256i; 2]) -> u64 {
    let low = _mm256_movemask_epi8(_mm256_slli_epi16::<SHIFT>(low)).cast_unsigned();
    let high = _mm256_movemask_epi8(_mm256_slli_epi16::<SHIFT>(high)).cast_unsigned();
    u64::from(high) << 32 | u64::from(low)
}
