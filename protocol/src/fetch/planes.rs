//! Transfers: from a plane's start to its verdict.

use crate::chunk::ChunkLayout;
use crate::pull::PathIndex;
use crate::time::Instant;
use crate::wire::message::SEGMENT_ALIGN;

use super::event::{ChunkFailure, StoreIndex, TransferId, Verdict};
use super::index::{ChunkIndex, Index, JobIndex, List, TransferIndex};
use super::tables::{ChunkState, JobState, Transfer, TransferState};
use super::{FetchEngine, Queued, bits, tag};

/// Chunks of a fetch that are looked at for the one whose store has least to send.
const LOOK_AHEAD: usize = 16;

/// PULLs in large segments of which nothing came, since a plane in such segments arrived, after which the path is suspected.
const SUSPECT_PULLS: u8 = 4;

/// What became of an attempt to start a plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Started {
    Plane(TransferIndex),
    /// There is none to start, or its store has its share, or cannot be asked for it now.
    Nothing,
    /// No transfer or no memory is free: nobody else should take what the first in turn waits for.
    Full,
}

impl<L: ChunkLayout> FetchEngine<L> {
    /// Starts the next plane of a fetch whose store can be asked for something, if there is a free transfer, and memory
    /// for the whole plane.
    pub(super) fn start_plane(&mut self, job: JobIndex) -> Started {
        if let Some(chunk) = self.least_asked(job)
            && let started @ (Started::Plane(_) | Started::Full) = self.start_plane_of(job, chunk)
        {
            return started;
        }
        let mut next = self.jobs[job.at()].to_start.front();
        while let Some(chunk) = next {
            next = List::behind(&self.chunk_links, chunk);
            let path = PathIndex(self.chunks[chunk.at()].store.0);
            if self.puller.room_of(self.now, path) == 0 {
                continue;
            }
            match self.start_plane_of(job, chunk) {
                Started::Nothing => {}
                started => return started,
            }
        }
        Started::Nothing
    }

    /// Of a fetch's next chunks, the first whose store has the least to send: stores that are slower than our link fill it
    /// together, and none has a queue while another is idle.
    fn least_asked(&self, job: JobIndex) -> Option<ChunkIndex> {
        if self.stores.len() == 1 {
            return None;
        }
        let mut next = self.jobs[job.at()].to_start.front();
        let mut best = None;
        for _ in 0..LOOK_AHEAD {
            let Some(chunk) = next else { break };
            next = List::behind(&self.chunk_links, chunk);
            let path = PathIndex(self.chunks[chunk.at()].store.0);
            let (is_open, in_flight) =
                (self.puller.room_of(self.now, path) > 0, self.puller.path(path).in_flight());
            if is_open && best.is_none_or(|(least, _)| in_flight < least) {
                best = Some((in_flight, chunk));
            }
        }
        best.map(|(_, chunk)| chunk)
    }

    fn start_plane_of(&mut self, job: JobIndex, chunk: ChunkIndex) -> Started {
        let planes = u32::from(self.config.max_planes_per_chunk);
        let plane = bits::next_set(&self.chunk_todo[self.todo_range(chunk)], 0, planes);
        assert!(plane < planes, "a chunk in the list has planes to start");
        let range = self.chunk_ranges[chunk.at()].as_slice()[plane as usize];
        let store_index = self.chunks[chunk.at()].store;
        let segment_bytes = u32::from(self.store(store_index).segment_bytes);
        // The segments are counted by a division, which is not done for planes that are not begun: this is asked with every burst.
        let pull = self.puller.link().pull();
        let is_short = range.bytes <= pull.saturating_sub(1).saturating_mul(segment_bytes);
        let wanted = if is_short { range.bytes.div_ceil(segment_bytes) } else { pull };
        if self.puller.worth_of(self.now, PathIndex(store_index.0), wanted).is_none() {
            return Started::Nothing;
        }
        let segments = range.bytes.div_ceil(segment_bytes);
        assert!(segments <= self.plane_segments, "checked when the header arrived");
        if self.free_planes.is_empty() || self.memory + segments > self.config.memory_segments {
            return Started::Full;
        }
        let plane_share = self.share(u32::from(self.config.active_planes));
        let memory_share = self.share(self.config.memory_segments);
        let store = self.store(store_index);
        if store.planes >= plane_share || (store.memory > 0 && store.memory + segments > memory_share) {
            return Started::Nothing;
        }
        let index = self.free_planes.pop().expect("one was seen");
        let store = self.store(store_index);
        store.planes += 1;
        store.memory += segments;
        self.memory += segments;
        let todo = self.todo_range(chunk);
        bits::clear(&mut self.chunk_todo[todo.clone()], plane);
        bits::set(&mut self.chunk_begun[todo.clone()], plane);
        if bits::next_set(&self.chunk_todo[todo], 0, planes) == planes {
            self.unlist_chunk(chunk);
        }
        let plane = u16::try_from(plane).expect("below max_planes_per_chunk");
        self.begin(index, chunk, plane, range.offset, range.bytes);
        self.transfers[index.at()].listed = true;
        self.jobs[job.at()].to_ask.push_back(&mut self.transfer_links, index);
        Started::Plane(index)
    }

