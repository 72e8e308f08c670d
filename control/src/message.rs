//! Commands, completions, and their bytes.
//!
//! A message is encoded with `postcard` (variable-length integers, little-endian, no self-description) and
//! framed by its carrier. Decoding is bounded: a frame is at most [`MAX_MESSAGE_BYTES`], no collection can
//! claim more items than the frame has bytes, and what is left over after the message is an error.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::CHUNK_TOKENS;
use crate::layout::{Dtype, Layout, LayoutError, Shape};

/// Most chunks that one fetch may name: a million tokens.
pub const MAX_CHUNKS_PER_FETCH: usize = 4096;
/// Most keys that one lookup may name.
pub const MAX_KEYS_PER_LOOKUP: usize = 4096;
/// Most bytes of one encoded message. A fetch of [`MAX_CHUNKS_PER_FETCH`] chunks takes at most 180 KiB.
pub const MAX_MESSAGE_BYTES: usize = 256 * 1024;
/// Most bytes of a reason or message text; longer ones are cut at a character's end.
pub const MAX_TEXT_BYTES: usize = 1024;
/// Most bytes of the statistics' JSON.
pub const MAX_STATS_BYTES: usize = 192 * 1024;
/// Longest time that a lookup or fetch may ask for: ten minutes.
pub const MAX_TIMEOUT_MS: u32 = 600_000;

/// How a store encodes planes. Same names as the `--codec` flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Codec {
    /// 16-bit elements as they are.
    Raw,
    /// Bytes split by significance, then zstd: bit for bit.
    Lossless,
    /// 8-bit quantization, then zstd.
    Int8,
    /// 4-bit quantization, then zstd.
    Int4,
}

impl Codec {
    /// The name that flags and documents use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Lossless => "lossless",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
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
#[error("there is no codec {0:?}: use raw, lossless, int8 or int4")]
pub struct UnknownCodec(pub String);

impl std::str::FromStr for Codec {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        [Self::Raw, Self::Lossless, Self::Int8, Self::Int4]
            .into_iter()
            .find(|codec| codec.name() == text)
            .ok_or_else(|| UnknownCodec(text.to_owned()))
    }
}

/// One chunk of a fetch and where its first byte goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkPlace {
    /// The chunk's name.
    pub key: [u8; 32],
    /// Tokens that the chunk holds, 1 to [`CHUNK_TOKENS`].
    pub tokens: u16,
    /// Offset in the region at which the layout's strides start, bytes.
    pub offset: u64,
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
        /// Strides within a chunk, bytes.
        layout: Layout,
        /// What the caller expects the chunks to be; chunks that differ are reported missing.
        shape: Shape,
        /// The element type to write, which may differ from the stored one.
        out_dtype: Dtype,
        /// What to fetch, 1 to [`MAX_CHUNKS_PER_FETCH`].
        chunks: Vec<ChunkPlace>,
        /// Whether to send [`Completion::Progress`].
        progress: bool,
    },
    /// End a fetch or lookup early. Not answered itself: what it cancels ends as cancelled, unless it had
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
}

impl std::fmt::Display for MissingReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotStored => "not stored",
            Self::Deadline => "deadline passed",
            Self::StoreUnreachable => "no store answers",
            Self::Corrupt => "checksum failed",
            Self::Undecodable => "cannot be decoded",
            Self::ShapeMismatch => "stored with another shape",
            Self::Cancelled => "cancelled",
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

/// A chunk that a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredChunk {
    /// Tokens that it holds, 1 to [`CHUNK_TOKENS`].
    pub tokens: u16,
    /// Its size as stored, bytes: what the link will carry.
    pub encoded_bytes: u64,
}

