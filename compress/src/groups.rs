//! Scales and offsets of a quantized plane, from their 16-bit form to `f32`.

use crate::DecodeError;
use crate::dtype::{self, Dtype};

/// Scales and offsets as they lie in a payload.
pub(crate) struct Groups<'a> {
    pub(crate) scale_bytes: &'a [u8],
    pub(crate) offset_bytes: &'a [u8],
    pub(crate) dtype: Dtype,
}

impl Groups<'_> {
    /// Widens scales and offsets to `f32` into the front of scratch, refusing those that would give any element that
    /// is not a finite bfloat16. With `in_pairs`, the even groups come first, then the odd ones.
    pub(crate) fn widen<'s>(
        &self,
        largest_code: u8,
        in_pairs: bool,
        scales: &'s mut [f32],
        offsets: &'s mut [f32],
    ) -> Result<(&'s [f32], &'s [f32]), DecodeError> {
        let groups = self.scale_bytes.len() / Dtype::BYTES;
        let (scales, offsets) = (&mut scales[..groups], &mut offsets[..groups]);
        match self.dtype {
            Dtype::Bf16 => {
                widen(self.scale_bytes, in_pairs, scales, dtype::bf16_to_f32);
                widen(self.offset_bytes, in_pairs, offsets, dtype::bf16_to_f32);
            }
            Dtype::F16 => {
                widen(self.scale_bytes, in_pairs, scales, dtype::f16_to_f32);
                widen(self.offset_bytes, in_pairs, offsets, dtype::f16_to_f32);
            }
        }
        // Elements lie between the offset and that of the largest code: rounding keeps their order. An offset that is
        // not finite makes that other end infinite or NaN, and no comparison with NaN holds.
        let largest_code = f32::from(largest_code);
        let in_range = |scale: f32, offset: f32| (largest_code * scale + offset).abs() <= dtype::BF16_MAX;
        let pairs = scales.iter().zip(offsets.iter());
        // Without an early end, so that it is done several groups at a time.
        if pairs.fold(true, |all, (&scale, &offset)| all & in_range(scale, offset)) {
            return Ok((scales, offsets));
        }
        let bits = |bytes: &[u8], group: usize| u16::from_le_bytes([bytes[2 * group], bytes[2 * group + 1]]);
        let (group, scale_bits, offset_bits) = (0..groups)
            .map(|group| (group, bits(self.scale_bytes, group), bits(self.offset_bytes, group)))
            .find(|&(_, scale, offset)| !in_range(self.dtype.widen(scale), self.dtype.widen(offset)))
            .unwrap_or_default();
        Err(DecodeError::Scale { group, scale_bits, offset_bits })
    }
}

fn widen(bytes: &[u8], in_pairs: bool, values: &mut [f32], widen: impl Fn(u16) -> f32) {
    let bits = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
    if in_pairs {
        let (evens, odds) = values.split_at_mut(values.len() / 2);
        for ((even, odd), bytes) in evens.iter_mut().zip(odds).zip(bytes.chunks_exact(2 * Dtype::BYTES)) {
            (*even, *odd) = (widen(bits(bytes)), widen(bits(&bytes[Dtype::BYTES..])));
        }
    } else {
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(Dtype::BYTES)) {
            *value = widen(bits(bytes));
        }
    }
}
