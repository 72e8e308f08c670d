//! NEON: 64 nibbles in four registers. There is no instruction that deals bits out to a mask: tables do it, six at a time.

use std::arch::aarch64::{
    uint8x16_t, vaddq_u8, vandq_u8, vcgeq_u8, vcombine_u64, vcreate_u64, vdupq_n_u8, vdupq_n_u64,
    vgetq_lane_u64, vld1q_u8, vorrq_u8, vpaddq_u8, vqsubq_u8, vqtbl1q_u8, vreinterpretq_u8_u64,
    vreinterpretq_u64_u8, vshlq_n_u8, vst1q_u8, vsubq_u8, vtstq_u8,
};

use super::{BLOCK_BASE_BYTES, BLOCK_BYTES, LEVELS, Sliced, next_bits};

/// Bits dealt out at a time.
const GROUP: usize = 6;
const GROUP_MASKS: usize = 1 << GROUP;

/// Decodes blocks; stops after one that takes a level beyond its end.
///
/// # Safety
/// The base has these blocks, and no level is beyond its end.
#[target_feature(enable = "neon")]
pub(super) unsafe fn blocks(
    sliced: &Sliced<'_>,
    first: usize,
    out: &mut [[u8; BLOCK_BYTES]],
    at: &mut [usize; LEVELS],
) {
    let levels = sliced.bytes.as_ptr();
    let mut here = *at;
    // SAFETY: the base has these blocks. Up to 128 bits and nine bytes beyond the end of a level are still in the section.
    unsafe {
        let order = vld1q_u8(sliced.order.as_ptr());
        let order_high = vshlq_n_u8::<4>(order);
        let mut base = levels.add(sliced.base_at + first * BLOCK_BASE_BYTES);
        // Where all codewords go on at the first level, its bits are taken with the base.
        let first = usize::from(sliced.all_go_on());
        for block in out {
            let mut nodes = [first_nodes(base), first_nodes(base.add(BLOCK_BASE_BYTES / 2))];
            if first == 1 {
                for nodes in &mut nodes {
                    *nodes = with_bits(*nodes, levels.add(here[0] / 8));
                    here[0] += BLOCK_BYTES;
                }
            }
            for level in first..LEVELS {
                for nodes in &mut nodes {
                    *nodes =
                        next_nodes(*nodes, levels, &mut here[level], vdupq_n_u8(sliced.thresholds[level]));
                }
            }
            let [low, high] = nodes;
            for (quarter, (low, high)) in low.into_iter().zip(high).enumerate() {
                let bytes = vorrq_u8(vqtbl1q_u8(order, low), vqtbl1q_u8(order_high, high));
                vst1q_u8(block.as_mut_ptr().add(16 * quarter), bytes);
            }
            base = base.add(BLOCK_BASE_BYTES);
            if sliced.overrun(&here) {
                break;
            }
        }
    }
    *at = here;
}

/// The nodes that 64 codewords lead to with their first two bits.
///
/// # Safety
/// `base` has sixteen bytes.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn first_nodes(base: *const u8) -> [uint8x16_t; 4] {
    // SAFETY: as this function demands.
    let [ones, twos] = unsafe {
        let plane = |plane: usize| u64::from_le(base.cast::<u64>().add(plane).read_unaligned());
        [spread(plane(0)), spread(plane(1))]
    };
    let mut nodes = [vdupq_n_u8(0); 4];
    for quarter in 0..4 {
        // A byte of ones is -1.
        nodes[quarter] = vsubq_u8(vandq_u8(twos[quarter], vdupq_n_u8(2)), ones[quarter]);
    }
    nodes
}

/// The nodes that 64 nodes lead to, all of them with the next bit.
///
/// # Safety
/// `level` has eight bytes.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn with_bits(mut nodes: [uint8x16_t; 4], level: *const u8) -> [uint8x16_t; 4] {
    // SAFETY: as this function demands.
    let bits = spread(u64::from_le(unsafe { level.cast::<u64>().read_unaligned() }));
    for quarter in 0..4 {
        nodes[quarter] = vsubq_u8(vaddq_u8(nodes[quarter], nodes[quarter]), bits[quarter]);
    }
    nodes
}

