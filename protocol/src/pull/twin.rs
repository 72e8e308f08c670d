//! The puller beside a slow twin, which remembers every PULL for ever and looks at all of them.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use crate::time::Instant;
use crate::wire::message::{MAX_CONTROL_BYTES, Message};

use super::{Arrival, Budgets, PathIndex, Puller, SpanIndex, TimedOut, Worth};

const SEGMENT_BYTES: u16 = 64;
const PATHS: usize = 2;
const SPANS: usize = 3;
const RTO_MIN_NS: u64 = 100_000;

/// A PULL as it was sent.
struct Asked {
    sequence: u32,
    path: usize,
    span: usize,
    sent_at: u64,
    /// All segments that it named, and those that are under way.
    named: BTreeSet<u32>,
    under_way: BTreeSet<u32>,
}

struct Twin {
    asked: Vec<Asked>,
    /// By span, what is here.
    here: Vec<BTreeSet<u32>>,
    /// By path, the place of the latest PULL that something came of, its round trip, and the smoothed one then.
    newest: [Option<(usize, u64, u64)>; PATHS],
}

impl Twin {
    /// Whether something is under way of a PULL that is late by RACK's rule, with a reordering window of so many round trips.
    fn is_late(&self, at: usize, now: u64, (trips, smoothed): (u64, u64)) -> bool {
        let asked = &self.asked[at];
        self.newest[asked.path].is_some_and(|(newest, rtt, then)| {
            let window = trips * smoothed.max(then);
            // Before a round trip was measured nothing is late.
            let is_known = trips == 0 || then > 0;
            is_known && at < newest && asked.sent_at + rtt + window <= now && !asked.under_way.is_empty()
        })
    }

    fn under_way(&self, span: usize) -> BTreeSet<u32> {
        self.asked
            .iter()
            .filter(|asked| asked.span == span)
            .flat_map(|asked| asked.under_way.clone())
            .collect()
    }
}

struct World {
    puller: Puller,
    twin: Twin,
    segments: Vec<u32>,
    now: u64,
    given_up: u32,
}

fn path_of(span: usize) -> usize {
    span % PATHS
}

impl World {
    fn new(window_segments: u32, link_mbps: u32, segments: &[u32]) -> World {
        let mut puller = Puller::new(&Budgets {
            paths: PATHS,
            spans: SPANS,
            span_segments: 200,
            segment_bytes: SEGMENT_BYTES,
            window_segments,
            memory_segments: 600,
            link_mbps,
            queue_tolerance: Duration::from_micros(20),
            rto_min: Duration::from_nanos(RTO_MIN_NS),
            rto_max: Duration::from_millis(10),
            seed: 3,
        });
        for (span, count) in segments.iter().enumerate() {
            let bytes = count * u32::from(SEGMENT_BYTES) - 3;
            let (index, path) = (SpanIndex(span as u16), PathIndex(path_of(span) as u16));
            puller.begin(index, path, (0, bytes), SEGMENT_BYTES);
            puller.path_mut(path).users += 1;
        }
        let here = vec![BTreeSet::new(); SPANS];
        let twin = Twin { asked: Vec::new(), here, newest: [None; PATHS] };
        World { puller, twin, segments: segments.to_vec(), now: 1, given_up: 0 }
    }

    fn at(&self) -> Instant {
        Instant::from_nanos(self.now)
    }

