//! AVX-512 for rows whose halves are whole registers of codes: these are packed where they are, in registers.

use std::arch::x86_64::{
    __m512i, _mm256_or_si256, _mm256_slli_epi16, _mm256_storeu_si256, _mm512_castsi512_si256,
    _mm512_extracti64x4_epi64, _mm512_set1_epi8, _mm512_set1_ps, _mm512_slli_epi16, _mm512_srli_epi16,
    _mm512_storeu_si512, _mm512_ternarylogic_epi32, _mm512_test_epi8_mask,
};

use super::avx512_codes::{Group, UNIT, channels_of, codes_of};
use super::{Groups, Job};
use crate::dtype::Dtype;
use crate::packing::Packing;

/// Tokens whose elements of one channel are quantized together, so that what belongs to the channel is loaded once for all.
const TOKENS: usize = 32;

const NIBBLES: u8 = 0;
const NIBBLES_NIBBLES: u8 = 1;
const NIBBLES_BITS: u8 = 2;
const CRUMBS_BITS: u8 = 3;

/// Whether a job has such rows. Crumbs are packed so only where a half is one register.
pub(super) fn takes(job: &Job<'_>, groups: &Groups) -> bool {
    let half = usize::from(job.shape.head_dim) / 2;
    let whole = if job.packing == Packing::CrumbsAndBits { half == UNIT } else { half.is_multiple_of(UNIT) };
    whole && !groups.must_cut
}

/// Fills both parts with the codes of all elements.
///
/// # Safety
/// The CPU has these features, the job was checked and is taken, and the parts have room for all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
pub(super) unsafe fn write(job: &Job<'_>, groups: &Groups, plain: &mut [u8], section: &mut [u8]) {
    // SAFETY: as this function demands.
    unsafe {
        match job.shape.dtype {
            Dtype::Bf16 => write_packed::<true>(job, groups, plain, section),
            Dtype::F16 => write_packed::<false>(job, groups, plain, section),
        }
    }
}

/// # Safety
/// As [`write`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn write_packed<const BF16: bool>(
    job: &Job<'_>,
    groups: &Groups,
    plain: &mut [u8],
    section: &mut [u8],
) {
    let parts = Parts { plain: plain.as_mut_ptr(), section: section.as_mut_ptr(), packing: job.packing };
    // SAFETY: as `write` demands.
    unsafe {
        match (job.packing, job.per_channel()) {
            (Packing::Nibbles, true) => channels::<BF16, NIBBLES>(job, groups, parts),
            (Packing::Nibbles, false) => rows::<BF16, NIBBLES>(job, groups, parts),
            (Packing::NibblesAndNibbles, true) => channels::<BF16, NIBBLES_NIBBLES>(job, groups, parts),
            (Packing::NibblesAndNibbles, false) => rows::<BF16, NIBBLES_NIBBLES>(job, groups, parts),
            (Packing::NibblesAndBits, true) => channels::<BF16, NIBBLES_BITS>(job, groups, parts),
            (Packing::NibblesAndBits, false) => rows::<BF16, NIBBLES_BITS>(job, groups, parts),
            (Packing::CrumbsAndBits, true) => channels::<BF16, CRUMBS_BITS>(job, groups, parts),
            (Packing::CrumbsAndBits, false) => rows::<BF16, CRUMBS_BITS>(job, groups, parts),
        }
    }
}

/// Tokens whose channels have scales: some tokens of 128 channels, then of the next.
///
/// # Safety
/// As [`write`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn channels<const BF16: bool, const PACKING: u8>(job: &Job<'_>, groups: &Groups, parts: Parts) {
    let (channels, half) = (job.shape.channels(), usize::from(job.shape.head_dim) / 2);
    let tokens = usize::from(job.shape.tokens);
    let (reciprocals, offsets) = (groups.reciprocals.as_ptr(), groups.offsets.as_ptr());
    for first in (0..tokens).step_by(TOKENS) {
        let together = first..(first + TOKENS).min(tokens);
        for head in (0..channels).step_by(2 * half) {
            for at in (0..half).step_by(UNIT) {
                // SAFETY: 64 channels of each half of a row, in all of these tokens.
                unsafe {
                    let (low, high) = (head + at, head + half + at);
                    let low = channels_of::<BF16>(reciprocals.add(low), offsets.add(low));
                    let high = channels_of::<BF16>(reciprocals.add(high), offsets.add(high));
                    for token in together.clone() {
                        let row = token * channels + head;
                        let elements = job.plane.as_ptr().add(2 * (row + at));
                        let codes = halves::<BF16>(elements, half, [low, high]);
                        store::<PACKING>(codes, parts, [row, at, half]);
                    }
                }
            }
        }
    }
}

