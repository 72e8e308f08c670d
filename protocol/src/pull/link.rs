//! How much may be under way over all peers: the receiver's own link, which it alone fills.
//!
//! The link holds its rate times the round trip (the bandwidth-delay product). What is asked for beyond that waits in
//! the last switch's queue, so no more than [`Link::burst`] is. The rate is given by flag, or measured as BBR does
//! (Cardwell et al., ACM Queue 2016; draft-ietf-ccwg-bbr): the most that arrived in a round trip, of the last ten.

use crate::time::Instant;

/// Bytes on the wire beside a full segment: DATA header 32, UDP 8, IPv4 20, Ethernet 14 and 4, preamble and gap 20.
/// With IPv6 it is 20 more, which the burst has room for.
const OVERHEAD_BYTES: u64 = 98;
/// Under way before anything is known: what QUIC's initial window of 10 packets (RFC 9002 section 7.2) has become on
/// data-centre links, and little beside the smallest switch buffers.
const INITIAL: u32 = 64;
/// The round trip that is assumed before one was measured, at a given rate, which paces what is asked for: a data centre's.
const FIRST_BASE_NS: u64 = 50_000;
/// Time that the segments of one PULL take, so that the answers to two peers mix in a few microseconds.
const PULL_NS: u64 = 10_000;
/// Segments of a PULL: a packet of its own must be worth it; a word holds 64.
const PULL: (u32, u32) = (8, 64);
/// A measured rate paces no slower, bytes a second: what losses left of it must not keep more from being measured.
const LEAST_PACE: u64 = 1_250_000;
/// Rounds for which a measured rate is believed: BBR's BtlBw filter.
const ROUNDS: usize = 10;
/// Startup is over when the rate has not grown by a quarter in this many rounds (BBR's full pipe).
const PLATEAU_ROUNDS: u8 = 3;
/// One round in this many asks for a quarter more, to see whether there is more (BBR's ProbeBW gain cycle).
const PROBE_ROUNDS: u8 = 8;
/// One, of shares.
const ONE: u32 = 1 << 10;
/// Weight of a round in the share of lost segments, as a shift.
const LOSS_SHIFT: u32 = 3;
/// Most that the window makes up for loss: lost segments count as under way until that is known.
const MOST_LOSS: u32 = ONE / 8;

/// The credit of an engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    /// Bytes a second on the wire; zero while unknown.
    rate: u64,
    is_given: bool,
    wire_bytes: u64,
    /// The rates of the last rounds in which credit was what limited us.
    rates: [u64; ROUNDS],
    round: u8,
    /// While nothing limits us: what may be under way grows with each arrival.
    startup: Option<u32>,
    plateau: u8,
    ends_after: u64,
    from: Instant,
    bytes: u64,
    arrived: u32,
    lost: u32,
    /// Whether credit was used up in this round.
    was_full: bool,
    losses: u32,
    /// The round trip of the farthest peer without queues; zero while unknown.
    base: u64,
    most: u32,
    cap: u32,
    pull: u32,
}

impl Link {
    /// A link of `mbps`, zero if that is to be measured; never more than `most` segments are under way.
    pub(crate) fn new(mbps: u32, segment_bytes: u16, most: u32) -> Link {
        let mut link = Link {
            rate: u64::from(mbps) * 125_000,
            is_given: mbps > 0,
            wire_bytes: u64::from(segment_bytes) + OVERHEAD_BYTES,
            rates: [0; ROUNDS],
            round: 0,
            startup: Some(INITIAL),
            plateau: 0,
            ends_after: 0,
            from: Instant::ZERO,
            bytes: 0,
            arrived: 0,
            lost: 0,
            was_full: false,
            losses: 0,
            base: 0,
            most,
            cap: 0,
            pull: 0,
        };
        link.refresh();
        link
    }

    /// Segments that may be under way over all peers.
    #[inline]
    pub(crate) fn cap(&self) -> u32 {
        self.cap
    }

    /// Segments of a PULL.
    #[inline]
    pub(crate) fn pull(&self) -> u32 {
        self.pull
    }

    /// Segments that may be under way beyond what the link holds: one PULL that arrives, one that is asked for.
    pub(crate) fn burst(&self) -> u32 {
        2 * self.pull
    }

