//! What a message must hold beyond being readable.

use crate::CHUNK_TOKENS;
use crate::codec::DecodeError;
use crate::layout::{Layout, LayoutError, Shape};
use crate::message::{
    ChunkPlace, Command, Completion, MAX_CHUNKS_PER_FETCH, MAX_KEYS_PER_LOOKUP, MAX_TIMEOUT_MS, Outcome,
};

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
    /// Checks what a client relies on: counts that agree, and limits.
    pub(crate) fn check(&self) -> Result<(), DecodeError> {
        match self {
            Self::LookedUp { found, last_tokens, shape, codec, .. } => {
                if usize::try_from(*found).is_ok_and(|found| found > MAX_KEYS_PER_LOOKUP) {
                    return Err(DecodeError::Invalid("a lookup found more chunks than any lookup may name"));
                }
                if *last_tokens > CHUNK_TOKENS || (*last_tokens == 0) != (*found == 0) {
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
