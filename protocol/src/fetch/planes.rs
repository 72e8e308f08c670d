//! Transfers: from a plane's start to its verdict.

use crate::chunk::ChunkLayout;
use crate::time::Instant;

use super::event::{ChunkFailure, TransferId, Verdict};
use super::index::{ChunkIndex, Index, JobIndex, TransferIndex};
use super::tables::{ChunkState, JobState, Transfer, TransferState};
use super::{FetchEngine, Queued, bits, tag};

impl<L: ChunkLayout> FetchEngine<L> {
    /// Starts the next plane of a fetch, if there is one, a free transfer, and memory for the whole plane.
    pub(super) fn start_plane(&mut self, job: JobIndex) -> bool {
        let Some(chunk) = self.jobs[job.at()].to_start.front() else { return false };
        let planes = u32::from(self.config.max_planes_per_chunk);
        let plane = bits::next_set(&self.chunk_todo[self.todo_range(chunk)], 0, planes);
        assert!(plane < planes, "a chunk in the list has planes to start");
        let range = self.chunk_ranges[chunk.at()].as_slice()[plane as usize];
        let segments = range.bytes.div_ceil(u32::from(self.config.segment_bytes));
        assert!(segments <= self.plane_segments, "checked when the header arrived");
        if self.memory + segments > self.config.memory_segments {
            return false;
        }
        let plane_share = self.share(u32::from(self.config.active_planes));
        let memory_share = self.share(self.config.memory_segments);
        let store_index = self.jobs[job.at()].store;
        let store = self.store(store_index);
        if store.planes >= plane_share || (store.memory > 0 && store.memory + segments > memory_share) {
            return false;
        }
        let Some(index) = self.free_planes.pop() else { return false };
        let store = self.store(store_index);
        store.planes += 1;
        store.memory += segments;
        self.memory += segments;
        let todo = self.todo_range(chunk);
        bits::clear(&mut self.chunk_todo[todo.clone()], plane);
        if bits::next_set(&self.chunk_todo[todo], 0, planes) == planes {
            self.unlist_chunk(chunk);
        }
        let plane = u16::try_from(plane).expect("below max_planes_per_chunk");
        self.begin(index, chunk, plane, range.offset, range.bytes);
        self.transfers[index.at()].listed = true;
        self.jobs[job.at()].to_ask.push_back(&mut self.transfer_links, index);
        true
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
        let segment_bytes = u32::from(self.config.segment_bytes);
        let segments = bytes.div_ceil(segment_bytes);
        assert!(bytes > 0 && bits::words(segments) <= self.segment_words, "the range was checked before");
        let arrived = self.arrived_range(index);
        self.arrived[arrived].fill(0);
        let slot = &mut self.chunks[chunk.at()];
        slot.transfers += 1;
        let store = self.jobs[slot.job.at()].store;
        let before = &self.transfers[index.at()];
        assert_eq!(before.state, TransferState::Free, "a transfer is used once at a time");
        self.transfers[index.at()] = Transfer {
            state: TransferState::Receiving,
            store,
            epoch: slot.epoch,
            segments,
            last_bytes: bytes - (segments - 1) * segment_bytes,
            bytes,
            offset,
            chunk,
            plane,
            // A header's place in its queue outlives its use.
            listed: before.listed,
            ..Transfer::free(tag::next(before.tag))
        };
    }

    /// Takes a transfer's segments out of the window, arrived or given up.
    pub(super) fn leave_window(&mut self, index: TransferIndex) {
        let transfer = &mut self.transfers[index.at()];
        let (store, in_flight) = (transfer.store, transfer.in_flight);
        transfer.in_flight = 0;
        transfer.timed_segment = u32::MAX;
        self.store(store).in_flight -= in_flight;
        self.in_flight -= in_flight;
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

    fn stop(&mut self, index: TransferIndex) {
        self.leave_window(index);
        if self.is_header(index) {
            let transfer = &mut self.transfers[index.at()];
            transfer.state = TransferState::Free;
            self.chunks[transfer.chunk.at()].transfers -= 1;
            return;
        }
        self.counters.transfers_reset += 1;
        self.unlist_transfer(index);
        let transfer = &self.transfers[index.at()];
        let (chunk, plane, empty) = (transfer.chunk, transfer.plane, transfer.arrived == 0);
        let todo = self.todo_range(chunk);
        bits::set(&mut self.chunk_todo[todo], u32::from(plane));
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
        assert!(!transfer.listed && transfer.in_flight == 0, "nothing of it is wanted any more");
        transfer.state = TransferState::Free;
        let (segments, store, chunk) = (transfer.segments, transfer.store, transfer.chunk);
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
    pub fn verdict(&mut self, _now: Instant, transfer: TransferId, verdict: Verdict) -> bool {
        let Some(found) = self.announced(transfer) else { return false };
        let (chunk, plane) = (found.chunk, found.plane);
        // `announced` has found the slot in the table.
        let index = TransferIndex(tag::slot_of(transfer.0));
        match verdict {
            Verdict::Delivered => {
                self.counters.planes_delivered += 1;
                let slot = &mut self.chunks[chunk.at()];
                slot.missing -= 1;
                self.jobs[slot.job.at()].delivered += 1;
            }
            Verdict::Corrupt => {
                self.counters.planes_corrupt += 1;
                self.judge_corrupt(chunk, plane);
            }
            Verdict::Rejected(reason) => {
                if self.may_fail(chunk) {
                    self.fail_chunk(chunk, ChunkFailure::Rejected(reason));
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
        let per_chunk = usize::from(self.config.max_planes_per_chunk);
        let times = &mut self.chunk_corrupt[chunk.at() * per_chunk + usize::from(plane)];
        *times = times.saturating_add(1);
        if *times > self.config.corrupt_retries {
            self.fail_chunk(chunk, ChunkFailure::Corrupt);
            return;
        }
        let todo = self.todo_range(chunk);
        bits::set(&mut self.chunk_todo[todo], u32::from(plane));
        if self.chunks[chunk.at()].state == ChunkState::Planes {
            self.list_to_start(chunk);
        }
    }

    /// Whether a chunk can still fail: it was not reported, and its fetch goes on.
    fn may_fail(&self, chunk: ChunkIndex) -> bool {
        let slot = &self.chunks[chunk.at()];
        slot.state != ChunkState::Failed && self.jobs[slot.job.at()].state == JobState::Running
    }
}
