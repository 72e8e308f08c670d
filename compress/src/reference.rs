//! The codecs once more, slow and obvious: one element at a time, indices as `docs/FORMAT.md` writes them.
//!
//! Nothing here is shared with the fast paths but the checks of entries and zstd itself. Tests compare the two;
//! `demo` states with [`reference_decode`] which bytes must arrive.

use crate::decoder::{check_crc, check_entry, lossless_sections};
use crate::format::PlaneEntry;
use crate::frame::FrameError;
use crate::payload::Layout;
use crate::{Codec, DecodeError, Dtype, EncodeError, Quantizer, Shape, Side};

/// Why there is no reference for a plane.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// The plane can't be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// What was encoded can't be decoded as asked.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// A quantized plane: what an encoder packs and compresses.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// Which elements share a scale.
    pub quantizer: Quantizer,
    /// Element type of the scales.
    pub scale_dtype: Dtype,
    /// Bits of the scales, in the quantizer's order.
    pub scales: Vec<u16>,
    /// One code for each element, in the plane's order.
    pub codes: Vec<i8>,
}

/// The bytes that must arrive when `plane` has been encoded with `codec` by [`crate::Encoder`] and is decoded to
/// `out_dtype`: `[tokens, kv_heads, head_dim]` row-major, little-endian.
///
/// `plane` is the K or V (`side`) of one `layer`, in elements of `shape.dtype`.
///
/// # Errors
/// As [`crate::Encoder::encode_chunk`], and an exact codec asked for another element type.
pub fn reference_decode(
    codec: Codec,
    shape: &Shape,
    layer: u16,
    side: Side,
    plane: &[u8],
    out_dtype: Dtype,
) -> Result<Vec<u8>, ReferenceError> {
    shape.check().map_err(EncodeError::from)?;
    let (got_bytes, expected_bytes) = (plane.len(), shape.plane_bytes());
    if got_bytes != expected_bytes {
        return Err(EncodeError::PlaneBytes { layer, side, got_bytes, expected_bytes }.into());
    }
    Layout::new(shape, codec, Quantizer::choose(codec, shape, side)).map_err(EncodeError::from)?;
    if codec.is_exact() {
        if out_dtype != shape.dtype {
            return Err(DecodeError::OutDtype { codec, source_dtype: shape.dtype, out_dtype }.into());
        }
        return Ok(plane.to_vec());
    }
    let quantized = quantize(codec, shape, side, plane).map_err(|element| EncodeError::NotFinite {
        layer,
        side,
        element,
    })?;
    Ok(dequantize(&quantized, shape, out_dtype))
}

/// Quantizes a plane of `shape` as the encoder does; `Err` with the index of the first element that is not finite.
///
/// # Errors
/// An element is infinite or not a number.
pub fn quantize(codec: Codec, shape: &Shape, side: Side, plane: &[u8]) -> Result<Quantized, usize> {
    let mut values = Vec::new();
    for (element, bytes) in plane.chunks(2).enumerate() {
        values.push(widen(u16::from_le_bytes([bytes[0], bytes[1]]), shape.dtype).ok_or(element)?);
    }
    let quantizer = Quantizer::choose(codec, shape, side);
    let (groups, largest_code) =
        (groups(shape, quantizer), if codec == Codec::Int4 { 7.0_f32 } else { 127.0 });
    let scale_dtype = Dtype::Bf16;
    // So that code -8 (or -128) times a scale is a finite bfloat16.
    let largest_scale = widen(0x7f7f, Dtype::Bf16).unwrap_or(0.0) / (largest_code + 1.0);
    let mut scales = Vec::new();
    for group in 0..groups {
        let members = (0..values.len()).filter(|&element| group_of(element, shape, quantizer) == group);
        let largest = members.map(|element| values[element].abs()).fold(0.0, f32::max);
        scales.push(narrow((largest / largest_code).min(largest_scale), scale_dtype));
    }
    let code = |(element, value): (usize, &f32)| {
        let scale = widen(scales[group_of(element, shape, quantizer)], scale_dtype).unwrap_or(0.0);
        let ratio = if scale == 0.0 { 0.0 } else { (value / scale).clamp(-largest_code, largest_code) };
        #[expect(clippy::cast_possible_truncation, reason = "an integer of at most 127 in magnitude")]
        let code = ratio.round_ties_even() as i8;
        code
    };
    let codes = values.iter().enumerate().map(code).collect();
    Ok(Quantized { quantizer, scale_dtype, scales, codes })
}

