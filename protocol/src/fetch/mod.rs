//! The data plane's engine: what it wants, what it has asked for, what has arrived.
//!
//! Life of a fetch: its chunks get *chunk slots* a few at a time (`send.rs`, `admit`); each is looked up, its header
//! is pulled into the engine's own memory and read by the [`ChunkLayout`] (`chunks.rs`); its planes
//! get *transfers*, each of which reserves memory for all of its segments, so that no two half-arrived planes can
//! ever wait for each other's memory (`planes.rs`); segments are asked for in PULLs as the window allows
//! (`send.rs`) and land in the transfer's bitmap (`receive.rs`); what does not arrive in time leaves the window and is
//! asked for again (`timers.rs`).
//!
//! Fairness: fetches take turns, one PULL each; within a fetch planes are asked for in order, so that the
//! first is whole soonest. No store can hold all chunk slots, transfers or memory while there are other stores.
pub(crate) mod bits;
mod chunks;
mod config;
mod counters;
mod event;
mod index;
mod planes;
mod receive;
mod rtt;
mod send;
mod start;
mod tables;
pub(crate) mod tag;
mod timers;

pub use config::{ConfigError, FetchConfig};
pub use counters::FetchCounters;
pub use event::{
    Accepted, ChunkFailure, Event, FetchId, FetchOutcome, LookupId, LookupOutcome, StartError, StoreIndex,
    TransferId, Transmit, Verdict,
};

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use crate::chunk::{ChunkInfo, ChunkLayout, PlaneRanges};
use crate::key::Key;
use crate::time::Instant;
use crate::wire::message::MAX_LOOKUP_KEYS;

use index::{ChunkIndex, Index, JobIndex, Links, LookupIndex, TransferIndex};
use rtt::Store;
use tables::{ChunkSlot, Job, LookupJob, Transfer, TransferState};

/// Most segments of one PULL: a turn of a fetch.
const MAX_PULL_SEGMENTS: u32 = 64;
/// Most keys of one LOOKUP.
const MAX_REQUEST_KEYS: u32 = 40;
const _: () = assert!(MAX_REQUEST_KEYS as usize == MAX_LOOKUP_KEYS);

/// An event that waits to be polled, in a few bytes: what it says is read from the tables then.
#[derive(Clone, Copy, Debug)]
enum Queued {
    LookupDone(LookupIndex),
    PlaneArrived(TransferIndex),
    TransferReset(TransferIndex),
    ChunkFailed { job: JobIndex, chunk: u32, reason: ChunkFailure },
    FetchEnded(JobIndex),
}

/// Who sent a LOOKUP.
#[derive(Clone, Copy, Debug)]
enum Asker {
    Job(JobIndex),
    Lookup(LookupIndex),
}

/// The data plane's side of the protocol, for one receive queue; queues share nothing.
///
/// # Call order
///
/// In each turn of the caller's loop:
/// 1. [`handle_datagram`](Self::handle_datagram) for each received payload, keeping the packets of accepted segments;
/// 2. [`verdict`](Self::verdict) for planes that have been decoded, [`start`](Self::start),
///    [`cancel`](Self::cancel), [`lookup`](Self::lookup) for what clients ask;
/// 3. [`handle_timeout`](Self::handle_timeout) once [`poll_timeout`](Self::poll_timeout) is reached;
/// 4. [`poll_event`](Self::poll_event) until `None`;
/// 5. [`poll_transmit`](Self::poll_transmit) until `None` or the transmit queue is full.
///
/// A transfer's memory counts as taken until its verdict was given or its reset was polled, so polling
/// events before transmitting keeps the caller's memory within `memory_segments`.
///
/// # What is promised
///
/// - Each fetch and lookup ends with exactly one event: by its deadline, as soon as every verdict is in and
///   every reset polled. After it nobody needs the client's memory.
/// - Every transfer of which a segment was accepted ends by exactly one verdict or one reset.
/// - Every chunk is delivered whole or named in one `ChunkFailed`.
///
/// With `queues` > 1 a fetch is started on every queue's engine; each takes the planes for which
/// `(chunk * planes_per_chunk + plane) % queues == queue`, and each names a chunk's failure for its own planes.
#[derive(Debug)]
pub struct FetchEngine<L> {
    config: FetchConfig,
    layout: L,
    /// Segments of a PULL at most: a quarter of the window, so that several are in flight.
    pull_segments: u32,
    plane_segments: u32,
    /// Words of a transfer's bitmap, of a chunk's set of planes.
    segment_words: usize,
    plane_words: usize,

