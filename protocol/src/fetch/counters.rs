//! What a fetch engine has done.

use crate::reason::DropReason;

/// Counts since the engine was made; they only grow.
///
/// `datagrams` = `segments_placed` + `header_segments` + `control` + the sum of `drops`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchCounters {
    /// Datagrams given to the engine.
    pub datagrams: u64,
    /// Of those, marked as having met congestion (ECN).
    pub marked: u64,
    /// Segments of planes that were placed: `Accepted::Segment`.
    pub segments_placed: u64,
    /// Their payload.
    pub segment_bytes_placed: u64,
    /// Segments of chunk headers.
    pub header_segments: u64,
    /// Lookup replies and errors taken in.
    pub control: u64,
    /// LOOKUPs sent, repeats included.
    pub lookups_sent: u64,
    /// PULLs sent.
    pub pulls_sent: u64,
    /// Segments asked for the first time.
    pub segments_asked: u64,
    /// Segments asked for again after they were given up.
    pub segments_asked_again: u64,
    /// Segments given up as lost.
    pub segments_lost: u64,
    /// Of those, that came after all, before what was asked for again.
    pub segments_late: u64,
    /// Times that the last segment under way of a store was asked for again because nothing came.
    pub tail_probes: u64,
    /// Times that everything under way of one store was given up as lost.
    pub timeouts: u64,
    /// ICMP errors by which a store cannot be reached, about something under way at it.
    pub unreachable: u64,
    /// Such errors that quote nothing that is under way, or too little to tell: nothing was done.
    pub unreachable_unproven: u64,
    /// Answers of stores that they are busy.
    pub busy: u64,
    /// Chunks that went to another store because theirs was silent, busy, slow, or did not hold them.
    pub failovers: u64,
    /// Chunks whose store was slow, so that a replica was asked too for planes under way and instead for the others.
    pub chunks_hedged: u64,
    /// Segments of planes under way that a replica was asked for too: at most `hedge_percent` of those asked for.
    pub segments_hedged: u64,
    /// Planes that came from such a replica.
    pub planes_hedged: u64,
    /// Planes that arrived whole.
    pub planes_arrived: u64,
    /// Planes with verdict delivered.
    pub planes_delivered: u64,
    /// Planes with verdict corrupt.
    pub planes_corrupt: u64,
    /// Transfers of planes that ended before they were whole.
    pub transfers_reset: u64,
    /// Chunks looked up again because the store no longer knew their handle.
    pub lookups_again: u64,
    /// Datagrams dropped, by [`DropReason::index`].
    pub drops: [u64; DropReason::COUNT],
}

impl FetchCounters {
    pub(super) const fn new() -> FetchCounters {
        FetchCounters {
            datagrams: 0,
            marked: 0,
            segments_placed: 0,
            segment_bytes_placed: 0,
            header_segments: 0,
            control: 0,
            lookups_sent: 0,
            pulls_sent: 0,
            segments_asked: 0,
            segments_asked_again: 0,
            segments_lost: 0,
            segments_late: 0,
            tail_probes: 0,
            timeouts: 0,
            unreachable: 0,
            unreachable_unproven: 0,
            busy: 0,
            failovers: 0,
            chunks_hedged: 0,
            segments_hedged: 0,
            planes_hedged: 0,
            planes_arrived: 0,
            planes_delivered: 0,
            planes_corrupt: 0,
            transfers_reset: 0,
            lookups_again: 0,
            drops: [0; DropReason::COUNT],
        }
    }

    /// Datagrams dropped, over all reasons.
    pub fn dropped(&self) -> u64 {
        self.drops.iter().sum()
    }
}
