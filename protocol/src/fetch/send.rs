//! Messages out: which LOOKUP or PULL goes next, and whether credit allows it.

use crate::chunk::ChunkLayout;
use crate::time::Instant;
use crate::wire::message::{self, MAX_CONTROL_BYTES, MAX_PULL_RUNS, PullRange, Run};

use super::event::{StoreIndex, Transmit};
use super::index::{Index, JobIndex, List, TransferIndex};
use super::planes::Started;
use super::tables::{ChunkState, JobState, TransferState};
use super::{FetchEngine, bits, segments};

/// How far beyond the first chunk without a slot another may be given one, because the first's store has its share.
const LOOK_AHEAD: u32 = 64;
/// A PULL covers 64 segments, so it has at most half as many runs.
const PULL_RUNS: usize = 32;
const _: () = assert!(PULL_RUNS <= MAX_PULL_RUNS);

/// What a fetch did with its turn.
enum Turn {
    Sent(Transmit),
    /// It has nothing that can be asked for now.
    Passed,
    /// It waits for memory: no other is to begin a plane, but those begun are to be ended, which is what frees some.
    Full,
    /// Nobody else is to have what it waits for.
    Waits,
}

impl<L: ChunkLayout> FetchEngine<L> {
    /// Writes the next message to send, if credit allows one; `out` needs [`MAX_CONTROL_BYTES`], with less
    /// nothing is sent. Lookups come first, then chunk headers, then planes.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        if out.len() < MAX_CONTROL_BYTES {
            return None;
        }
        self.now = self.now.max(now);
        self.admit();
        if self.due_stores.is_empty() && self.due_headers.is_empty() && self.ready_blocked {
            return None;
        }
        if self.pacer.next() > now {
            self.paced_until = self.pacer.next();
            return None;
        }
        if let Some(transmit) = self.send_request(now, out) {
            // The answers to many LOOKUPs come in one go too.
            self.pacer.spend(now, 1);
            return Some(transmit);
        }
        if self.in_flight >= self.link.cap() {
            self.link.is_full();
            return None;
        }
        if !self.asks.has_room() {
            return None;
        }
        self.send_header_pull(now, out).or_else(|| self.send_plane_pull(now, out))
    }

    /// Notes that a fetch has chunks that want slots.
    pub(super) fn want_chunks(&mut self, index: JobIndex) {
        let job = &mut self.jobs[index.at()];
        if !job.in_admit {
            job.in_admit = true;
            self.admit.push(index);
        }
        self.admit_blocked = false;
    }

    /// Notes that a fetch has planes to start or segments to ask for.
    pub(super) fn make_ready(&mut self, index: JobIndex) {
        let job = &mut self.jobs[index.at()];
        if !job.in_ready {
            job.in_ready = true;
            self.ready.push(index);
        }
        self.ready_blocked = false;
    }

    /// Notes that a header has segments to ask for.
    pub(super) fn make_header_due(&mut self, index: TransferIndex) {
        let transfer = &mut self.transfers[index.at()];
        if !transfer.listed {
            transfer.listed = true;
            self.due_headers.push_back(index);
        }
    }

    /// Gives chunk slots to the fetches that want some, the first in turn first.
    fn admit(&mut self) {
        // Chunks that are given up at once leave their slots to others.
        while !self.admit_blocked {
            self.admit_blocked = true;
            self.admit_all();
        }
    }

    fn admit_all(&mut self) {
        let (schedule, jobs) = (self.config.schedule, &self.jobs);
        self.admit.sort_unstable_by_key(|index| schedule.rank(&jobs[index.at()], 1));
        let mut at = 0;
        while let Some(index) = self.admit.get(at).copied() {
            self.admit_some(index);
            let job = &mut self.jobs[index.at()];
            if job.state == JobState::Running && job.next_chunk < job.keys {
                at += 1;
            } else {
                job.in_admit = false;
                self.admit.remove(at);
            }
        }
    }

    fn admit_some(&mut self, index: JobIndex) {
        let job = self.jobs[index.at()];
        if job.state != JobState::Running {
            return;
        }
        let active = u32::from(self.config.active_chunks);
        let free = u32::try_from(self.free_chunks.len()).unwrap_or(u32::MAX);
        // There is always some left for a fetch that comes.
        let fetches = u32::try_from(self.fetches()).unwrap_or(u32::MAX);
        let share = (active / (fetches + 1).min(u32::from(self.config.max_fetches))).max(1);
        let room = free.min(share.saturating_sub(job.chunks));
        let worthwhile = (job.keys - job.next_chunk).min((active / 4).clamp(1, super::MAX_REQUEST_KEYS));
        // A fetch that has some waits until a LOOKUP is worth its packet.
        if room == 0 || (job.chunks > 0 && room < worthwhile.div_ceil(2)) {
            return;
        }
        self.open_chunks(index, room.min(worthwhile));
        self.settle_job(index);
    }

    /// Opens up to `count` chunks of a fetch, in order, but for those whose store has its share already.
    fn open_chunks(&mut self, index: JobIndex, count: u32) {
        let (keys, planes) = (self.jobs[index.at()].keys, self.jobs[index.at()].expect.planes());
        let store_share = self.share(u32::from(self.config.active_chunks));
        let admitted = self.admitted_range(index);
        let (mut left, mut chunk) = (count, self.jobs[index.at()].next_chunk);
        let first = chunk;
        while left > 0 && chunk < keys && (chunk - first < LOOK_AHEAD || left == count) {
            let next = self.jobs[index.at()].next_chunk;
            if let Some(first_plane) = self.first_plane(chunk, planes) {
                let key = &self.job_keys[self.job_key(index, chunk)];
                let store = self.store_for(self.jobs[index.at()].sources, key);
                if self.stores[usize::from(store.0)].chunks < store_share {
                    self.open_chunk(index, chunk, first_plane);
                    left -= 1;
                } else if chunk - next >= LOOK_AHEAD {
                    return;
                } else {
                    chunk = bits::next_clear(&self.job_admitted[admitted.clone()], chunk + 1, keys);
                    continue;
                }
            }
            bits::set(&mut self.job_admitted[admitted.clone()], chunk);
            self.jobs[index.at()].next_chunk =
                bits::next_clear(&self.job_admitted[admitted.clone()], next, keys);
            chunk = bits::next_clear(&self.job_admitted[admitted.clone()], chunk + 1, keys);
        }
    }

    fn send_header_pull(&mut self, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        for _ in 0..self.due_headers.len() {
            let index = self.due_headers.pop_front()?;
            let transfer = &mut self.transfers[index.at()];
            transfer.listed = false;
            if transfer.state != TransferState::Receiving {
                continue;
            }
            let store = transfer.store;
            let budget = (self.link.cap() - self.in_flight).min(self.room_of(store)).min(self.link.pull());
            let transmit = self.pull(index, budget, now, out);
            let transfer = &self.transfers[index.at()];
            let (chunk, is_asked) = (transfer.chunk, transfer.cursor >= transfer.segments);
            if !is_asked {
                self.make_header_due(index);
            }
            if transmit.is_some() {
                self.hedge_header(chunk, store);
                return transmit;
            }
        }
        None
    }

    /// Notes when a replica is asked for a header instead.
    fn hedge_header(&mut self, chunk: super::index::ChunkIndex, store: StoreIndex) {
        let slot = &self.chunks[chunk.at()];
        if self.placement.replicas() > 1 && slot.hedge_at == Instant::FAR && !slot.is_hedged {
            let at = self.now.plus_nanos(self.store(store).hedge_after());
            let slot = &mut self.chunks[chunk.at()];
            assert_eq!(slot.state, ChunkState::Header, "its header is being pulled");
            slot.hedge_at = at;
            self.arm_deadline(at);
        }
    }

    /// Segments that may be asked of a store.
    fn room_of(&self, store: StoreIndex) -> u32 {
        self.stores[usize::from(store.0)].room(self.now, self.link.cap(), self.link.pull())
    }

    /// One PULL for the fetch whose turn it is, or the next that can use it.
    fn send_plane_pull(&mut self, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        if self.ready_blocked {
            return None;
        }
        let (schedule, jobs, pulls) = (self.config.schedule, &self.jobs, self.counters.pulls_sent);
        self.ready.sort_unstable_by_key(|index| schedule.rank(&jobs[index.at()], pulls));
        let mut at = 0;
        let mut may_start = true;
        while let Some(index) = self.ready.get(at).copied() {
            match self.take_turn(index, may_start, now, out) {
                Turn::Sent(transmit) => {
                    self.jobs[index.at()].last_turn = self.counters.pulls_sent;
                    return Some(transmit);
                }
                Turn::Passed => {}
                Turn::Full => may_start = false,
                Turn::Waits => return None,
            }
            let job = &mut self.jobs[index.at()];
            if job.to_ask.is_empty() && job.to_start.is_empty() {
                job.in_ready = false;
                self.ready.remove(at);
            } else {
                at += 1;
            }
        }
        self.ready_blocked = true;
        None
    }

    fn take_turn(&mut self, job: JobIndex, may_start: bool, now: Instant, out: &mut [u8]) -> Turn {
        let mut next = self.jobs[job.at()].to_ask.front();
        while let Some(index) = next {
            next = List::behind(&self.transfer_links, index);
            match self.ask_for(index, now, out) {
                Turn::Passed => {}
                turn => return turn,
            }
        }
        if !may_start {
            return Turn::Passed;
        }
        match self.start_plane(job) {
            Started::Plane(index) => self.ask_for(index, now, out),
            Started::Nothing => Turn::Passed,
            Started::Full => Turn::Full,
        }
    }

    /// Asks for segments of a plane, as many as are worth a packet.
    fn ask_for(&mut self, index: TransferIndex, now: Instant, out: &mut [u8]) -> Turn {
        let transfer = self.transfers[index.at()];
        let words = &self.segments[self.segment_range(index)];
        let first = segments::next_wanted(words, transfer.cursor, transfer.segments);
        if first == transfer.segments {
            self.unlist_transfer(index);
            return Turn::Passed;
        }
        let wanted =
            segments::wanted_from(words, first, transfer.segments).count_ones().min(self.link.pull());
        // Credit comes back a segment at a time: wait until it is worth a packet.
        let room = self.link.cap() - self.in_flight;
        if room < wanted && self.in_flight > 0 {
            self.link.is_full();
            return Turn::Waits;
        }
        match self.worth_of(transfer.store, wanted) {
            None => Turn::Passed,
            Some(budget) => self.pull(index, budget.min(room), now, out).map_or(Turn::Passed, Turn::Sent),
        }
    }

    /// How many of `wanted` segments to ask a store for; none while its window has not room enough to be worth a packet.
    pub(super) fn worth_of(&self, store: StoreIndex, wanted: u32) -> Option<u32> {
        let (room, in_flight) = (self.room_of(store), self.stores[usize::from(store.0)].in_flight);
        // A window of less than two PULLs is asked for in halves.
        let wanted = wanted.min((room + in_flight).div_ceil(2));
        let is_worth = room > 0 && (room >= wanted || in_flight == 0);
        is_worth.then_some(wanted.min(room))
    }

    /// Writes a PULL for at most `budget` wanted segments of a transfer, within 64 from its cursor on.
    fn pull(&mut self, index: TransferIndex, budget: u32, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        let range = self.segment_range(index);
        let transfer = &mut self.transfers[index.at()];
        let words = &mut self.segments[range];
        let base = segments::next_wanted(words, transfer.cursor, transfer.segments);
        transfer.cursor = base;
        if budget == 0 || base == transfer.segments || !self.asks.has_room() {
            return None;
        }
        let asked = segments::lowest(segments::wanted_from(words, base, transfer.segments), budget);
        let mut runs = [Run::default(); PULL_RUNS];
        let runs_len = runs_of(base, asked, &mut runs);
        let slot = &self.chunks[transfer.chunk.at()];
        let range = PullRange {
            tag: transfer.tag,
            handle: slot.info.handle,
            epoch: transfer.epoch,
            offset: transfer.offset,
            bytes: transfer.bytes,
            segment_bytes: transfer.segment_bytes,
        };
        let store = &mut self.stores[usize::from(transfer.store.0)];
        let ask = self.asks.push(&mut store.asks, now, transfer.store, index, (base, asked));
        let sequence = self.asks.get(ask).sequence;
        let pace = self.link.store_pace_mbps();
        let written = message::emit_pull(out, &range, pace, sequence, &runs[..runs_len]);
        let len = written.expect("a buffer for any message holds a PULL");
        segments::set_asked(words, base, asked);
        let first = index.at() * self.segment_words * 64 + base as usize;
        let end = 64 - asked.leading_zeros();
        self.asked_by[first..first + end as usize]
            .iter_mut()
            .enumerate()
            .filter(|(bit, _)| asked >> bit & 1 == 1)
            .for_each(|(_, by)| *by = ask);
        let count = asked.count_ones();
        // Bits below are of segments that were asked for before.
        let before = transfer.asked.saturating_sub(base);
        let again = if before >= 64 { count } else { (asked & ((1 << before) - 1)).count_ones() };
        transfer.asked = transfer.asked.max(base + end);
        transfer.cursor = base + end;
        transfer.in_flight += count;
        if store.in_flight == 0 {
            store.timeout_at = now.plus_nanos(store.timeout());
        }
        store.in_flight += count;
        self.in_flight += count;
        let (store_index, timeout_at) = (transfer.store, store.timeout_at);
        self.arm(timeout_at);
        self.pacer.spend(now, count);
        assert!(self.in_flight <= self.config.window_segments, "the budget was within the window");
        self.counters.pulls_sent += 1;
        self.counters.segments_asked += u64::from(count - again);
        self.counters.segments_asked_again += u64::from(again);
        Some(Transmit { store: store_index, len })
    }
}

/// Writes the segments `base` + bits of `mask` as runs; returns how many.
fn runs_of(base: u32, mask: u64, runs: &mut [Run; PULL_RUNS]) -> usize {
    let (mut left, mut len) = (mask, 0);
    while left != 0 {
        let begin = left.trailing_zeros();
        let count = (left >> begin).trailing_ones();
        runs[len] = Run { first: base + begin, count: u16::try_from(count).expect("at most 64") };
        len += 1;
        left = if begin + count == 64 { 0 } else { left >> (begin + count) << (begin + count) };
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_name_each_bit_once_in_order(mask in any::<u64>(), dense in any::<bool>(), base in 0_u32..1000) {
            let mask = if dense { mask | mask << 1 } else { mask };
            let mut runs = [Run::default(); PULL_RUNS];
            let len = runs_of(base, mask, &mut runs);
            let named: Vec<u32> =
                runs[..len].iter().flat_map(|run| run.first..run.first + u32::from(run.count)).collect();
            let twin: Vec<u32> = (0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| base + bit).collect();
            prop_assert_eq!(named, twin);
        }
    }
}
