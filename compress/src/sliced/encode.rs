//! The encoder of `sliced`: ranks and thresholds from a histogram, then a block at a time.

use super::{BASE_BITS, BLOCK_BASE_BYTES, BLOCK_BYTES, HEADER_BYTES, LEVELS};
use crate::Isa;

/// Bits of a codeword by place: the base, whether each level goes on, and the bit there.
const PLANES: usize = BASE_BITS + 2 * LEVELS;

/// Of 64 nibbles, each bit of their codewords.
pub(super) type Planes = [u64; PLANES];

/// The parts of a section as they grow; kept, so that nothing is allocated for the next.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    levels: [Bits; LEVELS],
    base: Vec<u8>,
}

/// The code of a section.
pub(super) struct Code {
    order: [u8; 16],
    thresholds: [u8; LEVELS],
    /// By nibble: the base in the lowest bits, above it whether each level goes on.
    pub(super) shapes: [u8; 16],
    /// By nibble: the bit of each level.
    pub(super) bits: [u8; 16],
}

impl Code {
    /// The code that takes the fewest bits.
    fn new(counts: &[u64; 16]) -> Self {
        let mut order: [u8; 16] = std::array::from_fn(|nibble| nibble.to_le_bytes()[0]);
        order.sort_by_key(|&nibble| std::cmp::Reverse(counts[usize::from(nibble)]));
        let thresholds = best_thresholds(&order.map(|nibble| counts[usize::from(nibble)]));
        let (mut shapes, mut bits) = ([0; 16], [0; 16]);
        for (rank, &nibble) in (0..).zip(&order) {
            (shapes[usize::from(nibble)], bits[usize::from(nibble)]) = codeword(rank, thresholds);
        }
        Self { order, thresholds, shapes, bits }
    }

    fn write_header(&self, lengths: [usize; LEVELS], out: &mut [u8]) {
        for (byte, ranks) in out.iter_mut().zip(self.order.chunks_exact(2)) {
            *byte = ranks[0] | ranks[1] << 4;
        }
        out[8..8 + LEVELS].copy_from_slice(&self.thresholds);
        for (place, length) in out[8 + LEVELS..].chunks_exact_mut(4).zip(lengths) {
            place.copy_from_slice(&u32::try_from(length).expect("a section of 16 MiB").to_le_bytes());
        }
    }
}

/// From the node that a codeword ends at back to its base: shape and bits.
fn codeword(rank: u8, thresholds: [u8; LEVELS]) -> (u8, u8) {
    let (mut node, mut shape, mut bits) = (rank, 0, 0);
    for level in (0..LEVELS).rev() {
        if let Some(below) = node.checked_sub(thresholds[level]) {
            shape |= 1 << (BASE_BITS + level);
            bits |= (below & 1) << level;
            node = thresholds[level] + below / 2;
        }
    }
    (shape | node, bits)
}

/// The thresholds of a codeword for each rank that occurs that take the fewest bits, for counts that do not rise.
fn best_thresholds(counts: &[u64; 16]) -> [u8; LEVELS] {
    let used = counts.iter().filter(|&&count| count > 0).count();
    // How many are at a rank or beyond it.
    let mut beyond = [0; 17];
    for rank in (0..16).rev() {
        beyond[rank] = beyond[rank + 1] + counts[rank];
    }
    let mut best = (u64::MAX, [0; LEVELS]);
    search(&beyond, used, 0, 1 << BASE_BITS, 0, [0; LEVELS], &mut best);
    best.1
}

/// Tries all thresholds of `level` and those after it, from so many nodes.
fn search(
    beyond: &[u64; 17],
    used: usize,
    level: usize,
    nodes: u8,
    cost: u64,
    mut thresholds: [u8; LEVELS],
    best: &mut (u64, [u8; LEVELS]),
) {
    if level == LEVELS {
        if usize::from(nodes) >= used && cost < best.0 {
            *best = (cost, thresholds);
        }
        return;
    }
    let previous = level.checked_sub(1).map_or(0, |previous| thresholds[previous]);
    for threshold in previous.max((2 * nodes).saturating_sub(16))..=nodes {
        thresholds[level] = threshold;
        let cost = cost + beyond[usize::from(threshold)];
        search(beyond, used, level + 1, 2 * nodes - threshold, cost, thresholds, best);
    }
}

