//! What a serving process links: look up a prompt's stored prefix, fetch its KV cache, wait or poll, cancel; and save
//! what was computed.
//!
//! A [`Client`] is one session with the data plane on this machine. It holds no DPDK and copies no KV: planes
//! are written by the data plane into a [`Region`], memory that both processes map. `docs/CLIENT.md` tells how
//! a serving process uses all this.
#![forbid(unsafe_code)]

mod client;
mod config;
mod dispatch;
mod fetch;
mod gpu;
mod lost;
mod prefix;
mod region;
mod save;
mod shared;

pub use crate::client::{Client, ConnectError, LookupError, StatsError};
pub use config::ClientConfig;
pub use control::{
    ChunkPlace, Codec, CommandError, DeviceUuid, Dtype, ElementType, FewerCopies, GpuAllocation,
    GpuMemoryError, GpuRingError, IpcHandle, LayerBase, Layout, LayoutError, Missing, MissingReason,
    NotSaved, NotSavedReason, Outcome, PageStrides, PagedKv, PlaneBase, RingDescriptor, SaveCodec, Scale,
    Shape,
};
pub use fetch::{Fetch, FetchError, FetchReport, FetchRequest, Progress, RequestError};
pub use gpu::{GpuRing, PagedCache, PagesRequest, RingConfig, RingEntry, RingError, RingRequest};
pub use lost::Lost;
pub use prefix::{Prefix, PrefixChunk};
pub use protocol::key::{Key, Namespace};
pub use region::{Region, RegisterError};
pub use save::{Save, SaveError, SavePagesRequest, SaveReport, SaveRequest};

/// Compiles the example of the guide.
#[cfg(doctest)]
#[doc = include_str!("../../docs/CLIENT.md")]
struct Guide;