/// What the data plane answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Completion {
    /// A lookup's answer.
    LookedUp {
        /// The lookup.
        id: u64,
        /// Leading keys that are stored; `chunks` has as many entries.
        found: u32,
        /// The stored chunks, in the order of the keys.
        chunks: Vec<StoredChunk>,
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

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// More bytes than any message has.
    #[error("a message of {bytes} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")]
    TooLong {
        /// Bytes of the frame.
        bytes: usize,
    },
    /// Not the encoding of a message.
    #[error("not a message of version {version}: {source}", version = crate::VERSION)]
    Malformed {
        /// What postcard found.
        #[from]
        source: postcard::Error,
    },
    /// A message and then something else.
    #[error("{bytes} bytes follow the end of a message")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// The message contradicts itself or exceeds a limit.
    #[error("the message breaks the protocol: {0}")]
    Invalid(&'static str),
}

/// Why a command that could be read is not carried out. The text is what [`Completion::Refused`] carries.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No key, or too many.
    #[error("a lookup names {keys} keys: name 1 to {MAX_KEYS_PER_LOOKUP}")]
    KeyCount {
        /// How many.
        keys: usize,
    },
    /// No chunk, or too many.
    #[error("a fetch names {chunks} chunks: name 1 to {MAX_CHUNKS_PER_FETCH}, and split a longer one")]
    ChunkCount {
        /// How many.
        chunks: usize,
    },
    /// No time, or too much.
    #[error("a timeout of {timeout_ms} ms is out of range: give 1 to {MAX_TIMEOUT_MS} ms")]
    Timeout {
        /// As given.
        timeout_ms: u32,
    },
    /// A chunk's token count is impossible.
    #[error("chunk {chunk} claims {tokens} tokens: a chunk holds 1 to {CHUNK_TOKENS}")]
    Tokens {
        /// Index into the fetch's chunks.
        chunk: usize,
        /// As given.
        tokens: u16,
    },
    /// The layout cannot hold the shape.
    #[error("the layout does not fit the shape: {0}")]
    Layout(#[from] LayoutError),
    /// No such region.
    #[error("region {region} is not registered in this session: register memory first and use its region")]
    UnknownRegion {
        /// As given.
        region: u32,
    },
    /// A chunk would reach beyond its region.
    #[error(
        "chunk {chunk} at offset {offset} needs {extent_bytes} bytes, but the region has {region_bytes}: \
         place it lower or register a larger region"
    )]
    OutsideRegion {
        /// Index into the fetch's chunks.
        chunk: usize,
        /// Its offset, bytes.
        offset: u64,
        /// What it spans, bytes.
        extent_bytes: u64,
        /// What there is, bytes.
        region_bytes: u64,
    },
    /// The offset would split elements.
    #[error("chunk {chunk} is placed at the odd offset {offset}, but an element has 2 bytes: make it even")]
    OddOffset {
        /// Index into the fetch's chunks.
        chunk: usize,
        /// Its offset, bytes.
        offset: u64,
    },
    /// The id is taken.
    #[error("the id {id} already names a command under way: use every id once")]
    DuplicateId {
        /// As given.
        id: u64,
    },
    /// Too much is under way.
    #[error("{limit} commands are under way, which is the limit: wait for some to end")]
    TooManyCommands {
        /// How many are allowed.
        limit: usize,
    },
    /// The region is in use.
    #[error("region {region} still receives {fetches} fetches: cancel them or wait for their end first")]
    RegionBusy {
        /// As given.
        region: u32,
        /// Fetches under way into it.
        fetches: u32,
    },
}

impl Command {
    /// The command's id; for [`Command::Cancel`], that of what it cancels.
    #[must_use]
    pub const fn id(&self) -> u64 {
        match *self {
            Self::Lookup { id, .. }
            | Self::Fetch { id, .. }
            | Self::Cancel { id }
            | Self::Unregister { id, .. }
            | Self::Stats { id } => id,
        }
    }

    /// Checks everything that can be judged from the command and its region alone. `region_bytes` gives the
    /// size of a registered region.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn check(&self, region_bytes: impl Fn(u32) -> Option<u64>) -> Result<(), CommandError> {
        match self {
            Self::Lookup { keys, timeout_ms, .. } => {
                if keys.is_empty() || keys.len() > MAX_KEYS_PER_LOOKUP {
                    return Err(CommandError::KeyCount { keys: keys.len() });
                }
                check_timeout(*timeout_ms)
            }
            Self::Fetch { timeout_ms, region, layout, shape, chunks, .. } => {
                check_timeout(*timeout_ms)?;
                if chunks.is_empty() || chunks.len() > MAX_CHUNKS_PER_FETCH {
                    return Err(CommandError::ChunkCount { chunks: chunks.len() });
                }
                let region_bytes =
                    region_bytes(*region).ok_or(CommandError::UnknownRegion { region: *region })?;
                check_places(layout, shape, chunks, region_bytes)
            }
            Self::Unregister { region, .. } => match region_bytes(*region) {
                Some(_) => Ok(()),
                None => Err(CommandError::UnknownRegion { region: *region }),
            },
            Self::Cancel { .. } | Self::Stats { .. } => Ok(()),
        }
    }
}

