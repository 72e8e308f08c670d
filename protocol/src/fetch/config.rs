//! Budgets of a fetch engine, all fixed at start.

use std::time::Duration;

use crate::wire::message::{self, SEGMENT_ALIGN};

use super::schedule::Schedule;

/// LOOKUPs that one store may owe an answer to.
pub(super) const REQUESTS_PER_STORE: u16 = 4;

/// Budgets of one queue's engine. Everything is allocated from them in `FetchEngine::new`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchConfig {
    /// Which of the data plane's queues this engine is, from 0.
    pub queue: u16,
    /// How many queues share the planes of each fetch, at least 1.
    pub queues: u16,
    /// Fetches under way at once.
    pub max_fetches: u16,
    /// Lookups under way at once.
    pub max_lookups: u16,
    /// Chunks of one fetch, and keys of one lookup.
    pub max_chunks_per_fetch: u32,
    /// Chunks being looked up or pulled at once, over all fetches.
    pub active_chunks: u16,
    /// Planes being pulled or waiting for their verdict at once, over all fetches: the bound of `TransferId::slot`.
    pub active_planes: u16,
    /// Planes of a chunk: twice the layers of the deepest model.
    pub max_planes_per_chunk: u16,
    /// Encoded bytes of a plane; a larger one fails its chunk.
    pub max_plane_bytes: u32,
    /// Bytes of a chunk header; a larger one fails its chunk.
    pub max_header_bytes: u32,
    /// Bytes of a segment, a multiple of 32: see [`crate::frame::max_segment_bytes`]. Every path carries these; larger ones by
    /// [`super::FetchEngine::set_segment_bytes`].
    pub segment_bytes: u16,
    /// Most segments under way at once: asked for, not arrived, not given up. The credit is less as the link, the stores
    /// and memory have it.
    pub window_segments: u32,
    /// Rate of this queue's share of the link, in Mbit/s; 0 if it is to be measured.
    pub link_mbps: u32,
    /// Delay beyond the least round trip that is not taken for a queue; a quarter of that round trip if that is more.
    pub queue_tolerance: Duration,
    /// Which fetch is asked for first.
    pub schedule: Schedule,
    /// Segments that the caller has room for: of planes asked for and of planes waiting for their verdict. At least the
    /// segments of a plane of `max_plane_bytes`.
    pub memory_segments: u32,
    /// Least time without an arrival after which everything asked of a store counts as lost. Single losses are found in
    /// little more than a round trip.
    pub rto_min: Duration,
    /// Most of the same, after doubling; a store whose round trip is as long is waited for half as long again.
    pub rto_max: Duration,
    /// How often a corrupt plane or header is pulled again before its chunk fails.
    pub corrupt_retries: u8,
    /// How often a chunk is looked up again because the store no longer knows its handle.
    pub lookup_retries: u8,
    /// Segments that a replica may be asked for while the store is only slow, percent of all that are asked for: what hedging may cost the
    /// link. With 0 only LOOKUPs and headers are hedged.
    pub hedge_percent: u8,
    /// Stores that may be asked: [`super::StoreIndex`] is below it.
    pub stores: u16,
    /// Differs from run to run, so that segments asked for by an earlier run are not taken for this one's.
    pub seed: u32,
}

impl Default for FetchConfig {
    /// One queue and one store on an MTU of 1,500 bytes; 64 fetches of up to 4,096 chunks; planes of up to 1 MiB.
    fn default() -> Self {
        FetchConfig {
            queue: 0,
            queues: 1,
            max_fetches: 64,
            max_lookups: 64,
            max_chunks_per_fetch: 4096,
            active_chunks: 64,
            active_planes: 256,
            max_planes_per_chunk: 256,
            max_plane_bytes: 1 << 20,
            max_header_bytes: 16 << 10,
            segment_bytes: 1440,
            window_segments: 1 << 16,
            link_mbps: 0,
            queue_tolerance: Duration::from_micros(20),
            schedule: Schedule::default(),
            memory_segments: 8192,
            rto_min: Duration::from_millis(2),
            rto_max: Duration::from_millis(200),
            corrupt_retries: 3,
            lookup_retries: 3,
            hedge_percent: 5,
            stores: 1,
            seed: 0,
        }
    }
}

