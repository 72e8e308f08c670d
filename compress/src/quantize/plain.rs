//! Plain loops over slices: what every kernel must give, and what serves instruction sets that have none of their own, for which the
//! compiler turns them into vector code. They are `for` loops and functions that are always inlined: what goes through a closure or an
//! adapter's `fold` is compiled for the least CPU.

use super::{Groups, Job, Ranges};
use crate::Isa;
use crate::dtype::{self, Dtype};

/// Widens a plane of little-endian elements to `f32`.
pub(crate) fn widen(plane: &[u8], dtype: Dtype, values: &mut Vec<f32>) {
    values.clear();
    match dtype {
        Dtype::Bf16 => values.extend(elements(plane).map(dtype::bf16_to_f32)),
        Dtype::F16 => values.extend(elements(plane).map(dtype::f16_to_f32)),
    }
}

fn elements(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.as_chunks::<2>().0.iter().map(|element| u16::from_le_bytes(*element))
}

/// Index of the first element of a plane that is infinite or not a number.
pub(crate) fn first_not_finite(plane: &[u8], dtype: Dtype) -> Option<usize> {
    let mask = dtype.exponent_mask();
    // Without an early end, so that it is done several elements at a time.
    let any = elements(plane).fold(false, |any, bits| any | (bits & mask == mask));
    if any { elements(plane).position(|bits| bits & mask == mask) } else { None }
}

/// Takes the ranges of all groups.
pub(super) fn measure(isa: Isa, job: &Job<'_>, ranges: &mut Ranges) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this instruction set is chosen only where the CPU has it.
        Isa::Avx2 | Isa::Avx512 => unsafe { measure_avx2(job, ranges) },
        _ => measure_with(job, ranges),
    }
}

