//! What goes into and comes out of a fetch engine.

use std::ops::Range;

use crate::chunk::ChunkInfo;
use crate::wire::message::ErrorCode;

/// A store, as numbered by the caller from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreIndex(pub u16);

/// Where the chunks of a fetch or lookup are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sources {
    /// All on this store.
    One(StoreIndex),
    /// Each on the stores that the engine's placement names.
    Placed,
}

impl From<StoreIndex> for Sources {
    fn from(store: StoreIndex) -> Sources {
        Sources::One(store)
    }
}

/// A fetch, as named by the caller; must differ from every fetch under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FetchId(pub u64);

/// A lookup, as named by the caller; must differ from every lookup under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LookupId(pub u64);

/// One attempt at pulling one plane. Ends by exactly one of `FetchEngine::verdict` and [`Event::TransferReset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(pub(super) u32);

impl TransferId {
    /// Below `FetchConfig::active_planes`, and different for all transfers under way: the caller's array index.
    #[inline]
    pub fn slot(self) -> usize {
        usize::from(super::tag::slot_of(self.0))
    }

    /// The tag on the wire.
    pub fn tag(self) -> u32 {
        self.0
    }
}

/// What became of a received datagram that was not dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// The engine has taken what it needs; the caller frees the packet.
    Control,
    /// A segment of a plane; the caller keeps the packet until the transfer ends.
    Segment {
        /// Which transfer it belongs to.
        transfer: TransferId,
        /// Which segment of the plane.
        segment: u32,
        /// Where in the datagram's payload the segment's bytes lie.
        data: Range<usize>,
    },
}

/// What the caller says of a plane that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// In its place, checked.
    Delivered,
    /// Its bytes are wrong: pull it again.
    Corrupt,
    /// It cannot be used, and would not be the next time: its chunk fails with this number of the caller's.
    Rejected(u8),
}

/// A message to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// To which store.
    pub store: StoreIndex,
    /// Bytes written to `out`.
    pub len: usize,
}

/// Why a chunk did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkFailure {
    /// No store that should hold it does.
    NotStored,
    /// The deadline came first: the store was silent or slow.
    Deadline,
    /// No store that should hold it can be reached, as the network says.
    Unreachable,
    /// A plane was corrupt each time it was pulled.
    Corrupt,
    /// The stored chunk has another shape than the client expects.
    ShapeMismatch,
    /// The chunk header, or what the store says of the chunk, makes no sense.
    BadHeader,
    /// A plane or the header exceeds the configured size.
    TooLarge,
    /// The store refused a PULL, or gave up the chunk each time it was looked up.
    Refused(ErrorCode),
    /// The caller rejected a plane with this number.
    Rejected(u8),
    /// The fetch was cancelled.
    Cancelled,
}

/// How a fetch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchOutcome {
    /// Every plane of this queue was delivered.
    Done,
    /// Some chunks failed; each was named.
    Failed,
    /// By `FetchEngine::cancel`; what had not arrived was named.
    Cancelled,
}

/// How a lookup ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupOutcome {
    /// The store answered.
    Done,
    /// The deadline came first; what was found until then is reported.
    Deadline,
    /// No store that should hold the next key can be reached, as the network says; what was found until then is reported.
    Unreachable,
    /// By `FetchEngine::cancel_lookup`.
    Cancelled,
}

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A lookup ended.
    LookupDone {
        /// Which.
        id: LookupId,
        /// How.
        outcome: LookupOutcome,
        /// How many leading keys the store holds.
        found: u32,
        /// Tokens of those chunks.
        tokens: u64,
        /// Encoded bytes of those chunks.
        encoded_bytes: u64,
        /// The last of those chunks.
        last: Option<ChunkInfo>,
    },
    /// All bytes of a plane are here. The caller answers with exactly one `FetchEngine::verdict`.
    PlaneArrived {
        /// The transfer whose packets the caller keeps.
        transfer: TransferId,
        /// The fetch it belongs to.
        fetch: FetchId,
        /// Index of the chunk among the fetch's keys.
        chunk: u32,
        /// Plane index: layer * 2 + (0 for K, 1 for V).
        plane: u16,
        /// Encoded bytes.
        bytes: u32,
        /// Packets.
        segments: u32,
    },
    /// A transfer of which segments had arrived ended early: drop its packets. Needs no answer.
    TransferReset {
        /// Which.
        transfer: TransferId,
    },
    /// A chunk will not arrive whole. Planes of it may have been delivered before.
    ChunkFailed {
        /// Which fetch.
        fetch: FetchId,
        /// Index of the chunk among the fetch's keys.
        chunk: u32,
        /// Why.
        reason: ChunkFailure,
    },
    /// A fetch ended: the last event of it. No plane of it awaits a verdict and no packets of it are kept.
    FetchEnded {
        /// Which.
        fetch: FetchId,
        /// How.
        outcome: FetchOutcome,
        /// Planes with verdict [`Verdict::Delivered`].
        planes_delivered: u32,
        /// Chunks named in [`Event::ChunkFailed`].
        chunks_failed: u32,
    },
}

/// Why a fetch or lookup was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// As many are under way as the configuration allows.
    #[error("all {0} slots for fetches or lookups are taken; wait for one to end or raise the limit")]
    Full(u16),
    /// The name is in use.
    #[error("a fetch or lookup with this id is under way; ids must differ until the end was reported")]
    DuplicateId,
    /// Nothing to fetch.
    #[error("no keys were given")]
    NoKeys,
    /// More keys than the configuration allows.
    #[error("{keys} keys are more than the limit of {limit}; split the fetch or raise the limit")]
    TooManyKeys {
        /// Keys given.
        keys: usize,
        /// `max_chunks_per_fetch`.
        limit: u32,
    },
    /// No such store.
    #[error("store {0} does not exist; it must be below the configured number of stores")]
    UnknownStore(u16),
    /// The expected shape has no planes or more than the configuration allows.
    #[error("a chunk of {planes} planes is outside 1 to {limit}")]
    BadShape {
        /// Planes of the expected shape.
        planes: u32,
        /// `max_planes_per_chunk`.
        limit: u16,
    },
    /// The deadline has passed already.
    #[error("the deadline has passed already")]
    DeadlinePassed,
}
