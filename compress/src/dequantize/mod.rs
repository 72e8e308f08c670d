//! From packed codes, scales and offsets to floats: where a plane's time goes besides decompression.
//!
//! A product, then a sum, never fused: every machine gives the same bits. [`scalar`] states what the kernels do; the
//! others do it with vectors, each in its own file:
//!
//! - Where a head row shares a scale and has at most 32 codes, its elements are computed once per code and then looked
//!   up with shuffles. Otherwise every element is computed.
//! - A kernel works on units of neighbouring dimensions. Where the last unit of a row would be short it starts earlier
//!   and writes some elements twice; rows shorter than a unit are left to [`scalar`].

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_crumbs;
#[cfg(target_arch = "x86_64")]
mod avx512_nibbles;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use crate::Isa;
use crate::dtype::OutDtype;
use crate::packing::Packing;

/// A plane to dequantize: codes, scales and offsets as they lie, and what to make of them.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// How codes are packed.
    pub packing: Packing,
    /// Low bits of the codes.
    pub plain: &'a [u8],
    /// The rest of the codes, decompressed.
    pub section: &'a [u8],
    /// One per channel, or one per head row.
    pub scales: &'a [f32],
    /// As many as there are scales.
    pub offsets: &'a [f32],
    /// Whether scales are those of channels.
    pub per_channel: bool,
    /// Dimensions of a head row.
    pub head_dim: usize,
    /// Type of the elements; scales and offsets are already divided by the scale of FP8.
    pub out_dtype: OutDtype,
    /// Whether to write past the caches.
    pub streaming: bool,
}

impl Job<'_> {
    /// Panics unless all sizes agree: the kernels rely on it.
    fn check(&self, out: &[u8]) {
        let elements = out.len() / self.out_dtype.bytes();
        let rows = elements / self.head_dim;
        let groups = self.scales.len();
        assert!(
            rows * self.head_dim * self.out_dtype.bytes() == out.len()
                && self.head_dim.is_multiple_of(usize::from(self.packing.dims_multiple()))
                && self.plain.len() == self.packing.plain_bytes(elements)
                && self.section.len() == self.packing.section_bytes(elements)
                && groups == self.offsets.len()
                && if self.per_channel { elements.is_multiple_of(groups) } else { groups == rows }
                && (!self.per_channel || groups.is_multiple_of(self.head_dim)),
            "parts of a plane that don't belong together"
        );
    }

    /// Whether rows consist of such units: where a byte holds dimensions of both halves or all quarters of a row, each
    /// of these must have one, and bits of a unit must begin with a byte.
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(dead_code))]
    fn has_units(&self, unit: usize) -> bool {
        match self.packing {
            Packing::Nibbles | Packing::NibblesAndNibbles => self.head_dim / 2 >= unit,
            Packing::NibblesAndBits => self.head_dim / 2 >= unit && self.head_dim.is_multiple_of(16),
            // These kernels take sixteen dimensions of a quarter.
            Packing::CrumbsAndBits => self.head_dim.is_multiple_of(64),
        }
    }

    /// Whether stores of so many bytes, one after another, can all go past the caches: they must be aligned.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    fn streams(&self, out: &[u8], unit: usize) -> bool {
        let store_bytes = unit * self.out_dtype.bytes();
        self.streaming
            && out.as_ptr().addr().is_multiple_of(store_bytes)
            && (self.head_dim / 2).is_multiple_of(unit)
    }

    /// Whether no element, rounded or not, is subnormal: scales and offsets are zero or far from it, so that what
    /// sums cancel to is zero or a multiple of 2^-107.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    #[inline(always)]
    fn has_no_subnormals(&self) -> bool {
        // The bits of 2^-100.
        const SMALLEST: u32 = (127 - 100) << 23;
        let far = |value: &f32| (value.to_bits() & 0x7fff_ffff).wrapping_sub(1) >= SMALLEST - 1;
        self.scales.iter().zip(self.offsets).fold(true, |all, (scale, offset)| all & far(scale) & far(offset))
    }

    /// Whether a scale times a code is always exact: scales have at most sixteen significant bits, as 16-bit floats do, codes
    /// at most eight, and no product is subnormal ([`Job::has_no_subnormals`]).
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    #[inline(always)]
    fn has_exact_products(&self) -> bool {
        self.scales.iter().fold(true, |all, scale| all & (scale.to_bits() & 0xff == 0))
    }
}

