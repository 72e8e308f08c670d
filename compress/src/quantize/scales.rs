//! Scales and offsets from ranges.

use super::{Groups, Job, PADDING, Ranges};
use crate::Isa;
use crate::dtype::{self, Dtype};

/// Writes scale and offset of every group, as the type of the plane's elements, and what codes are made with.
///
/// The offset is the smallest element, exact but for the sign of zero. The scale is rounded up, so that every element is within half a
/// scale of what its code stands for, and is not subnormal, so that it has a reciprocal. Only where the largest code would then stand for
/// more than the largest finite bfloat16 is the scale lowered, and the elements at that end are cut to what the largest code stands for.
pub(super) fn of_ranges(
    isa: Isa,
    job: &Job<'_>,
    ranges: &Ranges,
    groups: &mut Groups,
    scale_bytes: &mut [u8],
    offset_bytes: &mut [u8],
) {
    let count = ranges.most.len();
    for numbers in [&mut groups.reciprocals, &mut groups.offsets] {
        numbers.resize(count.next_multiple_of(PADDING), 0.0);
        numbers[count..].fill(0.0);
    }
    let all = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this instruction set is chosen only where the CPU has it.
        Isa::Avx2 => |job: &Job<'_>, ranges: &Ranges, groups: &mut Groups, bytes: [&mut [u8]; 2]| unsafe {
            all_avx2(job, ranges, groups, bytes)
        },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx512 => |job: &Job<'_>, ranges: &Ranges, groups: &mut Groups, bytes: [&mut [u8]; 2]| unsafe {
            all_avx512(job, ranges, groups, bytes)
        },
        _ => all,
    };
    all(job, ranges, groups, [scale_bytes, offset_bytes]);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn all_avx2(job: &Job<'_>, ranges: &Ranges, groups: &mut Groups, bytes: [&mut [u8]; 2]) {
    all(job, ranges, groups, bytes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn all_avx512(job: &Job<'_>, ranges: &Ranges, groups: &mut Groups, bytes: [&mut [u8]; 2]) {
    all(job, ranges, groups, bytes);
}

#[inline(always)]
fn all(job: &Job<'_>, ranges: &Ranges, groups: &mut Groups, bytes: [&mut [u8]; 2]) {
    match job.shape.dtype {
        Dtype::Bf16 => all_of::<true>(job, ranges, groups, bytes),
        Dtype::F16 => all_of::<false>(job, ranges, groups, bytes),
    }
}

/// Plain loops, several groups at a time, that the compiler makes vector code of; without the adapters of iterators, whose code would
/// not be compiled for the caller's instruction set.
#[inline(always)]
fn all_of<const BF16: bool>(
    job: &Job<'_>,
    ranges: &Ranges,
    groups: &mut Groups,
    [scale_bytes, offset_bytes]: [&mut [u8]; 2],
) {
    let dtype = job.shape.dtype;
    let (used, largest) = (f32::from(job.largest_used), f32::from(job.largest_code));
    let (mut too_large, mut cut) = (false, false);
    let count = ranges.most.len();
    let (most, least) = (&ranges.most[..count], &ranges.least[..count]);
    let (reciprocals, offsets) = (&mut groups.reciprocals[..count], &mut groups.offsets[..count]);
    let (scale_bytes, offset_bytes) =
        (&mut scale_bytes.as_chunks_mut::<2>().0[..count], &mut offset_bytes.as_chunks_mut::<2>().0[..count]);
    for group in 0..count {
        let (smallest, greatest) = (widen::<BF16>(least[group]), widen::<BF16>(most[group]));
        let scale = scale::<BF16>(smallest, greatest, used);
        let offset = if least[group] == 0x8000 { 0 } else { least[group] };
        scale_bytes[group] = scale.to_le_bytes();
        offset_bytes[group] = offset.to_le_bytes();
        let widened = widen::<BF16>(scale);
        let reciprocal = if widened == 0.0 { 0.0 } else { 1.0 / widened };
        too_large |= largest * widened + smallest > dtype::BF16_MAX;
        cut |= (greatest - smallest) * reciprocal >= used + 0.5;
        reciprocals[group] = reciprocal;
        offsets[group] = widen::<BF16>(offset);
    }
    if too_large {
        cut = true;
        for group in 0..count {
            let smallest = dtype.widen(least[group]);
            let mut scale = u16::from_le_bytes(scale_bytes[group]);
            // At most one binade down, and only for spans near the end of bfloat16.
            while largest * dtype.widen(scale) + smallest > dtype::BF16_MAX {
                scale -= 1;
            }
            scale_bytes[group] = scale.to_le_bytes();
            reciprocals[group] = if scale == 0 { 0.0 } else { 1.0 / dtype.widen(scale) };
        }
    }
    groups.must_cut = cut;
}

/// Bits of the smallest scale, not subnormal unless it is 0, that reaches from the smallest to the greatest element.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "rounding to nearest; the next line rounds up")]
fn scale<const BF16: bool>(smallest: f32, greatest: f32, used: f32) -> u16 {
    let span = (f64::from(greatest) - f64::from(smallest)) / f64::from(used);
    let nearest = if BF16 { dtype::f32_to_bf16(span as f32) } else { dtype::f32_to_f16(span as f32) };
    let rounded = nearest + u16::from(f64::from(widen::<BF16>(nearest)) < span);
    let smallest_normal = if BF16 { Dtype::Bf16.smallest_normal() } else { Dtype::F16.smallest_normal() };
    if span == 0.0 { 0 } else { rounded.max(smallest_normal) }
}

#[inline(always)]
fn widen<const BF16: bool>(bits: u16) -> f32 {
    if BF16 { dtype::bf16_to_f32(bits) } else { dtype::f16_to_f32(bits) }
}
