//! AVX2 with F16C: 32 dimensions at a time.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_LT_OQ, _MM_FROUND_TO_NEAREST_INT, _mm_and_si128, _mm_cvtsi32_si128,
    _mm_loadu_si128, _mm_set1_epi8, _mm_sfence, _mm_srl_epi16, _mm_srli_si128, _mm256_add_epi8,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_blendv_epi8, _mm256_broadcastsi128_si256,
    _mm256_castps_si256, _mm256_castsi128_si256, _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmp_ps,
    _mm256_cmpeq_epi8, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi32, _mm256_cvtps_ph, _mm256_extracti128_si256,
    _mm256_inserti128_si256, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_max_ps, _mm256_min_ps,
    _mm256_mul_ps, _mm256_or_si256, _mm256_packus_epi16, _mm256_packus_epi32, _mm256_permute2x128_si256,
    _mm256_permute4x64_epi64, _mm256_set_ps, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_set1_epi64x,
    _mm256_set1_ps, _mm256_setr_epi8, _mm256_shuffle_epi8, _mm256_slli_epi16, _mm256_srli_epi16,
    _mm256_srli_epi32, _mm256_storeu_si256, _mm256_stream_si256, _mm256_sub_epi8, _mm256_sub_epi32,
    _mm256_unpackhi_epi8, _mm256_unpacklo_epi8,
};

use super::Job;
use crate::dtype::{E4M3_MAX, F16_MAX, OutDtype};
use crate::packing::Packing;

/// Dimensions that one step writes.
pub(super) const UNIT: usize = 32;

// Ways to narrow, as parameters of functions.
const BF16: u8 = 0;
const F16: u8 = 1;
const E4M3: u8 = 2;

const NIBBLES: u8 = 0;
const NIBBLES_NIBBLES: u8 = 1;
const NIBBLES_BITS: u8 = 2;
const CRUMBS_BITS: u8 = 3;

/// Bytes of one element.
const fn bytes(out: u8) -> usize {
    if out == E4M3 { 1 } else { 2 }
}

/// Writes the plane to `out`.
///
/// # Safety
/// The CPU has these features; the job's sizes agree with `out`, and its rows have units of 32.
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn plane(job: &Job<'_>, out: &mut [u8]) {
    // SAFETY: as this function demands.
    unsafe {
        match job.out_dtype {
            OutDtype::Bf16 => packed::<BF16>(job, out),
            OutDtype::F16 => packed::<F16>(job, out),
            OutDtype::Fp8E4M3 { .. } => packed::<E4M3>(job, out),
        }
    }
}

/// # Safety
/// As [`plane`].
#[target_feature(enable = "avx2,f16c")]
unsafe fn packed<const OUT: u8>(job: &Job<'_>, out: &mut [u8]) {
    // SAFETY: as `plane` demands.
    unsafe {
        match job.packing {
            Packing::Nibbles => grouped::<OUT, NIBBLES>(job, out),
            Packing::NibblesAndNibbles => grouped::<OUT, NIBBLES_NIBBLES>(job, out),
            Packing::NibblesAndBits => grouped::<OUT, NIBBLES_BITS>(job, out),
            Packing::CrumbsAndBits => grouped::<OUT, CRUMBS_BITS>(job, out),
        }
    }
}

/// # Safety
/// As [`plane`].
#[target_feature(enable = "avx2,f16c")]
unsafe fn grouped<const OUT: u8, const PACKING: u8>(job: &Job<'_>, out: &mut [u8]) {
    let streaming = job.streams(out, UNIT);
    // SAFETY: as `plane` demands; only aligned stores stream.
    unsafe {
        match (job.per_channel, streaming) {
            (true, false) => rows::<OUT, PACKING, true, false>(job, out),
            (true, true) => rows::<OUT, PACKING, true, true>(job, out),
            (false, false) => rows::<OUT, PACKING, false, false>(job, out),
            (false, true) => rows::<OUT, PACKING, false, true>(job, out),
        }
    }
    if streaming {
        // Streamed stores are ordered with nothing: before others are told of the plane, it must be written.
        _mm_sfence();
    }
}

