//! One nibble after the other: what every other kernel must give.

use super::{BASE_BITS, BLOCK_BASE_BYTES, BLOCK_BYTES, LEVELS, Sliced};

/// Decodes blocks; stops after one that takes a level beyond its end.
pub(super) fn blocks(
    sliced: &Sliced<'_>,
    first: usize,
    out: &mut [[u8; BLOCK_BYTES]],
    at: &mut [usize; LEVELS],
) {
    let base = sliced.bytes[sliced.base_at..].chunks_exact(BLOCK_BASE_BYTES).skip(first);
    for (block, base) in out.iter_mut().zip(base) {
        block.fill(0);
        for (shift, base) in [0, 4].into_iter().zip(base.chunks_exact(BLOCK_BASE_BYTES / 2)) {
            for (index, byte) in block.iter_mut().enumerate() {
                *byte |= sliced.order[usize::from(rank(sliced, base, index, at))] << shift;
            }
        }
        if sliced.overrun(at) {
            return;
        }
    }
}

/// The rank of one of 64 nibbles.
fn rank(sliced: &Sliced<'_>, base: &[u8], index: usize, at: &mut [usize; LEVELS]) -> u8 {
    let bit = |bytes: &[u8], at: usize| bytes[at / 8] >> (at % 8) & 1;
    let mut node = (0..BASE_BITS).fold(0, |node, plane| node | bit(base, 64 * plane + index) << plane);
    for (&threshold, at) in sliced.thresholds.iter().zip(at) {
        if node >= threshold {
            node += node - threshold + bit(sliced.bytes, *at);
            *at += 1;
        }
    }
    node
}
