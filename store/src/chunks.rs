//! The chunks that a store holds, as its serving lcores see them: an index from key to chunk that is read without a lock.
//!
//! One thread changes it, the [`crate::keeper`]; lcores look keys up, load chunks by handle, and note which were asked for. A
//! chunk that was loaded stays readable until it is let go, whatever the keeper does meanwhile; an lcore lets go at the end of
//! each turn, so that an evicted chunk's memory is free again some microseconds later.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use arc_swap::ArcSwapOption;
use crossbeam_queue::ArrayQueue;
use foldhash::fast::RandomState;
use hugepages::Block;
use protocol::{ChunkInfo, ChunkSource, Key};

/// Bits of a handle that are an index; the others count its uses.
const INDEX_BITS: u32 = 20;
/// Chunks that one store can hold.
pub const MAX_CHUNKS: usize = 1 << INDEX_BITS;
/// Touched chunks noted between two looks of the keeper; more are not noted.
const TOUCHES: usize = 4096;

/// The index that a handle names.
pub(crate) fn index_of(handle: u32) -> usize {
    (handle % (1 << INDEX_BITS)) as usize
}

/// The handle of an index in its `use_count`th use.
pub(crate) fn handle_of(index: u32, use_count: u32) -> u32 {
    use_count << INDEX_BITS | index
}

/// A stored chunk. Nobody writes to it any more.
#[derive(Debug)]
pub struct Chunk {
    /// Its name.
    pub key: Key,
    /// What lookups are told.
    pub info: ChunkInfo,
    /// Whether it is never evicted.
    pub pinned: bool,
    block: Block,
}

impl Chunk {
    pub(crate) fn new(key: Key, info: ChunkInfo, pinned: bool, block: Block) -> Chunk {
        Chunk { key, info, pinned, block }
    }

    /// Its encoded bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.block.as_slice()
    }
}

/// For packets that are sent from where the chunk lies.
impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

#[derive(Default)]
struct Place {
    chunk: ArcSwapOption<Chunk>,
    /// Whether its handle stands in `touched`.
    touched: AtomicBool,
}

/// The chunks of a store, shared by its threads.
pub struct Chunks {
    by_key: papaya::HashMap<Key, ChunkInfo, RandomState>,
    places: Box<[Place]>,
    touched: ArrayQueue<u32>,
}

impl Chunks {
    /// An empty index with room for `capacity` chunks, at most [`MAX_CHUNKS`].
    #[must_use]
    pub fn new(capacity: usize) -> Chunks {
        let capacity = capacity.clamp(1, MAX_CHUNKS);
        let by_key = papaya::HashMap::with_capacity_and_hasher(capacity.min(1 << 16), RandomState::default());
        let places = (0..capacity).map(|_| Place::default()).collect();
        Chunks { by_key, places, touched: ArrayQueue::new(TOUCHES) }
    }

    /// Chunks that it has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.places.len()
    }

    /// Whether a chunk is held. Does not count as asking for it.
    #[must_use]
    pub fn contains(&self, key: &Key) -> bool {
        self.by_key.pin().contains_key(key)
    }

    /// The chunk with this handle, to be read until it is dropped.
    #[must_use]
    pub fn load(&self, handle: u32) -> Option<Arc<Chunk>> {
        let chunk = self.places.get(index_of(handle))?.chunk.load_full()?;
        (chunk.info.handle == handle).then_some(chunk)
    }

    /// Makes a chunk visible. Only for the keeper: its handle is free and its key is not held.
    pub(crate) fn show(&self, chunk: Arc<Chunk>) {
        let place = &self.places[index_of(chunk.info.handle)];
        place.touched.store(false, Relaxed);
        let (key, info) = (chunk.key, chunk.info);
        place.chunk.store(Some(chunk));
        self.by_key.pin().insert(key, info);
    }

    /// Makes a chunk invisible. Only for the keeper. Lcores that have loaded it may still read it.
    pub(crate) fn hide(&self, chunk: &Chunk) {
        self.by_key.pin().remove(&chunk.key);
        self.places[index_of(chunk.info.handle)].chunk.store(None);
    }

    /// The next chunk that was asked for since the keeper last took note of it. Only for the keeper.
    pub(crate) fn next_touched(&self) -> Option<Arc<Chunk>> {
        while let Some(handle) = self.touched.pop() {
            if let Some(chunk) = self.load(handle) {
                self.places[index_of(handle)].touched.store(false, Relaxed);
                return Some(chunk);
            }
        }
        None
    }

    fn touch(&self, handle: u32) {
        let place = &self.places[index_of(handle)];
        if !place.touched.load(Relaxed) {
            place.touched.store(true, Relaxed);
            if self.touched.push(handle).is_err() {
                // The keeper is behind: this chunk's chance to be noted comes with the next lookup.
                place.touched.store(false, Relaxed);
            }
        }
    }
}

impl ChunkSource for Chunks {
    fn find(&self, key: &Key) -> Option<ChunkInfo> {
        let info = self.by_key.pin().get(key).copied()?;
        self.touch(info.handle);
        Some(info)
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        let chunk = self.places.get(index_of(handle))?.chunk.load();
        chunk.as_ref().filter(|chunk| chunk.info.handle == handle).map(|chunk| chunk.info.chunk_bytes)
    }
}
