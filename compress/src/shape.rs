//! The shape of a chunk, its limits, and the numbering of its planes.

use serde::{Deserialize, Serialize};

use crate::{Codec, Dtype, Quantizer};

/// Tokens of a whole chunk. The last chunk of a sequence may hold fewer, never none.
pub const CHUNK_TOKENS: usize = 256;
/// Most layers of a chunk.
pub const MAX_LAYERS: usize = 512;
/// Most planes of a chunk: K and V of every layer.
pub const MAX_PLANES: usize = 2 * MAX_LAYERS;
/// Largest decoded plane, bytes.
pub const MAX_PLANE_BYTES: usize = 16 << 20;
/// Smallest head dimension that the quantizing codecs take: below it, scales outweigh what codes save.
pub const MIN_QUANTIZED_HEAD_DIM: u16 = 4;
/// Fewest tokens for which the encoder lets a channel of K share a scale; see [`Quantizer::choose`].
const MIN_PER_CHANNEL_TOKENS: u16 = 16;

/// Whether a plane holds keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Keys.
    K,
    /// Values.
    V,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::K => "K",
            Self::V => "V",
        })
    }
}

/// Index of a plane within its chunk: `layer * 2`, plus 1 for V.
#[must_use]
pub fn plane_index(layer: u16, side: Side) -> usize {
    usize::from(layer) * 2 + usize::from(side == Side::V)
}

/// Layer and side of the plane with this index; the inverse of [`plane_index`] for indices below [`MAX_PLANES`].
#[must_use]
pub fn plane_of(index: usize) -> (u16, Side) {
    let layer = u16::try_from(index / 2).unwrap_or(u16::MAX);
    (layer, if index.is_multiple_of(2) { Side::K } else { Side::V })
}

/// Shape of a chunk: `layers` times K and V planes of `[tokens, kv_heads, head_dim]` elements each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Layers, 1 to [`MAX_LAYERS`].
    pub layers: u16,
    /// KV heads of one tensor-parallel rank, at least 1.
    pub kv_heads: u16,
    /// Dimensions of one head, at least 1.
    pub head_dim: u16,
    /// Tokens, 1 to [`CHUNK_TOKENS`].
    pub tokens: u16,
    /// Element type of the planes as they were handed to the encoder.
    pub dtype: Dtype,
}

/// A shape that no chunk may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A dimension is zero.
    #[error("a chunk's {0} is 0: every dimension must be at least 1")]
    Zero(&'static str),
    /// More layers than the format allows.
    #[error("a chunk of {0} layers: the format allows at most {MAX_LAYERS}")]
    Layers(u16),
    /// More tokens than a chunk holds.
    #[error("a chunk of {0} tokens: split the sequence into chunks of at most {CHUNK_TOKENS}")]
    Tokens(u16),
    /// A plane is too large.
    #[error("a plane of {0} bytes: the format allows at most {MAX_PLANE_BYTES}")]
    PlaneBytes(u64),
}

impl Shape {
    /// Checks the shape against the format's limits.
    ///
    /// # Errors
    /// The first limit that the shape breaks.
    pub fn check(&self) -> Result<(), ShapeError> {
        let dimensions = [
            (self.layers, "layer count"),
            (self.kv_heads, "KV head count"),
            (self.head_dim, "head dimension"),
            (self.tokens, "token count"),
        ];
        if let Some((_, name)) = dimensions.into_iter().find(|&(size, _)| size == 0) {
            return Err(ShapeError::Zero(name));
        }
        if usize::from(self.layers) > MAX_LAYERS {
            return Err(ShapeError::Layers(self.layers));
        }
        if usize::from(self.tokens) > CHUNK_TOKENS {
            return Err(ShapeError::Tokens(self.tokens));
        }
        let bytes = u64::from(self.tokens) * u64::from(self.kv_heads) * u64::from(self.head_dim) * 2;
        if bytes > MAX_PLANE_BYTES as u64 {
            return Err(ShapeError::PlaneBytes(bytes));
        }
        Ok(())
    }

    /// Planes of the chunk: two per layer.
    #[must_use]
    pub fn planes(&self) -> usize {
        usize::from(self.layers) * 2
    }

    /// Elements of one plane.
    #[must_use]
    pub fn elements_per_plane(&self) -> usize {
        self.head_rows() * usize::from(self.head_dim)
    }

    /// Bytes of one plane in its own element type, or in any other of 16 bits.
    #[must_use]
    pub fn plane_bytes(&self) -> usize {
        self.elements_per_plane() * Dtype::BYTES
    }

    /// Channels of a plane: dimensions of all heads.
    #[must_use]
    pub fn channels(&self) -> usize {
        usize::from(self.kv_heads) * usize::from(self.head_dim)
    }

    /// Head rows of a plane: runs of `head_dim` elements, one per token and head.
    #[must_use]
    pub fn head_rows(&self) -> usize {
        usize::from(self.tokens) * usize::from(self.kv_heads)
    }
}

impl Quantizer {
    /// The axis this crate's encoder uses (KIVI, arXiv 2402.02750): K has outlier channels, so a channel shares a
    /// scale; V has none, so a token's head does.
    ///
    /// Under 16 tokens, more than a third of an `int4` plane would be per-channel scales and offsets, so K then follows V.
    #[must_use]
    pub fn choose(codec: Codec, shape: &Shape, side: Side) -> Self {
        match (codec, side) {
            (Codec::Raw | Codec::Lossless, _) => Self::None,
            (Codec::CacheGen, _) => Self::PerToken,
            (Codec::Int8 | Codec::Int5 | Codec::Int4 | Codec::Int3, Side::K)
                if shape.tokens >= MIN_PER_CHANNEL_TOKENS =>
            {
                Self::PerChannel
            }
            (Codec::Int8 | Codec::Int5 | Codec::Int4 | Codec::Int3, _) => Self::PerTokenAndHead,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { layers: 32, kv_heads: 8, head_dim: 128, tokens: 256, dtype: Dtype::Bf16 };

    #[test]
    fn sizes_of_a_known_model() {
        assert_eq!(SHAPE.check(), Ok(()));
        assert_eq!((SHAPE.planes(), SHAPE.plane_bytes(), SHAPE.channels()), (64, 512 << 10, 1024));
    }

    #[test]
    fn limits_are_named() {
        assert_eq!(Shape { layers: 0, ..SHAPE }.check(), Err(ShapeError::Zero("layer count")));
        assert_eq!(Shape { layers: 513, ..SHAPE }.check(), Err(ShapeError::Layers(513)));
        assert_eq!(Shape { tokens: 257, ..SHAPE }.check(), Err(ShapeError::Tokens(257)));
        let huge = Shape { kv_heads: u16::MAX, head_dim: u16::MAX, ..SHAPE };
        assert_eq!(huge.check(), Err(ShapeError::PlaneBytes(256 * 65535 * 65535 * 2)));
    }

    #[test]
    fn plane_numbers_go_both_ways() {
        for index in 0..MAX_PLANES {
            let (layer, side) = plane_of(index);
            assert_eq!(plane_index(layer, side), index);
        }
    }
}
