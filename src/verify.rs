//! What a fetch must deliver, worked out from the original and the codec by the slow reference decoder, and the
//! comparison with what did arrive.

use anyhow::Context;
use client::Region;
use compress::{Codecs, Dtype, Side, reference_decode};
use store::kv_file::{KvFile, SequenceShape};

/// The decoded KV of a whole sequence as two tensors, `[layers, tokens, kv_heads, head_dim]` each: all of K, then all
/// of V.
pub(crate) struct Expected {
    shape: SequenceShape,
    bytes: Vec<u8>,
}

impl Expected {
    /// What `codecs` make of `file`, whose shape they were checked for.
    pub(crate) fn new(file: &KvFile, codecs: &Codecs) -> anyhow::Result<Self> {
        let shape = file.shape();
        let mut expected = Self { shape, bytes: vec![0; 2 * shape.tensor_bytes()] };
        let mut plane = Vec::new();
        for chunk in 0..shape.chunks() {
            for layer in 0..shape.layers {
                for side in [Side::K, Side::V] {
                    file.read_plane(chunk, layer, side, &mut plane)?;
                    let codec = codecs.plane(layer, side);
                    let decoded =
                        reference_decode(codec, &shape.chunk(chunk), layer, side, &plane, shape.dtype)
                            .with_context(|| format!("chunk {chunk}, layer {layer}, {side}"))?;
                    let start = plane_offset(&shape, chunk, layer, side);
                    expected.bytes[start..start + decoded.len()].copy_from_slice(&decoded);
                }
            }
        }
        Ok(expected)
    }

    /// Planes of `arrived` (laid out as this) that differ.
    pub(crate) fn mismatched_planes(&self, arrived: &[u8]) -> u64 {
        let mut mismatched = 0;
        for chunk in 0..self.shape.chunks() {
            let bytes = self.shape.chunk(chunk).plane_bytes();
            for layer in 0..self.shape.layers {
                for side in [Side::K, Side::V] {
                    let start = plane_offset(&self.shape, chunk, layer, side);
                    let range = start..start + bytes;
                    mismatched += u64::from(arrived.get(range.clone()) != self.bytes.get(range));
                }
            }
        }
        mismatched
    }
}

/// Where a plane begins in two tensors, in bytes.
pub(crate) fn plane_offset(shape: &SequenceShape, chunk: usize, layer: u16, side: Side) -> usize {
    let first_row = usize::from(layer) * shape.tokens + chunk * compress::CHUNK_TOKENS;
    let tensor = if side == Side::V { shape.tensor_bytes() } else { 0 };
    tensor + first_row * shape.row_bytes()
}

/// Everything in `region`, copied out.
pub(crate) fn contents(region: &Region, bytes: usize) -> anyhow::Result<Vec<u8>> {
    let mut out = vec![0; bytes];
    region.copy_out(0, &mut out).context("the region is smaller than what was fetched")?;
    Ok(out)
}

/// The shape of what a prefix holds, for writing it to a file.
pub(crate) fn sequence_shape(shape: &client::Shape, tokens: usize) -> SequenceShape {
    let dtype = match shape.dtype {
        client::Dtype::Bf16 => Dtype::Bf16,
        client::Dtype::F16 => Dtype::F16,
    };
    SequenceShape { layers: shape.layers, tokens, kv_heads: shape.kv_heads, head_dim: shape.head_dim, dtype }
}
