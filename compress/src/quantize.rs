//! From 16-bit floats to integer codes with shared scales and offsets.
//!
//! A group's offset is its smallest element and its scale the span of its elements divided by the largest code, both
//! 16-bit floats; a code is the element's distance from the offset times the reciprocal of the scale, to nearest, ties to
//! even. All arithmetic is IEEE, so every machine writes the same bytes.
//!
//! Plain loops over slices that the compiler turns into vector code, compiled once for each instruction set. They are `for` loops and
//! functions that are always inlined: what goes through a closure or an adapter's `fold` is compiled for the least CPU.

use crate::dtype::{self, Dtype};
use crate::packing::Packing;
use crate::{Isa, Quantizer, Shape};

/// Smallest and largest element of every group that shares a scale.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    pub(crate) smallest: Vec<f32>,
    pub(crate) largest: Vec<f32>,
    /// The same, as integers.
    ordered: [Vec<i16>; 2],
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
    let mut any = false;
    for element in plane.as_chunks::<2>().0 {
        any |= u16::from_le_bytes(*element) & mask == mask;
    }
    if any { elements(plane).position(|bits| bits & mask == mask) } else { None }
}

#[inline(always)]
fn lesser(a: f32, b: f32) -> f32 {
    // One instruction, unlike `f32::min` with its rules for NaN.
    if b < a { b } else { a }
}

/// A float's 16 bits, of either type, as a number that is ordered as the floats are, with -0 next below 0.
#[inline(always)]
fn ordered(bits: [u8; 2]) -> i16 {
    let bits = i16::from_le_bytes(bits);
    bits ^ (bits >> 15 & i16::MAX)
}

/// The bits that [`ordered`] made a number of.
#[inline(always)]
fn unordered(number: i16) -> u16 {
    (number ^ (number >> 15 & i16::MAX)).cast_unsigned()
}

#[inline(always)]
fn measure_body(plane: &[u8], shape: &Shape, quantizer: Quantizer, ranges: &mut Ranges) {
    let Ranges { smallest, largest, ordered: [least, most] } = ranges;
    let groups = match quantizer {
        Quantizer::PerTokenAndHead => shape.head_rows(),
        _ => shape.channels(),
    };
    least.clear();
    least.resize(groups, i16::MAX);
    most.clear();
    most.resize(groups, i16::MIN);
    if quantizer == Quantizer::PerTokenAndHead {
        let rows = plane.chunks_exact(usize::from(shape.head_dim) * Dtype::BYTES);
        for ((least, most), row) in least.iter_mut().zip(&mut *most).zip(rows) {
            (*least, *most) = range_of_row(row);
        }
    } else {
        for token in plane.chunks_exact(shape.channels() * Dtype::BYTES) {
            widen_ranges(least, most, token.as_chunks::<2>().0);
        }
    }
    smallest.clear();
    largest.clear();
    for (&least, &most) in least.iter().zip(&*most) {
        smallest.push(shape.dtype.widen(unordered(least)));
        largest.push(shape.dtype.widen(unordered(most)));
    }
}

#[inline(always)]
fn widen_ranges(least: &mut [i16], most: &mut [i16], token: &[[u8; 2]]) {
    for ((least, most), &bits) in least.iter_mut().zip(most).zip(token) {
        let number = ordered(bits);
        *least = if number < *least { number } else { *least };
        *most = if number > *most { number } else { *most };
    }
}

/// Smallest and largest of a row: those of 32 columns first, so that as many are compared at a time.
#[inline(always)]
fn range_of_row(row: &[u8]) -> (i16, i16) {
    let (mut least, mut most) = ([i16::MAX; 32], [i16::MIN; 32]);
    let (columns, rest) = row.as_chunks::<2>().0.as_chunks::<32>();
    for values in columns {
        for ((least, most), &bits) in least.iter_mut().zip(&mut most).zip(values) {
            let number = ordered(bits);
            *least = if number < *least { number } else { *least };
            *most = if number > *most { number } else { *most };
        }
    }
    let mut range = (i16::MAX, i16::MIN);
    for (&least, &most) in least.iter().zip(&most) {
        range = (range.0.min(least), range.1.max(most));
    }
    for &bits in rest {
        let number = ordered(bits);
        range = (range.0.min(number), range.1.max(number));
    }
    range
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
        Dtype::Bf16 => quantize_with::<true>(plane, shape, groups, row, plain, section),
        Dtype::F16 => quantize_with::<false>(plane, shape, groups, row, plain, section),
    }
}

#[inline(always)]
fn widened<const BF16: bool>(bits: [u8; 2]) -> f32 {
    let bits = u16::from_le_bytes(bits);
    if BF16 { dtype::bf16_to_f32(bits) } else { dtype::f16_to_f32(bits) }
}

#[inline(always)]
fn quantize_with<const BF16: bool>(
    plane: &[u8],
    shape: &Shape,
    groups: &Groups<'_>,
    codes: &mut Vec<u8>,
    plain: &mut Vec<u8>,
    section: &mut Vec<u8>,
) {
    let (dim, packing) = (usize::from(shape.head_dim), groups.packing);
    let elements = shape.elements_per_plane();
    let largest_code = f32::from(groups.largest_code);
    codes.resize(dim, 0);
    let (plain_at, section_at) = (plain.len(), section.len());
    plain.resize(plain_at + packing.plain_bytes(elements), 0);
    section.resize(section_at + packing.section_bytes(elements), 0);
    let (mut plain, mut section) = (&mut plain[plain_at..], &mut section[section_at..]);
    for (index, row) in plane.chunks_exact(dim * Dtype::BYTES).enumerate() {
        let values = codes.iter_mut().zip(row.as_chunks::<2>().0);
        if groups.per_channel {
            let first = index * dim % groups.offsets.len();
            let channels =
                groups.reciprocals[first..first + dim].iter().zip(&groups.offsets[first..first + dim]);
            for ((to, &bits), (&reciprocal, &offset)) in values.zip(channels) {
                *to = code(widened::<BF16>(bits), reciprocal, offset, largest_code);
            }
        } else {
            let (reciprocal, offset) = (groups.reciprocals[index], groups.offsets[index]);
            for (to, &bits) in values {
                *to = code(widened::<BF16>(bits), reciprocal, offset, largest_code);
            }
        }
        let (plain_row, section_row) = packing.rows(dim, &mut plain, &mut section);
        packing.pack_row(codes, plain_row, section_row);
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
