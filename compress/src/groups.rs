//! Scales and offsets of a quantized plane, from their 16-bit form to `f32`.

use crate::dtype::{self, Dtype};
use crate::{DecodeError, cachegen};

/// Scales and offsets as they lie in a payload.
pub(crate) struct Groups<'a> {
    pub(crate) scale_bytes: &'a [u8],
    /// Empty where the quantizer is symmetric.
    pub(crate) offset_bytes: &'a [u8],
    pub(crate) dtype: Dtype,
    pub(crate) largest_code: u8,
}

impl Groups<'_> {
    /// Widens scales and offsets to `f32` into the front of scratch, refusing those that would give any element that
    /// is not a finite bfloat16. Where the quantizer is symmetric, every group is repeated `rows_per_group` times, so
    /// that each head row has its own. All are divided by `divisor`.
    pub(crate) fn widen<'s>(
        &self,
        rows_per_group: usize,
        divisor: f32,
        scales: &'s mut [f32],
        offsets: &'s mut [f32],
    ) -> Result<(&'s [f32], &'s [f32]), DecodeError> {
        let groups = self.scale_bytes.len() / Dtype::BYTES;
        let repeated = if self.offset_bytes.is_empty() { groups * rows_per_group } else { groups };
        let (scales, offsets) = (&mut scales[..repeated], &mut offsets[..repeated]);
        widen(self.scale_bytes, self.dtype, &mut scales[..groups]);
        if self.offset_bytes.is_empty() {
            self.make_symmetric(groups, rows_per_group, scales, offsets);
        } else {
            widen(self.offset_bytes, self.dtype, offsets);
        }
        if !self.all_in_range(scales, offsets) {
            return Err(self.first_out_of_range(groups));
        }
        if divisor != 1.0 {
            scales.iter_mut().chain(offsets.iter_mut()).for_each(|value| *value /= divisor);
            if !self.all_in_range(scales, offsets) {
                return Err(DecodeError::OutScale { scale_bits: divisor.to_bits() });
            }
        }
        Ok((scales, offsets))
    }

    /// From largest magnitudes at the front of `scales` to scales and offsets of every head row.
    fn make_symmetric(&self, groups: usize, rows_per_group: usize, scales: &mut [f32], offsets: &mut [f32]) {
        // From the back, so that no magnitude is overwritten before it is read.
        for group in (0..groups).rev() {
            let (scale, offset) = cachegen::scale_and_offset(scales[group], self.largest_code / 2);
            let rows = group * rows_per_group..(group + 1) * rows_per_group;
            scales[rows.clone()].fill(scale);
            offsets[rows].fill(offset);
        }
    }

    /// Elements lie between the offset and that of the largest code: rounding keeps their order. No comparison with
    /// NaN holds.
    fn in_range(&self, scale: f32, offset: f32) -> bool {
        let end = f32::from(self.largest_code) * scale + offset;
        (offset.abs() <= dtype::BF16_MAX) & (end.abs() <= dtype::BF16_MAX)
    }

    fn all_in_range(&self, scales: &[f32], offsets: &[f32]) -> bool {
        // Without an early end, so that it is done several groups at a time.
        scales.iter().zip(offsets).fold(true, |all, (&scale, &offset)| all & self.in_range(scale, offset))
    }

    fn first_out_of_range(&self, groups: usize) -> DecodeError {
        let bits = |bytes: &[u8], group: usize| {
            let bytes = bytes.get(2 * group..2 * group + 2);
            bytes.map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
        };
        let out_of_range = |&(_, scale, offset): &(usize, u16, u16)| {
            let (scale, offset) = (self.dtype.widen(scale), self.dtype.widen(offset));
            let (scale, offset) = match self.offset_bytes {
                [] => cachegen::scale_and_offset(scale, self.largest_code / 2),
                _ => (scale, offset),
            };
            !self.in_range(scale, offset)
        };
        let (group, scale_bits, offset_bits) = (0..groups)
            .map(|group| (group, bits(self.scale_bytes, group), bits(self.offset_bytes, group)))
            .find(out_of_range)
            .unwrap_or_default();
        DecodeError::Scale { group, scale_bits, offset_bits }
    }
}

fn widen(bytes: &[u8], dtype: Dtype, values: &mut [f32]) {
    match dtype {
        Dtype::Bf16 => widen_with(bytes, values, dtype::bf16_to_f32),
        Dtype::F16 => widen_with(bytes, values, dtype::f16_to_f32),
    }
}

fn widen_with(bytes: &[u8], values: &mut [f32], widen: impl Fn(u16) -> f32) {
    for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(Dtype::BYTES)) {
        *value = widen(u16::from_le_bytes([bytes[0], bytes[1]]));
    }
}
