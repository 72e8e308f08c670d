//! AVX-512: codes of elements, 64 at a time, and their packing.
//!
//! Codes are written one a byte to scratch, of some head rows at a time, and packed from there while in the nearest cache.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_epi32, _mm512_and_si512, _mm512_castsi512_ps, _mm512_castsi512_si256,
    _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_extracti64x4_epi64, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_maskz_loadu_epi16, _mm512_maskz_permutex2var_epi8, _mm512_min_ps, _mm512_mul_ps, _mm512_or_si512,
    _mm512_permutex2var_ps, _mm512_set_epi32, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32,
    _mm512_storeu_si512, _mm512_sub_ps,
};

use super::{Groups, Job, avx512_packing};
use crate::dtype::Dtype;

/// Elements whose codes fill a register.
pub(super) const UNIT: usize = 64;
/// Tokens whose elements of one channel are quantized together, so that what belongs to the channel is loaded once for all.
const TOKENS: usize = 8;
/// Head rows that are quantized before they are packed.
const ROWS: usize = 8;

/// Reciprocals and offsets of 64 elements, in the order of [`widen`].
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub(super) reciprocals: [__m512; 4],
    pub(super) offsets: [__m512; 4],
}

/// Fills both parts with the codes of all elements; `codes` is scratch.
///
/// # Safety
/// The CPU has these features, the job was checked, groups are padded, and the parts have room for all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
pub(super) unsafe fn write(
    job: &Job<'_>,
    groups: &Groups,
    codes: &mut Vec<u8>,
    plain: &mut [u8],
    section: &mut [u8],
) {
    // SAFETY: as this function demands.
    unsafe {
        match (job.shape.dtype, groups.must_cut) {
            (Dtype::Bf16, false) => write_with::<true, false>(job, groups, codes, plain, section),
            (Dtype::Bf16, true) => write_with::<true, true>(job, groups, codes, plain, section),
            (Dtype::F16, false) => write_with::<false, false>(job, groups, codes, plain, section),
            (Dtype::F16, true) => write_with::<false, true>(job, groups, codes, plain, section),
        }
    }
}

/// # Safety
/// As [`write`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn write_with<const BF16: bool, const CUT: bool>(
    job: &Job<'_>,
    groups: &Groups,
    codes: &mut Vec<u8>,
    mut plain: &mut [u8],
    mut section: &mut [u8],
) {
    let (channels, dim, packing) = (job.shape.channels(), usize::from(job.shape.head_dim), job.packing);
    // What is quantized at a time lies apart by so many bytes: whole units are written, the last ones beyond the end.
    let (stride, piece, most) =
        if job.per_channel() { (channels, channels, TOKENS) } else { (dim, dim, ROWS) };
    let stride = stride.next_multiple_of(UNIT);
    codes.resize(stride * most + UNIT, 0);
    // Whole lines: a store that goes over the end of one takes several times as long.
    let lines = codes.as_ptr().align_offset(UNIT);
    let codes = &mut codes[lines..];
    for (turn, elements) in job.plane.chunks(2 * piece * most).enumerate() {
        let pieces = elements.len() / (2 * piece);
        // SAFETY: so many pieces of elements, and room for their codes.
        unsafe {
            if job.per_channel() {
                tokens::<BF16, CUT>(job, groups, elements.as_ptr(), pieces, codes.as_mut_ptr(), stride);
            } else {
                rows::<BF16, CUT>(
                    job,
                    groups,
                    turn * most,
                    elements.as_ptr(),
                    pieces,
                    codes.as_mut_ptr(),
                    stride,
                );
            }
        }
        let packed = pieces * piece;
        let parts = (
            plain.split_off_mut(..packing.plain_bytes(packed)),
            section.split_off_mut(..packing.section_bytes(packed)),
        );
        let (Some(plain), Some(section)) = parts else { unreachable!("parts have room for every row") };
        // SAFETY: codes of so many pieces, and room for all of their rows.
        unsafe {
            avx512_packing::pack(packing, codes.as_ptr(), [pieces, piece, stride], dim, plain, section)
        };
    }
}

/// Codes of tokens whose channels have scales: all tokens of 64 channels, then of the next.
///
/// # Safety
/// The CPU has these features, groups are padded, there are `count` tokens, and `codes` has as many times `stride` bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn tokens<const BF16: bool, const CUT: bool>(
    job: &Job<'_>,
    groups: &Groups,
    elements: *const u8,
    count: usize,
    codes: *mut u8,
    stride: usize,
) {
    let channels = job.shape.channels();
    let largest = _mm512_set1_ps(f32::from(job.largest_used));
    for at in (0..channels).step_by(UNIT) {
        // SAFETY: 64 channels, or those that are left, of each token; of groups there are 64.
        unsafe {
            let group =
                channels_of::<BF16>(groups.reciprocals.as_ptr().add(at), groups.offsets.as_ptr().add(at));
            let (elements, codes) = (elements.add(2 * at), codes.add(at));
            let rest = channels - at;
            for token in 0..count {
                let elements = elements.add(2 * token * channels);
                let elements = load(elements, rest);
                let sixty_four = codes_of_loaded::<BF16, CUT>(elements, group, largest);
                _mm512_storeu_si512(codes.add(token * stride).cast(), sixty_four);
            }
        }
    }
}

