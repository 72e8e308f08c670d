//! Chunks of a made-up format: what stores hold, and what the engine is given as layout.
//!
//! A chunk's header is real: key, count of planes, offset and bytes of each, checksum. Its planes' bytes are a
//! function of chunk and offset, so that nobody has to keep them.

use std::rc::Rc;

use protocol::chunk::BadHeader;
use protocol::{ChunkInfo, ChunkLayout, ChunkShape, ChunkSource, Key, PlaneRange, PlaneRanges};

use crate::packet::{Packet, Source};
use crate::random::{Random, mix};

const ENTRY_BYTES: usize = 12;
const FIELDS_BYTES: usize = 36;

/// What a chunk holds.
#[derive(Debug)]
pub struct Chunk {
    /// Its key.
    pub key: Key,
    /// What a store says of it, but for the handle.
    pub info: ChunkInfo,
    /// Header.
    pub header: Vec<u8>,
    /// Where its planes lie.
    pub planes: Vec<PlaneRange>,
}

/// All chunks of a run, by number.
#[derive(Debug)]
pub struct Catalogue {
    /// The shape of all.
    pub shape: ChunkShape,
    /// The chunks.
    pub chunks: Vec<Chunk>,
}

/// The key of a chunk by number.
pub fn key_of(chunk: u32) -> Key {
    let mut key = Key([0xab; 32]);
    key.0[..4].copy_from_slice(&chunk.to_le_bytes());
    key.0[4..12].copy_from_slice(&mix(u64::from(chunk)).to_le_bytes());
    key
}

/// The chunk that a key names.
pub fn number_of(key: &Key) -> Option<u32> {
    let number = u32::from_le_bytes(key.0[..4].try_into().ok()?);
    (key_of(number) == *key).then_some(number)
}

/// The byte of a chunk at an offset behind its header.
#[inline]
pub fn byte_at(chunk: u32, offset: u64) -> u8 {
    let word = mix((u64::from(chunk) << 40) ^ (offset / 8) ^ 0x5eed);
    word.to_le_bytes()[(offset % 8) as usize & 7]
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

impl Chunk {
    fn new(number: u32, shape: &ChunkShape, plane_bytes: (u32, u32), random: &mut Random) -> Chunk {
        let planes = shape.planes();
        let header_bytes = FIELDS_BYTES + planes as usize * ENTRY_BYTES + 8;
        let mut offset = header_bytes as u64;
        let key = key_of(number);
        let mut header = key.0.to_vec();
        header.extend_from_slice(&planes.to_le_bytes());
        let mut ranges = Vec::new();
        for _ in 0..planes {
            let (least, most) = plane_bytes;
            let bytes = least + u32::try_from(random.below(u64::from(most - least) + 1)).unwrap_or(0);
            if least != most {
                offset += random.below(64);
            }
            ranges.push(PlaneRange { offset, bytes });
            header.extend_from_slice(&offset.to_le_bytes());
            header.extend_from_slice(&bytes.to_le_bytes());
            offset += u64::from(bytes);
        }
        header.extend_from_slice(&checksum(&header).to_le_bytes());
        let info = ChunkInfo {
            handle: 0,
            header_bytes: u32::try_from(header_bytes).expect("a header is short"),
            chunk_bytes: offset,
            tokens: 256,
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype: shape.dtype,
            codec: 1,
        };
        Chunk { key, info, header, planes: ranges }
    }

    /// Bytes of all planes.
    pub fn payload_bytes(&self) -> u64 {
        self.planes.iter().map(|plane| u64::from(plane.bytes)).sum()
    }
}

impl Catalogue {
    /// `count` chunks whose planes have between `plane_bytes.0` and `plane_bytes.1` bytes.
    pub fn new(count: u32, layers: u16, plane_bytes: (u32, u32), random: &mut Random) -> Rc<Catalogue> {
        let shape = ChunkShape { layers, kv_heads: 8, head_dim: 128, dtype: 1 };
        let chunks: Vec<Chunk> =
            (0..count).map(|number| Chunk::new(number, &shape, plane_bytes, random)).collect();
        Rc::new(Catalogue { shape, chunks })
    }

    /// The byte of a chunk at an offset.
    fn byte_of(&self, chunk: u32, offset: u64) -> u8 {
        let header = &self.chunks[chunk as usize].header;
        let in_header = usize::try_from(offset).ok().and_then(|offset| header.get(offset));
        in_header.copied().unwrap_or_else(|| byte_at(chunk, offset))
    }

    /// Puts bytes of a chunk behind the message that a packet holds: named, or written out where they are all of its header or
    /// `materialize` says so.
    pub fn fill(&self, packet: &mut Packet, chunk: u32, range: std::ops::Range<usize>, materialize: bool) {
        packet.payload_bytes = u32::try_from(range.len()).expect("a segment is short");
        packet.source = Source { chunk, offset: range.start as u64 };
        if let Some(bytes) = self.chunks[chunk as usize].header.get(range.clone()) {
            packet.bytes.extend_from_slice(bytes);
        } else if materialize {
            packet.bytes.extend(range.map(|offset| self.byte_of(chunk, offset as u64)));
        } else {
            packet.tail_bytes = packet.payload_bytes;
        }
    }

    /// Whether the bytes that arrived are not those that were stored.
    pub fn is_damaged(&self, packet: &Packet, data: &[u8]) -> bool {
        if packet.tail_bytes > 0 {
            return packet.damaged;
        }
        let Source { chunk, offset } = packet.source;
        !(offset..).zip(data).all(|(at, byte)| *byte == self.byte_of(chunk, at))
    }

    /// Encoded bytes of the planes of some chunks.
    pub fn payload_bytes(&self, chunks: std::ops::Range<u32>) -> u64 {
        chunks.filter_map(|number| self.chunks.get(number as usize)).map(Chunk::payload_bytes).sum()
    }
}

/// Reads the headers.
#[derive(Clone, Copy, Debug)]
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
        let is_intact = sum == checksum(fields).to_le_bytes();
        if !is_intact || fields[..32] != key.0 || info.header_bytes as usize != header.len() {
            return Err(BadHeader);
        }
        for entry in fields[FIELDS_BYTES..].chunks_exact(ENTRY_BYTES) {
            let offset = u64::from_le_bytes(entry[0..8].try_into().map_err(|_| BadHeader)?);
            let bytes = u32::from_le_bytes(entry[8..12].try_into().map_err(|_| BadHeader)?);
            out.push(PlaneRange { offset, bytes }).map_err(|_| BadHeader)?;
        }
        Ok(())
    }
}