    jobs: Box<[Job]>,
    job_keys: Box<[Key]>,
    /// For each fetch, the chunks that its LOOKUP asks for.
    job_requests: Box<[[ChunkIndex; MAX_LOOKUP_KEYS]]>,
    lookups: Box<[LookupJob]>,
    lookup_keys: Box<[Key]>,
    chunks: Box<[ChunkSlot]>,
    chunk_links: Links<ChunkIndex>,
    chunk_headers: Box<[u8]>,
    chunk_ranges: Box<[PlaneRanges]>,
    /// Planes of each chunk that wait to be started, and how often each was corrupt.
    chunk_todo: Box<[u64]>,
    chunk_corrupt: Box<[u8]>,
    transfers: Box<[Transfer]>,
    transfer_links: Links<TransferIndex>,
    arrived: Box<[u64]>,
    stores: Box<[Store]>,

    free_jobs: Vec<JobIndex>,
    free_lookups: Vec<LookupIndex>,
    free_chunks: Vec<ChunkIndex>,
    free_planes: Vec<TransferIndex>,
    /// LOOKUPs to send; header transfers to ask for; fetches with planes to ask for; fetches with chunks to admit.
    due_requests: VecDeque<Asker>,
    due_headers: VecDeque<TransferIndex>,
    ready: VecDeque<JobIndex>,
    admit: VecDeque<JobIndex>,
    events: VecDeque<Queued>,

    /// Nothing in `ready`, or in `admit`, can go on until something is freed.
    ready_blocked: bool,
    admit_blocked: bool,
    /// No timer fires before this.
    next_timeout: Instant,
    in_flight: u32,
    memory: u32,
    /// Stores with fetches under way.
    busy_stores: u32,
    counters: FetchCounters,
}

