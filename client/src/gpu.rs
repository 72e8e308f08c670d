//! GPU memory that fetched planes land in: a paged KV cache, or a ring.
//!
//! The memory is the serving process's own: it is described here, by handles that `cuIpcGetMemHandle` gave (or PyTorch's
//! `untyped_storage()._share_cuda_()`), and written by the data plane with the GPU's copy engines. This crate calls no
//! driver.

use std::sync::{Mutex, MutexGuard, PoisonError};

use std::sync::Arc;
use std::time::Duration;

use control::message::{MAX_CHUNKS_PER_FETCH, MAX_PAGES_PER_FETCH};
use control::{
    ChunkPlace, Command, DeviceUuid, ElementType, GpuAllocation, GpuMemoryError, GpuRingError, PagedKv,
    RingConsumer, RingDescriptor, RingKv, Shape, Target,
};
use hugepages::{Arena, ArenaConfig, ArenaError, PageChoice};

use crate::fetch::{RequestError, milliseconds};
use crate::prefix::Prefix;
use crate::region::{Held, Memory};

/// A paged KV cache that the data plane can write to. Dropping it unregisters it; while a fetch into it is under way the
/// data plane keeps the memory mapped.
///
/// Free the GPU memory only after every fetch into it has ended and this has been dropped.
#[derive(Clone, Debug)]
pub struct PagedCache(pub(crate) Arc<Memory>);

impl PagedCache {
    /// The description that it was registered with.
    #[must_use]
    pub fn kv(&self) -> &PagedKv {
        match &self.0.held {
            Held::Pages(kv) => kv,
            Held::Host(_) | Held::Ring { .. } => unreachable!("a paged cache is made of pages"),
        }
    }
}

/// Which chunks to fetch into which pages, and until when.
#[derive(Clone, Debug)]
pub struct PagesRequest<'a> {
    /// The cache that receives.
    pub cache: &'a PagedCache,
    /// What the chunks are expected to be: what the lookup returned. Layers, KV heads and head dimension must be the
    /// cache's; the element type may differ, the data plane converts.
    pub shape: Shape,
    /// The pages of the sequence's tokens from 0 on, in order.
    pub table: Vec<u32>,
    /// The chunks; `offset` is the chunk's first token, counted from the table's start.
    pub chunks: Vec<ChunkPlace>,
    /// The deadline, from when the data plane takes the fetch: it ends by then, done or failed.
    pub timeout: Duration,
    /// Whether [`crate::Fetch::progress`] is to be kept up to date.
    pub progress: bool,
}

impl<'a> PagesRequest<'a> {
    /// The whole prefix: its token `t` goes to page `table[t / page_tokens]`.
    ///
    /// # Errors
    /// When the prefix is empty, or longer than a fetch or the table.
    pub fn prefix(prefix: &Prefix, cache: &'a PagedCache, table: Vec<u32>) -> Result<Self, RequestError> {
        Self::suffix(prefix, cache, table, 0)
    }

    /// The prefix without its first `skip` chunks, which the engine has already. The table still begins with the pages of
    /// token 0; those of chunks that are not fetched are not touched.
    ///
    /// # Errors
    /// When nothing is left, or it is longer than a fetch or the table.
    pub fn suffix(
        prefix: &Prefix,
        cache: &'a PagedCache,
        table: Vec<u32>,
        skip: usize,
    ) -> Result<Self, RequestError> {
        let shape = prefix.shape.ok_or(RequestError::Empty)?;
        let chunks = prefix.chunks.get(skip..).filter(|chunks| !chunks.is_empty());
        let chunks = chunks.ok_or(RequestError::Empty)?;
        if chunks.len() > MAX_CHUNKS_PER_FETCH {
            return Err(RequestError::TooMany { chunks: chunks.len() });
        }
        let tokens = table.len() as u64 * u64::from(cache.kv().page_tokens);
        if table.len() > MAX_PAGES_PER_FETCH || tokens < u64::from(prefix.tokens) {
            return Err(RequestError::Table { pages: table.len(), tokens: prefix.tokens });
        }
        let mut first = 0;
        let places = prefix.chunks.iter().map(|chunk| {
            let offset = first;
            first += u64::from(chunk.tokens);
            ChunkPlace { key: chunk.key.0, tokens: chunk.tokens, offset }
        });
        let chunks = places.skip(skip).collect();
        Ok(Self { cache, shape, table, chunks, timeout: Duration::from_secs(5), progress: false })
    }

    pub(crate) fn command(&self, id: u64) -> Command {
        Command::Fetch {
            id,
            timeout_ms: milliseconds(self.timeout),
            region: self.cache.0.id,
            to: Target::Pages { table: self.table.clone() },
            shape: self.shape,
            chunks: self.chunks.clone(),
            progress: self.progress,
        }
    }

    /// The pages that it may write, ascending.
    pub(crate) fn pages(&self) -> Vec<u32> {
        let page_tokens = u64::from(self.cache.kv().page_tokens);
        let entries = self.chunks.iter().flat_map(|chunk| {
            let last = chunk.offset.saturating_add(u64::from(chunk.tokens).saturating_sub(1));
            chunk.offset / page_tokens..=last / page_tokens
        });
        let entries = entries.filter_map(|entry| usize::try_from(entry).ok());
        let mut pages: Vec<u32> = entries.filter_map(|entry| self.table.get(entry)).copied().collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }
}

