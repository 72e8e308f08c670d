//! The encode stage of a decode lcore: planes of a chunk from the serving process's memory into an encoded chunk, one at a
//! time, and only while no plane of a fetch waits to be decoded.

use std::sync::Arc;

use arrayvec::ArrayVec;
use compress::{Encoder, Side, WriteError};
use control::NotSavedReason;
use dpdk::Ring;
use gpu_dma::{Read, ReadBatch, Source};
use hugepages::Slot;
use iface::{Clock, Counter, Stage};

use crate::job::PlaneJob;
use crate::save::job::{SaveJob, SaveOutcome};

/// Planes that are read ahead, each in a slot of its own: one to encode, one on its way.
pub(crate) const STAGING_SLOTS: usize = 2;

/// The rings that join an encode stage to the rest.
pub(crate) struct EncodeRings {
    /// Planes of fetches that wait to be decoded: they go first.
    pub(crate) decode: Ring<Box<PlaneJob>>,
    /// Chunks to encode.
    pub(crate) chunks: Ring<Box<SaveJob>>,
    /// Where each queue takes encoded chunks.
    pub(crate) encoded: Vec<Ring<Box<SaveJob>>>,
    /// Where chunks go that cannot be encoded.
    pub(crate) returned: Ring<Box<SaveJob>>,
}

/// Exact counts of one encode stage: `chunks_begun = chunks_encoded + chunks_failed + 0 or 1 under way`.
#[derive(Debug, Default)]
pub(crate) struct EncodeCounters {
    pub(crate) chunks_begun: Counter,
    pub(crate) chunks_encoded: Counter,
    pub(crate) chunks_failed: Counter,
    pub(crate) planes: Counter,
    pub(crate) plane_bytes: Counter,
    pub(crate) encoded_bytes: Counter,
    pub(crate) busy_ns: Counter,
}

impl EncodeCounters {
    /// Every counter with its name.
    pub(crate) fn named(&self) -> [(&'static str, &Counter); 7] {
        [
            ("chunks_begun", &self.chunks_begun),
            ("chunks_encoded", &self.chunks_encoded),
            ("chunks_failed", &self.chunks_failed),
            ("planes", &self.planes),
            ("plane_bytes", &self.plane_bytes),
            ("encoded_bytes", &self.encoded_bytes),
            ("busy_ns", &self.busy_ns),
        ]
    }
}

/// One encoder.
pub(crate) struct EncodeStage<S> {
    pub(crate) source: S,
    pub(crate) encoder: Encoder,
    pub(crate) rings: EncodeRings,
    pub(crate) clock: Clock,
    pub(crate) counters: Arc<EncodeCounters>,
    /// Slots without a plane.
    pub(crate) free: ArrayVec<Box<Slot>, STAGING_SLOTS>,
    /// Planes that were read, by the low bit of their number.
    pub(crate) read: [Option<Box<Slot>>; STAGING_SLOTS],
    pub(crate) done: ReadBatch<usize>,
    /// The chunk being encoded, and its first plane that was not asked for.
    pub(crate) job: Option<Box<SaveJob>>,
    pub(crate) next_read: usize,
}

impl<S: Source<usize>> Stage for EncodeStage<S> {
    /// Encodes at most one plane.
    fn poll(&mut self, now_ns: u64) -> usize {
        if self.job.is_none() {
            match self.rings.chunks.dequeue() {
                Some(job) => self.begin(job),
                None => return 0,
            }
        }
        self.take_reads();
        if let Some(reason) = self.job.as_ref().and_then(|job| job.save.as_ref()?.is_over(now_ns)) {
            self.fail(reason);
        }
        if self.is_failed() {
            return self.let_go();
        }
        // A chunk that is held while fetches are served costs them nothing.
        if !self.rings.decode.is_empty() {
            return 0;
        }
        let begin_ns = self.clock.now_ns();
        self.ask_for_reads();
        let encoded = self.encode_plane();
        if encoded > 0 {
            self.counters.busy_ns.add(self.clock.now_ns() - begin_ns);
        }
        encoded
    }
}

impl<S: Source<usize>> EncodeStage<S> {
    fn begin(&mut self, mut job: Box<SaveJob>) {
        self.counters.chunks_begun.add(1);
        job.outcome = SaveOutcome::Pending;
        self.next_read = 0;
        let Some(save) = job.save.as_ref() else { unreachable!("a job that was sent out has a save") };
        let chunk = &save.chunks[job.chunk];
        let begun = job.writer.begin(&chunk.key.0, &chunk.shape);
        if let Err(error) = begun {
            job.outcome = SaveOutcome::NotSaved(reason_of(&error));
        }
        self.job = Some(job);
    }

