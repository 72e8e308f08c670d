//! The one who changes what a store holds: finds memory for chunks on their way in, evicting if it must, and makes them
//! visible. Belongs to one thread, which may lock and allocate; serving lcores do neither.
//!
//! An evicted chunk is made invisible at once; its memory is free when the last lcore that was reading it has let go, which
//! the keeper sees by the count of its `Arc`, of which it keeps one itself: so no lcore ever frees anything.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use hugepages::{Arena, ArenaConfig, Block, Heap, PageSize};
use protocol::put::Declined;
use protocol::{ChunkInfo, Key};
use serde_json::{Value, json};

use crate::check::check;
use crate::chunks::{Chunk, Chunks, MAX_CHUNKS, handle_of, index_of};
use crate::load::{Encoded, LoadConfig, LoadError, encode_files};
use crate::policy::Policy;

/// Other indices that are used before one comes again.
const RESTING_INDICES: usize = 4096;

/// What the keeper has done; all counts only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeeperCounts {
    /// Chunks made visible, loaded ones too.
    pub stored: u64,
    /// Chunks evicted.
    pub evicted: u64,
    /// Their bytes.
    pub evicted_bytes: u64,
    /// Of those, chunks that had to go because the holes between others were too small.
    pub squeezed: u64,
}

/// What was found for a chunk on its way in.
#[derive(Debug)]
pub(crate) enum Room {
    /// Memory for all of it.
    Block(Block),
    /// There will be memory as soon as lcores have let go of evicted chunks: ask again.
    Soon,
    /// None.
    Declined(Declined),
}

/// The keeper of a store's chunks.
pub struct Keeper {
    heap: Heap,
    chunks: Arc<Chunks>,
    policy: Policy,
    /// Chunks on their way in, from memory found to stored or given up.
    under_way: HashSet<Key>,
    /// Evicted, and perhaps still read by lcores.
    retired: Vec<Arc<Chunk>>,
    /// Indices that were used, least recently freed first; how often each was used.
    resting: VecDeque<u32>,
    use_counts: Vec<u32>,
    held: usize,
    held_bytes: u64,
    pinned_bytes: u64,
    raw_bytes: usize,
    takes_more: bool,
    counts: KeeperCounts,
}

impl Keeper {
    /// Reads and encodes the files of `config`, and makes the memory for what is to come. A chunk that several files share is
    /// stored once.
    ///
    /// # Errors
    /// When a file cannot be read or encoded, or memory or budget does not suffice.
    pub fn load(config: &LoadConfig) -> Result<Keeper, LoadError> {
        let encoded = encode_files(config)?;
        let needed = encoded.iter().filter_map(|chunk| Heap::block_bytes(chunk.bytes.len())).sum();
        let bytes = config.memory_bytes.unwrap_or(needed).max(1);
        let arena = Arena::new(ArenaConfig { name: "chunks", bytes, page: config.pages, numa_node: None })?;
        let heap = Heap::new(arena)?;
        let mut keeper =
            Keeper::new(heap, if config.pin { needed } else { 0 }, config.memory_bytes.is_some());
        for chunk in encoded {
            keeper.raw_bytes += chunk.raw_bytes;
            keeper.keep_loaded(&chunk, config.pin);
        }
        Ok(keeper)
    }

    /// A keeper of made-up chunks of so many bytes each, for measurements: their content is of no format.
    ///
    /// # Errors
    /// When memory does not suffice.
    pub fn with_chunks(keys: impl ExactSizeIterator<Item = Key>, bytes: usize) -> Result<Keeper, LoadError> {
        let needed = keys.len() * Heap::block_bytes(bytes).unwrap_or(0);
        let page = hugepages::PageChoice::Base;
        let arena = Arena::new(ArenaConfig { name: "chunks", bytes: needed.max(1), page, numa_node: None })?;
        let mut keeper = Keeper::new(Heap::new(arena)?, needed, false);
        for key in keys {
            let block = keeper.heap.take(bytes).expect("the heap was made to hold them");
            keeper.under_way.insert(key);
            let info = ChunkInfo { chunk_bytes: bytes as u64, tokens: 256, ..ChunkInfo::default() };
            keeper.publish(key, block, info, true);
        }
        Ok(keeper)
    }

