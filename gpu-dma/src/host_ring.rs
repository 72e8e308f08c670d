//! The sink in memory shared with the serving process.

use std::marker::PhantomData;
use std::sync::Arc;

use hugepages::{Arena, OutOfBounds};

use crate::placement::Placement;
use crate::sink::{BATCH, Batch, Finished, FinishedBatch, Sink, SinkFault, Transfer};

/// A call of `submit` stops accepting planes after copying so many bytes (but copies one in any case), so that a lcore
/// that also receives is back at its queue within about 100 us.
pub const SUBMIT_BYTES: u64 = 1 << 20;

/// Memory shared with the serving process, into which decoded planes are copied in the layout that it asked for.
///
/// Copying is done by the calling core, within `submit`.
#[derive(Debug)]
pub struct HostRing<T> {
    region: Arc<Arena>,
    finished: FinishedBatch<T>,
}

impl<T> HostRing<T> {
    /// A sink over all of `region`, usually one that came from the client by `Arena::from_fd`.
    #[must_use]
    pub fn new(region: Arc<Arena>) -> Self {
        Self { region, finished: FinishedBatch::new() }
    }

    /// The memory that planes go to.
    #[must_use]
    pub fn region(&self) -> &Arc<Arena> {
        &self.region
    }

    /// Copies a decoded plane to its place, now.
    pub fn deliver(&self, placement: &Placement, plane: u32, decoded: &[u8]) -> Result<(), SinkFault> {
        let shape = placement.shape();
        let pieces = placement.pieces(plane);
        let pieces = pieces.ok_or(SinkFault::NoSuchPlane { plane, planes: shape.planes() })?;
        let plane_bytes = shape.plane_bytes();
        let too_small = SinkFault::SlotTooSmall { slot_bytes: decoded.len(), plane_bytes };
        let decoded =
            usize::try_from(plane_bytes).ok().and_then(|bytes| decoded.get(..bytes)).ok_or(too_small)?;
        let region_bytes = self.region.bytes();
        let runs = decoded.chunks_exact(decoded.len() / pieces.len());
        for (piece, run) in pieces.zip(runs) {
            let copied = usize::try_from(piece.to).is_ok_and(|to| self.region.copy_in(to, run).is_ok());
            if !copied {
                return Err(SinkFault::OutOfRange { region_bytes });
            }
        }
        Ok(())
    }

    /// The bytes at `offset..offset + bytes` of the region, for a decoder that writes its output straight to where it
    /// belongs. `None` if they do not lie within the region.
    ///
    /// Not a `&mut [u8]`, and there is no sound way to make one of it: the serving process may write there at any moment.
    #[must_use]
    pub fn window(&self, offset: usize, bytes: usize) -> Option<Window<'_>> {
        offset.checked_add(bytes).filter(|&end| end <= self.region.bytes())?;
        Some(Window { region: &self.region, offset, bytes, exclusive: PhantomData })
    }
}

/// A run of shared memory to write to. Write only: what is read back may have been changed by the serving process.
///
/// A decoder that produces its output in tiles (of 4 KiB, say, in its first-level cache) and writes each of them here
/// sends every byte to memory once, as it would through a reference.
#[derive(Debug)]
pub struct Window<'a> {
    region: &'a Arena,
    offset: usize,
    bytes: usize,
    exclusive: PhantomData<&'a mut [u8]>,
}

impl Window<'_> {
    /// Bytes in the window.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes `tile` at `at` of the window.
    pub fn write(&mut self, at: usize, tile: &[u8]) -> Result<(), OutOfBounds> {
        if at.checked_add(tile.len()).is_none_or(|end| end > self.bytes) {
            return Err(OutOfBounds { offset: at, bytes: tile.len(), arena_bytes: self.bytes });
        }
        self.region.copy_in(self.offset + at, tile)
    }

    /// Where the window starts, for kernels that store with intrinsics or assembly. Storing to its `bytes()` bytes is
    /// sound through raw pointers (volatile, non-temporal or atomic); a reference to them is not.
    #[must_use]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.region.as_ptr().wrapping_add(self.offset)
    }
}

impl<T: Send> Sink<T> for HostRing<T> {
    fn submit(&mut self, offered: &mut Batch<T>) -> usize {
        let room = BATCH - self.finished.len();
        let mut copied_bytes = 0;
        let mut accepted = 0;
        while accepted < room && copied_bytes < SUBMIT_BYTES {
            let Some(transfer) = offered.get(accepted) else { break };
            copied_bytes += transfer.placement.shape().plane_bytes();
            accepted += 1;
        }
        for Transfer { context, slot, placement, plane } in offered.drain(..accepted) {
            let result = self.deliver(&placement, plane, slot.as_slice());
            self.finished.push(Finished { context, slot, result });
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
