//! NEON: 16 dimensions at a time.

use std::arch::aarch64::{
    float32x4_t, uint8x16_t, uint8x16x2_t, uint16x4_t, uint16x8_t, uint32x4_t, vaddhn_u32, vaddq_f32,
    vaddq_u8, vaddq_u32, vandq_u8, vandq_u32, vbslq_u32, vceqq_u8, vcltq_f32, vcombine_u8, vcombine_u16,
    vcvtq_f32_u32, vdupq_n_f32, vdupq_n_u8, vdupq_n_u32, vget_high_u8, vget_high_u16, vget_low_u8,
    vget_low_u16, vld1q_f32, vld1q_u8, vmaxq_f32, vminq_f32, vmovl_u8, vmovl_u16, vmovn_u16, vmovn_u32,
    vmulq_f32, vorrq_u8, vorrq_u32, vqtbl1q_u8, vqtbl2q_u8, vreinterpretq_f32_u32, vreinterpretq_u8_u16,
    vreinterpretq_u32_f32, vshlq_n_u8, vshlq_u8, vshrq_n_u8, vshrq_n_u32, vst1q_u8, vst2q_u8, vsubq_u8,
    vsubq_u32, vuzp1q_u8, vuzp2q_u8,
};

use super::Job;
use crate::dtype::{E4M3_MAX, F16_MAX, OutDtype};
use crate::packing::Packing;

/// Dimensions that one step writes.
pub(super) const UNIT: usize = 16;

// Ways to narrow, as parameters of functions.
const BF16: u8 = 0;
const F16: u8 = 1;
const E4M3: u8 = 2;

const NIBBLES: u8 = 0;
const NIBBLES_NIBBLES: u8 = 1;
const NIBBLES_BITS: u8 = 2;
const CRUMBS_BITS: u8 = 3;

/// Bytes of one element.
const fn bytes(out: u8) -> usize {
    if out == E4M3 { 1 } else { 2 }
}

/// Writes the plane to `out`. There are no streaming stores: Arm's non-temporal pair is a hint that cores may ignore.
///
/// # Safety
/// The CPU has NEON; the job's sizes agree with `out`, and its rows have units of 16.
#[target_feature(enable = "neon")]
pub(super) unsafe fn plane(job: &Job<'_>, out: &mut [u8]) {
    // SAFETY: as this function demands.
    unsafe {
        match job.out_dtype {
            OutDtype::Bf16 => packed::<BF16>(job, out),
            OutDtype::F16 => packed::<F16>(job, out),
            OutDtype::Fp8E4M3 { .. } => packed::<E4M3>(job, out),
        }
    }
}

/// # Safety
/// As [`plane`].
#[target_feature(enable = "neon")]
unsafe fn packed<const OUT: u8>(job: &Job<'_>, out: &mut [u8]) {
    // SAFETY: as `plane` demands.
    unsafe {
        match job.packing {
            Packing::Nibbles => grouped::<OUT, NIBBLES>(job, out),
            Packing::NibblesAndNibbles => grouped::<OUT, NIBBLES_NIBBLES>(job, out),
            Packing::NibblesAndBits => grouped::<OUT, NIBBLES_BITS>(job, out),
            Packing::CrumbsAndBits => grouped::<OUT, CRUMBS_BITS>(job, out),
        }
    }
}

/// # Safety
/// As [`plane`].
#[target_feature(enable = "neon")]
unsafe fn grouped<const OUT: u8, const PACKING: u8>(job: &Job<'_>, out: &mut [u8]) {
    // SAFETY: as `plane` demands.
    unsafe {
        if job.per_channel {
            rows::<OUT, PACKING, true>(job, out);
        } else {
            rows::<OUT, PACKING, false>(job, out);
        }
    }
}

/// Scales and offsets of one head row.
#[derive(Clone, Copy)]
enum Group {
    /// One of each for the row: low bytes, and high bytes, of the elements of codes 0 to 31.
    Table(uint8x16x2_t, uint8x16x2_t),
    /// One of each for the row.
    Same(float32x4_t, float32x4_t),
    /// Those of each dimension.
    Each(*const f32, *const f32),
}

