//! From integer codes and scales to 16-bit floats: the loop that a plane spends its time in besides zstd.
//!
//! Plain loops over slices that the compiler turns into SIMD code. On x86-64 the same bodies are compiled a second
//! time for AVX2 and chosen once per process. Only products and conversions: no fused multiply-add, so every machine
//! gives the same bits.

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

/// Dequantized plane to be: codes and scales as they lie, and what to make of them.
pub(crate) struct Job<'a> {
    /// `int8`: one byte per element; `int4`: two elements per byte as `docs/FORMAT.md` pairs them.
    pub(crate) codes: &'a [u8],
    /// One per channel, or one per head row.
    pub(crate) scales: &'a [f32],
    pub(crate) head_dim: usize,
    pub(crate) codec: Codec,
    pub(crate) quantizer: Quantizer,
    pub(crate) out_dtype: Dtype,
}

/// Writes the plane to `out`, little-endian. The sizes of codes, scales and `out` agree.
pub(crate) fn dequantize(isa: Isa, job: &Job<'_>, out: &mut [u8]) {
    match isa {
        Isa::Baseline => dispatch(job, out),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            // SAFETY: `Isa::detect` gives `Avx2` only where the CPU has it.
            unsafe { dispatch_avx2(job, out) }
        }
    }
}

/// # Safety
/// The CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn dispatch_avx2(job: &Job<'_>, out: &mut [u8]) {
    dispatch(job, out);
}

#[inline(always)]
fn dispatch(job: &Job<'_>, out: &mut [u8]) {
    match job.out_dtype {
        Dtype::Bf16 => rows(job, out, dtype::f32_to_bf16_in_range),
        Dtype::F16 => rows(job, out, dtype::f32_to_f16),
    }
}

#[inline(always)]
fn rows(job: &Job<'_>, out: &mut [u8], narrow: impl Fn(f32) -> u16 + Copy) {
    let head_dim = job.head_dim;
    let out_rows = out.chunks_exact_mut(head_dim * 2);
    match (job.codec, job.quantizer) {
        (Codec::Int4, Quantizer::PerChannel) => {
            let scales = job.scales.chunks_exact(head_dim).cycle();
            for ((out, codes), scales) in out_rows.zip(job.codes.chunks_exact(head_dim / 2)).zip(scales) {
                let (out_low, out_high) = out.split_at_mut(head_dim);
                let (scales_low, scales_high) = scales.split_at(head_dim / 2);
                int4_row(
                    codes,
                    |index| scales_low[index],
                    |index| scales_high[index],
                    out_low,
                    out_high,
                    narrow,
                );
            }
        }
        (Codec::Int4, _) => {
            for ((out, codes), &scale) in out_rows.zip(job.codes.chunks_exact(head_dim / 2)).zip(job.scales) {
                let (out_low, out_high) = out.split_at_mut(head_dim);
                int4_row(codes, |_| scale, |_| scale, out_low, out_high, narrow);
            }
        }
        (_, Quantizer::PerChannel) => {
            let scales = job.scales.chunks_exact(head_dim).cycle();
            for ((out, codes), scales) in out_rows.zip(job.codes.chunks_exact(head_dim)).zip(scales) {
                for ((out, &code), &scale) in out.chunks_exact_mut(2).zip(codes).zip(scales) {
                    put(out, narrow(f32::from(i8::from_le_bytes([code])) * scale));
                }
            }
        }
        _ => {
            for ((out, codes), &scale) in out_rows.zip(job.codes.chunks_exact(head_dim)).zip(job.scales) {
                for (out, &code) in out.chunks_exact_mut(2).zip(codes) {
                    put(out, narrow(f32::from(i8::from_le_bytes([code])) * scale));
                }
            }
        }
    }
}

#[inline(always)]
fn int4_row(
    codes: &[u8],
    scale_low: impl Fn(usize) -> f32,
    scale_high: impl Fn(usize) -> f32,
    out_low: &mut [u8],
    out_high: &mut [u8],
    narrow: impl Fn(f32) -> u16,
) {
    for (index, (out, &codes)) in out_low.chunks_exact_mut(2).zip(codes).enumerate() {
        put(out, narrow(f32::from(i8::from_le_bytes([codes & 0x0f]) - 8) * scale_low(index)));
    }
    for (index, (out, &codes)) in out_high.chunks_exact_mut(2).zip(codes).enumerate() {
        put(out, narrow(f32::from(i8::from_le_bytes([codes >> 4]) - 8) * scale_high(index)));
    }
}

#[inline(always)]
fn put(out: &mut [u8], bits: u16) {
    out.copy_from_slice(&bits.to_le_bytes());
}
