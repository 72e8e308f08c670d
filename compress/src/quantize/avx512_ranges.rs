//! AVX-512: ranges of groups, 32 elements at a time.
//!
//! Floats are ordered by size of their bits, those below zero backwards. So three plain comparisons find both ends, whatever the signs: as
//! signed numbers, the largest is the largest element, if any is positive; as unsigned ones, the largest is the smallest element, if any
//! is negative; and the smallest, as unsigned ones, is that end which is not found so when all have one sign.

use std::arch::x86_64::{
    __m128i, __m512i, _MM_HINT_T1, _mm_andnot_si128, _mm_blendv_epi8, _mm_max_epi16, _mm_max_epu16,
    _mm_min_epu16, _mm_movemask_epi8, _mm_prefetch, _mm_srai_epi16, _mm_storeu_si128, _mm256_castsi256_si128,
    _mm256_extracti128_si256, _mm512_castsi512_si256, _mm512_extracti64x4_epi64, _mm512_loadu_epi16,
    _mm512_mask_loadu_epi16, _mm512_mask_storeu_epi16, _mm512_maskz_loadu_epi16, _mm512_max_epi16,
    _mm512_max_epu16, _mm512_min_epu16, _mm512_set1_epi16, _mm512_setzero_si512, _mm512_storeu_epi16,
    _mm512_unpackhi_epi16, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi16,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::{Job, Ranges};

/// Elements in a register.
const UNIT: usize = 32;
/// Tokens that are compared together, so that what was found before is loaded once for all.
const TOKENS: usize = 8;
/// Rows whose ranges are found together: eight results make a register.
pub(super) const ROWS: usize = 8;

/// The sign of each of eight numbers, among the highest bits of their bytes.
const SIGNS: i32 = 0xaaaa;

/// The largest as signed numbers, the largest as unsigned ones, the smallest as unsigned ones.
type Extremes = [__m512i; 3];

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn nothing() -> Extremes {
    [_mm512_set1_epi16(i16::MIN), _mm512_setzero_si512(), _mm512_set1_epi16(-1)]
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn with([signed, largest, lowest]: Extremes, elements: __m512i) -> Extremes {
    [
        _mm512_max_epi16(signed, elements),
        _mm512_max_epu16(largest, elements),
        _mm512_min_epu16(lowest, elements),
    ]
}

/// A mask of the first of 32 elements.
const fn first(count: usize) -> u32 {
    if count >= UNIT { u32::MAX } else { (1 << count) - 1 }
}

/// Takes the ranges of all channels.
///
/// # Safety
/// The CPU has these features, and there are as many ranges as channels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn of_channels(job: &Job<'_>, ranges: &mut Ranges) {
    ranges.most.fill(i16::MIN.cast_unsigned());
    ranges.least.fill(0);
    ranges.lowest.fill(u16::MAX);
    let token_bytes = 2 * job.shape.channels();
    let (several, rest) = job.plane.split_at(job.plane.len() / (TOKENS * token_bytes) * TOKENS * token_bytes);
    // SAFETY: pieces of `TOKENS` tokens and of one.
    unsafe {
        for tokens in several.chunks_exact(TOKENS * token_bytes) {
            channels_of::<TOKENS>(tokens, ranges);
        }
        for token in rest.chunks_exact(token_bytes) {
            channels_of::<1>(token, ranges);
        }
    }
    let Ranges { most, least, lowest } = ranges;
    for ((most, least), &lowest) in most.iter_mut().zip(least).zip(&*lowest) {
        *most = if most.cast_signed() < 0 { lowest } else { *most };
        *least = if least.cast_signed() < 0 { *least } else { lowest };
    }
}

/// Widens the ranges by those of some tokens.
///
/// # Safety
/// The CPU has these features, and there are `TOKENS` tokens of as many elements as there are ranges.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn channels_of<const TOKENS: usize>(tokens: &[u8], Ranges { most, least, lowest }: &mut Ranges) {
    let channels = most.len();
    let places = [most.as_mut_ptr(), least.as_mut_ptr(), lowest.as_mut_ptr()];
    let tokens = tokens.as_ptr().cast::<i16>();
    // SAFETY: whole units below `channels`, then a masked one.
    unsafe {
        for at in (0..channels - channels % UNIT).step_by(UNIT) {
            let places = places.map(|place| place.add(at).cast::<i16>());
            let mut extremes = places.map(|place| _mm512_loadu_epi16(place));
            for token in 0..TOKENS {
                let elements = tokens.add(token * channels + at);
                // The same of the tokens after these: what the CPU fetches in advance are lines that follow each other. Not
                // nearer than the second cache: the first is full.
                _mm_prefetch::<_MM_HINT_T1>(elements.wrapping_add(TOKENS * channels).cast());
                extremes = with(extremes, _mm512_loadu_epi16(elements));
            }
            for (place, extreme) in places.into_iter().zip(extremes) {
                _mm512_storeu_epi16(place, extreme);
            }
        }
        let (at, mask) = (channels - channels % UNIT, first(channels % UNIT));
        let places = places.map(|place| place.add(at).cast::<i16>());
        let mut extremes = places.map(|place| _mm512_maskz_loadu_epi16(mask, place));
        for token in 0..TOKENS {
            extremes = with(extremes, _mm512_maskz_loadu_epi16(mask, tokens.add(token * channels + at)));
        }
        for (place, extreme) in places.into_iter().zip(extremes) {
            _mm512_mask_storeu_epi16(place, mask, extreme);
        }
    }
}

