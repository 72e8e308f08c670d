//! AVX-512: 32 dimensions at a time.

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512i, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _mm_and_si128, _mm_cvtsi32_si128, _mm_loadu_si128, _mm_set1_epi8, _mm_sfence, _mm_srl_epi16,
    _mm256_add_epi8, _mm256_and_si256, _mm256_castsi256_si128, _mm256_extracti128_si256,
    _mm256_inserti128_si256, _mm256_loadu_si256, _mm256_mask_add_epi8, _mm256_or_si256,
    _mm256_permutexvar_epi8, _mm256_set1_epi8, _mm256_slli_epi16, _mm256_srli_epi16, _mm256_storeu_si256,
    _mm256_stream_si256, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512,
    _mm512_castsi256_si512, _mm512_castsi512_ps, _mm512_castsi512_si256, _mm512_cmp_ps_mask,
    _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32,
    _mm512_cvtne2ps_pbh, _mm512_cvtps_ph, _mm512_fmadd_ps, _mm512_inserti64x4, _mm512_loadu_ps,
    _mm512_mask_mov_epi32, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_or_si512,
    _mm512_permutex2var_epi16, _mm512_permutexvar_epi16, _mm512_set_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_srli_epi32, _mm512_storeu_si512, _mm512_stream_si512, _mm512_sub_epi32,
};
use std::mem::transmute;

use super::{Job, avx512_crumbs, avx512_nibbles};
use crate::dtype::{E4M3_MAX, F16_MAX, OutDtype};
use crate::packing::Packing;

/// Dimensions that one step writes.
pub(super) const UNIT: usize = 32;

// Ways to narrow, as parameters of functions.
/// To bfloat16 by the CPU's own instruction, which takes subnormals for zero: only where there are none.
const BF16: u8 = 0;
/// To bfloat16, subnormals too.
const BF16_ANY: u8 = 1;
const F16: u8 = 2;
const E4M3: u8 = 3;
/// As [`BF16`], multiplied and added in one: only where no product is rounded, so that the bits are the same.
const BF16_FUSED: u8 = 4;

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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
pub(super) unsafe fn plane(job: &Job<'_>, out: &mut [u8]) {
    // SAFETY: as this function demands.
    unsafe {
        match job.out_dtype {
            OutDtype::Bf16 if job.has_no_subnormals() && job.has_exact_products() => {
                packed::<BF16_FUSED>(job, out);
            }
            OutDtype::Bf16 if job.has_no_subnormals() => packed::<BF16>(job, out),
            OutDtype::Bf16 => packed::<BF16_ANY>(job, out),
            OutDtype::F16 => packed::<F16>(job, out),
            OutDtype::Fp8E4M3 { .. } => packed::<E4M3>(job, out),
        }
    }
}

