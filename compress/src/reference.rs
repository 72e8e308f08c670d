//! The codecs once more, slow and obvious: one element at a time, indices as `docs/FORMAT.md` writes them.
//!
//! Nothing here is shared with the fast paths but the checks of entries and zstd itself. Tests compare the two;
//! `demo` states with [`reference_decode`] which bytes must arrive.

use crate::decoder::{check_crc, check_entry, lossless_sections};
use crate::format::PlaneEntry;
use crate::frame::FrameError;
use crate::payload::Layout;
use crate::{Codec, DecodeError, Dtype, EncodeError, Quantizer, Shape, Side};

/// The largest finite bfloat16: 255 * 2^120.
const BF16_MAX: f32 = 255.0 * (1_u128 << 120) as f32;

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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantized {
    /// Which elements share a scale and an offset.
    pub quantizer: Quantizer,
    /// Element type of scales and offsets.
    pub scale_dtype: Dtype,
    /// Bits of scale and offset of each group, in the quantizer's order.
    pub groups: Vec<(u16, u16)>,
    /// One code for each element, in the plane's order.
    pub codes: Vec<u8>,
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
    let (quantizer, scale_dtype) = (Quantizer::choose(codec, shape, side), shape.dtype);
    let mut members = vec![Vec::new(); group_count(shape, quantizer)];
    for (element, &value) in values.iter().enumerate() {
        members[group_of(element, shape, quantizer)].push(value);
    }
    let groups: Vec<_> =
        members.iter().map(|members| scale_and_offset(members, codec, scale_dtype)).collect();
    let largest_code = f32::from(largest_code(codec));
    let code = |(element, value): (usize, &f32)| {
        let (scale, offset) = widen_group(groups[group_of(element, shape, quantizer)], scale_dtype)?;
        let ratio = if scale == 0.0 { 0.0 } else { ((value - offset) / scale).clamp(0.0, largest_code) };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an integer from 0 to 255"
        )]
        let code = ratio.round_ties_even() as u8;
        Some(code)
    };
    let codes =
        values.iter().enumerate().map(|element| code(element).ok_or(element.0)).collect::<Result<_, _>>()?;
    Ok(Quantized { quantizer, scale_dtype, groups, codes })
}

/// Scale and offset of a group: the first scale, from the smallest up, that covers all members.
fn scale_and_offset(members: &[f32], codec: Codec, dtype: Dtype) -> (u16, u16) {
    let (mut smallest, mut largest) = (members[0], members[0]);
    for &member in members {
        smallest = if member < smallest { member } else { smallest };
        largest = if member > largest { member } else { largest };
    }
    let codes = largest_code(codec);
    let covers = |bits: u16| {
        widen(bits, dtype).is_none_or(|scale| {
            f64::from(scale) >= (f64::from(largest) - f64::from(smallest)) / f64::from(codes)
        })
    };
    let bits: Vec<u16> = (0..dtype.exponent_mask()).collect();
    let mut scale = u16::try_from(bits.partition_point(|&bits| !covers(bits))).unwrap_or(u16::MAX);
    // Only next to the end of bfloat16: the largest code must stay finite.
    let ends_finite =
        |bits: u16| widen(bits, dtype).is_some_and(|scale| f32::from(codes) * scale + smallest <= BF16_MAX);
    while !ends_finite(scale) {
        scale -= 1;
    }
    (scale, narrow(smallest, dtype))
}

fn largest_code(codec: Codec) -> u8 {
    if codec == Codec::Int4 { 15 } else { 255 }
}

/// The elements that a quantized plane stands for, little-endian.
#[must_use]
pub fn dequantize(quantized: &Quantized, shape: &Shape, out_dtype: Dtype) -> Vec<u8> {
    let &Quantized { quantizer, scale_dtype, ref groups, ref codes } = quantized;
    let element = |(element, &code): (usize, &u8)| {
        let group = widen_group(groups[group_of(element, shape, quantizer)], scale_dtype);
        let (scale, offset) = group.unwrap_or((f32::NAN, f32::NAN));
        narrow(f32::from(code) * scale + offset, out_dtype).to_le_bytes()
    };
    codes.iter().enumerate().flat_map(element).collect()
}

/// Codes as the bytes that are compressed.
#[must_use]
pub fn pack(codec: Codec, shape: &Shape, codes: &[u8]) -> Vec<u8> {
    let (dim, rows) = (usize::from(shape.head_dim), shape.head_rows());
    if codec != Codec::Int4 {
        return codes.to_vec();
    }
    let mut packed = Vec::new();
    for row in 0..rows {
        for j in 0..dim / 2 {
            packed.push(codes[row * dim + j] + 16 * codes[row * dim + j + dim / 2]);
        }
    }
    packed
}

/// The inverse of [`pack`].
#[must_use]
pub fn unpack(codec: Codec, shape: &Shape, packed: &[u8]) -> Vec<u8> {
    let (dim, rows) = (usize::from(shape.head_dim), shape.head_rows());
    if codec != Codec::Int4 {
        return packed.to_vec();
    }
    let mut codes = Vec::new();
    for row in 0..rows {
        for j in 0..dim {
            let byte = packed[row * dim / 2 + j % (dim / 2)];
            codes.push(if j < dim / 2 { byte % 16 } else { byte / 16 });
        }
    }
    codes
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
            let bits = |at: usize| u16::from_le_bytes([encoded[at], encoded[at + 1]]);
            let group = |group: usize| (bits(2 * group), bits(layout.scale_bytes + 2 * group));
            let groups: Vec<(u16, u16)> = (0..group_count(shape, quantizer)).map(group).collect();
            for (group, &(scale_bits, offset_bits)) in groups.iter().enumerate() {
                let all_finite =
                    widen_group((scale_bits, offset_bits), scale_dtype).is_some_and(|(scale, offset)| {
                        (0..=largest_code(codec))
                            .all(|code| (f32::from(code) * scale + offset).abs() <= BF16_MAX)
                    });
                if !all_finite {
                    return Err(DecodeError::Scale { group, scale_bits, offset_bits });
                }
            }
            let packed = section(&encoded[2 * layout.scale_bytes..], layout.code_bytes)?;
            let codes = unpack(codec, shape, &packed);
            Ok(dequantize(&Quantized { quantizer, scale_dtype, groups, codes }, shape, out_dtype))
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

/// How many groups of elements there are.
fn group_count(shape: &Shape, quantizer: Quantizer) -> usize {
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

/// Scale and offset as numbers; `None` if one is not finite.
fn widen_group((scale, offset): (u16, u16), dtype: Dtype) -> Option<(f32, f32)> {
    Some((widen(scale, dtype)?, widen(offset, dtype)?))
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
