//! What the engine remembers of each fetch, lookup, chunk and transfer. All tables are of fixed size.

use crate::chunk::{ChunkInfo, ChunkShape};
use crate::time::Instant;

use super::event::{FetchId, FetchOutcome, LookupId, LookupOutcome, Sources, StoreIndex};
use super::index::{ChunkIndex, JobIndex, List, TransferIndex};

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
    pub(super) sources: Sources,
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
    /// Planes that have not arrived, about: what the schedule goes by.
    pub(super) left: u64,
    /// Its place in the order in which fetches were started, and the number of PULLs when it was last asked for.
    pub(super) started: u64,
    pub(super) last_turn: u64,
    /// Chunks with planes that wait to be started.
    pub(super) to_start: List<ChunkIndex>,
    /// Planes with segments that wait to be asked for.
    pub(super) to_ask: List<TransferIndex>,
    /// Whether it stands in the engine's queues; such an entry outlives the fetch and serves the slot's next.
    pub(super) in_ready: bool,
    pub(super) in_admit: bool,
}

impl Job {
    pub(super) const FREE: Job = Job {
        state: JobState::Free,
        id: FetchId(0),
        sources: Sources::Placed,
        deadline: Instant::FAR,
        expect: ChunkShape { layers: 0, kv_heads: 0, head_dim: 0, dtype: 0 },
        keys: 0,
        next_chunk: 0,
        chunks: 0,
        delivered: 0,
        failed: 0,
        outcome: FetchOutcome::Done,
        left: 0,
        started: 0,
        last_turn: 0,
        to_start: List::EMPTY,
        to_ask: List::EMPTY,
        in_ready: false,
        in_admit: false,
    };
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
    pub(super) sources: Sources,
    pub(super) deadline: Instant,
    pub(super) keys: u32,
    /// Leading keys known to be stored.
    pub(super) found: u32,
    /// The keys being looked up: the first of them, and how many.
    pub(super) asked_from: u32,
    pub(super) asked: u8,
    pub(super) tokens: u64,
    pub(super) encoded_bytes: u64,
    pub(super) last: Option<ChunkInfo>,
    pub(super) outcome: LookupOutcome,
}

impl LookupJob {
    pub(super) const FREE: LookupJob = LookupJob {
        state: LookupState::Free,
        id: LookupId(0),
        sources: Sources::Placed,
        deadline: Instant::FAR,
        keys: 0,
        found: 0,
        asked_from: 0,
        asked: 0,
        tokens: 0,
        encoded_bytes: 0,
        last: None,
        outcome: LookupOutcome::Done,
    };
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
    /// Reported as failed, or a twin that is given up; its slot is freed once none of its planes awaits a verdict.
    Failed,
}

/// A chunk being looked up or pulled.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChunkSlot {
    pub(super) state: ChunkState,
    pub(super) job: JobIndex,
    /// The store that it is asked of now, and that its transfers count for.
    pub(super) store: StoreIndex,
    /// Index among the fetch's keys.
    pub(super) chunk: u32,
    pub(super) info: ChunkInfo,
    pub(super) epoch: u64,
    /// Transfers that are not free.
    pub(super) transfers: u16,
    /// Planes of this queue that are not delivered, whoever pulls them; known from the shape. Not used in a twin.
    pub(super) missing: u16,
    /// Headers that did not parse.
    pub(super) bad_headers: u8,
    /// Times looked up again.
    pub(super) lookups: u8,
    /// While its header is pulled: when a replica is asked instead.
    pub(super) hedge_at: Instant,
    /// Whether one was: once, since a round trip that is longer than was thought would have all replicas asked in vain.
    pub(super) is_hedged: bool,
    /// Whether it stands in its fetch's list of chunks with planes to start.
    pub(super) listed: bool,
    /// While a replica is asked too: the twin, in which that is done; or, in the twin, the slot for which.
    pub(super) other: Option<ChunkIndex>,
    pub(super) is_twin: bool,
}

impl ChunkSlot {
    pub(super) const FREE: ChunkSlot = ChunkSlot {
        state: ChunkState::Free,
        job: JobIndex(0),
        store: StoreIndex(0),
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
        hedge_at: Instant::FAR,
        is_hedged: false,
        listed: false,
        other: None,
        is_twin: false,
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

/// A byte range being pulled: a plane, or a chunk's header. Its segments are the affair of the puller's span of the same index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) tag: u32,
    pub(super) state: TransferState,
    pub(super) store: StoreIndex,
    pub(super) epoch: u64,
    pub(super) chunk: ChunkIndex,
    pub(super) plane: u16,
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
            chunk: ChunkIndex(0),
            plane: 0,
            listed: false,
        }
    }
}