/// # Safety
/// As [`plane`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
unsafe fn grouped<const OUT: u8, const PACKING: u8>(job: &Job<'_>, out: &mut [u8]) {
    let streaming = job.streams(out, UNIT);
    // SAFETY: as `plane` demands; only aligned stores stream.
    unsafe {
        let whole_units = OUT != E4M3 && PACKING == NIBBLES && (job.head_dim / 2).is_multiple_of(UNIT);
        let whole_crumbs = OUT != E4M3 && PACKING == CRUMBS_BITS && (job.head_dim / 4).is_multiple_of(UNIT);
        match (job.per_channel, streaming) {
            (_, false) if whole_crumbs => avx512_crumbs::plane::<OUT, false>(job, out),
            (_, true) if whole_crumbs => avx512_crumbs::plane::<OUT, true>(job, out),
            (_, false) if whole_units => avx512_nibbles::plane::<OUT, false>(job, out),
            (_, true) if whole_units => avx512_nibbles::plane::<OUT, true>(job, out),
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
    /// One of each for the row: the elements of its codes, 0 to 31.
    Table(__m512i),
    /// One of each for the row.
    Same(__m512, __m512),
    /// Those of each dimension.
    Each(*const f32, *const f32),
}

/// # Safety
/// As [`plane`]; with `STREAMING`, `out` and rows are aligned to what a unit writes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
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
            let (scale, offset) = (_mm512_set1_ps(job.scales[row]), _mm512_set1_ps(job.offsets[row]));
            if PACKING == NIBBLES_NIBBLES { Group::Same(scale, offset) } else { table::<OUT>(scale, offset) }
        };
        let mut write = |codes: __m256i, at: usize| {
            // SAFETY: `at` and the 31 dimensions after it are within the row, as are their scales.
            unsafe { write::<OUT, STREAMING>(codes, at, group, out) }
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

/// The elements of codes 0 to 31.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
#[inline]
fn table<const OUT: u8>(scale: __m512, offset: __m512) -> Group {
    let low = _mm512_set_ps(15., 14., 13., 12., 11., 10., 9., 8., 7., 6., 5., 4., 3., 2., 1., 0.);
    let high = _mm512_add_ps(low, _mm512_set1_ps(16.0));
    let (low, high) = (element::<OUT>(low, scale, offset), element::<OUT>(high, scale, offset));
    Group::Table(narrow::<OUT>(low, high))
}

/// The codes of dimensions `at..at + 32` and `half + at..half + at + 32`.
///
/// # Safety
/// `at + 32 <= half`, and the pointers are at a row's parts.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn add_bits(high: __m256i, plain: *const u8, at: usize) -> __m256i {
    // SAFETY: four bytes.
    let bits = u32::from_le(unsafe { plain.add(at / 8).cast::<u32>().read_unaligned() });
    let doubled = _mm256_add_epi8(high, high);
    _mm256_mask_add_epi8(doubled, bits, doubled, _mm256_set1_epi8(1))
}

/// The codes of dimensions `at..at + 32`.
///
/// # Safety
/// `quarter` is a multiple of 16, `at` of 32, and the pointers are at a row's parts.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn crumbs(section: *const u8, plain: *const u8, at: usize, quarter: usize) -> __m256i {
    let sixteen = |at: usize| -> __m128i {
        #[expect(clippy::cast_possible_wrap, clippy::cast_possible_truncation, reason = "at most 6")]
        let shift = _mm_cvtsi32_si128(2 * (at / quarter) as i32);
        // SAFETY: a quarter has whole units of sixteen.
        let bytes = unsafe { _mm_loadu_si128(section.add(at % quarter).cast()) };
        _mm_and_si128(_mm_srl_epi16(bytes, shift), _mm_set1_epi8(3))
    };
    let high = _mm256_inserti128_si256::<1>(
        std::arch::x86_64::_mm256_castsi128_si256(sixteen(at)),
        sixteen(at + 16),
    );
    // SAFETY: as above.
    unsafe { add_bits(high, plain, at) }
}

/// Writes the elements of 32 codes at dimension `at` of a row.
///
/// # Safety
/// `at + 32` dimensions are in the row; with `STREAMING`, the place is aligned.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
#[inline]
unsafe fn write<const OUT: u8, const STREAMING: bool>(
    codes: __m256i,
    at: usize,
    group: Group,
    out: &mut [u8],
) {
    debug_assert!((at + UNIT) * bytes(OUT) <= out.len());
    let elements = match group {
        Group::Table(table) if OUT == E4M3 => {
            _mm512_castsi256_si512(_mm256_permutexvar_epi8(codes, _mm512_castsi512_si256(table)))
        }
        Group::Table(table) => _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table),
        Group::Same(scale, offset) => compute::<OUT>(codes, [scale; 2], [offset; 2]),
        Group::Each(scales, offsets) => {
            // SAFETY: as many scales and offsets as dimensions.
            let load = |numbers: *const f32| unsafe {
                [_mm512_loadu_ps(numbers.add(at)), _mm512_loadu_ps(numbers.add(at + 16))]
            };
            compute::<OUT>(codes, load(scales), load(offsets))
        }
    };
    // SAFETY: within `out`; aligned if it is to stream.
    unsafe {
        let out = out.as_mut_ptr().add(at * bytes(OUT));
        match (OUT == E4M3, STREAMING) {
            (false, false) => _mm512_storeu_si512(out.cast(), elements),
            (false, true) => _mm512_stream_si512(out.cast(), elements),
            (true, false) => _mm256_storeu_si256(out.cast(), _mm512_castsi512_si256(elements)),
            (true, true) => _mm256_stream_si256(out.cast(), _mm512_castsi512_si256(elements)),
        }
    }
}

