//! `sliced`: a prefix code of nibbles whose bits lie by position in the codeword, so that 64 nibbles are decoded at a
//! time, with masks.
//!
//! zstd decodes codewords one after the other, because where one begins follows from the length of the one before. Here
//! the first two bits of every codeword lie at fixed places, and the third to the sixth bits in four streams of
//! their own: a comparison tells which of 64 codewords go on, and the next bits of the stream are dealt out to those
//! (`pdep`). `docs/FORMAT.md` has the bytes, `docs/CODEC.md` what it gives.
//!
//! Codewords are canonical: nibbles are ranked, most frequent first, and a node of the tree that is at least the level's
//! threshold goes on. [`scalar`] states what the other kernels do.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod counts;
mod encode;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

pub(crate) use encode::{Code, Parts, encode};

use crate::Isa;

/// Bits that every codeword has.
const BASE_BITS: usize = 2;
/// Further bits of the longest codewords.
const LEVELS: usize = 4;
/// Decompressed bytes of a block: 64 low nibbles and 64 high ones.
const BLOCK_BYTES: usize = 64;
/// What a block takes of the base: for each bit, one of 64 low nibbles; then those of the high ones.
const BLOCK_BASE_BYTES: usize = 2 * BASE_BITS * 8;
/// Ranks, thresholds, and the bytes of each level.
const HEADER_BYTES: usize = 8 + LEVELS + 4 * LEVELS;

/// Why a section is not what `sliced` makes of so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SlicedError {
    /// The parts don't add up to the section.
    #[error("a sliced section of {got_bytes} bytes, its parts take {expected_bytes}")]
    Length {
        /// Bytes of the section.
        got_bytes: usize,
        /// Bytes of header, levels and base.
        expected_bytes: u64,
    },
    /// The thresholds describe no code of sixteen nibbles.
    #[error("a sliced section's thresholds {0:?} fall, or lead to more than sixteen codewords")]
    Thresholds([u8; LEVELS]),
    /// Codewords take more or fewer bits of a level than it has. Which level is found first depends on how many blocks
    /// are decoded together, so none is named.
    #[error("the codewords of a sliced section take more or fewer bits of a level than it has")]
    Bits,
}

/// A section whose parts are where they should be.
struct Sliced<'a> {
    /// The nibble of each rank.
    order: [u8; 16],
    /// At each level, the least node that goes on.
    thresholds: [u8; LEVELS],
    /// The whole section.
    bytes: &'a [u8],
    /// Where each level begins and ends in it, in bits.
    levels: [(usize, usize); LEVELS],
    /// Where the base begins, in bytes; it reaches to the end.
    base_at: usize,
}

impl<'a> Sliced<'a> {
    fn parse(bytes: &'a [u8], expected_bytes: usize) -> Result<Self, SlicedError> {
        let base_bytes = expected_bytes.div_ceil(BLOCK_BYTES) * BLOCK_BASE_BYTES;
        let needed = |levels: u64| SlicedError::Length {
            got_bytes: bytes.len(),
            expected_bytes: (HEADER_BYTES + base_bytes) as u64 + levels,
        };
        let header = bytes.first_chunk::<HEADER_BYTES>().ok_or(needed(0))?;
        let (ranks, rest) = header.split_at(8);
        let (thresholds, lengths) = rest.split_at(LEVELS);
        let order = std::array::from_fn(|rank| ranks[rank / 2] >> (4 * (rank % 2)) & 0x0f);
        let thresholds = std::array::from_fn(|level| thresholds[level]);
        let lengths: [u32; LEVELS] = std::array::from_fn(|level| {
            let bytes = &lengths[4 * level..];
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        });
        let total: u64 = lengths.into_iter().map(u64::from).sum();
        if (HEADER_BYTES + base_bytes) as u64 + total != bytes.len() as u64 {
            return Err(needed(total));
        }
        if !is_code(thresholds) {
            return Err(SlicedError::Thresholds(thresholds));
        }
        let mut at = HEADER_BYTES;
        let levels = lengths.map(|length| {
            let begin = at;
            // Not more than the section, so neither sum overflows.
            at += length as usize;
            (8 * begin, 8 * at)
        });
        Ok(Self { order, thresholds, bytes, levels, base_at: at })
    }

