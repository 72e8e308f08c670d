//! Commands and completions: what is said, whatever carries it.

use serde::{Deserialize, Serialize};

use crate::layout::{Dtype, Layout, Shape};

/// Most chunks that one fetch may name: a million tokens.
pub const MAX_CHUNKS_PER_FETCH: usize = 4096;
/// Most keys that one lookup may name.
pub const MAX_KEYS_PER_LOOKUP: usize = 4096;
/// Most pages that the table of one fetch may name: a million tokens in pages of 16.
pub const MAX_PAGES_PER_FETCH: usize = 65_536;
/// Most bytes of one encoded message. A fetch of [`MAX_CHUNKS_PER_FETCH`] chunks takes at most 180 KiB, and a table of
/// [`MAX_PAGES_PER_FETCH`] pages 320 KiB more.
pub const MAX_MESSAGE_BYTES: usize = 511 * 1024;
/// Most bytes of a reason or message text; longer ones are cut at a character's end.
pub const MAX_TEXT_BYTES: usize = 1024;
/// Most bytes of the statistics' JSON.
pub const MAX_STATS_BYTES: usize = 192 * 1024;
/// Most bytes of a profile's text: several times what one of the deepest model takes.
pub const MAX_PROFILE_BYTES: usize = 64 * 1024;
/// Longest time that a lookup or fetch may ask for: ten minutes.
pub const MAX_TIMEOUT_MS: u32 = 600_000;

/// How a store encodes planes. Same names as the `--codec` flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Codec {
    /// 16-bit elements as they are.
    Raw,
    /// Bytes split by significance, then zstd: bit for bit.
    Lossless,
    /// 8-bit quantization, then compression.
    Int8,
    /// 4-bit quantization, then compression.
    Int4,
    /// 5-bit quantization, then compression.
    Int5,
    /// 3-bit quantization, then compression.
    Int3,
    /// CacheGen's quantization, then compression.
    CacheGen,
}

impl Codec {
    /// Every codec.
    pub const ALL: [Self; 7] =
        [Self::Raw, Self::Lossless, Self::Int8, Self::Int4, Self::Int5, Self::Int3, Self::CacheGen];

    /// The name that flags and documents use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Lossless => "lossless",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int5 => "int5",
            Self::Int3 => "int3",
            Self::CacheGen => "cachegen",
        }
    }
}

impl std::fmt::Display for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no codec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no codec {0:?}: use raw, lossless, int8, int5, int4, int3 or cachegen")]
pub struct UnknownCodec(pub String);

impl std::str::FromStr for Codec {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        Self::ALL.into_iter().find(|codec| codec.name() == text).ok_or_else(|| UnknownCodec(text.to_owned()))
    }
}

/// How the chunks of a save are to be encoded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SaveCodec {
    /// Every plane with this one.
    One(Codec),
    /// Each layer's K and V as a profile says.
    Profile {
        /// What stands for the profile in the namespace of the chunks' keys. If it is another profile's, nothing is saved.
        id: String,
        /// The profile, as `shadowserve encode --make-profile` writes it: at most [`MAX_PROFILE_BYTES`].
        text: String,
    },
}

impl From<Codec> for SaveCodec {
    fn from(codec: Codec) -> Self {
        Self::One(codec)
    }
}

/// One chunk of a fetch and where its first byte goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkPlace {
    /// The chunk's name.
    pub key: [u8; 32],
    /// Tokens that the chunk holds, 1 to [`crate::CHUNK_TOKENS`].
    pub tokens: u16,
    /// Where its bytes begin. In host memory: the offset in the region at which the layout's strides start, bytes. In
    /// pages: the chunk's first token, counted from the start of the page table. In a ring: of no meaning.
    pub offset: u64,
}

/// How a region takes the planes of a fetch: must be of the region's kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// Memory shared with this machine's CPUs.
    Host {
        /// Strides within a chunk, bytes.
        layout: Layout,
        /// The element type to write, which may differ from the stored one.
        out_dtype: Dtype,
    },
    /// A paged KV cache in GPU memory.
    Pages {
        /// The pages of the tokens from 0 on, in order: 1 to [`MAX_PAGES_PER_FETCH`].
        table: Vec<u32>,
    },
    /// A ring in GPU memory.
    Ring,
}

