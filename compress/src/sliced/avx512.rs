//! AVX-512 and BMI2: a block at a time, 64 nibbles in a register.

use std::arch::x86_64::{
    __m128i, __m512i, _mm_loadu_si128, _mm512_add_epi8, _mm512_broadcast_i32x4, _mm512_cmpge_epu8_mask,
    _mm512_gf2p8affine_epi64_epi8, _mm512_loadu_si512, _mm512_mask_add_epi8, _mm512_maskz_loadu_epi8,
    _mm512_or_si512, _mm512_permutexvar_epi8, _mm512_set1_epi8, _mm512_set1_epi64, _mm512_setzero_si512,
    _mm512_shuffle_epi8, _mm512_slli_epi16, _mm512_storeu_si512, _mm512_subs_epu8, _mm512_test_epi8_mask,
    _pdep_u64, _pext_u64,
};

use super::encode::{Code, Planes, encode_with};
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
        self::batches(sliced, first, batches, at);
        if sliced.overrun(at).is_none() {
            self::batches(sliced, first + BATCH * batches.len(), rest.as_chunks_mut::<1>().0, at);
        }
    }
}

/// # Safety
/// As [`blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,gfni,bmi2,popcnt")]
#[inline]
unsafe fn batches<const BLOCKS: usize>(
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
                *nodes = first_nodes(base);
            }
            for (at, threshold) in here.iter_mut().zip(thresholds) {
                for node in nodes.as_flattened_mut() {
                    *node = next_nodes(*node, levels, at, threshold);
                }
            }
            for ([low, high], block) in nodes.into_iter().zip(batch) {
                let bytes =
                    _mm512_or_si512(_mm512_shuffle_epi8(order, low), _mm512_shuffle_epi8(order_high, high));
                _mm512_storeu_si512(block.as_mut_ptr().cast(), bytes);
            }
            base = base.add(BLOCKS * BLOCK_BASE_BYTES);
            if sliced.overrun(&here).is_some() {
                break;
            }
        }
    }
    *at = here;
}

/// The nodes that the codewords of a block's low and high nibbles lead to with the bits that all have.
///
/// # Safety
/// `base` has 48 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
unsafe fn first_nodes(base: *const u8) -> [__m512i; 2] {
    // For eight codewords, zeros and a byte of each plane.
    const PLANES: [[u8; 64]; 2] = {
        let mut planes = [[0xff; 64]; 2];
        let mut index = 0_u8;
        while index < 64 {
            // The last byte of a matrix makes the lowest bit.
            let plane = 7 - index % 8;
            if plane < 3 {
                planes[0][index as usize] = 8 * plane + index / 8;
                planes[1][index as usize] = 24 + 8 * plane + index / 8;
            }
            index += 1;
        }
        planes
    };
    // SAFETY: 48 bytes are read; 64 bytes each.
    unsafe {
        let base = _mm512_maskz_loadu_epi8((1 << BLOCK_BASE_BYTES) - 1, base.cast());
        PLANES.map(|places| {
            // 0xff picks the last byte, which is zero.
            let planes = _mm512_permutexvar_epi8(_mm512_loadu_si512(places.as_ptr().cast()), base);
            // A matrix whose rows are planes, times a column with a single one: that codeword's bits.
            let columns = _mm512_set1_epi64(0x8040_2010_0804_0201_u64.cast_signed());
            _mm512_gf2p8affine_epi64_epi8::<0>(columns, planes)
        })
    }
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

/// As [`super::encode`].
///
/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,gfni,bmi2,popcnt")]
pub(super) unsafe fn encode(bytes: &[u8], out: &mut Vec<u8>) {
    // SAFETY: as this function demands.
    encode_with(
        bytes,
        out,
        |code, nibbles| unsafe { planes(code, nibbles) },
        |bits, mask| _pext_u64(bits, mask),
    );
}

/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn planes(code: &Code, nibbles: &[u8; BLOCK_BYTES]) -> Planes {
    // SAFETY: 64 bytes.
    let nibbles = unsafe { _mm512_loadu_si512(nibbles.as_ptr().cast()) };
    let shapes = _mm512_shuffle_epi8(table(&code.shapes), nibbles);
    let bits = _mm512_shuffle_epi8(table(&code.bits), nibbles);
    let plane = |bytes, place: u32| _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(1 << place));
    [
        plane(shapes, 0),
        plane(shapes, 1),
        plane(shapes, 2),
        plane(shapes, 3),
        plane(shapes, 4),
        plane(shapes, 5),
        plane(bits, 0),
        plane(bits, 1),
        plane(bits, 2),
    ]
}
