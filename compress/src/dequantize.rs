//! From integer codes, scales and offsets to 16-bit floats: where a plane's time goes besides zstd.
//!
//! Plain loops over slices that the compiler turns into SIMD code. On x86-64 the same bodies are compiled a second
//! time for AVX2, and the choice is made once per decoder. A product, then a sum, never fused: every machine gives the
//! same bits.

use crate::dtype::{self, Dtype};
#[cfg(target_arch = "x86_64")]
use crate::lookup;
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
    /// One per channel, or one per head row. Where [`in_pairs`] holds, those of the even channels come first, then
    /// those of the odd ones.
    pub(crate) scales: &'a [f32],
    /// As many as there are scales, in the same order.
    pub(crate) offsets: &'a [f32],
    pub(crate) head_dim: usize,
    pub(crate) codec: Codec,
    pub(crate) quantizer: Quantizer,
    pub(crate) out_dtype: Dtype,
}

/// Whether a head row is dequantized two elements at a time.
///
/// The two codes come in one 16-bit load and the two elements leave in one 32-bit store, so SIMD lanes are 32 bits
/// wide from end to end and nothing is packed: a third fewer instructions.
pub(crate) const fn in_pairs(codec: Codec, head_dim: usize) -> bool {
    match codec {
        Codec::Int4 => head_dim.is_multiple_of(4),
        _ => head_dim.is_multiple_of(2),
    }
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
    let looked_up = job.codec == Codec::Int4 && job.quantizer == Quantizer::PerTokenAndHead;
    if !(looked_up && lookup::takes(job.head_dim)) {
        return plane(job, out);
    }
    let rows =
        out.chunks_exact_mut(job.head_dim * Dtype::BYTES).zip(job.codes.chunks_exact(job.head_dim / 2));
    for ((out, codes), (&scale, &offset)) in rows.zip(job.scales.iter().zip(job.offsets)) {
        let table = match job.out_dtype {
            Dtype::Bf16 => table(scale, offset, dtype::f32_to_bf16_in_range),
            Dtype::F16 => table(scale, offset, dtype::f32_to_f16),
        };
        // SAFETY: the CPU has AVX2, as this function demands.
        unsafe { lookup::row(&table, codes, out) }
    }
}

/// The elements of codes 0 to 15.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn table(scale: f32, offset: f32, narrow: impl Fn(f32) -> u16) -> [u16; 16] {
    const CODES: [f32; 16] =
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
    let mut table = [0; 16];
    // A plain loop: the closure of `array::from_fn` may stay a call, and is then compiled without AVX2.
    for (element, code) in table.iter_mut().zip(CODES) {
        *element = narrow(code * scale + offset);
    }
    table
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
        64 => rows_in_pairs::<64>(job, out, narrow),
        128 => rows_in_pairs::<128>(job, out, narrow),
        dim if in_pairs(job.codec, dim) => rows_in_pairs::<0>(job, out, narrow),
        _ => rows_one_by_one(job, out, narrow),
    }
}

/// `DIM` is the head dimension, or 0 to read it from the job.
#[inline(always)]
fn rows_in_pairs<const DIM: usize>(job: &Job<'_>, out: &mut [u8], narrow: impl Fn(f32) -> u16 + Copy) {
    let dim = if DIM == 0 { job.head_dim } else { DIM };
    let out_rows = out.chunks_exact_mut(dim * Dtype::BYTES);
    let groups = job.scales.iter().zip(job.offsets).map(|(&scale, &offset)| (scale, offset));
    if job.quantizer == Quantizer::PerTokenAndHead && job.codec == Codec::Int4 {
        for ((out, codes), group) in out_rows.zip(job.codes.chunks_exact(dim / 2)).zip(groups) {
            let (low, high) = out.split_at_mut(dim);
            row_of_one_group(low, codes, low_nibbles, group, narrow);
            row_of_one_group(high, codes, high_nibbles, group, narrow);
        }
        return;
    }
    if job.quantizer == Quantizer::PerTokenAndHead {
        for ((out, codes), group) in out_rows.zip(job.codes.chunks_exact(dim)).zip(groups) {
            row_of_one_group(out, codes, both_bytes, group, narrow);
        }
        return;
    }
    let half = job.scales.len() / 2;
    let (even_scales, odd_scales) = job.scales.split_at(half);
    let (even_offsets, odd_offsets) = job.offsets.split_at(half);
    let even = Channels { scales: even_scales, offsets: even_offsets };
    let odd = Channels { scales: odd_scales, offsets: odd_offsets };
    let heads = even.heads(dim / 2).zip(odd.heads(dim / 2)).cycle();
    if job.codec == Codec::Int4 {
        for ((out, codes), (even, odd)) in out_rows.zip(job.codes.chunks_exact(dim / 2)).zip(heads) {
            let (low, high) = out.split_at_mut(dim);
            let ((even_low, even_high), (odd_low, odd_high)) = (even.halves(), odd.halves());
            row_of_channels(low, codes, low_nibbles, even_low, odd_low, narrow);
            row_of_channels(high, codes, high_nibbles, even_high, odd_high, narrow);
        }
    } else {
        for ((out, codes), (even, odd)) in out_rows.zip(job.codes.chunks_exact(dim)).zip(heads) {
            row_of_channels(out, codes, both_bytes, even, odd, narrow);
        }
    }
}