/// How chunks that are to be saved lie in their region: must be of the region's kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SaveFrom {
    /// Memory shared with this machine's CPUs.
    Host {
        /// Strides within a chunk, bytes.
        layout: Layout,
    },
    /// A paged KV cache in GPU memory, of the chunks' own 16-bit element type.
    Pages {
        /// The pages of the tokens from 0 on, in order: 1 to [`MAX_PAGES_PER_FETCH`].
        table: Vec<u32>,
    },
}

/// What the serving process asks for. `id`s are the client's choice; two commands under way never share one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// How many of these keys, from the first, are stored? Answered by [`Completion::LookedUp`],
    /// [`Completion::LookupFailed`] or [`Completion::Refused`].
    Lookup {
        /// Names the lookup.
        id: u64,
        /// The sequence's chunks in order, 1 to [`MAX_KEYS_PER_LOOKUP`].
        keys: Vec<[u8; 32]>,
        /// After how long the lookup fails, milliseconds.
        timeout_ms: u32,
    },
    /// Fetch chunks into a region. Answered by any number of [`Completion::Progress`] (only if asked for) and
    /// then exactly one [`Completion::Ended`], or by one [`Completion::Refused`].
    Fetch {
        /// Names the fetch.
        id: u64,
        /// The deadline, from when the data plane takes the command, milliseconds.
        timeout_ms: u32,
        /// The region that receives, as [`crate::ClientSession`] registered it.
        region: u32,
        /// How the region takes them.
        to: Target,
        /// What the caller expects the chunks to be; chunks that differ are reported missing.
        shape: Shape,
        /// What to fetch, 1 to [`MAX_CHUNKS_PER_FETCH`].
        chunks: Vec<ChunkPlace>,
        /// Whether to send [`Completion::Progress`].
        progress: bool,
    },
    /// Encode chunks that lie in a region and put them into a store. Answered by exactly one [`Completion::Saved`], or
    /// [`Completion::Refused`].
    Save {
        /// Names the save.
        id: u64,
        /// The deadline, from when the data plane takes the command, milliseconds.
        timeout_ms: u32,
        /// The region that holds the chunks; it is read until the save has ended.
        region: u32,
        /// How they lie there.
        from: SaveFrom,
        /// What the chunks are; its element type is that of the region's bytes.
        shape: Shape,
        /// How they are to be encoded.
        codec: SaveCodec,
        /// What to save, 1 to [`MAX_CHUNKS_PER_FETCH`]; the places are those of a fetch.
        chunks: Vec<ChunkPlace>,
    },
    /// End a fetch, save or lookup early. Not answered itself: what it cancels ends as cancelled, unless it had
    /// ended already; an unknown `id` is ignored, since the end may have crossed the cancel.
    Cancel {
        /// The `id` of the fetch or lookup.
        id: u64,
    },
    /// Forget a region. Answered by [`Completion::Unregistered`], or [`Completion::Refused`] while a fetch
    /// into it is under way.
    Unregister {
        /// Names this command.
        id: u64,
        /// The region.
        region: u32,
    },
    /// Answered by [`Completion::Stats`].
    Stats {
        /// Names this command.
        id: u64,
    },
}

/// How a fetch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// Every plane of every chunk was delivered.
    Done,
    /// Something is missing; [`Completion::Ended`] lists it. All else was delivered.
    Failed,
    /// It was cancelled, by its owner or by the data plane's shutdown.
    Cancelled,
}

/// Why a chunk did not arrive whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MissingReason {
    /// No store has it.
    NotStored,
    /// The deadline came first.
    Deadline,
    /// No store answered.
    StoreUnreachable,
    /// Its bytes failed their checksum, more often than is tried again.
    Corrupt,
    /// Its bytes were intact but could not be decoded.
    Undecodable,
    /// The stored chunk's shape or token count is not what the fetch expects.
    ShapeMismatch,
    /// The fetch was cancelled first.
    Cancelled,
    /// Its bytes could not be copied to where they were to go.
    NotDelivered,
}

