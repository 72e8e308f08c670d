//! The data plane's engine: what it wants, what it has asked for, what has arrived.
mod config;
mod counters;
mod event;
mod tag;

pub use config::{ConfigError, FetchConfig};
pub use counters::FetchCounters;
pub use event::{
    Accepted, ChunkFailure, Event, FetchId, FetchOutcome, LookupId, LookupOutcome, StartError, StoreIndex,
    TransferId, Transmit, Verdict,
};

use crate::chunk::{ChunkInfo, ChunkLayout, ChunkShape};
use crate::key::Key;
use crate::reason::DropReason;
use crate::time::Instant;

/// The data plane's side of the protocol, for one receive queue; queues share nothing.
pub struct FetchEngine<L> {
    layout: L,
    counters: FetchCounters,
}

#[expect(clippy::too_many_arguments, unused_variables, reason = "interface first")]
impl<L: ChunkLayout> FetchEngine<L> {
    /// An engine with nothing under way. All memory is allocated here.
    pub fn new(config: FetchConfig, layout: L) -> Result<FetchEngine<L>, ConfigError> {
        config.check()?;
        Ok(FetchEngine { layout, counters: FetchCounters::new() })
    }

    /// Starts looking for the longest prefix of `keys` that `store` holds.
    pub fn lookup(
        &mut self,
        now: Instant,
        id: LookupId,
        deadline: Instant,
        store: StoreIndex,
        keys: &[Key],
    ) -> Result<(), StartError> {
        Err(StartError::Full(0))
    }

    /// Ends a lookup early. Unknown ids are ignored.
    pub fn cancel_lookup(&mut self, now: Instant, id: LookupId) {}

    /// Starts a fetch of this queue's planes of the chunks `keys`.
    pub fn start(
        &mut self,
        now: Instant,
        id: FetchId,
        deadline: Instant,
        store: StoreIndex,
        keys: &[Key],
        expect: &ChunkShape,
    ) -> Result<(), StartError> {
        Err(StartError::Full(0))
    }

    /// Ends a fetch early. Unknown ids are ignored.
    pub fn cancel(&mut self, now: Instant, id: FetchId) {}

    /// Takes in a UDP payload that came from `store`.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        store: StoreIndex,
        payload: &[u8],
    ) -> Result<Accepted, DropReason> {
        Err(DropReason::Stale)
    }

    /// Takes in what became of an arrived plane. False if no such transfer awaits a verdict.
    pub fn verdict(&mut self, now: Instant, transfer: TransferId, verdict: Verdict) -> bool {
        false
    }

    /// The chunk header that `transfer` belongs to, from `PlaneArrived` until its verdict.
    pub fn header(&self, transfer: TransferId) -> Option<&[u8]> {
        None
    }

    /// What the store said of the chunk that `transfer` belongs to, from `PlaneArrived` until its verdict.
    pub fn chunk_info(&self, transfer: TransferId) -> Option<&ChunkInfo> {
        None
    }

    /// Writes the next message to send.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        None
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        None
    }

    /// When to call [`FetchEngine::handle_timeout`] at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    /// Gives up what is overdue.
    pub fn handle_timeout(&mut self, now: Instant) {}

    /// Whether nothing is under way and no event waits.
    pub fn idle(&self) -> bool {
        true
    }

    /// What this engine has done.
    pub fn counters(&self) -> &FetchCounters {
        &self.counters
    }

    /// Segments asked for and neither arrived nor given up; never above `window_segments`.
    pub fn in_flight_segments(&self) -> u32 {
        0
    }

    /// Segments of memory spoken for; never above `memory_segments`.
    pub fn memory_segments(&self) -> u32 {
        0
    }

    /// The layout given to [`FetchEngine::new`].
    pub fn layout(&self) -> &L {
        &self.layout
    }
}
