//! The decode stage: packets of a plane to the decoded plane in a slot, in one pass over cache-resident scratch.

use compress::{DecodeError, Decoder};
use dpdk::{Mbuf, Ring};
use hugepages::Slot;
use iface::{Clock, Stage};

use crate::job::{PlaneJob, PlaneOutcome};

/// The rings that join a decode stage to the rest.
pub(crate) struct DecodeRings {
    /// Planes to decode, from every queue.
    pub(crate) planes: Ring<Box<PlaneJob>>,
    /// Decoded planes.
    pub(crate) decoded: Ring<Box<PlaneJob>>,
    /// Where each queue takes back planes that cannot be decoded.
    pub(crate) returned: Vec<Ring<Box<PlaneJob>>>,
    /// Free slots.
    pub(crate) slots: Ring<Box<Slot>>,
}

/// One decoder.
pub(crate) struct DecodeStage {
    pub(crate) decoder: Decoder,
    pub(crate) rings: DecodeRings,
    pub(crate) clock: Clock,
}

impl Stage for DecodeStage {
    /// Decodes one plane, so that a lcore that also receives is soon back at its queue. Without a free slot planes
    /// wait in their ring, and what they hold back is credit: the engines ask the stores for less.
    fn poll(&mut self, _now_ns: u64) -> usize {
        if self.rings.planes.is_empty() {
            return 0;
        }
        let Some(slot) = self.rings.slots.dequeue() else { return 0 };
        let Some(job) = self.rings.planes.dequeue() else {
            self.give_back(slot);
            return 0;
        };
        self.decode(job, slot);
        1
    }
}

impl DecodeStage {
    fn decode(&mut self, mut job: Box<PlaneJob>, mut slot: Box<Slot>) {
        job.times.decode_begin_ns = self.clock.now_ns();
        job.outcome = self.decode_into(&mut job, &mut slot);
        job.drop_segments();
        job.times.decode_end_ns = self.clock.now_ns();
        let ring = if job.outcome == PlaneOutcome::Pending {
            job.slot = Some(slot);
            &self.rings.decoded
        } else {
            self.give_back(slot);
            &self.rings.returned[job.queue]
        };
        assert!(ring.enqueue(job).is_ok(), "the rings have room for every job");
    }

    /// Another decoder may be waiting for a slot that this one turned out not to need.
    fn give_back(&self, slot: Box<Slot>) {
        assert!(self.rings.slots.enqueue(slot).is_ok(), "the ring has room for every slot");
    }

    /// [`PlaneOutcome::Pending`] if the slot now holds the decoded plane.
    fn decode_into(&mut self, job: &mut PlaneJob, slot: &mut Slot) -> PlaneOutcome {
        let (Some(shape), Some(entry), Some(fetch)) = (&job.shape, &job.entry, &job.fetch) else {
            return PlaneOutcome::Undecodable;
        };
        if !fetch.expects(job.chunk, shape) {
            return PlaneOutcome::OtherShape;
        }
        let bytes = shape.plane_bytes();
        let Some(out) = slot.as_mut_slice().get_mut(..bytes) else { return PlaneOutcome::Undecodable };
        let segments = job.segments[..job.segment_count].iter().flatten().map(Mbuf::data);
        match self.decoder.decode_segments(shape, entry, segments, fetch.dtype, out) {
            Ok(()) => {
                job.decoded_bytes = bytes;
                PlaneOutcome::Pending
            }
            Err(DecodeError::Crc { .. } | DecodeError::Length { .. }) => PlaneOutcome::Corrupt,
            Err(_) => PlaneOutcome::Undecodable,
        }
    }
}
