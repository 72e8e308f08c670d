//! The codecs once more, slow and obvious: one element at a time, indices as `docs/FORMAT.md` writes them.
//!
//! Nothing here is shared with the fast paths but the checks of entries and zstd itself. Tests compare the two;
//! `demo` states with [`reference_decode`] which bytes must arrive.

use crate::decoder::{check_crc, check_entry, check_out_dtype, lossless_sections};
use crate::format::PlaneEntry;
use crate::payload::Layout;
use crate::section::check_deflate;
use crate::{
    Codec, Compression, DecodeError, Dtype, EncodeError, FrameError, Isa, OutDtype, PlaneCodec, Quantizer,
    Shape, Side, sliced,
};

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
    /// Bits of scale and offset of each group, in the quantizer's order; for [`Quantizer::PerToken`], of largest
    /// magnitude and 0.
    pub groups: Vec<(u16, u16)>,
    /// Largest code.
    pub largest_code: u8,
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
    codec: impl Into<PlaneCodec>,
    shape: &Shape,
    layer: u16,
    side: Side,
    plane: &[u8],
    out_dtype: impl Into<OutDtype>,
) -> Result<Vec<u8>, ReferenceError> {
    let (asked, out_dtype) = (codec.into(), out_dtype.into());
    let plane_codec = asked.normalized();
    let codec = plane_codec.codec;
    shape.check().map_err(EncodeError::from)?;
    let (got_bytes, expected_bytes) = (plane.len(), shape.plane_bytes());
    if got_bytes != expected_bytes {
        return Err(EncodeError::PlaneBytes { layer, side, got_bytes, expected_bytes }.into());
    }
    let quantizer = Quantizer::choose(codec, shape, side);
    Layout::new(shape, plane_codec, quantizer).map_err(EncodeError::from)?;
    check_out_dtype(shape, codec, out_dtype)?;
    if codec.is_exact() {
        return Ok(plane.to_vec());
    }
    let quantized = quantize(asked, shape, side, plane).map_err(|element| EncodeError::NotFinite {
        layer,
        side,
        element,
    })?;
    check_groups(&quantized, out_dtype)?;
    Ok(dequantize(&quantized, shape, out_dtype))
}

/// Quantizes a plane of `shape` as the encoder does; `Err` with the index of the first element that is not finite.
///
/// # Errors
/// An element is infinite or not a number.
pub fn quantize(
    codec: impl Into<PlaneCodec>,
    shape: &Shape,
    side: Side,
    plane: &[u8],
) -> Result<Quantized, usize> {
    let codec = codec.into();
    let mut values = Vec::new();
    for (element, bytes) in plane.chunks(2).enumerate() {
        values.push(widen(u16::from_le_bytes([bytes[0], bytes[1]]), shape.dtype).ok_or(element)?);
    }
    let (quantizer, scale_dtype) = (Quantizer::choose(codec.codec, shape, side), shape.dtype);
    let largest_code = largest_code(codec);
    let mut members = vec![Vec::new(); group_count(shape, quantizer)];
    for (element, &value) in values.iter().enumerate() {
        members[group_of(element, shape, quantizer)].push(value);
    }
    let used = match codec.bins {
        0 => largest_code,
        codes => u8::clamp(codes - 1, 1, largest_code),
    };
    let group = |members: &Vec<f32>| match quantizer {
        Quantizer::PerToken => (magnitude(members, largest_code, codec.step_milli, scale_dtype), 0),
        _ => scale_and_offset(members, used, largest_code, scale_dtype),
    };
    let groups: Vec<_> = members.iter().map(group).collect();
    let code = |(element, &value): (usize, &f32)| {
        let group = group_of(element, shape, quantizer);
        let ratio = match quantizer {
            Quantizer::PerToken => {
                let magnitude = widen(groups[group].0, scale_dtype)?;
                let ratio = if magnitude == 0.0 { 0.0 } else { (value / magnitude).clamp(-1.0, 1.0) };
                let zero_code = f32::from(largest_code / 2);
                (ratio * zero_code).round_ties_even() + zero_code
            }
            _ => {
                let (scale, offset) = widen_group(groups[group], scale_dtype)?;
                let ratio = if scale == 0.0 { 0.0 } else { (value - offset) * (1.0 / scale) };
                ratio.clamp(0.0, f32::from(used)).round_ties_even()
            }
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an integer from 0 to 255"
        )]
        let code = ratio as u8;
        Some(code)
    };
    let codes =
        values.iter().enumerate().map(|element| code(element).ok_or(element.0)).collect::<Result<_, _>>()?;
    Ok(Quantized { quantizer, scale_dtype, groups, largest_code, codes })
}