fn check_timeout(timeout_ms: u32) -> Result<(), CommandError> {
    if timeout_ms == 0 || timeout_ms > MAX_TIMEOUT_MS {
        return Err(CommandError::Timeout { timeout_ms });
    }
    Ok(())
}

fn check_places(
    layout: &Layout,
    shape: &Shape,
    chunks: &[ChunkPlace],
    region_bytes: u64,
) -> Result<(), CommandError> {
    for (chunk, &ChunkPlace { tokens, offset, .. }) in chunks.iter().enumerate() {
        if tokens == 0 || tokens > CHUNK_TOKENS {
            return Err(CommandError::Tokens { chunk, tokens });
        }
        let extent_bytes = layout.extent_bytes(shape, tokens)?;
        if offset % shape.dtype.bytes() != 0 {
            return Err(CommandError::OddOffset { chunk, offset });
        }
        if offset.checked_add(extent_bytes).is_none_or(|end| end > region_bytes) {
            return Err(CommandError::OutsideRegion { chunk, offset, extent_bytes, region_bytes });
        }
    }
    Ok(())
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
            | Self::Refused { reason: text, .. } => text.len() > MAX_TEXT_BYTES,
            _ => false,
        }
    }

    /// Cuts over-long texts to [`MAX_TEXT_BYTES`], so that a message built from a long error still fits.
    pub fn cut_texts(&mut self) {
        match self {
            Self::LookupFailed { message: text, .. }
            | Self::Ended { message: text, .. }
            | Self::Refused { reason: text, .. } => cut_text(text),
            Self::LookedUp { .. }
            | Self::Progress { .. }
            | Self::Unregistered { .. }
            | Self::Stats { .. } => {}
        }
    }

    /// Checks what a client relies on: counts that agree, and limits.
    fn check(&self) -> Result<(), DecodeError> {
        match self {
            Self::LookedUp { found, chunks, shape, codec, .. } => {
                if usize::try_from(*found) != Ok(chunks.len()) {
                    return Err(DecodeError::Invalid("a lookup's count and its list of chunks differ"));
                }
                if chunks.len() > MAX_KEYS_PER_LOOKUP {
                    return Err(DecodeError::Invalid("a lookup found more chunks than any lookup may name"));
                }
                if chunks.iter().any(|chunk| chunk.tokens == 0 || chunk.tokens > CHUNK_TOKENS) {
                    return Err(DecodeError::Invalid("a stored chunk has an impossible number of tokens"));
                }
                if *found > 0 && (codec.is_none() || !shape.is_some_and(|shape| shape.is_valid())) {
                    return Err(DecodeError::Invalid("a lookup found chunks but gives no shape or codec"));
                }
                Ok(())
            }
            Self::Ended { outcome, missing, .. } => {
                if missing.len() > MAX_CHUNKS_PER_FETCH {
                    return Err(DecodeError::Invalid("a fetch misses more chunks than any fetch may name"));
                }
                if *outcome == Outcome::Done && !missing.is_empty() {
                    return Err(DecodeError::Invalid("a fetch is done but misses chunks"));
                }
                Ok(())
            }
            _ => Ok(()),
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

/// Encodes `message` into `out`, which is emptied first. The result may exceed [`MAX_MESSAGE_BYTES`] when a
/// list or text does; the carriers check.
pub fn encode<T: Serialize>(message: &T, out: &mut Vec<u8>) {
    out.clear();
    let bytes = postcard::to_extend(message, std::mem::take(out));
    // Writing to a Vec cannot fail, and none of these types has a length unknown in advance.
    *out = bytes.unwrap_or_default();
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(DecodeError::TooLong { bytes: bytes.len() });
    }
    let (message, rest) = postcard::take_from_bytes(bytes)?;
    if rest.is_empty() { Ok(message) } else { Err(DecodeError::Trailing { bytes: rest.len() }) }
}

/// Decodes one command. What it asks for is not judged here: see [`Command::check`].
///
/// # Errors
/// When the bytes are not exactly one command.
pub fn decode_command(bytes: &[u8]) -> Result<Command, DecodeError> {
    decode(bytes)
}

/// Decodes one completion and checks that it does not contradict itself.
///
/// # Errors
/// When the bytes are not exactly one sound completion.
pub fn decode_completion(bytes: &[u8]) -> Result<Completion, DecodeError> {
    let completion: Completion = decode(bytes)?;
    completion.check()?;
    Ok(completion)
}
