//! What the engine remembers of each fetch, lookup, chunk and transfer. All tables are of fixed size.

use crate::chunk::{ChunkInfo, ChunkShape};
use crate::time::Instant;

use super::event::{FetchId, FetchOutcome, LookupId, LookupOutcome, StoreIndex};
use super::index::{ChunkIndex, JobIndex, List, TransferIndex};

/// A LOOKUP that is waiting to be sent or answered. A fetch or lookup has at most one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) id: u32,
    pub(super) state: RequestState,
    /// Whether its owner stands in the queue of what is to be sent; such an entry outlives the request.
    pub(super) queued: bool,
    pub(super) sent_at: Instant,
    pub(super) rto_at: Instant,
    /// Times sent.
    pub(super) sent: u8,
    /// Keys it asks for.
    pub(super) keys: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestState {
    Idle,
    /// To be sent, for the first time or again.
    Due,
    Sent,
}

impl Request {
    pub(super) fn new(id: u32) -> Request {
        Request {
            id,
            state: RequestState::Idle,
            queued: false,
            sent_at: Instant::ZERO,
            rto_at: Instant::FAR,
            sent: 0,
            keys: 0,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobState {
    Free,
    Running,
    /// No more is asked for; waits for verdicts and for resets to be reported.
    Ending,
    /// Its end waits to be reported.
    Ended,
}

/// A fetch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) state: JobState,
    pub(super) id: FetchId,
    pub(super) store: StoreIndex,
    pub(super) deadline: Instant,
    pub(super) expect: ChunkShape,
    pub(super) keys: u32,
    /// The first chunk that has not been given a chunk slot.
    pub(super) next_chunk: u32,
    /// Chunk slots held.
    pub(super) chunks: u32,
    pub(super) delivered: u32,
    pub(super) failed: u32,
    pub(super) outcome: FetchOutcome,
    pub(super) request: Request,
    /// Chunks that wait to be looked up.
    pub(super) to_look_up: List<ChunkIndex>,
    /// Chunks with planes that wait to be started.
    pub(super) to_start: List<ChunkIndex>,
    /// Planes with segments that wait to be asked for.
    pub(super) to_ask: List<TransferIndex>,
    /// Whether it stands in the engine's queues; such an entry outlives the fetch and serves the slot's next.
    pub(super) in_ready: bool,
    pub(super) in_admit: bool,
}

impl Job {
    pub(super) fn free(request: u32) -> Job {
        Job {
            state: JobState::Free,
            id: FetchId(0),
            store: StoreIndex(0),
            deadline: Instant::FAR,
            expect: ChunkShape::default(),
            keys: 0,
            next_chunk: 0,
            chunks: 0,
            delivered: 0,
            failed: 0,
            outcome: FetchOutcome::Done,
            request: Request::new(request),
            to_look_up: List::EMPTY,
            to_start: List::EMPTY,
            to_ask: List::EMPTY,
            in_ready: false,
            in_admit: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LookupState {
    Free,
    Running,
    /// Its end waits to be reported.
    Ended,
}

/// A lookup.
#[derive(Clone, Copy, Debug)]
pub(super) struct LookupJob {
    pub(super) state: LookupState,
    pub(super) id: LookupId,
    pub(super) store: StoreIndex,
    pub(super) deadline: Instant,
    pub(super) keys: u32,
    /// Leading keys known to be stored; the next LOOKUP begins here.
    pub(super) found: u32,
    pub(super) tokens: u64,
    pub(super) encoded_bytes: u64,
    pub(super) last: Option<ChunkInfo>,
    pub(super) outcome: LookupOutcome,
    pub(super) request: Request,
}

impl LookupJob {
    pub(super) fn free(request: u32) -> LookupJob {
        LookupJob {
            state: LookupState::Free,
            id: LookupId(0),
            store: StoreIndex(0),
            deadline: Instant::FAR,
            keys: 0,
            found: 0,
            tokens: 0,
            encoded_bytes: 0,
            last: None,
            outcome: LookupOutcome::Done,
            request: Request::new(request),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChunkState {
    Free,
    /// Its key waits to be sent, or its answer to arrive.
    Lookup,
    /// Its header is being pulled.
    Header,
    /// Its planes are being pulled.
    Planes,
    /// The store no longer knows its handle; it is looked up again once none of its planes awaits a verdict.
    Draining,
    /// Reported as failed; its slot is freed once none of its planes awaits a verdict.
    Failed,
}

/// A chunk being looked up or pulled.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChunkSlot {
    pub(super) state: ChunkState,
    pub(super) job: JobIndex,
    /// Index among the fetch's keys.
    pub(super) chunk: u32,
    pub(super) info: ChunkInfo,
    pub(super) epoch: u64,
    /// Transfers that are not free.
    pub(super) transfers: u16,
    /// Planes of this queue that are not delivered; known from the shape.
    pub(super) missing: u16,
    /// Headers that did not parse.
    pub(super) bad_headers: u8,
    /// Times looked up again.
    pub(super) lookups: u8,
    /// Whether it stands in one of its fetch's lists.
    pub(super) listed: bool,
}

impl ChunkSlot {
    pub(super) const FREE: ChunkSlot = ChunkSlot {
        state: ChunkState::Free,
        job: JobIndex(0),
        chunk: 0,
        info: ChunkInfo {
            handle: 0,
            header_bytes: 0,
            chunk_bytes: 0,
            tokens: 0,
            layers: 0,
            kv_heads: 0,
            head_dim: 0,
            dtype: 0,
            codec: 0,
        },
        epoch: 0,
        transfers: 0,
        missing: 0,
        bad_headers: 0,
        lookups: 0,
        listed: false,
    };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TransferState {
    Free,
    /// Segments are missing.
    Receiving,
    /// Whole; the event waits to be polled.
    Arrived,
    /// Whole, and the caller knows; waits for the verdict.
    Announced,
    /// Ended early; the event waits to be polled.
    Reset,
}

/// A byte range being pulled: a plane, or a chunk's header.
///
/// Invariants while receiving: `cursor` is the first segment not asked for, of those that have not arrived;
/// `in_flight` is the number of segments below `cursor` that have not arrived.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) tag: u32,
    pub(super) state: TransferState,
    pub(super) store: StoreIndex,
    pub(super) epoch: u64,
    /// Segments of the range, and bytes of the last.
    pub(super) segments: u32,
    pub(super) last_bytes: u32,
    pub(super) arrived: u32,
    pub(super) cursor: u32,
    pub(super) in_flight: u32,
    /// The segment whose round trip is being measured, or `u32::MAX`.
    pub(super) timed_segment: u32,
    pub(super) timed_at: Instant,
    pub(super) rto_at: Instant,
    /// Segments below were asked for at least once.
    pub(super) asked: u32,
    pub(super) bytes: u32,
    pub(super) offset: u64,
    pub(super) chunk: ChunkIndex,
    pub(super) plane: u16,
    /// Timeouts since a segment arrived.
    pub(super) backoff: u8,
    /// Whether it stands in a list or queue of transfers with segments to ask for.
    pub(super) listed: bool,
}

impl Transfer {
    pub(super) fn free(tag: u32) -> Transfer {
        Transfer {
            tag,
            state: TransferState::Free,
            store: StoreIndex(0),
            epoch: 0,
            segments: 0,
            last_bytes: 0,
            arrived: 0,
            cursor: 0,
            in_flight: 0,
            timed_segment: u32::MAX,
            timed_at: Instant::ZERO,
            rto_at: Instant::FAR,
            asked: 0,
            bytes: 0,
            offset: 0,
            chunk: ChunkIndex(0),
            plane: 0,
            backoff: 0,
            listed: false,
        }
    }
}