/// # Safety
/// As [`plane`].
#[target_feature(enable = "neon")]
unsafe fn rows<const OUT: u8, const PACKING: u8, const PER_CHANNEL: bool>(job: &Job<'_>, out: &mut [u8]) {
    let dim = job.head_dim;
    let (plain_bytes, section_bytes) = (job.packing.plain_bytes(dim), job.packing.section_bytes(dim));
    let (mut plain, mut section) = (job.plain.as_ptr(), job.section.as_ptr());
    let mut first = 0;
    for (row, out) in out.chunks_exact_mut(dim * bytes(OUT)).enumerate() {
        let group = if PER_CHANNEL {
            let group = Group::Each(job.scales[first..].as_ptr(), job.offsets[first..].as_ptr());
            first += dim;
            first = if first == job.scales.len() { 0 } else { first };
            group
        } else {
            let (scale, offset) = (vdupq_n_f32(job.scales[row]), vdupq_n_f32(job.offsets[row]));
            if PACKING == NIBBLES_NIBBLES {
                Group::Same(scale, offset)
            } else {
                table::<OUT>(scale, offset, PACKING == NIBBLES_BITS)
            }
        };
        let mut write = |codes: uint8x16_t, at: usize| {
            // SAFETY: `at` and the 15 dimensions after it are within the row, as are their scales.
            unsafe { write::<OUT, PACKING>(codes, at, group, out) }
        };
        // SAFETY: the pointers are at this row's bytes of both parts, and rows have units.
        unsafe {
            if PACKING == CRUMBS_BITS {
                for at in (0..dim).step_by(UNIT) {
                    write(crumbs(section, plain, at, dim / 4), at);
                }
            } else {
                let half = dim / 2;
                let mut at = 0;
                loop {
                    let (low, high) = nibbles::<PACKING>(section, plain, at, half);
                    write(low, at);
                    write(high, half + at);
                    if at + UNIT == half {
                        break;
                    }
                    at = (at + UNIT).min(half - UNIT);
                }
            }
            plain = plain.add(plain_bytes);
            section = section.add(section_bytes);
        }
    }
}

/// The elements of codes 0 to 15, and with `more` of codes 16 to 31.
#[target_feature(enable = "neon")]
#[inline]
fn table<const OUT: u8>(scale: float32x4_t, offset: float32x4_t, more: bool) -> Group {
    let eight = |first: u32| -> uint16x8_t {
        // SAFETY: four numbers.
        let codes = unsafe { vld1q_f32([0.0, 1.0, 2.0, 3.0].as_ptr()) };
        let element = |first: u32| {
            let codes = vaddq_f32(codes, vcvtq_f32_u32(vdupq_n_u32(first)));
            vaddq_f32(vmulq_f32(codes, scale), offset)
        };
        narrow::<OUT>(element(first), element(first + 4))
    };
    let sixteen = |first: u32| -> (uint8x16_t, uint8x16_t) {
        let (low, high) = (vreinterpretq_u8_u16(eight(first)), vreinterpretq_u8_u16(eight(first + 8)));
        (vuzp1q_u8(low, high), vuzp2q_u8(low, high))
    };
    let below = sixteen(0);
    let above = if more { sixteen(16) } else { below };
    Group::Table(uint8x16x2_t(below.0, above.0), uint8x16x2_t(below.1, above.1))
}

/// The codes of dimensions `at..at + 16` and `half + at..half + at + 16`.
///
/// # Safety
/// `at + 16 <= half`, and the pointers are at a row's parts.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn nibbles<const PACKING: u8>(
    section: *const u8,
    plain: *const u8,
    at: usize,
    half: usize,
) -> (uint8x16_t, uint8x16_t) {
    let mask = vdupq_n_u8(0x0f);
    // SAFETY: `half` bytes of nibbles, `2 * half / 8` bytes of bits.
    unsafe {
        let section = vld1q_u8(section.add(at));
        let (low, high) = (vandq_u8(section, mask), vshrq_n_u8::<4>(section));
        match PACKING {
            NIBBLES => (low, high),
            NIBBLES_NIBBLES => {
                let plain = vld1q_u8(plain.add(at));
                let (plain_low, plain_high) = (vandq_u8(plain, mask), vshrq_n_u8::<4>(plain));
                (vorrq_u8(vshlq_n_u8::<4>(low), plain_low), vorrq_u8(vshlq_n_u8::<4>(high), plain_high))
            }
            _ => (add_bits(low, plain, at), add_bits(high, plain, half + at)),
        }
    }
}

