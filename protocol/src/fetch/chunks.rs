//! Chunk slots: from a chunk's lookup to its last plane.

use crate::chunk::{ChunkInfo, ChunkLayout, PlaneRange};
use crate::wire::message::ErrorCode;

use super::event::ChunkFailure;
use super::index::{ChunkIndex, Index, JobIndex};
use super::tables::{ChunkSlot, ChunkState, JobState, TransferState};
use super::{FetchEngine, Queued, bits};

impl<L: ChunkLayout> FetchEngine<L> {
    /// Gives `chunk` of a fetch a slot and has it looked up.
    pub(super) fn open_chunk(&mut self, job: JobIndex, chunk: u32, first_plane: u32) {
        let index = self.free_chunks.pop().expect("the caller has seen a free slot");
        let planes = self.jobs[job.at()].expect.planes();
        let todo = self.todo_range(index);
        self.chunk_todo[todo.clone()].fill(0);
        let mut missing = 0;
        for plane in (first_plane..planes).step_by(usize::from(self.config.queues)) {
            bits::set(&mut self.chunk_todo[todo.clone()], plane);
            missing += 1;
        }
        let per_chunk = usize::from(self.config.max_planes_per_chunk);
        self.chunk_corrupt[index.at() * per_chunk..][..per_chunk].fill(0);
        let slot = &mut self.chunks[index.at()];
        assert_eq!(slot.state, ChunkState::Free, "a chunk slot is used once at a time");
        *slot = ChunkSlot { state: ChunkState::Lookup, job, chunk, missing, ..ChunkSlot::FREE };
        let store = self.jobs[job.at()].store;
        self.store(store).chunks += 1;
        self.jobs[job.at()].chunks += 1;
        self.list_to_look_up(index);
    }

    fn list_to_look_up(&mut self, index: ChunkIndex) {
        let slot = &mut self.chunks[index.at()];
        assert!(!slot.listed, "a chunk is in one list");
        slot.listed = true;
        self.jobs[slot.job.at()].to_look_up.push_back(&mut self.chunk_links, index);
    }

    /// Puts a chunk with planes to start into its fetch's list, if it is not there.
    pub(super) fn list_to_start(&mut self, index: ChunkIndex) {
        let slot = &mut self.chunks[index.at()];
        let job = slot.job;
        if !slot.listed {
            slot.listed = true;
            self.jobs[job.at()].to_start.push_back(&mut self.chunk_links, index);
        }
        self.make_ready(job);
    }

    pub(super) fn unlist_chunk(&mut self, index: ChunkIndex) {
        let slot = &mut self.chunks[index.at()];
        if !slot.listed {
            return;
        }
        slot.listed = false;
        let job = &mut self.jobs[slot.job.at()];
        let list = if slot.state == ChunkState::Lookup { &mut job.to_look_up } else { &mut job.to_start };
        list.remove(&mut self.chunk_links, index);
    }

    /// Takes in what the store says of a chunk.
    pub(super) fn looked_up(&mut self, index: ChunkIndex, epoch: u64, info: Option<ChunkInfo>) {
        let slot = &mut self.chunks[index.at()];
        assert_eq!(slot.state, ChunkState::Lookup, "only a LOOKUP under way is answered");
        let Some(info) = info else { return self.fail_chunk(index, ChunkFailure::NotStored) };
        if !self.jobs[slot.job.at()].expect.matches(&info) {
            return self.fail_chunk(index, ChunkFailure::ShapeMismatch);
        }
        if info.header_bytes == 0 || u64::from(info.header_bytes) > info.chunk_bytes {
            return self.fail_chunk(index, ChunkFailure::BadHeader);
        }
        if info.header_bytes > self.config.max_header_bytes {
            return self.fail_chunk(index, ChunkFailure::TooLarge);
        }
        slot.info = info;
        slot.epoch = epoch;
        self.pull_header(index);
    }

    fn pull_header(&mut self, index: ChunkIndex) {
        let slot = &mut self.chunks[index.at()];
        slot.state = ChunkState::Header;
        let header_bytes = slot.info.header_bytes;
        let transfer = self.header_transfer(index);
        self.begin(transfer, index, 0, 0, header_bytes);
        self.make_header_due(transfer);
    }

