//! A point in time that the caller supplies.

use std::ops::Add;
use std::time::Duration;

/// Nanoseconds since an origin that the caller chose, the same for every call on one engine.
///
/// Never goes backwards within one engine; an engine only compares and subtracts, so a TSC scaled to
/// nanoseconds, `CLOCK_MONOTONIC` and a simulated clock all serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// The origin.
    pub const ZERO: Instant = Instant(0);
    /// Later than anything that happens: "never".
    pub const FAR: Instant = Instant(u64::MAX);

    /// The instant `nanos` nanoseconds after the origin.
    pub const fn from_nanos(nanos: u64) -> Instant {
        Instant(nanos)
    }

    /// Nanoseconds since the origin.
    pub const fn nanos(self) -> u64 {
        self.0
    }

    /// Time since `earlier`, zero if `earlier` is later.
    pub const fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This instant plus `nanos` nanoseconds, at most [`Instant::FAR`].
    pub(crate) const fn plus_nanos(self, nanos: u64) -> Instant {
        Instant(self.0.saturating_add(nanos))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    /// Saturates at [`Instant::FAR`].
    fn add(self, rhs: Duration) -> Instant {
        self.plus_nanos(nanos_of(rhs))
    }
}

/// A duration in nanoseconds, saturated to 584 years.
pub(crate) fn nanos_of(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
