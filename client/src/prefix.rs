//! What a lookup found.

use control::{Codec, Shape};
use protocol::key::Key;

/// One stored chunk of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixChunk {
    /// Its name.
    pub key: Key,
    /// Tokens that it holds: 256, fewer only in a sequence's last chunk.
    pub tokens: u16,
}

/// The longest prefix of a token sequence that is stored, chunk by chunk. May be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    /// The stored chunks, from the sequence's start.
    pub chunks: Vec<PrefixChunk>,
    /// Tokens in these chunks.
    pub tokens: u32,
    /// Chunks that the sequence asked for has.
    pub asked_chunks: u32,
    /// What the link will carry for these chunks, bytes.
    pub encoded_bytes: u64,
    /// What the chunks have in common; `None` if there are none.
    pub shape: Option<Shape>,
    /// How they are encoded; `None` if there are none.
    pub codec: Option<Codec>,
}

impl Prefix {
    /// Whether nothing is stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Whether all of the sequence is stored.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        u32::try_from(self.chunks.len()) == Ok(self.asked_chunks)
    }

    /// The region that [`crate::FetchRequest::sequence`] needs, bytes: all planes, decoded. `None` if the
    /// prefix is empty.
    #[must_use]
    pub fn sequence_bytes(&self) -> Option<usize> {
        let shape = self.shape?;
        let bytes = u64::from(self.tokens).checked_mul(shape.token_bytes())?;
        usize::try_from(bytes.checked_mul(u64::from(shape.planes()))?).ok()
    }
}