/// The nodes one level further, of those that go on.
///
/// # Safety
/// `levels` has 64 bits and nine bytes more from bit `at`.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn next_nodes(
    mut nodes: [uint8x16_t; 4],
    levels: *const u8,
    at: &mut usize,
    threshold: uint8x16_t,
) -> [uint8x16_t; 4] {
    let [a, b, c, d] = nodes;
    let goes_on = gather([
        vcgeq_u8(a, threshold),
        vcgeq_u8(b, threshold),
        vcgeq_u8(c, threshold),
        vcgeq_u8(d, threshold),
    ]);
    // SAFETY: as this function demands.
    let (bits, count) = deal(unsafe { next_bits(levels, *at, 64) }, goes_on);
    *at += count;
    let bits = spread(bits);
    for quarter in 0..4 {
        // Nothing is added to nodes below the threshold. A byte of ones is -1.
        let more = vqsubq_u8(nodes[quarter], threshold);
        nodes[quarter] = vsubq_u8(vaddq_u8(nodes[quarter], more), bits[quarter]);
    }
    nodes
}

/// The bits 1, 2, 4 to 128, twice.
#[target_feature(enable = "neon")]
#[inline]
fn each() -> uint8x16_t {
    vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201))
}

/// 64 bits as bytes of zeros or ones.
#[target_feature(enable = "neon")]
#[inline]
fn spread(bits: u64) -> [uint8x16_t; 4] {
    let bits = vreinterpretq_u8_u64(vdupq_n_u64(bits));
    let mut bytes = vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(0), vcreate_u64(0x0101_0101_0101_0101)));
    let mut masks = [bits; 4];
    for mask in &mut masks {
        *mask = vtstq_u8(vqtbl1q_u8(bits, bytes), each());
        bytes = vaddq_u8(bytes, vdupq_n_u8(2));
    }
    masks
}

/// 64 bytes of zeros or ones as bits.
#[target_feature(enable = "neon")]
#[inline]
fn gather([a, b, c, d]: [uint8x16_t; 4]) -> u64 {
    let low = vpaddq_u8(vandq_u8(a, each()), vandq_u8(b, each()));
    let high = vpaddq_u8(vandq_u8(c, each()), vandq_u8(d, each()));
    let all = vpaddq_u8(low, high);
    vgetq_lane_u64::<0>(vreinterpretq_u64_u8(vpaddq_u8(all, all)))
}

/// By mask, then by bits: the bits at the mask's places.
static DEALT: [[u8; GROUP_MASKS]; GROUP_MASKS] = {
    let mut dealt = [[0; GROUP_MASKS]; GROUP_MASKS];
    let (mut mask, mut bits) = (0, 0);
    while mask < GROUP_MASKS {
        let (mut place, mut taken) = (0, 0);
        while place < GROUP {
            if mask >> place & 1 == 1 {
                dealt[mask][bits] |= ((bits >> taken & 1) << place) as u8;
                taken += 1;
            }
            place += 1;
        }
        bits += 1;
        if bits == GROUP_MASKS {
            (mask, bits) = (mask + 1, 0);
        }
    }
    dealt
};

static COUNT: [u8; GROUP_MASKS] = {
    let mut count = [0; GROUP_MASKS];
    let mut mask = 0;
    while mask < GROUP_MASKS {
        count[mask] = mask.count_ones() as u8;
        mask += 1;
    }
    count
};

/// The lowest bits at the places of the mask's ones, and how many these are.
#[inline(always)]
fn deal(mut bits: u64, mask: u64) -> (u64, usize) {
    const LOW: u64 = GROUP_MASKS as u64 - 1;
    let (mut dealt, mut total) = (0, 0);
    for place in (0..64).step_by(GROUP) {
        let group = (mask >> place & LOW) as usize;
        dealt |= u64::from(DEALT[group][(bits & LOW) as usize]) << place;
        let count = COUNT[group];
        bits >>= count;
        total += usize::from(count);
    }
    (dealt, total)
}
