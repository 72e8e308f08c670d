//! AVX-512: packing of codes, 32 bytes at a time where parts of a row have whole units of them.

use std::arch::x86_64::{
    __m256i, _mm256_loadu_si256, _mm256_mask_storeu_epi8, _mm256_maskz_loadu_epi8, _mm256_set1_epi8,
    _mm256_slli_epi16, _mm256_srli_epi16, _mm256_storeu_si256, _mm256_ternarylogic_epi32, _mm512_loadu_si512,
    _mm512_maskz_loadu_epi8, _mm512_set1_epi8, _mm512_test_epi8_mask,
};

use crate::packing::Packing;

/// Bytes that are packed at a time.
const UNIT: usize = 32;

/// As [`Packing::pack`], of `pieces` of `piece` codes whose beginnings are `stride` bytes apart.
///
/// # Safety
/// The CPU has these features, `codes` has these pieces, each has whole rows of `dim`, and the parts have room for exactly their bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack(
    packing: Packing,
    codes: *const u8,
    [pieces, piece, stride]: [usize; 3],
    dim: usize,
    plain: &mut [u8],
    section: &mut [u8],
) {
    let (mut plain, mut section) = (plain.as_mut_ptr(), section.as_mut_ptr());
    let (plain_bytes, section_bytes) = (packing.plain_bytes(dim), packing.section_bytes(dim));
    for first in (0..pieces).map(|index| index * stride) {
        for row in (first..first + piece).step_by(dim) {
            // SAFETY: a row, and both of its parts.
            unsafe {
                let row = codes.add(row);
                match packing {
                    Packing::Nibbles => nibbles::<0>(row, dim, section),
                    Packing::NibblesAndNibbles => {
                        nibbles::<0>(row, dim, plain);
                        nibbles::<4>(row, dim, section);
                    }
                    Packing::NibblesAndBits => {
                        bits(row, dim, plain);
                        nibbles::<1>(row, dim, section);
                    }
                    Packing::CrumbsAndBits => {
                        bits(row, dim, plain);
                        crumbs(row, dim, section);
                    }
                }
                plain = plain.add(plain_bytes);
                section = section.add(section_bytes);
            }
        }
    }
}

/// Four bits of each code from bit `SHIFT` up.
///
/// # Safety
/// The CPU has these features; `dim` codes, and half as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn nibbles<const SHIFT: u32>(row: *const u8, dim: usize, out: *mut u8) {
    let half = dim / 2;
    let packed = |low: __m256i, high: __m256i| {
        let (low, high) = match SHIFT {
            0 => (low, _mm256_slli_epi16::<4>(high)),
            1 => (_mm256_srli_epi16::<1>(low), _mm256_slli_epi16::<3>(high)),
            _ => (_mm256_srli_epi16::<4>(low), high),
        };
        select(low, high, 0x0f)
    };
    // SAFETY: units of each half, then what is left of it.
    unsafe {
        let mut at = 0;
        while at + UNIT <= half {
            store(out.add(at), packed(load(row.add(at)), load(row.add(half + at))));
            at += UNIT;
        }
        if at < half {
            let rest = first(half - at);
            let (low, high) = (load_some(row.add(at), rest), load_some(row.add(half + at), rest));
            _mm256_mask_storeu_epi8(out.add(at).cast(), rest, packed(low, high));
        }
    }
}

/// Bits 1 and 2 of each code.
///
/// # Safety
/// The CPU has these features; `dim` codes, and a quarter as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn crumbs(row: *const u8, dim: usize, out: *mut u8) {
    let quarter = dim / 4;
    let packed = |[first, second, third, fourth]: [__m256i; 4]| {
        let low = select(_mm256_srli_epi16::<1>(first), _mm256_slli_epi16::<1>(second), 0x03);
        let high = select(_mm256_slli_epi16::<3>(third), _mm256_slli_epi16::<5>(fourth), 0x3f);
        select(low, high, 0x0f)
    };
    // SAFETY: units of each quarter, then what is left of it.
    unsafe {
        let mut at = 0;
        while at + UNIT <= quarter {
            store(out.add(at), packed([0, 1, 2, 3].map(|part| load(row.add(part * quarter + at)))));
            at += UNIT;
        }
        if at < quarter {
            let rest = first(quarter - at);
            let parts = [0, 1, 2, 3].map(|part| load_some(row.add(part * quarter + at), rest));
            _mm256_mask_storeu_epi8(out.add(at).cast(), rest, packed(parts));
        }
    }
}

/// The lowest bit of each code.
///
/// # Safety
/// The CPU has these features; `dim` codes, a multiple of 8, and an eighth as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn bits(row: *const u8, dim: usize, out: *mut u8) {
    let one = _mm512_set1_epi8(1);
    // SAFETY: 64 codes and eight bytes each, then what is left.
    unsafe {
        let mut at = 0;
        while at + 64 <= dim {
            let bits = _mm512_test_epi8_mask(_mm512_loadu_si512(row.add(at).cast()), one);
            out.add(at / 8).cast::<u64>().write_unaligned(bits.to_le());
            at += 64;
        }
        if at < dim {
            let codes = _mm512_maskz_loadu_epi8((1 << (dim - at)) - 1, row.add(at).cast());
            let bits = _mm512_test_epi8_mask(codes, one).to_le_bytes();
            out.add(at / 8).copy_from_nonoverlapping(bits.as_ptr(), (dim - at) / 8);
        }
    }
}

/// The bits of `ones` that `mask` has, else those of `zeros`.
#[target_feature(enable = "avx512f,avx512vl")]
#[inline]
fn select(ones: __m256i, zeros: __m256i, mask: i8) -> __m256i {
    _mm256_ternarylogic_epi32::<0xca>(_mm256_set1_epi8(mask), ones, zeros)
}

/// A mask of the first bytes of fewer than 32.
const fn first(count: usize) -> u32 {
    (1 << count) - 1
}

/// # Safety
/// 32 bytes.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load(bytes: *const u8) -> __m256i {
    // SAFETY: as this function demands.
    unsafe { _mm256_loadu_si256(bytes.cast()) }
}

/// # Safety
/// As many bytes as the mask has ones.
#[target_feature(enable = "avx512bw,avx512vl")]
#[inline]
unsafe fn load_some(bytes: *const u8, mask: u32) -> __m256i {
    // SAFETY: as this function demands.
    unsafe { _mm256_maskz_loadu_epi8(mask, bytes.cast()) }
}

/// # Safety
/// Room for 32 bytes.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store(out: *mut u8, bytes: __m256i) {
    // SAFETY: as this function demands.
    unsafe { _mm256_storeu_si256(out.cast(), bytes) };
}
