//! Segments in, and what they say of the way: the round trip, what must be lost, how much may be under way.

use crate::reason::DropReason;
use crate::time::Instant;

use super::index::{AskIndex, Index, PathIndex, SpanIndex};
use super::path::Path;
use super::puller::{Arrival, Puller, TakenIn};
use super::segments;
use super::window::Bounds;

/// The tolerated delay is at least this share of the least round trip.
const TOLERANCE_SHARE: u64 = 4;

impl Puller {
    /// Takes in a segment of a span that is being pulled, from its peer.
    #[inline]
    pub(crate) fn take_in(
        &mut self,
        now: Instant,
        index: SpanIndex,
        arrival: &Arrival,
    ) -> Result<TakenIn, DropReason> {
        let span = &mut self.spans[index.at()];
        let bytes = span.check(arrival.segment, arrival.bytes)?;
        let first_word = index.at() * self.span_words;
        let (word, bit) = segments::place(arrival.segment);
        let word = &mut self.words[first_word + word];
        if word.arrived & bit != 0 {
            return Err(DropReason::Duplicate);
        }
        word.arrived |= bit;
        span.arrived += 1;
        let path = &mut self.paths[span.path.at()];
        let mut asked_by = None;
        if word.asked & bit != 0 {
            word.asked &= !bit;
            let ask = self.asked_by[first_word * 64 + arrival.segment as usize];
            asked_by = Some(ask);
            span.in_flight -= 1;
            path.in_flight -= 1;
            self.in_flight -= 1;
            let base = self.asks.get(ask).base;
            self.asks.arrived(&mut path.asks, ask, 1 << (arrival.segment - base));
        }
        path.window.arrived(arrival.is_marked);
        let (path, is_whole) = (span.path, span.is_whole());
        self.link.arrived(bytes);
        self.heard(now, path);
        let (is_late, round_trip) = self.note_answer(now, index, arrival, asked_by);
        Ok(TakenIn { is_whole, is_late, round_trip })
    }

    /// Something came from a peer: what else it was asked for may be waited for anew, perhaps not as long as before.
    #[inline]
    pub(crate) fn heard(&mut self, now: Instant, path: PathIndex) {
        let path = &mut self.paths[path.at()];
        path.heard(now);
        if path.in_flight > 0 {
            let at = path.timeout_at;
            self.arm(at);
        }
    }

    /// Learns from the PULL that a segment answers: whether it was lost at all, and the round trip. What the peer says of the PULL is
    /// believed only if that PULL was for this segment.
    #[inline]
    fn note_answer(
        &mut self,
        now: Instant,
        index: SpanIndex,
        arrival: &Arrival,
        asked_by: Option<AskIndex>,
    ) -> (bool, Option<u64>) {
        let Some(ask) = self.asks.find(arrival.sequence) else { return (false, None) };
        let path_index = self.spans[index.at()].path;
        let place = arrival.segment.wrapping_sub(ask.base);
        if ask.path != path_index || ask.span != index || place >= 64 {
            return (false, None);
        }
        let (order, rtt) = (ask.order, now.nanos().saturating_sub(ask.sent_at.nanos()));
        let is_late = asked_by.is_none_or(|by| self.asks.get(by).sequence != arrival.sequence);
        if is_late {
            self.paths[path_index.at()].rack.was_late(order, self.asks.last_order());
        }
        let round_trip = (place == 0).then_some(rtt);
        if place == 0 {
            self.take_round_trip(now, path_index, rtt, u64::from(arrival.waited_ns));
        }
        let path = &mut self.paths[path_index.at()];
        if path.rack.arrived(order, rtt)
            && let Some(smoothed) = path.rtt.smoothed()
            && let Some(oldest) = path.asks.oldest()
        {
            let oldest = self.asks.get(oldest);
            if let Some(at) = path.rack.lost_at(oldest.order, oldest.sent_at.nanos(), smoothed) {
                self.arm(Instant::from_nanos(at));
            }
        }
        if self.paths[path_index.at()].window.is_over(order) {
            self.end_path_round(path_index);
        }
        if self.link.is_over(order) {
            self.end_link_round(now);
        }
        (is_late, round_trip)
    }

    /// Takes in a round trip of something that was asked for once, or whose answer says by which request; of it the request spent
    /// `waited` in the peer's queue. Nanoseconds.
    pub(crate) fn take_round_trip(&mut self, now: Instant, path: PathIndex, rtt: u64, waited: u64) {
        let path = &mut self.paths[path.at()];
        let was_unknown = path.rtt.least().is_none();
        path.rtt.sample(now.nanos(), rtt, waited);
        path.window.sample(rtt);
        if was_unknown {
            self.measure_base();
        }
    }

    #[cold]
    fn end_path_round(&mut self, path: PathIndex) {
        let path = &mut self.paths[path.at()];
        let Some(base) = path.rtt.least() else { return };
        let tolerance = self.tolerance_ns.max(base / TOLERANCE_SHARE);
        let bounds = Bounds { base, tolerance, most: self.link.cap() };
        self.congested |= path.window.end_round(self.asks.last_order(), &bounds);
    }

    #[cold]
    fn end_link_round(&mut self, now: Instant) {
        let full = self.in_flight >= self.link.cap() / 4 * 3;
        self.link.end_round(now, self.asks.last_order(), self.congested, full);
        self.congested = false;
        self.measure_base();
    }

    /// Tells the link how far its farthest peer is, of those that are asked for something.
    fn measure_base(&mut self) {
        let asked = self.paths.iter().filter(|path| path.users > 0 || path.in_flight > 0);
        // Jitter keeps segments under way for longer without filling a queue.
        let usual = |path: &Path| path.rtt.least().map(|least| least + path.window.spread().min(least));
        if let Some(base) = asked.filter_map(usual).max() {
            self.link.set_base(base);
        }
        let (rate, wire_bytes) = self.link.pace();
        self.pacer.set_rate(rate, wire_bytes, self.link.burst());
    }
}
