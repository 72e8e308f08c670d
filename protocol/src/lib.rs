//! Packet formats and the sans-IO engines of both ends of a fetch and of a PUT.
//!
//! Nothing here does I/O, reads a clock, or allocates after a constructor has returned. Packets and the
//! time go in; packets and events come out. `docs/PROTOCOL.md` specifies every byte and both ends' rules.
//!
//! In the order in which a packet meets the code:
//!
//! - [`wire`]: one module per packet format, checked once at the edge;
//! - [`frame`]: an Ethernet frame to a datagram for one of our ports, and back;
//! - [`neighbour`]: which MAC address a store or gateway has (ARP, neighbour discovery);
//! - [`fetch`]: the data plane's engine, which asks for what it wants and pays with credit;
//! - `pull`: how both pull, a data plane that fetches and a store that is put something: credit, and what is lost;
//! - [`serve`]: the store's engine, which sends what it was asked for, in fair turns, and remembers nothing else;
//! - [`put`]: the other direction, from a data plane into a store: both ends;
//! - [`key`]: how chunks are named;
//! - [`paths`], [`path_mtu`]: how large a segment each path carries, found by probes;
//! - [`placement`]: which stores hold which chunk;
//! - [`reason`]: why a received packet was dropped, for counters.
#![forbid(unsafe_code)]

pub mod chunk;
pub mod fetch;
pub mod frame;
pub mod key;
pub mod neighbour;
pub mod path_mtu;
pub mod paths;
pub mod placement;
mod pull;
pub mod put;
pub mod reason;
pub mod serve;
pub mod time;
pub mod wire;

pub use chunk::{ChunkInfo, ChunkLayout, ChunkShape, PlaneRange, PlaneRanges};
pub use fetch::{
    Accepted, ChunkFailure, ConfigError, Event, FetchConfig, FetchEngine, FetchId, FetchOutcome, LookupId,
    LookupOutcome, Schedule, Sources, StartError, StoreIndex, TransferId, Transmit, Verdict,
};
pub use frame::{HardwareChecks, Incoming, Local, Peer, TxChecksum};
pub use key::{CHUNK_TOKENS, Key, Namespace};
pub use placement::{Placement, PlacementError, store_id};
pub use reason::DropReason;
pub use serve::{ChunkSource, ServeConfig, ServeEngine, ServeTransmit};
pub use time::Instant;