/// The elements that a quantized plane stands for, little-endian.
#[must_use]
pub fn dequantize(quantized: &Quantized, shape: &Shape, out_dtype: Dtype) -> Vec<u8> {
    let &Quantized { quantizer, scale_dtype, ref scales, ref codes } = quantized;
    let element = |(element, &code): (usize, &i8)| {
        let scale = widen(scales[group_of(element, shape, quantizer)], scale_dtype).unwrap_or(0.0);
        narrow(f32::from(code) * scale, out_dtype).to_le_bytes()
    };
    codes.iter().enumerate().flat_map(element).collect()
}

/// Codes as the bytes that are compressed.
#[must_use]
pub fn pack(codec: Codec, shape: &Shape, codes: &[i8]) -> Vec<u8> {
    let nibble = |code: i8| (i16::from(code) + 8).to_le_bytes()[0];
    let (dim, rows) = (usize::from(shape.head_dim), shape.head_rows());
    match codec {
        Codec::Int4 => (0..rows * dim / 2)
            .map(|byte| (byte / (dim / 2) * dim) + byte % (dim / 2))
            .map(|low| nibble(codes[low]) + 16 * nibble(codes[low + dim / 2]))
            .collect(),
        _ => codes.iter().map(|code| code.to_le_bytes()[0]).collect(),
    }
}

/// The inverse of [`pack`].
#[must_use]
pub fn unpack(codec: Codec, shape: &Shape, packed: &[u8]) -> Vec<i8> {
    let code = |nibble: u8| i8::from_le_bytes([nibble]) - 8;
    let (dim, rows) = (usize::from(shape.head_dim), shape.head_rows());
    match codec {
        Codec::Int4 => (0..rows * dim)
            .map(|element| (element / dim, element % dim))
            .map(|(row, j)| match j.checked_sub(dim / 2) {
                None => code(packed[row * dim / 2 + j] % 16),
                Some(j) => code(packed[row * dim / 2 + j] / 16),
            })
            .collect(),
        _ => packed.iter().map(|&byte| i8::from_le_bytes([byte])).collect(),
    }
}

/// Decodes the encoded bytes of one plane, whoever encoded them.
///
/// # Errors
/// As [`crate::Decoder::decode`].
pub fn decode_plane(
    shape: &Shape,
    entry: &PlaneEntry,
    encoded: &[u8],
    out_dtype: Dtype,
) -> Result<Vec<u8>, DecodeError> {
    let layout = check_entry(shape, entry)?;
    let &PlaneEntry { codec, quantizer, bytes: expected_bytes, .. } = entry;
    if codec.is_exact() && out_dtype != shape.dtype {
        return Err(DecodeError::OutDtype { codec, source_dtype: shape.dtype, out_dtype });
    }
    if encoded.len() as u64 != u64::from(expected_bytes) {
        return Err(DecodeError::Length { got_bytes: encoded.len(), expected_bytes });
    }
    check_crc(encoded, entry)?;
    match (codec, entry.scale_dtype) {
        (Codec::Lossless, _) => {
            let (high, low) = lossless_sections(encoded)?;
            let (high, low) = (section(high, layout.code_bytes / 2)?, section(low, layout.code_bytes / 2)?);
            Ok((0..shape.elements_per_plane()).flat_map(|element| [low[element], high[element]]).collect())
        }
        (Codec::Int8 | Codec::Int4, Some(scale_dtype)) => {
            let scales: Vec<u16> = encoded[..layout.scale_bytes]
                .chunks(2)
                .map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
                .collect();
            // Strictly: codes reach one further down than up.
            let most_code = if codec == Codec::Int4 { 8.0 } else { 128.0 };
            let bf16_max = widen(0x7f7f, Dtype::Bf16).unwrap_or(0.0);
            for (index, &bits) in scales.iter().enumerate() {
                if widen(bits, scale_dtype).is_none_or(|scale| scale.abs() * most_code > bf16_max) {
                    return Err(DecodeError::Scale { index, bits });
                }
            }
            let packed = section(&encoded[layout.scale_bytes..], layout.code_bytes)?;
            let codes = unpack(codec, shape, &packed);
            Ok(dequantize(&Quantized { quantizer, scale_dtype, scales, codes }, shape, out_dtype))
        }
        _ => Ok(encoded.to_vec()),
    }
}

