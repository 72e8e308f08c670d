//! From 16-bit floats to integer codes with shared scales.
//!
//! A scale is the largest magnitude of its group divided by the largest code, rounded to a 16-bit float; a code is the
//! element divided by the rounded scale, to nearest, ties to even. All arithmetic is IEEE `f32`, so every machine
//! writes the same bytes.

use crate::dtype::{self, Dtype};
use crate::{Codec, Quantizer, Shape};

/// Largest magnitude of a code: 127 for `int8`, 7 for `int4`. Codes are symmetric around 0.
pub(crate) const fn largest_code(codec: Codec) -> f32 {
    match codec {
        Codec::Int4 => 7.0,
        _ => 127.0,
    }
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

/// The largest magnitude of every group that shares a scale, in the order of the scales.
pub(crate) fn largest_magnitudes(
    values: &[f32],
    shape: &Shape,
    quantizer: Quantizer,
    largest: &mut Vec<f32>,
) {
    largest.clear();
    if quantizer == Quantizer::PerTokenAndHead {
        let rows = values.chunks_exact(usize::from(shape.head_dim));
        largest.extend(rows.map(|row| row.iter().fold(0.0, |most: f32, value| most.max(value.abs()))));
        return;
    }
    largest.resize(shape.channels(), 0.0);
    for token in values.chunks_exact(shape.channels()) {
        for (most, value) in largest.iter_mut().zip(token) {
            *most = most.max(value.abs());
        }
    }
}

/// Largest magnitude that a scale may have: its product with every code is a finite bfloat16.
pub(crate) const fn largest_scale(codec: Codec) -> f32 {
    // Codes reach one further down than up, though this encoder doesn't go there.
    dtype::BF16_MAX / (largest_code(codec) + 1.0)
}

/// The scale of a group whose largest magnitude is `largest`, as the bits of a `dtype`.
pub(crate) fn scale_bits(largest: f32, codec: Codec, dtype: Dtype) -> u16 {
    let (scale, most) = (largest / largest_code(codec), largest_scale(codec));
    dtype.narrow(if scale > most { most } else { scale })
}

/// The code of a value: `value / scale` to nearest, ties to even, between plus and minus `largest_code`.
#[inline(always)]
pub(crate) fn code(value: f32, scale: f32, largest_code: f32) -> i8 {
    // 1.5 * 2^23: adding and taking it away again leaves an integer, rounded to nearest even, without a library call.
    const ROUND: f32 = 12_582_912.0;
    let ratio = if scale == 0.0 { 0.0 } else { value / scale };
    let ratio = if ratio > largest_code { largest_code } else { ratio };
    let ratio = if ratio < -largest_code { -largest_code } else { ratio };
    #[expect(clippy::cast_possible_truncation, reason = "an integer of at most 127 in magnitude")]
    let code = ((ratio + ROUND) - ROUND) as i8;
    code
}

/// Appends one code for each value, in the values' order; `scales` are in the quantizer's order.
pub(crate) fn quantize(
    values: &[f32],
    scales: &[f32],
    shape: &Shape,
    quantizer: Quantizer,
    largest_code: f32,
    codes: &mut Vec<i8>,
) {
    codes.clear();
    if quantizer == Quantizer::PerTokenAndHead {
        for (row, &scale) in values.chunks_exact(usize::from(shape.head_dim)).zip(scales) {
            codes.extend(row.iter().map(|&value| code(value, scale, largest_code)));
        }
    } else {
        for token in values.chunks_exact(shape.channels()) {
            codes.extend(token.iter().zip(scales).map(|(&value, &scale)| code(value, scale, largest_code)));
        }
    }
}

/// Appends the bytes of `int8` codes: two's complement.
pub(crate) fn pack_int8(codes: &[i8], packed: &mut Vec<u8>) {
    packed.extend(codes.iter().map(|code| code.to_le_bytes()[0]));
}

/// Appends the bytes of `int4` codes: within a head row, byte `j` holds dimension `j` in its low and dimension
/// `j + head_dim / 2` in its high four bits, each plus 8. `head_dim` is even.
pub(crate) fn pack_int4(codes: &[i8], head_dim: usize, packed: &mut Vec<u8>) {
    for row in codes.chunks_exact(head_dim) {
        let (low, high) = row.split_at(head_dim / 2);
        packed.extend(
            low.iter()
                .zip(high)
                .map(|(low, high)| (low + 8).to_le_bytes()[0] | ((high + 8).to_le_bytes()[0] << 4)),
        );
    }
}
