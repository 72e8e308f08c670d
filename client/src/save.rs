//! Saving: what to put into a store, and how to follow it to its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use control::message::{MAX_CHUNKS_PER_FETCH, MAX_PAGES_PER_FETCH};
use control::{
    CHUNK_TOKENS, ChunkPlace, Command, CommandError, Completion, FewerCopies, Layout, NotSaved, Outcome,
    RegionView, SaveCodec, SaveFrom, Shape,
};
use protocol::Key;

use crate::fetch::{ANSWER_GRACE, RequestError, milliseconds};
use crate::gpu::PagedCache;
use crate::lost::Lost;
use crate::region::{Memory, Region};
use crate::shared::{Kind, NotSent, Shared, Target, Unanswered, Written};

/// Which chunks to save, where their bytes are, and until when.
#[derive(Clone, Debug)]
pub struct SaveRequest<'a> {
    /// The memory that holds them. What is written there before the save has ended is saved or not, byte by byte.
    pub region: &'a Region,
    /// What the chunks are; its element type is that of the bytes in the region.
    pub shape: Shape,
    /// Strides within a chunk, bytes.
    pub layout: Layout,
    /// How they are to be encoded: that of the client's namespace, or nobody finds them.
    pub codec: SaveCodec,
    /// The chunks and their offsets in the region.
    pub chunks: Vec<ChunkPlace>,
    /// The deadline, from when the data plane takes the save: it ends by then, done or failed.
    pub timeout: Duration,
}

impl<'a> SaveRequest<'a> {
    /// All chunks of a sequence that lies in `region` as two tensors, `[layers, tokens, kv_heads, head_dim]`, K and then V, from
    /// offset 0 on. `keys` are [`crate::Client::keys`] of its `tokens` tokens. Leave out chunks that are stored already, as the first
    /// ones of [`chunks`](Self::chunks), if you know them: the store would say so, but only after they were encoded.
    ///
    /// # Errors
    /// When there are no tokens, too many, or the region does not hold them.
    pub fn sequence(
        region: &'a Region,
        shape: Shape,
        codec: impl Into<SaveCodec>,
        keys: &[Key],
        tokens: usize,
    ) -> Result<Self, RequestError> {
        let total = check(keys, tokens)?;
        let layout = Layout::sequence(&shape, total);
        let needed = u64::from(shape.layers) * 2 * u64::from(total) * shape.token_bytes();
        if needed > region.bytes() as u64 {
            return Err(RequestError::TooSmall { needed, offset: 0, bytes: region.bytes() });
        }
        let chunks = places(keys, tokens, layout.token);
        let codec = codec.into();
        Ok(Self { region, shape, layout, codec, chunks, timeout: Duration::from_secs(10) })
    }
}

/// The tokens of a sequence, once it is known that a save takes it and that the keys are as many.
fn check(keys: &[Key], tokens: usize) -> Result<u32, RequestError> {
    if tokens == 0 || keys.is_empty() {
        return Err(RequestError::NoTokens);
    }
    let too_many = RequestError::TooMany { chunks: keys.len() };
    if keys.len() > MAX_CHUNKS_PER_FETCH || keys.len() != tokens.div_ceil(usize::from(CHUNK_TOKENS)) {
        return Err(too_many);
    }
    u32::try_from(tokens).map_err(|_| too_many)
}

/// A sequence's chunks, each token `token` further on.
fn places(keys: &[Key], tokens: usize, token: u64) -> Vec<ChunkPlace> {
    let whole = usize::from(CHUNK_TOKENS);
    let chunks = keys.iter().enumerate().map(|(index, key)| {
        let held = (tokens - index * whole).min(whole);
        let tokens = u16::try_from(held).unwrap_or(CHUNK_TOKENS);
        ChunkPlace { key: key.0, tokens, offset: (index * whole) as u64 * token }
    });
    chunks.collect()
}

/// Which chunks to save out of a paged KV cache on a GPU, and until when.
#[derive(Clone, Debug)]
pub struct SavePagesRequest<'a> {
    /// The cache that holds them; its elements are of the shape's 16-bit type.
    pub cache: &'a PagedCache,
    /// What the chunks are. Layers, KV heads and head dimension must be the cache's.
    pub shape: Shape,
    /// How they are to be encoded: that of the client's namespace, or nobody finds them.
    pub codec: SaveCodec,
    /// The pages of the sequence's tokens from 0 on, in order. What the engine writes there before the save has ended is saved
    /// or not, byte by byte.
    pub table: Vec<u32>,
    /// The chunks; `offset` is the chunk's first token, counted from the table's start.
    pub chunks: Vec<ChunkPlace>,
    /// The deadline, from when the data plane takes the save: it ends by then, done or failed.
    pub timeout: Duration,
}