    /// Asks for what may be asked for; what a PULL says is compared with what the twin knows to be wanted.
    fn ask(&mut self, span: usize) {
        let (now, index, mut out) = (self.at(), SpanIndex(span as u16), [0; MAX_CONTROL_BYTES]);
        if self.puller.is_paced(now) || !self.puller.has_credit() {
            return;
        }
        let under_way = self.twin.under_way(span);
        let wanted: Vec<u32> = (0..self.segments[span])
            .filter(|segment| !self.twin.here[span].contains(segment) && !under_way.contains(segment))
            .collect();
        assert_eq!(self.puller.is_wanted(index), !wanted.is_empty());
        let Worth::Segments(budget) = self.puller.worth(now, index) else { return };
        let first = *wanted.first().expect("it is worth asking only for what is wanted");
        let expected: BTreeSet<u32> =
            wanted.into_iter().filter(|at| at - first < 64).take(budget as usize).collect();
        let Some(requested) = self.puller.pull(now, index, budget, (7, 8, 9), &mut out) else {
            return;
        };
        let Ok(Message::Pull(pull)) = Message::new_checked(&out[..requested.len]) else {
            panic!("a PULL is what was written")
        };
        let named: BTreeSet<u32> =
            pull.runs().flat_map(|run| run.first..run.first + u32::from(run.count)).collect();
        assert_eq!(named, expected, "the first that are wanted, within 64");
        let before: BTreeSet<u32> = self
            .twin
            .asked
            .iter()
            .filter(|asked| asked.span == span)
            .flat_map(|asked| asked.named.clone())
            .collect();
        assert_eq!(requested.again as usize, named.intersection(&before).count());
        assert_eq!((requested.asked + requested.again) as usize, named.len());
        self.twin.asked.push(Asked {
            sequence: pull.sequence,
            path: path_of(span),
            span,
            sent_at: self.now,
            under_way: named.clone(),
            named,
        });
    }

    /// The segment that is the `pick`th of all that were ever named arrives, perhaps for the second time.
    fn arrive(&mut self, pick: usize) {
        let all: Vec<(usize, u32)> = (0..self.twin.asked.len())
            .flat_map(|at| self.twin.asked[at].named.iter().map(move |segment| (at, *segment)))
            .collect();
        let Some(&(at, segment)) = all.get(pick % all.len().max(1)) else { return };
        let Asked { span, path, sequence, sent_at, .. } = self.twin.asked[at];
        let is_last = segment + 1 == self.segments[span];
        let bytes = usize::from(SEGMENT_BYTES) - if is_last { 3 } else { 0 };
        let arrival = Arrival { segment, bytes, sequence, waited_ns: 0, is_marked: false };
        let taken = self.puller.take_in(self.at(), SpanIndex(span as u16), &arrival);
        if !self.twin.here[span].insert(segment) {
            assert!(taken.is_err(), "what is here is not taken in twice");
            return;
        }
        let taken = taken.expect("what was asked for is taken in");
        assert_eq!(taken.is_whole, self.twin.here[span].len() == self.segments[span] as usize);
        assert_eq!(taken.is_late, !self.twin.asked[at].under_way.contains(&segment));
        for asked in self.twin.asked.iter_mut().filter(|asked| asked.span == span) {
            asked.under_way.remove(&segment);
        }
        if self.twin.newest[path].is_none_or(|(newest, ..)| at > newest) {
            self.twin.newest[path] = Some((at, self.now - sent_at, self.smoothed(path)));
        }
    }

    fn smoothed(&self, path: usize) -> u64 {
        self.puller.path(PathIndex(path as u16)).rtt.smoothed().unwrap_or(0)
    }

    /// Lets time pass. What is late by nothing is not given up; what is late by a round trip is.
    fn pass(&mut self, nanos: u64) {
        self.now += nanos;
        if self.puller.is_due(self.at()) {
            self.look_at_paths();
        }
        for (at, asked) in self.twin.asked.iter().enumerate() {
            assert!(
                !self.twin.is_late(at, self.now, (1, self.smoothed(asked.path))),
                "what is lost is found"
            );
        }
    }

