//! Where the bytes of a fetched chunk go in a region, as strides.

use serde::{Deserialize, Serialize};

/// The type of one element of a decoded plane. Both are 16 bits wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE 754 half precision.
    F16,
}

impl Dtype {
    /// Bytes of one element: 2 for every type there is.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// What is the same for every chunk of a model on one tensor-parallel rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Transformer layers; a chunk has `2 * layers` planes.
    pub layers: u16,
    /// Key/value heads on this rank.
    pub kv_heads: u16,
    /// Elements of one head of one token.
    pub head_dim: u16,
    /// Element type as stored.
    pub dtype: Dtype,
}

impl Shape {
    /// Planes of one chunk: K and V of every layer.
    #[must_use]
    pub const fn planes(&self) -> u32 {
        self.layers as u32 * 2
    }

    /// Bytes of one head of one token: the piece that is always contiguous.
    #[must_use]
    pub const fn head_bytes(&self) -> u64 {
        self.head_dim as u64 * self.dtype.bytes()
    }

    /// Bytes of one token in one plane.
    #[must_use]
    pub const fn token_bytes(&self) -> u64 {
        self.kv_heads as u64 * self.head_bytes()
    }

    /// Decoded bytes of one plane that holds `tokens` tokens.
    #[must_use]
    pub const fn plane_bytes(&self, tokens: u16) -> u64 {
        tokens as u64 * self.token_bytes()
    }

    /// Decoded bytes of one chunk that holds `tokens` tokens. Cannot overflow: at most 2^16 * 2 * 2^49.
    #[must_use]
    pub const fn chunk_bytes(&self, tokens: u16) -> u64 {
        self.planes() as u64 * self.plane_bytes(tokens)
    }

    /// Whether no dimension is zero.
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.layers != 0 && self.kv_heads != 0 && self.head_dim != 0
    }
}

/// Strides in bytes. Element `d` of head `h` of token `t` of side `s` (0 = K, 1 = V) of layer `l` of a chunk
/// placed at `offset` lies at `offset + l*layer + s*side + t*token + h*head + 2*d`: one head of one token is
/// always contiguous, everything else is the caller's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// From a layer to the next.
    pub layer: u64,
    /// From K to V of the same layer.
    pub side: u64,
    /// From a token to the next.
    pub token: u64,
    /// From a head to the next.
    pub head: u64,
}

/// Why a layout cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The shape has a dimension of zero.
    #[error("the shape {shape:?} has a dimension of zero: take the shape that the lookup returned")]
    EmptyShape {
        /// The shape as given.
        shape: Shape,
    },
    /// Two elements would land on the same bytes.
    #[error(
        "the {name} stride of {stride} bytes is less than the {needed} bytes that lie inside it, so elements \
         would overwrite each other: make it at least {needed}"
    )]
    Overlap {
        /// Which stride: layer, side, token or head.
        name: &'static str,
        /// The stride as given, bytes.
        stride: u64,
        /// The least stride that does not overlap, bytes.
        needed: u64,
    },
    /// A stride is no multiple of the element size.
    #[error("the {name} stride of {stride} bytes is odd, but an element has 2 bytes: make it even")]
    Odd {
        /// Which stride.
        name: &'static str,
        /// The stride as given, bytes.
        stride: u64,
    },
    /// The strides reach beyond what 64 bits can address.
    #[error("the strides reach beyond 2^64 bytes: they are bytes, not elements or pages")]
    Overflow,
}

impl Layout {
    /// A chunk on its own: `[layers, 2, tokens, kv_heads, head_dim]`, without gaps. `tokens` is the room kept
    /// for each plane, usually [`crate::CHUNK_TOKENS`], and must be at least what the chunk holds.
    #[must_use]
    pub const fn chunked(shape: &Shape, tokens: u16) -> Self {
        let side = shape.plane_bytes(tokens);
        Self { layer: 2 * side, side, token: shape.token_bytes(), head: shape.head_bytes() }
    }

    /// A whole sequence of `tokens` tokens as two tensors, all of K and then all of V, each
    /// `[layers, tokens, kv_heads, head_dim]`. The chunk that starts at token `t` goes to offset
    /// `t * shape.token_bytes()`.
    #[must_use]
    pub const fn sequence(shape: &Shape, tokens: u32) -> Self {
        let layer = shape.token_bytes().saturating_mul(tokens as u64);
        let side = layer.saturating_mul(shape.layers as u64);
        Self { layer, side, token: shape.token_bytes(), head: shape.head_bytes() }
    }