/// Scales and offsets of one head row.
#[derive(Clone, Copy)]
enum Group {
    /// One of each for the row: low and high bytes of the elements of codes 0 to 15 and of codes 16 to 31, each
    /// sixteen twice.
    Table([__m256i; 2], [__m256i; 2]),
    /// One of each for the row.
    Same(__m256, __m256),
    /// Those of each dimension.
    Each(*const f32, *const f32),
}

/// # Safety
/// As [`plane`]; with `STREAMING`, `out` and rows are aligned to what a unit writes.
#[target_feature(enable = "avx2,f16c")]
unsafe fn rows<const OUT: u8, const PACKING: u8, const PER_CHANNEL: bool, const STREAMING: bool>(
    job: &Job<'_>,
    out: &mut [u8],
) {
    let dim = job.head_dim;
    let (plain_bytes, section_bytes) = (job.packing.plain_bytes(dim), job.packing.section_bytes(dim));
    let (mut plain, mut section) = (job.plain.as_ptr(), job.section.as_ptr());
    let mut first = 0;
    for (row, out) in out.chunks_exact_mut(dim * bytes(OUT)).enumerate() {
        let group = if PER_CHANNEL {
            let group = Group::Each(job.scales[first..].as_ptr(), job.offsets[first..].as_ptr());
            first += dim;
            first = if first == job.scales.len() { 0 } else { first };
            group
        } else {
            let (scale, offset) = (_mm256_set1_ps(job.scales[row]), _mm256_set1_ps(job.offsets[row]));
            if PACKING == NIBBLES_NIBBLES {
                Group::Same(scale, offset)
            } else {
                table::<OUT>(scale, offset, PACKING == NIBBLES_BITS)
            }
        };
        let mut write = |codes: __m256i, at: usize| {
            // SAFETY: `at` and the 31 dimensions after it are within the row, as are their scales.
            unsafe { write::<OUT, PACKING, STREAMING>(codes, at, group, out) }
        };
        // SAFETY: the pointers are at this row's bytes of both parts, and rows have units.
        unsafe {
            if PACKING == CRUMBS_BITS {
                for at in (0..dim).step_by(UNIT) {
                    write(crumbs(section, plain, at, dim / 4), at);
                }
            } else {
                let half = dim / 2;
                let mut at = 0;
                loop {
                    let (low, high) = nibbles::<PACKING>(section, plain, at, half);
                    write(low, at);
                    write(high, half + at);
                    if at + UNIT == half {
                        break;
                    }
                    at = (at + UNIT).min(half - UNIT);
                }
            }
            plain = plain.add(plain_bytes);
            section = section.add(section_bytes);
        }
    }
}

/// The elements of codes 0 to 15, and with `more` of codes 16 to 31.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn table<const OUT: u8>(scale: __m256, offset: __m256, more: bool) -> Group {
    let sixteen = |first: f32| -> [__m256i; 2] {
        let codes = _mm256_add_ps(_mm256_set_ps(7., 6., 5., 4., 3., 2., 1., 0.), _mm256_set1_ps(first));
        let element = |codes| _mm256_add_ps(_mm256_mul_ps(codes, scale), offset);
        let words = narrow::<OUT>(element(codes), element(_mm256_add_ps(codes, _mm256_set1_ps(8.0))));
        // The low bytes of sixteen words, then their high bytes: gathered within each half, then across.
        let order = _mm256_setr_epi8(
            0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9,
            11, 13, 15,
        );
        let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_shuffle_epi8(words, order));
        [
            _mm256_broadcastsi128_si256(_mm256_castsi256_si128(bytes)),
            _mm256_broadcastsi128_si256(_mm256_extracti128_si256::<1>(bytes)),
        ]
    };
    let low = sixteen(0.0);
    Group::Table(low, if more { sixteen(16.0) } else { low })
}