/// The largest magnitude of a token, or what gives codes of the step's distance, whichever is more; or the largest below
/// it all of whose codes stand for finite numbers.
fn magnitude(members: &[f32], largest_code: u8, step_milli: u16, dtype: Dtype) -> u16 {
    let mut largest = members.iter().fold(0.0_f32, |most, member| member.abs().max(most));
    if step_milli > 0 {
        let mut squares = 0.0;
        for &member in members {
            squares += f64::from(member) * f64::from(member);
        }
        #[expect(clippy::cast_precision_loss, reason = "fewer members than 2^53")]
        let rms = (squares / members.len() as f64).sqrt();
        #[expect(clippy::cast_possible_truncation, reason = "what is too large is lowered below")]
        let asked = (f64::from(step_milli) / 1000.0 * rms * f64::from(largest_code / 2)) as f32;
        largest = largest.max(asked.min(BF16_MAX));
    }
    let finite = |&bits: &u16| {
        let numbers = group_numbers((bits, 0), dtype, Quantizer::PerToken, largest_code);
        numbers.is_some_and(|numbers| all_finite(numbers, largest_code))
    };
    (0..=narrow(largest, dtype)).rev().find(finite).unwrap_or(0)
}

/// Whether every code of a group stands for a finite bfloat16.
fn all_finite((scale, offset): (f32, f32), largest_code: u8) -> bool {
    (0..=largest_code).all(|code| (f32::from(code) * scale + offset).abs() <= BF16_MAX)
}

/// Scale and offset of a group: the first scale, from the smallest up, that covers all members.
fn scale_and_offset(members: &[f32], used: u8, codes: u8, dtype: Dtype) -> (u16, u16) {
    let (mut smallest, mut largest) = (members[0], members[0]);
    for &member in members {
        smallest = if member < smallest { member } else { smallest };
        largest = if member > largest { member } else { largest };
    }
    let covers = |bits: u16| {
        widen(bits, dtype).is_none_or(|scale| {
            f64::from(scale) >= (f64::from(largest) - f64::from(smallest)) / f64::from(used)
        })
    };
    let bits: Vec<u16> = (0..dtype.exponent_mask()).collect();
    let covering = u16::try_from(bits.partition_point(|&bits| !covers(bits))).unwrap_or(u16::MAX);
    // No subnormal scale: it might have no reciprocal.
    let normal = (1 << dtype.exponent_mask().trailing_zeros()).max(covering);
    let mut scale = if covering == 0 { 0 } else { normal };
    // Only next to the end of bfloat16: the largest code must stay finite.
    let ends_finite =
        |bits: u16| widen(bits, dtype).is_some_and(|scale| f32::from(codes) * scale + smallest <= BF16_MAX);
    while !ends_finite(scale) {
        scale -= 1;
    }
    // Zero is stored without a sign.
    let offset = narrow(smallest, dtype);
    (scale, if smallest == 0.0 { 0 } else { offset })
}

fn largest_code(codec: PlaneCodec) -> u8 {
    match codec.codec {
        Codec::Int3 => 7,
        Codec::Int4 => 15,
        Codec::Int5 => 31,
        Codec::CacheGen => 2 * (codec.bins / 2 - 1),
        _ => 255,
    }
}

/// Scale and offset of a group as numbers; `None` if they are no finite numbers.
fn group_numbers(
    group: (u16, u16),
    dtype: Dtype,
    quantizer: Quantizer,
    largest_code: u8,
) -> Option<(f32, f32)> {
    let (scale, offset) = widen_group(group, dtype)?;
    Some(match quantizer {
        Quantizer::PerToken => {
            let zero_code = f32::from(largest_code / 2);
            (scale / zero_code, -(zero_code * (scale / zero_code)))
        }
        _ => (scale, offset),
    })
}

/// The elements that a quantized plane stands for, little-endian.
#[must_use]
pub fn dequantize(quantized: &Quantized, shape: &Shape, out_dtype: impl Into<OutDtype>) -> Vec<u8> {
    let out_dtype = out_dtype.into();
    let &Quantized { quantizer, scale_dtype, ref groups, largest_code, ref codes } = quantized;
    let divisor = if let OutDtype::Fp8E4M3 { scale } = out_dtype { scale } else { 1.0 };
    let mut out = Vec::new();
    for (element, &code) in codes.iter().enumerate() {
        let group = groups[group_of(element, shape, quantizer)];
        let numbers = group_numbers(group, scale_dtype, quantizer, largest_code);
        let (scale, offset) = numbers.unwrap_or((f32::NAN, f32::NAN));
        let value = f32::from(code) * (scale / divisor) + offset / divisor;
        match out_dtype {
            OutDtype::Bf16 => out.extend(narrow(value, Dtype::Bf16).to_le_bytes()),
            OutDtype::F16 => out.extend(narrow(value, Dtype::F16).to_le_bytes()),
            OutDtype::Fp8E4M3 { .. } => out.push(narrow_to_e4m3(value)),
        }
    }
    out
}

