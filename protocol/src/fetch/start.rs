//! Starting, cancelling and ending fetches and lookups.

use crate::chunk::{ChunkLayout, ChunkShape};
use crate::key::Key;
use crate::time::Instant;

use super::event::{
    ChunkFailure, Event, FetchId, FetchOutcome, LookupId, LookupOutcome, StartError, StoreIndex,
};
use super::index::{ChunkIndex, Index, JobIndex, LookupIndex};
use super::tables::{ChunkState, Job, JobState, LookupJob, LookupState, RequestState};
use super::{Asker, FetchEngine, Queued};

impl<L: ChunkLayout> FetchEngine<L> {
    /// Starts looking for the longest prefix of `keys` that `store` holds; ends with [`Event::LookupDone`].
    pub fn lookup(
        &mut self,
        now: Instant,
        id: LookupId,
        deadline: Instant,
        store: StoreIndex,
        keys: &[Key],
    ) -> Result<(), StartError> {
        let count = self.check_start(now, deadline, store, keys)?;
        if self.lookups.iter().any(|job| job.state != LookupState::Free && job.id == id) {
            return Err(StartError::DuplicateId);
        }
        let index = self.free_lookups.pop().ok_or(StartError::Full(self.config.max_lookups))?;
        let first = index.at() * self.config.max_chunks_per_fetch as usize;
        self.lookup_keys[first..first + keys.len()].copy_from_slice(keys);
        let job = &mut self.lookups[index.at()];
        let request = job.request;
        *job = LookupJob {
            state: LookupState::Running,
            id,
            store,
            deadline,
            keys: count,
            request,
            ..LookupJob::free(0)
        };
        self.arm(deadline);
        self.request_prefix(index);
        Ok(())
    }

    /// Ends a lookup early; it still ends with [`Event::LookupDone`]. Unknown ids are ignored.
    pub fn cancel_lookup(&mut self, _now: Instant, id: LookupId) {
        let running = |job: &LookupJob| job.state == LookupState::Running && job.id == id;
        if let Some(index) = LookupIndex::all(self.lookups.len()).find(|i| running(&self.lookups[i.at()])) {
            self.finish_lookup(index, LookupOutcome::Cancelled);
        }
    }

    pub(super) fn finish_lookup(&mut self, index: LookupIndex, outcome: LookupOutcome) {
        let job = &mut self.lookups[index.at()];
        assert_eq!(job.state, LookupState::Running, "a lookup ends once");
        job.state = LookupState::Ended;
        job.outcome = outcome;
        job.request.state = RequestState::Idle;
        self.push_event(Queued::LookupDone(index));
    }

    /// Frees a lookup whose end is being polled.
    pub(super) fn end_lookup(&mut self, index: LookupIndex) -> Event {
        let job = &mut self.lookups[index.at()];
        job.state = LookupState::Free;
        let (id, outcome, found) = (job.id, job.outcome, job.found);
        let (tokens, encoded_bytes, last) = (job.tokens, job.encoded_bytes, job.last);
        self.free_lookups.push(index);
        Event::LookupDone { id, outcome, found, tokens, encoded_bytes, last }
    }

    /// Starts a fetch of this queue's planes of the chunks `keys`, in order; ends with [`Event::FetchEnded`].
    pub fn start(
        &mut self,
        now: Instant,
        id: FetchId,
        deadline: Instant,
        store: StoreIndex,
        keys: &[Key],
        expect: &ChunkShape,
    ) -> Result<(), StartError> {
        let count = self.check_start(now, deadline, store, keys)?;
        let (planes, limit) = (expect.planes(), self.config.max_planes_per_chunk);
        if planes == 0 || planes > u32::from(limit) {
            return Err(StartError::BadShape { planes, limit });
        }
        if self.jobs.iter().any(|job| job.state != JobState::Free && job.id == id) {
            return Err(StartError::DuplicateId);
        }
        let index = self.free_jobs.pop().ok_or(StartError::Full(self.config.max_fetches))?;
        let first = index.at() * self.config.max_chunks_per_fetch as usize;
        self.job_keys[first..first + keys.len()].copy_from_slice(keys);
        let job = &mut self.jobs[index.at()];
        let (request, in_ready, in_admit) = (job.request, job.in_ready, job.in_admit);
        *job = Job {
            state: JobState::Running,
            id,
            store,
            deadline,
            expect: *expect,
            keys: count,
            request,
            in_ready,
            in_admit,
            ..Job::free(0)
        };
        let store = self.store(store);
        store.fetches += 1;
        self.busy_stores += u32::from(store.fetches == 1);
        self.arm(deadline);
        self.want_chunks(index);
        Ok(())
    }

