//! From 16-bit floats to integer codes with shared scales and offsets.
//!
//! A group's offset is its smallest element and its scale the span of its elements divided by the largest code, both
//! 16-bit floats; a code is the element's distance from the offset times the reciprocal of the scale, to nearest, ties to
//! even. All arithmetic is IEEE, so every machine writes the same bytes.
//!
//! Three passes: the range of every group, [scales and offsets](scales) of all, then codes, packed row by row. [`plain`] states what
//! the kernels do.

#[cfg(target_arch = "x86_64")]
mod avx512_codes;
#[cfg(target_arch = "x86_64")]
mod avx512_packing;
#[cfg(target_arch = "x86_64")]
mod avx512_ranges;
#[cfg(target_arch = "x86_64")]
mod avx512_whole;
mod plain;
mod scales;

pub(crate) use plain::{first_not_finite, widen};

use crate::dtype::Dtype;
use crate::packing::Packing;
use crate::{Isa, Quantizer, Shape};

/// A plane to quantize.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// Its elements, little-endian.
    pub plane: &'a [u8],
    /// Its shape.
    pub shape: &'a Shape,
    /// Which elements share a scale: those of a channel, or those of a head row.
    pub quantizer: Quantizer,
    /// How codes are packed.
    pub packing: Packing,
    /// The largest code that elements get.
    pub largest_used: u8,
    /// The largest code that a decoder knows of.
    pub largest_code: u8,
}

impl Job<'_> {
    fn per_channel(&self) -> bool {
        self.quantizer == Quantizer::PerChannel
    }

    /// How many groups of elements share a scale.
    fn groups(&self) -> usize {
        if self.per_channel() { self.shape.channels() } else { self.shape.head_rows() }
    }

    /// Panics unless all sizes agree: the kernels rely on it.
    fn check(&self, front: &[u8], section: &[u8]) {
        let elements = self.shape.elements_per_plane();
        assert!(
            front.len() == 2 * Dtype::BYTES * self.groups() + self.packing.plain_bytes(elements)
                && section.len() == self.packing.section_bytes(elements)
                && self.plane.len() == self.shape.plane_bytes()
                && self.shape.head_dim.is_multiple_of(self.packing.dims_multiple())
                && matches!(self.quantizer, Quantizer::PerChannel | Quantizer::PerTokenAndHead)
                && self.shape.check().is_ok()
                && (1..=self.largest_code).contains(&self.largest_used)
                && self.largest_code <= self.packing.largest_code(),
            "a plane that can't be quantized so"
        );
    }
}

/// What is kept between planes, so that nothing is allocated for the next one of the same size.
#[derive(Debug, Default)]
pub struct Scratch {
    ranges: Ranges,
    groups: Groups,
    codes: Vec<u8>,
}

/// Largest and smallest element of every group, their bits.
#[derive(Debug, Default)]
struct Ranges {
    most: Vec<u16>,
    least: Vec<u16>,
    /// For kernels: the smallest element as an unsigned number.
    lowest: Vec<u16>,
}

/// What codes are made with.
#[derive(Debug, Default)]
struct Groups {
    /// Reciprocals of the scales, 0 for a scale of 0. Behind those of all groups, zeros, so that a kernel may read [`PADDING`] at
    /// a time.
    reciprocals: Vec<f32>,
    /// As many.
    offsets: Vec<f32>,
    /// Whether any element would get a code beyond the largest: scales were lowered, or distances are infinite.
    must_cut: bool,
}

/// Groups that a kernel may read together.
const PADDING: usize = 64;

/// Fills `front` with scales, offsets and the plain part of the codes, and `section` with the part that is compressed.
///
/// # Errors
/// The index of the first element that is infinite or not a number; nothing is then written.
///
/// # Panics
/// When the job's parts don't belong together, or `front` and `section` have other sizes.
pub fn quantize(
    isa: Isa,
    job: &Job<'_>,
    Scratch { ranges, groups, codes }: &mut Scratch,
    front: &mut [u8],
    section: &mut [u8],
) -> Result<(), usize> {
    job.check(front, section);
    measure(isa, job, ranges);
    let dtype = job.shape.dtype;
    if !ranges.are_finite(dtype) {
        // There is one.
        return Err(first_not_finite(job.plane, dtype).unwrap_or_default());
    }
    let (scale_bytes, rest) = front.split_at_mut(Dtype::BYTES * job.groups());
    let (offset_bytes, plain) = rest.split_at_mut(Dtype::BYTES * job.groups());
    scales::of_ranges(isa, job, ranges, groups, scale_bytes, offset_bytes);
    write_codes(isa, job, groups, codes, plain, section);
    Ok(())
}

