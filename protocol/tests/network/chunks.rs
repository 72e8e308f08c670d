//! Chunks of a made-up format, so that the tests need no codec: what the engine is given as a layout.

use std::collections::HashMap;

use protocol::chunk::BadHeader;
use protocol::{ChunkInfo, ChunkLayout, ChunkShape, ChunkSource, Key, PlaneRange, PlaneRanges};

use super::random::Random;

/// FNV-1a: enough to tell damaged bytes from intact ones.
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

pub const PLANE_ENTRY_BYTES: usize = 20;

/// One encoded chunk: key, plane count, per plane offset, bytes and checksum, header checksum, planes.
#[derive(Clone)]
pub struct Chunk {
    pub info: ChunkInfo,
    pub bytes: Vec<u8>,
}

pub fn header_bytes(planes: usize) -> usize {
    32 + 4 + planes * PLANE_ENTRY_BYTES + 8
}

impl Chunk {
    pub fn new(key: &Key, shape: &ChunkShape, max_plane_bytes: u32, random: &mut Random) -> Chunk {
        let planes = shape.planes() as usize;
        let header = header_bytes(planes);
        let mut table = Vec::new();
        let mut body = Vec::new();
        for _ in 0..planes {
            let bytes = random.between(1, u64::from(max_plane_bytes)) as usize;
            let gap = random.below(64) as usize;
            body.resize(body.len() + gap, 0);
            let start = header + body.len();
            let plane: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
            table.extend_from_slice(&(start as u64).to_le_bytes());
            table.extend_from_slice(&(bytes as u32).to_le_bytes());
            table.extend_from_slice(&checksum(&plane).to_le_bytes());
            body.extend_from_slice(&plane);
        }
        let mut bytes = key.0.to_vec();
        bytes.extend_from_slice(&(planes as u32).to_le_bytes());
        bytes.extend_from_slice(&table);
        bytes.extend_from_slice(&checksum(&bytes).to_le_bytes());
        assert_eq!(bytes.len(), header);
        bytes.extend_from_slice(&body);
        let info = ChunkInfo {
            handle: 0,
            header_bytes: header as u32,
            chunk_bytes: bytes.len() as u64,
            tokens: 256,
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype: shape.dtype,
            codec: 1,
        };
        Chunk { info, bytes }
    }

    pub fn plane(&self, plane: usize) -> &[u8] {
        let entry = &self.bytes[36 + plane * PLANE_ENTRY_BYTES..][..PLANE_ENTRY_BYTES];
        let offset = u64::from_le_bytes(entry[0..8].try_into().unwrap()) as usize;
        let bytes = u32::from_le_bytes(entry[8..12].try_into().unwrap()) as usize;
        &self.bytes[offset..offset + bytes]
    }
}

pub struct Layout;

impl ChunkLayout for Layout {
    fn planes(
        &self,
        key: &Key,
        header: &[u8],
        info: &ChunkInfo,
        out: &mut PlaneRanges,
    ) -> Result<(), BadHeader> {
        let (fields, sum) = header.split_at_checked(header.len().wrapping_sub(8)).ok_or(BadHeader)?;
        if sum != checksum(fields).to_le_bytes()
            || fields[0..32] != key.0
            || info.header_bytes as usize != header.len()
        {
            return Err(BadHeader);
        }
        for entry in fields[36..].chunks_exact(PLANE_ENTRY_BYTES) {
            let offset = u64::from_le_bytes(entry[0..8].try_into().unwrap());
            let bytes = u32::from_le_bytes(entry[8..12].try_into().unwrap());
            out.push(PlaneRange { offset, bytes }).map_err(|_| BadHeader)?;
        }
        Ok(())
    }
}

/// What a store holds. Handles are positions, shuffled anew at every restart.
#[derive(Default)]
pub struct Library {
    by_key: HashMap<Key, u32>,
    chunks: Vec<(Key, Chunk)>,
}

impl Library {
    pub fn insert(&mut self, key: Key, mut chunk: Chunk) {
        let handle = self.chunks.len() as u32;
        chunk.info.handle = handle;
        self.by_key.insert(key, handle);
        self.chunks.push((key, chunk));
    }

    pub fn remove(&mut self, key: &Key) {
        self.by_key.remove(key);
    }

    pub fn get(&self, key: &Key) -> Option<&Chunk> {
        self.by_key.get(key).map(|handle| &self.chunks[*handle as usize].1)
    }

    pub fn shuffle(&mut self, random: &mut Random) {
        for i in (1..self.chunks.len()).rev() {
            self.chunks.swap(i, random.below(i as u64 + 1) as usize);
        }
        for (handle, (key, chunk)) in self.chunks.iter_mut().enumerate() {
            chunk.info.handle = handle as u32;
            if let Some(known) = self.by_key.get_mut(key) {
                *known = handle as u32;
            }
        }
    }
}

impl Library {
    pub fn bytes(&self, handle: u32) -> Option<&[u8]> {
        let (key, chunk) = self.chunks.get(handle as usize)?;
        self.by_key.contains_key(key).then_some(&chunk.bytes)
    }
}

impl ChunkSource for Library {
    fn find(&self, key: &Key) -> Option<ChunkInfo> {
        self.get(key).map(|chunk| chunk.info)
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        self.bytes(handle).map(|bytes| bytes.len() as u64)
    }
}
