//! From 16-bit floats to integer codes with shared scales and offsets.
//!
//! A group's offset is its smallest element and its scale the span of its elements divided by the largest code, both
//! 16-bit floats; a code is the element's distance from the offset times the reciprocal of the scale, to nearest, ties to
//! even. All arithmetic is IEEE, so every machine writes the same bytes.
//!
//! Plain loops over slices that the compiler turns into vector code, compiled once for each instruction set.

use crate::dtype::{self, Dtype};
use crate::packing::Packing;
use crate::{Isa, Quantizer, Shape};

/// Smallest and largest element of every group that shares a scale.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    pub(crate) smallest: Vec<f32>,
    pub(crate) largest: Vec<f32>,
}

/// Compiles a function's body for each instruction set, and calls the one for the CPU.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $name:ident = $body:ident ($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?) => {
        $(#[$doc])*
        pub(crate) fn $name(isa: Isa, $($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,f16c")]
            fn avx2($($argument: $type),*) $(-> $result)? {
                $body($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")]
            fn avx512($($argument: $type),*) $(-> $result)? {
                $body($($argument),*)
            }
            match isa {
                // SAFETY: this instruction set is chosen only where the CPU has it.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2($($argument),*) },
                // SAFETY: likewise.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { avx512($($argument),*) },
                _ => $body($($argument),*),
            }
        }
    };
}

for_each_isa! {
    /// Index of the first element of a plane that is infinite or not a number.
    first_not_finite = first_not_finite_body(plane: &[u8], dtype: Dtype) -> Option<usize>
}

for_each_isa! {
    /// Takes the ranges of all groups of a plane of finite elements, in the order of the scales.
    measure = measure_body(plane: &[u8], shape: &Shape, quantizer: Quantizer, ranges: &mut Ranges)
}

for_each_isa! {
    /// Appends the plain part of a plane's codes to `plain` and the part to be compressed to `section`; scales and
    /// offsets are in the quantizer's order, and `row` is scratch.
    quantize = quantize_body(
        plane: &[u8],
        shape: &Shape,
        groups: &Groups<'_>,
        row: &mut Vec<u8>,
        plain: &mut Vec<u8>,
        section: &mut Vec<u8>,
    )
}

/// What a plane's codes are made with.
pub(crate) struct Groups<'a> {
    /// Reciprocals of the scales, 0 for a scale of 0.
    pub(crate) reciprocals: &'a [f32],
    pub(crate) offsets: &'a [f32],
    pub(crate) per_channel: bool,
    pub(crate) largest_code: u8,
    pub(crate) packing: Packing,
}

/// Widens a plane of little-endian elements to `f32`.
pub(crate) fn widen(plane: &[u8], dtype: Dtype, values: &mut Vec<f32>) {
    values.clear();
    match dtype {
        Dtype::Bf16 => values.extend(elements(plane).map(dtype::bf16_to_f32)),
        Dtype::F16 => values.extend(elements(plane).map(dtype::f16_to_f32)),
    }
}

#[inline(always)]
fn elements(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.as_chunks::<2>().0.iter().map(|element| u16::from_le_bytes(*element))
}

#[inline(always)]
fn first_not_finite_body(plane: &[u8], dtype: Dtype) -> Option<usize> {
    let mask = dtype.exponent_mask();
    // Without an early end, so that it is done several elements at a time.
    let any = elements(plane).fold(false, |any, bits| any | (bits & mask == mask));
    if any { elements(plane).position(|bits| bits & mask == mask) } else { None }
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

#[inline(always)]
fn measure_body(plane: &[u8], shape: &Shape, quantizer: Quantizer, ranges: &mut Ranges) {
    match shape.dtype {
        Dtype::Bf16 => measure_with(plane, shape, quantizer, ranges, dtype::bf16_to_f32),
        Dtype::F16 => measure_with(plane, shape, quantizer, ranges, dtype::f16_to_f32),
    }
}

#[inline(always)]
fn measure_with(
    plane: &[u8],
    shape: &Shape,
    quantizer: Quantizer,
    Ranges { smallest, largest }: &mut Ranges,
    widen: impl Fn(u16) -> f32,
) {
    smallest.clear();
    largest.clear();
    if quantizer == Quantizer::PerTokenAndHead {
        for row in plane.chunks_exact(usize::from(shape.head_dim) * Dtype::BYTES) {
            let (least, most) = range_of_row(row, &widen);
            smallest.push(least);
            largest.push(most);
        }
        return;
    }
    smallest.resize(shape.channels(), f32::INFINITY);
    largest.resize(shape.channels(), f32::NEG_INFINITY);
    for token in plane.chunks_exact(shape.channels() * Dtype::BYTES) {
        for ((least, most), bits) in smallest.iter_mut().zip(largest.iter_mut()).zip(elements(token)) {
            let value = widen(bits);
            *least = lesser(*least, value);
            *most = greater(*most, value);
        }
    }
}

/// Smallest and largest of a row: those of sixteen columns first, since a compiler may not reorder comparisons.
///
/// Of zeros of both signs, which one is smallest depends on the order; the encoder makes all of them positive.
#[inline(always)]
fn range_of_row(row: &[u8], widen: &impl Fn(u16) -> f32) -> (f32, f32) {
    let (mut least, mut most) = ([f32::INFINITY; 16], [f32::NEG_INFINITY; 16]);
    let (columns, rest) = row.as_chunks::<32>();
    for values in columns {
        for ((least, most), bits) in least.iter_mut().zip(&mut most).zip(elements(values)) {
            let value = widen(bits);
            *least = lesser(*least, value);
            *most = greater(*most, value);
        }
    }
    let rest = || elements(rest).map(widen);
    let least = least.into_iter().chain(rest()).fold(f32::INFINITY, lesser);
    (least, most.into_iter().chain(rest()).fold(f32::NEG_INFINITY, greater))
}

/// Bits of scale and offset of a group with this range, as `dtype`, the type of the plane's elements.
///
/// The offset is exact, but for the sign of zero. The scale is rounded up, so that every element is within half a scale
/// of what its code stands for, and is not subnormal, so that it has a reciprocal. Only where the largest code would then stand for more
/// than the largest finite bfloat16 is the scale lowered, and the elements at that end are cut to what the largest code stands for.
///
/// `largest_used` is the largest code that elements get, at most `largest_code`.
pub(crate) fn scale_and_offset(
    smallest: f32,
    largest: f32,
    largest_used: u8,
    largest_code: u8,
    dtype: Dtype,
) -> (u16, u16) {
    let codes = f32::from(largest_code);
    let span = (f64::from(largest) - f64::from(smallest)) / f64::from(largest_used);
    if span == 0.0 {
        return (0, dtype.narrow(smallest + 0.0));
    }
    #[expect(clippy::cast_possible_truncation, reason = "rounding to nearest; the next line rounds up")]
    let nearest = dtype.narrow(span as f32);
    let rounded = nearest + u16::from(f64::from(dtype.widen(nearest)) < span);
    let mut scale = rounded.max(dtype.smallest_normal());
    // At most one binade down, and only for spans near the end of bfloat16.
    while codes * dtype.widen(scale) + smallest > dtype::BF16_MAX {
        scale -= 1;
    }
    (scale, dtype.narrow(smallest + 0.0))
}

/// What distances are multiplied by to be counted in scales.
pub(crate) fn reciprocal(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The code of a value: its distance from the offset in scales, to nearest, ties to even, at most `largest_code`.
#[inline(always)]
fn code(value: f32, reciprocal: f32, offset: f32, largest_code: f32) -> u8 {
    // 1.5 * 2^23: a sum with it has the nearest integer, ties to even, in its lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let [code, ..] = (lesser(largest_code, (value - offset) * reciprocal) + ROUND).to_bits().to_le_bytes();
    code
}

#[inline(always)]
fn quantize_body(
    plane: &[u8],
    shape: &Shape,
    groups: &Groups<'_>,
    row: &mut Vec<u8>,
    plain: &mut Vec<u8>,
    section: &mut Vec<u8>,
) {
    match shape.dtype {
        Dtype::Bf16 => quantize_with(plane, shape, groups, row, [plain, section], dtype::bf16_to_f32),
        Dtype::F16 => quantize_with(plane, shape, groups, row, [plain, section], dtype::f16_to_f32),
    }
}

#[inline(always)]
fn quantize_with(
    plane: &[u8],
    shape: &Shape,
    groups: &Groups<'_>,
    codes: &mut Vec<u8>,
    [plain, section]: [&mut Vec<u8>; 2],
    widen: impl Fn(u16) -> f32,
) {
    let dim = usize::from(shape.head_dim);
    let largest_code = f32::from(groups.largest_code);
    codes.resize(dim, 0);
    for (index, row) in plane.chunks_exact(dim * Dtype::BYTES).enumerate() {
        let values = codes.iter_mut().zip(elements(row));
        if groups.per_channel {
            let first = index * dim % groups.offsets.len();
            let channels =
                groups.reciprocals[first..first + dim].iter().zip(&groups.offsets[first..first + dim]);
            for ((to, bits), (&reciprocal, &offset)) in values.zip(channels) {
                *to = code(widen(bits), reciprocal, offset, largest_code);
            }
        } else {
            let (reciprocal, offset) = (groups.reciprocals[index], groups.offsets[index]);
            for (to, bits) in values {
                *to = code(widen(bits), reciprocal, offset, largest_code);
            }
        }
        groups.packing.pack_row(codes, plain, section);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_instruction_set_quantizes_alike(
            bits in proptest::collection::vec(any::<u16>(), 1..200), head_dim in 1_u16..20, per_channel: bool, f16: bool,
        ) {
            let dtype = if f16 { Dtype::F16 } else { Dtype::Bf16 };
            let shape = Shape { layers: 1, kv_heads: 2, head_dim: head_dim * 8, tokens: 5, dtype };
            let finite = |bits: u16| if bits & dtype.exponent_mask() == dtype.exponent_mask() { bits & 0x807f } else { bits };
            let plane: Vec<u8> =
                bits.iter().cycle().take(shape.elements_per_plane()).flat_map(|&bits| finite(bits).to_le_bytes()).collect();
            let quantizer = if per_channel { Quantizer::PerChannel } else { Quantizer::PerTokenAndHead };
            for packing in [
                Packing::Nibbles, Packing::NibblesAndNibbles, Packing::NibblesAndBits, Packing::CrumbsAndBits,
            ] {
                let largest_code = match packing {
                    Packing::Nibbles => 15,
                    Packing::NibblesAndNibbles => 255,
                    Packing::NibblesAndBits => 31,
                    Packing::CrumbsAndBits => 7,
                };
                let results = Isa::supported().map(|isa| {
                    prop_assert_eq!(first_not_finite(isa, &plane, dtype), None);
                    let mut ranges = Ranges::default();
                    measure(isa, &plane, &shape, quantizer, &mut ranges);
                    let pairs = ranges.smallest.iter().zip(&ranges.largest);
                    let (reciprocals, offsets): (Vec<f32>, Vec<f32>) = pairs
                        .map(|(&smallest, &largest)| {
                            let (scale, offset) = scale_and_offset(smallest, largest, largest_code, largest_code, dtype);
                            (reciprocal(dtype.widen(scale)), dtype.widen(offset))
                        })
                        .unzip();
                    let groups = Groups { reciprocals: &reciprocals, offsets: &offsets, per_channel, largest_code, packing };
                    let (mut row, mut plain, mut section) = (vec![], vec![], vec![]);
                    quantize(isa, &plane, &shape, &groups, &mut row, &mut plain, &mut section);
                    Ok((offsets.iter().map(|offset| offset.to_bits()).collect::<Vec<_>>(), plain, section))
                });
                let results: Vec<_> = results.collect::<Result<_, TestCaseError>>()?;
                prop_assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
            }
        }
    }
}