    /// Asks `store` for segments of up to `bytes` from now on, rounded down to a multiple of 32 and never less than the configuration's.
    /// What is under way in larger ones begins anew.
    pub fn set_segment_bytes(&mut self, store: StoreIndex, bytes: u16) {
        let bytes = (bytes / SEGMENT_ALIGN * SEGMENT_ALIGN).max(self.config.segment_bytes);
        let Some(entry) = self.stores.get_mut(usize::from(store.0)) else { return };
        let before = std::mem::replace(&mut entry.segment_bytes, bytes);
        let largest = self.stores.iter().map(|store| store.segment_bytes).max().unwrap_or(bytes);
        self.puller.set_segment_bytes(largest);
        if bytes < before {
            self.begin_smaller(store, bytes);
        }
    }

    /// Begins the transfers from `store` anew whose segments are larger than `bytes`: the path does not carry them any more.
    #[cold]
    fn begin_smaller(&mut self, store: StoreIndex, bytes: u16) {
        for index in TransferIndex::all(self.transfers.len()) {
            let transfer = &self.transfers[index.at()];
            let is_under_way = transfer.state == TransferState::Receiving && transfer.store == store;
            if !is_under_way || self.puller.span(index).segment_bytes <= bytes {
                continue;
            }
            let chunk = transfer.chunk;
            self.stop(index);
            if self.is_header(index) {
                self.pull_header(chunk);
            }
        }
    }

    /// Counts a PULL of a transfer of which nothing came; if that was so of several in large segments, perhaps the path does not carry them
    /// any more.
    pub(super) fn suspect(&mut self, index: TransferIndex) {
        if self.puller.span(index).segment_bytes <= self.config.segment_bytes {
            return;
        }
        let store = self.transfers[index.at()].store;
        let entry = &mut self.stores[usize::from(store.0)];
        entry.untouched += 1;
        if entry.untouched >= SUSPECT_PULLS {
            entry.untouched = 0;
            self.suspect = Some(store);
        }
    }

    /// A store of which nothing came in large segments: perhaps the path does not carry them. Reported once each time; the answer is
    /// [`set_segment_bytes`](Self::set_segment_bytes), if it is so.
    #[inline]
    pub fn poll_suspect(&mut self) -> Option<StoreIndex> {
        self.suspect.take()
    }

    /// Makes a free transfer pull a byte range of a chunk.
    pub(super) fn begin(
        &mut self,
        index: TransferIndex,
        chunk: ChunkIndex,
        plane: u16,
        offset: u64,
        bytes: u32,
    ) {
        let segment_bytes = self.store(self.chunks[chunk.at()].store).segment_bytes;
        let slot = &mut self.chunks[chunk.at()];
        slot.transfers += 1;
        let store = slot.store;
        let before = &self.transfers[index.at()];
        assert_eq!(before.state, TransferState::Free, "a transfer is used once at a time");
        self.transfers[index.at()] = Transfer {
            state: TransferState::Receiving,
            store,
            epoch: slot.epoch,
            chunk,
            plane,
            // A header's place in its queue outlives its use.
            listed: before.listed,
            ..Transfer::free(tag::next(before.tag))
        };
        self.puller.begin(index, PathIndex(store.0), (offset, bytes), segment_bytes);
    }

    /// Goes on with what was given up: it is wanted again, before anything else of its fetch. `was_lost` says that it was for lost, and not
    /// since it was refused.
    pub(super) fn take_given_up(&mut self, was_lost: bool) {
        while let Some(given_up) = self.puller.poll_given_up() {
            if was_lost && given_up.was_in_vain {
                self.suspect(given_up.span);
            }
            self.ready_blocked = false;
            self.want_segments(given_up.span);
        }
    }

    /// Notes that a transfer has segments to ask for again.
    pub(super) fn want_segments(&mut self, index: TransferIndex) {
        if self.is_header(index) {
            self.make_header_due(index);
            return;
        }
        let Transfer { chunk, listed, .. } = self.transfers[index.at()];
        let job = self.chunks[chunk.at()].job;
        if !listed {
            self.transfers[index.at()].listed = true;
            self.jobs[job.at()].to_ask.push_front(&mut self.transfer_links, index);
        }
        self.make_ready(job);
    }

    /// Stops all transfers of a chunk that are still receiving. Their planes may be started again.
    pub(super) fn stop_chunk(&mut self, chunk: ChunkIndex) {
        let header = self.header_transfer(chunk);
        for index in TransferIndex::all(usize::from(self.config.active_planes)).chain([header]) {
            let transfer = &self.transfers[index.at()];
            if transfer.chunk == chunk && transfer.state == TransferState::Receiving {
                self.stop(index);
            }
        }
    }

