//! The dma stage: decoded planes from their slots to the sink, in batches.

use dpdk::Ring;
use gpu_dma::{Batch, Decoded, FinishedBatch, Sink, Transfer};
use hugepages::Slot;
use iface::{Clock, Stage};

use crate::job::{PlaneJob, PlaneOutcome};

/// The rings that join a dma stage to the rest.
pub(crate) struct DmaRings {
    /// Decoded planes.
    pub(crate) decoded: Ring<Box<PlaneJob>>,
    /// Where each queue takes back delivered planes.
    pub(crate) returned: Vec<Ring<Box<PlaneJob>>>,
    /// Free slots.
    pub(crate) slots: Ring<Box<Slot>>,
}

/// One lcore's share of delivery.
pub(crate) struct DmaStage<S> {
    pub(crate) sink: S,
    pub(crate) rings: DmaRings,
    pub(crate) clock: Clock,
    pub(crate) offered: Batch<Box<PlaneJob>>,
    pub(crate) finished: FinishedBatch<Box<PlaneJob>>,
}

impl<S: Sink<Box<PlaneJob>>> Stage for DmaStage<S> {
    fn poll(&mut self, _now_ns: u64) -> usize {
        let taken = self.take_decoded();
        if !self.offered.is_empty() {
            self.sink.submit(&mut self.offered);
        }
        if self.sink.in_flight() == 0 {
            return taken;
        }
        self.sink.flush();
        taken + self.finish()
    }
}

impl<S: Sink<Box<PlaneJob>>> DmaStage<S> {
    fn take_decoded(&mut self) -> usize {
        if self.rings.decoded.is_empty() {
            return 0;
        }
        let mut taken = 0;
        // On a lcore that decodes too, the loop's time is from before the decoding.
        let now_ns = self.clock.now_ns();
        while !self.offered.is_full()
            && let Some(mut job) = self.rings.decoded.dequeue()
        {
            job.times.dma_begin_ns = now_ns;
            let slot = job.slot.take().map(Decoded::Slot);
            let from = slot.or_else(|| job.received.take().map(Decoded::Received));
            let (Some(from), Some(fetch)) = (from, job.fetch.as_ref()) else {
                unreachable!("a decoded plane has its slot, or lies in GPU memory, and its fetch");
            };
            let to = fetch.destination(job.chunk);
            let plane = u32::try_from(job.plane).unwrap_or(u32::MAX);
            self.offered.push(Transfer { context: job, from, to, plane });
            taken += 1;
        }
        taken
    }

    fn finish(&mut self) -> usize {
        if self.sink.poll(&mut self.finished) == 0 {
            return 0;
        }
        let now_ns = self.clock.now_ns();
        let finished = self.finished.len();
        for done in self.finished.drain(..) {
            let mut job = done.context;
            match done.from {
                Decoded::Slot(slot) => {
                    assert!(self.rings.slots.enqueue(slot).is_ok(), "the ring has room for every slot");
                }
                Decoded::Received(received) => {
                    job.received = Some(received);
                    // From here on the NIC may write there again.
                    job.drop_segments();
                }
            }
            job.times.dma_end_ns = now_ns;
            job.outcome =
                if done.result.is_ok() { PlaneOutcome::Delivered } else { PlaneOutcome::NotDelivered };
            let queue = job.queue;
            assert!(self.rings.returned[queue].enqueue(job).is_ok(), "the ring has room for every job");
        }
        finished
    }
}
