//! AVX-512 for `int4`'s packing and 16-bit elements, where whole registers of codes make up the halves of a row: 64 codes from 32 bytes.

use std::arch::x86_64::{
    __m512, __m512i, _mm_loadu_si128, _mm256_loadu_si256, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32,
    _mm512_loadu_ps, _mm512_permutexvar_epi16, _mm512_permutexvar_ps, _mm512_set_ps, _mm512_set1_ps,
    _mm512_srli_epi16, _mm512_srli_epi32, _mm512_storeu_si512, _mm512_stream_si512,
};

use super::Job;
use super::avx512::{UNIT, element, narrow};

/// Tokens whose elements of one channel are computed together, so that its scale and offset are loaded once for all.
const TOKENS: usize = 4;

/// Writes the plane to `out`.
///
/// # Safety
/// The CPU has these features; the job's sizes agree with `out`; `out` has 16-bit elements, codes are nibbles, and half a row
/// is a multiple of [`UNIT`]; with `STREAMING`, `out` is aligned to 64 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
pub(super) unsafe fn plane<const OUT: u8, const STREAMING: bool>(job: &Job<'_>, out: &mut [u8]) {
    // SAFETY: as this function demands; where scales are those of channels, all tokens have the same.
    unsafe {
        if !job.per_channel {
            return rows::<OUT, STREAMING>(job, out);
        }
        let token_bytes = 2 * job.scales.len();
        let (several, rest) = out.split_at_mut(out.len() / (TOKENS * token_bytes) * TOKENS * token_bytes);
        let section = job.section.as_ptr();
        channels::<OUT, STREAMING, TOKENS>(job, section, several);
        channels::<OUT, STREAMING, 1>(job, section.add(several.len() / 4), rest);
    }
}

/// Rows that each have one scale: the elements of the sixteen codes are computed and then looked up.
///
/// # Safety
/// As [`plane`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
unsafe fn rows<const OUT: u8, const STREAMING: bool>(job: &Job<'_>, out: &mut [u8]) {
    let half = job.head_dim / 2;
    let groups = job.scales.iter().zip(job.offsets);
    for ((row, out), (&scale, &offset)) in out.chunks_exact_mut(4 * half).enumerate().zip(groups) {
        let elements = element::<OUT>(all_codes(), _mm512_set1_ps(scale), _mm512_set1_ps(offset));
        // Twice, so that of 16 bits the lowest four count and the next doesn't matter.
        let table = narrow::<OUT>(elements, elements);
        for at in (0..half).step_by(UNIT) {
            // SAFETY: 32 bytes of this row's, and two stores within it, aligned if they stream.
            unsafe {
                let bytes = _mm256_loadu_si256(job.section.as_ptr().add(row * half + at).cast());
                let codes = _mm512_cvtepu8_epi16(bytes);
                let out = out.as_mut_ptr();
                store::<STREAMING>(out.add(2 * at), _mm512_permutexvar_epi16(codes, table));
                let codes = _mm512_srli_epi16::<4>(codes);
                store::<STREAMING>(out.add(2 * (half + at)), _mm512_permutexvar_epi16(codes, table));
            }
        }
    }
}

/// Tokens whose channels each have a scale, some tokens at a time.
///
/// # Safety
/// As [`plane`]; `section` is at the bytes of the tokens of `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
#[inline]
unsafe fn channels<const OUT: u8, const STREAMING: bool, const TOKENS: usize>(
    job: &Job<'_>,
    section: *const u8,
    out: &mut [u8],
) {
    let (channels, half) = (job.scales.len(), job.head_dim / 2);
    for (tokens, out) in out.chunks_exact_mut(TOKENS * 2 * channels).enumerate() {
        // SAFETY: `TOKENS * channels` nibbles a turn, as many elements, and a scale and an offset for each channel.
        unsafe {
            let section = section.add(tokens * TOKENS * channels / 2);
            for first in (0..channels).step_by(2 * half) {
                for at in (first..first + half).step_by(UNIT) {
                    let four = |numbers: &[f32]| {
                        let [low, high] = [at, at + half].map(|at| numbers.as_ptr().add(at));
                        [
                            [_mm512_loadu_ps(low), _mm512_loadu_ps(low.add(16))],
                            [_mm512_loadu_ps(high), _mm512_loadu_ps(high.add(16))],
                        ]
                    };
                    let (scales, offsets) = (four(job.scales), four(job.offsets));
                    for token in 0..TOKENS {
                        let section = section.add(token * channels / 2 + first / 2 + (at - first));
                        let out = out.as_mut_ptr().add(2 * (token * channels + at));
                        let [low, high] = sixty_four::<OUT>(section, scales, offsets);
                        store::<STREAMING>(out, low);
                        store::<STREAMING>(out.add(2 * half), high);
                    }
                }
            }
        }
    }
}

/// The elements of the low and of the high nibbles of 32 bytes, with a scale and an offset for each.
///
/// # Safety
/// `section` has 32 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
#[inline]
unsafe fn sixty_four<const OUT: u8>(
    section: *const u8,
    [low_scales, high_scales]: [[__m512; 2]; 2],
    [low_offsets, high_offsets]: [[__m512; 2]; 2],
) -> [__m512i; 2] {
    let [mut low, mut high] = [[_mm512_set1_ps(0.0); 2]; 2];
    for part in 0..2 {
        // SAFETY: sixteen bytes each.
        let codes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(section.add(16 * part).cast()) });
        // As a place to look up in sixteen numbers, only the lowest four bits count.
        let low_codes = _mm512_permutexvar_ps(codes, all_codes());
        let high_codes = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), all_codes());
        low[part] = element::<OUT>(low_codes, low_scales[part], low_offsets[part]);
        high[part] = element::<OUT>(high_codes, high_scales[part], high_offsets[part]);
    }
    [narrow::<OUT>(low[0], low[1]), narrow::<OUT>(high[0], high[1])]
}

/// Codes 0 to 15.
#[target_feature(enable = "avx512f")]
#[inline]
fn all_codes() -> __m512 {
    _mm512_set_ps(15., 14., 13., 12., 11., 10., 9., 8., 7., 6., 5., 4., 3., 2., 1., 0.)
}

/// # Safety
/// `out` has 64 bytes, aligned with `STREAMING`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn store<const STREAMING: bool>(out: *mut u8, elements: __m512i) {
    // SAFETY: as this function demands.
    unsafe {
        if STREAMING {
            _mm512_stream_si512(out.cast(), elements);
        } else {
            _mm512_storeu_si512(out.cast(), elements);
        }
    }
}
