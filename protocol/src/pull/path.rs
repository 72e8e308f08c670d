//! What is known of the way to a peer that is pulled from: round trips, window, losses, what is under way, whether it answers.

use crate::time::Instant;

use super::asks::AskList;
use super::rack::Rack;
use super::rtt::Rtt;
use super::window::Window;

/// Timeouts without an arrival in between after which a peer counts as silent: it is only probed, with one PULL's worth
/// under way.
const SILENT_TIMEOUTS: u8 = 2;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    pub(crate) rtt: Rtt,
    pub(super) rack: Rack,
    pub(super) window: Window,
    /// PULLs under way.
    pub(super) asks: AskList,
    /// Timeouts in a row without an arrival.
    pub(super) timeouts: u8,
    /// When to act on it that nothing has arrived; means nothing while nothing is under way.
    pub(super) timeout_at: Instant,
    /// While there are timeouts: since when nothing has come.
    pub(super) quiet_since: Instant,
    /// The peer is busy until then.
    pub(super) busy_until: Instant,
    /// Segments asked for and neither arrived nor given up.
    pub(super) in_flight: u32,
    /// What its owner wants of the peer: chunks.
    pub(crate) users: u32,
}

impl Path {
    /// A path of which nothing is known.
    pub(super) fn new(rto_min: u64, rto_max: u64) -> Path {
        Path {
            rtt: Rtt::new(rto_min, rto_max),
            rack: Rack::NEW,
            window: Window::OPEN,
            asks: AskList::default(),
            timeouts: 0,
            timeout_at: Instant::FAR,
            quiet_since: Instant::ZERO,
            busy_until: Instant::ZERO,
            in_flight: 0,
            users: 0,
        }
    }

    /// Nothing came for so long that the peer may be gone.
    #[inline]
    pub(crate) fn is_silent(&self) -> bool {
        self.timeouts >= SILENT_TIMEOUTS
    }

    /// Whether the peer wants to be left alone for now.
    pub(crate) fn is_busy(&self, now: Instant) -> bool {
        self.busy_until > now
    }

    /// Whether to ask this peer rather than another.
    pub(crate) fn is_usable(&self, now: Instant) -> bool {
        !self.is_silent() && !self.is_busy(now)
    }

    /// Segments asked for and neither arrived nor given up.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Segments that may be asked for beyond those under way, of a link that holds `cap`.
    #[inline]
    pub(super) fn room(&self, now: Instant, cap: u32, pull: u32) -> u32 {
        if self.is_busy(now) {
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
    pub(crate) fn quiet_since(&self) -> Instant {
        match self.timeouts {
            0 => Instant::from_nanos(self.timeout_at.nanos().saturating_sub(self.rtt.pto())),
            _ => self.quiet_since,
        }
    }

    /// Something came from the peer.
    #[inline]
    pub(super) fn heard(&mut self, now: Instant) {
        self.timeouts = 0;
        self.timeout_at = now.plus_nanos(self.rtt.pto());
    }

    /// The peer cannot be reached, it seems.
    pub(crate) fn fall_silent(&mut self) {
        self.timeouts = self.timeouts.max(SILENT_TIMEOUTS);
    }

    /// Counts a timeout; whether the peer is silent since this one.
    pub(crate) fn note_timeout(&mut self) -> bool {
        let was_silent = self.is_silent();
        self.timeouts = self.timeouts.saturating_add(1);
        !was_silent && self.is_silent()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_peer_is_asked_for_one_pull_and_a_busy_one_for_nothing() {
        let now = Instant::from_nanos(100);
        let mut path = Path::new(1000, 1_000_000);
        assert_eq!(path.room(now, 1000, 16), 1000);
        path.in_flight = 10;
        assert!(!path.note_timeout());
        assert!(path.note_timeout(), "it is silent now");
        assert!(!path.note_timeout(), "it was before");
        assert!(!path.is_usable(now));
        assert_eq!(path.room(now, 1000, 16), 6);
        path.heard(now);
        assert!(path.is_usable(now));
        assert_eq!(path.room(now, 1000, 16), 990);
        path.busy_until = Instant::from_nanos(101);
        assert!(!path.is_usable(now));
        assert_eq!(path.room(now, 1000, 16), 0);
        assert_eq!(path.room(path.busy_until, 1000, 16), 990);
    }
}
