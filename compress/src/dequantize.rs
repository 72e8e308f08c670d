//! From integer codes, scales and offsets to 16-bit floats: where a plane's time goes besides zstd.
//!
//! Plain loops over slices that the compiler turns into SIMD code. On x86-64 the same bodies are compiled a second
//! time for AVX2, and the choice is made once per decoder. A product, then a sum, never fused: every machine gives the
//! same bits.

use crate::dtype::{self, Dtype};
use crate::{Codec, Quantizer};

/// The instruction set that the kernels were compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// What every CPU of the target has: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    /// AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Isa {
    /// The best that this CPU has.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            return Self::Avx2;
        }
        Self::Baseline
    }
}

/// A plane to dequantize: codes, scales and offsets as they lie, and what to make of them.
pub(crate) struct Job<'a> {
    /// `int8`: one byte per element; `int4`: two elements per byte as `docs/FORMAT.md` pairs them.
    pub(crate) codes: &'a [u8],
    /// One per channel, or one per head row.
    pub(crate) scales: &'a [f32],
    /// As many as there are scales.
    pub(crate) offsets: &'a [f32],
    pub(crate) head_dim: usize,
    pub(crate) codec: Codec,
    pub(crate) quantizer: Quantizer,
    pub(crate) out_dtype: Dtype,
}

/// Writes the plane to `out`, little-endian. The sizes of codes, scales, offsets and `out` agree.
pub(crate) fn dequantize(isa: Isa, job: &Job<'_>, out: &mut [u8]) {
    match isa {
        Isa::Baseline => plane(job, out),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: `Isa::detect` gives `Avx2` only where the CPU has it.
            unsafe { plane_avx2(job, out) }
        }
    }
}

/// # Safety
/// The CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn plane_avx2(job: &Job<'_>, out: &mut [u8]) {
    plane(job, out);
}

/// Chooses the loop once for the whole plane.
#[inline(always)]
fn plane(job: &Job<'_>, out: &mut [u8]) {
    match job.out_dtype {
        // The decoder has checked that no element leaves the range of bfloat16.
        Dtype::Bf16 => rows(job, out, dtype::f32_to_bf16_in_range),
        Dtype::F16 => rows(job, out, dtype::f32_to_f16),
    }
}

#[inline(always)]
fn rows(job: &Job<'_>, out: &mut [u8], narrow: impl Fn(f32) -> u16 + Copy) {
    // A loop of known length needs no prologue and no remainder: worth a copy for the head sizes that models have.
    match job.head_dim {
        64 => rows_of::<64>(job, out, narrow),
        128 => rows_of::<128>(job, out, narrow),
        _ => rows_of::<0>(job, out, narrow),
    }
}

/// `DIM` is the head dimension, or 0 to read it from the job.
#[inline(always)]
fn rows_of<const DIM: usize>(job: &Job<'_>, out: &mut [u8], narrow: impl Fn(f32) -> u16 + Copy) {
    let dim = if DIM == 0 { job.head_dim } else { DIM };
    let out_rows = out.chunks_exact_mut(dim * Dtype::BYTES);
    let channels = || job.scales.chunks_exact(dim).zip(job.offsets.chunks_exact(dim)).cycle();
    let rows = || job.scales.iter().zip(job.offsets);
    match (job.codec, job.quantizer) {
        (Codec::Int4, Quantizer::PerChannel) => {
            for ((out, codes), (scales, offsets)) in
                out_rows.zip(job.codes.chunks_exact(dim / 2)).zip(channels())
            {
                let (low, high) = out.split_at_mut(dim);
                let (low_scales, high_scales) = scales.split_at(dim / 2);
                let (low_offsets, high_offsets) = offsets.split_at(dim / 2);
                row(low, codes, low_nibble, low_scales.iter().zip(low_offsets), narrow);
                row(high, codes, high_nibble, high_scales.iter().zip(high_offsets), narrow);
            }
        }
        (Codec::Int4, _) => {
            for ((out, codes), group) in out_rows.zip(job.codes.chunks_exact(dim / 2)).zip(rows()) {
                let (low, high) = out.split_at_mut(dim);
                row(low, codes, low_nibble, std::iter::repeat(group), narrow);
                row(high, codes, high_nibble, std::iter::repeat(group), narrow);
            }
        }
        (_, Quantizer::PerChannel) => {
            for ((out, codes), (scales, offsets)) in out_rows.zip(job.codes.chunks_exact(dim)).zip(channels())
            {
                row(out, codes, |code| code, scales.iter().zip(offsets), narrow);
            }
        }
        _ => {
            for ((out, codes), group) in out_rows.zip(job.codes.chunks_exact(dim)).zip(rows()) {
                row(out, codes, |code| code, std::iter::repeat(group), narrow);
            }
        }
    }
}

#[inline(always)]
fn low_nibble(codes: u8) -> u8 {
    codes & 0x0f
}

#[inline(always)]
fn high_nibble(codes: u8) -> u8 {
    codes >> 4
}

/// One element for each byte of `codes`.
#[inline(always)]
fn row<'a>(
    out: &mut [u8],
    codes: &[u8],
    code: impl Fn(u8) -> u8,
    groups: impl Iterator<Item = (&'a f32, &'a f32)>,
    narrow: impl Fn(f32) -> u16,
) {
    for ((out, &codes), (&scale, &offset)) in out.chunks_exact_mut(Dtype::BYTES).zip(codes).zip(groups) {
        out.copy_from_slice(&narrow(f32::from(code(codes)) * scale + offset).to_le_bytes());
    }
}
