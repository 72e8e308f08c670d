//! The data plane's engine: what it wants, what it has asked for, what has arrived.
//!
//! Life of a fetch: its chunks get *chunk slots* a few at a time (`send.rs`, `admit`); each is looked up at the store
//! that should hold it (`query.rs`), its header is pulled into the engine's own memory and read by the [`ChunkLayout`]
//! (`chunks.rs`); its planes get *transfers*, each of which reserves memory for all of its segments, so that no
//! two half-arrived planes can ever wait for each other's memory (`planes.rs`); segments are asked for in PULLs
//! (`send.rs`) and land in the transfer's bitmap (`receive.rs`).
//!
//! Credit, and what is lost, are the affair of `crate::pull`, and memory (`memory_segments`) is ours. A PULL goes out when there is room
//! for it, for the fetch that `schedule.rs` puts first. A store that stays silent or says that it is busy loses its chunks to replicas, where `placement.rs` names some; while it is only slow, a replica is
//! asked too (`hedge.rs`).
//!
//! No store can hold all chunk slots, transfers or memory while there are other stores.
mod chunks;
mod config;
mod counters;
mod event;
mod hedge;
mod index;
mod latency;
mod planes;
mod query;
mod receive;
mod schedule;
mod send;
mod start;
mod store;
mod tables;
mod timers;
mod unreachable;

pub use config::{ConfigError, FetchConfig};
pub use counters::FetchCounters;
pub use event::{
    Accepted, ChunkFailure, Event, FetchId, FetchOutcome, LookupId, LookupOutcome, Sources, StartError,
    StoreIndex, TransferId, Transmit, Verdict,
};
pub use schedule::Schedule;

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use crate::chunk::{ChunkInfo, ChunkLayout, PlaneRanges};
use crate::key::Key;
use crate::placement::Placement;
use crate::pull::{Budgets, Path, PathIndex, Puller, Span, bits, tag};
use crate::time::Instant;
use crate::wire::message::MAX_LOOKUP_KEYS;

use config::REQUESTS_PER_STORE;
use index::{ChunkIndex, Index, JobIndex, Links, LookupIndex, QueryIndex, TransferIndex};
use query::{Answer, Query, Request};
use store::Store;
use tables::{ChunkSlot, Job, LookupJob, Transfer, TransferState};

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
    placement: Placement,
    layout: L,
    plane_segments: u32,
    /// Words of a chunk's set of planes.
    plane_words: usize,

    jobs: Box<[Job]>,
    job_keys: Box<[Key]>,
    /// For each fetch, which of its chunks have or had a slot.
    job_admitted: Box<[u64]>,
    lookups: Box<[LookupJob]>,
    lookup_keys: Box<[Key]>,
    /// For each lookup, what is known of the keys that it asks for.
    lookup_answers: Box<[Answer]>,
    queries: Box<[Query]>,
    query_links: Links<QueryIndex>,
    requests: Box<[Request]>,
    chunks: Box<[ChunkSlot]>,
    chunk_links: Links<ChunkIndex>,
    chunk_headers: Box<[u8]>,
    chunk_ranges: Box<[PlaneRanges]>,
    /// Planes of each chunk that wait to be started, and how often each was corrupt.
    chunk_todo: Box<[u64]>,
    /// Planes of each chunk that have a transfer whose bytes may still be delivered.
    chunk_begun: Box<[u64]>,
    chunk_corrupt: Box<[u8]>,
    transfers: Box<[Transfer]>,
    transfer_links: Links<TransferIndex>,
    stores: Box<[Store]>,
    /// What is under way: a span for each transfer, a path for each store.
    puller: Puller,

    free_jobs: Vec<JobIndex>,
    free_lookups: Vec<LookupIndex>,
    free_chunks: Vec<ChunkIndex>,
    free_planes: Vec<TransferIndex>,
    /// Stores to send LOOKUPs to; header transfers to ask for; fetches with planes to ask for; with chunks to admit.
    due_stores: VecDeque<StoreIndex>,
    due_headers: VecDeque<TransferIndex>,
    ready: Vec<JobIndex>,
    admit: Vec<JobIndex>,
    events: VecDeque<Queued>,

    /// Nothing in `ready`, or in `admit`, can go on until something is freed.
    ready_blocked: bool,
    admit_blocked: bool,
    /// The latest time that the caller has told.
    now: Instant,
    /// No deadline comes before.
    next_deadline: Instant,
    memory: u32,
    /// A store from which large segments seem not to come through.
    suspect: Option<StoreIndex>,
    /// Segments that may be asked of a replica too, and the number of those asked for that this counts.
    hedge_credit: u32,
    hedge_counted: u64,
    /// Fetches ever started.
    starts: u64,
    /// Stores with chunks under way.
    busy_stores: u32,
    counters: FetchCounters,
}

