//! What every sink does.

use std::sync::Arc;

use arrayvec::ArrayVec;
use hugepages::{Arena, Slot};

use crate::placement::Placement;

/// Transfers in a batch, at most.
pub const BATCH: usize = 32;

/// Transfers offered to a sink, oldest first.
pub type Batch<T> = ArrayVec<Transfer<T>, BATCH>;

/// Transfers that a sink is done with.
pub type FinishedBatch<T> = ArrayVec<Finished<T>, BATCH>;

/// A decoded plane on its way from a slot to its place.
///
/// The sink owns the slot until the copy is done, so nobody can write to it, or use it for the next plane, while a device
/// still reads it.
#[derive(Debug)]
pub struct Transfer<T> {
    /// Whatever the caller wants back with the completion.
    pub context: T,
    /// Holds the decoded plane in its first bytes.
    pub slot: Box<Slot>,
    /// The memory that it goes to.
    pub region: Arc<Arena>,
    /// Where the chunk's planes go there.
    pub placement: Placement,
    /// Which plane of the chunk this is: `layer * 2`, plus 1 for V.
    pub plane: u32,
}

/// The end of a transfer. Each transfer that a sink accepts ends exactly once.
#[derive(Debug)]
pub struct Finished<T> {
    /// From the transfer.
    pub context: T,
    /// From the transfer: free to be used again.
    pub slot: Box<Slot>,
    /// Whether the plane is where it should be, for every reader that learns of it through an acquire operation.
    pub result: Result<(), SinkFault>,
}

/// Why a plane was not, or not all, put in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SinkFault {
    /// There is no such plane in the chunk.
    #[error("plane {plane} of a chunk of {planes} planes")]
    NoSuchPlane {
        /// The index in the transfer.
        plane: u32,
        /// Planes in the chunk.
        planes: u32,
    },
    /// The slot is smaller than the plane.
    #[error("a slot of {slot_bytes} bytes cannot hold a plane of {plane_bytes} bytes")]
    SlotTooSmall {
        /// Bytes in the slot.
        slot_bytes: usize,
        /// Bytes in the plane.
        plane_bytes: u64,
    },
    /// The place was checked against another, larger region. Nothing was written outside of the region.
    #[error("the plane's place does not lie within the region's {region_bytes} bytes")]
    OutOfRange {
        /// Bytes in the region.
        region_bytes: usize,
    },
}

/// A place where decoded planes go. One thread drives it, by polling:
/// [`submit`](Sink::submit) what there is, [`flush`](Sink::flush) when there is no more for the moment, and
/// [`poll`](Sink::poll) for what is done.
///
/// No method waits, allocates or makes a system call beyond what the device's driver needs.
pub trait Sink<T>: Send {
    /// Starts transfers from the front of `offered` and removes them from it; returns how many. Those that it has no
    /// room for stay, in order, to be offered again.
    fn submit(&mut self, offered: &mut Batch<T>) -> usize;

    /// Appends finished transfers to `finished`, as many as there are and as fit; returns how many. They may finish in
    /// another order than they were submitted in.
    fn poll(&mut self, finished: &mut FinishedBatch<T>) -> usize;

    /// Starts whatever the sink holds back to make a larger batch of it. Does not wait for it.
    fn flush(&mut self);

    /// Transfers accepted and not yet returned by `poll`: at 0 the sink may be dropped without losing a slot.
    fn in_flight(&self) -> usize;
}
