//! Messages out: which LOOKUP or PULL goes next, and whether credit allows it.

use crate::chunk::ChunkLayout;
use crate::pull::Worth;
use crate::time::Instant;
use crate::wire::message::MAX_CONTROL_BYTES;

use super::event::{StoreIndex, Transmit};
use super::index::{Index, JobIndex, List, TransferIndex};
use super::planes::Started;
use super::tables::{ChunkState, JobState, Transfer, TransferState};
use super::{FetchEngine, bits};

/// How far beyond the first chunk without a slot another may be given one, because the first's store has its share.
const LOOK_AHEAD: u32 = 64;

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
        if self.puller.is_paced(now) {
            return None;
        }
        if let Some(transmit) = self.send_request(now, out) {
            // The answers to many LOOKUPs come in one go too.
            self.puller.spend_one(now);
            return Some(transmit);
        }
        if !self.puller.has_credit() {
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
                if self.path(store).users < store_share {
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
            let chunk = transfer.chunk;
            let transmit = self.pull(index, self.puller.budget(self.now, index), now, out);
            if !self.puller.is_asked(index) {
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
            let at = self.now.plus_nanos(self.hedge_after(store));
            let slot = &mut self.chunks[chunk.at()];
            assert_eq!(slot.state, ChunkState::Header, "its header is being pulled");
            slot.hedge_at = at;
            self.arm_deadline(at);
        }
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
        match self.puller.worth(self.now, index) {
            Worth::Nothing => {
                self.unlist_transfer(index);
                Turn::Passed
            }
            Worth::Waits => Turn::Waits,
            Worth::Later => Turn::Passed,
            Worth::Segments(budget) => self.pull(index, budget, now, out).map_or(Turn::Passed, Turn::Sent),
        }
    }

    /// Writes a PULL for at most `budget` wanted segments of a transfer.
    fn pull(&mut self, index: TransferIndex, budget: u32, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        let Transfer { tag, epoch, store, chunk, .. } = self.transfers[index.at()];
        let name = (tag, self.chunks[chunk.at()].info.handle, epoch);
        let pulled = self.puller.pull(now, index, budget, name, out)?;
        self.counters.pulls_sent += 1;
        self.counters.segments_asked += u64::from(pulled.asked);
        self.counters.segments_asked_again += u64::from(pulled.again);
        Some(Transmit { store, len: pulled.len })
    }
}
