//! What is known of a store: round trips, window, losses, how much it is working on, and whether it answers.

use crate::key::Key;
use crate::time::{Instant, nanos_of};

use super::asks::AskList;
use super::config::FetchConfig;
use super::index::{List, QueryIndex};
use super::latency::Latency;
use super::rack::Rack;
use super::rtt::Rtt;
use super::window::Window;

/// Timeouts without an arrival in between after which a store counts as silent: it is only probed, with one PULL's worth
/// under way, and its chunks go to replicas.
const SILENT_TIMEOUTS: u8 = 2;

#[derive(Clone, Copy, Debug)]
pub(super) struct Store {
    pub(super) rtt: Rtt,
    pub(super) rack: Rack,
    pub(super) window: Window,
    pub(super) latency: Latency,
    /// PULLs under way.
    pub(super) asks: AskList,
    /// Timeouts in a row without an arrival.
    pub(super) timeouts: u8,
    /// When to act on it that nothing has arrived; means nothing while nothing is under way.
    pub(super) timeout_at: Instant,
    /// While there are timeouts: since when nothing has come.
    pub(super) quiet_since: Instant,
    /// The silence in which replicas were asked already, by its beginning.
    pub(super) hedged_since: Instant,
    /// It is busy until then.
    pub(super) busy_until: Instant,
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
    /// Segments asked of this store and neither arrived nor given up.
    pub(super) in_flight: u32,
    /// Bytes of the segments that it is asked for: what the path to it carries.
    pub(super) segment_bytes: u16,
    /// PULLs in segments larger than the least of which nothing came, since a plane in such segments arrived.
    pub(super) untouched: u8,
    /// Chunk slots, plane slots and segments of memory that are kept for it.
    pub(super) chunks: u32,
    pub(super) planes: u32,
    pub(super) memory: u32,
}

impl Store {
    pub(super) fn new(config: &FetchConfig) -> Store {
        Store {
            rtt: Rtt::new(nanos_of(config.rto_min), nanos_of(config.rto_max)),
            rack: Rack::NEW,
            window: Window::OPEN,
            latency: Latency::NEW,
            asks: AskList::default(),
            timeouts: 0,
            timeout_at: Instant::FAR,
            quiet_since: Instant::ZERO,
            hedged_since: Instant::ZERO,
            busy_until: Instant::ZERO,
            gone_until: Instant::ZERO,
            epoch: 0,
            knock_at: Instant::ZERO,
            knock: None,
            waiting: List::EMPTY,
            is_due: false,
            in_flight: 0,
            segment_bytes: config.segment_bytes,
            untouched: 0,
            chunks: 0,
            planes: 0,
            memory: 0,
        }
    }

    /// Nothing came for so long that it may be gone.
    #[inline]
    pub(super) fn is_silent(&self) -> bool {
        self.timeouts >= SILENT_TIMEOUTS
    }

    /// Whether to ask it rather than a replica.
    pub(super) fn is_usable(&self, now: Instant) -> bool {
        !self.is_silent() && self.busy_until <= now
    }

    /// Segments that may be asked of this store beyond those under way, of a link that holds `cap`.
    #[inline]
    pub(super) fn room(&self, now: Instant, cap: u32, pull: u32) -> u32 {
        if self.busy_until > now {
            return 0;
        }
        let limit = if self.is_silent() { pull } else { self.window.limit().min(cap) };
        limit.saturating_sub(self.in_flight)
    }

    /// How long to wait for an arrival, nanoseconds: first for a tail probe, then, doubling, to give up all.
    #[inline]
    pub(super) fn timeout(&self) -> u64 {
        match self.timeouts {
            0 => self.rtt.pto(),
            again => self.rtt.rto(again - 1),
        }
    }

    /// Since when something is under way and nothing has come.
    pub(super) fn quiet_since(&self) -> Instant {
        match self.timeouts {
            0 => Instant::from_nanos(self.timeout_at.nanos().saturating_sub(self.rtt.pto())),
            _ => self.quiet_since,
        }
    }

    /// How long a response may take before a replica is asked: the 99th percentile of those seen, but no less than a
    /// usual one.
    pub(super) fn hedge_after(&self) -> u64 {
        let usual = self.rtt.smoothed().map_or(0, |rtt| rtt + rtt / 2);
        self.latency.p99().unwrap_or(self.rtt.pto()).max(usual)
    }

    /// Something came from it.
    #[inline]
    pub(super) fn heard(&mut self, now: Instant) {
        self.timeouts = 0;
        self.gone_until = Instant::ZERO;
        self.timeout_at = now.plus_nanos(self.rtt.pto());
    }

    /// It cannot be reached, it seems.
    pub(super) fn fall_silent(&mut self) {
        self.timeouts = self.timeouts.max(SILENT_TIMEOUTS);
    }

    /// It cannot be reached, and was not heard since.
    pub(super) fn is_gone(&self, now: Instant) -> bool {
        self.gone_until > now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_store_is_asked_for_one_pull_and_a_busy_one_for_nothing() {
        let now = Instant::from_nanos(100);
        let mut store = Store::new(&FetchConfig::default());
        assert!(store.is_usable(now));
        assert_eq!(store.room(now, 1000, 16), 1000);
        store.in_flight = 10;
        store.timeouts = SILENT_TIMEOUTS;
        assert!(!store.is_usable(now));
        assert_eq!(store.room(now, 1000, 16), 6);
        store.heard(now);
        assert_eq!(store.room(now, 1000, 16), 990);
        store.busy_until = Instant::from_nanos(101);
        assert!(!store.is_usable(now));
        assert_eq!(store.room(now, 1000, 16), 0);
        assert_eq!(store.room(store.busy_until, 1000, 16), 990);
    }
}