    fn new(heap: Heap, pinned_bytes: usize, takes_more: bool) -> Keeper {
        let blocks = heap.bytes() / hugepages::BLOCK_ALIGN_BYTES;
        Keeper {
            policy: Policy::new(heap.bytes().saturating_sub(pinned_bytes) as u64),
            heap,
            chunks: Arc::new(Chunks::new(blocks.min(MAX_CHUNKS))),
            under_way: HashSet::new(),
            retired: Vec::new(),
            resting: VecDeque::new(),
            use_counts: Vec::new(),
            held: 0,
            held_bytes: 0,
            pinned_bytes: 0,
            raw_bytes: 0,
            takes_more,
            counts: KeeperCounts::default(),
        }
    }

    fn keep_loaded(&mut self, chunk: &Encoded, pin: bool) {
        let mut block = self.heap.take(chunk.bytes.len()).expect("the heap was made to hold what is loaded");
        block.as_mut_slice().copy_from_slice(&chunk.bytes);
        let header_bytes = compress::ChunkView::parse(&chunk.bytes).map(|view| view.header_bytes());
        let header_bytes = u32::try_from(header_bytes.expect("what was just encoded can be parsed"));
        let info = check(&chunk.bytes, &chunk.key, header_bytes.expect("headers are small"));
        let info = info.expect("what was just encoded is right");
        if !pin {
            let victims = self.policy.begin(chunk.key, block_bytes(&block));
            assert!(victims.is_empty(), "what is loaded fits");
        }
        self.under_way.insert(chunk.key);
        self.publish(chunk.key, block, info, pin);
    }

    /// What lcores read.
    #[must_use]
    pub fn chunks(&self) -> &Arc<Chunks> {
        &self.chunks
    }

    /// Whether chunks can be put.
    #[must_use]
    pub fn takes_more(&self) -> bool {
        self.takes_more
    }

    /// Chunks held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Bytes of the encoded chunks, headers included.
    #[must_use]
    pub fn encoded_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Bytes of the loaded chunks before they were encoded.
    #[must_use]
    pub fn raw_bytes(&self) -> usize {
        self.raw_bytes
    }

