//! What is given up as lost, and peers that want to be left alone.

use crate::time::Instant;

use super::asks::Ask;
use super::index::{Index, PathIndex, SpanIndex};
use super::puller::{Puller, TimedOut};

/// Least time that a busy peer is left alone, nanoseconds.
const LEAST_RETRY_NS: u64 = 20_000;
/// Most of the same: a peer that says more is asked again all the same.
const MOST_RETRY_NS: u64 = 50_000_000;

/// Of a PULL something was given up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GivenUp {
    /// What it was for.
    pub(crate) span: SpanIndex,
    /// Nothing of it has come, nor will.
    pub(crate) was_in_vain: bool,
}

impl Puller {
    /// The next PULL of which something was given up; the owner polls until `None` after each call that gives something up.
    pub(crate) fn poll_given_up(&mut self) -> Option<GivenUp> {
        let Ask { span, is_untouched, outstanding, .. } = *self.asks.get(self.given_up.pop_front()?);
        Some(GivenUp { span, was_in_vain: is_untouched && outstanding == 0 })
    }

    /// Gives up PULLs of a path that are late while something asked for later has arrived; returns how many segments.
    pub(crate) fn find_losses(&mut self, now: Instant, index: PathIndex) -> u32 {
        let (mut lost, mut drops) = (0, 0);
        loop {
            let path = &self.paths[index.at()];
            let (Some(oldest), Some(smoothed)) = (path.asks.oldest(), path.rtt.smoothed()) else { break };
            let ask = self.asks.get(oldest);
            match path.rack.lost_at(ask.order, ask.sent_at.nanos(), smoothed) {
                None => break,
                Some(at) if at > now.nanos() => {
                    self.arm(Instant::from_nanos(at));
                    break;
                }
                Some(_) => {
                    // Of a PULL that brought nothing, one packet was lost: the PULL.
                    let is_pull = ask.is_untouched;
                    let segments = self.give_up(oldest, ask.outstanding);
                    lost += segments;
                    drops += if is_pull { 1 } else { segments };
                }
            }
        }
        if lost > 0 {
            self.paths[index.at()].rack.found();
            self.note_lost(index, lost, drops);
        }
        lost
    }

    fn note_lost(&mut self, path: PathIndex, segments: u32, drops: u32) {
        self.paths[path.at()].window.lost(drops);
        self.link.lost(segments);
    }

    /// If nothing has come from a peer for too long: the first time its last segment is given up, to be asked for again, so that the
    /// answer shows what else is missing; then all, and again, ever later.
    pub(crate) fn time_out(&mut self, now: Instant, index: PathIndex) -> TimedOut {
        let path = &mut self.paths[index.at()];
        if path.in_flight == 0 {
            return TimedOut::No;
        }
        if path.timeout_at > now {
            let at = path.timeout_at;
            self.arm(at);
            return TimedOut::No;
        }
        let done = if path.timeouts == 0 {
            path.quiet_since = path.quiet_since();
            path.timeouts = 1;
            self.probe_tail(index);
            TimedOut::Probed
        } else {
            let mut lost = 0;
            while let Some(oldest) = self.paths[index.at()].asks.oldest() {
                lost += self.give_up(oldest, self.asks.get(oldest).outstanding);
            }
            self.note_lost(index, lost, lost);
            TimedOut::All(lost, self.paths[index.at()].note_timeout())
        };
        let path = &mut self.paths[index.at()];
        path.timeout_at = now.plus_nanos(path.timeout());
        let at = path.timeout_at;
        self.arm(at);
        done
    }

    /// Gives up the last segment of the PULL sent last.
    fn probe_tail(&mut self, path: PathIndex) {
        let newest = self.paths[path.at()].asks.newest().expect("something is under way");
        let outstanding = self.asks.get(newest).outstanding;
        self.give_up(newest, 1 << (63 - outstanding.leading_zeros()));
    }

    /// A peer is busy: it is asked for nothing for so long, within bounds, and then for less. What the PULL that it could not take would
    /// have brought is given up.
    pub(crate) fn rest(&mut self, now: Instant, index: PathIndex, nanos: u64, refused: Option<u32>) {
        if let Some(ask) = refused.and_then(|sequence| self.asks.under_way(sequence, index)) {
            self.give_up(ask, self.asks.get(ask).outstanding);
        }
        let until = now.plus_nanos(nanos.clamp(LEAST_RETRY_NS, MOST_RETRY_NS));
        let path = &mut self.paths[index.at()];
        if path.busy_until <= until {
            if path.busy_until == Instant::ZERO {
                let in_flight = path.in_flight;
                path.window.busy(in_flight);
            }
            path.busy_until = until;
            self.arm(until);
        }
    }

    /// Whether a peer has been left alone for long enough now; true once.
    pub(crate) fn has_rested(&mut self, now: Instant, index: PathIndex) -> bool {
        let path = &mut self.paths[index.at()];
        let until = path.busy_until;
        if until > now {
            self.arm(until);
            return false;
        }
        path.busy_until = Instant::ZERO;
        until != Instant::ZERO
    }
}
