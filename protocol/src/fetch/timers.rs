//! Time: deadlines, and what is given up as lost.
//!
//! One coarse timer: nothing fires before `next_timeout`, which is a lower bound; when it is reached all tables are
//! scanned once. Arrivals push deadlines back without touching it, so a busy engine scans about once per RTO.

use crate::chunk::ChunkLayout;
use crate::time::Instant;

use super::event::{ChunkFailure, FetchOutcome, LookupOutcome};
use super::index::{Index, JobIndex, LookupIndex, TransferIndex};
use super::tables::{JobState, LookupState, Request, RequestState};
use super::{Asker, FetchEngine, bits};

impl<L: ChunkLayout> FetchEngine<L> {
    /// Ends fetches and lookups whose deadline has come, and gives up what has not arrived in time. Does nothing
    /// before [`poll_timeout`](Self::poll_timeout), so it may be called at every turn.
    #[inline]
    pub fn handle_timeout(&mut self, now: Instant) {
        if now >= self.next_timeout {
            self.scan(now);
        }
    }

    #[cold]
    fn scan(&mut self, now: Instant) {
        self.next_timeout = Instant::FAR;
        for index in JobIndex::all(self.jobs.len()) {
            let job = &self.jobs[index.at()];
            if job.state != JobState::Running {
                continue;
            }
            let (deadline, request) = (job.deadline, job.request);
            if deadline <= now {
                self.end_job(index, FetchOutcome::Failed, ChunkFailure::Deadline);
            } else {
                self.arm(deadline);
                self.scan_request(now, Asker::Job(index), &request);
            }
        }
        for index in LookupIndex::all(self.lookups.len()) {
            let job = &self.lookups[index.at()];
            if job.state != LookupState::Running {
                continue;
            }
            let (deadline, request) = (job.deadline, job.request);
            if deadline <= now {
                self.finish_lookup(index, LookupOutcome::Deadline);
            } else {
                self.arm(deadline);
                self.scan_request(now, Asker::Lookup(index), &request);
            }
        }
        for index in TransferIndex::all(self.transfers.len()) {
            let transfer = &self.transfers[index.at()];
            if transfer.in_flight == 0 {
                continue;
            }
            let rto_at = transfer.rto_at;
            if rto_at <= now {
                self.time_out(index);
            } else {
                self.arm(rto_at);
            }
        }
    }

    fn scan_request(&mut self, now: Instant, asker: Asker, request: &Request) {
        if request.state != RequestState::Sent {
            return;
        }
        if request.rto_at <= now {
            self.queue_request(asker);
        } else {
            self.arm(request.rto_at);
        }
    }

    /// Gives up what is in flight of a transfer, to be asked for again.
    fn time_out(&mut self, index: TransferIndex) {
        self.leave_window(index);
        let arrived = self.arrived_range(index);
        let transfer = &mut self.transfers[index.at()];
        transfer.backoff = transfer.backoff.saturating_add(1);
        transfer.cursor = bits::next_clear(&self.arrived[arrived], 0, transfer.segments);
        assert!(transfer.cursor < transfer.segments, "a transfer with something in flight is not whole");
        self.counters.timeouts += 1;
        let (store, chunk, listed) = (transfer.store, transfer.chunk, transfer.listed);
        self.store(store).silent_timeouts += 1;
        if self.is_header(index) {
            self.make_header_due(index);
            return;
        }
        let job = self.chunks[chunk.at()].job;
        if !listed {
            self.transfers[index.at()].listed = true;
            self.jobs[job.at()].to_ask.push_front(&mut self.transfer_links, index);
        }
        self.make_ready(job);
    }
}