/// Scales and offsets of some channels.
#[derive(Clone, Copy)]
struct Channels<'a> {
    scales: &'a [f32],
    offsets: &'a [f32],
}

impl<'a> Channels<'a> {
    /// Those of one head after the other, so many channels each.
    #[inline(always)]
    fn heads(self, channels: usize) -> impl Iterator<Item = Self> + Clone + use<'a> {
        let heads = self.scales.chunks_exact(channels).zip(self.offsets.chunks_exact(channels));
        heads.map(|(scales, offsets)| Self { scales, offsets })
    }

    #[inline(always)]
    fn halves(self) -> (Self, Self) {
        let (scales, offsets) =
            (self.scales.split_at(self.scales.len() / 2), self.offsets.split_at(self.offsets.len() / 2));
        (Self { scales: scales.0, offsets: offsets.0 }, Self { scales: scales.1, offsets: offsets.1 })
    }
}

/// The codes in the low halves of two bytes that were loaded as one little-endian number.
#[inline(always)]
fn low_nibbles(bytes: u32) -> (u32, u32) {
    (bytes & 0x0f, (bytes >> 8) & 0x0f)
}

/// The codes in the high halves of two bytes.
#[inline(always)]
fn high_nibbles(bytes: u32) -> (u32, u32) {
    ((bytes >> 4) & 0x0f, bytes >> 12)
}

/// The codes that are two bytes.
#[inline(always)]
fn both_bytes(bytes: u32) -> (u32, u32) {
    (bytes & 0xff, bytes >> 8)
}

/// Two elements for every two bytes of `codes`; all share one scale and offset.
#[inline(always)]
fn row_of_one_group(
    out: &mut [u8],
    codes: &[u8],
    split: impl Fn(u32) -> (u32, u32),
    (scale, offset): (f32, f32),
    narrow: impl Fn(f32) -> u16,
) {
    for (out, bytes) in out.chunks_exact_mut(4).zip(codes.chunks_exact(2)) {
        let (even, odd) = split(load(bytes));
        let (even, odd) = (narrow(to_f32(even) * scale + offset), narrow(to_f32(odd) * scale + offset));
        out.copy_from_slice(&(u32::from(even) | (u32::from(odd) << 16)).to_le_bytes());
    }
}

/// Two elements for every two bytes of `codes`; each has its own scale and offset, given for even and odd ones.
#[inline(always)]
fn row_of_channels(
    out: &mut [u8],
    codes: &[u8],
    split: impl Fn(u32) -> (u32, u32),
    even: Channels<'_>,
    odd: Channels<'_>,
    narrow: impl Fn(f32) -> u16,
) {
    let even = even.scales.iter().zip(even.offsets);
    let odd = odd.scales.iter().zip(odd.offsets);
    let pairs = out.chunks_exact_mut(4).zip(codes.chunks_exact(2)).zip(even).zip(odd);
    for (((out, bytes), (even_scale, even_offset)), (odd_scale, odd_offset)) in pairs {
        let (even, odd) = split(load(bytes));
        let even = narrow(to_f32(even) * even_scale + even_offset);
        let odd = narrow(to_f32(odd) * odd_scale + odd_offset);
        out.copy_from_slice(&(u32::from(even) | (u32::from(odd) << 16)).to_le_bytes());
    }
}

