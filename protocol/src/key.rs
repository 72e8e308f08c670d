//! How chunks are named: a BLAKE3 chain over the namespace, the parent's key and the token ids.
//!
//! Equal keys mean equal bytes: everything that changes a chunk's content (model, layout, codec,
//! tensor-parallel rank) is hashed into the chain's root, and each key covers all tokens before it.

use std::fmt;

/// Tokens of a chunk; the last chunk of a sequence may hold fewer, at least one.
pub const CHUNK_TOKENS: usize = 256;

const ROOT_CONTEXT: &str = "shadowserve chunk key root, version 1";
const CHUNK_CONTEXT: &str = "shadowserve chunk key, version 1";

/// 32 bytes naming a chunk.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub [u8; 32]);

impl Key {
    /// Bytes of a key.
    pub const BYTES: usize = 32;
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

/// What a family of keys stands for. Two namespaces that differ in any field share no key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Namespace {
    /// The model and its revision, as in `meta-llama/Llama-3.1-8B@<commit>`.
    pub model: String,
    /// How KV is laid out and typed before encoding, as in `bf16:32x8x128`.
    pub layout: String,
    /// Name of the codec, as in `int4`.
    pub codec: String,
    /// Tensor-parallel rank, from 0.
    pub rank: u32,
    /// Separates tenants or experiments that must not see each other's chunks; may be empty.
    pub salt: String,
}

impl Namespace {
    /// The chain's root: parent of every sequence's first chunk.
    ///
    /// BLAKE3 in `derive_key` mode over model, layout, codec, rank, salt; each string preceded by its
    /// length as u64, the rank as u32, all little-endian, so that no two namespaces encode alike.
    pub fn root(&self) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        let mut text = |field: &str| {
            hasher.update(&(field.len() as u64).to_le_bytes());
            hasher.update(field.as_bytes());
        };
        text(&self.model);
        text(&self.layout);
        text(&self.codec);
        hasher.update(&self.rank.to_le_bytes());
        hasher.update(&(self.salt.len() as u64).to_le_bytes());
        hasher.update(self.salt.as_bytes());
        Key(*hasher.finalize().as_bytes())
    }
}

/// The keys of a token sequence, one per chunk, without allocating.
#[derive(Clone)]
pub struct ChunkKeys<'a> {
    blank: blake3::Hasher,
    parent: Key,
    chunks: std::slice::Chunks<'a, i32>,
}

impl<'a> ChunkKeys<'a> {
    /// Keys of `tokens` under the namespace whose [`Namespace::root`] is `root`; pass the key of an earlier
    /// chunk as `root` to continue a sequence after it.
    pub fn new(root: Key, tokens: &'a [i32]) -> ChunkKeys<'a> {
        let blank = blake3::Hasher::new_derive_key(CHUNK_CONTEXT);
        ChunkKeys { blank, parent: root, chunks: tokens.chunks(CHUNK_TOKENS) }
    }
}

impl Iterator for ChunkKeys<'_> {
    type Item = Key;

    fn next(&mut self) -> Option<Key> {
        let tokens = self.chunks.next()?;
        let mut bytes = [0_u8; CHUNK_TOKENS * 4];
        for (slot, token) in bytes.chunks_exact_mut(4).zip(tokens) {
            slot.copy_from_slice(&token.to_le_bytes());
        }
        let count = u32::try_from(tokens.len()).expect("a chunk has at most 256 tokens");
        let mut hasher = self.blank.clone();
        hasher.update(&self.parent.0).update(&count.to_le_bytes()).update(&bytes[..tokens.len() * 4]);
        self.parent = Key(*hasher.finalize().as_bytes());
        Some(self.parent)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.chunks.size_hint()
    }
}

impl ExactSizeIterator for ChunkKeys<'_> {}

/// The keys of `tokens`, one per 256 tokens; the last may cover fewer. No tokens, no keys.
pub fn chain(namespace: &Namespace, tokens: &[i32]) -> Vec<Key> {
    ChunkKeys::new(namespace.root(), tokens).collect()
}
