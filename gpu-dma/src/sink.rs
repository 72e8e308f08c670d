//! What every sink does.

use std::sync::Arc;

use arrayvec::ArrayVec;
use control::GpuRingError;
use hugepages::{Arena, Slot};

use crate::driver::{DeviceIndex, DriverError};
use crate::memory::{PagedMemory, RingMemory};
use crate::paged;
use crate::placement::Placement;
use crate::received::Received;
use crate::shape::ChunkShape;

/// Transfers in a batch, at most.
pub const BATCH: usize = 32;

/// Transfers offered to a sink, oldest first.
pub type Batch<T> = ArrayVec<Transfer<T>, BATCH>;

/// Transfers that a sink is done with.
pub type FinishedBatch<T> = ArrayVec<Finished<T>, BATCH>;

/// A decoded plane on its way from a slot to its place.
///
/// The sink owns the slot until the copy is done, so nobody can write to it, or use it for the next plane, while a device
/// still reads it. Of a plane in GPU memory the caller keeps the buffers until then.
#[derive(Debug)]
pub struct Transfer<T> {
    /// Whatever the caller wants back with the completion.
    pub context: T,
    /// Where it lies now.
    pub from: Decoded,
    /// The memory that it goes to, and where the chunk lies there.
    pub to: Destination,
    /// Which plane of the chunk this is: `layer * 2`, plus 1 for V.
    pub plane: u32,
}

/// Where a plane lies that is to be copied.
#[derive(Debug)]
pub enum Decoded {
    /// In the first bytes of a slot.
    Slot(Box<Slot>),
    /// In GPU memory, as a NIC has put it there; boxed, because a box goes round.
    Received(Box<Received>),
}

impl Decoded {
    /// The slot, if it is one.
    #[must_use]
    pub fn into_slot(self) -> Option<Box<Slot>> {
        match self {
            Self::Slot(slot) => Some(slot),
            Self::Received(_) => None,
        }
    }

    /// Bytes that it has or has room for.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Slot(slot) => slot.bytes() as u64,
            Self::Received(plane) => plane.bytes(),
        }
    }
}

impl From<Box<Slot>> for Decoded {
    fn from(slot: Box<Slot>) -> Self {
        Self::Slot(slot)
    }
}

/// Where a chunk's planes go. Checked against the memory that it names, so that no copy can reach beyond it.
#[derive(Clone, Debug)]
pub enum Destination {
    /// Memory shared with a serving process.
    Host {
        /// The memory.
        region: Arc<Arena>,
        /// The chunk's place in it.
        placement: Placement,
    },
    /// Pages of a KV cache on a GPU. The slot is in the order of [`PagedMemory::order`].
    Pages {
        /// The cache.
        memory: Arc<PagedMemory>,
        /// Its pages, in the order of the fetch's tokens.
        table: Arc<[u32]>,
        /// The chunk's first token, counted from the table's start.
        first_token: u64,
        /// Tokens of the chunk.
        tokens: u16,
    },
    /// The next free entry of a ring on a GPU.
    Ring {
        /// The ring.
        memory: Arc<RingMemory>,
        /// The fetch, as its client calls it.
        fetch: u64,
        /// The chunk within the fetch.
        chunk: u32,
        /// The chunk's extents.
        shape: ChunkShape,
    },
}

impl Destination {
    /// Bytes of one decoded plane.
    #[must_use]
    pub fn plane_bytes(&self) -> u64 {
        match self {
            Self::Host { placement, .. } => placement.shape().plane_bytes(),
            Self::Pages { memory, tokens, .. } => paged::plane_bytes(memory.kv(), *tokens),
            Self::Ring { memory, shape, .. } => {
                shape.plane_bytes() / crate::ELEMENT_BYTES * memory.ring().element.bytes()
            }
        }
    }

    /// The GPU, if it is in a GPU's memory.
    #[must_use]
    pub fn device(&self) -> Option<DeviceIndex> {
        match self {
            Self::Host { .. } => None,
            Self::Pages { memory, .. } => Some(memory.device()),
            Self::Ring { memory, .. } => Some(memory.device()),
        }
    }

    /// Planes of the chunk.
    #[must_use]
    pub fn planes(&self) -> u32 {
        match self {
            Self::Host { placement, .. } => placement.shape().planes(),
            Self::Pages { memory, .. } => u32::try_from(memory.kv().layers.len() * 2).unwrap_or(u32::MAX),
            Self::Ring { shape, .. } => shape.planes(),
        }
    }
}

/// The end of a transfer. Each transfer that a sink accepts ends exactly once.
#[derive(Debug)]
pub struct Finished<T> {
    /// From the transfer.
    pub context: T,
    /// From the transfer: free to be used again.
    pub from: Decoded,
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
    /// The sink does not go there.
    #[error("the sink does not deliver to this kind of memory")]
    OtherSink,
    /// The GPU's driver refused the copy, or the copy failed.
    #[error("the GPU did not take the plane: {0}")]
    Device(#[from] DriverError),
    /// The client took its ring away.
    #[error(transparent)]
    Ring(#[from] GpuRingError),
    /// The client does not empty its ring.
    #[error("the ring stayed full: its consumer releases no entries")]
    RingFull,
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

    /// Starts whatever the sink holds back to make a larger batch of it, or leaves that to a later call for as long as its
    /// own limits say. Does not wait for it.
    fn flush(&mut self);

    /// Transfers accepted and not yet returned by `poll`: at 0 the sink may be dropped without losing a slot.
    fn in_flight(&self) -> usize;
}