    fn look_at_paths(&mut self) {
        let now = self.at();
        for path in 0..PATHS {
            let index = PathIndex(path as u16);
            let before = self.under_way();
            let lost = self.puller.find_losses(now, index);
            self.check_given_up(path, lost, |twin, at, now| twin.is_late(at, now, (0, 0)));
            assert_eq!(before - self.under_way(), lost as usize);
            let (before, due_at) = (self.in_flight_of(path) as u32, self.puller.path(index).timeout_at);
            let done = self.puller.time_out(now, index);
            let lost = before - self.puller.path(index).in_flight();
            let expected = match done {
                TimedOut::No => 0,
                TimedOut::Probed => 1,
                TimedOut::All(lost, _) => lost.max(before),
            };
            assert_eq!(lost, expected, "nothing, the last, or all: {done:?}");
            assert_eq!(done != TimedOut::No, before > 0 && due_at <= now, "in time, and not before");
            self.check_given_up(path, lost, |_, _, _| done != TimedOut::No);
        }
    }

    /// Takes in what the puller gave up of a path: `lost` segments, of PULLs for which `may` is true.
    fn check_given_up(&mut self, path: usize, lost: u32, may: impl Fn(&Twin, usize, u64) -> bool) {
        let mut found = 0;
        while self.puller.poll_given_up().is_some() {}
        for at in 0..self.twin.asked.len() {
            if self.twin.asked[at].path != path {
                continue;
            }
            let span = self.twin.asked[at].span;
            let gone: Vec<u32> = self.twin.asked[at]
                .under_way
                .iter()
                .copied()
                .filter(|segment| !self.puller.is_asked_for(SpanIndex(span as u16), *segment))
                .collect();
            assert!(gone.is_empty() || may(&self.twin, at, self.now), "only what is late is given up");
            found += gone.len() as u32;
            for segment in gone {
                self.twin.asked[at].under_way.remove(&segment);
            }
        }
        assert_eq!(found, lost);
        self.given_up += lost;
    }

    fn in_flight_of(&self, path: usize) -> usize {
        self.twin.asked.iter().filter(|asked| asked.path == path).map(|asked| asked.under_way.len()).sum()
    }

    fn under_way(&self) -> usize {
        self.twin.asked.iter().map(|asked| asked.under_way.len()).sum()
    }

    fn check(&self) {
        assert_eq!(self.puller.in_flight() as usize, self.under_way());
        for path in 0..PATHS {
            let known = self.puller.path(PathIndex(path as u16));
            assert_eq!(known.in_flight() as usize, self.in_flight_of(path));
            assert!(
                known.in_flight() == 0 || self.puller.poll_timeout() <= known.timeout_at,
                "who is waited for is looked at in time"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn what_is_wanted_under_way_and_lost_is_what_the_twin_says(
        (window, mbps) in (1_u32..300, prop_oneof![Just(0_u32), Just(10_000)]),
        segments in proptest::collection::vec(1_u32..200, SPANS),
        steps in proptest::collection::vec((0_u8..6, any::<usize>()), 0..300),
    ) {
        let mut world = World::new(window, mbps, &segments);
        for (step, pick) in steps {
            match step {
                0 | 1 => world.ask(pick % SPANS),
                2 | 3 => world.arrive(pick),
                4 => world.pass(pick as u64 % 30_000),
                _ => world.pass(pick as u64 % 1_000_000),
            }
            world.check();
            prop_assert!(world.puller.in_flight() <= window);
        }
        // From here on the network is good, and all comes.
        for _ in 0..20_000 {
            (0..SPANS).for_each(|span| world.ask(span));
            let mut all = world.twin.asked.iter().enumerate().flat_map(|(at, asked)| {
                asked.under_way.iter().map(move |segment| (at, *segment))
            });
            let Some((at, segment)) = all.next() else {
                if (0..SPANS).all(|span| !world.puller.is_wanted(SpanIndex(span as u16))) {
                    break;
                }
                world.pass(10_000);
                continue;
            };
            let before: usize = world.twin.asked[..at].iter().map(|asked| asked.named.len()).sum();
            let within = world.twin.asked[at].named.iter().position(|named| *named == segment).unwrap();
            world.arrive(before + within);
            world.pass(100);
            world.check();
        }
        for (span, count) in segments.iter().enumerate() {
            prop_assert_eq!(world.twin.here[span].len(), *count as usize);
        }
    }
}
