//! One queue's share of saves: offers encoded chunks to the stores that are to keep them, sends what they pull, says how each ended.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use dpdk::Ring;
use iface::Counter;
use protocol::frame::Peer;
use protocol::put::{OfferCounters, OfferEngine, OfferEvent, OfferTo};
use protocol::reason::DropReason;
use protocol::{ChunkInfo, ChunkSource, Instant, Key, Placement, StoreIndex};

use crate::save::job::{SaveJob, SaveOutcome};

/// When one store has a chunk, another is not waited for that was offered it so often without a word: seconds, at the longest
/// time between offers.
const SILENT_OFFERS: u8 = 8;

/// The engine's counts, for other threads to read.
#[derive(Debug, Default)]
pub(crate) struct OfferCounts {
    begun: Counter,
    offers_sent: Counter,
    replies: Counter,
    stored: Counter,
    already_stored: Counter,
    failed: Counter,
    segments_sent: Counter,
    bytes_sent: Counter,
}

impl OfferCounts {
    fn mirror(&self, counts: &OfferCounters) {
        self.begun.set(counts.begun);
        self.offers_sent.set(counts.offers_sent);
        self.replies.set(counts.replies);
        self.stored.set(counts.stored);
        self.already_stored.set(counts.already_stored);
        self.failed.set(counts.failed);
    }

    /// Every counter, of copies, with its name: `begun = stored + already_stored + failed` and those under way.
    pub(crate) fn named(&self) -> [(&'static str, &Counter); 8] {
        [
            ("begun", &self.begun),
            ("offers_sent", &self.offers_sent),
            ("replies", &self.replies),
            ("stored", &self.stored),
            ("already_stored", &self.already_stored),
            ("failed", &self.failed),
            ("segments_sent", &self.segments_sent),
            ("bytes_sent", &self.bytes_sent),
        ]
    }
}

/// Chunks under offer. Each is offered to every store that is to keep it.
struct Jobs {
    jobs: Box<[Option<Box<SaveJob>>]>,
    /// For each slot of an offer, the place of its chunk.
    place_of: Box<[usize]>,
}

impl Jobs {
    fn bytes(&self, handle: u32) -> Option<&[u8]> {
        let [low, high, ..] = handle.to_le_bytes();
        let place = *self.place_of.get(usize::from(u16::from_le_bytes([low, high])))?;
        let job = self.jobs.get(place)?.as_deref()?;
        job.offers.iter().any(|offer| offer.handle() == handle).then(|| job.writer.bytes())
    }
}

impl ChunkSource for Jobs {
    fn find(&self, _key: &Key) -> Option<ChunkInfo> {
        None
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        self.bytes(handle).map(|bytes| bytes.len() as u64)
    }
}

/// What to send, written to the caller's buffer.
pub(crate) struct Sent {
    pub(crate) to: OfferTo,
    pub(crate) bytes: usize,
    /// Whether it is a part of a chunk, whose checksums its receiver checks.
    pub(crate) is_data: bool,
}

/// The offers of one queue.
pub(crate) struct Offers {
    engine: OfferEngine,
    placement: Placement,
    jobs: Jobs,
    under_way: usize,
    encoded: Ring<Box<SaveJob>>,
    returned: Ring<Box<SaveJob>>,
    counts: Arc<OfferCounts>,
}

impl Offers {
    /// `engine` has a place for every copy of every job that there is.
    pub(crate) fn new(
        engine: OfferEngine,
        placement: Placement,
        jobs: u16,
        encoded: Ring<Box<SaveJob>>,
        returned: Ring<Box<SaveJob>>,
    ) -> Self {
        let offers = usize::from(jobs) * placement.replicas();
        let jobs = Jobs { jobs: (0..jobs).map(|_| None).collect(), place_of: vec![0; offers].into() };
        Self { engine, placement, jobs, under_way: 0, encoded, returned, counts: Arc::default() }
    }

    /// This queue's counts, for reading from any thread.
    pub(crate) fn counts(&self) -> Arc<OfferCounts> {
        Arc::clone(&self.counts)
    }

    /// Whether a payload is for [`Offers::take`]. Where nothing is saved, nothing is: such messages are of no type that is known.
    #[inline]
    pub(crate) fn takes(&self, payload: &[u8]) -> bool {
        !self.jobs.jobs.is_empty() && OfferEngine::takes(payload)
    }

    /// Takes a datagram for which [`Offers::takes`] is true.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        store: StoreIndex,
        from: Peer,
        payload: &[u8],
    ) -> Result<(), DropReason> {
        self.engine.handle_datagram(now, store, from, payload, &self.jobs)
    }

