//! AVX-512 and BMI2: a block at a time, 64 nibbles in a register.

use std::arch::x86_64::{
    __m128i, __m512i, _mm_loadu_si128, _mm512_add_epi8, _mm512_add_epi64, _mm512_and_si512,
    _mm512_broadcast_i32x4, _mm512_cmpge_epu8_mask, _mm512_gf2p8affine_epi64_epi8, _mm512_inserti32x4,
    _mm512_loadu_si512, _mm512_mask_add_epi8, _mm512_maskz_loadu_epi8, _mm512_or_si512,
    _mm512_permutexvar_epi8, _mm512_popcnt_epi64, _mm512_reduce_add_epi64, _mm512_set1_epi8,
    _mm512_set1_epi64, _mm512_set4_epi32, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_slli_epi16,
    _mm512_slli_epi64, _mm512_srli_epi16, _mm512_srli_epi64, _mm512_storeu_si512, _mm512_subs_epu8,
    _mm512_ternarylogic_epi64, _pdep_u64, _pext_u64,
};

use super::counts;
use super::encode::{Code, Parts, Planes, cut_with};
use super::{BLOCK_BASE_BYTES, BLOCK_BYTES, LEVELS, Sliced, next_bits};

/// Blocks decoded together. What is done to one register takes long to come back from the mask registers, so others
/// are to be had in between: `docs/CODEC.md` has the measurement.
const BATCH: usize = 4;

/// Decodes blocks; stops after some that take a level beyond its end.
///
/// # Safety
/// The CPU has these features, the base has these blocks, and no level is beyond its end.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,gfni,bmi2,popcnt")]
pub(super) unsafe fn blocks(
    sliced: &Sliced<'_>,
    first: usize,
    out: &mut [[u8; BLOCK_BYTES]],
    at: &mut [usize; LEVELS],
) {
    let (batches, rest) = out.as_chunks_mut::<BATCH>();
    // SAFETY: as this function demands; `batches` stops where a level is beyond its end.
    unsafe {
        batches_of(sliced, first, batches, at);
        if !sliced.overrun(at) {
            batches_of(sliced, first + BATCH * batches.len(), rest.as_chunks_mut::<1>().0, at);
        }
    }
}

/// # Safety
/// As [`blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,gfni,bmi2,popcnt")]
#[inline]
unsafe fn batches_of<const BLOCKS: usize>(
    sliced: &Sliced<'_>,
    first: usize,
    out: &mut [[[u8; BLOCK_BYTES]; BLOCKS]],
    at: &mut [usize; LEVELS],
) {
    // SAFETY: as this function demands.
    unsafe {
        if sliced.all_go_on() {
            batches::<BLOCKS, 1>(sliced, first, out, at);
        } else {
            batches::<BLOCKS, 0>(sliced, first, out, at);
        }
    }
}

/// Where all codewords go on at the first level, its bits are taken with the base: `FIRST` is the first level that isn't.
///
/// # Safety
/// As [`blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,gfni,bmi2,popcnt")]
#[inline]
unsafe fn batches<const BLOCKS: usize, const FIRST: usize>(
    sliced: &Sliced<'_>,
    first: usize,
    out: &mut [[[u8; BLOCK_BYTES]; BLOCKS]],
    at: &mut [usize; LEVELS],
) {
    let order = table(&sliced.order);
    let order_high = _mm512_slli_epi16::<4>(order);
    let thresholds = sliced.thresholds.map(|threshold| _mm512_set1_epi8(threshold.cast_signed()));
    let levels = sliced.bytes.as_ptr();
    let mut here = *at;
    // SAFETY: the base has these blocks, and no level is beyond its end where a batch begins: what its blocks take of a level
    // and nine bytes more is in front of the end of their bases.
    unsafe {
        let mut base = levels.add(sliced.base_at + first * BLOCK_BASE_BYTES);
        for batch in out {
            let mut nodes = [[_mm512_setzero_si512(); 2]; BLOCKS];
            for (block, nodes) in nodes.iter_mut().enumerate() {
                let base = base.add(block * BLOCK_BASE_BYTES);
                *nodes = if FIRST == 0 {
                    first_nodes(base)
                } else {
                    let level = levels.add(here[0] / 8);
                    here[0] += 2 * BLOCK_BYTES;
                    first_nodes_all(base, level)
                };
            }
            for level in FIRST..LEVELS {
                for node in nodes.as_flattened_mut() {
                    *node = next_nodes(*node, levels, &mut here[level], thresholds[level]);
                }
            }
            for ([low, high], block) in nodes.into_iter().zip(batch) {
                let bytes =
                    _mm512_or_si512(_mm512_shuffle_epi8(order, low), _mm512_shuffle_epi8(order_high, high));
                _mm512_storeu_si512(block.as_mut_ptr().cast(), bytes);
            }
            base = base.add(BLOCKS * BLOCK_BASE_BYTES);
            if sliced.overrun(&here) {
                break;
            }
        }
    }
    *at = here;
}

