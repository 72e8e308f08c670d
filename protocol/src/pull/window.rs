//! How much may be asked of one peer: congestion control by delay.
//!
//! The window follows the law of FAST TCP (Wei, Jin, Low, Hegde: "FAST TCP", IEEE/ACM ToN 2006, eq. 1): once a round trip
//! it goes half the way to `window * base / rtt + share`, whose fixed point keeps `share` segments of this puller in
//! the bottleneck's queue. Pullers that share a bottleneck see the same delay, so they end with the same rate, in
//! a few round trips whatever their number and the link's rate. A delay is counted as queue only beyond a tolerance, the
//! target of Swift (SIGCOMM 2020): below it lies what polling loops and jitter add. The least round trip of each round is
//! looked at, so that jitter is not taken for a queue (CoDel's standing queue).
//!
//! Random loss is no sign of congestion and is ignored up to a share; marks (ECN) shrink the window as DCTCP does.

/// Segments that this puller keeps in the queue of a bottleneck (FAST's alpha) at least: a small PULL's worth; and as
/// a share of what its link can hold, because windows become equal in about `window / alpha` rounds.
const SHARE: (u32, u32) = (8, 32);
/// Least window: one segment arriving, one asked for.
const LEAST: u32 = 2;
/// Rounds without a queue after which the window grows by a quarter each, not by its share: TIMELY's hyperactive increase
/// (SIGCOMM 2015, section 4.3).
const CALM_ROUNDS: u8 = 4;
/// Loss above one in this many segments of a round is congestion: a buffer overflows that is too small to show a delay.
/// BBR version 1 bears 20 %, version 2 2 %; the network may lose 5 % at random.
const LOSS_TOLERANCE: u32 = 8;
/// Losses in a round from which its loss share means something.
const LEAST_LOSSES: u32 = 8;
/// One, of shares.
const ONE: u32 = 1 << 10;
/// Weight of a round in the share of marked segments: DCTCP's g (RFC 8257 section 3.3), as a shift.
const MARK_SHIFT: u32 = 4;
/// Weight of a round in the spread, as a shift.
const SPREAD_SHIFT: u32 = 3;

/// Of one peer, in segments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    limit: u32,
    /// The round ends when something asked for after this PULL arrives.
    ends_after: u64,
    /// Least round trip in this round, nanoseconds; `u64::MAX` before the first.
    least_rtt: u64,
    /// Sum and number of the round trips in this round.
    rtt_sum: u64,
    rtts: u32,
    /// By how much a usual round trip exceeds the least of its round, smoothed over rounds, nanoseconds: jitter, which is
    /// no queue.
    spread: u64,
    arrived: u32,
    marked: u32,
    lost: u32,
    /// Rounds without a queue.
    calm: u8,
    /// Share of marked segments, smoothed, in parts of `ONE`.
    marks: u32,
}

/// What a window is measured with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Round trip without queues, nanoseconds.
    pub(crate) base: u64,
    /// Delay that is not counted as queue, nanoseconds.
    pub(crate) tolerance: u64,
    /// What the link can hold, segments: no window is larger.
    pub(crate) most: u32,
}

impl Window {
    /// Open as far as the link can hold: what is too much shows within a round trip, and is paced until then.
    pub(crate) const OPEN: Window = Window {
        limit: u32::MAX,
        ends_after: 0,
        least_rtt: u64::MAX,
        rtt_sum: 0,
        rtts: 0,
        spread: 0,
        arrived: 0,
        marked: 0,
        lost: 0,
        calm: 0,
        marks: 0,
    };

    /// Segments that may be under way.
    #[inline]
    pub(crate) fn limit(&self) -> u32 {
        self.limit
    }

    /// Takes in an arrival.
    #[inline]
    pub(crate) fn arrived(&mut self, marked: bool) {
        self.arrived = self.arrived.saturating_add(1);
        self.marked = self.marked.saturating_add(marked.into());
    }

    /// Takes in that segments were given up as lost.
    pub(crate) fn lost(&mut self, segments: u32) {
        self.lost = self.lost.saturating_add(segments);
    }