/// What one store holds: a part of the run's chunks, under handles that change with every restart.
#[derive(Debug)]
pub struct Shelf {
    catalogue: Rc<Catalogue>,
    held: Vec<bool>,
    /// Handles are numbers turned by this: `handle = (number + turn) % count`.
    turn: u32,
}

impl Shelf {
    /// Holds the chunks for which `held` is true.
    pub fn new(catalogue: Rc<Catalogue>, held: Vec<bool>) -> Shelf {
        assert_eq!(held.len(), catalogue.chunks.len());
        Shelf { catalogue, held, turn: 0 }
    }

    fn count(&self) -> u32 {
        u32::try_from(self.held.len()).expect("chunks are numbered in 32 bits")
    }

    /// Gives every chunk another handle.
    pub fn renumber(&mut self, random: &mut Random) {
        self.turn = u32::try_from(random.below(u64::from(self.count()))).unwrap_or(0);
    }

    /// Has a chunk from now on.
    pub fn put(&mut self, chunk: u32) {
        self.held[chunk as usize] = true;
    }

    /// What there is.
    pub fn catalogue(&self) -> &Rc<Catalogue> {
        &self.catalogue
    }

    /// Forgets a chunk.
    pub fn forget(&mut self, chunk: u32) {
        if let Some(held) = self.held.get_mut(chunk as usize) {
            *held = false;
        }
    }

    /// The chunk that a handle names, if it is held.
    pub fn number_at(&self, handle: u32) -> Option<u32> {
        let count = self.count();
        if handle >= count {
            return None;
        }
        let number = (handle + count - self.turn) % count;
        self.held[number as usize].then_some(number)
    }
}

impl ChunkSource for Shelf {
    fn find(&self, key: &Key) -> Option<ChunkInfo> {
        let number = number_of(key)?;
        if !*self.held.get(number as usize)? {
            return None;
        }
        let handle = (number + self.turn) % self.count();
        Some(ChunkInfo { handle, ..self.catalogue.chunks[number as usize].info })
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        let number = self.number_at(handle)?;
        Some(self.catalogue.chunks[number as usize].info.chunk_bytes)
    }
}