    fn check_start(
        &self,
        now: Instant,
        deadline: Instant,
        store: StoreIndex,
        keys: &[Key],
    ) -> Result<u32, StartError> {
        let limit = self.config.max_chunks_per_fetch;
        if keys.is_empty() {
            return Err(StartError::NoKeys);
        }
        if store.0 >= self.config.stores {
            return Err(StartError::UnknownStore(store.0));
        }
        if deadline <= now {
            return Err(StartError::DeadlinePassed);
        }
        let count = u32::try_from(keys.len()).unwrap_or(u32::MAX);
        if count > limit {
            return Err(StartError::TooManyKeys { keys: keys.len(), limit });
        }
        Ok(count)
    }

    /// Ends a fetch early; it still ends with [`Event::FetchEnded`], once planes that arrived have their verdict.
    /// Unknown ids are ignored.
    pub fn cancel(&mut self, _now: Instant, id: FetchId) {
        let running = |job: &Job| job.state == JobState::Running && job.id == id;
        if let Some(index) = JobIndex::all(self.jobs.len()).find(|i| running(&self.jobs[i.at()])) {
            self.end_job(index, FetchOutcome::Cancelled, ChunkFailure::Cancelled);
        }
    }

    /// Ends a fetch before it is complete: names every chunk that has not arrived, and asks for nothing more.
    pub(super) fn end_job(&mut self, index: JobIndex, outcome: FetchOutcome, reason: ChunkFailure) {
        let job = &mut self.jobs[index.at()];
        assert_eq!(job.state, JobState::Running, "a fetch ends once");
        job.outcome = outcome;
        job.request.state = RequestState::Idle;
        let waiting = job.next_chunk..job.keys;
        let planes = job.expect.planes();
        job.next_chunk = job.keys;
        // Named before the state changes, so that the end cannot be reported before the last name.
        for chunk in waiting {
            if self.first_plane(chunk, planes).is_some() {
                self.jobs[index.at()].failed += 1;
                self.push_event(Queued::ChunkFailed { job: index, chunk, reason });
            }
        }
        self.jobs[index.at()].state = JobState::Ending;
        for slot in ChunkIndex::all(self.chunks.len()) {
            let chunk = &self.chunks[slot.at()];
            let held = chunk.job == index && chunk.state != ChunkState::Free;
            if held && chunk.state != ChunkState::Failed {
                self.fail_chunk(slot, reason);
            }
        }
        self.settle_job(index);
    }

    /// Reports the end of a fetch of which nothing is left.
    pub(super) fn settle_job(&mut self, index: JobIndex) {
        let job = &mut self.jobs[index.at()];
        let over = match job.state {
            JobState::Running => job.next_chunk == job.keys,
            JobState::Ending => true,
            JobState::Free | JobState::Ended => false,
        };
        if !over || job.chunks > 0 {
            return;
        }
        if job.outcome != FetchOutcome::Cancelled {
            job.outcome = if job.failed > 0 { FetchOutcome::Failed } else { FetchOutcome::Done };
        }
        job.state = JobState::Ended;
        assert!(job.to_ask.is_empty() && job.to_start.is_empty() && job.to_look_up.is_empty());
        let store = job.store;
        let store = self.store(store);
        store.fetches -= 1;
        self.busy_stores -= u32::from(store.fetches == 0);
        // The other stores' shares have grown.
        self.ready_blocked = false;
        self.admit_blocked = false;
        self.push_event(Queued::FetchEnded(index));
    }

    /// Frees a fetch whose end is being polled.
    pub(super) fn free_job(&mut self, index: JobIndex) -> Event {
        let job = &mut self.jobs[index.at()];
        assert_eq!(job.state, JobState::Ended, "a fetch is freed once");
        job.state = JobState::Free;
        let (fetch, outcome) = (job.id, job.outcome);
        let (planes_delivered, chunks_failed) = (job.delivered, job.failed);
        self.free_jobs.push(index);
        Event::FetchEnded { fetch, outcome, planes_delivered, chunks_failed }
    }

    /// Queues the LOOKUP of a lookup's next keys.
    pub(super) fn request_prefix(&mut self, index: LookupIndex) {
        let job = &mut self.lookups[index.at()];
        let keys = (job.keys - job.found).min(super::MAX_REQUEST_KEYS);
        self.make_due(Asker::Lookup(index), u8::try_from(keys).expect("at most 40"));
    }
}
