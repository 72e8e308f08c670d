//! Sinks: where decoded planes go, and how they lie there.
//!
//! - [`Layout`] and [`ChunkShape`] say how the planes of a chunk lie in the serving process's memory. [`Placement`] is a
//!   layout that was checked against a chunk and a region: no arithmetic on it can fail, and nothing it describes lies
//!   outside of the region.
//! - [`Sink`] takes batches of [`Transfer`]s, a slot and the place where its plane goes, and gives the slots back when
//!   the copies are done.
//! - [`HostRing`] is the sink in memory shared with the serving process. The CUDA ring and CUDA pages are to follow the
//!   same trait.

pub mod cuda;
mod host_ring;
mod layout;
mod placement;
mod shape;
mod sink;

pub use host_ring::{HostRing, SUBMIT_BYTES, deliver};
pub use layout::{Dimension, HeadOrder, Layout, LayoutError};
pub use placement::{Piece, Pieces, Placement};
pub use shape::{ChunkShape, ELEMENT_BYTES};
pub use sink::{BATCH, Batch, Finished, FinishedBatch, Sink, SinkFault, Transfer};
