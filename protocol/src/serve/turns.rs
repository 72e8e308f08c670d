//! What a store still has to send: PULLs by requester, served in turns.
//!
//! Requesters are the UDP ports of data planes. Each has its PULLs in the order in which they came, and a *deficit*
//! (deficit round robin, Shreedhar and Varghese 1995): a turn grants bytes, segments are sent while the deficit is positive,
//! what was sent too much is missing from the next turn. The ports of one address share that address's turn, so that a data plane
//! with many queues gets no more than one with a single queue.
//!
//! A requester may hold as many PULLs, and bytes, as remain free (dynamic thresholds, Choudhury and Hahne 1998): one that is
//! alone holds half of all there is, `n` of them `n / (n + 1)`, and a newcomer finds room.

use std::collections::VecDeque;

use crate::frame::Peer;
use crate::time::Instant;
use crate::wire::message::{MAX_PULL_RUNS, Pull, PullRange, Run};

/// How far behind its pace a requester may fall and still catch up at once: the store's loop does not look every
/// microsecond, and a pace that forgot what it missed would be slower than asked for.
const CATCH_UP_NANOS: u64 = 20_000;

const NONE: u32 = u32::MAX;

/// A checked PULL that waits or is being served.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingPull {
    pub(super) range: PullRange,
    pace_mbps: u32,
    sequence: u32,
    /// When it came.
    since: Instant,
    pub(super) runs: [Run; MAX_PULL_RUNS],
    pub(super) runs_len: usize,
    /// The run being sent, and how many of its segments are sent.
    run: usize,
    sent: u16,
    /// Bytes still to send.
    bytes: u64,
    /// The requester's next, or the next free place.
    next: u32,
}

impl PendingPull {
    /// `bytes` is the sum of the segments that the runs name; the runs are still to be written.
    pub(super) fn new(since: Instant, pull: &Pull<'_>, bytes: u64) -> PendingPull {
        let Pull { range, pace_mbps, sequence, .. } = *pull;
        PendingPull { range, pace_mbps, sequence, since, bytes, ..PendingPull::NONE }
    }

    const NONE: PendingPull = PendingPull {
        range: PullRange { tag: 0, handle: 0, epoch: 0, offset: 0, bytes: 0, segment_bytes: 0 },
        pace_mbps: 0,
        sequence: 0,
        since: Instant::ZERO,
        runs: [Run { first: 0, count: 0 }; MAX_PULL_RUNS],
        runs_len: 0,
        run: 0,
        sent: 0,
        bytes: 0,
        next: NONE,
    };
}

#[derive(Clone, Copy, Debug)]
struct Requester {
    to: Peer,
    /// First and last of its PULLs.
    first: u32,
    last: u32,
    pulls: usize,
    bytes: u64,
    deficit: i64,
    /// When its pace allows the next segment.
    next_at: Instant,
    /// What is missing from that to a whole nanosecond, in 1/1000 bit.
    paced_rest: u64,
    /// Requesters of the same address that have PULLs, itself included.
    siblings: u32,
}

/// A segment to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) to: Peer,
    pub(super) range: PullRange,
    pub(super) segment: u32,
    pub(super) bytes: u32,
    /// The PULL's number, and how long it has waited.
    pub(super) sequence: u32,
    pub(super) waited_ns: u32,
}

/// Why a PULL was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full {
    /// Bytes that should be sent before asking again is worth it.
    pub(super) drain_bytes: u64,
}

/// All memory is allocated at start.
#[derive(Debug)]
pub(super) struct Turns {
    pulls: Box<[PendingPull]>,
    free: u32,
    used: usize,
    bytes: u64,
    max_bytes: u64,
    requesters: Box<[Requester]>,
    idle: Vec<u16>,
    /// Requesters with PULLs; the first has its turn.
    turns: VecDeque<u16>,
    turn_bytes: u32,
}