/// Twice these numbers, plus a bit each.
///
/// # Safety
/// `plain` has the bits `at..at + 16`, and `at` is a multiple of 8.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn add_bits(high: uint8x16_t, plain: *const u8, at: usize) -> uint8x16_t {
    const EACH: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
    // SAFETY: two bytes of bits, sixteen of the constant.
    let (first, second, each) =
        unsafe { (*plain.add(at / 8), *plain.add(at / 8 + 1), vld1q_u8(EACH.as_ptr())) };
    let both = vcombine_u8(vget_low_u8(vdupq_n_u8(first)), vget_low_u8(vdupq_n_u8(second)));
    // A set bit compares as -1.
    vsubq_u8(vaddq_u8(high, high), vceqq_u8(vandq_u8(both, each), each))
}

/// The codes of dimensions `at..at + 16`.
///
/// # Safety
/// `quarter` and `at` are multiples of 16, and the pointers are at a row's parts.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn crumbs(section: *const u8, plain: *const u8, at: usize, quarter: usize) -> uint8x16_t {
    #[expect(clippy::cast_possible_wrap, clippy::cast_possible_truncation, reason = "at most 6")]
    let shift = std::arch::aarch64::vdupq_n_s8(-2 * (at / quarter) as i8);
    // SAFETY: a quarter has whole units of sixteen.
    unsafe {
        let bytes = vld1q_u8(section.add(at % quarter));
        add_bits(vandq_u8(vshlq_u8(bytes, shift), vdupq_n_u8(3)), plain, at)
    }
}

/// Writes the elements of 16 codes at dimension `at` of a row.
///
/// # Safety
/// `at + 16` dimensions are in the row.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn write<const OUT: u8, const PACKING: u8>(
    codes: uint8x16_t,
    at: usize,
    group: Group,
    out: &mut [u8],
) {
    debug_assert!((at + UNIT) * bytes(OUT) <= out.len());
    let (low, high) = match group {
        Group::Table(low, high) => {
            let look_up = |table: uint8x16x2_t| {
                if PACKING == NIBBLES_BITS { vqtbl2q_u8(table, codes) } else { vqtbl1q_u8(table.0, codes) }
            };
            (look_up(low), look_up(high))
        }
        Group::Same(scale, offset) => compute::<OUT>(codes, [scale; 4], [offset; 4]),
        Group::Each(scales, offsets) => {
            // SAFETY: as many scales and offsets as dimensions.
            let load = |numbers: *const f32| unsafe {
                let four = |fourth: usize| vld1q_f32(numbers.add(at + 4 * fourth));
                [four(0), four(1), four(2), four(3)]
            };
            compute::<OUT>(codes, load(scales), load(offsets))
        }
    };
    // SAFETY: within `out`.
    unsafe {
        let out = out.as_mut_ptr().add(at * bytes(OUT));
        if OUT == E4M3 {
            vst1q_u8(out, low);
        } else {
            vst2q_u8(out, uint8x16x2_t(low, high));
        }
    }
}