/// The GPU memory of a ring.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// The GPU.
    pub device: DeviceUuid,
    /// The memory that the entries lie in.
    pub allocation: GpuAllocation,
    /// Where entry 0 begins, bytes.
    pub offset: u64,
    /// Bytes of an entry, a multiple of 256: at least those of a decoded plane.
    pub entry_bytes: u64,
    /// How many there are. The data plane waits while all are full.
    pub entries: u32,
    /// The element type to write.
    pub element: ElementType,
}

impl RingConfig {
    /// The description that goes to the data plane, and this side of the ring.
    pub(crate) fn make(&self, generation: u64) -> Result<(RingKv, Arc<Arena>, RingConsumer), RingError> {
        let RingConfig { device, allocation, offset, entry_bytes, entries, element } = *self;
        let ring = RingKv { device, allocation, element, offset, entry_bytes, entries, generation };
        ring.check()?;
        let words = Arc::new(Arena::new(ArenaConfig {
            name: "shadowserve-ring",
            bytes: control::ring_words_bytes(entries),
            page: PageChoice::Base,
            numa_node: None,
        })?);
        let consumer = RingConsumer::create(Arc::clone(&words), entries, entry_bytes, generation)?;
        Ok((ring, words, consumer))
    }
}

/// Why a ring could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The description is wrong.
    #[error(transparent)]
    Description(#[from] GpuMemoryError),
    /// There is no memory for its host side.
    #[error("no memory for the ring's descriptors: {0}")]
    Memory(#[from] ArenaError),
    /// The data plane broke the ring, or this side did not make it right.
    #[error(transparent)]
    Ring(#[from] GpuRingError),
}

/// A filled entry of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingEntry {
    /// Where its bytes begin in the allocation.
    pub offset: u64,
    /// What it holds. The fetch's id is [`crate::Fetch::id`].
    pub holds: RingDescriptor,
}

/// A ring in GPU memory that the data plane fills and this process empties.
///
/// Entries come in one order for all fetches into the ring. Dropping it forbids further copies into the memory and
/// unregisters it; free the GPU memory only after every fetch into it has ended.
#[derive(Clone, Debug)]
pub struct GpuRing(pub(crate) Arc<Memory>);

impl GpuRing {
    fn parts(&self) -> (&RingKv, MutexGuard<'_, RingConsumer>) {
        match &self.0.held {
            Held::Ring { ring, consumer, .. } => {
                (ring, consumer.lock().unwrap_or_else(PoisonError::into_inner))
            }
            Held::Host(_) | Held::Pages(_) => unreachable!("a ring is made of a ring"),
        }
    }

    /// The oldest entry that is filled and has not been released. Never blocks.
    ///
    /// # Errors
    /// When the data plane broke the ring.
    pub fn peek(&self) -> Result<Option<RingEntry>, GpuRingError> {
        let (ring, consumer) = self.parts();
        let entry = consumer.peek()?.map(|(entry, holds)| RingEntry {
            offset: ring.offset + u64::from(entry) * ring.entry_bytes,
            holds,
        });
        Ok(entry)
    }

    /// Gives the entry that [`GpuRing::peek`] returned back to the data plane: once the GPU has read it.
    pub fn release(&self) {
        self.parts().1.release();
    }
}

/// Which chunks to fetch into a ring, and until when.
#[derive(Clone, Debug)]
pub struct RingRequest<'a> {
    /// The ring that receives.
    pub ring: &'a GpuRing,
    /// What the chunks are expected to be: what the lookup returned.
    pub shape: Shape,
    /// The chunks; `offset` has no meaning.
    pub chunks: Vec<ChunkPlace>,
    /// The deadline, from when the data plane takes the fetch: it ends by then, done or failed.
    pub timeout: Duration,
    /// Whether [`crate::Fetch::progress`] is to be kept up to date.
    pub progress: bool,
}

impl<'a> RingRequest<'a> {
    /// The whole prefix.
    ///
    /// # Errors
    /// When it is empty, or longer than a fetch.
    pub fn prefix(prefix: &Prefix, ring: &'a GpuRing) -> Result<Self, RequestError> {
        let shape = prefix.shape.ok_or(RequestError::Empty)?;
        if prefix.chunks.len() > MAX_CHUNKS_PER_FETCH {
            return Err(RequestError::TooMany { chunks: prefix.chunks.len() });
        }
        let chunks = prefix.chunks.iter();
        let chunks =
            chunks.map(|chunk| ChunkPlace { key: chunk.key.0, tokens: chunk.tokens, offset: 0 }).collect();
        Ok(Self { ring, shape, chunks, timeout: Duration::from_secs(5), progress: false })
    }

    pub(crate) fn command(&self, id: u64) -> Command {
        Command::Fetch {
            id,
            timeout_ms: milliseconds(self.timeout),
            region: self.ring.0.id,
            to: Target::Ring,
            shape: self.shape,
            chunks: self.chunks.clone(),
            progress: self.progress,
        }
    }
}

/// The consumer's end, as [`Memory`] keeps it.
pub(crate) type Consumer = Mutex<RingConsumer>;