    /// The size of segments has changed.
    pub(crate) fn set_segment_bytes(&mut self, segment_bytes: u16) {
        self.wire_bytes = u64::from(segment_bytes) + OVERHEAD_BYTES;
    }

    /// Bytes a second at which answers may be asked for, and the bytes that a segment counts: a little more than the
    /// rate, since the cap bounds the queue and lost requests leave gaps. Zero is no bound.
    pub(crate) fn pace(&self) -> (u64, u64) {
        let rate = match (self.is_given, self.startup) {
            (true, _) => self.rate / 20 * 21,
            (false, _) if self.rate == 0 => 0,
            // BBR's startup gain of 2/ln 2, and its probing gain.
            (false, Some(_)) => (self.rate * 289 / 100).max(LEAST_PACE),
            (false, None) => (self.rate / 4 * 5).max(LEAST_PACE),
        };
        (rate, self.wire_bytes)
    }

    /// Mbit/s of segments that a peer need not exceed; zero while unknown.
    pub(crate) fn peer_pace_mbps(&self) -> u32 {
        if self.is_given { u32::try_from(self.pace().0 / 125_000).unwrap_or(u32::MAX) } else { 0 }
    }

    /// Takes in the arrival of a segment of `bytes`.
    #[inline]
    pub(crate) fn arrived(&mut self, bytes: u32) {
        self.arrived = self.arrived.saturating_add(1);
        self.bytes = self.bytes.saturating_add(u64::from(bytes) + OVERHEAD_BYTES);
        if let Some(window) = &mut self.startup
            && !self.is_given
            && self.was_full
        {
            *window = window.saturating_add(1);
            self.cap = (*window).min(self.most);
        }
    }

    /// Takes in that segments were given up as lost.
    pub(crate) fn lost(&mut self, segments: u32) {
        self.lost = self.lost.saturating_add(segments);
    }

    /// Takes in that more would have been asked for, but for the cap.
    #[inline]
    pub(crate) fn is_full(&mut self) {
        self.was_full = true;
    }

    /// Whether the arrival of something asked for by the PULL at `order` ends a round.
    #[inline]
    pub(crate) fn is_over(&self, order: u64) -> bool {
        order > self.ends_after
    }

    /// Takes in the round trip of the farthest peer, without queues but with jitter.
    pub(crate) fn set_base(&mut self, base: u64) {
        self.base = base;
        self.refresh();
    }

    /// Ends a round: the next ends with what is asked for after `last_order`. `congested` says that a queue was seen, `full`
    /// that credit is used up still.
    pub(crate) fn end_round(&mut self, now: Instant, last_order: u64, congested: bool, full: bool) {
        self.was_full &= full;
        let seen = self.arrived.saturating_add(self.lost).max(1);
        let share = u32::try_from(u64::from(self.lost) * u64::from(ONE) / u64::from(seen)).unwrap_or(ONE);
        self.losses = self.losses - (self.losses >> LOSS_SHIFT) + (share >> LOSS_SHIFT);
        if !self.is_given {
            self.measure(now, congested);
        }
        self.ends_after = last_order;
        (self.from, self.bytes, self.arrived, self.lost, self.was_full) = (now, 0, 0, 0, false);
        self.refresh();
    }

    fn measure(&mut self, now: Instant, congested: bool) {
        let nanos = now.nanos().saturating_sub(self.from.nanos());
        let began = self.from != Instant::ZERO;
        if nanos == 0 || !began || !(self.was_full || self.rate_of(nanos) > self.rate) {
            return;
        }
        let (before, measured) = (self.rate, self.rate_of(nanos));
        self.round = (self.round + 1) % (PROBE_ROUNDS * 5);
        self.rates[usize::from(self.round) % ROUNDS] = measured;
        self.rate = self.rates.iter().copied().max().unwrap_or(0);
        if self.startup.is_some() {
            self.plateau = if self.rate > before / 4 * 5 { 0 } else { self.plateau + 1 };
            if congested || self.plateau >= PLATEAU_ROUNDS {
                self.startup = None;
            }
        }
    }