    /// Whether all levels have been taken to their ends: their last bytes, in which unused bits are 0.
    fn check_ends(&self, at: &[usize; LEVELS]) -> Result<(), SlicedError> {
        for (&at, (_, end)) in at.iter().zip(self.levels) {
            let rest = if at % 8 == 0 { 0 } else { self.bytes[at / 8] >> (at % 8) };
            if at.next_multiple_of(8) != end || rest != 0 {
                return Err(SlicedError::Bits);
            }
        }
        Ok(())
    }

    /// Whether every codeword goes on at the first level, so that its bits lie as regularly as the base.
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(dead_code))]
    fn all_go_on(&self) -> bool {
        self.thresholds[0] == 0
    }

    /// Whether a level has been taken further than its end.
    fn overrun(&self, at: &[usize; LEVELS]) -> bool {
        at.iter().zip(self.levels).any(|(&at, (_, end))| at > end)
    }
}

/// Whether thresholds lead from four nodes to at most sixteen, each level's leaves before those of the next.
const fn is_code(thresholds: [u8; LEVELS]) -> bool {
    let (mut nodes, mut previous, mut level) = (1_u32 << BASE_BITS, 0, 0);
    while level < LEVELS {
        let threshold = thresholds[level] as u32;
        if threshold < previous || threshold > nodes {
            return false;
        }
        nodes += nodes - threshold;
        previous = threshold;
        level += 1;
    }
    nodes <= 16
}

/// Fills `out` with what `section` stands for.
///
/// # Errors
/// What is wrong with the section. `out` then holds anything.
pub(crate) fn decode(isa: Isa, section: &[u8], out: &mut [u8]) -> Result<(), SlicedError> {
    let sliced = Sliced::parse(section, out.len())?;
    let mut at = sliced.levels.map(|(begin, _)| begin);
    let (blocks, rest) = out.as_chunks_mut::<BLOCK_BYTES>();
    let mut last = [[0; BLOCK_BYTES]];
    decode_blocks(isa, &sliced, 0, blocks, &mut at)?;
    if !rest.is_empty() {
        decode_blocks(isa, &sliced, blocks.len(), &mut last, &mut at)?;
        rest.copy_from_slice(&last[0][..rest.len()]);
    }
    sliced.check_ends(&at)
}