    /// Takes in that a store cannot be reached; see [`OfferEngine::handle_unreachable`].
    pub(crate) fn handle_unreachable(&mut self, store: StoreIndex, quote: &[u8]) -> bool {
        self.engine.handle_unreachable(store, quote)
    }

    /// The path to a store carries segments of up to so many bytes.
    pub(crate) fn set_segment_bytes(&mut self, store: StoreIndex, bytes: u16) {
        self.engine.set_segment_bytes(store, bytes);
    }

    /// A store to which large segments seem not to come through.
    pub(crate) fn poll_suspect(&mut self) -> Option<StoreIndex> {
        self.engine.poll_suspect()
    }

    /// Takes encoded chunks, lets time pass, and gives back what has ended. Returns how much that was.
    pub(crate) fn poll(&mut self, now: Instant) -> usize {
        let mut work = 0;
        while let Some(job) = self.encoded.dequeue() {
            work += 1;
            self.start(now, job);
        }
        if self.under_way == 0 {
            return work;
        }
        for job in self.jobs.jobs.iter().flatten() {
            let is_cancelled = job.save.as_ref().is_some_and(|save| save.cancelled.load(Relaxed));
            for offer in &job.offers {
                if is_cancelled {
                    self.engine.cancel(*offer);
                } else if job.copies.made() > 0 && self.engine.unanswered(*offer) >= SILENT_OFFERS {
                    // A store that is gone does not hold up the chunks behind this one, which others have.
                    self.engine.give_up(*offer);
                }
            }
        }
        self.engine.handle_timeout(now);
        while let Some(event) = self.engine.poll_event() {
            work += 1;
            self.end(event);
        }
        self.counts.mirror(self.engine.counters());
        work
    }

    fn start(&mut self, now: Instant, mut job: Box<SaveJob>) {
        let Some(save) = &job.save else { unreachable!("a job that was sent out has a save") };
        if let Some(reason) = save.is_over(now.nanos()) {
            job.outcome = SaveOutcome::NotSaved(reason);
            return self.give_back(job);
        }
        let key = save.chunks[job.chunk].key;
        let header_bytes = u32::try_from(job.writer.header_bytes()).unwrap_or(u32::MAX);
        let (deadline, bytes) = (Instant::from_nanos(save.deadline_ns), job.writer.bytes().len() as u64);
        let Some(place) = self.jobs.jobs.iter().position(Option::is_none) else {
            unreachable!("there is a place for every job")
        };
        for store in self.placement.candidates(&key).as_slice() {
            match self.engine.start(now, deadline, *store, &key, header_bytes, bytes) {
                Ok(offer) => {
                    self.jobs.place_of[offer.slot()] = place;
                    job.offers.push(offer);
                }
                // There is a place for every copy, and the deadline was looked at just now.
                Err(error) => unreachable!("{error}"),
            }
        }
        self.under_way += 1;
        self.jobs.jobs[place] = Some(job);
    }

    fn end(&mut self, event: OfferEvent) {
        let place = &mut self.jobs.jobs[self.jobs.place_of[event.offer.slot()]];
        let Some(job) = place else { unreachable!("a chunk is here until all its offers have ended") };
        job.offers.retain(|offer| *offer != event.offer);
        job.copies.add(event.end);
        if job.offers.is_empty()
            && let Some(mut job) = place.take()
        {
            self.under_way -= 1;
            job.outcome = job.copies.outcome();
            self.give_back(job);
        }
    }

    fn give_back(&self, job: Box<SaveJob>) {
        assert!(self.returned.enqueue(job).is_ok(), "the ring has room for every job");
    }

    /// Writes the next message to `buffer`.
    pub(crate) fn poll_transmit(&mut self, now: Instant, buffer: &mut [u8]) -> Option<Sent> {
        loop {
            let sent = self.engine.poll_transmit(now, buffer)?;
            let Some((handle, range)) = sent.payload else {
                return Some(Sent { to: sent.to, bytes: sent.header_bytes, is_data: false });
            };
            let Some(bytes) = self.jobs.bytes(handle).and_then(|chunk| chunk.get(range)) else { continue };
            let end = sent.header_bytes + bytes.len();
            let Some(room) = buffer.get_mut(sent.header_bytes..end) else { continue };
            room.copy_from_slice(bytes);
            self.counts.segments_sent.add(1);
            self.counts.bytes_sent.add(bytes.len() as u64);
            return Some(Sent { to: sent.to, bytes: end, is_data: true });
        }
    }
}