/// The codes of dimensions `at..at + 32` and `half + at..half + at + 32`.
///
/// # Safety
/// `at + 32 <= half`, and the pointers are at a row's parts.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn nibbles<const PACKING: u8>(
    section: *const u8,
    plain: *const u8,
    at: usize,
    half: usize,
) -> (__m256i, __m256i) {
    let mask = _mm256_set1_epi8(0x0f);
    // SAFETY: `half` bytes of nibbles, `2 * half / 8` bytes of bits.
    unsafe {
        let section = _mm256_loadu_si256(section.add(at).cast());
        let low = _mm256_and_si256(section, mask);
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(section), mask);
        match PACKING {
            NIBBLES => (low, high),
            NIBBLES_NIBBLES => {
                let plain = _mm256_loadu_si256(plain.add(at).cast());
                let plain_low = _mm256_and_si256(plain, mask);
                let plain_high = _mm256_and_si256(_mm256_srli_epi16::<4>(plain), mask);
                let section_high = _mm256_slli_epi16::<4>(high);
                (
                    _mm256_or_si256(_mm256_slli_epi16::<4>(low), plain_low),
                    _mm256_or_si256(section_high, plain_high),
                )
            }
            _ => (add_bits(low, plain, at), add_bits(high, plain, half + at)),
        }
    }
}

/// Twice these numbers, plus a bit each.
///
/// # Safety
/// `plain` has the bits `at..at + 32`, and `at` is a multiple of 8.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn add_bits(high: __m256i, plain: *const u8, at: usize) -> __m256i {
    // SAFETY: four bytes.
    let bits = i32::from_le(unsafe { plain.add(at / 8).cast::<i32>().read_unaligned() });
    let spread = _mm256_setr_epi8(
        0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3,
    );
    let each = _mm256_set1_epi64x(i64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]));
    let bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread), each);
    // A set bit compares as -1.
    _mm256_sub_epi8(_mm256_add_epi8(high, high), _mm256_cmpeq_epi8(bits, each))
}

/// The codes of dimensions `at..at + 32`.
///
/// # Safety
/// `quarter` is a multiple of 16, `at` of 32, and the pointers are at a row's parts.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn crumbs(section: *const u8, plain: *const u8, at: usize, quarter: usize) -> __m256i {
    let sixteen = |at: usize| -> __m128i {
        #[expect(clippy::cast_possible_wrap, clippy::cast_possible_truncation, reason = "at most 6")]
        let shift = _mm_cvtsi32_si128(2 * (at / quarter) as i32);
        // SAFETY: a quarter has whole units of sixteen.
        let bytes = unsafe { _mm_loadu_si128(section.add(at % quarter).cast()) };
        _mm_and_si128(_mm_srl_epi16(bytes, shift), _mm_set1_epi8(3))
    };
    let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(sixteen(at)), sixteen(at + 16));
    // SAFETY: as above.
    unsafe { add_bits(high, plain, at) }
}

/// Writes the elements of 32 codes at dimension `at` of a row.
///
/// # Safety
/// `at + 32` dimensions are in the row; with `STREAMING`, the place is aligned.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn write<const OUT: u8, const PACKING: u8, const STREAMING: bool>(
    codes: __m256i,
    at: usize,
    group: Group,
    out: &mut [u8],
) {
    debug_assert!((at + UNIT) * bytes(OUT) <= out.len());
    let [first, second] = match group {
        Group::Table(low, high) => look_up::<OUT, PACKING>(codes, low, high),
        Group::Same(scale, offset) => compute::<OUT>(codes, [scale; 4], [offset; 4]),
        Group::Each(scales, offsets) => {
            // SAFETY: as many scales and offsets as dimensions.
            let load = |numbers: *const f32| unsafe {
                let eight = |eighth: usize| _mm256_loadu_ps(numbers.add(at + 8 * eighth));
                [eight(0), eight(1), eight(2), eight(3)]
            };
            compute::<OUT>(codes, load(scales), load(offsets))
        }
    };
    // SAFETY: within `out`; aligned if it is to stream.
    unsafe {
        let out = out.as_mut_ptr().add(at * bytes(OUT)).cast::<__m256i>();
        if STREAMING {
            _mm256_stream_si256(out, first);
        } else {
            _mm256_storeu_si256(out, first);
        }
        match (OUT == E4M3, STREAMING) {
            (true, _) => (),
            (false, true) => _mm256_stream_si256(out.add(1), second),
            (false, false) => _mm256_storeu_si256(out.add(1), second),
        }
    }
}