/// A section's bytes, decompressed if it is a frame.
fn section(section: &[u8], expected_bytes: usize) -> Result<Vec<u8>, FrameError> {
    if section.len() == expected_bytes {
        return Ok(section.to_vec());
    }
    let mut bytes = vec![0; expected_bytes];
    let written = zstd_safe::decompress(&mut bytes[..], section)
        .map_err(|code| FrameError::Zstd(zstd_safe::get_error_name(code)))?;
    if written != expected_bytes {
        return Err(FrameError::ContentSize { got_bytes: Some(written as u64), expected_bytes });
    }
    Ok(bytes)
}

/// How many groups of elements share a scale.
fn groups(shape: &Shape, quantizer: Quantizer) -> usize {
    let [tokens, heads, dim] = [shape.tokens, shape.kv_heads, shape.head_dim].map(usize::from);
    match quantizer {
        Quantizer::None => 0,
        Quantizer::PerChannel => heads * dim,
        Quantizer::PerTokenAndHead => tokens * heads,
    }
}

/// The group of an element, given by its index in the plane.
fn group_of(element: usize, shape: &Shape, quantizer: Quantizer) -> usize {
    let (heads, dim) = (usize::from(shape.kv_heads), usize::from(shape.head_dim));
    let (token, head, j) = (element / (heads * dim), element / dim % heads, element % dim);
    match quantizer {
        Quantizer::PerTokenAndHead => token * heads + head,
        _ => head * dim + j,
    }
}

/// The value of a 16-bit float from its fields; `None` if it is not finite.
fn widen(bits: u16, dtype: Dtype) -> Option<f32> {
    let (fraction_bits, bias, exponents) = match dtype {
        Dtype::Bf16 => (7, 127, 255),
        Dtype::F16 => (10, 15, 31),
    };
    let magnitude = i32::from(bits & 0x7fff);
    let (exponent, fraction) = (magnitude >> fraction_bits, magnitude & ((1 << fraction_bits) - 1));
    if exponent == exponents {
        return None;
    }
    let significand = if exponent == 0 { fraction } else { fraction + (1 << fraction_bits) };
    let value = f64::from(significand) * 2.0_f64.powi(exponent.max(1) - bias - fraction_bits);
    #[expect(clippy::cast_possible_truncation, reason = "every 16-bit float is an f32")]
    let value = value as f32;
    Some(if bits & 0x8000 == 0 { value } else { -value })
}

/// The finite 16-bit float nearest to a value, ties to the even one: found by bisection.
fn narrow(value: f32, dtype: Dtype) -> u16 {
    let at = |bits: u16| widen(bits, dtype).map_or(f64::INFINITY, f64::from);
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    let magnitude = f64::from(value.abs());
    // The largest float that is not above the magnitude: patterns of positive floats are ordered as their values.
    let (mut below, mut above) = (0_u16, dtype.exponent_mask());
    while above - below > 1 {
        let middle = below.midpoint(above);
        if at(middle) <= magnitude { below = middle } else { above = middle }
    }
    if above == dtype.exponent_mask() {
        return sign | below;
    }
    let (down, up) = (magnitude - at(below), at(above) - magnitude);
    let rounds_up = up < down || (up == down && below % 2 == 1);
    sign | if rounds_up { above } else { below }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype;
    use proptest::prelude::*;

    #[test]
    fn widening_agrees_with_the_fast_twin() {
        for bits in 0..=u16::MAX {
            for dtype in [Dtype::Bf16, Dtype::F16] {
                match widen(bits, dtype) {
                    Some(value) => assert_eq!(value.to_bits(), dtype.widen(bits).to_bits()),
                    None => assert!(!dtype.widen(bits).is_finite()),
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn narrowing_agrees_with_the_fast_twin(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(!value.is_nan());
            prop_assert_eq!(narrow(value, Dtype::Bf16), dtype::f32_to_bf16(value));
            prop_assert_eq!(narrow(value, Dtype::F16), dtype::f32_to_f16(value));
        }
    }
}