/// Takes the ranges of all groups, in the order of the scales.
fn measure(isa: Isa, job: &Job<'_>, ranges: &mut Ranges) {
    for numbers in [&mut ranges.most, &mut ranges.least, &mut ranges.lowest] {
        numbers.resize(job.groups(), 0);
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if job.per_channel() => {
            // SAFETY: this instruction set is chosen only where the CPU has it; sizes were checked.
            unsafe { avx512_ranges::of_channels(job, ranges) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if job.groups() >= avx512_ranges::ROWS => {
            // SAFETY: likewise, and there are enough rows.
            unsafe { avx512_ranges::of_rows(job, ranges) }
        }
        _ => plain::measure(isa, job, ranges),
    }
}

/// Fills both parts with the codes of all elements; `codes` is scratch.
fn write_codes(
    isa: Isa,
    job: &Job<'_>,
    groups: &Groups,
    codes: &mut Vec<u8>,
    plain: &mut [u8],
    section: &mut [u8],
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if avx512_whole::takes(job, groups) => {
            // SAFETY: this instruction set is chosen only where the CPU has it; sizes were checked.
            unsafe { avx512_whole::write(job, groups, plain, section) }
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise, and groups are padded.
        Isa::Avx512 => unsafe { avx512_codes::write(job, groups, codes, plain, section) },
        _ => plain::write_codes(isa, job, groups, codes, plain, section),
    }
}

impl Ranges {
    /// Whether all elements are finite: no other is as far from zero as those that are not.
    fn are_finite(&self, dtype: Dtype) -> bool {
        let mask = dtype.exponent_mask();
        // Without an early end, so that it is done several groups at a time.
        let finite = |bits: &[u16]| bits.iter().fold(true, |all, bits| all & (bits & mask != mask));
        finite(&self.most) & finite(&self.least)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bits of finite elements: anything, numbers of one size, of one sign, or hardly different ones.
    fn elements(dtype: Dtype) -> impl Strategy<Value = Vec<u16>> {
        let finite = move |bits: u16| {
            if bits & dtype.exponent_mask() == dtype.exponent_mask() { bits & 0x80ff } else { bits }
        };
        let kind = prop_oneof![
            Just((0xffff_u16, 0_u16)),
            Just((0x81ff, 0x3e00)),
            Just((0x01ff, 0x3e00)),
            Just((0x01ff, 0xbe00)),
            Just((0x0003, 0x4000)),
            Just((0x8000, 0)),
            Just((0x80ff, 0x7b00)),
        ];
        (kind, proptest::collection::vec(any::<u16>(), 1..300))
            .prop_map(move |((mask, set), bits)| bits.iter().map(|bits| finite(bits & mask | set)).collect())
    }

    fn shape() -> impl Strategy<Value = (Shape, Vec<u16>)> {
        let dims = prop_oneof![
            3 => proptest::sample::select(&[64_u16, 80, 96, 128, 192, 256]),
            1 => (1_u16..40).prop_map(|eighth| eighth * 8),
            1 => (1_u16..80).prop_map(|half| half * 2),
        ];
        let dtype = prop_oneof![Just(Dtype::Bf16), Just(Dtype::F16)];
        (dims, 1_u16..5, 1_u16..40, dtype).prop_flat_map(|(head_dim, kv_heads, tokens, dtype)| {
            (Just(Shape { layers: 1, kv_heads, head_dim, tokens, dtype }), elements(dtype))
        })
    }

    fn plane(shape: &Shape, bits: &[u16]) -> Vec<u8> {
        // Neighbouring rows differ.
        let element = |index: usize| bits[(index * 31 + index / 1021) % bits.len()];
        (0..shape.elements_per_plane()).flat_map(|index| element(index).to_le_bytes()).collect()
    }

    /// What a job fills, filled with something else.
    fn room(job: &Job<'_>) -> (Vec<u8>, Vec<u8>) {
        let elements = job.shape.elements_per_plane();
        let front_bytes = 4 * job.groups() + job.packing.plain_bytes(elements);
        (vec![0xa5; front_bytes], vec![0x5a; job.packing.section_bytes(elements)])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn every_instruction_set_quantizes_alike((shape, bits) in shape(), per_channel: bool, used in 0_u8..4) {
            let plane = plane(&shape, &bits);
            // One after the other in the same scratch, as planes of a chunk are.
            let mut scratches: Vec<_> = Isa::supported().map(|isa| (isa, Scratch::default())).collect();
            let packings =
                [Packing::Nibbles, Packing::NibblesAndNibbles, Packing::NibblesAndBits, Packing::CrumbsAndBits];
            for packing in packings.into_iter().filter(|packing| shape.head_dim.is_multiple_of(packing.dims_multiple())) {
                let largest_code = packing.largest_code();
                let job = Job {
                    plane: &plane,
                    shape: &shape,
                    quantizer: if per_channel { Quantizer::PerChannel } else { Quantizer::PerTokenAndHead },
                    packing,
                    // With one alone, scales of 16-bit floats can be infinite, and codes are cut off.
                    largest_used: [largest_code, largest_code - largest_code / 3, 1, 2][usize::from(used)],
                    largest_code,
                };
                let run = |isa, scratch: &mut Scratch| {
                    let (mut front, mut section) = room(&job);
                    let done = quantize(isa, &job, scratch, &mut front, &mut section);
                    (done, front, section)
                };
                let expected = run(Isa::Scalar, &mut Scratch::default());
                prop_assert_eq!(expected.0, Ok(()));
                for (isa, scratch) in &mut scratches {
                    prop_assert!(run(*isa, scratch) == expected, "{isa:?} {packing:?}");
                }
            }
        }

        #[test]
        fn an_element_that_is_not_finite_is_found(
            (shape, bits) in shape(), at in proptest::collection::vec(any::<proptest::sample::Index>(), 1..4),
            per_channel: bool, fraction: u16,
        ) {
            let mut plane = plane(&shape, &bits);
            let at: Vec<usize> = at.iter().map(|at| at.index(shape.elements_per_plane())).collect();
            for at in &at {
                plane[2 * at..][..2].copy_from_slice(&(fraction | shape.dtype.exponent_mask()).to_le_bytes());
            }
            let job = Job {
                plane: &plane,
                shape: &shape,
                quantizer: if per_channel { Quantizer::PerChannel } else { Quantizer::PerTokenAndHead },
                packing: Packing::Nibbles,
                largest_used: 15,
                largest_code: 15,
            };
            for isa in Isa::supported() {
                let (mut front, mut section) = room(&job);
                let refused = quantize(isa, &job, &mut Scratch::default(), &mut front, &mut section);
                prop_assert_eq!(refused, Err(*at.iter().min().unwrap()));
                prop_assert_eq!((front, section), room(&job));
            }
        }
    }
}