    /// Stops a transfer that is receiving; its plane, or header, is still wanted.
    fn stop(&mut self, index: TransferIndex) {
        let Transfer { chunk, plane, .. } = self.transfers[index.at()];
        self.abandon(index);
        if !self.is_header(index) {
            self.return_plane(chunk, plane);
        }
    }

    /// Stops a transfer that is receiving, without a thought of its plane.
    pub(super) fn abandon(&mut self, index: TransferIndex) {
        self.puller.leave(index);
        self.ready_blocked = false;
        if self.is_header(index) {
            let transfer = &mut self.transfers[index.at()];
            transfer.state = TransferState::Free;
            self.chunks[transfer.chunk.at()].transfers -= 1;
            return;
        }
        self.counters.transfers_reset += 1;
        self.unlist_transfer(index);
        let transfer = &self.transfers[index.at()];
        let (chunk, plane, empty) = (transfer.chunk, transfer.plane, self.puller.span(index).arrived == 0);
        let begun = self.todo_range(chunk);
        bits::clear(&mut self.chunk_begun[begun], u32::from(plane));
        if empty {
            self.free_plane(index);
        } else {
            self.transfers[index.at()].state = TransferState::Reset;
            self.push_event(Queued::TransferReset(index));
        }
    }

    /// Takes a plane out of its fetch's list of what is to be asked for.
    pub(super) fn unlist_transfer(&mut self, index: TransferIndex) {
        let transfer = &mut self.transfers[index.at()];
        if transfer.listed {
            transfer.listed = false;
            let job = self.chunks[transfer.chunk.at()].job;
            self.jobs[job.at()].to_ask.remove(&mut self.transfer_links, index);
        }
    }

    /// Frees a plane's transfer and what it holds, without a look at its chunk.
    fn free_plane(&mut self, index: TransferIndex) {
        let transfer = &mut self.transfers[index.at()];
        assert!(!transfer.listed, "nothing of it is wanted any more");
        transfer.state = TransferState::Free;
        let (segments, store, chunk) = (self.puller.span(index).segments, transfer.store, transfer.chunk);
        let store = self.store(store);
        store.planes -= 1;
        store.memory -= segments;
        self.memory -= segments;
        self.chunks[chunk.at()].transfers -= 1;
        self.free_planes.push(index);
        self.ready_blocked = false;
    }

    /// Frees a plane's transfer and goes on with its chunk.
    pub(super) fn release_plane(&mut self, index: TransferIndex) {
        let chunk = self.transfers[index.at()].chunk;
        self.free_plane(index);
        self.settle_chunk(chunk);
    }

    /// Takes in what became of an arrived plane. False, and nothing else, if `transfer` does not await a verdict.
    pub fn verdict(&mut self, now: Instant, transfer: TransferId, verdict: Verdict) -> bool {
        self.now = self.now.max(now);
        let Some(found) = self.announced(transfer) else { return false };
        let (chunk, plane) = (found.chunk, found.plane);
        // `announced` has found the slot in the table.
        let index = TransferIndex(tag::slot_of(transfer.0));
        let begun = self.todo_range(chunk);
        bits::clear(&mut self.chunk_begun[begun], u32::from(plane));
        match verdict {
            Verdict::Delivered => {
                self.counters.planes_delivered += 1;
                self.delivered(chunk);
            }
            Verdict::Corrupt => {
                self.counters.planes_corrupt += 1;
                self.judge_corrupt(chunk, plane);
            }
            Verdict::Rejected(reason) => {
                if self.may_fail(chunk) {
                    self.fail_chunk(chunk, ChunkFailure::Rejected(reason));
                    self.return_to_main(chunk, plane);
                }
            }
        }
        self.release_plane(index);
        true
    }

    /// Has a corrupt plane pulled again, or fails its chunk if that was done often enough.
    fn judge_corrupt(&mut self, chunk: ChunkIndex, plane: u16) {
        if !self.may_fail(chunk) {
            return;
        }
        let main = self.main_of(chunk);
        let per_chunk = usize::from(self.config.max_planes_per_chunk);
        let times = &mut self.chunk_corrupt[main.at() * per_chunk + usize::from(plane)];
        *times = times.saturating_add(1);
        if *times > self.config.corrupt_retries {
            self.fail_chunk(main, ChunkFailure::Corrupt);
            return;
        }
        self.return_plane(chunk, plane);
    }

    /// Whether a chunk can still fail: it was not reported, and its fetch goes on.
    fn may_fail(&self, chunk: ChunkIndex) -> bool {
        let slot = &self.chunks[self.main_of(chunk).at()];
        slot.state != ChunkState::Failed && self.jobs[slot.job.at()].state == JobState::Running
    }
}
