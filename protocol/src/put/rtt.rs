//! When a request without an answer counts as lost: RFC 6298, with Karn's rule left to the caller.

use std::time::Duration;

use crate::time::nanos_of;

/// The first timeout, before any sample, as a multiple of the least.
const INITIAL_FACTOR: u64 = 8;

#[derive(Clone, Copy, Debug)]
pub(super) struct Rtt {
    /// Smoothed round-trip time and its variation, nanoseconds; zero before the first sample.
    smoothed: u64,
    variation: u64,
    least: u64,
    most: u64,
}

impl Rtt {
    pub(super) fn new(least: Duration, most: Duration) -> Rtt {
        Rtt { smoothed: 0, variation: 0, least: nanos_of(least), most: nanos_of(most) }
    }

    /// Takes in the round-trip time of something that was asked for once.
    pub(super) fn sample(&mut self, nanos: u64) {
        let nanos = nanos.max(1);
        if self.smoothed == 0 {
            (self.smoothed, self.variation) = (nanos, nanos / 2);
        } else {
            self.variation = self.variation - self.variation / 4 + self.smoothed.abs_diff(nanos) / 4;
            self.smoothed = self.smoothed - self.smoothed / 8 + nanos / 8;
        }
    }

    /// The timeout after `backoff` doublings, nanoseconds.
    pub(super) fn timeout(&self, backoff: u8) -> u64 {
        let first = match self.smoothed {
            0 => self.least.saturating_mul(INITIAL_FACTOR),
            smoothed => smoothed.saturating_add(self.variation.saturating_mul(4)),
        };
        first.max(self.least).saturating_mul(1 << backoff.min(20)).min(self.most)
    }
}
