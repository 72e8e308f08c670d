//! CacheGen's quantizer (arXiv 2310.07240, section 5; LMCache's `cachegen`): symmetric, one largest magnitude for all
//! heads and dimensions of a token, and `bins` to choose per layer and side.
//!
//! With `c = bins / 2 - 1`, a code is `round(element / largest magnitude * c) + c`, from 0 to `2 * c`, so an even
//! number of bins leaves one unused.

use crate::dtype::{self, Dtype};

/// Fewest and most bins that the format takes; they are even.
pub(crate) const MIN_BINS: u8 = 4;
/// See [`MIN_BINS`].
pub(crate) const MAX_BINS: u8 = 254;

/// Whether a plane can have so many bins.
pub(crate) const fn takes(bins: u8) -> bool {
    MIN_BINS <= bins && bins <= MAX_BINS && bins.is_multiple_of(2)
}

/// The code that stands for zero, `c`; the largest code is twice that. `bins` passes [`takes`].
pub(crate) const fn zero_code(bins: u8) -> u8 {
    bins / 2 - 1
}

/// Scale and offset of a token whose largest magnitude is `magnitude`: an element is `code * scale + offset`, as with
/// the other codecs, and that of `zero_code` is exactly zero.
pub(crate) fn scale_and_offset(magnitude: f32, zero_code: u8) -> (f32, f32) {
    let zero_code = f32::from(zero_code);
    let scale = magnitude / zero_code;
    (scale, -(zero_code * scale))
}

/// Quantizes the elements of one token: bits of its largest magnitude, which is exact, and its codes appended.
///
/// Only where `code * scale` would leave the range of bfloat16 is the magnitude lowered, and elements beyond are cut.
pub(crate) fn quantize_token(values: &[f32], bins: u8, dtype: Dtype, codes: &mut Vec<u8>) -> u16 {
    let largest =
        values.iter().fold(0.0_f32, |most, value| if value.abs() > most { value.abs() } else { most });
    let zero_code = zero_code(bins);
    let mut bits = dtype.narrow(largest);
    while !in_range(dtype.widen(bits), zero_code) {
        bits -= 1;
    }
    let (magnitude, zero_code) = (dtype.widen(bits), f32::from(zero_code));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an integer from 0 to 252")]
    codes.extend(values.iter().map(|value| {
        let ratio = if magnitude == 0.0 { 0.0 } else { (value / magnitude).clamp(-1.0, 1.0) };
        ((ratio * zero_code).round_ties_even() + zero_code) as u8
    }));
    bits
}

/// Whether every code of a token with this largest magnitude stands for a finite bfloat16.
fn in_range(magnitude: f32, zero_code: u8) -> bool {
    let (scale, offset) = scale_and_offset(magnitude, zero_code);
    (f32::from(2 * zero_code) * scale + offset).abs() <= dtype::BF16_MAX && offset.abs() <= dtype::BF16_MAX
}