impl<L: ChunkLayout> FetchEngine<L> {
    /// An engine with nothing under way. All memory is allocated here.
    pub fn new(config: FetchConfig, layout: L) -> Result<FetchEngine<L>, ConfigError> {
        config.check()?;
        let jobs = usize::from(config.max_fetches);
        let lookups = usize::from(config.max_lookups);
        let chunks = usize::from(config.active_chunks);
        let planes = usize::from(config.active_planes);
        let keys = config.max_chunks_per_fetch as usize;
        let per_chunk = usize::from(config.max_planes_per_chunk);
        let header_segments = config.max_header_bytes.div_ceil(u32::from(config.segment_bytes));
        let segment_words = bits::words(config.plane_segments().max(header_segments));
        let plane_words = bits::words(u32::from(config.max_planes_per_chunk));
        let seed = config.seed;
        let tag = |slot: usize| tag::first(u16::try_from(slot).expect("checked by FetchConfig"), seed);
        let events = jobs * keys + jobs + lookups + planes;
        Ok(FetchEngine {
            pull_segments: (config.window_segments / 4).clamp(1, MAX_PULL_SEGMENTS),
            plane_segments: config.plane_segments(),
            segment_words,
            plane_words,
            jobs: (0..jobs).map(|slot| Job::free(tag(slot))).collect(),
            job_keys: vec![Key::default(); jobs * keys].into(),
            job_requests: vec![[ChunkIndex(0); MAX_LOOKUP_KEYS]; jobs].into(),
            lookups: (0..lookups).map(|slot| LookupJob::free(tag(jobs + slot))).collect(),
            lookup_keys: vec![Key::default(); lookups * keys].into(),
            chunks: vec![ChunkSlot::FREE; chunks].into(),
            chunk_links: vec![None; chunks].into(),
            chunk_headers: vec![0; chunks * config.max_header_bytes as usize].into(),
            chunk_ranges: (0..chunks).map(|_| PlaneRanges::new(per_chunk)).collect(),
            chunk_todo: vec![0; chunks * plane_words].into(),
            chunk_corrupt: vec![0; chunks * per_chunk].into(),
            transfers: (0..planes + chunks).map(|slot| Transfer::free(tag(slot))).collect(),
            transfer_links: vec![None; planes + chunks].into(),
            arrived: vec![0; (planes + chunks) * segment_words].into(),
            stores: vec![Store::new(&config); usize::from(config.stores)].into(),
            free_jobs: JobIndex::all(jobs).rev().collect(),
            free_lookups: LookupIndex::all(lookups).rev().collect(),
            free_chunks: ChunkIndex::all(chunks).rev().collect(),
            free_planes: TransferIndex::all(planes).rev().collect(),
            due_requests: VecDeque::with_capacity(jobs + lookups),
            due_headers: VecDeque::with_capacity(chunks),
            ready: VecDeque::with_capacity(jobs),
            admit: VecDeque::with_capacity(jobs),
            events: VecDeque::with_capacity(events),
            ready_blocked: false,
            admit_blocked: false,
            next_timeout: Instant::FAR,
            in_flight: 0,
            memory: 0,
            busy_stores: 0,
            counters: FetchCounters::new(),
            config,
            layout,
        })
    }

    /// The next event, in the order in which they happened. See [`Event`] for what the caller owes each.
    pub fn poll_event(&mut self) -> Option<Event> {
        Some(match self.events.pop_front()? {
            Queued::LookupDone(index) => self.end_lookup(index),
            Queued::PlaneArrived(index) => self.announce(index),
            Queued::TransferReset(index) => {
                let transfer = TransferId(self.transfers[index.at()].tag);
                self.release_plane(index);
                Event::TransferReset { transfer }
            }
            Queued::ChunkFailed { job, chunk, reason } => {
                Event::ChunkFailed { fetch: self.jobs[job.at()].id, chunk, reason }
            }
            Queued::FetchEnded(index) => self.free_job(index),
        })
    }

    fn push_event(&mut self, event: Queued) {
        // One per lookup, fetch, chunk of a fetch and transfer, each of which is freed only when its event is polled.
        assert!(self.events.len() < self.events.capacity(), "the event queue has room for every event");
        self.events.push_back(event);
    }

    fn announce(&mut self, index: TransferIndex) -> Event {
        let transfer = &mut self.transfers[index.at()];
        assert_eq!(transfer.state, TransferState::Arrived, "a plane is announced once");
        transfer.state = TransferState::Announced;
        let slot = &self.chunks[transfer.chunk.at()];
        Event::PlaneArrived {
            transfer: TransferId(transfer.tag),
            fetch: self.jobs[slot.job.at()].id,
            chunk: slot.chunk,
            plane: transfer.plane,
            bytes: transfer.bytes,
            segments: transfer.segments,
        }
    }

    /// The chunk header that `transfer` belongs to, from `PlaneArrived` until its verdict.
    pub fn header(&self, transfer: TransferId) -> Option<&[u8]> {
        let chunk = self.announced(transfer)?.chunk;
        let header_bytes = self.chunks[chunk.at()].info.header_bytes as usize;
        Some(&self.chunk_headers[self.header_range(chunk)][..header_bytes])
    }

    /// What the store said of the chunk that `transfer` belongs to, from `PlaneArrived` until its verdict.
    pub fn chunk_info(&self, transfer: TransferId) -> Option<&ChunkInfo> {
        Some(&self.chunks[self.announced(transfer)?.chunk.at()].info)
    }

