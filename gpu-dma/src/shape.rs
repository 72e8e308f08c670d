//! How large a decoded chunk is.

/// Bytes in an element of a decoded plane: bf16 or f16.
pub const ELEMENT_BYTES: u64 = 2;

/// The extents of a decoded chunk: `layers` times a K plane and a V plane, each `[tokens, kv_heads, head_dim]`, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkShape {
    /// Layers of the model.
    pub layers: u16,
    /// Tokens in this chunk: 256, or fewer in the last one of a sequence.
    pub tokens: u16,
    /// KV heads of this tensor-parallel rank.
    pub kv_heads: u16,
    /// Elements in a head's vector.
    pub head_dim: u16,
}

impl ChunkShape {
    /// Planes in the chunk: K and V of each layer. The index of a plane is `layer * 2`, plus 1 for V.
    #[must_use]
    pub fn planes(&self) -> u32 {
        u32::from(self.layers) * 2
    }

    /// Bytes of one head's vector: the shortest run that every layout keeps together.
    #[must_use]
    pub fn head_bytes(&self) -> u64 {
        u64::from(self.head_dim) * ELEMENT_BYTES
    }

    /// Bytes of all heads of one token, as decoded.
    #[must_use]
    pub fn token_bytes(&self) -> u64 {
        u64::from(self.kv_heads) * self.head_bytes()
    }

    /// Bytes of one decoded plane.
    #[must_use]
    pub fn plane_bytes(&self) -> u64 {
        u64::from(self.tokens) * self.token_bytes()
    }

    /// Whether any extent is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        [self.layers, self.tokens, self.kv_heads, self.head_dim].contains(&0)
    }
}