/// Takes the ranges of all head rows.
///
/// # Safety
/// The CPU has these features, and there are as many ranges as rows, at least [`ROWS`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn of_rows(job: &Job<'_>, ranges: &mut Ranges) {
    let (dim, rows) = (usize::from(job.shape.head_dim), ranges.most.len());
    let mut row = 0;
    // SAFETY: `ROWS` rows from `row`, and as many ranges.
    unsafe {
        loop {
            let elements = job.plane.as_ptr().cast::<i16>().add(row * dim);
            let [most, least] = rows_of(elements, dim);
            _mm_storeu_si128(ranges.most.as_mut_ptr().add(row).cast(), most);
            _mm_storeu_si128(ranges.least.as_mut_ptr().add(row).cast(), least);
            if row + ROWS == rows {
                return;
            }
            // The last ones begin earlier, so that they are as many.
            row = (row + ROWS).min(rows - ROWS);
        }
    }
}

/// Largest and smallest elements of [`ROWS`] rows.
///
/// # Safety
/// The CPU has these features, and there are so many rows of `dim` elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn rows_of(elements: *const i16, dim: usize) -> [__m128i; 2] {
    // SAFETY: as this function demands.
    let rows = unsafe { extremes::<false>(elements, dim) };
    let signed = across(rows.map(|row| row[0]), |a, b| _mm512_max_epi16(a, b), |a, b| _mm_max_epi16(a, b));
    let largest = across(rows.map(|row| row[1]), |a, b| _mm512_max_epu16(a, b), |a, b| _mm_max_epu16(a, b));
    if _mm_movemask_epi8(_mm_andnot_si128(signed, largest)) & SIGNS == SIGNS {
        return [signed, largest];
    }
    // A row whose elements have all one sign: hardly ever.
    // SAFETY: as this function demands.
    let rows = unsafe { extremes::<true>(elements, dim) };
    let lowest = across(rows.map(|row| row[2]), |a, b| _mm512_min_epu16(a, b), |a, b| _mm_min_epu16(a, b));
    let most = _mm_blendv_epi8(signed, lowest, _mm_srai_epi16::<15>(signed));
    let least = _mm_blendv_epi8(lowest, largest, _mm_srai_epi16::<15>(largest));
    [most, least]
}

/// The extremes of each column of 32 of each row; the last kind only if asked for.
///
/// # Safety
/// As [`rows_of`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn extremes<const LOWEST: bool>(elements: *const i16, dim: usize) -> [Extremes; ROWS] {
    let mut rows = [nothing(); ROWS];
    for (index, row) in rows.iter_mut().enumerate() {
        let mut add = |elements| {
            let with = with(*row, elements);
            *row = if LOWEST { with } else { [with[0], with[1], row[2]] };
        };
        // SAFETY: whole units within the row, then a masked one, filled up with an element of the row.
        unsafe {
            let elements = elements.add(index * dim);
            for at in (0..dim - dim % UNIT).step_by(UNIT) {
                add(_mm512_loadu_epi16(elements.add(at)));
            }
            if !dim.is_multiple_of(UNIT) {
                let any = _mm512_set1_epi16(elements.read_unaligned());
                let rest = elements.add(dim - dim % UNIT);
                add(_mm512_mask_loadu_epi16(any, first(dim % UNIT), rest));
            }
        }
    }
    rows
}

/// What `pick` leaves of each of eight registers: of 32 numbers one.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn across(
    [a, b, c, d, e, f, g, h]: [__m512i; ROWS],
    pick: impl Fn(__m512i, __m512i) -> __m512i,
    pick_of_eight: impl Fn(__m128i, __m128i) -> __m128i,
) -> __m128i {
    let by_1 = |a, b| pick(_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
    let by_2 = |a, b| pick(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let by_4 = |a, b| pick(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    // Each sixteen bytes then have eight numbers, one of each register.
    let eights = by_4(by_2(by_1(a, b), by_1(c, d)), by_2(by_1(e, f), by_1(g, h)));
    let (low, high) = (_mm512_castsi512_si256(eights), _mm512_extracti64x4_epi64::<1>(eights));
    let four = [
        _mm256_castsi256_si128(low),
        _mm256_extracti128_si256::<1>(low),
        _mm256_castsi256_si128(high),
        _mm256_extracti128_si256::<1>(high),
    ];
    pick_of_eight(pick_of_eight(four[0], four[1]), pick_of_eight(four[2], four[3]))
}