/// The low and the high bytes of the elements of 16 codes, from scales and offsets of each four.
#[target_feature(enable = "neon")]
#[inline]
fn compute<const OUT: u8>(
    codes: uint8x16_t,
    scales: [float32x4_t; 4],
    offsets: [float32x4_t; 4],
) -> (uint8x16_t, uint8x16_t) {
    let (low, high) = (vmovl_u8(vget_low_u8(codes)), vmovl_u8(vget_high_u8(codes)));
    let fours = [vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)];
    let element = |fourth: usize| {
        let code = vcvtq_f32_u32(vmovl_u16(fours[fourth]));
        vaddq_f32(vmulq_f32(code, scales[fourth]), offsets[fourth])
    };
    let (first, second) = (narrow::<OUT>(element(0), element(1)), narrow::<OUT>(element(2), element(3)));
    if OUT == E4M3 {
        let packed = vcombine_u8(vmovn_u16(first), vmovn_u16(second));
        return (packed, packed);
    }
    let (first, second) = (vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
    (vuzp1q_u8(first, second), vuzp2q_u8(first, second))
}

/// Rounds eight numbers to the type of the destination, 16 bits each; an E4M3 is in the low byte.
#[target_feature(enable = "neon")]
#[inline]
fn narrow<const OUT: u8>(low: float32x4_t, high: float32x4_t) -> uint16x8_t {
    match OUT {
        BF16 => vcombine_u16(bf16(low), bf16(high)),
        F16 => {
            vcombine_u16(vmovn_u32(small::<10, 15>(low, F16_MAX)), vmovn_u32(small::<10, 15>(high, F16_MAX)))
        }
        _ => vcombine_u16(vmovn_u32(small::<3, 7>(low, E4M3_MAX)), vmovn_u32(small::<3, 7>(high, E4M3_MAX))),
    }
}

/// The nearest bfloat16, ties to even.
#[target_feature(enable = "neon")]
#[inline]
fn bf16(value: float32x4_t) -> uint16x4_t {
    let bits = vreinterpretq_u32_f32(value);
    let last = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    vaddhn_u32(bits, vaddq_u32(last, vdupq_n_u32(0x7fff)))
}

/// The nearest number of a type with so many bits of fraction and such a bias, ties to even, at most `limit`; as
/// [`crate::dtype::f32_to_f16`] and [`crate::dtype::f32_to_e4m3`].
#[target_feature(enable = "neon")]
#[inline]
fn small<const FRACTION: i32, const BIAS: i32>(value: float32x4_t, limit: f32) -> uint32x4_t {
    #[expect(clippy::cast_sign_loss, reason = "positive constants")]
    let (fraction, bias) = (FRACTION as u32, BIAS as u32);
    // Bits of an `f32` that are dropped; what turns its bias into the other; the smallest normal number; and the
    // power of two whose unit, as an `f32`, is that of the subnormal numbers.
    let (dropped, rebias) = (23 - fraction, (127 - bias) << 23);
    let smallest_normal = (128 - bias) << 23;
    let magic = (127 + 24 - bias - fraction) << 23;
    let clamped = vmaxq_f32(vminq_f32(value, vdupq_n_f32(limit)), vdupq_n_f32(-limit));
    let bits = vreinterpretq_u32_f32(clamped);
    let magnitude = vandq_u32(bits, vdupq_n_u32(0x7fff_ffff));
    let float = vreinterpretq_f32_u32(magnitude);
    let magic_float = vreinterpretq_f32_u32(vdupq_n_u32(magic));
    let subnormal = vsubq_u32(vreinterpretq_u32_f32(vaddq_f32(float, magic_float)), vdupq_n_u32(magic));
    let shift = |value: uint32x4_t| match FRACTION {
        10 => vshrq_n_u32::<13>(value),
        _ => vshrq_n_u32::<20>(value),
    };
    let last = vandq_u32(shift(magnitude), vdupq_n_u32(1));
    let half = vdupq_n_u32((1 << (dropped - 1)) - 1);
    let normal = shift(vsubq_u32(vaddq_u32(magnitude, vaddq_u32(last, half)), vdupq_n_u32(rebias)));
    let is_subnormal = vcltq_f32(float, vreinterpretq_f32_u32(vdupq_n_u32(smallest_normal)));
    let sign = match FRACTION {
        10 => vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(0x8000)),
        _ => vandq_u32(vshrq_n_u32::<24>(bits), vdupq_n_u32(0x80)),
    };
    vorrq_u32(sign, vbslq_u32(is_subnormal, subnormal, normal))
}
