//! Sinks: where decoded planes go, and how they lie there.
//!
//! - [`Layout`] and [`ChunkShape`] say how the planes of a chunk lie in the serving process's memory. [`Placement`] is a
//!   layout that was checked against a chunk and a region: no arithmetic on it can fail, and nothing it describes lies
//!   outside of the region.
//! - [`Sink`] takes batches of [`Transfer`]s, a slot and the place where its plane goes, and gives the slots back when
//!   the copies are done.
//! - [`HostRing`] is the sink in memory shared with the serving process, [`GpuSink`] that in GPU memory: pages of a
//!   serving engine's KV cache ([`PagedMemory`], placed by [`paged`]) and rings ([`RingMemory`]). [`Sinks`] is both.
//! - [`Source`] is the other direction: where planes come from when they are saved. [`HostSource`] reads memory shared with the
//!   serving process, [`GpuSource`] pages of its KV cache; [`Sources`] is both.
//! - [`ReceiveMemory`] is GPU memory that a NIC receives into, [`Received`] a plane that lies there.
//! - [`Driver`] is what they need of a GPU: [`cuda::Cuda`], or a fake ([`testing`]). [`pin`] makes slots known to it.

mod copies;
pub mod cuda;
mod driver;
mod gpu_sink;
mod gpu_source;
mod host_ring;
mod layout;
mod memory;
pub mod paged;
mod pinned;
mod placement;
mod received;
mod shape;
mod sink;
mod sinks;
mod source;
pub mod testing;
pub mod yardstick;

pub use copies::{CopyList, MAX_PITCH_BYTES, Run, STRIDED_BELOW_BYTES};
pub use driver::{Device, DeviceIndex, Driver, DriverError, EventId, ForNic, Mapping, NicUnfit, StreamId};
pub use gpu_sink::{GpuHealth, GpuSink, GpuSinkConfig};
pub use gpu_source::{GpuSource, Sources};
pub use host_ring::{HostRing, SUBMIT_BYTES, deliver};
pub use layout::{Dimension, HeadOrder, Layout, LayoutError};
pub use memory::{OpenError, PagedMemory, RingMemory, find_device};
pub use paged::SlotOrder;
pub use pinned::pin;
pub use placement::{Piece, Pieces, Placement};
pub use received::{ReceiveMemory, Received};
pub use shape::{ChunkShape, ELEMENT_BYTES};
pub use sink::{BATCH, Batch, Decoded, Destination, Finished, FinishedBatch, Sink, SinkFault, Transfer};
pub use sinks::Sinks;
pub use source::{HostSource, Origin, READS, Read, ReadBatch, ReadDone, Source, SourceFault, gather};
