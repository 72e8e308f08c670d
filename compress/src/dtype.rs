//! The float formats of planes and destinations, and conversions between them and `f32` that compilers vectorize.
//!
//! Every conversion is branch-free over plain integers and floats: no library call, so a loop over a slice becomes
//! SIMD code, and every machine gives the same bits.

use serde::{Deserialize, Serialize};

/// Element type of a plane: both are 16 bits wide, stored little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bfloat16: 1 sign, 8 exponent, 7 fraction bits.
    Bf16,
    /// IEEE 754 binary16: 1 sign, 5 exponent, 10 fraction bits.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub const BYTES: usize = 2;

    /// The number that stands for this type in an encoded chunk.
    #[must_use]
    pub const fn wire(self) -> u8 {
        match self {
            Self::Bf16 => 1,
            Self::F16 => 2,
        }
    }

    /// The type a number in an encoded chunk stands for, or `None` for a number without a meaning.
    #[must_use]
    pub const fn from_wire(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Bf16),
            2 => Some(Self::F16),
            _ => None,
        }
    }

    /// The bits that are all ones exactly for an infinity or a NaN.
    pub(crate) const fn exponent_mask(self) -> u16 {
        match self {
            Self::Bf16 => 0x7f80,
            Self::F16 => 0x7c00,
        }
    }

    /// The bits of the smallest number that is not subnormal.
    pub(crate) const fn smallest_normal(self) -> u16 {
        match self {
            Self::Bf16 => 0x0080,
            Self::F16 => 0x0400,
        }
    }

    /// The value of an element given by its bits.
    pub fn widen(self, bits: u16) -> f32 {
        match self {
            Self::Bf16 => bf16_to_f32(bits),
            Self::F16 => f16_to_f32(bits),
        }
    }

    /// The nearest finite element of this type, ties to even.
    pub(crate) fn narrow(self, value: f32) -> u16 {
        match self {
            Self::Bf16 => f32_to_bf16(value),
            Self::F16 => f32_to_f16(value),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// Element type of a decoded plane, little-endian.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OutDtype {
    /// bfloat16.
    Bf16,
    /// IEEE 754 binary16; what lies beyond 65504 becomes 65504.
    F16,
    /// FP8 E4M3 without infinities (OCP 8-bit floating point), one byte: the element divided by `scale`; what lies
    /// beyond 448 becomes 448. An engine with an FP8 KV cache has one such scale for the K and one for the V of each
    /// layer and multiplies by it. Quantizing codecs only.
    Fp8E4M3 {
        /// Positive, finite and not subnormal.
        scale: f32,
    },
}

impl OutDtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::Fp8E4M3 { .. } => 1,
        }
    }

    /// The type's name, without its scale.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8E4M3 { .. } => "fp8-e4m3",
        }
    }

    /// Whether planes of `dtype` can be delivered as this type without a change.
    pub(crate) fn is(self, dtype: Dtype) -> bool {
        self == Self::from(dtype)
    }

    /// What scales and offsets are divided by before elements are made of them; `None` if that can't be done.
    pub(crate) fn divisor(self) -> Option<f32> {
        match self {
            Self::Bf16 | Self::F16 => Some(1.0),
            Self::Fp8E4M3 { scale } => (scale > 0.0 && scale.is_normal()).then_some(scale),
        }
    }
}

impl From<Dtype> for OutDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
        }
    }
}

impl std::fmt::Display for OutDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Largest finite bfloat16 as `f32`.
pub(crate) const BF16_MAX: f32 = f32::from_bits(0x7f7f_0000);
/// Largest finite binary16 as `f32`: 65504.
pub(crate) const F16_MAX: f32 = 65504.0;
/// Largest E4M3 as `f32`: 448.
pub(crate) const E4M3_MAX: f32 = 448.0;

/// The value of a bfloat16, exactly.
#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to the nearest bfloat16, ties to even; what lies beyond the largest finite one becomes that.
///
/// `value` must not be NaN (the result would be some other number).
#[inline(always)]
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    f32_to_bf16_in_range(clamp(value, BF16_MAX))
}

/// Rounds to the nearest bfloat16, ties to even; `value` is at most [`BF16_MAX`] in magnitude.
#[inline(always)]
pub(crate) fn f32_to_bf16_in_range(value: f32) -> u16 {
    // Adding just under half a unit in the last place, and the last kept bit, makes truncation round to even.
    let bits = value.to_bits();
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The value of a binary16, exactly, subnormals and infinities included.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // Exponent and fraction are in place but for the bias: a product with 2^112 moves it and makes subnormals normal.
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    // An all-ones exponent stays all ones.
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    f32::from_bits(sign | scaled | special)
}

