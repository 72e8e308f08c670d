//! One element after the other: what every other kernel must give.

use super::Job;
use crate::dtype::{self, OutDtype};

/// Writes the plane to `out`; `row` has room for the codes of one head row.
pub(super) fn plane(job: &Job<'_>, row: &mut [u8], out: &mut [u8]) {
    match job.out_dtype {
        OutDtype::Bf16 => rows(job, row, out, |value, out: &mut [u8; 2]| {
            // The decoder has checked that no element leaves the range of bfloat16.
            *out = dtype::f32_to_bf16_in_range(value).to_le_bytes();
        }),
        OutDtype::F16 => rows(job, row, out, |value, out: &mut [u8; 2]| {
            *out = dtype::f32_to_f16(value).to_le_bytes();
        }),
        OutDtype::Fp8E4M3 { .. } => rows(job, row, out, |value, out: &mut [u8; 1]| {
            *out = [dtype::f32_to_e4m3(value)];
        }),
    }
}

#[inline(always)]
fn rows<const BYTES: usize>(
    job: &Job<'_>,
    row: &mut [u8],
    out: &mut [u8],
    write: impl Fn(f32, &mut [u8; BYTES]) + Copy,
) {
    let dim = job.head_dim;
    let codes = &mut row[..dim];
    let plain_bytes = job.packing.plain_bytes(dim);
    let section_bytes = job.packing.section_bytes(dim);
    for (index, out) in out.chunks_exact_mut(dim * BYTES).enumerate() {
        let plain = &job.plain[index * plain_bytes..][..plain_bytes];
        let section = &job.section[index * section_bytes..][..section_bytes];
        job.packing.unpack_row(plain, section, codes);
        let (out, _) = out.as_chunks_mut::<BYTES>();
        let elements = out.iter_mut().zip(codes.iter());
        if job.per_channel {
            let first = index * dim % job.scales.len();
            let groups = job.scales[first..first + dim].iter().zip(&job.offsets[first..first + dim]);
            for ((out, &code), (scale, offset)) in elements.zip(groups) {
                write(f32::from(code) * scale + offset, out);
            }
        } else {
            let (scale, offset) = (job.scales[index], job.offsets[index]);
            for (out, &code) in elements {
                write(f32::from(code) * scale + offset, out);
            }
        }
    }
}
