//! The sink in memory shared with the serving process.

use hugepages::Arena;

use crate::placement::Placement;
use crate::sink::{BATCH, Batch, Decoded, Destination, Finished, FinishedBatch, Sink, SinkFault, Transfer};

/// A call of `submit` stops accepting planes after copying so many bytes (but copies one in any case), so that a lcore
/// that also receives is back at its queue within about 100 us.
pub const SUBMIT_BYTES: u64 = 1 << 20;

/// Delivers into memory shared with serving processes, in the layout that each asked for. Every transfer names its
/// region, so one host ring serves all of them.
///
/// Copying is done by the calling core, within `submit`.
#[derive(Debug)]
pub struct HostRing<T> {
    finished: FinishedBatch<T>,
}

impl<T> Default for HostRing<T> {
    fn default() -> Self {
        Self { finished: FinishedBatch::new() }
    }
}

/// Copies a decoded plane to its place in `region`, now.
///
/// # Errors
/// Nothing, or not all of the plane, was written: see [`SinkFault`].
pub fn deliver(region: &Arena, placement: &Placement, plane: u32, decoded: &[u8]) -> Result<(), SinkFault> {
    let shape = placement.shape();
    let pieces = placement.pieces(plane);
    let pieces = pieces.ok_or(SinkFault::NoSuchPlane { plane, planes: shape.planes() })?;
    let plane_bytes = shape.plane_bytes();
    let too_small = SinkFault::SlotTooSmall { slot_bytes: decoded.len(), plane_bytes };
    let decoded =
        usize::try_from(plane_bytes).ok().and_then(|bytes| decoded.get(..bytes)).ok_or(too_small)?;
    let runs = decoded.chunks_exact(decoded.len() / pieces.len());
    for (piece, run) in pieces.zip(runs) {
        let copied = usize::try_from(piece.to).is_ok_and(|to| region.copy_in_streaming(to, run).is_ok());
        if !copied {
            return Err(SinkFault::OutOfRange { region_bytes: region.bytes() });
        }
    }
    Ok(())
}

impl<T: Send> Sink<T> for HostRing<T> {
    fn submit(&mut self, offered: &mut Batch<T>) -> usize {
        let room = BATCH - self.finished.len();
        let mut copied_bytes = 0;
        let mut accepted = 0;
        while accepted < room && copied_bytes < SUBMIT_BYTES {
            let Some(transfer) = offered.get(accepted) else { break };
            copied_bytes += transfer.to.plane_bytes();
            accepted += 1;
        }
        for Transfer { context, from, to, plane } in offered.drain(..accepted) {
            let result = match (&to, &from) {
                (Destination::Host { region, placement }, Decoded::Slot(slot)) => {
                    deliver(region, placement, plane, slot.as_slice())
                }
                _ => Err(SinkFault::OtherSink),
            };
            self.finished.push(Finished { context, from, result });
        }
        accepted
    }

    fn poll(&mut self, finished: &mut FinishedBatch<T>) -> usize {
        let count = self.finished.len().min(finished.remaining_capacity());
        finished.extend(self.finished.drain(..count));
        count
    }

    fn flush(&mut self) {}

    fn in_flight(&self) -> usize {
        self.finished.len()
    }
}
