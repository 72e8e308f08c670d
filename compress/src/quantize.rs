//! From 16-bit floats to integer codes with shared scales and offsets.
//!
//! A group's offset is its smallest element and its scale the span of its elements divided by the largest code, both
//! 16-bit floats; a code is the element's distance from the offset divided by the scale, to nearest, ties to even. All
//! arithmetic is IEEE, so every machine writes the same bytes.

use crate::dtype::{self, Dtype};
use crate::{Quantizer, Shape};

/// Smallest and largest element of every group that shares a scale.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    pub(crate) smallest: Vec<f32>,
    pub(crate) largest: Vec<f32>,
}

/// Widens a plane of little-endian elements to `f32`; `Err` with the index of the first element that is not finite.
pub(crate) fn widen(plane: &[u8], dtype: Dtype, values: &mut Vec<f32>) -> Result<(), usize> {
    let elements = || plane.chunks_exact(2).map(|element| u16::from_le_bytes([element[0], element[1]]));
    let mask = dtype.exponent_mask();
    if elements().any(|bits| bits & mask == mask) {
        return Err(elements().position(|bits| bits & mask == mask).unwrap_or(0));
    }
    values.clear();
    match dtype {
        Dtype::Bf16 => values.extend(elements().map(dtype::bf16_to_f32)),
        Dtype::F16 => values.extend(elements().map(dtype::f16_to_f32)),
    }
    Ok(())
}

#[inline(always)]
fn lesser(a: f32, b: f32) -> f32 {
    // One instruction, unlike `f32::min` with its rules for NaN; of two zeros the first stays.
    if b < a { b } else { a }
}

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

impl Ranges {
    /// Takes the ranges of all groups of a plane, in the order of the scales.
    pub(crate) fn measure(&mut self, values: &[f32], shape: &Shape, quantizer: Quantizer) {
        let Self { smallest, largest } = self;
        smallest.clear();
        largest.clear();
        if quantizer == Quantizer::PerTokenAndHead {
            let rows = || values.chunks_exact(usize::from(shape.head_dim));
            smallest.extend(rows().map(|row| row.iter().copied().fold(f32::INFINITY, lesser)));
            largest.extend(rows().map(|row| row.iter().copied().fold(f32::NEG_INFINITY, greater)));
            return;
        }
        smallest.resize(shape.channels(), f32::INFINITY);
        largest.resize(shape.channels(), f32::NEG_INFINITY);
        for token in values.chunks_exact(shape.channels()) {
            for ((least, most), &value) in smallest.iter_mut().zip(largest.iter_mut()).zip(token) {
                *least = lesser(*least, value);
                *most = greater(*most, value);
            }
        }
    }
}

/// Bits of scale and offset of a group with this range, as `dtype`, the type of the plane's elements.
///
/// The offset is exact. The scale is rounded up, so that every element is within half a scale of what its code stands
/// for. Only where the largest code would then stand for more than the largest finite bfloat16 is the scale lowered,
/// and the elements at that end are cut to what the largest code stands for.
pub(crate) fn scale_and_offset(smallest: f32, largest: f32, largest_code: u8, dtype: Dtype) -> (u16, u16) {
    let codes = f32::from(largest_code);
    let span = (f64::from(largest) - f64::from(smallest)) / f64::from(codes);
    #[expect(clippy::cast_possible_truncation, reason = "rounding to nearest; the next line rounds up")]
    let nearest = dtype.narrow(span as f32);
    let mut scale = nearest + u16::from(f64::from(dtype.widen(nearest)) < span);
    // At most one binade down, and only for spans near the end of bfloat16.
    while codes * dtype.widen(scale) + smallest > dtype::BF16_MAX {
        scale -= 1;
    }
    (scale, dtype.narrow(smallest))
}

/// The code of a value: its distance from the offset in scales, to nearest, ties to even, at most `largest_code`.
#[inline(always)]
fn code(value: f32, scale: f32, offset: f32, largest_code: f32) -> u8 {
    // 1.5 * 2^23: adding it and taking it away leaves an integer, rounded to nearest even, without a library call.
    const ROUND: f32 = 12_582_912.0;
    let ratio = if scale == 0.0 { 0.0 } else { (value - offset) / scale };
    let ratio = lesser(largest_code, ratio);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an integer from 0 to 255")]
    let code = ((ratio + ROUND) - ROUND) as u8;
    code
}

/// Appends one code for each value, in the values' order; scales and offsets are in the quantizer's order.
pub(crate) fn quantize(
    values: &[f32],
    scales: &[f32],
    offsets: &[f32],
    shape: &Shape,
    quantizer: Quantizer,
    largest_code: u8,
    codes: &mut Vec<u8>,
) {
    let largest_code = f32::from(largest_code);
    let groups = || scales.iter().zip(offsets);
    codes.clear();
    if quantizer == Quantizer::PerTokenAndHead {
        for (row, (&scale, &offset)) in values.chunks_exact(usize::from(shape.head_dim)).zip(groups()) {
            codes.extend(row.iter().map(|&value| code(value, scale, offset, largest_code)));
        }
    } else {
        for token in values.chunks_exact(shape.channels()) {
            let elements = token.iter().zip(groups());
            codes
                .extend(elements.map(|(&value, (&scale, &offset))| code(value, scale, offset, largest_code)));
        }
    }
}
