//! Starting, cancelling and ending fetches and lookups.

use crate::chunk::{ChunkLayout, ChunkShape};
use crate::key::Key;
use crate::time::Instant;

use super::event::{
    ChunkFailure, Event, FetchId, FetchOutcome, LookupId, LookupOutcome, Sources, StartError,
};
use super::index::{ChunkIndex, Index, JobIndex, LookupIndex};
use super::tables::{ChunkState, Job, JobState, LookupJob, LookupState};
use super::{FetchEngine, Queued, bits};

impl<L: ChunkLayout> FetchEngine<L> {
    /// Starts looking for the longest prefix of `keys` that the stores hold; ends with [`Event::LookupDone`].
    pub fn lookup(
        &mut self,
        now: Instant,
        id: LookupId,
        deadline: Instant,
        sources: impl Into<Sources>,
        keys: &[Key],
    ) -> Result<(), StartError> {
        let sources = sources.into();
        let count = self.check_start(now, deadline, sources, keys)?;
        if self.lookups.iter().any(|job| job.state != LookupState::Free && job.id == id) {
            return Err(StartError::DuplicateId);
        }
        let index = self.free_lookups.pop().ok_or(StartError::Full(self.config.max_lookups))?;
        let first = index.at() * self.config.max_chunks_per_fetch as usize;
        self.lookup_keys[first..first + keys.len()].copy_from_slice(keys);
        let running = LookupState::Running;
        self.lookups[index.at()] =
            LookupJob { state: running, id, sources, deadline, keys: count, ..LookupJob::FREE };
        self.arm_deadline(deadline);
        self.look_further(index);
        Ok(())
    }

    /// Ends a lookup early; it still ends with [`Event::LookupDone`]. Unknown ids are ignored.
    pub fn cancel_lookup(&mut self, _now: Instant, id: LookupId) {
        let running = |job: &LookupJob| job.state == LookupState::Running && job.id == id;
        if let Some(index) = LookupIndex::all(self.lookups.len()).find(|i| running(&self.lookups[i.at()])) {
            self.finish_lookup(index, LookupOutcome::Cancelled);
        }
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
        sources: impl Into<Sources>,
        keys: &[Key],
        expect: &ChunkShape,
    ) -> Result<(), StartError> {
        let sources = sources.into();
        let count = self.check_start(now, deadline, sources, keys)?;
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
        let words = self.admitted_range(index);
        self.job_admitted[words].fill(0);
        self.starts += 1;
        let Job { in_ready, in_admit, .. } = self.jobs[index.at()];
        self.jobs[index.at()] = Job {
            state: JobState::Running,
            id,
            sources,
            deadline,
            expect: *expect,
            keys: count,
            left: u64::from(count) * u64::from(planes) / u64::from(self.config.queues),
            started: self.starts,
            in_ready,
            in_admit,
            ..Job::FREE
        };
        self.arm_deadline(deadline);
        self.want_chunks(index);
        Ok(())
    }

    fn check_start(
        &mut self,
        now: Instant,
        deadline: Instant,
        sources: Sources,
        keys: &[Key],
    ) -> Result<u32, StartError> {
        self.now = self.now.max(now);
        let limit = self.config.max_chunks_per_fetch;
        if keys.is_empty() {
            return Err(StartError::NoKeys);
        }
        if let Sources::One(store) = sources
            && store.0 >= self.config.stores
        {
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
        let waiting = job.next_chunk..job.keys;
        let planes = job.expect.planes();
        job.next_chunk = job.keys;
        let admitted = self.admitted_range(index);
        // Named before the state changes, so that the end cannot be reported before the last name.
        for chunk in waiting {
            let is_open = bits::next_set(&self.job_admitted[admitted.clone()], chunk, chunk + 1) == chunk;
            if !is_open && self.first_plane(chunk, planes).is_some() {
                self.jobs[index.at()].failed += 1;
                self.push_event(Queued::ChunkFailed { job: index, chunk, reason });
            }
        }
        self.jobs[index.at()].state = JobState::Ending;
        for slot in ChunkIndex::all(self.chunks.len()) {
            let chunk = &self.chunks[slot.at()];
            let held = chunk.job == index && chunk.state != ChunkState::Free && !chunk.is_twin;
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
        assert!(job.to_ask.is_empty() && job.to_start.is_empty());
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
        // What each fetch may hold has grown.
        self.admit_blocked = false;
        Event::FetchEnded { fetch, outcome, planes_delivered, chunks_failed }
    }
}