impl Turns {
    pub(super) fn new(max_pulls: usize, max_bytes: u64, max_requesters: u16, turn_bytes: u32) -> Turns {
        let max_pulls = u32::try_from(max_pulls).unwrap_or(NONE - 1).min(NONE - 1);
        let mut pulls: Box<[PendingPull]> = (0..max_pulls).map(|_| PendingPull::NONE).collect();
        for (pull, next) in pulls.iter_mut().zip(1..) {
            pull.next = if next < max_pulls { next } else { NONE };
        }
        let nobody = Requester {
            to: Peer { mac: [0; 6], ip: std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), port: 0 },
            first: NONE,
            last: NONE,
            pulls: 0,
            bytes: 0,
            deficit: 0,
            next_at: Instant::ZERO,
            paced_rest: 0,
            siblings: 0,
        };
        Turns {
            pulls,
            free: if max_pulls == 0 { NONE } else { 0 },
            used: 0,
            bytes: 0,
            max_bytes,
            requesters: vec![nobody; usize::from(max_requesters)].into(),
            idle: (0..max_requesters).rev().collect(),
            turns: VecDeque::with_capacity(usize::from(max_requesters)),
            turn_bytes: turn_bytes.max(1),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    pub(super) fn pulls(&self) -> usize {
        self.used
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Most PULLs and bytes that one requester holds at the moment.
    pub(super) fn largest(&self) -> (usize, u64) {
        let held = self.turns.iter().map(|&index| &self.requesters[usize::from(index)]);
        held.fold((0, 0), |most, requester| (most.0.max(requester.pulls), most.1.max(requester.bytes)))
    }

    fn position(&self, from: &Peer) -> Option<u16> {
        let same = |index: &&u16| {
            let to = &self.requesters[usize::from(**index)].to;
            (to.port, to.ip) == (from.port, from.ip)
        };
        self.turns.iter().find(same).copied()
    }

    /// Whether there is room for a PULL of `bytes` from `from`.
    pub(super) fn admit(&self, from: &Peer, bytes: u64) -> Result<(), Full> {
        let held = self.position(from).map(|index| &self.requesters[usize::from(index)]);
        let (held_pulls, held_bytes) = held.map_or((0, 0), |requester| (requester.pulls, requester.bytes));
        let free_pulls = self.pulls.len() - self.used;
        let free_bytes = self.max_bytes.saturating_sub(self.bytes);
        let room = held_pulls < free_pulls && held_bytes + 2 * bytes <= free_bytes;
        if room && (held.is_some() || !self.idle.is_empty()) {
            return Ok(());
        }
        // Half of what stands in the way: its own if it holds any, else everybody's.
        Err(Full { drain_bytes: if held_bytes > 0 { held_bytes } else { self.bytes } / 2 })
    }

    /// Keeps a PULL that was admitted, whose runs `fill` writes.
    pub(super) fn push(&mut self, from: Peer, pull: PendingPull, fill: impl FnOnce(&mut PendingPull)) {
        let place = self.free;
        let slot = &mut self.pulls[place as usize];
        self.free = slot.next;
        *slot = pull;
        fill(slot);
        let bytes = slot.bytes;
        self.used += 1;
        self.bytes += bytes;
        let index = self.position(&from).unwrap_or_else(|| self.join(from));
        let requester = &mut self.requesters[usize::from(index)];
        requester.to.mac = from.mac;
        requester.pulls += 1;
        requester.bytes += bytes;
        match requester.last {
            NONE => requester.first = place,
            last => self.pulls[last as usize].next = place,
        }
        requester.last = place;
    }

    fn join(&mut self, from: Peer) -> u16 {
        let index = self.idle.pop().expect("a PULL is admitted only if a requester is free");
        self.requesters[usize::from(index)].to = from;
        self.turns.push_back(index);
        self.count_siblings(from);
        let requester = &mut self.requesters[usize::from(index)];
        requester.deficit = grant(self.turn_bytes, requester.siblings);
        (requester.next_at, requester.paced_rest) = (Instant::ZERO, 0);
        index
    }

    fn count_siblings(&mut self, of: Peer) {
        let (requesters, turns) = (&mut self.requesters, &self.turns);
        let same = |requesters: &[Requester], index: u16| requesters[usize::from(index)].to.ip == of.ip;
        let siblings = turns.iter().filter(|&&index| same(requesters, index)).count();
        for &index in turns {
            if same(requesters, index) {
                requesters[usize::from(index)].siblings = u32::try_from(siblings).unwrap_or(u32::MAX);
            }
        }
    }

    /// The next segment, or when there will be one; `None` and [`Instant::FAR`] when nothing waits.
    #[inline]
    pub(super) fn next(&mut self, now: Instant) -> Result<Segment, Instant> {
        let mut earliest = Instant::FAR;
        let mut paced = 0;
        while paced < self.turns.len() {
            let index = self.turns[0];
            let requester = &mut self.requesters[usize::from(index)];
            if requester.next_at > now {
                earliest = earliest.min(requester.next_at);
                paced += 1;
            } else if requester.deficit > 0 {
                return Ok(self.serve(index, now));
            } else {
                // Bounded: each grant brings a deficit that is less than a segment below zero nearer to it.
                requester.deficit += grant(self.turn_bytes, requester.siblings);
                paced = 0;
            }
            self.turns.rotate_left(1);
        }
        Err(earliest)
    }

    #[inline]
    fn serve(&mut self, index: u16, now: Instant) -> Segment {
        let requester = &mut self.requesters[usize::from(index)];
        let pull = &mut self.pulls[requester.first as usize];
        let run = pull.runs[pull.run];
        let segment = run.first + u32::from(pull.sent);
        let (range, sequence) = (pull.range, pull.sequence);
        let waited_ns = u32::try_from(now.nanos().saturating_sub(pull.since.nanos())).unwrap_or(u32::MAX);
        let begin = u64::from(segment) * u64::from(range.segment_bytes);
        let left = u64::from(range.bytes).saturating_sub(begin);
        let bytes = u32::from(range.segment_bytes).min(u32::try_from(left).unwrap_or(u32::MAX));
        requester.deficit -= i64::from(bytes);
        requester.bytes -= u64::from(bytes);
        self.bytes -= u64::from(bytes);
        pull.bytes -= u64::from(bytes);
        if pull.pace_mbps > 0 {
            let (work, pace) = (u64::from(bytes) * 8000 + requester.paced_rest, u64::from(pull.pace_mbps));
            let gap_nanos = work / pace;
            requester.paced_rest = work % pace;
            let from = requester.next_at.nanos().max(now.nanos().saturating_sub(CATCH_UP_NANOS));
            requester.next_at = Instant::from_nanos(from.saturating_add(gap_nanos));
        }
        pull.sent += 1;
        if pull.sent == run.count {
            pull.sent = 0;
            pull.run += 1;
        }
        let to = requester.to;
        if pull.run == pull.runs_len {
            self.finish(index);
        }
        Segment { to, range, segment, bytes, sequence, waited_ns }
    }

    /// Frees the first PULL of a requester; one that has no more loses its place.
    fn finish(&mut self, index: u16) {
        let requester = &mut self.requesters[usize::from(index)];
        let place = requester.first;
        let pull = &mut self.pulls[place as usize];
        requester.first = pull.next;
        requester.pulls -= 1;
        debug_assert_eq!(pull.bytes, 0, "every byte that was counted is sent");
        pull.next = self.free;
        self.free = place;
        self.used -= 1;
        if requester.pulls > 0 {
            return;
        }
        requester.last = NONE;
        let to = requester.to;
        debug_assert_eq!(self.turns.front(), Some(&index), "the one whose turn it is was served");
        self.turns.pop_front();
        self.idle.push(index);
        self.count_siblings(to);
    }

    /// When a paced requester may be sent to next, at once if one is not paced.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.turns.iter().map(|&index| self.requesters[usize::from(index)].next_at).min()
    }
}

/// Bytes of a turn. Not too few, so that a turn is never looked for in vain for long.
fn grant(turn_bytes: u32, siblings: u32) -> i64 {
    i64::from((turn_bytes / siblings.max(1)).max(1024))
}
