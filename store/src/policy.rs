//! Which chunks go when memory is needed: `quick_cache`'s Clock-PRO, of the family of S3-FIFO, with bytes as weights.
//!
//! It was chosen among well-kept crates because it takes weights, pins entries while they cannot be evicted, and hands each
//! victim back at once: `moka` evicts some time later, behind the caller's back, and cannot pin; `foyer-memory` brings an
//! asynchronous runtime. A newcomer that is never asked for goes before what was asked for twice, so one long sequence that is
//! saved and forgotten does not push out what others use.

use std::sync::Arc;

use foldhash::fast::RandomState;
use protocol::Key;
use quick_cache::unsync::Cache;
use quick_cache::{Lifecycle, Weighter};

use crate::chunks::Chunk;

/// What the policy knows of one chunk.
struct Entry {
    /// Bytes of memory that it takes.
    bytes: u64,
    /// The chunk, once it is stored; until then it cannot be evicted.
    chunk: Option<Arc<Chunk>>,
}

#[derive(Clone, Copy)]
struct Bytes;

impl Weighter<Key, Entry> for Bytes {
    fn weight(&self, _: &Key, entry: &Entry) -> u64 {
        entry.bytes
    }
}

/// Collects victims.
#[derive(Clone, Copy)]
struct Victims;

impl Lifecycle<Key, Entry> for Victims {
    type RequestState = Vec<Arc<Chunk>>;

    fn is_pinned(&self, _: &Key, entry: &Entry) -> bool {
        entry.chunk.is_none()
    }

    fn begin_request(&self) -> Vec<Arc<Chunk>> {
        Vec::new()
    }

    fn on_evict(&self, victims: &mut Vec<Arc<Chunk>>, _: Key, entry: Entry) {
        victims.extend(entry.chunk);
    }
}

/// Stands for memory that is needed and not there: no chunk has this name.
const BALLAST: Key = Key([0; 32]);

/// The eviction policy over the chunks that may be evicted and those that are on their way in.
pub(crate) struct Policy {
    cache: Cache<Key, Entry, Bytes, RandomState, Victims>,
    evictable: usize,
}

impl Policy {
    /// A policy for `bytes` of memory, expecting chunks of about a MiB.
    pub(crate) fn new(bytes: u64) -> Policy {
        let estimate =
            usize::try_from(bytes >> 20).unwrap_or(usize::MAX).clamp(1024, crate::chunks::MAX_CHUNKS);
        Policy { cache: Cache::with(estimate, bytes, Bytes, RandomState::default(), Victims), evictable: 0 }
    }

    /// Chunks that it could evict.
    pub(crate) fn evictable(&self) -> usize {
        self.evictable
    }

    /// Enters a chunk that is on its way in, and gives what is to go for it.
    #[must_use]
    pub(crate) fn begin(&mut self, key: Key, bytes: u64) -> Vec<Arc<Chunk>> {
        let victims = self.cache.insert_with_lifecycle(key, Entry { bytes, chunk: None });
        self.evictable -= victims.len();
        victims
    }

    /// A chunk on its way in has arrived: from now on it can be evicted.
    pub(crate) fn settle(&mut self, chunk: &Arc<Chunk>) {
        if let Some(mut entry) = self.cache.get_mut(&chunk.key) {
            self.evictable += usize::from(entry.chunk.is_none());
            entry.chunk = Some(Arc::clone(chunk));
        }
    }

    /// A chunk on its way in will not arrive.
    pub(crate) fn forget(&mut self, key: &Key) {
        if let Some((_, entry)) = self.cache.remove(key) {
            self.evictable -= usize::from(entry.chunk.is_some());
        }
    }

    /// A chunk was asked for.
    pub(crate) fn touch(&mut self, key: &Key) {
        let _ = self.cache.get(key);
    }

    /// Gives chunks of `bytes` in all, or as much as there is, that are to go although the sum of weights is within bounds:
    /// the holes between chunks are too small.
    #[must_use]
    pub(crate) fn squeeze(&mut self, bytes: u64) -> Vec<Arc<Chunk>> {
        let unused = self.cache.capacity().saturating_sub(self.cache.weight());
        let victims = self.begin(BALLAST, bytes.saturating_add(unused));
        self.forget(&BALLAST);
        victims
    }
}
