//! CacheGen's quantizer (arXiv 2310.07240, section 5; LMCache's `cachegen`): symmetric, one largest magnitude for all
//! heads and dimensions of a token, and `bins` to choose per layer and side.
//!
//! With `c = bins / 2 - 1`, a code is `round(element / largest magnitude * c) + c`, from 0 to `2 * c`, so an even
//! number of bins leaves one unused.
//!
//! One outlier in a token makes all of its codes coarse. So the encoder can be asked for a *step*: the distance of two
//! codes is then at least that share of the token's RMS, and the bins only have to reach the outlier. What is written is
//! the magnitude that makes it so, larger than any element; the format and its decoders stay the same.

use crate::PlaneCodec;
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

/// Quantizes the elements of one token: bits of its magnitude, and its codes appended. The magnitude is that of the
/// largest element, which is exact, unless `codec` asks for a longer step.
///
/// Only where `code * scale` would leave the range of bfloat16 is the magnitude lowered, and elements beyond are cut.
pub(crate) fn quantize_token(values: &[f32], codec: PlaneCodec, dtype: Dtype, codes: &mut Vec<u8>) -> u16 {
    let largest =
        values.iter().fold(0.0_f32, |most, value| if value.abs() > most { value.abs() } else { most });
    let zero_code = zero_code(codec.bins);
    let mut bits = dtype.narrow(largest.max(least_magnitude(values, zero_code, codec.step_milli)));
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

/// The magnitude of a token whose codes are `step_milli` thousandths of its RMS apart. Sums in double precision and
/// in the elements' order, so that every machine writes the same bytes.
fn least_magnitude(values: &[f32], zero_code: u8, step_milli: u16) -> f32 {
    if step_milli == 0 {
        return 0.0;
    }
    let squares: f64 = values.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    #[expect(clippy::cast_precision_loss, reason = "fewer elements than 2^53")]
    let rms = (squares / values.len() as f64).sqrt();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "rounding; `in_range` takes care of what is too large"
    )]
    let magnitude = (f64::from(step_milli) / 1000.0 * rms * f64::from(zero_code)) as f32;
    magnitude.min(dtype::BF16_MAX)
}

/// Whether every code of a token with this largest magnitude stands for a finite bfloat16.
fn in_range(magnitude: f32, zero_code: u8) -> bool {
    let (scale, offset) = scale_and_offset(magnitude, zero_code);
    (f32::from(2 * zero_code) * scale + offset).abs() <= dtype::BF16_MAX && offset.abs() <= dtype::BF16_MAX
}