    /// Bytes from the first byte of a chunk of `tokens` tokens to one past its last.
    ///
    /// # Errors
    /// When the strides make elements overlap, split an element, or overflow.
    pub fn extent_bytes(&self, shape: &Shape, tokens: u16) -> Result<u64, LayoutError> {
        if !shape.is_valid() {
            return Err(LayoutError::EmptyShape { shape: *shape });
        }
        let axes = [
            ("layer", self.layer, u64::from(shape.layers)),
            ("side", self.side, 2),
            ("token", self.token, u64::from(tokens)),
            ("head", self.head, u64::from(shape.kv_heads)),
        ];
        nested_span(shape.head_bytes(), shape.dtype.bytes(), axes)
    }

    /// Offset of the plane `plane` (`2 * layer + side`) from the start of its chunk, in bytes.
    /// Wraps on overflow; a layout that [`Layout::extent_bytes`] accepts never overflows.
    #[must_use]
    pub const fn plane_offset(&self, plane: u32) -> u64 {
        let (layer, side) = ((plane / 2) as u64, (plane % 2) as u64);
        layer.wrapping_mul(self.layer).wrapping_add(side.wrapping_mul(self.side))
    }
}

/// Bytes from the first to the last of what axes (name, stride in bytes, count) span around a run of `run_bytes`.
pub(crate) fn nested_span<const AXES: usize>(
    run_bytes: u64,
    element_bytes: u64,
    mut axes: [(&'static str, u64, u64); AXES],
) -> Result<u64, LayoutError> {
    axes.sort_by_key(|&(_, stride, _)| stride);
    // From the innermost axis outwards: a stride must clear everything that the smaller ones span.
    let mut span = run_bytes;
    for (name, stride, count) in axes {
        if count <= 1 {
            continue;
        }
        if stride < span {
            return Err(LayoutError::Overlap { name, stride, needed: span });
        }
        if stride % element_bytes != 0 {
            return Err(LayoutError::Odd { name, stride });
        }
        span = (count - 1)
            .checked_mul(stride)
            .and_then(|last| last.checked_add(span))
            .ok_or(LayoutError::Overflow)?;
    }
    Ok(span)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const LLAMA: Shape = Shape { layers: 32, kv_heads: 8, head_dim: 128, dtype: Dtype::Bf16 };

    #[test]
    fn sizes_of_llama() {
        assert_eq!(LLAMA.planes(), 64);
        assert_eq!(LLAMA.plane_bytes(256), 512 * 1024);
        assert_eq!(Layout::chunked(&LLAMA, 256).extent_bytes(&LLAMA, 256), Ok(LLAMA.chunk_bytes(256)));
        let sequence = Layout::sequence(&LLAMA, 1000);
        assert_eq!(sequence.extent_bytes(&LLAMA, 1).unwrap() + 999 * LLAMA.token_bytes(), 1000 * 64 * 2048);
        assert_eq!(Layout::chunked(&LLAMA, 256).plane_offset(5), 5 * 512 * 1024);
    }

    #[test]
    fn bad_strides_are_named() {
        let good = Layout::chunked(&LLAMA, 256);
        let error = Layout { token: 0, ..good }.extent_bytes(&LLAMA, 256).unwrap_err();
        assert!(error.to_string().contains("token stride of 0 bytes"), "{error}");
        let error = Layout { head: 257, ..good }.extent_bytes(&LLAMA, 256).unwrap_err();
        assert_eq!(error, LayoutError::Odd { name: "head", stride: 257 });
        let error = Layout { layer: u64::MAX - 1, ..good }.extent_bytes(&LLAMA, 256).unwrap_err();
        assert_eq!(error, LayoutError::Overflow);
        let error = good.extent_bytes(&Shape { layers: 0, ..LLAMA }, 256).unwrap_err();
        assert!(matches!(error, LayoutError::EmptyShape { .. }));
    }

    proptest! {
        /// The obvious twin marks every byte: an accepted layout writes each byte once and inside its extent.
        #[test]
        fn accepted_layouts_never_overlap(
            layers in 1u16..4, kv_heads in 1u16..4, head_dim in 1u16..4, tokens in 1u16..5,
            strides in prop::array::uniform4(0u64..200),
        ) {
            let shape = Shape { layers, kv_heads, head_dim, dtype: Dtype::F16 };
            let [layer, side, token, head] = strides;
            let layout = Layout { layer, side, token, head };
            let Ok(extent) = layout.extent_bytes(&shape, tokens) else { return Ok(()) };
            let mut seen = HashSet::new();
            for plane in 0..shape.planes() {
                for t in 0..u64::from(tokens) {
                    for h in 0..u64::from(kv_heads) {
                        for b in 0..shape.head_bytes() {
                            let at = layout.plane_offset(plane) + t * token + h * head + b;
                            prop_assert!(at < extent);
                            prop_assert!(seen.insert(at));
                        }
                    }
                }
            }
            prop_assert!(seen.contains(&(extent - 1)), "the extent is tight");
        }
    }
}
