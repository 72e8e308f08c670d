//! Round-trip time of one peer: smoothed, its variation, its least, and the timeouts that follow (RFC 9002 section 5
//! and 6.2; RFC 6298).

/// The first timeout, before any sample, as a multiple of the least. RFC 9002 begins with a third of a second, for the
/// Internet; here what is repeated in vain is one LOOKUP.
const INITIAL_RTO_FACTOR: u64 = 2;
/// How long a least round trip is believed: BBR's filter (draft-ietf-ccwg-bbr, MinRTTFilterLen).
const LEAST_FOR_NS: u64 = 10_000_000_000;
/// No round trip is taken for longer, and no timeout is for its sake: what took longer was not on its way but met somebody who was down.
const MOST_RTT_NS: u64 = 1_000_000_000;
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
    /// Least first wait for a LOOKUP's answer, since one was answered only when repeated; zero again with the next sample.
    kept: u64,
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
            kept: 0,
            most: rto_max,
            least: [u64::MAX; 2],
            period_from: 0,
        }
    }

    /// Takes in a round trip, of which the request spent `waited` in the peer's queue.
    pub(crate) fn sample(&mut self, now: u64, rtt: u64, waited: u64) {
        let rtt = rtt.clamp(1, MOST_RTT_NS);
        self.kept = 0;
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

    /// Takes in that a round trip takes no longer than `rtt`, from the first of several transmissions to an answer; the last was waited for
    /// `wait` before it would have been repeated. Before any sample, no timeout after the first is shorter. The next LOOKUP is given
    /// more time than this one until a sample comes (RFC 6298 section 5.7 keeps the timeout): what is always sent twice is never measured.
    pub(crate) fn bound(&mut self, rtt: u64, wait: u64) {
        let rtt = rtt.clamp(1, MOST_RTT_NS);
        let enough = rtt + rtt / 2;
        if self.smoothed == 0 {
            self.most = self.most.max(enough);
            self.rto = self.rto.max(rtt);
        }
        self.kept = wait.max(self.kept).saturating_mul(2).min(enough);
    }

    /// How long to wait for the answer to a LOOKUP before it is sent a second time.
    pub(crate) fn first_wait(&self) -> u64 {
        self.pto.max(self.kept)
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
        rtt.bound(4000, 20);
        assert_eq!((rtt.pto(), rtt.rto(0), rtt.rto(1)), (10, 4000, 6000));
        assert_eq!(rtt.least(), None, "it is no sample");
        rtt.sample(0, 50, 0);
        rtt.bound(8000, 20);
        assert_eq!(rtt.rto(0), 50 + 4 * 25);
    }

    #[test]
    fn a_peer_that_was_down_is_not_taken_for_far_away() {
        let mut rtt = Rtt::new(2_000_000, 200_000_000);
        rtt.bound(6_000_000_000, 200_000_000);
        assert_eq!((rtt.pto(), rtt.rto(0)), (2_000_000, MOST_RTT_NS));
        assert_eq!(rtt.first_wait(), 400_000_000, "until the next answer");
        rtt.sample(0, 60_000_000_000, 0);
        assert!(rtt.pto() <= MOST_RTT_NS * 3 / 2 && rtt.rto(20) <= MOST_RTT_NS * 3 / 2, "{rtt:?}");
    }

    /// RFC 6298 section 5.7.
    #[test]
    fn what_was_answered_only_when_repeated_is_given_more_time_until_a_sample_comes() {
        let mut rtt = Rtt::new(2_000_000, 200_000_000);
        (0..50).for_each(|_| rtt.sample(0, 50_000, 0));
        let usual = rtt.first_wait();
        assert!(usual < 100_000);
        rtt.bound(200_000, usual);
        assert_eq!((rtt.first_wait(), rtt.pto()), (2 * usual, usual));
        rtt.bound(200_000, rtt.first_wait());
        assert_eq!(rtt.first_wait(), 4 * usual);
        rtt.bound(200_000, 2_000_000);
        assert_eq!(rtt.first_wait(), 300_000, "as long as it can have taken, and a half");
        rtt.sample(0, 200_000, 0);
        assert_eq!(rtt.first_wait(), rtt.pto());
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