    /// The pages that the chunks lie in.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.heap.page_size()
    }

    /// Bytes of memory for chunks.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.heap.bytes()
    }

    /// Address of that memory, which begins with a page.
    #[must_use]
    pub fn memory_addr(&self) -> usize {
        self.heap.addr()
    }

    /// What it has done.
    #[must_use]
    pub fn counts(&self) -> &KeeperCounts {
        &self.counts
    }

    /// Finds memory for a chunk that is to be put.
    pub(crate) fn reserve(&mut self, key: &Key, bytes: u32) -> Room {
        if self.chunks.contains(key) {
            return Room::Declined(Declined::AlreadyStored);
        }
        if self.under_way.contains(key) {
            return Room::Declined(Declined::Busy);
        }
        let bytes = bytes as usize;
        let Some(size) = Heap::block_bytes(bytes).filter(|&size| size <= self.heap.bytes()) else {
            return Room::Declined(Declined::TooLarge);
        };
        self.tend();
        if self.places_left() == 0 {
            let victims = self.policy.squeeze(1);
            self.evict(victims, true);
            self.reclaim();
            if self.places_left() == 0 {
                return self.no_room();
            }
        }
        let victims = self.policy.begin(*key, size as u64);
        self.evict(victims, false);
        self.reclaim();
        loop {
            if let Some(block) = self.heap.take(bytes) {
                self.under_way.insert(*key);
                return Room::Block(block);
            }
            if !self.retired.is_empty() || self.policy.evictable() == 0 {
                break;
            }
            let victims = self.policy.squeeze(size as u64);
            self.evict(victims, true);
            self.reclaim();
        }
        self.policy.forget(key);
        self.no_room()
    }

    /// Places in the index that nothing has, or is on its way to.
    fn places_left(&self) -> usize {
        self.chunks.capacity() - (self.held + self.retired.len() + self.under_way.len())
    }

    /// Nothing more can be evicted: what else takes the memory?
    fn no_room(&self) -> Room {
        match (self.retired.is_empty(), self.under_way.is_empty()) {
            (false, _) => Room::Soon,
            (true, false) => Room::Declined(Declined::Busy),
            (true, true) => Room::Declined(Declined::Full),
        }
    }

    /// Makes a chunk visible for which memory was reserved.
    pub(crate) fn publish(&mut self, key: Key, block: Block, info: ChunkInfo, pinned: bool) {
        assert!(self.under_way.remove(&key), "memory was found for it");
        let info = ChunkInfo { handle: self.next_handle(), ..info };
        self.held += 1;
        self.held_bytes += info.chunk_bytes;
        self.pinned_bytes += if pinned { info.chunk_bytes } else { 0 };
        self.counts.stored += 1;
        let chunk = Arc::new(Chunk::new(key, info, pinned, block));
        if !pinned {
            self.policy.settle(&chunk);
        }
        self.chunks.show(chunk);
    }

    /// Gives up a chunk for which memory was reserved.
    pub(crate) fn release(&mut self, key: &Key, block: Block) {
        assert!(self.under_way.remove(key), "memory was found for it");
        self.policy.forget(key);
        drop(block);
    }

    /// Takes note of what was asked for, and frees what is no longer read. To be called now and then.
    pub(crate) fn tend(&mut self) {
        while let Some(chunk) = self.chunks.next_touched() {
            self.policy.touch(&chunk.key);
        }
        self.reclaim();
    }

    fn evict(&mut self, victims: Vec<Arc<Chunk>>, squeezed: bool) {
        for chunk in victims {
            self.chunks.hide(&chunk);
            self.held -= 1;
            self.held_bytes -= chunk.info.chunk_bytes;
            self.counts.evicted += 1;
            self.counts.evicted_bytes += chunk.info.chunk_bytes;
            self.counts.squeezed += u64::from(squeezed);
            self.retired.push(chunk);
        }
    }

    /// Frees evicted chunks that nobody reads any more. None can be loaded anew, since they are not in the index.
    fn reclaim(&mut self) {
        let resting = &mut self.resting;
        self.retired.retain(|chunk| {
            let read = Arc::strong_count(chunk) > 1;
            if !read {
                resting.push_back(u32::try_from(index_of(chunk.info.handle)).expect("an index has 20 bits"));
            }
            read
        });
    }

    /// A handle that was not used before, or not for long.
    fn next_handle(&mut self) -> u32 {
        let fresh = self.use_counts.len() < self.chunks.capacity();
        let index = match self.resting.front() {
            Some(&index) if !fresh || self.resting.len() > RESTING_INDICES => {
                self.resting.pop_front();
                index
            }
            _ => {
                self.use_counts.push(0);
                u32::try_from(self.use_counts.len() - 1).expect("an index has 20 bits")
            }
        };
        let uses = &mut self.use_counts[index as usize];
        *uses = uses.wrapping_add(1);
        handle_of(index, *uses)
    }

    /// What it holds and has done, with stable names.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "held": self.held,
            "held_bytes": self.held_bytes,
            "pinned_bytes": self.pinned_bytes,
            "memory_bytes": self.heap.bytes(),
            "free_bytes": self.heap.free_bytes(),
            "under_way": self.under_way.len(),
            "stored": self.counts.stored,
            "evicted": self.counts.evicted,
            "evicted_bytes": self.counts.evicted_bytes,
            "squeezed": self.counts.squeezed,
        })
    }
}

fn block_bytes(block: &Block) -> u64 {
    Heap::block_bytes(block.bytes()).unwrap_or(0) as u64
}

#[cfg(test)]
mod tests;
