//! What a serving process and the data plane say to each other, and how it travels on one machine.
//!
//! The messages ([`Command`], [`Completion`]) do not know their carrier. On one machine that is a pair of
//! rings in shared memory ([`ring`]) whose memory is passed over a Unix socket ([`socket`]); the data plane's
//! side of such a session is [`ServerSession`], the serving process's side [`ClientSession`].
//!
//! Reading order: [`layout`], [`gpu`], [`message`], [`check`] and [`codec`] (what is said), [`ring`] and [`doorbell`] (how bytes cross),
//! [`session`] (where things lie in the shared memory), [`socket`] and [`handshake`] (how the memory gets
//! across), [`listener`], [`server`] and [`attach`] (the two ends).
//!
//! Everything that the other process can write is treated as hostile: cursors, lengths and messages are read
//! once, checked, and only then used. A peer that breaks the rules costs it its session, never this process.
#![forbid(unsafe_code)]

pub mod attach;
pub mod check;
pub mod codec;
pub mod doorbell;
pub mod gpu;
pub mod gpu_ring;
pub mod handshake;
pub mod layout;
pub mod listener;
pub mod message;
pub mod ring;
pub mod server;
pub mod session;
pub mod socket;
mod work;

pub use attach::{AttachError, ClientSession, ClientSessionError, RegionReply};
pub use check::{CommandError, RegionView};
pub use codec::DecodeError;
pub use gpu::{
    DeviceUuid, ElementType, GpuAllocation, GpuMemory, GpuMemoryError, IpcHandle, LayerBase, PageStrides,
    PagedKv, PlaneBase, RingKv, Scale,
};
pub use gpu_ring::{GpuRingError, RingConsumer, RingDescriptor, RingProducer, ring_words_bytes};
pub use layout::{Dtype, Layout, LayoutError, Shape};
pub use listener::{Limits, Listener};
pub use message::{
    ChunkPlace, Codec, Command, Completion, FewerCopies, Missing, MissingReason, NotSaved, NotSavedReason,
    Outcome, SaveCodec, SaveFrom, Target,
};
pub use ring::RingError;
pub use server::{ServerSession, SessionError, SocketEvent};
pub use session::{Sent, now_ns};
pub use socket::{BindError, Peer, SocketError};

/// Version of everything in this crate that two processes must agree on: messages, handshake and the layout of
/// the shared memory. Raised by any change to one of them; there is no negotiation, both ends ship together.
pub const VERSION: u16 = 3;

/// Most tokens that one chunk holds. The last chunk of a sequence may hold fewer.
pub const CHUNK_TOKENS: u16 = 256;

/// How often each side writes its heartbeat word, in milliseconds.
pub const BEAT_INTERVAL_MS: u64 = 100;
