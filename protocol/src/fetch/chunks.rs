//! Chunk slots: from a chunk's lookup to its last plane.

use crate::chunk::{ChunkInfo, ChunkLayout, PlaneRange};
use crate::pull::PathIndex;
use crate::time::Instant;
use crate::wire::message::ErrorCode;

use super::event::{ChunkFailure, StoreIndex};
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
        self.chunk_begun[todo.clone()].fill(0);
        let mut missing = 0;
        for plane in (first_plane..planes).step_by(usize::from(self.config.queues)) {
            bits::set(&mut self.chunk_todo[todo.clone()], plane);
            missing += 1;
        }
        let per_chunk = usize::from(self.config.max_planes_per_chunk);
        self.chunk_corrupt[index.at() * per_chunk..][..per_chunk].fill(0);
        let key = &self.job_keys[self.job_key(job, chunk)];
        let store = self.store_for(self.jobs[job.at()].sources, key);
        let slot = &mut self.chunks[index.at()];
        assert_eq!(slot.state, ChunkState::Free, "a chunk slot is used once at a time");
        *slot = ChunkSlot { state: ChunkState::Lookup, job, store, chunk, missing, ..ChunkSlot::FREE };
        self.count_chunk(store);
        self.jobs[job.at()].chunks += 1;
        self.ask_first(self.chunk_query(index));
    }

    pub(super) fn count_chunk(&mut self, store: StoreIndex) {
        let path = self.puller.path_mut(PathIndex(store.0));
        path.users += 1;
        self.busy_stores += u32::from(path.users == 1);
    }

    fn uncount_chunk(&mut self, store: StoreIndex) {
        let path = self.puller.path_mut(PathIndex(store.0));
        path.users -= 1;
        self.busy_stores -= u32::from(path.users == 0);
        // The other stores' shares have grown.
        self.ready_blocked = false;
        self.admit_blocked = false;
    }

    /// Has a chunk that is looked up count for another store.
    pub(super) fn move_chunk(&mut self, index: ChunkIndex, store: StoreIndex) {
        let slot = &mut self.chunks[index.at()];
        assert!(slot.transfers == 0, "nothing of it is under way at the store before");
        let before = std::mem::replace(&mut slot.store, store);
        if before != store {
            self.uncount_chunk(before);
            self.count_chunk(store);
        }
    }

    /// Puts a chunk into its fetch's list of those with planes to start, if it has some and is not there.
    pub(super) fn list_to_start(&mut self, index: ChunkIndex) {
        if !self.has_todo(index) {
            return;
        }
        let slot = &mut self.chunks[index.at()];
        let job = slot.job;
        if !slot.listed {
            slot.listed = true;
            self.jobs[job.at()].to_start.push_back(&mut self.chunk_links, index);
        }
        self.make_ready(job);
    }

    /// Whether a chunk has planes to start.
    pub(super) fn has_todo(&self, index: ChunkIndex) -> bool {
        self.chunk_todo[self.todo_range(index)].iter().any(|word| *word != 0)
    }

    pub(super) fn unlist_chunk(&mut self, index: ChunkIndex) {
        let slot = &mut self.chunks[index.at()];
        if !slot.listed {
            return;
        }
        slot.listed = false;
        self.jobs[slot.job.at()].to_start.remove(&mut self.chunk_links, index);
    }

    /// Takes in what the store says of a chunk.
    pub(super) fn looked_up(&mut self, index: ChunkIndex, epoch: u64, info: ChunkInfo) {
        let slot = &mut self.chunks[index.at()];
        assert_eq!(slot.state, ChunkState::Lookup, "only a LOOKUP under way is answered");
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

    pub(super) fn pull_header(&mut self, index: ChunkIndex) {
        let slot = &mut self.chunks[index.at()];
        slot.state = ChunkState::Header;
        slot.hedge_at = Instant::FAR;
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
        let per_fetch = self.config.max_chunks_per_fetch as usize;
        let key = &self.job_keys[slot.job.at() * per_fetch + slot.chunk as usize];
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
        // Nothing is left to do for a twin if everything came from the slow store meanwhile.
        self.settle_chunk(index);
    }

    /// Takes in that the store cannot serve a PULL of this chunk.
    pub(super) fn refused(&mut self, index: ChunkIndex, code: ErrorCode) {
        if self.chunks[index.at()].is_twin {
            return self.drop_twin(index);
        }
        let slot = &mut self.chunks[index.at()];
        let may_recover = code != ErrorCode::BadRequest && slot.lookups < self.config.lookup_retries;
        if !may_recover {
            return self.fail_chunk(index, ChunkFailure::Refused(code));
        }
        slot.lookups += 1;
        self.counters.lookups_again += 1;
        self.restart_chunk(index);
    }

    /// Takes in the epoch of a LOOKUP_REPLY: in a new one the store knows no handle any more that it gave before. (A refusal says that too,
    /// but of one chunk alone: it is more easily made up.)
    pub(super) fn learn_epoch(&mut self, store: StoreIndex, epoch: u64) {
        let before = std::mem::replace(&mut self.store(store).epoch, epoch);
        if before == epoch || before == 0 {
            return;
        }
        for index in ChunkIndex::all(self.chunks.len()) {
            let slot = &self.chunks[index.at()];
            let is_pulled = matches!(slot.state, ChunkState::Header | ChunkState::Planes);
            if !is_pulled || slot.store != store || slot.epoch == epoch {
                continue;
            }
            if slot.is_twin {
                self.drop_twin(index);
            } else if slot.missing > 0 {
                self.counters.lookups_again += 1;
                self.restart_chunk(index);
            }
        }
    }

    /// Stops pulling a chunk and has it looked up again once none of its planes awaits a verdict.
    pub(super) fn restart_chunk(&mut self, index: ChunkIndex) {
        self.unlist_chunk(index);
        self.chunks[index.at()].state = ChunkState::Draining;
        self.stop_chunk(index);
        self.settle_chunk(index);
    }

    /// Has a chunk asked of a replica, if there is one that answers.
    pub(super) fn fail_over(&mut self, index: ChunkIndex) {
        if self.chunks[index.at()].is_twin {
            return self.drop_twin(index);
        }
        let is_pulled = matches!(self.chunks[index.at()].state, ChunkState::Header | ChunkState::Planes);
        if is_pulled && self.chunks[index.at()].missing > 0 && self.has_alternative(self.chunk_query(index)) {
            self.counters.failovers += 1;
            self.avoid_present(self.chunk_query(index));
            self.restart_chunk(index);
        }
    }

    /// Reports that a chunk will not arrive, and stops pulling it.
    pub(super) fn fail_chunk(&mut self, index: ChunkIndex, reason: ChunkFailure) {
        if self.chunks[index.at()].is_twin {
            // Its planes may still come from the store that is only slow.
            return self.drop_twin(index);
        }
        self.unlist_chunk(index);
        self.drop_query(self.chunk_query(index));
        let slot = &mut self.chunks[index.at()];
        assert!(!matches!(slot.state, ChunkState::Free | ChunkState::Failed), "a chunk fails once");
        slot.state = ChunkState::Failed;
        let (job, chunk) = (slot.job, slot.chunk);
        self.jobs[job.at()].failed += 1;
        self.push_event(Queued::ChunkFailed { job, chunk, reason });
        self.drop_twin_of(index);
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
            ChunkState::Failed => slot.is_twin || slot.other.is_none(),
            ChunkState::Planes if slot.is_twin => !self.has_todo(index),
            ChunkState::Planes | ChunkState::Draining => slot.missing == 0 && slot.other.is_none(),
            ChunkState::Free | ChunkState::Lookup | ChunkState::Header => return,
        };
        if over {
            self.close_chunk(index);
        } else if slot.state == ChunkState::Draining
            && slot.missing > 0
            && self.jobs[job.at()].state == JobState::Running
        {
            self.chunks[index.at()].state = ChunkState::Lookup;
            self.ask_first(self.chunk_query(index));
        }
    }

    fn close_chunk(&mut self, index: ChunkIndex) {
        let slot = &mut self.chunks[index.at()];
        assert!(!slot.listed, "a chunk in a list is not over");
        let ChunkSlot { job, store, other, .. } = std::mem::replace(slot, ChunkSlot::FREE);
        self.free_chunks.push(index);
        self.uncount_chunk(store);
        self.jobs[job.at()].chunks -= 1;
        if let Some(other) = other {
            self.chunks[other.at()].other = None;
            self.settle_chunk(other);
        }
        self.settle_job(job);
    }
}
