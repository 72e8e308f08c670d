//! `int4` codes of one group are sixteen elements: computed once for each head row, then looked up with byte shuffles.
//!
//! Four times as fast as computing every element, but only byte shuffles can do it, and compilers don't find them in
//! plain code. The elements are the same bit for bit: [`crate::dequantize`] computes those of the table.

use std::arch::x86_64::{
    __m256i, _mm_loadu_si128, _mm256_and_si256, _mm256_broadcastsi128_si256, _mm256_loadu_si256,
    _mm256_permute2x128_si256, _mm256_set1_epi8, _mm256_shuffle_epi8, _mm256_srli_epi16, _mm256_storeu_si256,
    _mm256_unpackhi_epi8, _mm256_unpacklo_epi8,
};

/// Codes that one register holds.
const CODE_BYTES: usize = 32;

/// Whether head rows of this size can be looked up: each half fills whole registers.
pub(crate) const fn takes(head_dim: usize) -> bool {
    head_dim.is_multiple_of(2 * CODE_BYTES)
}

/// Writes one head row: the elements of codes 0 to 15 are `table`, little-endian. `out` has four bytes for every byte
/// of `codes`, whose number is a multiple of 32.
///
/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) unsafe fn row(table: &[u16; 16], codes: &[u8], out: &mut [u8]) {
    let (low, high) = out.split_at_mut(2 * codes.len());
    let (mut low_bytes, mut high_bytes) = ([0_u8; 16], [0_u8; 16]);
    for ((low_byte, high_byte), element) in low_bytes.iter_mut().zip(&mut high_bytes).zip(table) {
        [*low_byte, *high_byte] = element.to_le_bytes();
    }
    // SAFETY: both arrays have 16 bytes; loads may be unaligned.
    let (low_bytes, high_bytes, nibble) = unsafe {
        (
            _mm256_broadcastsi128_si256(_mm_loadu_si128(low_bytes.as_ptr().cast())),
            _mm256_broadcastsi128_si256(_mm_loadu_si128(high_bytes.as_ptr().cast())),
            _mm256_set1_epi8(0x0f),
        )
    };
    let halves = low.chunks_exact_mut(2 * CODE_BYTES).zip(high.chunks_exact_mut(2 * CODE_BYTES));
    for (codes, (low, high)) in codes.chunks_exact(CODE_BYTES).zip(halves) {
        // SAFETY: `codes` has 32 bytes, `low` and `high` have 64 each; the CPU has AVX2.
        unsafe {
            let codes = _mm256_loadu_si256(codes.as_ptr().cast());
            store(low, low_bytes, high_bytes, _mm256_and_si256(codes, nibble));
            store(high, low_bytes, high_bytes, _mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble));
        }
    }
}

/// Writes the elements of 32 codes.
///
/// # Safety
/// `out` has 64 bytes, and the CPU has AVX2.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store(out: &mut [u8], low_bytes: __m256i, high_bytes: __m256i, codes: __m256i) {
    debug_assert_eq!(out.len(), 2 * CODE_BYTES);
    // SAFETY: two stores of 32 bytes in a slice of 64; the CPU has AVX2.
    unsafe {
        let (low, high) = (_mm256_shuffle_epi8(low_bytes, codes), _mm256_shuffle_epi8(high_bytes, codes));
        // Interleaving works within the halves of a register: elements 0..8 and 16..24, 8..16 and 24..32.
        let (first, second) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
        let out = out.as_mut_ptr();
        _mm256_storeu_si256(out.cast(), _mm256_permute2x128_si256::<0x20>(first, second));
        _mm256_storeu_si256(out.add(CODE_BYTES).cast(), _mm256_permute2x128_si256::<0x31>(first, second));
    }
}
