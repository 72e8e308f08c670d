//! Whose turn it is: the order among fetches that want segments of one link.

use std::fmt;
use std::str::FromStr;

use super::tables::Job;

/// One PULL in this many goes to the fetch that has been under way for longest, so that no stream of short ones starves
/// it: Homa (SIGCOMM 2018, section 5.1) gives its oldest message 5 to 10 %.
const OLDEST_EVERY: u64 = 16;

/// Which fetch is asked for first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// The one with the fewest planes to come: least time to completion on average.
    #[default]
    ShortestRemaining,
    /// The one whose deadline is earliest.
    EarliestDeadline,
    /// All in turn, one PULL each.
    RoundRobin,
}

impl FromStr for Schedule {
    type Err = String;

    /// `srf`, `edf` or `rr`.
    fn from_str(text: &str) -> Result<Schedule, String> {
        match text {
            "srf" => Ok(Schedule::ShortestRemaining),
            "edf" => Ok(Schedule::EarliestDeadline),
            "rr" => Ok(Schedule::RoundRobin),
            other => Err(format!(
                "'{other}' is no schedule: give srf (shortest remaining first), edf (earliest deadline first) or rr (round \
                 robin)"
            )),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Schedule::ShortestRemaining => "srf",
            Schedule::EarliestDeadline => "edf",
            Schedule::RoundRobin => "rr",
        })
    }
}

impl Schedule {
    /// Fetches are asked for in the order of this number; equal ones in the order in which they were started.
    pub(super) fn rank(self, job: &Job, pulls: u64) -> (u64, u64) {
        let first = match self {
            _ if pulls.is_multiple_of(OLDEST_EVERY) && self != Schedule::RoundRobin => 0,
            Schedule::ShortestRemaining => job.left,
            Schedule::EarliestDeadline => job.deadline.nanos(),
            Schedule::RoundRobin => job.last_turn,
        };
        (first, job.started)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Instant;

    fn job(left: u64, deadline: u64, last_turn: u64, started: u64) -> Job {
        Job { left, deadline: Instant::from_nanos(deadline), last_turn, started, ..Job::FREE }
    }

    #[test]
    fn each_schedule_has_its_first() {
        let jobs = [job(9, 3, 5, 1), job(2, 8, 6, 2), job(4, 9, 1, 3)];
        let first = |schedule: Schedule, pulls| {
            jobs.iter().min_by_key(|job| schedule.rank(job, pulls)).map(|job| job.started)
        };
        assert_eq!(first(Schedule::ShortestRemaining, 1), Some(2));
        assert_eq!(first(Schedule::EarliestDeadline, 1), Some(1));
        assert_eq!(first(Schedule::RoundRobin, 1), Some(3));
        assert_eq!(first(Schedule::ShortestRemaining, 16), Some(1), "the oldest has its turn too");
        assert_eq!(first(Schedule::RoundRobin, 16), Some(3));
    }

    #[test]
    fn names_are_read_and_written() {
        for name in ["srf", "edf", "rr"] {
            assert_eq!(name.parse::<Schedule>().unwrap().to_string(), name);
        }
        assert!("fifo".parse::<Schedule>().unwrap_err().contains("edf"));
    }
}