/// The elements of 32 codes, from scales and offsets of the first and the last sixteen.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
#[inline]
fn compute<const OUT: u8>(codes: __m256i, scales: [__m512; 2], offsets: [__m512; 2]) -> __m512i {
    let half = |codes: __m128i, half: usize| {
        let codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
        element::<OUT>(codes, scales[half], offsets[half])
    };
    narrow::<OUT>(half(_mm256_castsi256_si128(codes), 0), half(_mm256_extracti128_si256::<1>(codes), 1))
}

/// What codes stand for, before rounding to the type of the destination.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn element<const OUT: u8>(codes: __m512, scales: __m512, offsets: __m512) -> __m512 {
    if OUT == BF16_FUSED {
        _mm512_fmadd_ps(codes, scales, offsets)
    } else {
        _mm512_add_ps(_mm512_mul_ps(codes, scales), offsets)
    }
}

/// Rounds 32 numbers to the type of the destination; for E4M3, into the lower half.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
#[inline]
pub(super) fn narrow<const OUT: u8>(low: __m512, high: __m512) -> __m512i {
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    match OUT {
        // SAFETY: 32 bfloat16 are 64 bytes of any content.
        BF16 | BF16_FUSED => unsafe {
            transmute::<std::arch::x86_64::__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        },
        BF16_ANY => _mm512_permutex2var_epi16(rounded_bf16(low), odd_words(), rounded_bf16(high)),
        F16 => {
            let narrowed = |value| _mm512_cvtps_ph::<NEAREST>(clamped(value, F16_MAX));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(narrowed(low)), narrowed(high))
        }
        _ => {
            let (low, high) = (_mm512_cvtepi32_epi8(e4m3(low)), _mm512_cvtepi32_epi8(e4m3(high)));
            let both = _mm256_inserti128_si256::<1>(std::arch::x86_64::_mm256_castsi128_si256(low), high);
            _mm512_castsi256_si512(both)
        }
    }
}

/// The odd 16-bit words of two registers.
#[target_feature(enable = "avx512f")]
#[inline]
fn odd_words() -> __m512i {
    const WORDS: [u16; 32] = {
        let mut words = [0; 32];
        let mut word = 0;
        while word < 32 {
            words[word as usize] = 2 * word + 1;
            word += 1;
        }
        words
    };
    // SAFETY: 32 numbers of 16 bits are 64 bytes of any content.
    unsafe { transmute::<[u16; 32], __m512i>(WORDS) }
}

/// Numbers whose upper 16 bits are the nearest bfloat16, ties to even.
#[target_feature(enable = "avx512f")]
#[inline]
fn rounded_bf16(value: __m512) -> __m512i {
    let bits = _mm512_castps_si512(value);
    let last = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn clamped(value: __m512, limit: f32) -> __m512 {
    _mm512_max_ps(_mm512_min_ps(value, _mm512_set1_ps(limit)), _mm512_set1_ps(-limit))
}

/// As [`crate::dtype::f32_to_e4m3`], one byte in 32 bits.
#[target_feature(enable = "avx512f")]
#[inline]
fn e4m3(value: __m512) -> __m512i {
    let set = |bits| _mm512_set1_epi32(bits);
    let bits = _mm512_castps_si512(clamped(value, E4M3_MAX));
    let sign = _mm512_and_si512(_mm512_srli_epi32::<24>(bits), set(0x80));
    let magnitude = _mm512_and_si512(bits, set(0x7fff_ffff));
    let float = _mm512_castsi512_ps(magnitude);
    let subnormal = _mm512_sub_epi32(
        _mm512_castps_si512(_mm512_add_ps(float, _mm512_set1_ps(16384.0))),
        set(0x4680_0000),
    );
    let last = _mm512_and_si512(_mm512_srli_epi32::<20>(magnitude), set(1));
    let rounded = _mm512_add_epi32(magnitude, _mm512_add_epi32(last, set(0x7_ffff)));
    let normal = _mm512_srli_epi32::<20>(_mm512_sub_epi32(rounded, set(0x3c00_0000)));
    let is_subnormal = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(float, _mm512_set1_ps(f32::from_bits(0x3c80_0000)));
    _mm512_or_si512(sign, _mm512_mask_mov_epi32(normal, is_subnormal, subnormal))
}
