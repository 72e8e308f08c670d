//! Requests spaced in time: what is asked for in one go arrives in one go, so asking at the link's rate keeps the
//! queue before the link short.

use crate::time::Instant;

/// Fractions of a nanosecond in which a segment's time is counted: at 400 Gbit/s a packet of 1,500 bytes takes 30 ns.
const FRACTION_BITS: u32 = 8;

/// Spaces requests so that their answers fill the link and no more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pacer {
    /// Time that a segment takes, in fractions of a nanosecond; zero while there is no rate to keep to.
    segment_time: u64,
    /// When the next request may go, and a fraction of a nanosecond.
    next: Instant,
    fraction: u64,
    /// Time that may be made up for after a late turn of the caller's loop, in nanoseconds.
    slack: u64,
}

impl Pacer {
    pub(crate) const UNPACED: Pacer = Pacer { segment_time: 0, next: Instant::ZERO, fraction: 0, slack: 0 };

    /// Keeps to `bytes_per_second` from now on, with segments of `wire_bytes`; as many as `slack_segments` may be asked
    /// for at once after a pause.
    pub(crate) fn set_rate(&mut self, bytes_per_second: u64, wire_bytes: u64, slack_segments: u32) {
        let nanos = (u128::from(wire_bytes) * 1_000_000_000) << FRACTION_BITS;
        let time = nanos.checked_div(u128::from(bytes_per_second)).unwrap_or(0);
        self.segment_time = u64::try_from(time).unwrap_or(u64::MAX);
        self.slack = (self.segment_time >> FRACTION_BITS).saturating_mul(u64::from(slack_segments));
    }

    /// When the next request may go.
    #[inline]
    pub(crate) fn next(&self) -> Instant {
        self.next
    }

    /// Takes in that `segments` are asked for.
    #[inline]
    pub(crate) fn spend(&mut self, now: Instant, segments: u32) {
        let earliest = Instant::from_nanos(now.nanos().saturating_sub(self.slack));
        if self.next < earliest {
            (self.next, self.fraction) = (earliest, 0);
        }
        let time = self.segment_time.saturating_mul(u64::from(segments)).saturating_add(self.fraction);
        self.next = self.next.plus_nanos(time >> FRACTION_BITS);
        self.fraction = time & ((1 << FRACTION_BITS) - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Over any stretch of time, no more than the rate allows and the slack.
        #[test]
        fn the_rate_is_kept(
            mbps in 1_u64..400_000, slack in 0_u32..100,
            turns in proptest::collection::vec((0_u64..100_000, 1_u32..64), 1..200),
        ) {
            let mut pacer = Pacer::UNPACED;
            pacer.set_rate(mbps * 125_000, 1538, slack);
            let (mut now, mut asked) = (1_000_000_000_u64, 0_u64);
            let (begin, mut most) = (now, 0);
            for (wait, segments) in turns {
                now += wait;
                if pacer.next().nanos() <= now {
                    pacer.spend(Instant::from_nanos(now), segments);
                    asked += u64::from(segments);
                    most = most.max(u64::from(segments));
                }
                // Nanoseconds are rounded down once a request, and once in the slack.
                let segment_ns = 1538.0 * 8000.0 / mbps as f64;
                let allowed = (now - begin) as f64 / segment_ns + f64::from(slack) + most as f64;
                prop_assert!(asked as f64 <= allowed * 1.01 + 1.0, "{asked} of {allowed}");
            }
        }
    }

    #[test]
    fn without_a_rate_everything_may_go() {
        let mut pacer = Pacer::UNPACED;
        pacer.set_rate(0, 1538, 16);
        pacer.spend(Instant::from_nanos(5), 1000);
        assert_eq!(pacer.next(), Instant::from_nanos(5));
    }
}
