//! What a message must hold beyond being readable.

use crate::CHUNK_TOKENS;
use crate::codec::DecodeError;
use crate::gpu::{ElementType, PagedKv, RingKv};
use crate::layout::{Dtype, Layout, LayoutError, Shape};
use crate::message::{
    ChunkPlace, Command, Completion, MAX_CHUNKS_PER_FETCH, MAX_KEYS_PER_LOOKUP, MAX_PAGES_PER_FETCH,
    MAX_PROFILE_BYTES, MAX_TIMEOUT_MS, Outcome, SaveCodec, SaveFrom, Target,
};

/// What a command's check needs to know of a registered region.
#[derive(Clone, Copy, Debug)]
pub enum RegionView<'a> {
    /// Memory shared with this machine's CPUs, of so many bytes.
    Host(u64),
    /// A paged KV cache.
    Pages(&'a PagedKv),
    /// A ring.
    Ring(&'a RingKv),
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
    /// A profile that is too long.
    #[error("a profile of {bytes} bytes: at most {MAX_PROFILE_BYTES}")]
    Profile {
        /// Bytes of its text.
        bytes: usize,
    },
    /// No chunk, or too many.
    #[error(
        "a fetch or save names {chunks} chunks: name 1 to {MAX_CHUNKS_PER_FETCH}, and split a longer one"
    )]
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
    /// Host memory, pages and a ring each take another kind of target.
    #[error("region {region} is {kind}: a fetch or save has to say how planes lie there")]
    OtherKind {
        /// As given.
        region: u32,
        /// What it is.
        kind: &'static str,
    },
    /// The cache holds other elements than the chunks that are to be saved.
    #[error("the cache holds {held:?} and the chunks are to be {wanted:?}: a save does not convert")]
    OtherElement {
        /// What the cache holds.
        held: ElementType,
        /// What the chunks are said to be.
        wanted: Dtype,
    },
    /// No page, or too many.
    #[error("a page table names {pages} pages: name 1 to {MAX_PAGES_PER_FETCH}, and split a longer fetch")]
    PageCount {
        /// How many.
        pages: usize,
    },
    /// A page that the cache does not have.
    #[error("the page table's entry {index} names page {page} of a cache of {pages} pages")]
    Page {
        /// Index into the table.
        index: usize,
        /// As given.
        page: u32,
        /// Pages of the cache.
        pages: u32,
    },
    /// The table ends before the chunk does.
    #[error(
        "chunk {chunk} reaches to token {end} and the page table of {pages} pages of {page_tokens} tokens does not: name \
         all its pages"
    )]
    OutsideTable {
        /// Index into the fetch's chunks.
        chunk: usize,
        /// One past its last token.
        end: u64,
        /// Pages in the table.
        pages: usize,
        /// Tokens of a page.
        page_tokens: u16,
    },
    /// The model is another.
    #[error(
        "the chunks have {wanted:?} and the GPU memory has room for {layers} layers, {kv_heads} KV heads, {head_dim} \
         elements per head: register the cache of the same model"
    )]
    OtherShape {
        /// What the fetch expects.
        wanted: Shape,
        /// Layers of the cache.
        layers: usize,
        /// Its KV heads.
        kv_heads: u16,
        /// Its head dimension.
        head_dim: u16,
    },
    /// A plane is larger than an entry.
    #[error(
        "chunk {chunk} has planes of {plane_bytes} bytes and the ring entries of {entry_bytes}: make them larger"
    )]
    EntryTooSmall {
        /// Index into the fetch's chunks.
        chunk: usize,
        /// Bytes of its planes.
        plane_bytes: u64,
        /// Bytes of an entry.
        entry_bytes: u64,
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
    #[error(
        "region {region} is still in use by {fetches} fetches and saves: cancel them or wait for their end first"
    )]
    RegionBusy {
        /// As given.
        region: u32,
        /// Fetches under way into it.
        fetches: u32,
    },
}

impl RegionView<'_> {
    fn kind(&self) -> &'static str {
        match self {
            Self::Host(_) => "host memory",
            Self::Pages(_) => "a paged KV cache",
            Self::Ring(_) => "a ring",
        }
    }
}

