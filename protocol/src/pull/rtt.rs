//! Round-trip time of one peer: smoothed, its variation, its least, and the timeouts that follow (RFC 9002 section 5
//! and 6.2; RFC 6298).

/// The first timeout, before any sample, as a multiple of the least. RFC 9002 begins with a third of a second, for the
/// Internet; here what is repeated in vain is one LOOKUP.
const INITIAL_RTO_FACTOR: u64 = 2;
/// How long a least round trip is believed: BBR's filter (draft-ietf-ccwg-bbr, MinRTTFilterLen).
const LEAST_FOR_NS: u64 = 10_000_000_000;
/// Least margin of a tail probe over the smoothed round trip: a loop's turn on a busy core. RFC 9002's granularity is
/// a millisecond, for timers of an operating system; we poll.
const GRANULARITY_NS: u64 = 20_000;

/// All times in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rtt {
    /// Zero before the first sample.
    smoothed: u64,
    variation: u64,
    rto: u64,
    pto: u64,
    rto_min: u64,
    rto_max: u64,
    /// No timeout is longer: `rto_max`, unless the round trip is as long. What is given up before its answer can be there is
    /// never answered, however often it is asked for.
    most: u64,
    /// Least of this period and of the one before.
    least: [u64; 2],
    period_from: u64,
}

impl Rtt {
    pub(crate) fn new(rto_min: u64, rto_max: u64) -> Rtt {
        let initial = rto_min.saturating_mul(INITIAL_RTO_FACTOR).min(rto_max);
        Rtt {
            smoothed: 0,
            variation: 0,
            rto: initial,
            pto: rto_min,
            rto_min,
            rto_max,
            most: rto_max,
            least: [u64::MAX; 2],
            period_from: 0,
        }
    }

    /// Takes in a round trip, of which the request spent `waited` in the peer's queue.
    pub(crate) fn sample(&mut self, now: u64, rtt: u64, waited: u64) {
        let rtt = rtt.max(1);
        if self.smoothed == 0 {
            (self.smoothed, self.variation) = (rtt, rtt / 2);
        } else {
            self.variation = self.variation - self.variation / 4 + self.smoothed.abs_diff(rtt) / 4;
            self.smoothed = (self.smoothed - self.smoothed / 8 + rtt / 8).max(1);
        }
        let margin = self.variation.saturating_mul(4);
        self.most = self.rto_max.max(self.smoothed.saturating_add(self.smoothed / 2));
        self.rto = self.smoothed.saturating_add(margin).clamp(self.rto_min, self.most);
        self.pto = self.smoothed.saturating_add(margin.max(GRANULARITY_NS)).min(self.most);
        if now.saturating_sub(self.period_from) >= LEAST_FOR_NS {
            self.least = [u64::MAX, self.least[0]];
            self.period_from = now;
        }
        // A peer that says to have waited for longer than the round trip took is not believed.
        let base = if waited < rtt { rtt - waited } else { rtt };
        self.least[0] = self.least[0].min(base);
    }

    /// Takes in that a round trip takes no longer than this: from the first of several transmissions to an answer. Before any sample, no
    /// timeout is shorter.
    pub(crate) fn is_at_most(&mut self, rtt: u64) {
        if self.smoothed == 0 {
            self.most = self.most.max(rtt.saturating_add(rtt / 2));
            (self.rto, self.pto) = (self.rto.max(rtt), self.pto.max(rtt));
        }
    }

    /// Smoothed round-trip time, once measured.
    #[inline]
    pub(crate) fn smoothed(&self) -> Option<u64> {
        (self.smoothed != 0).then_some(self.smoothed)
    }

    /// The round trip without queues, once measured.
    pub(crate) fn least(&self) -> Option<u64> {
        let least = self.least[0].min(self.least[1]);
        (least != u64::MAX).then_some(least)
    }

    /// How long to wait for an arrival before asking for the last segment again.
    #[inline]
    pub(crate) fn pto(&self) -> u64 {
        self.pto
    }

    /// How long to wait for an arrival before everything counts as lost, after `backoff` doublings.
    pub(crate) fn rto(&self, backoff: u8) -> u64 {
        self.rto.saturating_mul(1 << backoff.min(20)).min(self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_as_rfc_6298_says() {
        let mut rtt = Rtt::new(10, 1_000_000);
        assert_eq!(rtt.rto(0), 20);
        rtt.sample(0, 8000, 0);
        assert_eq!(rtt.rto(0), 8000 + 4 * 4000);
        rtt.sample(0, 16_000, 0);
        // variation = 3/4 * 4000 + 1/4 * 8000, smoothed = 7/8 * 8000 + 1/8 * 16000.
        assert_eq!(rtt.rto(0), 9000 + 4 * 5000);
        assert_eq!(rtt.rto(2), 4 * 29_000);
        assert_eq!(rtt.rto(20), 1_000_000);
        assert_eq!(rtt.pto(), 9000 + 20_000);
    }

    #[test]
    fn an_answer_to_one_of_several_transmissions_bounds_the_round_trip() {
        let mut rtt = Rtt::new(10, 1000);
        assert_eq!((rtt.pto(), rtt.rto(0)), (10, 20));
        rtt.is_at_most(4000);
        assert_eq!((rtt.pto(), rtt.rto(0), rtt.rto(1)), (4000, 4000, 6000));
        assert_eq!(rtt.least(), None, "it is no sample");
        rtt.sample(0, 50, 0);
        rtt.is_at_most(8000);
        assert_eq!(rtt.rto(0), 50 + 4 * 25);
    }

    #[test]
    fn no_timeout_is_shorter_than_the_round_trip() {
        let mut rtt = Rtt::new(10, 1000);
        (0..100).for_each(|_| rtt.sample(0, 4000, 0));
        assert!(rtt.pto() > 4000, "{rtt:?}");
        assert_eq!(rtt.rto(1), 6000);
        (0..100).for_each(|_| rtt.sample(0, 100, 0));
        assert_eq!(rtt.rto(20), 1000);
    }

    #[test]
    fn the_least_is_without_the_peers_queue_and_is_forgotten() {
        let mut rtt = Rtt::new(10, 1_000_000);
        assert_eq!(rtt.least(), None);
        rtt.sample(0, 10_000, 4000);
        assert_eq!(rtt.least(), Some(6000));
        rtt.sample(0, 10_000, 20_000);
        assert_eq!(rtt.least(), Some(6000));
        rtt.sample(LEAST_FOR_NS, 9000, 0);
        assert_eq!(rtt.least(), Some(6000));
        rtt.sample(2 * LEAST_FOR_NS, 9500, 0);
        assert_eq!(rtt.least(), Some(9000));
    }
}