    /// Takes in a round trip, queues included.
    pub(crate) fn sample(&mut self, rtt: u64) {
        self.least_rtt = self.least_rtt.min(rtt);
        self.rtt_sum = self.rtt_sum.saturating_add(rtt);
        self.rtts = self.rtts.saturating_add(1);
    }

    /// By how much a usual round trip exceeds the least of its round, nanoseconds.
    pub(crate) fn spread(&self) -> u64 {
        self.spread
    }

    /// Whether the arrival of something asked for by the PULL at `order` ends a round.
    #[inline]
    pub(crate) fn is_over(&self, order: u64) -> bool {
        order > self.ends_after
    }

    /// The peer asks for less: half, once a round.
    pub(crate) fn busy(&mut self, in_flight: u32) {
        self.limit = self.limit.min(in_flight / 2).max(LEAST);
        self.calm = 0;
    }

    /// Ends a round: the next ends with what is asked for after `last_order`. Returns whether there was congestion.
    pub(crate) fn end_round(&mut self, last_order: u64, bounds: &Bounds) -> bool {
        let before = self.limit.min(bounds.most);
        let (least_rtt, seen) = (self.least_rtt, self.arrived.saturating_add(self.lost));
        let marked = share_of(self.marked, self.arrived);
        self.marks = self.marks - (self.marks >> MARK_SHIFT) + (marked >> MARK_SHIFT);
        if self.rtts > 0 {
            let above = (self.rtt_sum / u64::from(self.rtts)).saturating_sub(least_rtt);
            self.spread = self.spread - (self.spread >> SPREAD_SHIFT) + (above >> SPREAD_SHIFT);
        }
        let overflows = self.lost >= LEAST_LOSSES && self.lost > seen / LOSS_TOLERANCE;
        let next = if overflows {
            before - part(before, share_of(self.lost, seen) / 2)
        } else if marked > 0 {
            before - part(before, self.marks.max(1) / 2)
        } else if least_rtt == u64::MAX {
            before
        } else {
            self.follow_delay(before, least_rtt, bounds)
        };
        let queued = least_rtt != u64::MAX && least_rtt > bounds.base.saturating_add(bounds.tolerance);
        let congested = overflows || marked > 0 || queued;
        self.calm = if congested { 0 } else { self.calm.saturating_add(1) };
        // What the link can hold may grow: a window that it does not feel must not hold it back then.
        let is_open = !congested && next >= bounds.most;
        *self = Window {
            limit: if is_open { u32::MAX } else { next.max(LEAST) },
            ends_after: last_order,
            calm: self.calm,
            marks: self.marks,
            spread: self.spread,
            ..Window::OPEN
        };
        congested
    }

    fn follow_delay(&self, before: u32, rtt: u64, bounds: &Bounds) -> u32 {
        let free = bounds.base.saturating_add(bounds.tolerance).max(1);
        let share = SHARE.0.max(bounds.most / SHARE.1);
        if rtt <= free && self.calm >= CALM_ROUNDS {
            return before.saturating_add(before / 4 + share / 2);
        }
        // Of what is under way, the part that is not in a queue.
        let flying = u128::from(before) * u128::from(free) / u128::from(rtt.max(free));
        let goal = u32::try_from(flying).unwrap_or(u32::MAX).saturating_add(share);
        before / 2 + goal / 2 + (before & goal & 1)
    }
}

/// `some` of `all` in parts of `ONE`, at most all.
fn share_of(some: u32, all: u32) -> u32 {
    let share = u64::from(some) * u64::from(ONE) / u64::from(all.max(1));
    u32::try_from(share).unwrap_or(ONE).min(ONE)
}

