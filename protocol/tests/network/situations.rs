//! What tests of named situations begin with.

use std::time::Duration;

use protocol::{ChunkShape, FetchConfig, Key, ServeConfig};

use super::World;
use super::chunks::Chunk;

pub const SECOND: u64 = 1_000_000_000;

pub fn config() -> FetchConfig {
    FetchConfig {
        max_fetches: 8,
        max_lookups: 4,
        max_chunks_per_fetch: 128,
        active_chunks: 8,
        active_planes: 8,
        max_planes_per_chunk: 16,
        max_plane_bytes: 4096,
        max_header_bytes: 1024,
        segment_bytes: 256,
        window_segments: 64,
        memory_segments: 96,
        rto_min: Duration::from_micros(300),
        rto_max: Duration::from_millis(20),
        ..FetchConfig::default()
    }
}

pub fn serve() -> ServeConfig {
    ServeConfig { max_pending_pulls: 64, max_pending_replies: 16, ..ServeConfig::default() }
}

pub const SHAPE: ChunkShape = ChunkShape { layers: 4, kv_heads: 2, head_dim: 8, dtype: 1 };

pub fn key(number: u64) -> Key {
    let mut key = Key([0xab; 32]);
    key.0[..8].copy_from_slice(&number.to_le_bytes());
    key
}

/// Fills the stores with chunks `first..first + count`, each where it is placed.
pub fn fill_placed(world: &mut World, first: u64, count: u64, shape: &ChunkShape) -> Vec<Key> {
    let keys: Vec<Key> = (first..first + count).map(key).collect();
    let max = world.engine(0).config().max_plane_bytes;
    let placement = world.engine(0).placement().clone();
    for key in &keys {
        let chunk = Chunk::new(key, shape, max, &mut world.random);
        for store in placement.candidates(key).as_slice() {
            world.stores[usize::from(store.0)].library.insert(*key, chunk.clone());
        }
    }
    keys
}