/// Rows that have each a scale.
///
/// # Safety
/// As [`write`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn rows<const BF16: bool, const PACKING: u8>(job: &Job<'_>, groups: &Groups, parts: Parts) {
    let half = usize::from(job.shape.head_dim) / 2;
    for (index, (&reciprocal, &offset)) in
        groups.reciprocals.iter().zip(&groups.offsets).enumerate().take(job.groups())
    {
        let group =
            Group { reciprocals: [_mm512_set1_ps(reciprocal); 4], offsets: [_mm512_set1_ps(offset); 4] };
        for at in (0..half).step_by(UNIT) {
            let row = index * 2 * half;
            // SAFETY: 64 elements of each half of a row.
            unsafe {
                let codes = halves::<BF16>(job.plane.as_ptr().add(2 * (row + at)), half, [group; 2]);
                store::<PACKING>(codes, parts, [row, at, half]);
            }
        }
    }
}

/// The codes of 64 elements, and of 64 that are `half` elements further.
///
/// # Safety
/// There are these elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
#[inline]
unsafe fn halves<const BF16: bool>(
    elements: *const u8,
    half: usize,
    [low, high]: [Group; 2],
) -> [__m512i; 2] {
    // SAFETY: as this function demands.
    unsafe { [codes_of::<BF16, false>(elements, low), codes_of::<BF16, false>(elements.add(2 * half), high)] }
}

/// Where both parts of the codes go.
#[derive(Clone, Copy)]
struct Parts {
    plain: *mut u8,
    section: *mut u8,
    packing: Packing,
}

/// Packs the codes of dimensions `at..at + 64` and `half + at..half + at + 64` of the row that begins with element `row`.
///
/// # Safety
/// The parts have room for the row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
#[inline]
unsafe fn store<const PACKING: u8>([low, high]: [__m512i; 2], parts: Parts, [row, at, half]: [usize; 3]) {
    // SAFETY: as this function demands.
    unsafe {
        let section = parts.section.add(parts.packing.section_bytes(row) + at);
        let plain = parts.plain.add(parts.packing.plain_bytes(row));
        if matches!(PACKING, NIBBLES_BITS | CRUMBS_BITS) {
            for (codes, at) in [(low, at), (high, half + at)] {
                let bits = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(1));
                plain.add(at / 8).cast::<u64>().write_unaligned(bits.to_le());
            }
        }
        let nibbles = match PACKING {
            NIBBLES => select(low, _mm512_slli_epi16::<4>(high)),
            NIBBLES_NIBBLES => {
                let lowest = select(low, _mm512_slli_epi16::<4>(high));
                _mm512_storeu_si512(plain.add(at).cast(), lowest);
                select(_mm512_srli_epi16::<4>(low), high)
            }
            _ => select(_mm512_srli_epi16::<1>(low), _mm512_slli_epi16::<3>(high)),
        };
        if PACKING != CRUMBS_BITS {
            return _mm512_storeu_si512(section.cast(), nibbles);
        }
        // Of the first and third quarter, and of the second and fourth: bits 1 and 2 of each code, with room between.
        let (first, second) = (_mm512_castsi512_si256(nibbles), _mm512_extracti64x4_epi64::<1>(nibbles));
        _mm256_storeu_si256(section.cast(), _mm256_or_si256(first, _mm256_slli_epi16::<2>(second)));
    }
}

/// The low four bits of each byte of `low`, and the high ones of `high`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn select(low: __m512i, high: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(0x0f), low, high)
}