    /// Reads a header whose last segment has arrived.
    pub(super) fn header_arrived(&mut self, index: ChunkIndex) {
        let transfer = self.header_transfer(index);
        self.transfers[transfer.at()].state = TransferState::Free;
        let bytes = self.header_range(index);
        let slot = &mut self.chunks[index.at()];
        slot.transfers -= 1;
        let job = &self.jobs[slot.job.at()];
        let key =
            &self.job_keys[slot.job.at() * self.config.max_chunks_per_fetch as usize + slot.chunk as usize];
        let header = &self.chunk_headers[bytes][..slot.info.header_bytes as usize];
        let ranges = &mut self.chunk_ranges[index.at()];
        ranges.clear();
        if self.layout.planes(key, header, &slot.info, ranges).is_err() {
            slot.bad_headers = slot.bad_headers.saturating_add(1);
            if slot.bad_headers > self.config.corrupt_retries {
                return self.fail_chunk(index, ChunkFailure::BadHeader);
            }
            return self.pull_header(index);
        }
        if ranges.as_slice().len() != job.expect.planes() as usize {
            return self.fail_chunk(index, ChunkFailure::ShapeMismatch);
        }
        let inside = |range: &PlaneRange| {
            let end = range.offset.checked_add(u64::from(range.bytes));
            range.bytes > 0 && end.is_some_and(|end| end <= slot.info.chunk_bytes)
        };
        if !ranges.as_slice().iter().all(inside) {
            return self.fail_chunk(index, ChunkFailure::BadHeader);
        }
        if ranges.as_slice().iter().any(|range| range.bytes > self.config.max_plane_bytes) {
            return self.fail_chunk(index, ChunkFailure::TooLarge);
        }
        slot.state = ChunkState::Planes;
        self.list_to_start(index);
    }

    /// Takes in that the store cannot serve a PULL of this chunk.
    pub(super) fn refused(&mut self, index: ChunkIndex, code: ErrorCode) {
        let slot = &mut self.chunks[index.at()];
        let may_recover = code != ErrorCode::BadRequest && slot.lookups < self.config.lookup_retries;
        if !may_recover {
            return self.fail_chunk(index, ChunkFailure::Refused(code));
        }
        slot.lookups += 1;
        self.counters.lookups_again += 1;
        self.unlist_chunk(index);
        self.chunks[index.at()].state = ChunkState::Draining;
        self.stop_chunk(index);
        self.settle_chunk(index);
    }

    /// Reports that a chunk will not arrive, and stops pulling it.
    pub(super) fn fail_chunk(&mut self, index: ChunkIndex, reason: ChunkFailure) {
        self.unlist_chunk(index);
        let slot = &mut self.chunks[index.at()];
        assert!(!matches!(slot.state, ChunkState::Free | ChunkState::Failed), "a chunk fails once");
        slot.state = ChunkState::Failed;
        let (job, chunk) = (slot.job, slot.chunk);
        self.jobs[job.at()].failed += 1;
        self.push_event(Queued::ChunkFailed { job, chunk, reason });
        self.stop_chunk(index);
        self.settle_chunk(index);
    }

    /// Goes on with a chunk once none of its transfers is under way.
    pub(super) fn settle_chunk(&mut self, index: ChunkIndex) {
        let slot = &self.chunks[index.at()];
        if slot.transfers > 0 {
            return;
        }
        let job = slot.job;
        let over = match slot.state {
            ChunkState::Failed => true,
            ChunkState::Planes | ChunkState::Draining => slot.missing == 0,
            ChunkState::Free | ChunkState::Lookup | ChunkState::Header => return,
        };
        if over {
            self.close_chunk(index);
        } else if slot.state == ChunkState::Draining && self.jobs[job.at()].state == JobState::Running {
            self.chunks[index.at()].state = ChunkState::Lookup;
            self.list_to_look_up(index);
            self.request_chunks(job);
        }
    }

    fn close_chunk(&mut self, index: ChunkIndex) {
        let slot = &mut self.chunks[index.at()];
        assert!(!slot.listed, "a chunk in a list is not over");
        let job = slot.job;
        *slot = ChunkSlot::FREE;
        self.free_chunks.push(index);
        self.admit_blocked = false;
        let store = self.jobs[job.at()].store;
        self.store(store).chunks -= 1;
        self.jobs[job.at()].chunks -= 1;
        self.settle_job(job);
    }
}