/// Codes as the bytes of a payload: plain part and section.
#[must_use]
pub fn pack(codec: impl Into<PlaneCodec>, shape: &Shape, codes: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (low_bits, high_bits) = bits_of(codec.into());
    let low: Vec<u8> = codes.iter().map(|code| code % (1 << low_bits)).collect();
    let high: Vec<u8> = codes.iter().map(|code| code >> low_bits).collect();
    (pack_part(&low, low_bits, shape), pack_part(&high, high_bits, shape))
}

/// The inverse of [`pack`].
#[must_use]
pub fn unpack(codec: impl Into<PlaneCodec>, shape: &Shape, plain: &[u8], section: &[u8]) -> Vec<u8> {
    let (low_bits, high_bits) = bits_of(codec.into());
    let (low, high) = (unpack_part(plain, low_bits, shape), unpack_part(section, high_bits, shape));
    low.iter().zip(high).map(|(low, high)| low + (high << low_bits)).collect()
}

/// Bits of a code that are in the plain part, and in the section.
fn bits_of(codec: PlaneCodec) -> (u32, u32) {
    match largest_code(codec) {
        0..=7 if codec.codec == Codec::Int3 => (1, 2),
        0..=15 => (0, 4),
        16..=31 => (1, 4),
        _ => (4, 4),
    }
}

/// Byte and lowest bit of each of a part's elements, `bits` wide: 4 bits and 2 bits with the dimensions of a byte
/// spread over the row, single bits side by side.
fn place(element: usize, bits: u32, shape: &Shape) -> (usize, u32) {
    let dim = usize::from(shape.head_dim);
    let (row, j) = (element / dim, element % dim);
    match bits {
        4 => (row * dim / 2 + j % (dim / 2), if j < dim / 2 { 0 } else { 4 }),
        2 => (row * dim / 4 + j % (dim / 4), [0, 2, 4, 6][j / (dim / 4)]),
        _ => (element / 8, [0, 1, 2, 3, 4, 5, 6, 7][element % 8]),
    }
}

fn pack_part(values: &[u8], bits: u32, shape: &Shape) -> Vec<u8> {
    let mut packed = vec![0; values.len() * usize::try_from(bits).unwrap_or(0) / 8];
    if bits > 0 {
        for (element, value) in values.iter().enumerate() {
            let (byte, bit) = place(element, bits, shape);
            packed[byte] += value << bit;
        }
    }
    packed
}

fn unpack_part(packed: &[u8], bits: u32, shape: &Shape) -> Vec<u8> {
    let value = |element| {
        let (byte, bit) = place(element, bits, shape);
        packed[byte] >> bit & ((1 << bits) - 1)
    };
    (0..shape.elements_per_plane()).map(|element| if bits == 0 { 0 } else { value(element) }).collect()
}

/// Decodes the encoded bytes of one plane, whoever encoded them.
///
/// # Errors
/// As [`crate::Decoder::decode`].
pub fn decode_plane(
    shape: &Shape,
    entry: &PlaneEntry,
    encoded: &[u8],
    out_dtype: impl Into<OutDtype>,
) -> Result<Vec<u8>, DecodeError> {
    let out_dtype = out_dtype.into();
    let layout = check_entry(shape, entry)?;
    let &PlaneEntry { codec, quantizer, compression, bins, bytes: expected_bytes, .. } = entry;
    check_out_dtype(shape, codec, out_dtype)?;
    if encoded.len() as u64 != u64::from(expected_bytes) {
        return Err(DecodeError::Length { got_bytes: encoded.len(), expected_bytes });
    }
    check_crc(encoded, entry)?;
    let elements = shape.elements_per_plane();
    let Some(scale_dtype) = entry.scale_dtype else {
        if codec == Codec::Raw {
            return Ok(encoded.to_vec());
        }
        let (high, low) = lossless_sections(encoded)?;
        let (high, low) = (section(high, compression, elements)?, section(low, compression, elements)?);
        return Ok((0..elements).flat_map(|element| [low[element], high[element]]).collect());
    };
    let plane_codec = PlaneCodec { codec, compression, bins, step_milli: 0 };
    let largest_code = largest_code(plane_codec);
    let bits = |at: usize| u16::from_le_bytes([encoded[at], encoded[at + 1]]);
    let group = |group: usize| match quantizer {
        Quantizer::PerToken => (bits(2 * group), 0),
        _ => (bits(2 * group), bits(layout.scale_bytes + 2 * group)),
    };
    let groups: Vec<(u16, u16)> = (0..group_count(shape, quantizer)).map(group).collect();
    let (plain, rest) = encoded[layout.scale_bytes + layout.offset_bytes..].split_at(layout.plain_bytes);
    let mut quantized = Quantized { quantizer, scale_dtype, groups, largest_code, codes: vec![] };
    check_groups(&quantized, out_dtype)?;
    quantized.codes = unpack(plane_codec, shape, plain, &section(rest, compression, layout.section_bytes)?);
    Ok(dequantize(&quantized, shape, out_dtype))
}