/// A budget that cannot work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A count that must be positive is zero.
    #[error("{0} is 0; it must be at least 1")]
    Zero(&'static str),
    /// The queue does not exist.
    #[error("queue {queue} of {queues} does not exist; queues count from 0")]
    Queue {
        /// The queue asked for.
        queue: u16,
        /// How many there are.
        queues: u16,
    },
    /// The segment size is not a positive multiple of 32.
    #[error("a segment of {0} bytes is not a positive multiple of 32")]
    Segment(u16),
    /// One plane does not fit the memory.
    #[error(
        "room for {memory} segments is less than the {plane} of the largest plane; raise the buffers or lower the \
         largest plane"
    )]
    Memory {
        /// `memory_segments`.
        memory: u32,
        /// Segments of a plane of `max_plane_bytes`.
        plane: u32,
    },
    /// More slots than a tag or an index can name.
    #[error("{0} is too large: together with its kind it must stay below 65,535")]
    TooMany(&'static str),
    /// The placement is of another number of stores.
    #[error("the placement has {placed} stores and the budgets are for {stores}; they must agree")]
    Stores {
        /// Stores of the placement.
        placed: usize,
        /// `stores`.
        stores: u16,
    },
    /// The least RTO is zero or more than the largest.
    #[error("the RTO bounds are empty: the least must be positive and at most the largest")]
    Rto,
}

impl FetchConfig {
    /// Segments of the largest plane.
    pub fn plane_segments(&self) -> u32 {
        message::segments(self.max_plane_bytes, self.segment_bytes.max(1))
    }

    /// Finds a budget that cannot work.
    pub fn check(&self) -> Result<(), ConfigError> {
        let positive: [(&'static str, u64); 12] = [
            ("queues", self.queues.into()),
            ("max_fetches", self.max_fetches.into()),
            ("max_lookups", self.max_lookups.into()),
            ("max_chunks_per_fetch", self.max_chunks_per_fetch.into()),
            ("active_chunks", self.active_chunks.into()),
            ("active_planes", self.active_planes.into()),
            ("max_planes_per_chunk", self.max_planes_per_chunk.into()),
            ("max_plane_bytes", self.max_plane_bytes.into()),
            ("max_header_bytes", self.max_header_bytes.into()),
            ("window_segments", self.window_segments.into()),
            ("memory_segments", self.memory_segments.into()),
            ("stores", self.stores.into()),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        if self.queue >= self.queues {
            return Err(ConfigError::Queue { queue: self.queue, queues: self.queues });
        }
        if self.segment_bytes == 0 || !self.segment_bytes.is_multiple_of(SEGMENT_ALIGN) {
            return Err(ConfigError::Segment(self.segment_bytes));
        }
        if self.memory_segments < self.plane_segments() {
            return Err(ConfigError::Memory { memory: self.memory_segments, plane: self.plane_segments() });
        }
        if self.active_planes.checked_add(self.active_chunks).is_none_or(|slots| slots == u16::MAX) {
            return Err(ConfigError::TooMany("active_planes + active_chunks"));
        }
        let queries =
            usize::from(self.active_chunks) + usize::from(self.max_lookups) * message::MAX_LOOKUP_KEYS;
        if queries >= usize::from(u16::MAX) {
            return Err(ConfigError::TooMany("active_chunks + 40 max_lookups"));
        }
        if self.stores > u16::MAX / REQUESTS_PER_STORE {
            return Err(ConfigError::TooMany("stores"));
        }
        if self.max_chunks_per_fetch > 1 << 24 {
            return Err(ConfigError::TooMany("max_chunks_per_fetch"));
        }
        if self.rto_min.is_zero() || self.rto_min > self.rto_max {
            return Err(ConfigError::Rto);
        }
        Ok(())
    }
}
