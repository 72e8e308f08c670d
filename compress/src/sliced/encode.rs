//! The encoder of `sliced`: ranks and thresholds from a [histogram](super::counts), then a block at a time.

use super::counts::histogram;
use super::{BASE_BITS, BLOCK_BASE_BYTES, BLOCK_BYTES, HEADER_BYTES, LEVELS};
use crate::Isa;

/// Of 64 nibbles, each bit of their shapes in [`Code`], and each of their bits.
pub(super) type Planes = [[u64; 8]; 2];

/// Blocks whose planes are taken before they are appended to the parts: through memory, which is nearer to the CPU's whole numbers than
/// its vectors are.
const BATCH: usize = 16;

/// The parts of a section as they grow; kept, so that nothing is allocated for the next.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    levels: [Vec<[u8; 8]>; LEVELS],
    base: Vec<[u8; 8]>,
}

/// The code of a section, and how long that will be.
pub(crate) struct Code {
    order: [u8; 16],
    thresholds: [u8; LEVELS],
    /// By nibble: the base in the lowest bits, above it whether each level goes on.
    pub(super) shapes: [u8; 16],
    /// By nibble: the bit of each level.
    pub(super) bits: [u8; 16],
    level_bytes: [usize; LEVELS],
    base_bytes: usize,
}

impl Code {
    /// The code that takes the fewest bits for these bytes.
    pub(crate) fn new(isa: Isa, bytes: &[u8]) -> Self {
        let mut counts = histogram(isa, bytes);
        let mut order: [u8; 16] = std::array::from_fn(|nibble| nibble.to_le_bytes()[0]);
        order.sort_by_key(|&nibble| std::cmp::Reverse(counts[usize::from(nibble)]));
        let thresholds = best_thresholds(&order.map(|nibble| counts[usize::from(nibble)]));
        let (mut shapes, mut bits) = ([0; 16], [0; 16]);
        for (rank, &nibble) in (0..).zip(&order) {
            (shapes[usize::from(nibble)], bits[usize::from(nibble)]) = codeword(rank, thresholds);
        }
        let blocks = bytes.len().div_ceil(BLOCK_BYTES);
        // The last block is filled up.
        counts[usize::from(order[0])] += 2 * (blocks * BLOCK_BYTES - bytes.len()) as u64;
        let level_bytes = std::array::from_fn(|level| {
            let goes_on = |shape: u8| u64::from(shape >> (BASE_BITS + level) & 1);
            let bits: u64 = counts.iter().zip(shapes).map(|(count, shape)| count * goes_on(shape)).sum();
            usize::try_from(bits.div_ceil(8)).expect("bits of a section in memory")
        });
        Self { order, thresholds, shapes, bits, level_bytes, base_bytes: blocks * BLOCK_BASE_BYTES }
    }