    fn announced(&self, transfer: TransferId) -> Option<&Transfer> {
        let found = self.transfers.get(transfer.slot())?;
        (found.tag == transfer.0 && found.state == TransferState::Announced).then_some(found)
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) at the latest; may be earlier than anything is overdue.
    #[inline]
    pub fn poll_timeout(&self) -> Option<Instant> {
        (self.next_timeout != Instant::FAR).then_some(self.next_timeout)
    }

    /// Whether nothing is under way and no event waits.
    pub fn idle(&self) -> bool {
        self.free_jobs.len() == self.jobs.len()
            && self.free_lookups.len() == self.lookups.len()
            && self.events.is_empty()
    }

    /// What this engine has done.
    pub fn counters(&self) -> &FetchCounters {
        &self.counters
    }

    /// The budgets it was made with.
    pub fn config(&self) -> &FetchConfig {
        &self.config
    }

    /// Segments asked for and neither arrived nor given up; never above `window_segments`.
    pub fn in_flight_segments(&self) -> u32 {
        self.in_flight
    }

    /// Segments of memory spoken for; never above `memory_segments`.
    pub fn memory_segments(&self) -> u32 {
        self.memory
    }

    /// Fetches under way or with an end that was not polled.
    pub fn fetches(&self) -> usize {
        self.jobs.len() - self.free_jobs.len()
    }

    /// Transfers of planes that are not free.
    pub fn planes_under_way(&self) -> usize {
        usize::from(self.config.active_planes) - self.free_planes.len()
    }

    /// Chunks that are not free.
    pub fn chunks_under_way(&self) -> usize {
        self.chunks.len() - self.free_chunks.len()
    }

    /// Smoothed round-trip time of a store, once measured.
    pub fn round_trip(&self, store: StoreIndex) -> Option<Duration> {
        self.stores.get(usize::from(store.0))?.srtt().map(Duration::from_nanos)
    }

    /// The layout given to [`new`](Self::new).
    pub fn layout(&self) -> &L {
        &self.layout
    }

    fn store(&mut self, store: StoreIndex) -> &mut Store {
        &mut self.stores[usize::from(store.0)]
    }

    /// Makes sure that [`handle_timeout`](Self::handle_timeout) is called by `at`.
    #[inline]
    fn arm(&mut self, at: Instant) {
        self.next_timeout = self.next_timeout.min(at);
    }

    /// What one store may hold of `total` while others may come: with two stores, half.
    fn share(&self, total: u32) -> u32 {
        let stores = u32::from(self.config.stores);
        (total / (self.busy_stores + 1).min(stores).max(1)).max(1)
    }

    /// The first plane of a chunk that is this queue's, out of `planes`. The others follow every `queues`.
    fn first_plane(&self, chunk: u32, planes: u32) -> Option<u32> {
        let queues = u64::from(self.config.queues);
        let before = u64::from(chunk) * u64::from(planes) % queues;
        let first = (u64::from(self.config.queue) + queues - before) % queues;
        u32::try_from(first).ok().filter(|first| *first < planes)
    }

    fn header_range(&self, chunk: ChunkIndex) -> Range<usize> {
        let bytes = self.config.max_header_bytes as usize;
        chunk.at() * bytes..(chunk.at() + 1) * bytes
    }

    fn todo_range(&self, chunk: ChunkIndex) -> Range<usize> {
        chunk.at() * self.plane_words..(chunk.at() + 1) * self.plane_words
    }

    fn arrived_range(&self, transfer: TransferIndex) -> Range<usize> {
        transfer.at() * self.segment_words..(transfer.at() + 1) * self.segment_words
    }

    /// The transfer that pulls the header of `chunk`.
    fn header_transfer(&self, chunk: ChunkIndex) -> TransferIndex {
        TransferIndex(self.config.active_planes + chunk.0)
    }

    fn is_header(&self, transfer: TransferIndex) -> bool {
        transfer.0 >= self.config.active_planes
    }
}