fn part(of: u32, share: u32) -> u32 {
    u32::try_from(u64::from(of) * u64::from(share) / u64::from(ONE)).unwrap_or(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: Bounds = Bounds { base: 50_000, tolerance: 20_000, most: 2000 };

    /// Windows that share a bottleneck of `rate` segments a millisecond: after each round all see the same queue.
    fn share(windows: &mut [Window], rate: u64, bounds: &Bounds, rounds: u64) -> u64 {
        let mut rtt = bounds.base;
        for round in 1..=rounds {
            for window in &mut *windows {
                window.sample(rtt);
                window.end_round(round, bounds);
            }
            let under_way: u64 =
                windows.iter().map(|window| u64::from(window.limit().min(bounds.most))).sum();
            rtt = bounds.base.max(under_way * 1_000_000 / rate);
        }
        rtt
    }

    #[test]
    fn windows_at_one_bottleneck_become_equal_and_fill_it() {
        // 10 Gbit/s at 50 us and 10 ms, 100 and 400 Gbit/s at 50 us, and a bottleneck slower than the link.
        let cases = [(833, 50, 56), (833, 10_000, 8400), (8333, 50, 500), (33_333, 50, 1800), (100, 50, 56)];
        for (rate, base_us, most) in cases {
            let bounds = Bounds { base: base_us * 1000, tolerance: 20_000.max(base_us * 250), most };
            let mut windows = [2, most].map(|limit| Window { limit, ..Window::OPEN });
            let rtt = share(&mut windows, rate, &bounds, 150);
            let [a, b] = windows.map(|window| f64::from(window.limit().min(bounds.most)));
            let jain = (a + b) * (a + b) / (2.0 * (a * a + b * b));
            assert!(jain > 0.98, "{a} and {b} at {rate}");
            let under_way: u64 =
                windows.iter().map(|window| u64::from(window.limit().min(bounds.most))).sum();
            assert!(under_way * 1_000_000 / rate >= bounds.base, "the link is full");
            // The tolerance, the shares, and rounding.
            let queue = bounds.tolerance + u64::from(2 * SHARE.0.max(most / SHARE.1) + 4) * 1_000_000 / rate;
            assert!(rtt <= bounds.base + queue, "{rtt} at {rate}");
        }
    }

    #[test]
    fn an_empty_path_is_filled_in_few_rounds() {
        let mut window = Window { limit: 2, ..Window::OPEN };
        for round in 1..40 {
            window.sample(PATH.base);
            assert!(!window.end_round(round, &PATH));
        }
        assert_eq!(window.limit(), u32::MAX, "the link is what limits it");
    }

    #[test]
    fn random_loss_is_borne_and_overflow_is_not() {
        let mut window = Window { limit: 1000, ..Window::OPEN };
        for _ in 0..1000 {
            window.arrived(false);
        }
        window.lost(100);
        window.sample(PATH.base);
        assert!(!window.end_round(1, &PATH));
        assert!(window.limit() >= 1000);
        for _ in 0..500 {
            window.arrived(false);
        }
        window.lost(500);
        let before = window.limit();
        assert!(window.end_round(2, &PATH));
        assert_eq!(window.limit(), before - before / 4);
    }

    #[test]
    fn marks_shrink_the_window_by_their_share() {
        let mut window = Window { limit: 1000, ..Window::OPEN };
        for round in 1..200 {
            for _ in 0..64 {
                window.arrived(true);
            }
            window.end_round(round, &PATH);
        }
        assert_eq!(window.limit(), LEAST, "every segment marked: as if half were lost, each round");
        let mut few = Window { limit: 1000, ..Window::OPEN };
        for segment in 0..1000 {
            few.arrived(segment % 10 == 0);
        }
        few.end_round(1, &PATH);
        assert!((990..1000).contains(&few.limit()), "{}", few.limit());
    }

    /// A peer decides how long a round is: one that names PULLs nobody knows ends none.
    #[test]
    fn a_round_without_end_overflows_nothing() {
        let mut window = Window { arrived: u32::MAX, marked: u32::MAX, rtts: u32::MAX, ..Window::OPEN };
        window.arrived(true);
        window.sample(PATH.base);
        window.lost(u32::MAX);
        assert!(window.end_round(1, &PATH));
        assert!(window.limit() <= PATH.most);
    }

    #[test]
    fn rounds_end_with_what_was_asked_for_after_them() {
        let mut window = Window::OPEN;
        assert!(window.is_over(1));
        window.end_round(7, &PATH);
        assert!(!window.is_over(7) && window.is_over(8));
        window.busy(100);
        assert_eq!(window.limit(), 50);
    }
}
