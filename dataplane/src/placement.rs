//! Which lcore runs which stage: the `--lcores` flag.
//!
//! `rx@2,decode@3-6,dma@7` puts one receive queue on CPU 2, four decoders on CPUs 3 to 6 and delivery on CPU 7.
//! Naming one CPU several times makes it run those stages in turn, run to completion: `rx@0,decode@0,dma@0`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The kinds of stage that an lcore can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StageKind {
    /// Receives and sends packets of one queue, drives that queue's protocol engine.
    Rx,
    /// Checks, decompresses and dequantizes planes into slots.
    Decode,
    /// Copies slots to the sink.
    Dma,
}

impl StageKind {
    /// Every kind, in the order in which an lcore that runs several polls them.
    pub const ALL: [Self; 3] = [Self::Rx, Self::Decode, Self::Dma];

    /// The word used in flags and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rx => "rx",
            Self::Decode => "decode",
            Self::Dma => "dma",
        }
    }
}

/// CPUs, each with the stages it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    stages: BTreeMap<usize, Vec<StageKind>>,
}

/// Why an `--lcores` value was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// an entry is not `STAGE@CPUS`
    #[error("`{0}` is not STAGE@CPUS: write for example rx@2,decode@3-6,dma@7")]
    Entry(String),
    /// a stage name is unknown
    #[error("unknown stage `{0}`: the stages are rx, decode and dma")]
    Stage(String),
    /// a CPU list does not parse
    #[error("`{0}` is not a CPU or a range of CPUs: write for example 3, 3-6 or 3+5")]
    Cpus(String),
    /// the same stage was put twice on one CPU
    #[error("stage {stage} is placed twice on CPU {cpu}: once is enough")]
    Twice {
        /// the stage
        stage: &'static str,
        /// the CPU
        cpu: usize,
    },
    /// a stage has no CPU
    #[error("no CPU runs stage {0}: add for example {0}@0")]
    Missing(&'static str),
}

impl Placement {
    /// The CPUs used, ascending; worker `i` of the EAL runs on the `i`-th.
    pub fn cpus(&self) -> impl Iterator<Item = usize> + '_ {
        self.stages.keys().copied()
    }

    /// The stages of each CPU, in the order of [`Placement::cpus`].
    pub fn lcores(&self) -> impl Iterator<Item = (usize, &[StageKind])> + '_ {
        self.stages.iter().map(|(&cpu, stages)| (cpu, stages.as_slice()))
    }

    /// Slots that keep every decode and dma lcore busy: one being filled or emptied and one waiting, for each. More would
    /// only leave the cache.
    #[must_use]
    pub fn default_slots(&self) -> usize {
        2 * (self.count(StageKind::Decode) + self.count(StageKind::Dma))
    }

    /// How many lcores run a stage of this kind; for [`StageKind::Rx`] also the number of receive queues.
    #[must_use]
    pub fn count(&self, kind: StageKind) -> usize {
        self.stages.values().filter(|stages| stages.contains(&kind)).count()
    }
}

impl FromStr for Placement {
    type Err = PlacementError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut stages: BTreeMap<usize, Vec<StageKind>> = BTreeMap::new();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let (name, cpus) = entry.split_once('@').ok_or_else(|| PlacementError::Entry(entry.into()))?;
            let kind = StageKind::ALL
                .into_iter()
                .find(|kind| kind.name() == name)
                .ok_or_else(|| PlacementError::Stage(name.into()))?;
            for cpu in parse_cpus(cpus)? {
                let on_cpu = stages.entry(cpu).or_default();
                if on_cpu.contains(&kind) {
                    return Err(PlacementError::Twice { stage: kind.name(), cpu });
                }
                on_cpu.push(kind);
                on_cpu.sort_unstable();
            }
        }
        let placement = Self { stages };
        match StageKind::ALL.into_iter().find(|&kind| placement.count(kind) == 0) {
            Some(kind) => Err(PlacementError::Missing(kind.name())),
            None => Ok(placement),
        }
    }
}

/// `3`, `3-6` or `3+5-6`.
///
/// # Errors
/// [`PlacementError::Cpus`] names the part that is no CPU or range.
pub fn parse_cpus(text: &str) -> Result<Vec<usize>, PlacementError> {
    let bad = || PlacementError::Cpus(text.into());
    let mut cpus = Vec::new();
    for part in text.split('+') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.parse().map_err(|_| bad())?;
        let last: usize = last.parse().map_err(|_| bad())?;
        if first > last || last >= 4096 {
            return Err(bad());
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

impl fmt::Display for Placement {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (cpu, stages) in self.lcores() {
            for stage in stages {
                write!(out, "{separator}{}@{cpu}", stage.name())?;
                separator = ",";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_core_runs_everything() {
        let placement: Placement = "dma@0,rx@0,decode@0".parse().unwrap();
        let lcores: Vec<_> = placement.lcores().collect();
        assert_eq!(lcores, [(0, &StageKind::ALL[..])]);
        assert_eq!(placement.to_string(), "rx@0,decode@0,dma@0");
    }

    #[test]
    fn ranges_spread_a_stage() {
        let placement: Placement = "rx@2+3, decode@4-7, dma@2".parse().unwrap();
        assert_eq!(placement.count(StageKind::Rx), 2);
        assert_eq!(placement.count(StageKind::Decode), 4);
        assert_eq!(placement.cpus().collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn refusals_name_the_fault() {
        let refuse = |text: &str| text.parse::<Placement>().unwrap_err().to_string();
        assert!(refuse("rx0").contains("`rx0` is not STAGE@CPUS"));
        assert!(refuse("tx@0").contains("unknown stage `tx`"));
        assert!(refuse("rx@2-1").contains("`2-1`"));
        assert!(refuse("rx@0,rx@0").contains("twice on CPU 0"));
        assert!(refuse("rx@0,decode@0").contains("no CPU runs stage dma"));
        assert!(refuse("").contains("no CPU runs stage rx"));
    }
}