    fn is_failed(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.outcome != SaveOutcome::Pending)
    }

    fn fail(&mut self, reason: NotSavedReason) {
        if let Some(job) = &mut self.job
            && job.outcome == SaveOutcome::Pending
        {
            job.outcome = SaveOutcome::NotSaved(reason);
        }
    }

    /// Gives a failed chunk back, once nothing of the client's memory is being read.
    fn let_go(&mut self) -> usize {
        if self.source.in_flight() > 0 {
            return 0;
        }
        for slot in self.read.iter_mut().filter_map(Option::take) {
            self.free.push(slot);
        }
        if let Some(job) = self.job.take() {
            self.counters.chunks_failed.add(1);
            assert!(self.rings.returned.enqueue(job).is_ok(), "the ring has room for every job");
        }
        1
    }

    fn take_reads(&mut self) {
        self.source.poll(&mut self.done);
        let mut failed = false;
        for done in self.done.drain(..) {
            failed |= done.result.is_err();
            self.read[done.context % STAGING_SLOTS] = Some(done.slot);
        }
        if failed {
            self.fail(NotSavedReason::NotRead);
        }
    }

    fn ask_for_reads(&mut self) {
        let Some(job) = &self.job else { return };
        let (Some(save), Some(next)) = (&job.save, job.writer.next_plane()) else { return };
        let chunk = &save.chunks[job.chunk];
        while self.next_read < (next + STAGING_SLOTS).min(chunk.shape.planes()) {
            let Some(slot) = self.free.pop() else { break };
            let plane = u32::try_from(self.next_read).unwrap_or(u32::MAX);
            let read = Read { context: self.next_read, slot, from: chunk.from.clone(), plane };
            if let Err(read) = self.source.submit(read) {
                self.free.push(read.slot);
                break;
            }
            self.next_read += 1;
        }
        self.source.flush();
        self.take_reads();
    }

    fn encode_plane(&mut self) -> usize {
        let Some(job) = &mut self.job else { return 0 };
        let (Some(save), Some(plane)) = (&job.save, job.writer.next_plane()) else { return 0 };
        let Some(slot) = self.read[plane % STAGING_SLOTS].take() else { return 0 };
        let shape = &save.chunks[job.chunk].shape;
        let (layer, side) = (plane / 2, if plane.is_multiple_of(2) { Side::K } else { Side::V });
        self.encoder.choose(save.codecs.plane(u16::try_from(layer).unwrap_or(u16::MAX), side));
        let before = job.writer.bytes().len();
        let bytes = shape.plane_bytes();
        let added = job.writer.add_plane(&mut self.encoder, &slot.as_slice()[..bytes]);
        self.free.push(slot);
        match added {
            Ok(()) => {
                self.counters.planes.add(1);
                self.counters.plane_bytes.add(bytes as u64);
                self.counters.encoded_bytes.add((job.writer.bytes().len() - before) as u64);
                if job.writer.is_whole() {
                    self.send_on();
                }
            }
            Err(error) => job.outcome = SaveOutcome::NotSaved(reason_of(&error)),
        }
        1
    }

    fn send_on(&mut self) {
        let Some(job) = self.job.take() else { return };
        self.counters.chunks_encoded.add(1);
        let queue = job.queue(self.rings.encoded.len());
        assert!(self.rings.encoded[queue].enqueue(job).is_ok(), "the ring has room for every job");
    }
}

fn reason_of(error: &WriteError) -> NotSavedReason {
    match error {
        WriteError::Full { .. } => NotSavedReason::TooLarge,
        WriteError::Encode(_) => NotSavedReason::NotEncodable,
    }
}
