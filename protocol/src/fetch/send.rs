//! Messages out: which LOOKUP or PULL goes next, and whether credit allows it.

use crate::chunk::ChunkLayout;
use crate::time::Instant;
use crate::wire::message::{self, MAX_CONTROL_BYTES, MAX_PULL_RUNS, PullRange, Run};

use super::event::Transmit;
use super::index::{Index, JobIndex, TransferIndex};
use super::tables::{JobState, Request, RequestState, TransferState};
use super::{Asker, FetchEngine, bits};

impl<L: ChunkLayout> FetchEngine<L> {
    /// Writes the next message to send, if credit allows one; `out` needs [`MAX_CONTROL_BYTES`], with less
    /// nothing is sent. Lookups come first, then chunk headers, then planes.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        if out.len() < MAX_CONTROL_BYTES {
            return None;
        }
        self.admit();
        if let Some(transmit) = self.send_request(now, out) {
            return Some(transmit);
        }
        if self.in_flight >= self.config.window_segments {
            return None;
        }
        self.send_header_pull(now, out).or_else(|| self.send_plane_pull(now, out))
    }

    /// Notes that a fetch has chunks that want slots.
    pub(super) fn want_chunks(&mut self, index: JobIndex) {
        let job = &mut self.jobs[index.at()];
        if !job.in_admit {
            job.in_admit = true;
            self.admit.push_back(index);
        }
        self.admit_blocked = false;
    }

    /// Notes that a fetch has planes to start or segments to ask for.
    pub(super) fn make_ready(&mut self, index: JobIndex) {
        let job = &mut self.jobs[index.at()];
        if !job.in_ready {
            job.in_ready = true;
            self.ready.push_back(index);
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

    /// Notes that a LOOKUP of `keys` keys is to be sent.
    pub(super) fn make_due(&mut self, asker: Asker, keys: u8) {
        let request = self.request(asker);
        assert_eq!(request.state, RequestState::Idle, "one LOOKUP at a time");
        let fresh = Request::new(super::tag::next(request.id));
        *request = Request { keys, state: RequestState::Due, queued: request.queued, ..fresh };
        self.queue_request(asker);
    }

    /// Puts a LOOKUP that is due into the queue, if it is not there.
    pub(super) fn queue_request(&mut self, asker: Asker) {
        let request = self.request(asker);
        request.state = RequestState::Due;
        if !request.queued {
            request.queued = true;
            self.due_requests.push_back(asker);
        }
    }

    fn request(&mut self, asker: Asker) -> &mut Request {
        match asker {
            Asker::Job(index) => &mut self.jobs[index.at()].request,
            Asker::Lookup(index) => &mut self.lookups[index.at()].request,
        }
    }

    /// Has a fetch's waiting chunks looked up, unless a LOOKUP of it is under way.
    pub(super) fn request_chunks(&mut self, index: JobIndex) {
        let job = &mut self.jobs[index.at()];
        if job.request.state != RequestState::Idle {
            return;
        }
        let mut keys = 0_u8;
        for place in &mut self.job_requests[index.at()] {
            let Some(chunk) = job.to_look_up.pop_front(&mut self.chunk_links) else { break };
            self.chunks[chunk.at()].listed = false;
            *place = chunk;
            keys += 1;
        }
        if keys > 0 {
            self.make_due(Asker::Job(index), keys);
        }
    }

    /// Gives chunk slots to the fetches that want some, in turn.
    fn admit(&mut self) {
        if self.admit_blocked {
            return;
        }
        for _ in 0..self.admit.len() {
            let Some(index) = self.admit.pop_front() else { break };
            self.admit_some(index);
            let job = &mut self.jobs[index.at()];
            if job.state == JobState::Running && job.next_chunk < job.keys {
                self.admit.push_back(index);
            } else {
                job.in_admit = false;
            }
        }
        self.admit_blocked = true;
    }

    fn admit_some(&mut self, index: JobIndex) {
        let job = &self.jobs[index.at()];
        let is_asking = job.request.state != RequestState::Idle || !job.to_look_up.is_empty();
        if job.state != JobState::Running || is_asking {
            return;
        }
        let (held, wanted, planes) = (job.chunks, job.keys - job.next_chunk, job.expect.planes());
        let active = u32::from(self.config.active_chunks);
        let taken = self.stores[usize::from(job.store.0)].chunks;
        let free = u32::try_from(self.free_chunks.len()).unwrap_or(u32::MAX);
        let room = free.min(self.share(active).saturating_sub(taken));
        let worthwhile = wanted.min((active / 4).clamp(1, super::MAX_REQUEST_KEYS));
        // A fetch that has some waits until a LOOKUP is worth its packet.
        if room == 0 || (held > 0 && room < worthwhile.div_ceil(2)) {
            return;
        }
        let mut left = room.min(worthwhile);
        while left > 0 && self.jobs[index.at()].next_chunk < self.jobs[index.at()].keys {
            let chunk = self.jobs[index.at()].next_chunk;
            self.jobs[index.at()].next_chunk += 1;
            if let Some(first) = self.first_plane(chunk, planes) {
                self.open_chunk(index, chunk, first);
                left -= 1;
            }
        }
        self.request_chunks(index);
        self.settle_job(index);
    }

    fn send_request(&mut self, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        while let Some(asker) = self.due_requests.pop_front() {
            let request = self.request(asker);
            request.queued = false;
            if request.state != RequestState::Due {
                continue;
            }
            request.state = RequestState::Sent;
            request.sent = request.sent.saturating_add(1);
            request.sent_at = now;
            let (id, sent, keys) = (request.id, request.sent, usize::from(request.keys));
            let per_fetch = self.config.max_chunks_per_fetch as usize;
            let (store, len) = match asker {
                Asker::Job(index) => {
                    let all = &self.job_keys[index.at() * per_fetch..][..per_fetch];
                    let asked = self.job_requests[index.at()][..keys].iter();
                    let keys = asked.map(|chunk| &all[self.chunks[chunk.at()].chunk as usize]);
                    (self.jobs[index.at()].store, message::emit_lookup(out, id, keys)?)
                }
                Asker::Lookup(index) => {
                    let job = &self.lookups[index.at()];
                    let first = index.at() * per_fetch + job.found as usize;
                    let keys = self.lookup_keys[first..first + keys].iter();
                    (job.store, message::emit_lookup(out, id, keys)?)
                }
            };
            let rto_at = now.plus_nanos(self.store(store).rto(sent - 1));
            self.request(asker).rto_at = rto_at;
            self.arm(rto_at);
            self.counters.lookups_sent += 1;
            return Some(Transmit { store, len });
        }
        None
    }

    fn send_header_pull(&mut self, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        for _ in 0..self.due_headers.len() {
            let index = self.due_headers.pop_front()?;
            let transfer = &mut self.transfers[index.at()];
            transfer.listed = false;
            if transfer.state != TransferState::Receiving {
                continue;
            }
            let room = self.config.window_segments - self.in_flight;
            let budget = room.min(self.pull_segments).min(self.room_of(index));
            let transmit = self.pull(index, budget, now, out);
            let transfer = &self.transfers[index.at()];
            if transfer.cursor < transfer.segments {
                self.make_header_due(index);
            }
            if transmit.is_some() {
                return transmit;
            }
        }
        None
    }

    /// Segments that may be asked of a transfer's store.
    fn room_of(&self, index: TransferIndex) -> u32 {
        self.stores[usize::from(self.transfers[index.at()].store.0)].room(self.pull_segments)
    }

    /// One PULL for the next fetch whose turn it is and that can use it.
    fn send_plane_pull(&mut self, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        if self.ready_blocked {
            return None;
        }
        let room = self.config.window_segments - self.in_flight;
        for _ in 0..self.ready.len() {
            let job = self.ready.pop_front()?;
            if self.jobs[job.at()].to_ask.is_empty() && !self.start_plane(job) {
                self.requeue(job);
                continue;
            }
            let Some(index) = self.jobs[job.at()].to_ask.front() else { continue };
            let transfer = &self.transfers[index.at()];
            let wanted = self.pull_segments.min(transfer.segments - transfer.cursor);
            // Credit comes back a segment at a time: wait until it is worth a packet.
            if room < wanted && self.in_flight > 0 {
                self.ready.push_front(job);
                return None;
            }
            let store_room = self.room_of(index);
            let transmit = self.pull(index, wanted.min(room).min(store_room), now, out);
            let transfer = &self.transfers[index.at()];
            if transfer.cursor == transfer.segments {
                self.unlist_transfer(index);
            }
            self.requeue(job);
            if transmit.is_some() {
                return transmit;
            }
        }
        self.ready_blocked = true;
        None
    }

    /// Puts a fetch that had its turn behind the others, if it has more to ask for.
    fn requeue(&mut self, index: JobIndex) {
        let job = &mut self.jobs[index.at()];
        if job.to_ask.is_empty() && job.to_start.is_empty() {
            job.in_ready = false;
        } else {
            self.ready.push_back(index);
        }
    }

    /// Writes a PULL for at most `budget` missing segments of a transfer from its cursor on.
    fn pull(&mut self, index: TransferIndex, budget: u32, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        if budget == 0 {
            return None;
        }
        let arrived = &self.arrived[self.arrived_range(index)];
        let transfer = &mut self.transfers[index.at()];
        let (segments, asked_before) = (transfer.segments, transfer.asked);
        let mut runs = [Run::default(); MAX_PULL_RUNS];
        let (mut runs_len, mut asked, mut again) = (0, 0, 0);
        let mut cursor = bits::next_clear(arrived, transfer.cursor, segments);
        while cursor < segments && asked < budget && runs_len < MAX_PULL_RUNS {
            let stop = bits::next_set(arrived, cursor, segments.min(cursor + (budget - asked)));
            let count = stop - cursor;
            runs[runs_len] = Run { first: cursor, count: u16::try_from(count).expect("at most 64") };
            runs_len += 1;
            if cursor >= asked_before && transfer.timed_segment == u32::MAX {
                (transfer.timed_segment, transfer.timed_at) = (cursor, now);
            }
            again += stop.min(asked_before).saturating_sub(cursor);
            asked += count;
            cursor = bits::next_clear(arrived, stop, segments);
        }
        transfer.cursor = cursor;
        transfer.asked = asked_before.max(cursor);
        if asked == 0 {
            return None;
        }
        let slot = &self.chunks[transfer.chunk.at()];
        let range = PullRange {
            tag: transfer.tag,
            handle: slot.info.handle,
            epoch: transfer.epoch,
            offset: transfer.offset,
            bytes: transfer.bytes,
            segment_bytes: self.config.segment_bytes,
        };
        let len = message::emit_pull(out, &range, 0, 0, &runs[..runs_len])?;
        let store_index = transfer.store;
        let store = &mut self.stores[usize::from(store_index.0)];
        transfer.in_flight += asked;
        store.in_flight += asked;
        self.in_flight += asked;
        transfer.rto_at = now.plus_nanos(store.rto(transfer.backoff));
        let rto_at = transfer.rto_at;
        self.arm(rto_at);
        assert!(self.in_flight <= self.config.window_segments, "the budget was within the window");
        self.counters.pulls_sent += 1;
        self.counters.segments_asked += u64::from(asked - again);
        self.counters.segments_asked_again += u64::from(again);
        Some(Transmit { store: store_index, len })
    }
}
