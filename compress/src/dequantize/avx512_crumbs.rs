//! AVX-512 for `int3`'s packing and 16-bit elements, where quarters of a row have whole registers of elements. A code's lowest bit, which
//! lies apart, is a bit of a mask that says in which of two tables its other two are looked up; neither look-up minds the bits beside them.

use std::arch::x86_64::{
    __m512, _mm_loadu_si128, _mm256_loadu_si256, _mm512_add_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32,
    _mm512_loadu_ps, _mm512_mask_permutexvar_epi16, _mm512_mask_permutexvar_ps, _mm512_permutexvar_epi16,
    _mm512_permutexvar_ps, _mm512_set1_ps, _mm512_set4_ps, _mm512_srli_epi16, _mm512_srli_epi32,
};

use super::Job;
use super::avx512::{UNIT, element, narrow};
use super::avx512_nibbles::store;

/// Tokens whose elements of one channel are computed together, so that its scale and offset are loaded once for all.
const TOKENS: usize = 4;

/// Writes the plane to `out`.
///
/// # Safety
/// The CPU has these features; the job's sizes agree with `out`; `out` has 16-bit elements, codes are crumbs and bits, and a quarter of a
/// row is a multiple of [`UNIT`]; with `STREAMING`, `out` is aligned to 64 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
pub(super) unsafe fn plane<const OUT: u8, const STREAMING: bool>(job: &Job<'_>, out: &mut [u8]) {
    let (dim, rows) = (job.head_dim, out.len() / 2 / job.head_dim);
    // Once: several rows are written in turn.
    let out = out.as_mut_ptr();
    // SAFETY: as this function demands: so many rows, and so many tokens.
    unsafe {
        if !job.per_channel {
            for row in 0..rows {
                let place = Place::of(job, out, row * dim);
                row_of::<OUT, STREAMING>(place, dim / 4, job.scales[row], job.offsets[row]);
            }
            return;
        }
        let tokens = rows * dim / job.scales.len();
        let mut token = 0;
        while token + TOKENS <= tokens {
            channels::<OUT, STREAMING, TOKENS>(job, token, out);
            token += TOKENS;
        }
        for token in token..tokens {
            channels::<OUT, STREAMING, 1>(job, token, out);
        }
    }
}

/// Where a row's codes are and its elements go.
#[derive(Clone, Copy)]
struct Place {
    section: *const u8,
    plain: *const u8,
    out: *mut u8,
}

impl Place {
    /// # Safety
    /// A row begins with this element.
    #[inline]
    unsafe fn of(job: &Job<'_>, out: *mut u8, element: usize) -> Self {
        // SAFETY: as this function demands.
        unsafe {
            Self {
                section: job.section.as_ptr().add(element / 4),
                plain: job.plain.as_ptr().add(element / 8),
                out: out.add(2 * element),
            }
        }
    }

    /// The lowest bits of 32 codes from dimension `at`.
    ///
    /// # Safety
    /// The row has these.
    #[inline]
    unsafe fn bits(self, at: usize) -> u32 {
        // SAFETY: four bytes.
        u32::from_le(unsafe { self.plain.add(at / 8).cast::<u32>().read_unaligned() })
    }
}

/// A row that has one scale: the elements of the eight codes are computed and then looked up.
///
/// # Safety
/// As [`plane`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
#[inline]
unsafe fn row_of<const OUT: u8, const STREAMING: bool>(
    place: Place,
    quarter: usize,
    scale: f32,
    offset: f32,
) {
    let (scale, offset) = (_mm512_set1_ps(scale), _mm512_set1_ps(offset));
    let (even, odd) = (element::<OUT>(even(), scale, offset), element::<OUT>(odd(), scale, offset));
    let (even, odd) = (narrow::<OUT>(even, even), narrow::<OUT>(odd, odd));
    for at in (0..quarter).step_by(UNIT) {
        // SAFETY: 32 bytes of the row's, and a store in each quarter, aligned if they stream.
        unsafe {
            let bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(place.section.add(at).cast()));
            let quarters = [
                bytes,
                _mm512_srli_epi16::<2>(bytes),
                _mm512_srli_epi16::<4>(bytes),
                _mm512_srli_epi16::<6>(bytes),
            ];
            for (part, crumbs) in quarters.into_iter().enumerate() {
                let at = part * quarter + at;
                let elements = _mm512_permutexvar_epi16(crumbs, even);
                let elements = _mm512_mask_permutexvar_epi16(elements, place.bits(at), crumbs, odd);
                store::<STREAMING>(place.out.add(2 * at), elements);
            }
        }
    }
}

