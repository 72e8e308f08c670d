//! The chunks of the store, and what fetching them must give.

use std::collections::HashMap;

use compress::{ChunkHeader, Dtype, Encoder, PlaneCodec, Shape, Side, reference_decode};
use protocol::{ChunkInfo, ChunkSource, Key};

use super::random::Random;

/// The sequence: two whole chunks and a short one.
pub(crate) const CHUNK_TOKENS: [u16; 3] = [256, 256, 100];
const LAYERS: u16 = 2;
const KV_HEADS: u16 = 2;
const HEAD_DIM: u16 = 32;

pub(crate) const SHAPE: client::Shape =
    client::Shape { layers: LAYERS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, dtype: client::Dtype::Bf16 };

/// Bytes of one token in one plane.
const TOKEN_BYTES: usize = KV_HEADS as usize * HEAD_DIM as usize * 2;

/// One sequence in one codec, as the store holds it.
#[derive(Clone)]
pub(crate) struct Library {
    pub(crate) keys: Vec<Key>,
    /// Encoded chunks by handle.
    pub(crate) chunks: Vec<Vec<u8>>,
    pub(crate) index: HashMap<Key, ChunkInfo>,
    /// Decoded planes by chunk and plane.
    pub(crate) planes: Vec<Vec<Vec<u8>>>,
}

fn shape(tokens: u16) -> Shape {
    Shape { layers: LAYERS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, tokens, dtype: Dtype::Bf16 }
}

/// Finite BF16 elements: mostly near one, with outliers.
fn elements(random: &mut Random, bytes: usize) -> Vec<u8> {
    let element = |random: &mut Random| {
        let sign = if random.chance(500) { 0x80 } else { 0 };
        let exponent = if random.chance(20) { 0x41 } else { 0x3f };
        [random.byte(), sign | exponent]
    };
    (0..bytes / 2).flat_map(|_| element(random)).collect()
}

impl Library {
    pub(crate) fn new(codec: PlaneCodec, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut library = Self { keys: vec![], chunks: vec![], index: HashMap::new(), planes: vec![] };
        let mut encoder = Encoder::new(codec, compress::DEFAULT_ZSTD_LEVEL);
        for (handle, &tokens) in (0..).zip(&CHUNK_TOKENS) {
            let shape = shape(tokens);
            let key = Key(std::array::from_fn(|_| random.byte()));
            let raw: Vec<Vec<u8>> =
                (0..shape.planes()).map(|_| elements(&mut random, shape.plane_bytes())).collect();
            let place = |layer: u16, side: Side| usize::from(layer) * 2 + usize::from(side == Side::V);
            let mut bytes = Vec::new();
            encoder.encode_chunk(&key.0, &shape, |layer, side| &raw[place(layer, side)], &mut bytes).unwrap();
            let decode = |layer, side| {
                reference_decode(codec, &shape, layer, side, &raw[place(layer, side)], Dtype::Bf16).unwrap()
            };
            let decoded = (0..LAYERS).flat_map(|layer| [decode(layer, Side::K), decode(layer, Side::V)]);
            library.planes.push(decoded.collect());
            library.index.insert(key, info(&bytes, handle));
            library.keys.push(key);
            library.chunks.push(bytes);
        }
        library
    }

    /// Bytes of the whole sequence, decoded.
    pub(crate) fn decoded_bytes() -> usize {
        usize::from(LAYERS) * 2 * Self::tokens() * TOKEN_BYTES
    }

    pub(crate) fn tokens() -> usize {
        CHUNK_TOKENS.iter().map(|&tokens| usize::from(tokens)).sum()
    }

    /// Where each chunk begins in the sequence, bytes.
    pub(crate) fn chunk_offset(chunk: usize) -> usize {
        CHUNK_TOKENS[..chunk].iter().map(|&tokens| usize::from(tokens) * TOKEN_BYTES).sum()
    }

    /// Where a plane begins in two tensors, K then V, `[layers, tokens, kv_heads, head_dim]` each.
    pub(crate) fn plane_offset(chunk: usize, plane: usize) -> usize {
        let layer_bytes = Self::tokens() * TOKEN_BYTES;
        let (layer, side) = (plane / 2, plane % 2);
        (side * usize::from(LAYERS) + layer) * layer_bytes + Self::chunk_offset(chunk)
    }

    /// The bytes of a chunk that a segment must carry.
    pub(crate) fn range(&self, handle: u32, begin: u64, bytes: usize) -> Option<&[u8]> {
        let begin = usize::try_from(begin).ok()?;
        self.bytes(handle)?.get(begin..begin.checked_add(bytes)?)
    }
}

fn info(bytes: &[u8], handle: u32) -> ChunkInfo {
    let header = ChunkHeader::parse(bytes).unwrap();
    ChunkInfo {
        handle,
        header_bytes: u32::try_from(compress::header_bytes(header.planes.len())).unwrap(),
        chunk_bytes: bytes.len() as u64,
        tokens: header.shape.tokens,
        layers: header.shape.layers,
        kv_heads: header.shape.kv_heads,
        head_dim: header.shape.head_dim,
        dtype: header.shape.dtype.wire(),
        codec: header.planes[0].codec.wire(),
    }
}

impl Library {
    fn bytes(&self, handle: u32) -> Option<&[u8]> {
        self.chunks.get(usize::try_from(handle).ok()?).map(Vec::as_slice)
    }
}

impl ChunkSource for Library {
    fn find(&self, key: &Key) -> Option<ChunkInfo> {
        self.index.get(key).copied()
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        self.bytes(handle).map(|bytes| bytes.len() as u64)
    }
}
