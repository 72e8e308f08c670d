//! Messages out, which are answers to offers and PULLs, and time: what is given up, chunks that nobody sends any more.

use crate::frame::Peer;
use crate::pull::{Index, PathIndex, SpanIndex, TimedOut, Worth};
use crate::time::{Instant, nanos_of};
use crate::wire::offer;

use super::AcceptEngine;
use super::intake::{IntakeSlot, IntakeState};

impl AcceptEngine {
    /// When to call [`handle_timeout`](Self::handle_timeout) and then [`poll_transmit`](Self::poll_transmit) at the latest: what waits
    /// for its pace is sent by the latter.
    #[inline]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let at = self.puller.poll_timeout();
        (at != Instant::FAR).then_some(at)
    }

    /// Gives up what did not arrive in time, to be asked for again, and chunks that nobody sends any more. Does nothing before
    /// [`poll_timeout`](Self::poll_timeout).
    #[inline]
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.puller.is_due(now) {
            self.scan(now);
        }
    }

    #[cold]
    fn scan(&mut self, now: Instant) {
        let silence = nanos_of(self.config.silence);
        for slot in 0..self.intakes.len() {
            let intake = &self.intakes[slot];
            if intake.state != IntakeState::Pulling {
                continue;
            }
            let give_up_at = intake.heard_at.plus_nanos(silence).min(intake.patience_until);
            if give_up_at <= now {
                self.drop_intake(slot);
            } else {
                self.puller.arm(give_up_at);
            }
        }
        for path in PathIndex::all(self.ports.len()) {
            // Nothing waits for it in particular: whoever sends looks at every path.
            self.puller.has_rested(now, path);
            let lost = self.puller.find_losses(now, path);
            self.counters.segments_lost += u64::from(lost);
            match self.puller.time_out(now, path) {
                TimedOut::No => {}
                TimedOut::Probed => self.counters.tail_probes += 1,
                TimedOut::All(lost, _) => {
                    self.counters.timeouts += 1;
                    self.counters.segments_lost += u64::from(lost);
                }
            }
            self.take_given_up();
        }
    }

    /// What was given up is wanted again, which [`poll_transmit`](Self::poll_transmit) sees by itself.
    pub(super) fn take_given_up(&mut self) {
        while self.puller.poll_given_up().is_some() {}
    }

    /// Writes the next message to `out`, which must hold [`crate::wire::message::MAX_CONTROL_BYTES`]; says to whom it goes and how long
    /// it is.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<(Peer, usize)> {
        if let Some((to, reply)) = self.replies.pop_front() {
            return Some((to, offer::emit_offer_reply(out, &reply)?));
        }
        if !self.wants_to_pull() || self.puller.is_paced(now) || !self.puller.has_credit() {
            return None;
        }
        for _ in 0..self.intakes.len() {
            let slot = self.turn % self.intakes.len();
            if self.intakes[slot].state == IntakeState::Pulling {
                match self.puller.worth(now, super::span_of(slot)) {
                    Worth::Nothing | Worth::Later => {}
                    Worth::Waits => return None,
                    Worth::Segments(budget) => {
                        self.turn = slot + 1;
                        return self.pull(now, slot, budget, out);
                    }
                }
            }
            self.turn = slot + 1;
        }
        None
    }

    fn pull(&mut self, now: Instant, slot: usize, budget: u32, out: &mut [u8]) -> Option<(Peer, usize)> {
        let IntakeSlot { tag, offer, epoch, from, .. } = self.intakes[slot];
        let pulled = self.puller.pull(now, super::span_of(slot), budget, (tag, offer, epoch), out)?;
        self.counters.pulls += 1;
        self.counters.segments_asked += u64::from(pulled.asked);
        self.counters.segments_asked_again += u64::from(pulled.again);
        Some((from, pulled.len))
    }

    fn wants_to_pull(&self) -> bool {
        let mut spans = SpanIndex::all(self.intakes.len());
        spans.any(|span| self.intakes[span.at()].state == IntakeState::Pulling && self.puller.is_wanted(span))
    }

    /// Whether there is something to send that the link's credit allows.
    pub fn wants_to_send(&self) -> bool {
        !self.replies.is_empty() || (self.puller.may_ask() && self.wants_to_pull())
    }
}