/// Decodes neighbouring blocks. `at` is where each level stands, in bits of the section.
fn decode_blocks(
    isa: Isa,
    sliced: &Sliced<'_>,
    first: usize,
    out: &mut [[u8; BLOCK_BYTES]],
    at: &mut [usize; LEVELS],
) -> Result<(), SlicedError> {
    // The kernels rely on it: blocks decoded together take at most 128 bits of a level each, and at least as many bases of
    // 32 bytes lie behind the levels, so that nine bytes may be read from wherever a level stands.
    let base = &sliced.bytes[sliced.base_at..];
    assert!((first + out.len()) * BLOCK_BASE_BYTES <= base.len() && !sliced.overrun(at));
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx512` is made only where the CPU has it; the base has these blocks, no level is overrun.
        Isa::Avx512 => unsafe { avx512::blocks(sliced, first, out, at) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx2 => unsafe { avx2::blocks(sliced, first, out, at) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: likewise.
        Isa::Neon => unsafe { neon::blocks(sliced, first, out, at) },
        Isa::Scalar => scalar::blocks(sliced, first, out, at),
    }
    if sliced.overrun(at) { Err(SlicedError::Bits) } else { Ok(()) }
}

/// The next `count` bits of a level, and what is behind them.
///
/// # Safety
/// `bytes` has nine bytes from the one that bit `at` is in.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn next_bits(bytes: *const u8, at: usize, count: u32) -> u64 {
    // SAFETY: as this function demands.
    unsafe {
        let bytes = bytes.add(at / 8);
        let mut bits = u64::from_le(bytes.cast::<u64>().read_unaligned()) >> (at % 8);
        if count > 56 {
            // Hardly ever. Where both have a bit, it is the same.
            bits |= u64::from_le(bytes.add(1).cast::<u64>().read_unaligned()) << (7 - at % 8) << 1;
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes whose nibbles come from a few values, more often than from all.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let nibble = |values: Vec<u8>| {
            let skewed = (any::<proptest::sample::Index>(), any::<proptest::sample::Index>());
            skewed.prop_map(move |(first, second)| {
                let first = first.index(values.len());
                values[second.index(first + 1)]
            })
        };
        let values = proptest::collection::vec(0_u8..16, 1..40);
        // Some fill several batches of the encoder.
        let counts = prop_oneof![3 => 1_usize..700, 1 => 1000_usize..3500];
        (values, counts).prop_flat_map(move |(values, count)| {
            let byte = (nibble(values.clone()), nibble(values)).prop_map(|(low, high)| low | high << 4);
            proptest::collection::vec(byte, count)
        })
    }

    fn encoded(isa: Isa, bytes: &[u8]) -> Vec<u8> {
        let mut section = vec![0xee; 3];
        let code = Code::new(isa, bytes);
        encode(isa, &code, bytes, &mut Parts::default(), &mut section);
        assert_eq!(section.len(), 3 + code.section_bytes());
        section.split_off(3)
    }

    proptest! {
        #[test]
        fn every_instruction_set_writes_and_reads_alike(bytes in bytes()) {
            let section = encoded(Isa::Scalar, &bytes);
            for isa in Isa::supported() {
                prop_assert_eq!(&encoded(isa, &bytes), &section);
                let mut out = vec![0; bytes.len()];
                prop_assert_eq!(decode(isa, &section, &mut out), Ok(()));
                prop_assert_eq!(&out, &bytes);
            }
        }

        #[test]
        fn damaged_sections_are_read_alike(
            bytes in bytes(), damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
            in_header: bool, cut in 0_usize..3,
        ) {
            let mut section = encoded(Isa::Scalar, &bytes);
            for (at, byte) in damage {
                let end = if in_header { HEADER_BYTES } else { section.len() };
                section[at.index(end)] = byte;
            }
            section.truncate(section.len() - cut);
            let results = Isa::supported().map(|isa| {
                let mut out = vec![0; bytes.len()];
                decode(isa, &section, &mut out).map(|()| out)
            });
            let results: Vec<_> = results.collect();
            prop_assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{results:?}");
        }

        #[test]
        fn any_thresholds_that_are_a_code_lead_to_at_most_sixteen_nodes(thresholds: [u8; LEVELS]) {
            let thresholds = thresholds.map(|threshold| threshold % 18);
            if is_code(thresholds) {
                let nodes = thresholds.into_iter().fold(4, |nodes, threshold| nodes + (nodes - threshold));
                prop_assert!(nodes <= 16 && thresholds.is_sorted());
            }
        }
    }

    #[test]
    fn a_level_with_a_bit_too_many_or_too_few_is_refused() {
        // Small nibbles more often than large ones, so that every level has bits.
        let bytes: Vec<u8> = (0..16_u8).flat_map(|nibble| vec![nibble * 0x11; 256 >> (nibble / 2)]).collect();
        let section = encoded(Isa::Scalar, &bytes);
        let sliced = Sliced::parse(&section, bytes.len()).unwrap();
        let level_bytes = sliced.levels.map(|(begin, end)| (end - begin) / 8);
        for level in 0..LEVELS {
            let end = sliced.levels[level].1 / 8;
            for (change, splice) in [(1, vec![0]), (-1, vec![])] {
                let mut damaged = section.clone();
                let length = u32::try_from(level_bytes[level]).unwrap().checked_add_signed(change).unwrap();
                damaged[12 + 4 * level..][..4].copy_from_slice(&length.to_le_bytes());
                damaged.splice(if change > 0 { end..end } else { end - 1..end }, splice);
                for isa in Isa::supported() {
                    let refused = decode(isa, &damaged, &mut vec![0; bytes.len()]);
                    assert_eq!(refused, Err(SlicedError::Bits), "{isa:?} {level} {change}");
                }
            }
        }
    }

    #[test]
    fn faults_of_the_header_are_named() {
        let bytes = [0x12; 200];
        let section = encoded(Isa::Scalar, &bytes);
        let with = |at: usize, byte: u8| {
            let mut damaged = section.clone();
            damaged[at] = byte;
            decode(Isa::detect(), &damaged, &mut [0; 200]).unwrap_err().to_string()
        };
        assert!(with(8, 5).contains("thresholds"));
        assert!(with(15, 255).contains("its parts take"));
        assert_eq!(
            decode(Isa::detect(), &section[..20], &mut [0; 200]),
            Err(SlicedError::Length { got_bytes: 20, expected_bytes: 28 + 4 * 32 })
        );
    }
}
