//! Budgets of the store's side of PUT, and what it counts.

use std::time::Duration;

use crate::reason::DropReason;

/// Budgets of one queue of a store. Everything is allocated from them in [`AcceptEngine::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcceptConfig {
    /// The store's epoch, as in [`crate::ServeConfig`].
    pub epoch: u64,
    /// Chunks being pulled or checked at once; zero takes none.
    pub max_intakes: u16,
    /// Bytes of a chunk; larger ones are refused.
    pub max_chunk_bytes: u32,
    /// Largest segment that fits a packet here, a multiple of 32: see [`crate::frame::max_segment_bytes`].
    pub segment_bytes: u16,
    /// Most segments under way at once over all chunks: asked for, not arrived, not given up. The credit is less as the link and the ways
    /// to the data planes have it.
    pub window_segments: u32,
    /// Rate of this queue's share of the link, in Mbit/s; 0 if it is to be measured.
    pub link_mbps: u32,
    /// Delay beyond the least round trip that is not taken for a queue; a quarter of that round trip if that is more.
    pub queue_tolerance: Duration,
    /// Least time without an arrival after which everything asked of a data plane counts as lost. Single losses are found in little more
    /// than a round trip.
    pub rto_min: Duration,
    /// Most of the same, after doubling.
    pub rto_max: Duration,
    /// Time without an arrival after which a chunk is given up and its memory freed.
    pub silence: Duration,
    /// How often what was corrupt is pulled again before the chunk is refused.
    pub corrupt_retries: u8,
    /// What a data plane is told to wait when the store is busy, milliseconds.
    pub retry_ms: u16,
    /// Differs from run to run, so that segments asked for by an earlier run are not taken for this one's.
    pub seed: u32,
}

impl Default for AcceptConfig {
    /// Sixteen chunks of up to 64 MiB in segments of an MTU of 1,500 over IPv4, given up after 3 s of silence.
    fn default() -> Self {
        AcceptConfig {
            epoch: 1,
            max_intakes: 16,
            max_chunk_bytes: 64 << 20,
            segment_bytes: 1440,
            window_segments: 1 << 16,
            link_mbps: 0,
            queue_tolerance: Duration::from_micros(20),
            rto_min: Duration::from_millis(2),
            rto_max: Duration::from_millis(200),
            silence: Duration::from_secs(3),
            corrupt_retries: 3,
            retry_ms: 20,
            seed: 0,
        }
    }
}

/// What a store's engine has done; all counts start at zero and only grow. `datagrams` are the sum of `offers`, `segments`,
/// `errors` and all drops; intakes begun are the sum of those that ended and those under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcceptCounters {
    /// Datagrams given to the engine.
    pub datagrams: u64,
    /// Of those, marked as having met congestion (ECN).
    pub marked: u64,
    /// OFFERs accepted, repeated ones too.
    pub offers: u64,
    /// Segments placed.
    pub segments: u64,
    /// Their payload.
    pub segment_bytes: u64,
    /// ERRORs accepted.
    pub errors: u64,
    /// Chunks for which memory was asked.
    pub begun: u64,
    /// Chunks stored.
    pub stored: u64,
    /// Chunks that were stored before, found on offer or at the end.
    pub already_stored: u64,
    /// Intakes that ended without memory: busy, full, too large, stored already.
    pub declined: u64,
    /// Intakes refused after checking: corrupt too often, or contradicting themselves.
    pub refused: u64,
    /// Intakes given up: the data plane fell silent or withdrew them.
    pub dropped: u64,
    /// Times that an intake was found corrupt.
    pub corrupt: u64,
    /// PULLs sent.
    pub pulls: u64,
    /// Segments asked for the first time.
    pub segments_asked: u64,
    /// Segments asked for again.
    pub segments_asked_again: u64,
    /// Segments given up as lost.
    pub segments_lost: u64,
    /// Of those, that came after all, before what was asked for again.
    pub segments_late: u64,
    /// Times that the last segment under way of a data plane was asked for again because nothing came.
    pub tail_probes: u64,
    /// Times that everything under way of one data plane was given up as lost.
    pub timeouts: u64,
    /// Datagrams dropped, by [`DropReason::index`].
    pub drops: [u64; DropReason::COUNT],
}

impl AcceptCounters {
    pub(super) const fn new() -> AcceptCounters {
        AcceptCounters {
            datagrams: 0,
            marked: 0,
            offers: 0,
            segments: 0,
            segment_bytes: 0,
            errors: 0,
            begun: 0,
            stored: 0,
            already_stored: 0,
            declined: 0,
            refused: 0,
            dropped: 0,
            corrupt: 0,
            pulls: 0,
            segments_asked: 0,
            segments_asked_again: 0,
            segments_lost: 0,
            segments_late: 0,
            tail_probes: 0,
            timeouts: 0,
            drops: [0; DropReason::COUNT],
        }
    }
}
