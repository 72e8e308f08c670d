//! What the engines know of a chunk: its numbers, and where its planes lie. The format itself belongs to
//! whoever implements [`ChunkLayout`].

use crate::key::Key;

/// What a store says of a chunk that it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkInfo {
    /// The store's name for the chunk, valid within one epoch.
    pub handle: u32,
    /// Bytes of the chunk header with its plane table, at the chunk's start.
    pub header_bytes: u32,
    /// Bytes of the whole encoded chunk.
    pub chunk_bytes: u64,
    /// Tokens, 1 to 256.
    pub tokens: u16,
    /// Layers.
    pub layers: u16,
    /// KV heads of this tensor-parallel rank.
    pub kv_heads: u16,
    /// Elements per head.
    pub head_dim: u16,
    /// Element type before encoding, as numbered in docs/FORMAT.md.
    pub dtype: u8,
    /// Codec, as numbered in docs/FORMAT.md.
    pub codec: u8,
}

/// The shape that the fetching client expects of every chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkShape {
    /// Layers.
    pub layers: u16,
    /// KV heads of this tensor-parallel rank.
    pub kv_heads: u16,
    /// Elements per head.
    pub head_dim: u16,
    /// Element type before encoding, as numbered in docs/FORMAT.md.
    pub dtype: u8,
}

impl ChunkShape {
    /// Planes of a chunk: K and V of each layer. Plane index = layer * 2 + (0 for K, 1 for V).
    pub fn planes(&self) -> u32 {
        u32::from(self.layers) * 2
    }

    /// Whether a stored chunk has this shape.
    pub fn matches(&self, info: &ChunkInfo) -> bool {
        (self.layers, self.kv_heads, self.head_dim, self.dtype)
            == (info.layers, info.kv_heads, info.head_dim, info.dtype)
    }
}

/// Where a plane's encoded bytes lie within its chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlaneRange {
    /// Bytes from the chunk's start.
    pub offset: u64,
    /// Encoded bytes, at least 1.
    pub bytes: u32,
}

/// The plane table of one chunk, of fixed capacity.
#[derive(Clone, Debug)]
pub struct PlaneRanges {
    ranges: Box<[PlaneRange]>,
    len: usize,
}

impl PlaneRanges {
    /// An empty table with room for `capacity` planes.
    pub fn new(capacity: usize) -> PlaneRanges {
        PlaneRanges { ranges: vec![PlaneRange::default(); capacity].into_boxed_slice(), len: 0 }
    }

    /// Appends the next plane; gives it back if the table is full.
    pub fn push(&mut self, range: PlaneRange) -> Result<(), PlaneRange> {
        let slot = self.ranges.get_mut(self.len).ok_or(range)?;
        *slot = range;
        self.len += 1;
        Ok(())
    }

    /// Forgets all planes.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// The planes in plane order.
    pub fn as_slice(&self) -> &[PlaneRange] {
        &self.ranges[..self.len]
    }

    /// Planes that fit.
    pub fn capacity(&self) -> usize {
        self.ranges.len()
    }
}

/// A chunk header that cannot be used: the chunk fails with [`crate::ChunkFailure::BadHeader`] once it has
/// been pulled again as often as the configuration allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the chunk header is damaged, of another version, or does not belong to the key asked for")]
pub struct BadHeader;

/// Knows the format of a chunk header, which this crate does not.
pub trait ChunkLayout {
    /// Checks that `header` is intact and belongs to `key` and `info`, and appends the range of every plane,
    /// in plane order, to `out` (empty on entry). The engine checks the ranges against the chunk's size.
    fn planes(
        &self,
        key: &Key,
        header: &[u8],
        info: &ChunkInfo,
        out: &mut PlaneRanges,
    ) -> Result<(), BadHeader>;
}
