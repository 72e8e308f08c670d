//! Loss by time (RACK, RFC 8985): a peer sends in the order in which it was asked, so what was asked for before
//! something that has arrived is late, and lost once it is later than the network reorders.
//!
//! RFC 8985 counts packets; here one record is a PULL, of up to 64 segments.

/// The reordering window in quarters of the round trip, at most: RFC 8985 section 6.2, step 4 caps it at one.
const MAX_QUARTERS: u8 = 4;
/// Losses found rightly after which a widened window is narrow again: RFC 8985 section 6.2, `reo_wnd_persist`.
const PERSIST: u8 = 16;

/// Of one peer. All times in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rack {
    /// Place in the order of the latest PULL of which something has arrived, and its round trip.
    newest: u64,
    rtt: u64,
    quarters: u8,
    persist: u8,
    /// PULLs up to this one may not widen the window again: once per round trip.
    widened_at: u64,
}

impl Rack {
    pub(crate) const NEW: Rack = Rack { newest: 0, rtt: 0, quarters: 1, persist: 0, widened_at: 0 };

    /// Takes in that something of the PULL at `order` arrived, `rtt` after it was sent; whether it is the latest such.
    #[inline]
    pub(crate) fn arrived(&mut self, order: u64, rtt: u64) -> bool {
        let is_newest = order > self.newest;
        if is_newest {
            (self.newest, self.rtt) = (order, rtt);
        }
        is_newest
    }

    /// When the PULL at `order`, sent at `sent_ns`, counts as lost; `None` while nothing asked for later has arrived.
    #[inline]
    pub(crate) fn lost_at(&self, order: u64, sent_ns: u64, smoothed: u64) -> Option<u64> {
        let window = smoothed / 4 * u64::from(self.quarters);
        (order < self.newest).then(|| sent_ns.saturating_add(self.rtt).saturating_add(window))
    }

    /// Takes in that a segment given up as lost was only late.
    pub(crate) fn was_late(&mut self, order: u64, last_order: u64) {
        if order > self.widened_at {
            self.quarters = (self.quarters + 1).min(MAX_QUARTERS);
            self.widened_at = last_order;
        }
        self.persist = PERSIST;
    }

    /// Takes in that a loss was found.
    pub(crate) fn found(&mut self) {
        self.persist = self.persist.saturating_sub(1);
        if self.persist == 0 {
            self.quarters = 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_earlier_is_lost_a_window_later() {
        let mut rack = Rack::NEW;
        assert_eq!(rack.lost_at(1, 100, 1000), None);
        assert!(rack.arrived(2, 1000));
        assert!(!rack.arrived(2, 1100), "once per PULL");
        assert!(!rack.arrived(1, 5000), "an older one says nothing new");
        assert_eq!(rack.lost_at(1, 100, 1000), Some(100 + 1000 + 250));
        assert_eq!(rack.lost_at(2, 100, 1000), None);
        assert_eq!(rack.lost_at(3, 100, 1000), None);
    }

    #[test]
    fn the_window_widens_when_wrong_and_narrows_when_right() {
        let mut rack = Rack::NEW;
        rack.arrived(10, 1000);
        let window = |rack: &Rack| rack.lost_at(1, 0, 1000).unwrap() - 1000;
        rack.was_late(3, 10);
        rack.was_late(4, 12);
        assert_eq!(window(&rack), 500, "once for what was asked for before it widened");
        for order in 13..20 {
            rack.was_late(order, order);
        }
        assert_eq!(window(&rack), 1000, "at most a round trip");
        for _ in 1..PERSIST {
            rack.found();
        }
        assert_eq!(window(&rack), 1000);
        rack.found();
        assert_eq!(window(&rack), 250);
    }
}
