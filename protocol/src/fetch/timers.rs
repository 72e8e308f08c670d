//! Time: deadlines, and what is given up as lost.
//!
//! Two coarse timers: no deadline comes before `next_deadline`, and nothing of a store is late before `next_timeout`. Both
//! are lower bounds; when one is reached its tables are scanned once. Arrivals push timeouts back without touching
//! them.

use crate::chunk::ChunkLayout;
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
        if now >= self.paced_until {
            self.paced_until = Instant::FAR;
        }
        if now >= self.next_timeout {
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
        self.next_timeout = Instant::FAR;
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
        let busy_until = self.stores[usize::from(store.0)].busy_until;
        if busy_until > now {
            self.arm(busy_until);
        } else if busy_until != Instant::ZERO {
            self.stores[usize::from(store.0)].busy_until = Instant::ZERO;
            self.ready_blocked = false;
            self.make_due(store);
        }
        self.find_losses(now, store);
        let entry = &self.stores[usize::from(store.0)];
        if entry.in_flight > 0 {
            let timeout_at = entry.timeout_at;
            if timeout_at <= now {
                self.time_out(now, store);
            }
            let timeout_at = self.stores[usize::from(store.0)].timeout_at;
            self.arm(timeout_at);
            self.hedge_if_slow(now, store);
        }
    }

    /// Gives up PULLs of a store that are late while something asked for later has arrived.
    fn find_losses(&mut self, now: Instant, store: StoreIndex) {
        let (mut lost, mut drops) = (0, 0);
        loop {
            let entry = &self.stores[usize::from(store.0)];
            let (Some(oldest), Some(smoothed)) = (entry.asks.oldest(), entry.rtt.smoothed()) else { break };
            let ask = self.asks.get(oldest);
            match entry.rack.lost_at(ask.order, ask.sent_at.nanos(), smoothed) {
                None => break,
                Some(at) if at > now.nanos() => {
                    self.arm(Instant::from_nanos(at));
                    break;
                }
                Some(_) => {
                    // Of a PULL that brought nothing, one packet was lost: the PULL.
                    let is_pull = ask.is_untouched;
                    self.suspect(oldest);
                    let segments = self.give_up(oldest);
                    lost += segments;
                    drops += if is_pull { 1 } else { segments };
                }
            }
        }
        if lost > 0 {
            self.stores[usize::from(store.0)].rack.found();
            self.note_lost(store, lost, drops);
        }
    }

    fn note_lost(&mut self, store: StoreIndex, segments: u32, drops: u32) {
        self.counters.segments_lost += u64::from(segments);
        self.stores[usize::from(store.0)].window.lost(drops);
        self.link.lost(segments);
    }

    /// Nothing came from a store for too long: the first time its last segment is asked for again, so that the answer
    /// shows what else is missing; then all is given up, and again, ever later.
    fn time_out(&mut self, now: Instant, store: StoreIndex) {
        let entry = &mut self.stores[usize::from(store.0)];
        let is_first = entry.timeouts == 0;
        if is_first {
            entry.quiet_since = entry.quiet_since();
            entry.timeouts = 1;
            self.counters.tail_probes += 1;
            self.probe_tail(store);
        } else {
            self.counters.timeouts += 1;
            let mut lost = 0;
            while let Some(oldest) = self.stores[usize::from(store.0)].asks.oldest() {
                self.suspect(oldest);
                lost += self.give_up(oldest);
            }
            self.note_lost(store, lost, lost);
            self.note_timeout(store);
        }
        let entry = &mut self.stores[usize::from(store.0)];
        entry.timeout_at = now.plus_nanos(entry.timeout());
    }

    /// Gives up the last segment of the PULL sent last.
    fn probe_tail(&mut self, store: StoreIndex) {
        let newest = self.stores[usize::from(store.0)].asks.newest().expect("something is under way");
        if self.asks.get(newest).outstanding.is_power_of_two() {
            // It is given up whole.
            self.suspect(newest);
        }
        self.give_up_last(newest);
    }

    /// Counts a timeout of a store; with the second its chunks go to replicas.
    pub(super) fn note_timeout(&mut self, store: StoreIndex) {
        let entry = &mut self.stores[usize::from(store.0)];
        let was_silent = entry.is_silent();
        entry.timeouts = entry.timeouts.saturating_add(1);
        if !was_silent && self.stores[usize::from(store.0)].is_silent() {
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