/// Two bytes as one number. Through an array, so that it stays one load: given two, the compiler shuffles bytes.
#[inline(always)]
fn load(bytes: &[u8]) -> u32 {
    u32::from(bytes.first_chunk().map_or(0, |bytes| u16::from_le_bytes(*bytes)))
}

/// A code as a float. Signed numbers convert in one instruction, unsigned ones don't.
#[inline(always)]
#[expect(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "a code is at most 255")]
fn to_f32(code: u32) -> f32 {
    code as i32 as f32
}

/// Head rows of a size that doesn't come in pairs; no model is known to have one.
#[inline(always)]
fn rows_one_by_one(job: &Job<'_>, out: &mut [u8], narrow: impl Fn(f32) -> u16 + Copy) {
    let dim = job.head_dim;
    for (element, out) in out.chunks_exact_mut(Dtype::BYTES).enumerate() {
        let (row, j) = (element / dim, element % dim);
        let code = match job.codec {
            Codec::Int4 if j < dim / 2 => job.codes[row * dim / 2 + j] & 0x0f,
            Codec::Int4 => job.codes[row * dim / 2 + j - dim / 2] >> 4,
            _ => job.codes[element],
        };
        let group = if job.quantizer == Quantizer::PerChannel { element % job.scales.len() } else { row };
        out.copy_from_slice(&narrow(f32::from(code) * job.scales[group] + job.offsets[group]).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kernel against element-by-element computation, for head sizes that take each of the paths.
    #[test]
    fn every_instruction_set_gives_the_same_elements() {
        let isas = [Isa::Baseline, Isa::detect()];
        for (head_dim, heads, tokens) in
            [(64, 3, 5), (128, 2, 4), (192, 1, 3), (12, 3, 7), (6, 2, 5), (80, 1, 2)]
        {
            for codec in [Codec::Int8, Codec::Int4] {
                for quantizer in [Quantizer::PerChannel, Quantizer::PerTokenAndHead] {
                    for out_dtype in [Dtype::Bf16, Dtype::F16] {
                        compare(&isas, [head_dim, heads, tokens], codec, quantizer, out_dtype);
                    }
                }
            }
        }
    }

    fn compare(isas: &[Isa], dims: [usize; 3], codec: Codec, quantizer: Quantizer, out_dtype: Dtype) {
        let [head_dim, heads, tokens] = dims;
        let elements = head_dim * heads * tokens;
        let random = |index: usize| u8::try_from(index * 7919 / 13 % 256).unwrap_or(0);
        let codes: Vec<u8> =
            (0..if codec == Codec::Int4 { elements / 2 } else { elements }).map(random).collect();
        let groups = if quantizer == Quantizer::PerChannel { head_dim * heads } else { heads * tokens };
        // From subnormals of binary16 to beyond its largest.
        let scales: Vec<f32> = (0..groups).map(|group| f32::from(random(group)).powi(9) * 1e-18).collect();
        let offsets: Vec<f32> = (0..groups).map(|group| f32::from(random(group * 3)) * -0.01).collect();
        let expected: Vec<u8> = (0..elements)
            .map(|element| (element, element / head_dim, element % head_dim))
            .map(|(element, row, j)| match codec {
                Codec::Int4 if j < head_dim / 2 => (element, codes[row * head_dim / 2 + j] % 16),
                Codec::Int4 => (element, codes[row * head_dim / 2 + j - head_dim / 2] / 16),
                _ => (element, codes[element]),
            })
            .flat_map(|(element, code)| {
                let group =
                    if quantizer == Quantizer::PerChannel { element % groups } else { element / head_dim };
                out_dtype.narrow(f32::from(code) * scales[group] + offsets[group]).to_le_bytes()
            })
            .collect();
        let ordered = |values: &[f32]| -> Vec<f32> {
            if quantizer == Quantizer::PerChannel && in_pairs(codec, head_dim) {
                let evens = values.iter().step_by(2);
                evens.chain(values.iter().skip(1).step_by(2)).copied().collect()
            } else {
                values.to_vec()
            }
        };
        let (scales, offsets) = (ordered(&scales), ordered(&offsets));
        for &isa in isas {
            let job = Job {
                codes: &codes,
                scales: &scales,
                offsets: &offsets,
                head_dim,
                codec,
                quantizer,
                out_dtype,
            };
            let mut out = vec![0; elements * 2];
            dequantize(isa, &job, &mut out);
            assert!(out == expected, "{isa:?} {codec} {quantizer} {out_dtype} {dims:?}");
        }
    }
}
