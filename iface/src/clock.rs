//! Time as the data path counts it.

use std::time::Instant;

/// Nanoseconds since the process's start of time: monotonic, cheap to read, the same on every lcore.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Source);

#[derive(Debug, Clone, Copy)]
enum Source {
    /// The CPU's counter, at `origin` when time began, and nanoseconds per count in parts of 2^32.
    Cycles { origin: u64, scale: u64 },
    /// The operating system's clock, where that counter may stop or differ between CPUs.
    System(Instant),
}

impl Clock {
    /// A clock that starts now. After the EAL, which finds out how fast the CPU counts.
    #[must_use]
    pub fn start() -> Self {
        let scale =
            dpdk::cycles_hz().and_then(|hz| u64::try_from((1_000_000_000_u128 << 32) / u128::from(hz)).ok());
        Self(match scale {
            Some(scale) => Source::Cycles { origin: dpdk::cycles(), scale },
            None => Source::System(Instant::now()),
        })
    }

    /// Nanoseconds since the start; 584 years until it wraps.
    #[inline]
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        let nanos = match self.0 {
            Source::Cycles { origin, scale } => nanos(dpdk::cycles().saturating_sub(origin), scale),
            Source::System(origin) => origin.elapsed().as_nanos(),
        };
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

#[inline]
fn nanos(cycles: u64, scale: u64) -> u128 {
    (u128::from(cycles) * u128::from(scale)) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_nanoseconds() {
        // 2.5 GHz for 10 seconds.
        let scale = u64::try_from((1_000_000_000_u128 << 32) / 2_500_000_000).unwrap();
        let nanos = nanos(25_000_000_000, scale);
        assert!((9_999_999_990..=10_000_000_000).contains(&nanos), "{nanos}");
    }

    #[test]
    fn time_does_not_run_backwards() {
        for clock in [Clock::start(), Clock(Source::Cycles { origin: dpdk::cycles(), scale: 1 << 31 })] {
            let mut before = clock.now_ns();
            for _ in 0..1000 {
                let now = clock.now_ns();
                assert!(now >= before);
                before = now;
            }
        }
    }
}
