//! Sources: where planes come from when they are saved. The other direction of [`crate::sink`], in the same manner.

use std::sync::Arc;

use arrayvec::ArrayVec;
use hugepages::{Arena, Slot};

use crate::driver::DriverError;
use crate::memory::PagedMemory;
use crate::paged;
use crate::placement::Placement;

/// Reads in a batch, at most.
pub const READS: usize = 8;

/// Reads that a source is done with.
pub type ReadBatch<T> = ArrayVec<ReadDone<T>, READS>;

/// Where a chunk's planes are. Checked against the memory that it names, so that no copy can reach beyond it.
#[derive(Clone, Debug)]
pub enum Origin {
    /// Memory shared with a serving process.
    Host {
        /// The memory.
        region: Arc<Arena>,
        /// The chunk's place in it.
        placement: Placement,
    },
    /// Pages of a KV cache on a GPU, whose elements have 16 bits.
    Pages {
        /// The cache.
        memory: Arc<PagedMemory>,
        /// Its pages, in the order of the save's tokens; checked against the cache.
        table: Arc<[u32]>,
        /// The chunk's first token, counted from the table's start.
        first_token: u64,
        /// Tokens of the chunk.
        tokens: u16,
    },
}

impl Origin {
    /// Bytes of one plane.
    #[must_use]
    pub fn plane_bytes(&self) -> u64 {
        match self {
            Self::Host { placement, .. } => placement.shape().plane_bytes(),
            Self::Pages { memory, tokens, .. } => paged::plane_bytes(memory.kv(), *tokens),
        }
    }

    /// Planes of the chunk.
    #[must_use]
    pub fn planes(&self) -> u32 {
        match self {
            Self::Host { placement, .. } => placement.shape().planes(),
            Self::Pages { memory, .. } => u32::try_from(memory.kv().layers.len() * 2).unwrap_or(u32::MAX),
        }
    }
}

/// A plane to be brought into a slot. The source owns the slot until the copy is done.
#[derive(Debug)]
pub struct Read<T> {
    /// Whatever the caller wants back with the plane.
    pub context: T,
    /// What receives the plane in its first bytes, as `[tokens, kv_heads, head_dim]`.
    pub slot: Box<Slot>,
    /// Where the chunk is.
    pub from: Origin,
    /// Which plane of it: `layer * 2`, plus 1 for V.
    pub plane: u32,
}

/// The end of a read. Each read that a source accepts ends exactly once.
#[derive(Debug)]
pub struct ReadDone<T> {
    /// From the read.
    pub context: T,
    /// From the read.
    pub slot: Box<Slot>,
    /// Whether the slot holds the plane. What the memory's owner wrote meanwhile is in it or is not, byte by byte.
    pub result: Result<(), SourceFault>,
}

/// Why a plane was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceFault {
    /// There is no such plane in the chunk.
    #[error("plane {plane} of a chunk of {planes} planes")]
    NoSuchPlane {
        /// The index in the read.
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
    /// The place was checked against another, larger region.
    #[error("the plane's place does not lie within the region's {region_bytes} bytes")]
    OutOfRange {
        /// Bytes in the region.
        region_bytes: usize,
    },
    /// The source does not read there.
    #[error("the source does not read this kind of memory")]
    OtherSource,
    /// The GPU's driver refused the copy, or the copy failed.
    #[error("the GPU did not give the plane: {0}")]
    Device(#[from] DriverError),
}

/// A place where planes come from. One thread drives it, by polling, as a [`crate::Sink`].
///
/// No method waits, allocates or makes a system call beyond what the device's driver needs.
pub trait Source<T>: Send {
    /// Starts a read; gives it back if there is no room for it now.
    ///
    /// # Errors
    /// The read, unchanged.
    fn submit(&mut self, read: Read<T>) -> Result<(), Read<T>>;

    /// Appends finished reads to `done`, as many as there are and as fit; returns how many. They may finish in another order
    /// than they were submitted in.
    fn poll(&mut self, done: &mut ReadBatch<T>) -> usize;

    /// Starts whatever the source holds back to make a larger batch of it.
    fn flush(&mut self);

    /// Reads accepted and not yet returned by `poll`: at 0 nothing of any origin is read any more.
    fn in_flight(&self) -> usize;
}

/// Reads memory shared with serving processes; the copy is made by the calling core, within `submit`.
#[derive(Debug)]
pub struct HostSource<T> {
    done: ReadBatch<T>,
}

impl<T> Default for HostSource<T> {
    fn default() -> Self {
        Self { done: ReadBatch::new() }
    }
}

/// Copies a plane from its place in `region` to `out`, now.
///
/// # Errors
/// Nothing, or not all of the plane, was read: see [`SourceFault`].
pub fn gather(region: &Arena, placement: &Placement, plane: u32, out: &mut [u8]) -> Result<(), SourceFault> {
    let shape = placement.shape();
    let pieces = placement.pieces(plane);
    let pieces = pieces.ok_or(SourceFault::NoSuchPlane { plane, planes: shape.planes() })?;
    let plane_bytes = shape.plane_bytes();
    let too_small = SourceFault::SlotTooSmall { slot_bytes: out.len(), plane_bytes };
    let out = usize::try_from(plane_bytes).ok().and_then(|bytes| out.get_mut(..bytes)).ok_or(too_small)?;
    let run_bytes = out.len() / pieces.len();
    for (piece, run) in pieces.zip(out.chunks_exact_mut(run_bytes)) {
        let copied = usize::try_from(piece.to).is_ok_and(|at| region.copy_out(at, run).is_ok());
        if !copied {
            return Err(SourceFault::OutOfRange { region_bytes: region.bytes() });
        }
    }
    Ok(())
}

impl<T: Send> Source<T> for HostSource<T> {
    fn submit(&mut self, read: Read<T>) -> Result<(), Read<T>> {
        if self.done.is_full() {
            return Err(read);
        }
        let Read { context, mut slot, from, plane } = read;
        let result = match from {
            Origin::Host { region, placement } => gather(&region, &placement, plane, slot.as_mut_slice()),
            Origin::Pages { .. } => Err(SourceFault::OtherSource),
        };
        self.done.push(ReadDone { context, slot, result });
        Ok(())
    }

    fn poll(&mut self, done: &mut ReadBatch<T>) -> usize {
        let count = self.done.len().min(done.remaining_capacity());
        done.extend(self.done.drain(..count));
        count
    }

    fn flush(&mut self) {}

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}
