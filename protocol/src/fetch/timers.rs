//! Time: deadlines, and what is given up as lost.
//!
//! Two coarse timers: no deadline comes before `next_deadline`, and nothing of a store is late before the puller's. Both
//! are lower bounds; when one is reached its tables are scanned once. Arrivals push timeouts back without touching
//! them.

use crate::chunk::ChunkLayout;
use crate::pull::{PathIndex, TimedOut};
use crate::time::Instant;

use super::FetchEngine;
use super::config::REQUESTS_PER_STORE;
use super::event::{ChunkFailure, FetchOutcome, LookupOutcome, StoreIndex};
use super::index::{ChunkIndex, Index, JobIndex, LookupIndex, RequestIndex};
use super::query::RequestState;
use super::tables::{ChunkState, JobState, LookupState};

impl<L: ChunkLayout> FetchEngine<L> {
    /// Ends fetches and lookups whose deadline has come, and gives up what has not arrived in time. Does nothing
    /// before [`poll_timeout`](Self::poll_timeout), so it may be called at every turn.
    #[inline]
    pub fn handle_timeout(&mut self, now: Instant) {
        self.now = self.now.max(now);
        if self.puller.is_due(now) {
            self.scan_stores(now);
        }
        if now >= self.next_deadline {
            self.scan_deadlines(now);
        }
    }

    #[cold]
    fn scan_deadlines(&mut self, now: Instant) {
        self.next_deadline = Instant::FAR;
        for index in JobIndex::all(self.jobs.len()) {
            let job = &self.jobs[index.at()];
            if job.state != JobState::Running {
                continue;
            }
            let deadline = job.deadline;
            if deadline <= now {
                self.end_job(index, FetchOutcome::Failed, ChunkFailure::Deadline);
            } else {
                self.arm_deadline(deadline);
            }
        }
        for index in LookupIndex::all(self.lookups.len()) {
            let job = &self.lookups[index.at()];
            if job.state != LookupState::Running {
                continue;
            }
            let deadline = job.deadline;
            if deadline <= now {
                self.finish_lookup(index, LookupOutcome::Deadline);
            } else {
                self.arm_deadline(deadline);
            }
        }
        for index in ChunkIndex::all(self.chunks.len()) {
            let chunk = &mut self.chunks[index.at()];
            if chunk.state != ChunkState::Header || chunk.hedge_at == Instant::FAR {
                continue;
            }
            let hedge_at = chunk.hedge_at;
            if hedge_at <= now {
                chunk.hedge_at = Instant::FAR;
                chunk.is_hedged = true;
                self.fail_over(index);
            } else {
                self.arm_deadline(hedge_at);
            }
        }
    }

    #[cold]
    fn scan_stores(&mut self, now: Instant) {
        for store in 0..self.config.stores {
            self.scan_store(now, StoreIndex(store));
        }
    }

    fn scan_store(&mut self, now: Instant, store: StoreIndex) {
        for index in store.0 * REQUESTS_PER_STORE..(store.0 + 1) * REQUESTS_PER_STORE {
            let request = &self.requests[usize::from(index)];
            if request.state == RequestState::Sent {
                let rto_at = request.rto_at;
                if rto_at <= now {
                    self.request_timed_out(store, RequestIndex(index));
                } else {
                    self.arm(rto_at);
                }
            }
        }
        if self.puller.has_rested(now, PathIndex(store.0)) {
            self.ready_blocked = false;
            self.make_due(store);
        }
        self.find_losses(now, store);
        if self.path(store).in_flight() > 0 {
            self.time_out(now, store);
            self.hedge_if_slow(now, store);
        }
    }

    /// Gives up PULLs of a store that are late while something asked for later has arrived.
    fn find_losses(&mut self, now: Instant, store: StoreIndex) {
        let lost = self.puller.find_losses(now, PathIndex(store.0));
        self.counters.segments_lost += u64::from(lost);
        self.take_given_up(true);
    }

    /// Asks for the last segment, then for everything again that is under way at a store from which nothing has come for too long.
    fn time_out(&mut self, now: Instant, store: StoreIndex) {
        let done = self.puller.time_out(now, PathIndex(store.0));
        self.take_given_up(true);
        match done {
            TimedOut::No => {}
            TimedOut::Probed => self.counters.tail_probes += 1,
            TimedOut::All(lost, is_silent) => {
                self.counters.timeouts += 1;
                self.counters.segments_lost += u64::from(lost);
                if is_silent {
                    self.leave_store(store);
                }
            }
        }
    }

    /// Counts a timeout of a store; with the second its chunks go to replicas.
    pub(super) fn note_timeout(&mut self, store: StoreIndex) {
        if self.puller.path_mut(PathIndex(store.0)).note_timeout() {
            self.leave_store(store);
        }
    }

    /// Has the chunks that are pulled from a store asked of replicas, where there are some that answer.
    pub(super) fn leave_store(&mut self, store: StoreIndex) {
        if self.placement.replicas() == 1 {
            return;
        }
        for index in ChunkIndex::all(self.chunks.len()) {
            if self.chunks[index.at()].store == store {
                self.fail_over(index);
            }
        }
    }
}
