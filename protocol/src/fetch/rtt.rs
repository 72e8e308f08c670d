//! What is known of a store: its round-trip time and how much it is working on.

use crate::time::nanos_of;

use super::config::FetchConfig;

/// Timeouts without an arrival in between after which a store is only probed: with one PULL's worth in flight.
const SILENT_TIMEOUTS: u32 = 2;
/// The first RTO, before any sample, as a multiple of the least.
const INITIAL_RTO_FACTOR: u64 = 8;

#[derive(Clone, Copy, Debug)]
pub(super) struct Store {
    /// Smoothed round-trip time and its variation (RFC 6298), nanoseconds; zero before the first sample.
    srtt: u64,
    rttvar: u64,
    rto: u64,
    rto_min: u64,
    rto_max: u64,
    /// Transfers that timed out since something arrived.
    pub(super) silent_timeouts: u32,
    /// Segments asked of this store and neither arrived nor given up.
    pub(super) in_flight: u32,
    /// Fetches under way.
    pub(super) fetches: u32,
    /// Chunk slots, plane slots and segments of memory that its fetches hold.
    pub(super) chunks: u32,
    pub(super) planes: u32,
    pub(super) memory: u32,
}

impl Store {
    pub(super) fn new(config: &FetchConfig) -> Store {
        let (rto_min, rto_max) = (nanos_of(config.rto_min), nanos_of(config.rto_max));
        Store {
            srtt: 0,
            rttvar: 0,
            rto: rto_min.saturating_mul(INITIAL_RTO_FACTOR).min(rto_max),
            rto_min,
            rto_max,
            silent_timeouts: 0,
            in_flight: 0,
            fetches: 0,
            chunks: 0,
            planes: 0,
            memory: 0,
        }
    }

    /// Takes in the round-trip time of something that was asked for once (Karn).
    pub(super) fn sample(&mut self, rtt: u64) {
        let rtt = rtt.max(1);
        if self.srtt == 0 {
            (self.srtt, self.rttvar) = (rtt, rtt / 2);
        } else {
            self.rttvar = self.rttvar - self.rttvar / 4 + self.srtt.abs_diff(rtt) / 4;
            self.srtt = self.srtt - self.srtt / 8 + rtt / 8;
        }
        let margin = self.rttvar.saturating_mul(4);
        self.rto = self.srtt.saturating_add(margin).clamp(self.rto_min, self.rto_max);
    }

    /// Retransmission timeout after `backoff` doublings, nanoseconds.
    #[inline]
    pub(super) fn rto(&self, backoff: u8) -> u64 {
        if backoff == 0 {
            return self.rto;
        }
        self.rto.saturating_mul(1 << backoff.min(20)).min(self.rto_max)
    }

    /// Smoothed round-trip time in nanoseconds, once measured.
    pub(super) fn srtt(&self) -> Option<u64> {
        (self.srtt != 0).then_some(self.srtt)
    }

    /// Segments that may be asked of this store beyond those in flight.
    pub(super) fn room(&self, pull_segments: u32) -> u32 {
        if self.silent_timeouts < SILENT_TIMEOUTS {
            return u32::MAX;
        }
        pull_segments.saturating_sub(self.in_flight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_as_rfc_6298_says() {
        let config = FetchConfig {
            rto_min: std::time::Duration::from_nanos(10),
            rto_max: std::time::Duration::from_millis(1),
            ..FetchConfig::default()
        };
        let mut store = Store::new(&config);
        assert_eq!(store.rto(0), 80);
        store.sample(8000);
        assert_eq!(store.rto(0), 8000 + 4 * 4000);
        store.sample(16_000);
        // rttvar = 3/4 * 4000 + 1/4 * 8000, srtt = 7/8 * 8000 + 1/8 * 16000.
        assert_eq!(store.rto(0), 9000 + 4 * 5000);
        assert_eq!(store.rto(2), 4 * 29_000);
        assert_eq!(store.rto(20), 1_000_000);
    }
}