impl<'a> SavePagesRequest<'a> {
    /// All chunks of a sequence whose token `t` is in page `table[t / page_tokens]`. `keys` are [`crate::Client::keys`] of its
    /// `tokens` tokens. Leave out the first ones of [`chunks`](Self::chunks) that are stored already.
    ///
    /// # Errors
    /// When there are no tokens, too many, the table is too short, or the cache's elements are of no 16-bit type.
    pub fn sequence(
        cache: &'a PagedCache,
        codec: impl Into<SaveCodec>,
        keys: &[Key],
        tokens: usize,
        table: Vec<u32>,
    ) -> Result<Self, RequestError> {
        let (total, kv) = (check(keys, tokens)?, cache.kv());
        let held = table.len() as u64 * u64::from(kv.page_tokens);
        if table.len() > MAX_PAGES_PER_FETCH || held < u64::from(total) {
            return Err(RequestError::Table { pages: table.len(), tokens: total });
        }
        let element = kv.element;
        let dtype = element.dtype().ok_or(RequestError::Element { element })?;
        let layers = u16::try_from(kv.layers.len()).unwrap_or(u16::MAX);
        let shape = Shape { layers, kv_heads: kv.kv_heads, head_dim: kv.head_dim, dtype };
        let (codec, chunks) = (codec.into(), places(keys, tokens, 1));
        Ok(Self { cache, shape, codec, table, chunks, timeout: Duration::from_secs(10) })
    }
}

/// Sends the command.
pub(crate) fn start_pages(shared: &Arc<Shared>, request: &SavePagesRequest<'_>) -> Result<Save, SaveError> {
    let command = |id| Command::Save {
        id,
        timeout_ms: milliseconds(request.timeout),
        region: request.cache.0.id,
        from: SaveFrom::Pages { table: request.table.clone() },
        shape: request.shape,
        codec: request.codec.clone(),
        chunks: request.chunks.clone(),
    };
    let kv = request.cache.kv();
    command(0).check(|region| (region == request.cache.0.id).then_some(RegionView::Pages(kv)))?;
    start_command(shared, &request.cache.0, command, request.timeout)
}

/// Why a save was not started, or cannot be followed. A save that was started and in which something went wrong is no error:
/// see [`SaveReport::outcome`].
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The request contradicts itself or its region.
    #[error(transparent)]
    Invalid(#[from] CommandError),
    /// The region belongs to another session.
    #[error("the region was registered by another client: register memory with this one")]
    ForeignRegion,
    /// The data plane does not carry it out.
    #[error("the data plane refused the save: {reason}")]
    Refused {
        /// Its reason, and what to do.
        reason: String,
    },
    /// The data plane takes no commands.
    #[error("the data plane takes no commands: too many are queued; wait for some to end")]
    Full,
    /// It has not ended within the time given; it goes on.
    #[error("the save has not ended after {waited_ms} ms and goes on: wait again, or cancel it")]
    StillUnderWay {
        /// How long was waited, milliseconds.
        waited_ms: u128,
    },
    /// The session is over.
    #[error(transparent)]
    Lost(#[from] Lost),
}

impl From<NotSent> for SaveError {
    fn from(error: NotSent) -> Self {
        match error {
            NotSent::Lost(lost) => Self::Lost(lost),
            NotSent::Full => Self::Full,
            NotSent::TooLong(error) => Self::Refused { reason: error.to_string() },
        }
    }
}

/// How a save ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveReport {
    /// How.
    pub outcome: Outcome,
    /// Chunks that were put, checked by one store at least and found by lookups.
    pub stored: u32,
    /// Chunks that the stores had.
    pub already_stored: u32,
    /// Encoded bytes of what was put.
    pub encoded_bytes: u64,
    /// What is not known to be stored, in the order of the request's chunks, each with the reason.
    pub not_saved: Vec<NotSaved>,
    /// What is stored on fewer stores than are to keep it, in the same order, each with the reason.
    pub fewer_copies: Vec<FewerCopies>,
    /// What happened, for a person; empty when done and every copy was made.
    pub message: String,
    /// From the call of `save` until its end was heard of.
    pub elapsed: Duration,
}

impl SaveReport {
    /// Of a save of no chunks.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            outcome: Outcome::Done,
            stored: 0,
            already_stored: 0,
            encoded_bytes: 0,
            not_saved: Vec::new(),
            fewer_copies: Vec::new(),
            message: String::new(),
            elapsed: Duration::ZERO,
        }
    }
}

