//! What is known of a store, beside the way to it (`crate::pull::Path`): how fast it answers, and what is wanted of it.

use crate::key::Key;
use crate::time::Instant;

use super::index::{List, QueryIndex};
use super::latency::Latency;

#[derive(Clone, Copy, Debug)]
pub(super) struct Store {
    pub(super) latency: Latency,
    /// The silence in which replicas were asked already, by its beginning.
    pub(super) hedged_since: Instant,
    /// It cannot be reached, and is asked for nothing until then.
    pub(super) gone_until: Instant,
    /// The epoch that its latest reply was of; 0 before the first.
    pub(super) epoch: u64,
    /// While it is silent: when to ask it the next time, and for which chunk, whether it is back.
    pub(super) knock_at: Instant,
    pub(super) knock: Option<Key>,
    /// Queries to send to it.
    pub(super) waiting: List<QueryIndex>,
    /// Whether it stands in the queue of stores to which a LOOKUP is to be sent.
    pub(super) is_due: bool,
    /// Bytes of the segments that it is asked for: what the path to it carries.
    pub(super) segment_bytes: u16,
    /// PULLs in segments larger than the least of which nothing came, since a plane in such segments arrived.
    pub(super) untouched: u8,
    /// Plane slots and segments of memory that are kept for it; chunk slots are the path's users.
    pub(super) planes: u32,
    pub(super) memory: u32,
}

impl Store {
    pub(super) fn new(segment_bytes: u16) -> Store {
        Store {
            latency: Latency::NEW,
            hedged_since: Instant::ZERO,
            gone_until: Instant::ZERO,
            epoch: 0,
            knock_at: Instant::ZERO,
            knock: None,
            waiting: List::EMPTY,
            is_due: false,
            segment_bytes,
            untouched: 0,
            planes: 0,
            memory: 0,
        }
    }

    /// It cannot be reached, and was not heard since.
    pub(super) fn is_gone(&self, now: Instant) -> bool {
        self.gone_until > now
    }
}