impl<L: ChunkLayout> FetchEngine<L> {
    /// An engine with nothing under way, of stores that are placed by their number, each chunk on one of them. All memory
    /// is allocated here.
    ///
    /// # Errors
    /// If a budget cannot work.
    pub fn new(config: FetchConfig, layout: L) -> Result<FetchEngine<L>, ConfigError> {
        config.check()?;
        let ids: Vec<u64> = (0..u64::from(config.stores)).collect();
        let placement = Placement::new(&ids, 1).expect("at least one store, no number twice");
        FetchEngine::with_placement(config, placement, layout)
    }

    /// The same for stores placed by `placement`, whose indices are those of its list.
    ///
    /// # Errors
    /// If a budget cannot work.
    pub fn with_placement(
        config: FetchConfig,
        placement: Placement,
        layout: L,
    ) -> Result<FetchEngine<L>, ConfigError> {
        config.check()?;
        if placement.stores() != usize::from(config.stores) {
            return Err(ConfigError::Stores { placed: placement.stores(), stores: config.stores });
        }
        let jobs = usize::from(config.max_fetches);
        let lookups = usize::from(config.max_lookups);
        let chunks = usize::from(config.active_chunks);
        let planes = usize::from(config.active_planes);
        let keys = config.max_chunks_per_fetch as usize;
        let per_chunk = usize::from(config.max_planes_per_chunk);
        let header_segments = config.max_header_bytes.div_ceil(u32::from(config.segment_bytes));
        let plane_words = bits::words(u32::from(config.max_planes_per_chunk));
        let seed = config.seed;
        let tag = |slot: usize| tag::first(u16::try_from(slot).expect("checked by FetchConfig"), seed);
        let events = jobs * keys + jobs + lookups + planes;
        let queries = chunks + lookups * MAX_LOOKUP_KEYS;
        let stores = usize::from(config.stores);
        let requests = stores * usize::from(REQUESTS_PER_STORE);
        let budgets = Budgets {
            paths: stores,
            spans: planes + chunks,
            span_segments: config.plane_segments().max(header_segments),
            segment_bytes: config.segment_bytes,
            window_segments: config.window_segments,
            memory_segments: config.memory_segments,
            link_mbps: config.link_mbps,
            queue_tolerance: config.queue_tolerance,
            rto_min: config.rto_min,
            rto_max: config.rto_max,
            seed,
        };
        Ok(FetchEngine {
            placement,
            plane_segments: config.plane_segments(),
            plane_words,
            jobs: vec![Job::FREE; jobs].into(),
            job_keys: vec![Key::default(); jobs * keys].into(),
            job_admitted: vec![0; jobs * bits::words(config.max_chunks_per_fetch)].into(),
            lookups: vec![LookupJob::FREE; lookups].into(),
            lookup_keys: vec![Key::default(); lookups * keys].into(),
            lookup_answers: vec![Answer::Waiting; lookups * MAX_LOOKUP_KEYS].into(),
            queries: vec![Query::IDLE; queries].into(),
            query_links: vec![None; queries].into(),
            requests: (0..requests).map(|slot| Request::idle(tag(slot))).collect(),
            chunks: vec![ChunkSlot::FREE; chunks].into(),
            chunk_links: vec![None; chunks].into(),
            chunk_headers: vec![0; chunks * config.max_header_bytes as usize].into(),
            chunk_ranges: (0..chunks).map(|_| PlaneRanges::new(per_chunk)).collect(),
            chunk_todo: vec![0; chunks * plane_words].into(),
            chunk_begun: vec![0; chunks * plane_words].into(),
            chunk_corrupt: vec![0; chunks * per_chunk].into(),
            transfers: (0..planes + chunks).map(|slot| Transfer::free(tag(slot))).collect(),
            transfer_links: vec![None; planes + chunks].into(),
            stores: vec![Store::new(config.segment_bytes); stores].into(),
            puller: Puller::new(&budgets),
            free_jobs: JobIndex::all(jobs).rev().collect(),
            free_lookups: LookupIndex::all(lookups).rev().collect(),
            free_chunks: ChunkIndex::all(chunks).rev().collect(),
            free_planes: TransferIndex::all(planes).rev().collect(),
            due_stores: VecDeque::with_capacity(stores),
            due_headers: VecDeque::with_capacity(chunks),
            ready: Vec::with_capacity(jobs),
            admit: Vec::with_capacity(jobs),
            events: VecDeque::with_capacity(events),
            ready_blocked: false,
            admit_blocked: false,
            now: Instant::ZERO,
            next_deadline: Instant::FAR,
            memory: 0,
            suspect: None,
            hedge_credit: 0,
            hedge_counted: 0,
            starts: 0,
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
        let Span { bytes, segments, .. } = *self.puller.span(index);
        let slot = &self.chunks[transfer.chunk.at()];
        Event::PlaneArrived {
            transfer: TransferId(transfer.tag),
            fetch: self.jobs[slot.job.at()].id,
            chunk: slot.chunk,
            plane: transfer.plane,
            bytes,
            segments,
        }
    }

    /// The chunk header that `transfer` belongs to, from `PlaneArrived` until its verdict.
    pub fn header(&self, transfer: TransferId) -> Option<&[u8]> {
        let chunk = self.announced(transfer)?.chunk;
        let header_bytes = self.chunks[chunk.at()].info.header_bytes as usize;
        Some(&self.chunk_headers[self.header_range(chunk)][..header_bytes])
    }

    /// Where in its plane a segment lies, bytes, from the acceptance of one until the transfer's end.
    pub fn segment_offset(&self, transfer: TransferId, segment: u32) -> Option<u64> {
        self.transfers.get(transfer.slot()).filter(|found| found.tag == transfer.0)?;
        let span = self.puller.span(TransferIndex(tag::slot_of(transfer.0)));
        Some(u64::from(segment) * u64::from(span.segment_bytes))
    }

    /// What the store said of the chunk that `transfer` belongs to, from `PlaneArrived` until its verdict.
    pub fn chunk_info(&self, transfer: TransferId) -> Option<&ChunkInfo> {
        Some(&self.chunks[self.announced(transfer)?.chunk.at()].info)
    }

    /// The plane that is being pulled under `tag`: its transfer, fetch, chunk and plane, and the chunk's header. `None` of the tags of headers,
    /// and of planes that are whole or given up.
    pub fn plane_of(&self, tag: u32) -> Option<(TransferId, FetchId, u32, u16, &[u8])> {
        let index = TransferIndex(tag::slot_of(tag));
        let found = self.transfers.get(index.at())?;
        if found.tag != tag || found.state != TransferState::Receiving || self.is_header(index) {
            return None;
        }
        let slot = &self.chunks[found.chunk.at()];
        let header_bytes = slot.info.header_bytes as usize;
        let header = &self.chunk_headers[self.header_range(found.chunk)][..header_bytes];
        Some((TransferId(tag), self.jobs[slot.job.at()].id, slot.chunk, found.plane, header))
    }

    fn announced(&self, transfer: TransferId) -> Option<&Transfer> {
        let found = self.transfers.get(transfer.slot())?;
        (found.tag == transfer.0 && found.state == TransferState::Announced).then_some(found)
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) and then [`poll_transmit`](Self::poll_transmit) at the latest: what waits
    /// for its pace is sent by the latter. May be earlier than anything is overdue.
    #[inline]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let at = self.puller.poll_timeout().min(self.next_deadline);
        (at != Instant::FAR).then_some(at)
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
        self.puller.in_flight()
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
        self.known_path(store)?.rtt.smoothed().map(Duration::from_nanos)
    }

    /// Segments that may be asked of a store as things are: its window, within the link's credit.
    pub fn window_segments(&self, store: StoreIndex) -> Option<u32> {
        self.known_path(store).map(|_| self.puller.window_of(PathIndex(store.0)))
    }

    /// Segments that may be under way over all stores, as the link has it.
    pub fn link_segments(&self) -> u32 {
        self.puller.link().cap()
    }

    /// Segments that may be under way beyond what the link holds.
    pub fn burst_segments(&self) -> u32 {
        self.puller.link().burst()
    }

    /// Whether a store has not answered for so long that replicas are asked instead.
    pub fn is_silent(&self, store: StoreIndex) -> bool {
        self.known_path(store).is_some_and(Path::is_silent)
    }

    /// Where chunks are placed.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The layout given to [`new`](Self::new).
    pub fn layout(&self) -> &L {
        &self.layout
    }

    fn store(&mut self, store: StoreIndex) -> &mut Store {
        &mut self.stores[usize::from(store.0)]
    }

    /// What is known of the way to a store.
    #[inline]
    fn path(&self, store: StoreIndex) -> &Path {
        self.puller.path(PathIndex(store.0))
    }

    fn known_path(&self, store: StoreIndex) -> Option<&Path> {
        (store.0 < self.config.stores).then(|| self.path(store))
    }

    /// Makes sure that [`handle_timeout`](Self::handle_timeout) is called by `at`.
    #[inline]
    fn arm(&mut self, at: Instant) {
        self.puller.arm(at);
    }

    /// Makes sure that deadlines are looked at by `at`.
    fn arm_deadline(&mut self, at: Instant) {
        self.next_deadline = self.next_deadline.min(at);
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

    /// Where the key of a fetch's chunk lies.
    fn job_key(&self, job: JobIndex, chunk: u32) -> usize {
        job.at() * self.config.max_chunks_per_fetch as usize + chunk as usize
    }

    fn admitted_range(&self, job: JobIndex) -> Range<usize> {
        let words = bits::words(self.config.max_chunks_per_fetch);
        job.at() * words..(job.at() + 1) * words
    }

    /// The transfer that pulls the header of `chunk`.
    fn header_transfer(&self, chunk: ChunkIndex) -> TransferIndex {
        TransferIndex(self.config.active_planes + chunk.0)
    }

    fn is_header(&self, transfer: TransferIndex) -> bool {
        transfer.0 >= self.config.active_planes
    }
}