impl Command {
    /// Checks everything that can be judged from the command and its region alone. `find` gives a registered region.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn check<'a>(&self, find: impl Fn(u32) -> Option<RegionView<'a>>) -> Result<(), CommandError> {
        match self {
            Self::Lookup { keys, timeout_ms, .. } => {
                if keys.is_empty() || keys.len() > MAX_KEYS_PER_LOOKUP {
                    return Err(CommandError::KeyCount { keys: keys.len() });
                }
                check_timeout(*timeout_ms)
            }
            Self::Fetch { timeout_ms, region, to, shape, chunks, .. } => {
                check_timeout(*timeout_ms)?;
                if chunks.is_empty() || chunks.len() > MAX_CHUNKS_PER_FETCH {
                    return Err(CommandError::ChunkCount { chunks: chunks.len() });
                }
                check_tokens(chunks)?;
                let found = find(*region).ok_or(CommandError::UnknownRegion { region: *region })?;
                match (to, found) {
                    (Target::Host { layout, .. }, RegionView::Host(region_bytes)) => {
                        check_places(layout, shape, chunks, region_bytes)
                    }
                    (Target::Pages { table }, RegionView::Pages(kv)) => check_pages(table, kv, shape, chunks),
                    (Target::Ring, RegionView::Ring(ring)) => check_entries(ring, shape, chunks),
                    (_, other) => Err(CommandError::OtherKind { region: *region, kind: other.kind() }),
                }
            }
            Self::Save { timeout_ms, region, from, shape, codec, chunks, .. } => {
                check_timeout(*timeout_ms)?;
                if let SaveCodec::Profile { text, .. } = codec
                    && text.len() > MAX_PROFILE_BYTES
                {
                    return Err(CommandError::Profile { bytes: text.len() });
                }
                if chunks.is_empty() || chunks.len() > MAX_CHUNKS_PER_FETCH {
                    return Err(CommandError::ChunkCount { chunks: chunks.len() });
                }
                check_tokens(chunks)?;
                let found = find(*region).ok_or(CommandError::UnknownRegion { region: *region })?;
                match (from, found) {
                    (SaveFrom::Host { layout }, RegionView::Host(region_bytes)) => {
                        check_places(layout, shape, chunks, region_bytes)
                    }
                    (SaveFrom::Pages { table }, RegionView::Pages(kv)) => {
                        if kv.element.dtype() != Some(shape.dtype) {
                            return Err(CommandError::OtherElement { held: kv.element, wanted: shape.dtype });
                        }
                        check_pages(table, kv, shape, chunks)
                    }
                    (_, other) => Err(CommandError::OtherKind { region: *region, kind: other.kind() }),
                }
            }
            Self::Unregister { region, .. } => match find(*region) {
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

fn check_tokens(chunks: &[ChunkPlace]) -> Result<(), CommandError> {
    for (chunk, &ChunkPlace { tokens, .. }) in chunks.iter().enumerate() {
        if tokens == 0 || tokens > CHUNK_TOKENS {
            return Err(CommandError::Tokens { chunk, tokens });
        }
    }
    Ok(())
}

/// After this no piece of any chunk can lie outside of the cache's pages: the table covers every token, and every page
/// that it names is one that [`PagedKv::check`] found within the allocations.
fn check_pages(
    table: &[u32],
    kv: &PagedKv,
    shape: &Shape,
    chunks: &[ChunkPlace],
) -> Result<(), CommandError> {
    if table.is_empty() || table.len() > MAX_PAGES_PER_FETCH {
        return Err(CommandError::PageCount { pages: table.len() });
    }
    if !kv.takes(shape) {
        let (layers, kv_heads, head_dim) = (kv.layers.len(), kv.kv_heads, kv.head_dim);
        return Err(CommandError::OtherShape { wanted: *shape, layers, kv_heads, head_dim });
    }
    if let Some((index, &page)) = table.iter().enumerate().find(|&(_, &page)| page >= kv.pages) {
        return Err(CommandError::Page { index, page, pages: kv.pages });
    }
    let tokens_in_table = table.len() as u64 * u64::from(kv.page_tokens);
    for (chunk, place) in chunks.iter().enumerate() {
        let end = place.offset.saturating_add(u64::from(place.tokens));
        if end > tokens_in_table {
            let (pages, page_tokens) = (table.len(), kv.page_tokens);
            return Err(CommandError::OutsideTable { chunk, end, pages, page_tokens });
        }
    }
    Ok(())
}

fn check_entries(ring: &RingKv, shape: &Shape, chunks: &[ChunkPlace]) -> Result<(), CommandError> {
    if !shape.is_valid() {
        return Err(LayoutError::EmptyShape { shape: *shape }.into());
    }
    for (chunk, place) in chunks.iter().enumerate() {
        let elements = u64::from(place.tokens) * u64::from(shape.kv_heads) * u64::from(shape.head_dim);
        let plane_bytes = elements * ring.element.bytes();
        if plane_bytes > ring.entry_bytes {
            return Err(CommandError::EntryTooSmall { chunk, plane_bytes, entry_bytes: ring.entry_bytes });
        }
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
            Self::Saved { outcome, not_saved, fewer_copies, .. } => {
                if not_saved.len() + fewer_copies.len() > MAX_CHUNKS_PER_FETCH {
                    return Err(DecodeError::Invalid("a save misses more chunks than any save may name"));
                }
                if *outcome == Outcome::Done && !not_saved.is_empty() {
                    return Err(DecodeError::Invalid("a save is done but misses chunks"));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