impl std::fmt::Display for MissingReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotStored => "not stored",
            Self::Deadline => "deadline passed",
            Self::StoreUnreachable => "no store can be reached: see that one runs where --store says",
            Self::Corrupt => "checksum failed",
            Self::Undecodable => "cannot be decoded",
            Self::ShapeMismatch => "stored with another shape",
            Self::Cancelled => "cancelled",
            Self::NotDelivered => "could not be copied to its place",
        })
    }
}

/// A chunk that did not arrive whole. Some of its planes may have been delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Index into the fetch's chunks.
    pub chunk: u32,
    /// Why.
    pub reason: MissingReason,
}

/// Why a chunk is not known to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NotSavedReason {
    /// The deadline came first: there was too much to encode, or the store was too slow. It may be stored nevertheless.
    Deadline,
    /// The store did not answer until the deadline.
    StoreUnreachable,
    /// The store was busy until the deadline.
    StoreBusy,
    /// What fills the store is pinned.
    StoreFull,
    /// The store takes no chunks.
    StoreClosed,
    /// Encoded, it is larger than the data plane's buffers or than the store takes.
    TooLarge,
    /// It failed the store's checksums each time.
    Corrupt,
    /// The store found that the chunk contradicts itself.
    Refused,
    /// Its codec cannot encode it: an element is not finite, or the shape is one that the codec cannot hold.
    NotEncodable,
    /// Its bytes could not be read from the region.
    NotRead,
    /// The save was cancelled first.
    Cancelled,
}

impl std::fmt::Display for NotSavedReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Deadline => "deadline passed",
            Self::StoreUnreachable => "no store can be reached: see that one runs where --store says",
            Self::StoreBusy => "the store was busy until the deadline",
            Self::StoreFull => "the store is full of chunks that are pinned",
            Self::StoreClosed => "the store takes no chunks: start it with --memory-mib",
            Self::TooLarge => "too large: raise --save-chunk-mib of the data plane or --max-chunk-mib and --memory-mib of the store",
            Self::Corrupt => "checksum failed",
            Self::Refused => "the store found that it contradicts itself",
            Self::NotEncodable => "the codec cannot encode it: an element is not finite, or the shape does not suit it",
            Self::NotRead => "could not be read from the region",
            Self::Cancelled => "cancelled",
        })
    }
}

/// A chunk that is not known to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotSaved {
    /// Index into the save's chunks.
    pub chunk: u32,
    /// Why.
    pub reason: NotSavedReason,
}

/// A chunk that is stored, and on fewer stores than are to keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FewerCopies {
    /// Index into the save's chunks.
    pub chunk: u32,
    /// Stores that have it.
    pub copies: u8,
    /// Stores that are to have it.
    pub replicas: u8,
    /// Why another has not.
    pub reason: NotSavedReason,
}