/// Appends the section that `bytes` make, whether it is shorter or not.
pub(crate) fn encode(isa: Isa, bytes: &[u8], parts: &mut Parts, out: &mut Vec<u8>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this instruction set is chosen only where the CPU has it.
        Isa::Avx512 => unsafe { super::avx512::encode(bytes, parts, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx2 => unsafe { super::avx2::encode(bytes, parts, out) },
        _ => encode_with(
            bytes,
            parts,
            out,
            |code, block| {
                [planes(code, &block.map(|byte| byte & 0x0f)), planes(code, &block.map(|byte| byte >> 4))]
            },
            extract,
        ),
    }
}

/// [`encode`] with a way to take the planes of a block's low and high nibbles and to gather the bits under a mask.
#[inline(always)]
pub(super) fn encode_with(
    bytes: &[u8],
    Parts { levels, base }: &mut Parts,
    out: &mut Vec<u8>,
    planes: impl Fn(&Code, &[u8; BLOCK_BYTES]) -> [Planes; 2],
    extract: impl Fn(u64, u64) -> u64,
) {
    let code = Code::new(&histogram(bytes));
    base.clear();
    base.reserve(bytes.len().div_ceil(BLOCK_BYTES) * BLOCK_BASE_BYTES);
    levels.iter_mut().for_each(|level| level.clear(2 * bytes.len()));
    let (whole, rest) = bytes.as_chunks::<BLOCK_BYTES>();
    // Filled up with what takes no bits beyond the base, if anything does.
    let mut last = [[code.order[0] * 0x11; BLOCK_BYTES]];
    last[0][..rest.len()].copy_from_slice(rest);
    let last: &[[u8; BLOCK_BYTES]] = if rest.is_empty() { &[] } else { &last };
    for blocks in [whole, last] {
        for block in blocks {
            for planes in planes(&code, block) {
                let (fixed, rest) = planes.split_at(BASE_BITS);
                for plane in fixed {
                    base.extend_from_slice(&plane.to_le_bytes());
                }
                let (goes_on, bits) = rest.split_at(LEVELS);
                for ((level, &mask), &bits) in levels.iter_mut().zip(goes_on).zip(bits) {
                    level.append(extract(bits, mask), mask.count_ones());
                }
            }
        }
    }
    levels.iter_mut().for_each(Bits::finish);
    let header_at = out.len();
    out.resize(header_at + HEADER_BYTES, 0);
    code.write_header(std::array::from_fn(|level| levels[level].bytes.len()), &mut out[header_at..]);
    levels.iter().map(|level| &level.bytes).chain([&*base]).for_each(|part| out.extend_from_slice(part));
}

fn histogram(bytes: &[u8]) -> [u64; 16] {
    // Four tables, so that neighbours that are equal don't wait for each other.
    let mut tables = [[0_u32; 256]; 4];
    let (fours, rest) = bytes.as_chunks::<4>();
    for four in fours {
        for (table, &byte) in tables.iter_mut().zip(four) {
            table[usize::from(byte)] += 1;
        }
    }
    rest.iter().for_each(|&byte| tables[0][usize::from(byte)] += 1);
    let mut counts = [0; 16];
    for table in tables {
        for (byte, count) in table.into_iter().enumerate() {
            counts[byte % 16] += u64::from(count);
            counts[byte / 16] += u64::from(count);
        }
    }
    counts
}

/// The planes of 64 nibbles, eight at a time.
fn planes(code: &Code, nibbles: &[u8; BLOCK_BYTES]) -> Planes {
    let mut planes = [0; PLANES];
    for (index, nibbles) in nibbles.as_chunks::<8>().0.iter().enumerate() {
        let [shapes, bits] = [&code.shapes, &code.bits]
            .map(|table| u64::from_le_bytes(nibbles.map(|nibble| table[usize::from(nibble)])));
        for (place, plane) in planes.iter_mut().enumerate() {
            let ones = match place.checked_sub(BASE_BITS + LEVELS) {
                None => shapes >> place,
                Some(level) => bits >> level,
            };
            // The product moves bit 8 * i to bit 56 + i, and no two bits to one place.
            let byte = (ones & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56;
            *plane |= byte << (8 * index);
        }
    }
    planes
}

/// The bits under a mask's ones, side by side.
fn extract(bits: u64, mut mask: u64) -> u64 {
    let (mut extracted, mut place) = (0, 0);
    while mask != 0 {
        extracted |= (bits >> mask.trailing_zeros() & 1) << place;
        place += 1;
        mask &= mask - 1;
    }
    extracted
}

/// Bits one behind the other, from the lowest of each byte up.
#[derive(Debug, Default)]
struct Bits {
    bytes: Vec<u8>,
    /// Those that make no eight bytes yet.
    rest: u64,
    rest_bits: u32,
}

impl Bits {
    /// Makes room for so many bits, so that later sections of this size find it.
    fn clear(&mut self, bits: usize) {
        self.bytes.clear();
        self.bytes.reserve(bits / 8 + 8);
        (self.rest, self.rest_bits) = (0, 0);
    }

    /// Appends the `count` lowest bits, up to 64; the others are 0.
    #[inline(always)]
    fn append(&mut self, bits: u64, count: u32) {
        self.rest |= bits << self.rest_bits;
        let total = self.rest_bits + count;
        if total >= 64 {
            self.bytes.extend_from_slice(&self.rest.to_le_bytes());
            self.rest = bits.checked_shr(64 - self.rest_bits).unwrap_or(0);
        }
        self.rest_bits = total % 64;
    }

    fn finish(&mut self) {
        let rest = self.rest.to_le_bytes();
        self.bytes.extend_from_slice(&rest[..self.rest_bits.div_ceil(8) as usize]);
    }
}