/// The nodes that the codewords of a block's low and high nibbles lead to with their first two bits.
///
/// # Safety
/// `base` has 32 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
unsafe fn first_nodes(base: *const u8) -> [__m512i; 2] {
    const PLACES: [[u8; 64]; 2] = [places([Some(0), Some(8), None]), places([Some(16), Some(24), None])];
    // SAFETY: 32 bytes are read.
    let bytes = unsafe { _mm512_maskz_loadu_epi8((1 << BLOCK_BASE_BYTES) - 1, base.cast()) };
    [transposed(bytes, &PLACES[0]), transposed(bytes, &PLACES[1])]
}

/// As [`first_nodes`], with three bits: the last from `level`.
///
/// # Safety
/// `base` has 32 bytes, `level` sixteen.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
unsafe fn first_nodes_all(base: *const u8, level: *const u8) -> [__m512i; 2] {
    const PLACES: [[u8; 64]; 2] =
        [places([Some(32), Some(0), Some(8)]), places([Some(40), Some(16), Some(24)])];
    // SAFETY: 32 and sixteen bytes are read.
    let (bytes, level) = unsafe {
        (_mm512_maskz_loadu_epi8((1 << BLOCK_BASE_BYTES) - 1, base.cast()), _mm_loadu_si128(level.cast()))
    };
    let bytes = _mm512_inserti32x4::<2>(bytes, level);
    [transposed(bytes, &PLACES[0]), transposed(bytes, &PLACES[1])]
}

/// For each eight codewords, where the bytes of their bits are, the lowest bit first. Where there are none, a byte
/// is taken that is zero.
const fn places(bits: [Option<u8>; 3]) -> [u8; 64] {
    let mut places = [63; 64];
    let (mut bit, mut eight) = (0, 0_u8);
    while bit < bits.len() {
        if let Some(first) = bits[bit] {
            // The last byte of a matrix makes the lowest bit.
            places[8 * eight as usize + 7 - bit] = first + eight;
        }
        eight += 1;
        if eight == 8 {
            (bit, eight) = (bit + 1, 0);
        }
    }
    places
}

/// A matrix whose rows are these bytes, times columns with a single one: the bits of each codeword.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn transposed(bytes: __m512i, places: &[u8; 64]) -> __m512i {
    // SAFETY: 64 bytes.
    let places = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
    let columns = _mm512_set1_epi64(0x8040_2010_0804_0201_u64.cast_signed());
    _mm512_gf2p8affine_epi64_epi8::<0>(columns, _mm512_permutexvar_epi8(places, bytes))
}

/// The nodes one level further, of those that go on.
///
/// # Safety
/// `levels` has 64 bits and nine bytes more from bit `at`.
#[target_feature(enable = "avx512f,avx512bw,bmi2,popcnt")]
#[inline]
unsafe fn next_nodes(nodes: __m512i, levels: *const u8, at: &mut usize, threshold: __m512i) -> __m512i {
    let goes_on = _mm512_cmpge_epu8_mask(nodes, threshold);
    let count = goes_on.count_ones();
    // SAFETY: as this function demands.
    let bits = _pdep_u64(unsafe { next_bits(levels, *at, count) }, goes_on);
    *at += count as usize;
    // Nothing is added to nodes below the threshold.
    let nodes = _mm512_add_epi8(nodes, _mm512_subs_epu8(nodes, threshold));
    _mm512_mask_add_epi8(nodes, bits, nodes, _mm512_set1_epi8(1))
}

/// Sixteen bytes to look up in, four times.
#[target_feature(enable = "avx512f")]
#[inline]
fn table(bytes: &[u8; 16]) -> __m512i {
    // SAFETY: sixteen bytes.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(bytes.as_ptr().cast::<__m128i>()) })
}