/// What the data plane answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Completion {
    /// A lookup's answer.
    LookedUp {
        /// The lookup.
        id: u64,
        /// Leading keys that are stored.
        found: u32,
        /// Tokens of the last of these chunks, 1 to [`crate::CHUNK_TOKENS`]; those before it are whole. 0 if `found` is 0.
        last_tokens: u16,
        /// What the link will carry for all of them, bytes.
        encoded_bytes: u64,
        /// What they have in common; none if `found` is 0.
        shape: Option<Shape>,
        /// How they are encoded; none if `found` is 0.
        codec: Option<Codec>,
    },
    /// The lookup ended without an answer.
    LookupFailed {
        /// The lookup.
        id: u64,
        /// What happened and what to do.
        message: String,
    },
    /// How far a fetch has come. May be left out when the ring is full.
    Progress {
        /// The fetch.
        id: u64,
        /// Planes delivered so far.
        planes: u32,
        /// Encoded bytes that arrived so far.
        encoded_bytes: u64,
        /// Decoded bytes written so far.
        delivered_bytes: u64,
    },
    /// A fetch's end. After it, no byte is written for that fetch.
    Ended {
        /// The fetch.
        id: u64,
        /// How.
        outcome: Outcome,
        /// Planes delivered.
        planes: u32,
        /// Encoded bytes that arrived.
        encoded_bytes: u64,
        /// Decoded bytes written.
        delivered_bytes: u64,
        /// What did not arrive whole, in the order of the fetch's chunks.
        missing: Vec<Missing>,
        /// What happened, for a person; empty when done.
        message: String,
    },
    /// A save's end. After it, no byte is read for that save.
    Saved {
        /// The save.
        id: u64,
        /// How.
        outcome: Outcome,
        /// Chunks that were put, into one store at least.
        stored: u32,
        /// Chunks that the stores had.
        already_stored: u32,
        /// Encoded bytes of what was put.
        encoded_bytes: u64,
        /// What is not known to be stored, in the order of the save's chunks.
        not_saved: Vec<NotSaved>,
        /// What is stored on fewer stores than are to keep it, in the order of the save's chunks.
        fewer_copies: Vec<FewerCopies>,
        /// What happened, for a person; empty when done and every copy was made.
        message: String,
    },
    /// The region is forgotten and its memory unmapped.
    Unregistered {
        /// The command.
        id: u64,
    },
    /// The command was not carried out.
    Refused {
        /// The command.
        id: u64,
        /// What was wrong and what to do.
        reason: String,
    },
    /// The data plane's counters and latencies.
    Stats {
        /// The command.
        id: u64,
        /// One JSON object, at most [`MAX_STATS_BYTES`].
        json: String,
    },
}

impl Command {
    /// The command's id; for [`Command::Cancel`], that of what it cancels.
    #[must_use]
    pub const fn id(&self) -> u64 {
        match *self {
            Self::Lookup { id, .. }
            | Self::Fetch { id, .. }
            | Self::Save { id, .. }
            | Self::Cancel { id }
            | Self::Unregister { id, .. }
            | Self::Stats { id } => id,
        }
    }
}

impl Completion {
    /// The command that this answers.
    #[must_use]
    pub const fn id(&self) -> u64 {
        match *self {
            Self::LookedUp { id, .. }
            | Self::LookupFailed { id, .. }
            | Self::Progress { id, .. }
            | Self::Ended { id, .. }
            | Self::Saved { id, .. }
            | Self::Unregistered { id }
            | Self::Refused { id, .. }
            | Self::Stats { id, .. } => id,
        }
    }

    /// Whether more may follow for the same id: true of [`Completion::Progress`] only.
    #[must_use]
    pub const fn is_interim(&self) -> bool {
        matches!(self, Self::Progress { .. })
    }

    /// Whether [`Completion::cut_texts`] would change it.
    #[must_use]
    pub fn has_long_text(&self) -> bool {
        match self {
            Self::LookupFailed { message: text, .. }
            | Self::Ended { message: text, .. }
            | Self::Saved { message: text, .. }
            | Self::Refused { reason: text, .. } => text.len() > MAX_TEXT_BYTES,
            _ => false,
        }
    }

    /// Cuts over-long texts to [`MAX_TEXT_BYTES`], so that a message built from a long error still fits.
    pub fn cut_texts(&mut self) {
        match self {
            Self::LookupFailed { message: text, .. }
            | Self::Ended { message: text, .. }
            | Self::Saved { message: text, .. }
            | Self::Refused { reason: text, .. } => cut_text(text),
            Self::LookedUp { .. }
            | Self::Progress { .. }
            | Self::Unregistered { .. }
            | Self::Stats { .. } => {}
        }
    }
}

/// Cuts `text` to [`MAX_TEXT_BYTES`] at a character's end.
pub(crate) fn cut_text(text: &mut String) {
    if text.len() > MAX_TEXT_BYTES {
        let end = (0..=MAX_TEXT_BYTES).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
    }
}