/// Writes the plane to `out`, little-endian. The sizes of codes, scales, offsets and `out` agree; `row` has room for
/// one head row.
///
/// # Panics
/// When sizes don't agree.
pub fn dequantize(isa: Isa, job: &Job<'_>, row: &mut [u8], out: &mut [u8]) {
    job.check(out);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if job.has_units(avx512::UNIT) => {
            // SAFETY: `Isa::Avx512` is made only where the CPU has it; sizes were checked, rows have units.
            unsafe { avx512::plane(job, out) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 if job.has_units(avx2::UNIT) => {
            // SAFETY: `Isa::Avx2` is made only where the CPU has it; sizes were checked, rows have units.
            unsafe { avx2::plane(job, out) }
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon if job.has_units(neon::UNIT) => {
            // SAFETY: `Isa::Neon` is made only where the CPU has it; sizes were checked, rows have units.
            unsafe { neon::plane(job, out) }
        }
        _ => scalar::plane(job, row, out),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A job's owned parts.
    #[derive(Debug)]
    struct Parts {
        packing: Packing,
        head_dim: usize,
        heads: usize,
        tokens: usize,
        per_channel: bool,
        plain: Vec<u8>,
        section: Vec<u8>,
        scales: Vec<f32>,
        offsets: Vec<f32>,
    }

    /// Scales from subnormals to far beyond binary16, zeros, and both signs; offsets likewise.
    fn number() -> impl Strategy<Value = f32> {
        prop_oneof![
            4 => -4.0_f32..4.0,
            1 => Just(0.0_f32),
            1 => Just(-0.0_f32),
            1 => prop_oneof![Just(1e-39_f32), Just(-3e-41), Just(1e-37), Just(1e-30)],
            1 => -1e5_f32..1e5,
            1 => -1e30_f32..1e30,
        ]
    }

    fn parts() -> impl Strategy<Value = Parts> {
        let packing = proptest::sample::select(&[
            Packing::Nibbles,
            Packing::NibblesAndNibbles,
            Packing::NibblesAndBits,
            Packing::CrumbsAndBits,
        ]);
        let head_dim = prop_oneof![
            4 => proptest::sample::select(&[64_usize, 80, 96, 112, 128, 192, 256]),
            1 => (1_usize..40).prop_map(|eighth| eighth * 8),
        ];
        let dims = (head_dim, 1_usize..4, 1_usize..10);
        let numbers = (any::<bool>(), proptest::collection::vec(number(), 2..40));
        (packing, dims, any::<bool>(), any::<u64>(), numbers).prop_map(
            |(packing, (head_dim, heads, tokens), per_channel, seed, (short, mut numbers))| {
                if short {
                    // As scales and offsets of 16 bits are.
                    let shortened =
                        |number: &mut f32| *number = f32::from_bits(number.to_bits() & 0xffff_0000);
                    numbers.iter_mut().for_each(shortened);
                }
                let elements = head_dim * heads * tokens;
                let byte = |index: usize| {
                    let mixed = (index as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    mixed.to_le_bytes()[7]
                };
                let groups = if per_channel { head_dim * heads } else { heads * tokens };
                let cycle =
                    |first: usize| numbers.iter().cycle().skip(first).step_by(2).take(groups).copied();
                Parts {
                    packing,
                    head_dim,
                    heads,
                    tokens,
                    per_channel,
                    plain: (0..packing.plain_bytes(elements)).map(byte).collect(),
                    section: (0..packing.section_bytes(elements)).map(|index| byte(index + 7777)).collect(),
                    scales: cycle(0).collect(),
                    offsets: cycle(1).collect(),
                }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]
        #[test]
        fn every_instruction_set_gives_the_bits_of_the_scalar_twin(
            parts in parts(), streaming: bool, misaligned in 0_usize..3,
        ) {
            for out_dtype in [OutDtype::Bf16, OutDtype::F16, OutDtype::Fp8E4M3 { scale: 1.0 }] {
                let job = Job {
                    packing: parts.packing,
                    plain: &parts.plain,
                    section: &parts.section,
                    scales: &parts.scales,
                    offsets: &parts.offsets,
                    per_channel: parts.per_channel,
                    head_dim: parts.head_dim,
                    out_dtype,
                    streaming,
                };
                let mut row = vec![0; parts.head_dim];
                let bytes = parts.head_dim * parts.heads * parts.tokens * out_dtype.bytes();
                let mut expected = vec![0; bytes];
                dequantize(Isa::Scalar, &job, &mut row, &mut expected);
                for isa in Isa::supported() {
                    // Aligned to 64 bytes, or off by some.
                    let mut buffer = vec![0xa5_u8; bytes + 192];
                    let start = buffer.as_ptr().align_offset(64) + [0, 2, 32][misaligned];
                    dequantize(isa, &job, &mut row, &mut buffer[start..start + bytes]);
                    prop_assert!(buffer[start..start + bytes] == expected, "{isa:?} {out_dtype}");
                    let around = buffer[..start].iter().chain(&buffer[start + bytes..]);
                    prop_assert!(around.copied().all(|byte| byte == 0xa5), "{isa:?} {out_dtype}");
                }
            }
        }
    }
}