/// Rounds to the nearest binary16, ties to even; what lies beyond 65504 becomes that.
///
/// `value` must not be NaN (the result would be some other number).
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "both operands fit 16 bits")]
pub(crate) fn f32_to_f16(value: f32) -> u16 {
    let bits = clamp(value, F16_MAX).to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    // Subnormal result: adding 0.5 lets the float unit round at 2^-24, the unit of a subnormal binary16.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
    let normal = magnitude.wrapping_add(0x0fff + ((magnitude >> 13) & 1)).wrapping_sub(0x3800_0000) >> 13;
    (sign | if magnitude < 0x3880_0000 { subnormal } else { normal }) as u16
}

/// Rounds to the nearest E4M3, ties to even; what lies beyond 448 becomes that.
///
/// `value` must not be NaN (the result would be some other number).
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "both operands fit 8 bits")]
pub(crate) fn f32_to_e4m3(value: f32) -> u8 {
    let bits = clamp(value, E4M3_MAX).to_bits();
    let sign = (bits >> 24) & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    // As for binary16: a subnormal E4M3 has the unit 2^-9, which is that of an `f32` from 2^14 up.
    let subnormal = (f32::from_bits(magnitude) + 16384.0).to_bits().wrapping_sub(0x4680_0000);
    let normal = magnitude.wrapping_add(0x7_ffff + ((magnitude >> 20) & 1)).wrapping_sub(0x3c00_0000) >> 20;
    (sign | if magnitude < 0x3c80_0000 { subnormal } else { normal }) as u8
}

#[inline(always)]
fn clamp(value: f32, limit: f32) -> f32 {
    // Two plain selects: `f32::clamp` checks its arguments, `f32::min` has NaN rules; neither is one instruction.
    let value = if value > limit { limit } else { value };
    if value < -limit { -limit } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_16_bit_pattern_converts_as_the_half_crate_says() {
        for bits in 0..=u16::MAX {
            let (bf16, f16) = (half::bf16::from_bits(bits), half::f16::from_bits(bits));
            assert_eq!(bf16_to_f32(bits).to_bits(), u32::from(bits) << 16);
            if !f16.is_nan() {
                assert_eq!(f16_to_f32(bits).to_bits(), f16.to_f32().to_bits(), "{bits:04x}");
            }
            if bf16.is_finite() {
                assert_eq!(f32_to_bf16(bf16.to_f32()), bits);
            }
            if f16.is_finite() {
                assert_eq!(f32_to_f16(f16.to_f32()), bits);
            }
        }
    }

    #[test]
    fn beyond_the_largest_finite_saturates() {
        for value in [f32::MAX, f32::INFINITY, 3.4e38] {
            assert_eq!(f32_to_bf16(value), 0x7f7f);
            assert_eq!(f32_to_bf16(-value), 0xff7f);
            assert_eq!(f32_to_f16(value), 0x7bff);
            assert_eq!(f32_to_f16(-value), 0xfbff);
        }
        assert_eq!(f32_to_f16(65519.0), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7bff);
    }

    /// The value of an E4M3 from its fields.
    fn e4m3(bits: u8) -> f64 {
        let (exponent, fraction) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
        let magnitude = if exponent == 0 {
            fraction * 2.0_f64.powi(-9)
        } else {
            (8.0 + fraction) * 2.0_f64.powi(exponent - 10)
        };
        if bits & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn e4m3_rounds_to_the_nearest_of_all_its_numbers() {
        let numbers: Vec<f64> = (0..0x7f).map(e4m3).collect();
        assert_eq!(numbers[0x7e], f64::from(E4M3_MAX));
        // Every number, every middle between two, and both sides of it.
        for bits in 0..0x7e_u8 {
            let (low, high) = (numbers[usize::from(bits)], numbers[usize::from(bits) + 1]);
            #[expect(clippy::cast_possible_truncation, reason = "exact: at most five significant bits")]
            let (exact, middle) = (low as f32, low.midpoint(high) as f32);
            let even = bits + bits % 2;
            for (value, expected) in
                [(exact, bits), (middle, even), (middle.next_down(), bits), (middle.next_up(), bits + 1)]
            {
                assert_eq!(f32_to_e4m3(value), expected, "{value:e}");
                assert_eq!(f32_to_e4m3(-value), expected | 0x80, "-{value:e}");
            }
        }
        for value in [448.0, 449.0, 464.0, 480.0, 1e30, f32::INFINITY] {
            assert_eq!((f32_to_e4m3(value), f32_to_e4m3(-value)), (0x7e, 0xfe));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn rounding_agrees_with_the_half_crate(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(!value.is_nan());
            let bf16 = half::bf16::from_f32(value.clamp(-BF16_MAX, BF16_MAX));
            prop_assert_eq!(f32_to_bf16(value), bf16.to_bits());
            let f16 = half::f16::from_f32(value.clamp(-F16_MAX, F16_MAX));
            prop_assert_eq!(f32_to_f16(value), f16.to_bits());
            let small = value.rem_euclid(1.0) * 2.0_f32.powi(-14);
            prop_assume!(!small.is_nan());
            prop_assert_eq!(f32_to_f16(small), half::f16::from_f32(small).to_bits());
        }
    }
}