/// Checks that every code of every group stands for a finite number, divided by a scale of FP8 too.
fn check_groups(quantized: &Quantized, out_dtype: OutDtype) -> Result<(), DecodeError> {
    let &Quantized { quantizer, scale_dtype, ref groups, largest_code, .. } = quantized;
    let mut divided = Ok(());
    for (group, &(scale_bits, offset_bits)) in groups.iter().enumerate() {
        let numbers = group_numbers((scale_bits, offset_bits), scale_dtype, quantizer, largest_code);
        let numbers = numbers.filter(|&numbers| all_finite(numbers, largest_code));
        let (scale, offset) = numbers.ok_or(DecodeError::Scale { group, scale_bits, offset_bits })?;
        if let OutDtype::Fp8E4M3 { scale: divisor } = out_dtype
            && !all_finite((scale / divisor, offset / divisor), largest_code)
        {
            divided = Err(DecodeError::OutScale { scale_bits: divisor.to_bits() });
        }
    }
    divided
}

/// A section's bytes, decompressed if it isn't stored.
fn section(section: &[u8], compression: Compression, expected_bytes: usize) -> Result<Vec<u8>, FrameError> {
    let got_bytes = section.len();
    if got_bytes == expected_bytes {
        return Ok(section.to_vec());
    }
    let mut bytes = vec![0; expected_bytes];
    let written = match compression {
        Compression::None => return Err(FrameError::Uncompressed { got_bytes, expected_bytes }),
        Compression::Zstd => {
            let stated = zstd_safe::get_frame_content_size(section).ok().flatten();
            if stated != Some(expected_bytes as u64) {
                return Err(FrameError::ContentSize { got_bytes: stated, expected_bytes });
            }
            zstd_safe::decompress(&mut bytes[..], section)
                .map_err(|code| FrameError::Zstd(zstd_safe::get_error_name(code)))?
        }
        Compression::Deflate => {
            let result = libdeflater::Decompressor::new().deflate_decompress(section, &mut bytes);
            check_deflate(result, expected_bytes)?;
            expected_bytes
        }
        Compression::Sliced => {
            // Its kernel of plain loops is as slow and obvious as what could stand here.
            sliced::decode(Isa::Scalar, section, &mut bytes)?;
            expected_bytes
        }
    };
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
        Quantizer::PerToken => tokens,
    }
}

/// The group of an element, given by its index in the plane.
fn group_of(element: usize, shape: &Shape, quantizer: Quantizer) -> usize {
    let (heads, dim) = (usize::from(shape.kv_heads), usize::from(shape.head_dim));
    let (token, head, j) = (element / (heads * dim), element / dim % heads, element % dim);
    match quantizer {
        Quantizer::PerTokenAndHead => token * heads + head,
        Quantizer::PerToken => token,
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

/// The E4M3 nearest to a value, ties to the even one, at most 448: found by looking at all of them.
fn narrow_to_e4m3(value: f32) -> u8 {
    let number = |bits: u8| {
        let (exponent, fraction) = (i32::from(bits >> 3), f64::from(bits & 7));
        if exponent == 0 { fraction / 512.0 } else { (8.0 + fraction) * 2.0_f64.powi(exponent - 10) }
    };
    let magnitude = f64::from(value.abs());
    let distance = |bits: u8| (number(bits) - magnitude).abs();
    let nearest = (0..0x7f_u8).fold(0, |best, bits| {
        let closer = distance(bits) < distance(best) || (distance(bits) == distance(best) && bits % 2 == 0);
        if closer { bits } else { best }
    });
    if value.is_sign_negative() { nearest | 0x80 } else { nearest }
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
            prop_assert_eq!(narrow_to_e4m3(value), dtype::f32_to_e4m3(value));
            let in_range = value.rem_euclid(2.0) * 2.0_f32.powi(i32::from(bits.to_le_bytes()[3] % 20) - 11);
            prop_assume!(!in_range.is_nan());
            prop_assert_eq!(narrow_to_e4m3(in_range), dtype::f32_to_e4m3(in_range));
        }
    }
}