    /// Bytes of the section.
    pub(crate) fn section_bytes(&self) -> usize {
        HEADER_BYTES + self.level_bytes.iter().sum::<usize>() + self.base_bytes
    }

    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let (ranks, rest) = header.split_at_mut(8);
        for (byte, ranks) in ranks.iter_mut().zip(self.order.chunks_exact(2)) {
            *byte = ranks[0] | ranks[1] << 4;
        }
        let (thresholds, lengths) = rest.split_at_mut(LEVELS);
        thresholds.copy_from_slice(&self.thresholds);
        for (place, length) in lengths.chunks_exact_mut(4).zip(self.level_bytes) {
            place.copy_from_slice(&u32::try_from(length).expect("a section of 16 MiB").to_le_bytes());
        }
        header
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

/// Appends the section that `bytes` make with their code, whether it is shorter or not.
pub(crate) fn encode(isa: Isa, code: &Code, bytes: &[u8], parts: &mut Parts, out: &mut Vec<u8>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this instruction set is chosen only where the CPU has it.
        Isa::Avx512 => unsafe { super::avx512::cut(code, bytes, parts) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx2 => unsafe { super::avx2::cut(code, bytes, parts) },
        _ => cut_with(code, bytes, parts, planes, extract),
    }
    out.extend_from_slice(&code.header());
    let lengths = code.level_bytes.into_iter().chain([code.base_bytes]);
    for (part, bytes) in parts.levels.iter().chain([&parts.base]).zip(lengths) {
        out.extend_from_slice(&part.as_flattened()[..bytes]);
    }
}

/// Cuts the codewords of all nibbles into parts, with a way to take the planes of the low and high nibbles of blocks and one to gather the
/// bits under a mask.
#[inline(always)]
pub(super) fn cut_with(
    code: &Code,
    bytes: &[u8],
    parts: &mut Parts,
    planes: impl Fn(&Code, &[[u8; BLOCK_BYTES]], &mut [[Planes; 2]]),
    extract: impl Fn(u64, u64) -> u64,
) {
    if code.thresholds[0] == 0 {
        cut::<true>(code, bytes, parts, planes, extract);
    } else {
        cut::<false>(code, bytes, parts, planes, extract);
    }
}

/// [`cut_with`], with `ALL` of codewords that all go on at the first level.
#[inline(always)]
fn cut<const ALL: bool>(
    code: &Code,
    bytes: &[u8],
    parts: &mut Parts,
    planes: impl Fn(&Code, &[[u8; BLOCK_BYTES]], &mut [[Planes; 2]]),
    extract: impl Fn(u64, u64) -> u64,
) {
    let Parts { levels, base } = parts;
    base.resize(code.base_bytes / 8, [0; 8]);
    for (level, bytes) in levels.iter_mut().zip(code.level_bytes) {
        // One more, as what is not complete is stored too.
        level.resize(bytes / 8 + 1, [0; 8]);
    }
    let [first, second, third, fourth] = levels;
    let mut levels = [first, second, third, fourth].map(Bits::new);
    let (blocks, rest) = bytes.as_chunks::<BLOCK_BYTES>();
    // Filled up with what takes the fewest bits.
    let mut last = [[code.order[0] * 0x11; BLOCK_BYTES]];
    last[0][..rest.len()].copy_from_slice(rest);
    let last: &[[u8; BLOCK_BYTES]] = if rest.is_empty() { &[] } else { &last };
    let (base, base_of_last) = base.split_at_mut(blocks.len() * BLOCK_BASE_BYTES / 8);
    let mut taken = [[[[0; 8]; 2]; 2]; BATCH];
    for (blocks, base) in [(blocks, base), (last, base_of_last)] {
        for (blocks, base) in blocks.chunks(BATCH).zip(base.chunks_mut(BATCH * BLOCK_BASE_BYTES / 8)) {
            let taken = &mut taken[..blocks.len()];
            planes(code, blocks, taken);
            for ([shapes, bits], base) in taken.as_flattened().iter().zip(base.as_chunks_mut::<BASE_BITS>().0)
            {
                *base = [shapes[0].to_le_bytes(), shapes[1].to_le_bytes()];
                if ALL {
                    levels[0].append_word(bits[0]);
                }
                for level in usize::from(ALL)..LEVELS {
                    let mask = shapes[BASE_BITS + level];
                    levels[level].append(extract(bits[level], mask), mask.count_ones());
                }
            }
        }
    }
    for level in levels {
        level.finish();
    }
}

/// The planes of all nibbles of blocks, eight at a time.
fn planes(code: &Code, blocks: &[[u8; BLOCK_BYTES]], out: &mut [[Planes; 2]]) {
    for (block, [low, high]) in blocks.iter().zip(out) {
        *low = planes_of(code, &block.map(|byte| byte & 0x0f));
        *high = planes_of(code, &block.map(|byte| byte >> 4));
    }
}

fn planes_of(code: &Code, nibbles: &[u8; BLOCK_BYTES]) -> Planes {
    let mut planes = [[0; 8]; 2];
    for (index, nibbles) in nibbles.as_chunks::<8>().0.iter().enumerate() {
        for (planes, table) in planes.iter_mut().zip([&code.shapes, &code.bits]) {
            let codes = u64::from_le_bytes(nibbles.map(|nibble| table[usize::from(nibble)]));
            for (place, plane) in planes.iter_mut().enumerate() {
                // The product moves bit 8 * i to bit 56 + i, and no two bits to one place.
                let byte = (codes >> place & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56;
                *plane |= byte << (8 * index);
            }
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
struct Bits<'a> {
    words: &'a mut [[u8; 8]],
    at: usize,
    /// Those that make no whole word yet.
    rest: u64,
    rest_bits: u32,
}

impl<'a> Bits<'a> {
    /// Room for all bits, and one word more.
    #[inline(always)]
    fn new(words: &'a mut Vec<[u8; 8]>) -> Self {
        Self { words, at: 0, rest: 0, rest_bits: 0 }
    }

    /// Appends the `count` lowest bits, up to 64; the others are 0.
    #[inline(always)]
    fn append(&mut self, bits: u64, count: u32) {
        self.rest |= bits << self.rest_bits;
        // Always, and the rest chosen without a branch: whether a word is complete, no CPU foretells.
        self.words[self.at] = self.rest.to_le_bytes();
        let beyond = bits >> 1 >> (63 - self.rest_bits);
        let total = self.rest_bits + count;
        self.rest = std::hint::select_unpredictable(total >= 64, beyond, self.rest);
        self.at += (total / 64) as usize;
        self.rest_bits = total % 64;
    }

    /// Appends 64 bits where only words were appended before.
    #[inline(always)]
    fn append_word(&mut self, bits: u64) {
        self.words[self.at] = bits.to_le_bytes();
        self.at += 1;
    }

    /// Stores what was left when the last word was complete.
    fn finish(self) {
        self.words[self.at] = self.rest.to_le_bytes();
    }
}