/// Codes of head rows that have each a scale.
///
/// # Safety
/// The CPU has these features, there are `count` rows and as many groups from `first`, and `codes` has as many times `stride` bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn rows<const BF16: bool, const CUT: bool>(
    job: &Job<'_>,
    groups: &Groups,
    first: usize,
    elements: *const u8,
    count: usize,
    codes: *mut u8,
    stride: usize,
) {
    let dim = usize::from(job.shape.head_dim);
    let largest = _mm512_set1_ps(f32::from(job.largest_used));
    for row in 0..count {
        let group = Group {
            reciprocals: [_mm512_set1_ps(groups.reciprocals[first + row]); 4],
            offsets: [_mm512_set1_ps(groups.offsets[first + row]); 4],
        };
        for at in (0..dim).step_by(UNIT) {
            // SAFETY: 64 elements of the row, or those that are left.
            unsafe {
                let elements = load(elements.add(2 * (row * dim + at)), dim - at);
                let sixty_four = codes_of_loaded::<BF16, CUT>(elements, group, largest);
                _mm512_storeu_si512(codes.add(row * stride + at).cast(), sixty_four);
            }
        }
    }
}

/// Reciprocals and offsets of 64 channels.
///
/// # Safety
/// 64 numbers each.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn channels_of<const BF16: bool>(reciprocals: *const f32, offsets: *const f32) -> Group {
    // SAFETY: as this function demands.
    unsafe { Group { reciprocals: four::<BF16>(reciprocals), offsets: four::<BF16>(offsets) } }
}

/// 64 numbers in the order of [`widen`].
///
/// # Safety
/// There are 64.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn four<const BF16: bool>(numbers: *const f32) -> [__m512; 4] {
    // SAFETY: as this function demands.
    let (a, b, c, d) = unsafe {
        let (low, high) = (numbers, numbers.add(32));
        (
            _mm512_loadu_ps(low),
            _mm512_loadu_ps(low.add(16)),
            _mm512_loadu_ps(high),
            _mm512_loadu_ps(high.add(16)),
        )
    };
    if BF16 {
        [alternate(a, b, 0), alternate(a, b, 1), alternate(c, d, 0), alternate(c, d, 1)]
    } else {
        [a, b, c, d]
    }
}

/// Every other of 32 numbers.
#[target_feature(enable = "avx512f")]
#[inline]
fn alternate(low: __m512, high: __m512, first: i32) -> __m512 {
    let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(first)), high)
}

/// 64 elements, or so many and zeros.
///
/// # Safety
/// There are `count` elements or 64.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn load(elements: *const u8, count: usize) -> [__m512i; 2] {
    // SAFETY: as this function demands.
    unsafe {
        let elements = elements.cast::<i16>();
        if count >= UNIT {
            return [_mm512_loadu_si512(elements.cast()), _mm512_loadu_si512(elements.add(32).cast())];
        }
        let first = |count: usize| if count >= 32 { u32::MAX } else { (1 << count) - 1 };
        let (low, high) = (first(count), first(count.saturating_sub(32)));
        [_mm512_maskz_loadu_epi16(low, elements), _mm512_maskz_loadu_epi16(high, elements.wrapping_add(32))]
    }
}

/// 32 elements as floats, in an order of each type's own.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn widen<const BF16: bool>(elements: __m512i) -> [__m512; 2] {
    if BF16 {
        // The even ones, then the odd ones.
        let odd = _mm512_and_si512(elements, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(elements)), _mm512_castsi512_ps(odd)]
    } else {
        let (low, high) = (_mm512_castsi512_si256(elements), _mm512_extracti64x4_epi64::<1>(elements));
        [_mm512_cvtph_ps(low), _mm512_cvtph_ps(high)]
    }
}

/// The codes of 64 elements, in the elements' order.
///
/// # Safety
/// There are 64.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
pub(super) unsafe fn codes_of<const BF16: bool, const CUT: bool>(
    elements: *const u8,
    group: Group,
) -> __m512i {
    // SAFETY: as this function demands.
    let elements = unsafe { load(elements, UNIT) };
    codes_of_loaded::<BF16, CUT>(elements, group, _mm512_set1_ps(0.0))
}

/// As [`codes_of`], at most `largest` with `CUT`.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
fn codes_of_loaded<const BF16: bool, const CUT: bool>(
    elements: [__m512i; 2],
    group: Group,
    largest: __m512,
) -> __m512i {
    let ([a, b], [c, d]) = (widen::<BF16>(elements[0]), widen::<BF16>(elements[1]));
    let code = |values: __m512, part: usize| {
        let distance = _mm512_mul_ps(_mm512_sub_ps(values, group.offsets[part]), group.reciprocals[part]);
        // To nearest, ties to even, as is the CPU's state.
        _mm512_cvtps_epi32(if CUT { _mm512_min_ps(distance, largest) } else { distance })
    };
    // The lowest byte of each of two registers' numbers, into one half and into the other.
    let order = order(BF16);
    let low = _mm512_maskz_permutex2var_epi8(0xffff_ffff, code(a, 0), order, code(b, 1));
    let high = _mm512_maskz_permutex2var_epi8(0xffff_ffff << 32, code(c, 2), order, code(d, 3));
    _mm512_or_si512(low, high)
}

/// Where the codes of 32 elements are in two registers of [`widen`], twice.
#[target_feature(enable = "avx512f")]
#[inline]
fn order(bf16: bool) -> __m512i {
    const BF16: [u8; 64] = places(true);
    const F16: [u8; 64] = places(false);
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(if bf16 { &BF16 } else { &F16 }.as_ptr().cast()) }
}

const fn places(bf16: bool) -> [u8; 64] {
    let mut places = [0; 64];
    let mut element = 0_u8;
    while element < 64 {
        let index = element % 32;
        let (register, place) = if bf16 { (index % 2, index / 2) } else { (index / 16, index % 16) };
        places[element as usize] = 64 * register + 4 * place;
        element += 1;
    }
    places
}