/// Some tokens whose channels each have a scale.
///
/// # Safety
/// As [`plane`]; there are so many tokens from `token`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
#[inline]
unsafe fn channels<const OUT: u8, const STREAMING: bool, const TOKENS: usize>(
    job: &Job<'_>,
    token: usize,
    out: *mut u8,
) {
    let (channels, quarter) = (job.scales.len(), job.head_dim / 4);
    for first in (0..channels).step_by(job.head_dim) {
        for at in (0..quarter).step_by(UNIT) {
            // SAFETY: 32 channels of each quarter of a row, in all of these tokens.
            unsafe {
                let places =
                    std::array::from_fn(|index| Place::of(job, out, (token + index) * channels + first));
                let (scales, offsets) = (job.scales.as_ptr().add(first), job.offsets.as_ptr().add(first));
                quarter_of::<OUT, STREAMING, TOKENS, 0>(places, scales, offsets, at, quarter);
                quarter_of::<OUT, STREAMING, TOKENS, 1>(places, scales, offsets, at, quarter);
                quarter_of::<OUT, STREAMING, TOKENS, 2>(places, scales, offsets, at, quarter);
                quarter_of::<OUT, STREAMING, TOKENS, 3>(places, scales, offsets, at, quarter);
            }
        }
    }
}

/// 32 channels of one quarter of a row, in some tokens.
///
/// # Safety
/// As [`plane`]; the places are those of rows, scales and offsets those of a row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
#[inline]
unsafe fn quarter_of<const OUT: u8, const STREAMING: bool, const TOKENS: usize, const PART: usize>(
    places: [Place; TOKENS],
    scales: *const f32,
    offsets: *const f32,
    crumbs_at: usize,
    quarter: usize,
) {
    let at = PART * quarter + crumbs_at;
    // SAFETY: 32 numbers, sixteen bytes twice, and a store within the row.
    unsafe {
        let (scale, next_scale) = (_mm512_loadu_ps(scales.add(at)), _mm512_loadu_ps(scales.add(at + 16)));
        let (offset, next_offset) = (_mm512_loadu_ps(offsets.add(at)), _mm512_loadu_ps(offsets.add(at + 16)));
        for place in places {
            let [a, b, c, d] = place.bits(at).to_le_bytes();
            let crumbs = place.section.add(crumbs_at);
            let codes = sixteen::<PART>(crumbs, u16::from_le_bytes([a, b]));
            let next = sixteen::<PART>(crumbs.add(16), u16::from_le_bytes([c, d]));
            let elements = narrow::<OUT>(
                element::<OUT>(codes, scale, offset),
                element::<OUT>(next, next_scale, next_offset),
            );
            store::<STREAMING>(place.out.add(2 * at), elements);
        }
    }
}

/// Sixteen codes, of one crumb of each byte and a bit each.
///
/// # Safety
/// Sixteen bytes.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn sixteen<const PART: usize>(crumbs: *const u8, bits: u16) -> __m512 {
    // SAFETY: as this function demands.
    let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(crumbs.cast()) });
    let crumbs = match PART {
        0 => bytes,
        1 => _mm512_srli_epi32::<2>(bytes),
        2 => _mm512_srli_epi32::<4>(bytes),
        _ => _mm512_srli_epi32::<6>(bytes),
    };
    // As places to look up in sixteen numbers, four times the same four, only the lowest two bits count.
    _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(crumbs, even()), bits, crumbs, odd())
}

/// Codes 0, 2, 4 and 6, four times.
#[target_feature(enable = "avx512f")]
#[inline]
fn even() -> __m512 {
    _mm512_set4_ps(6.0, 4.0, 2.0, 0.0)
}

/// The codes after those.
#[target_feature(enable = "avx512f")]
#[inline]
fn odd() -> __m512 {
    _mm512_add_ps(even(), _mm512_set1_ps(1.0))
}