/// Fills both parts with the codes of all elements; `codes` is scratch.
pub(super) fn write_codes(
    isa: Isa,
    job: &Job<'_>,
    groups: &Groups,
    codes: &mut Vec<u8>,
    plain: &mut [u8],
    section: &mut [u8],
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this instruction set is chosen only where the CPU has it.
        Isa::Avx2 => unsafe { write_codes_avx2(job, groups, codes, plain, section) },
        _ => write_codes_of(job, groups, codes, plain, section),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn measure_avx2(job: &Job<'_>, ranges: &mut Ranges) {
    measure_with(job, ranges);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn write_codes_avx2(
    job: &Job<'_>,
    groups: &Groups,
    codes: &mut Vec<u8>,
    plain: &mut [u8],
    section: &mut [u8],
) {
    write_codes_of(job, groups, codes, plain, section);
}

/// A float's 16 bits, of either type, as a number that is ordered as the floats are, with -0 next below 0.
#[inline(always)]
fn ordered(bits: u16) -> i16 {
    let bits = bits.cast_signed();
    bits ^ (bits >> 15 & i16::MAX)
}

/// The bits that [`ordered`] made a number of.
#[inline(always)]
fn unordered(number: u16) -> u16 {
    let number = number.cast_signed();
    (number ^ (number >> 15 & i16::MAX)).cast_unsigned()
}

#[inline(always)]
fn measure_with(job: &Job<'_>, Ranges { most, least, .. }: &mut Ranges) {
    // As ordered numbers, until all are found.
    most.fill(i16::MIN.cast_unsigned());
    least.fill(i16::MAX.cast_unsigned());
    if job.per_channel() {
        for token in job.plane.chunks_exact(job.shape.channels() * Dtype::BYTES) {
            widen_ranges(most, least, token.as_chunks::<2>().0);
        }
    } else {
        let rows = job.plane.chunks_exact(usize::from(job.shape.head_dim) * Dtype::BYTES);
        for ((most, least), row) in most.iter_mut().zip(&mut *least).zip(rows) {
            let (mut columns, mut rest) =
                ([[i16::MIN.cast_unsigned(); 32], [i16::MAX.cast_unsigned(); 32]], [*most, *least]);
            let (whole, last) = row.as_chunks::<2>().0.as_chunks::<32>();
            let [columns_most, columns_least] = &mut columns;
            for values in whole {
                widen_ranges(columns_most, columns_least, values);
            }
            for index in 0..32 {
                rest = wider(rest, columns_most[index], columns_least[index]);
            }
            for &bits in last {
                let number = ordered(u16::from_le_bytes(bits)).cast_unsigned();
                rest = wider(rest, number, number);
            }
            [*most, *least] = rest;
        }
    }
    for numbers in [most, least] {
        for number in numbers.iter_mut() {
            *number = unordered(*number);
        }
    }
}

#[inline(always)]
fn wider([most, least]: [u16; 2], greater: u16, smaller: u16) -> [u16; 2] {
    [
        if greater.cast_signed() > most.cast_signed() { greater } else { most },
        if smaller.cast_signed() < least.cast_signed() { smaller } else { least },
    ]
}

#[inline(always)]
fn widen_ranges(most: &mut [u16], least: &mut [u16], elements: &[[u8; 2]]) {
    for ((most, least), &bits) in most.iter_mut().zip(least).zip(elements) {
        let number = ordered(u16::from_le_bytes(bits)).cast_unsigned();
        [*most, *least] = wider([*most, *least], number, number);
    }
}

#[inline(always)]
fn write_codes_of(job: &Job<'_>, groups: &Groups, codes: &mut Vec<u8>, plain: &mut [u8], section: &mut [u8]) {
    match job.shape.dtype {
        Dtype::Bf16 => write_codes_with::<true>(job, groups, codes, plain, section),
        Dtype::F16 => write_codes_with::<false>(job, groups, codes, plain, section),
    }
}

#[inline(always)]
fn write_codes_with<const BF16: bool>(
    job: &Job<'_>,
    groups: &Groups,
    codes: &mut Vec<u8>,
    mut plain: &mut [u8],
    mut section: &mut [u8],
) {
    let dim = usize::from(job.shape.head_dim);
    let largest = f32::from(job.largest_used);
    codes.resize(dim, 0);
    for (index, row) in job.plane.chunks_exact(dim * Dtype::BYTES).enumerate() {
        let values = codes.iter_mut().zip(row.as_chunks::<2>().0);
        if job.per_channel() {
            let channels = index * dim % job.groups()..;
            let channels = groups.reciprocals[channels.clone()].iter().zip(&groups.offsets[channels]);
            for ((to, &bits), (&reciprocal, &offset)) in values.zip(channels) {
                *to = code(widened::<BF16>(bits), reciprocal, offset, largest);
            }
        } else {
            let (reciprocal, offset) = (groups.reciprocals[index], groups.offsets[index]);
            for (to, &bits) in values {
                *to = code(widened::<BF16>(bits), reciprocal, offset, largest);
            }
        }
        let (plain_row, section_row) = job.packing.rows(dim, &mut plain, &mut section);
        job.packing.pack_row(codes, plain_row, section_row);
    }
}

#[inline(always)]
fn widened<const BF16: bool>(bits: [u8; 2]) -> f32 {
    let bits = u16::from_le_bytes(bits);
    if BF16 { dtype::bf16_to_f32(bits) } else { dtype::f16_to_f32(bits) }
}

/// The code of a value: its distance from the offset in scales, to nearest, ties to even, at most `largest`.
#[inline(always)]
fn code(value: f32, reciprocal: f32, offset: f32, largest: f32) -> u8 {
    // 1.5 * 2^23: a sum with it has the nearest integer, ties to even, in its lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let distance = (value - offset) * reciprocal;
    // One instruction, unlike `f32::min` with its rules for NaN.
    let distance = if distance < largest { distance } else { largest };
    let [code, ..] = (distance + ROUND).to_bits().to_le_bytes();
    code
}