/// As [`cut_with`].
///
/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,gfni,bmi2,popcnt")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
unsafe fn planes(code: &Code, blocks: &[[u8; BLOCK_BYTES]], out: &mut [[Planes; 2]]) {
    let mask = _mm512_set1_epi8(0x0f);
    // The last byte of a matrix makes the lowest bit.
    let backwards = _mm512_set1_epi64(0x0001_0203_0405_0607);
    let backwards = _mm512_add_epi8(backwards, _mm512_set4_epi32(0x0808_0808, 0x0808_0808, 0, 0));
    let tables = [table(&code.shapes), table(&code.bits)];
    for (block, halves) in blocks.iter().zip(out) {
        // SAFETY: 64 bytes.
        let bytes = _mm512_shuffle_epi8(unsafe { _mm512_loadu_si512(block.as_ptr().cast()) }, backwards);
        let low = _mm512_and_si512(bytes, mask);
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask);
        for (nibbles, planes) in [low, high].into_iter().zip(halves) {
            for (table, planes) in tables.into_iter().zip(planes) {
                let planes_of = by_plane(_mm512_shuffle_epi8(table, nibbles));
                // SAFETY: eight words.
                unsafe { _mm512_storeu_si512(planes.as_mut_ptr().cast(), planes_of) };
            }
        }
    }
}

/// All lowest bits of 64 bytes, all second ones, and so on, where each eight bytes lie backwards.
#[target_feature(enable = "avx512f,avx512vbmi,gfni")]
#[inline]
fn by_plane(bytes: __m512i) -> __m512i {
    const PLACES: [u8; 64] = {
        let mut places = [0; 64];
        let mut place = 0_u8;
        while place < 64 {
            places[place as usize] = place % 8 * 8 + place / 8;
            place += 1;
        }
        places
    };
    let columns = _mm512_set1_epi64(0x8040_2010_0804_0201_u64.cast_signed());
    // Of each eight bytes, a byte of their lowest bits, and so on.
    let bits = _mm512_gf2p8affine_epi64_epi8::<0>(columns, bytes);
    // SAFETY: 64 bytes.
    let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    _mm512_permutexvar_epi8(places, bits)
}

/// As [`counts::sums`].
///
/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx512f,avx512vpopcntdq")]
pub(super) unsafe fn sums(bytes: &[u8]) -> [u64; 16] {
    let mut counted = [_mm512_setzero_si512(); 15];
    let (pieces, rest) = bytes.as_chunks::<256>();
    for piece in pieces {
        // SAFETY: four times 64 bytes.
        let words = [0, 64, 128, 192].map(|at| unsafe { _mm512_loadu_si512(piece.as_ptr().add(at).cast()) });
        let [a, b, c, d] = by_place(words);
        let and = |a, b| _mm512_and_si512(a, b);
        let (ab, cd) = (and(a, b), and(c, d));
        let (ac, bc, abc) = (and(a, c), and(b, c), and(ab, c));
        let (ad, bd, abd) = (and(a, d), and(b, d), and(ab, d));
        let having = [a, b, ab, c, ac, bc, abc, d, ad, bd, abd, cd, and(a, cd), and(b, cd), and(ab, cd)];
        for (counted, having) in counted.iter_mut().zip(having) {
            *counted = _mm512_add_epi64(*counted, _mm512_popcnt_epi64(having));
        }
    }
    let mut sums = counts::sums(rest);
    for (sum, counted) in sums[1..].iter_mut().zip(counted) {
        *sum += _mm512_reduce_add_epi64(counted).cast_unsigned();
    }
    sums
}

/// As that of [`counts`].
#[target_feature(enable = "avx512f")]
#[inline]
fn by_place([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let odd = _mm512_set1_epi8(0x55);
    let pairs = _mm512_set1_epi8(0x33);
    // The bits of the first under the mask's ones, of the second elsewhere.
    let select = |mask, ones, zeros| _mm512_ternarylogic_epi64::<0xca>(mask, ones, zeros);
    let ([a, b], [c, d]) = (
        [select(odd, a, _mm512_slli_epi64::<1>(b)), select(odd, _mm512_srli_epi64::<1>(a), b)],
        [select(odd, c, _mm512_slli_epi64::<1>(d)), select(odd, _mm512_srli_epi64::<1>(c), d)],
    );
    let ([a, c], [b, d]) = (
        [select(pairs, a, _mm512_slli_epi64::<2>(c)), select(pairs, _mm512_srli_epi64::<2>(a), c)],
        [select(pairs, b, _mm512_slli_epi64::<2>(d)), select(pairs, _mm512_srli_epi64::<2>(b), d)],
    );
    [a, b, c, d]
}