/// A save under way. It reads the region until its end; dropping it cancels it, as with a [`crate::Fetch`].
#[derive(Debug)]
pub struct Save {
    shared: Arc<Shared>,
    id: u64,
    begun: Instant,
    timeout: Duration,
    ended: Option<Result<SaveReport, String>>,
}

/// Sends the command.
pub(crate) fn start(shared: &Arc<Shared>, request: &SaveRequest<'_>) -> Result<Save, SaveError> {
    let command = |id| Command::Save {
        id,
        timeout_ms: milliseconds(request.timeout),
        region: request.region.id(),
        from: SaveFrom::Host { layout: request.layout },
        shape: request.shape,
        codec: request.codec.clone(),
        chunks: request.chunks.clone(),
    };
    let bytes = request.region.bytes() as u64;
    command(0).check(|region| (region == request.region.id()).then_some(RegionView::Host(bytes)))?;
    start_command(shared, &request.region.0, command, request.timeout)
}

fn start_command(
    shared: &Arc<Shared>,
    memory: &Arc<Memory>,
    command: impl FnOnce(u64) -> Command,
    timeout: Duration,
) -> Result<Save, SaveError> {
    if !Arc::ptr_eq(&memory.shared, shared) {
        return Err(SaveError::ForeignRegion);
    }
    let begun = Instant::now();
    let mut state = shared.lock()?;
    // It only reads: what else reads or writes there is the caller's business.
    let target = Target { memory: Arc::clone(memory), written: Written::Entries };
    let id = state.begin(Kind::Save, Some(target));
    let deadline = begun.checked_add(shared.config.timeout);
    let (state, sent) = shared.send(state, &command(id), deadline);
    drop(state);
    sent?;
    Ok(Save { shared: Arc::clone(shared), id, begun, timeout, ended: None })
}

impl Save {
    /// Waits for the end, at most `limit`.
    ///
    /// # Errors
    /// [`SaveError::StillUnderWay`] when it has not ended by then: call again. Else why there is no report.
    pub fn wait(&mut self, limit: Duration) -> Result<SaveReport, SaveError> {
        if self.ended.is_none() {
            let (id, deadline) = (self.id, Instant::now().checked_add(limit));
            let state = self.shared.lock()?;
            let (state, answer) = self.shared.wait_for(state, deadline, |state| state.take_answer(id));
            drop(state);
            match answer {
                Ok((completion, at)) => self.ended = Some(self.report(completion, at)),
                Err(Unanswered::Lost(lost)) => return Err(lost.into()),
                Err(Unanswered::TimedOut) => {}
            }
        }
        match &self.ended {
            Some(Ok(report)) => Ok(report.clone()),
            Some(Err(reason)) => Err(SaveError::Refused { reason: reason.clone() }),
            None => Err(SaveError::StillUnderWay { waited_ms: limit.as_millis() }),
        }
    }

    /// Waits for the end, a little longer than its own timeout.
    ///
    /// # Errors
    /// As [`Save::wait`].
    pub fn finish(mut self) -> Result<SaveReport, SaveError> {
        self.wait(self.timeout.saturating_add(ANSWER_GRACE))
    }

    fn report(&self, completion: Completion, at: Instant) -> Result<SaveReport, String> {
        match completion {
            Completion::Saved {
                outcome,
                stored,
                already_stored,
                encoded_bytes,
                not_saved,
                fewer_copies,
                message,
                ..
            } => {
                let elapsed = at.saturating_duration_since(self.begun);
                Ok(SaveReport {
                    outcome,
                    stored,
                    already_stored,
                    encoded_bytes,
                    not_saved,
                    fewer_copies,
                    message,
                    elapsed,
                })
            }
            Completion::Refused { reason, .. } => Err(reason),
            other => Err(format!("an answer of the wrong kind: {other:?}")),
        }
    }

    /// Asks the data plane to end it. It still ends once: wait for it.
    ///
    /// # Errors
    /// When the session is over, or the data plane takes no commands.
    pub fn cancel(&mut self) -> Result<(), SaveError> {
        if self.ended.is_some() {
            return Ok(());
        }
        let deadline = Instant::now().checked_add(self.shared.config.timeout);
        let (state, sent) = self.shared.send(self.shared.lock()?, &Command::Cancel { id: self.id }, deadline);
        drop(state);
        Ok(sent?)
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        if self.ended.is_some() || self.shared.is_forked() {
            return;
        }
        if self.cancel().is_ok() {
            let _ = self.wait(self.shared.config.drop_wait);
        }
        if let Ok(mut state) = self.shared.lock() {
            state.abandon(self.id);
        }
    }
}
