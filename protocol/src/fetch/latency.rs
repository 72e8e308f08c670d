//! Response times of one store as a small histogram, of which a percentile says when to ask another store too
//! (Dean and Barroso, "The Tail at Scale", CACM 2013: hedged requests).

/// Buckets of a factor of two, and how many each is cut into.
const OCTAVES: usize = 32;
const PER_OCTAVE: usize = 4;
/// Samples after which old ones count half.
const HALVE_AT: u32 = 1024;
/// Samples before which a percentile means nothing.
const LEAST_SAMPLES: u32 = 100;

/// Counts by time; within a quarter of an octave, 19 %.
#[derive(Clone, Copy, Debug)]
pub(super) struct Latency {
    counts: [u16; OCTAVES * PER_OCTAVE],
    total: u32,
}

impl Latency {
    pub(super) const NEW: Latency = Latency { counts: [0; OCTAVES * PER_OCTAVE], total: 0 };

    /// Takes in a response time in nanoseconds.
    pub(super) fn sample(&mut self, nanos: u64) {
        if self.total >= HALVE_AT {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.total = self.counts.iter().map(|count| u32::from(*count)).sum();
        }
        self.counts[bucket(nanos)] += 1;
        self.total += 1;
    }

    /// The time in nanoseconds that 99 % of the responses did not take longer than, once there are enough.
    pub(super) fn p99(&self) -> Option<u64> {
        if self.total < LEAST_SAMPLES {
            return None;
        }
        let mut above = self.total / 100;
        for (at, count) in self.counts.iter().enumerate().rev() {
            match above.checked_sub(u32::from(*count)) {
                Some(left) => above = left,
                None => return Some(end_of(at)),
            }
        }
        None
    }
}

fn bucket(nanos: u64) -> usize {
    let nanos = nanos.max(PER_OCTAVE as u64);
    let octave = nanos.ilog2() as usize;
    // The two bits below the highest.
    let part = usize::try_from(nanos >> (octave - 2) & 3).unwrap_or(0);
    (octave * PER_OCTAVE + part).min(OCTAVES * PER_OCTAVE - 1)
}

/// The least time that is beyond bucket `at`.
fn end_of(at: usize) -> u64 {
    let (octave, part) = (at / PER_OCTAVE, at % PER_OCTAVE);
    (PER_OCTAVE as u64 + part as u64 + 1) << octave >> 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_percentile_is_the_sorted_one_within_a_bucket(times in proptest::collection::vec(10_u64..1_000_000_000, 100..1000)) {
            let mut latency = Latency::NEW;
            times.iter().for_each(|time| latency.sample(*time));
            let mut sorted = times.clone();
            sorted.sort_unstable();
            let exact = sorted[times.len() - 1 - times.len() / 100];
            let found = latency.p99().unwrap();
            prop_assert!(found > exact && found <= exact + exact / 4 + 1, "{found} for {exact}");
        }
    }

    #[test]
    fn old_times_are_forgotten() {
        let mut latency = Latency::NEW;
        assert_eq!(latency.p99(), None);
        (0..1000).for_each(|_| latency.sample(1_000_000));
        (0..20_000).for_each(|_| latency.sample(1000));
        assert!(latency.p99().unwrap() < 1300);
        latency.sample(u64::MAX);
        latency.sample(0);
    }
}