/// The elements of 32 codes, from the bytes of those of all codes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn look_up<const OUT: u8, const PACKING: u8>(
    codes: __m256i,
    low: [__m256i; 2],
    high: [__m256i; 2],
) -> [__m256i; 2] {
    let bytes = |index: usize| {
        // Shuffles look at the lowest four bits of an index, and at the highest, which is 0.
        let below = _mm256_shuffle_epi8(low[index], codes);
        if PACKING != NIBBLES_BITS {
            return below;
        }
        let above = _mm256_shuffle_epi8(high[index], _mm256_and_si256(codes, _mm256_set1_epi8(0x0f)));
        _mm256_blendv_epi8(below, above, _mm256_slli_epi16::<3>(codes))
    };
    let low_bytes = bytes(0);
    if OUT == E4M3 {
        return [low_bytes; 2];
    }
    let high_bytes = bytes(1);
    // Interleaving works within the halves of a register: elements 0..8 and 16..24, 8..16 and 24..32.
    let (even, odd) =
        (_mm256_unpacklo_epi8(low_bytes, high_bytes), _mm256_unpackhi_epi8(low_bytes, high_bytes));
    [_mm256_permute2x128_si256::<0x20>(even, odd), _mm256_permute2x128_si256::<0x31>(even, odd)]
}

/// The elements of 32 codes, from scales and offsets of each eight; those of E4M3 are in the first register.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn compute<const OUT: u8>(codes: __m256i, scales: [__m256; 4], offsets: [__m256; 4]) -> [__m256i; 2] {
    let (low, high) = (_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
    let eights = [low, _mm_srli_si128::<8>(low), high, _mm_srli_si128::<8>(high)];
    let element = |eighth: usize| {
        let code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eights[eighth]));
        _mm256_add_ps(_mm256_mul_ps(code, scales[eighth]), offsets[eighth])
    };
    let (first, second) = (narrow::<OUT>(element(0), element(1)), narrow::<OUT>(element(2), element(3)));
    if OUT != E4M3 {
        return [first, second];
    }
    let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(first, second));
    [packed; 2]
}

/// Rounds sixteen numbers to the type of the destination, 16 bits each; an E4M3 is in the low byte.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn narrow<const OUT: u8>(low: __m256, high: __m256) -> __m256i {
    let pack = |low, high| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(low, high));
    match OUT {
        BF16 => pack(bf16(low), bf16(high)),
        F16 => {
            let narrowed = |value| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(clamped(value, F16_MAX));
            _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(narrowed(low)), narrowed(high))
        }
        _ => pack(e4m3(low), e4m3(high)),
    }
}

/// The nearest bfloat16, ties to even, in 32 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn bf16(value: __m256) -> __m256i {
    let bits = _mm256_castps_si256(value);
    let last = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    _mm256_srli_epi32::<16>(rounded)
}

#[target_feature(enable = "avx2")]
#[inline]
fn clamped(value: __m256, limit: f32) -> __m256 {
    _mm256_max_ps(_mm256_min_ps(value, _mm256_set1_ps(limit)), _mm256_set1_ps(-limit))
}

/// As [`crate::dtype::f32_to_e4m3`], one byte in 32 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn e4m3(value: __m256) -> __m256i {
    let set = |bits| _mm256_set1_epi32(bits);
    let bits = _mm256_castps_si256(clamped(value, E4M3_MAX));
    let sign = _mm256_and_si256(_mm256_srli_epi32::<24>(bits), set(0x80));
    let magnitude = _mm256_and_si256(bits, set(0x7fff_ffff));
    let float = _mm256_castsi256_ps(magnitude);
    let subnormal = _mm256_sub_epi32(
        _mm256_castps_si256(_mm256_add_ps(float, _mm256_set1_ps(16384.0))),
        set(0x4680_0000),
    );
    let last = _mm256_and_si256(_mm256_srli_epi32::<20>(magnitude), set(1));
    let rounded = _mm256_add_epi32(magnitude, _mm256_add_epi32(last, set(0x7_ffff)));
    let normal = _mm256_srli_epi32::<20>(_mm256_sub_epi32(rounded, set(0x3c00_0000)));
    let is_subnormal =
        _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(float, _mm256_set1_ps(f32::from_bits(0x3c80_0000))));
    _mm256_or_si256(sign, _mm256_blendv_epi8(normal, subnormal, is_subnormal))
}