    fn rate_of(&self, nanos: u64) -> u64 {
        let rate = u128::from(self.bytes) * 1_000_000_000 / u128::from(nanos.max(1));
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    fn refresh(&mut self) {
        let (least, most) = PULL;
        let per_pull = self.rate / self.wire_bytes * PULL_NS / 1_000_000_000;
        let pull = u32::try_from(per_pull).unwrap_or(most).clamp(least, most);
        let base = if self.base > 0 { self.base } else { FIRST_BASE_NS };
        let product = u128::from(self.rate) * u128::from(base) / 1_000_000_000;
        let holds = u32::try_from(product / u128::from(self.wire_bytes)).unwrap_or(u32::MAX);
        let makes_up = u64::from(ONE + 2 * self.losses.min(MOST_LOSS));
        let filled = u64::from(holds.saturating_add(2 * pull)) * makes_up / u64::from(ONE);
        let filled = u32::try_from(filled).unwrap_or(u32::MAX);
        let cap = match (self.is_given, self.startup) {
            (true, _) if self.base > 0 => filled,
            (true, _) => filled.max(INITIAL),
            (false, Some(window)) => window,
            (false, None) if self.round.is_multiple_of(PROBE_ROUNDS) => filled.saturating_add(holds / 4),
            (false, None) => filled,
        };
        self.cap = cap.clamp(1, self.most);
        self.pull = pull.min(self.cap / 4).max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_link_holds_its_product_and_a_burst() {
        // 10 Gbit/s, 50 us: 62,500 bytes, 40 segments of 1,538 on the wire.
        let mut link = Link::new(10_000, 1440, 1 << 20);
        assert_eq!(link.cap(), INITIAL, "before the first round trip");
        link.set_base(50_000);
        assert_eq!((link.cap(), link.pull(), link.burst()), (40 + 16, 8, 16));
        assert_eq!(link.pace(), (1_250_000_000 / 20 * 21, 1538));
        // 10 ms hold 200 times as much; 400 Gbit/s at 50 us 40 times.
        link.set_base(10_000_000);
        assert_eq!(link.cap(), 8127 + 16);
        let mut link = Link::new(400_000, 1440, 1 << 20);
        assert_eq!(link.cap(), 1625 + 128, "as if the path were short");
        link.set_base(50_000);
        assert_eq!((link.cap(), link.pull()), (1625 + 128, 64));
        let mut link = Link::new(400_000, 1440, 100);
        link.set_base(50_000);
        assert_eq!((link.cap(), link.pull()), (100, 25), "no more than there is memory for");
    }

    #[test]
    fn lost_segments_are_made_up_for_but_not_without_end() {
        let mut link = Link::new(10_000, 1440, 1 << 20);
        link.set_base(10_000_000);
        let lossless = link.cap();
        for order in 1..100 {
            for _ in 0..950 {
                link.arrived(1440);
            }
            link.lost(50);
            link.end_round(Instant::from_nanos(order * 10_000_000), order, false, true);
        }
        let share = f64::from(link.cap()) / f64::from(lossless);
        assert!((1.08..1.1).contains(&share), "{share}");
        for order in 100..200 {
            link.lost(50);
            link.end_round(Instant::from_nanos(order * 10_000_000), order, false, true);
        }
        assert_eq!(link.cap(), lossless + lossless / 4);
    }

    /// Rounds over a link that lets `rate` segments through in a round of 100 us.
    fn run(link: &mut Link, rate: u32, rounds: std::ops::Range<u64>) {
        for round in rounds {
            link.is_full();
            for _ in 0..link.cap().min(rate) {
                link.arrived(1440);
            }
            link.set_base(100_000);
            link.end_round(Instant::from_nanos((round + 1) * 100_000), round, false, true);
        }
    }

    #[test]
    fn an_unknown_rate_is_found_and_followed() {
        let mut link = Link::new(0, 1440, 1 << 20);
        assert_eq!(link.pace().0, 0, "nothing is known, nothing is paced");
        run(&mut link, 5000, 0..20);
        assert!((5000..6600).contains(&link.cap()), "{}", link.cap());
        run(&mut link, 50_000, 20..200);
        assert!(link.cap() >= 50_000, "{}", link.cap());
        run(&mut link, 500, 200..260);
        assert!((500..800).contains(&link.cap()), "{}", link.cap());
    }
}
