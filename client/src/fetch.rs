//! One fetch: what to ask for, and how to follow it to its end.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::message::MAX_CHUNKS_PER_FETCH;
use control::{
    ChunkPlace, Command, CommandError, Completion, Dtype, ElementType, Layout, LayoutError, Missing, Outcome,
    RegionView, Shape, Target as FetchTarget,
};

use crate::dispatch::drain;
use crate::gpu::{PagesRequest, RingRequest};
use crate::lost::Lost;
use crate::prefix::Prefix;
use crate::region::{Held, Memory, Region};
use crate::shared::{Guard, Kind, NotSent, Shared, Target, Unanswered, Written};

/// How much longer than a command's own timeout its answer is waited for.
pub(crate) const ANSWER_GRACE: Duration = Duration::from_secs(2);

/// Which chunks to fetch, where their bytes go, and until when.
#[derive(Clone, Debug)]
pub struct FetchRequest<'a> {
    /// The memory that receives.
    pub region: &'a Region,
    /// What the chunks are expected to be: what the lookup returned.
    pub shape: Shape,
    /// Strides within a chunk, bytes.
    pub layout: Layout,
    /// The element type to be written; the data plane converts.
    pub out_dtype: Dtype,
    /// The chunks and their offsets in the region. Two that overlap leave a mixture.
    pub chunks: Vec<ChunkPlace>,
    /// The deadline, from when the data plane takes the fetch: it ends by then, done or failed.
    pub timeout: Duration,
    /// Whether [`Fetch::progress`] is to be kept up to date.
    pub progress: bool,
}

/// Why a prefix cannot be asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// There is nothing to fetch.
    #[error("the prefix is empty: nothing of the sequence is stored, compute it instead")]
    Empty,
    /// More chunks than a fetch may name.
    #[error("{chunks} chunks, and a fetch or save takes {MAX_CHUNKS_PER_FETCH}: split it into parts")]
    TooMany {
        /// How many.
        chunks: usize,
    },
    /// It does not fit.
    #[error("{needed} bytes are needed from offset {offset} on and the region has {bytes}: register more")]
    TooSmall {
        /// Decoded size, bytes.
        needed: u64,
        /// Where it was to begin, bytes.
        offset: u64,
        /// Size of the region, bytes.
        bytes: usize,
    },
    /// The layout cannot hold the shape.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The page table ends too early, or is too long.
    #[error(
        "a page table of {pages} pages does not hold {tokens} tokens, or is longer than a fetch or save takes"
    )]
    Table {
        /// Pages in the table.
        pages: usize,
        /// Tokens of the prefix.
        tokens: u32,
    },
    /// There is nothing to save.
    #[error("the sequence has no tokens: there is nothing to save")]
    NoTokens,
    /// Not what chunks are made of.
    #[error(
        "elements of a cache in {element} cannot be saved, only bf16 and f16: they would have to be dequantized"
    )]
    Element {
        /// The cache's element type.
        element: ElementType,
    },
}

impl<'a> FetchRequest<'a> {
    /// The whole prefix as two tensors from the region's start on: all of K, then all of V, each
    /// `[layers, tokens, kv_heads, head_dim]` with `tokens` being [`Prefix::tokens`].
    ///
    /// # Errors
    /// When the prefix is empty, too long, or larger than the region.
    pub fn sequence(prefix: &Prefix, region: &'a Region) -> Result<Self, RequestError> {
        let shape = prefix.shape.ok_or(RequestError::Empty)?;
        let layout = Layout::sequence(&shape, prefix.tokens);
        Self::place(prefix, region, shape, layout, 0, |tokens| u64::from(tokens) * shape.token_bytes())
    }

    /// Chunk after chunk from `offset` on, each `[layers, 2, 256, kv_heads, head_dim]`; a last chunk with fewer
    /// tokens leaves the end of its planes untouched.
    ///
    /// # Errors
    /// When the prefix is empty, too long, or does not fit behind `offset`.
    pub fn chunked(prefix: &Prefix, region: &'a Region, offset: u64) -> Result<Self, RequestError> {
        let shape = prefix.shape.ok_or(RequestError::Empty)?;
        let layout = Layout::chunked(&shape, control::CHUNK_TOKENS);
        let chunk_bytes = shape.chunk_bytes(control::CHUNK_TOKENS);
        let step = |tokens: u16| if tokens == 0 { 0 } else { chunk_bytes };
        Self::place(prefix, region, shape, layout, offset, step)
    }

    fn place(
        prefix: &Prefix,
        region: &'a Region,
        shape: Shape,
        layout: Layout,
        start: u64,
        step_bytes: impl Fn(u16) -> u64,
    ) -> Result<Self, RequestError> {
        if prefix.chunks.len() > MAX_CHUNKS_PER_FETCH {
            return Err(RequestError::TooMany { chunks: prefix.chunks.len() });
        }
        let mut end = start;
        let mut offset = start;
        let mut chunks = Vec::with_capacity(prefix.chunks.len());
        for chunk in &prefix.chunks {
            chunks.push(ChunkPlace { key: chunk.key.0, tokens: chunk.tokens, offset });
            end = offset.saturating_add(layout.extent_bytes(&shape, chunk.tokens)?);
            offset = offset.saturating_add(step_bytes(chunk.tokens));
        }
        if end > region.bytes() as u64 {
            let needed = end - start;
            return Err(RequestError::TooSmall { needed, offset: start, bytes: region.bytes() });
        }
        Ok(Self {
            region,
            shape,
            layout,
            out_dtype: shape.dtype,
            chunks,
            timeout: Duration::from_secs(5),
            progress: false,
        })
    }

    /// From the lowest to the highest byte that it writes.
    fn span(&self) -> Range<u64> {
        let ends = self.chunks.iter().map(|chunk| {
            let extent_bytes = self.layout.extent_bytes(&self.shape, chunk.tokens).unwrap_or(0);
            chunk.offset.saturating_add(extent_bytes)
        });
        let start = self.chunks.iter().map(|chunk| chunk.offset).min().unwrap_or(0);
        start..ends.max().unwrap_or(start)
    }

    fn command(&self, id: u64) -> Command {
        Command::Fetch {
            id,
            timeout_ms: milliseconds(self.timeout),
            region: self.region.id(),
            to: FetchTarget::Host { layout: self.layout, out_dtype: self.out_dtype },
            shape: self.shape,
            chunks: self.chunks.clone(),
            progress: self.progress,
        }
    }
}

/// Rounded up, so that some time never becomes none.
pub(crate) fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX)
}

/// Why a fetch was not started, or cannot be followed. A fetch that was started and in which something went
/// wrong is no error: see [`FetchReport::outcome`].
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The request contradicts itself or its region.
    #[error(transparent)]
    Invalid(#[from] CommandError),
    /// The region belongs to another session.
    #[error("the region was registered by another client: register memory with this one")]
    ForeignRegion,
    /// A fetch that was dropped may still write there.
    #[error(
        "a cancelled fetch has not ended yet and may still write to this part of the region: wait, or use \
         another part"
    )]
    RegionBusy,
    /// The data plane does not carry it out.
    #[error("the data plane refused the fetch: {reason}")]
    Refused {
        /// Its reason, and what to do.
        reason: String,
    },
    /// The data plane takes no commands.
    #[error("the data plane takes no commands: too many are queued; wait for some to end")]
    Full,
    /// It has not ended within the time given; it goes on.
    #[error("the fetch has not ended after {waited_ms} ms and goes on: wait again, or cancel it")]
    StillUnderWay {
        /// How long was waited, milliseconds.
        waited_ms: u128,
    },
    /// The session is over.
    #[error(transparent)]
    Lost(#[from] Lost),
}

impl From<NotSent> for FetchError {
    fn from(error: NotSent) -> Self {
        match error {
            NotSent::Lost(lost) => Self::Lost(lost),
            NotSent::Full => Self::Full,
            NotSent::TooLong(error) => Self::Refused { reason: error.to_string() },
        }
    }
}

/// How far a fetch has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Planes delivered.
    pub planes: u32,
    /// Encoded bytes that arrived.
    pub encoded_bytes: u64,
    /// Decoded bytes written.
    pub delivered_bytes: u64,
}

/// How a fetch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchReport {
    /// Done, failed or cancelled.
    pub outcome: Outcome,
    /// What was delivered.
    pub progress: Progress,
    /// Chunks that did not arrive whole, by index into the request's chunks. All others did.
    pub missing: Vec<Missing>,
    /// What happened, for a person; empty when done.
    pub message: String,
    /// From the request to the end as this process saw it.
    pub elapsed: Duration,
}

/// A fetch under way.
///
/// Dropping it before its end cancels it and waits for the end, so that the region can be used for something
/// else afterwards. The wait lasts as long as the data plane needs, in general far less than a millisecond, and at most
/// [`crate::ClientConfig::drop_wait`]; if that passes, the part of the region stays reserved and new fetches
/// into it are refused ([`FetchError::RegionBusy`]) until the end has come.
#[derive(Debug)]
pub struct Fetch {
    id: u64,
    shared: Arc<Shared>,
    started: Instant,
    /// The data plane ends it by then, or something is wrong with it.
    overdue: Option<Instant>,
    ended: Option<Result<FetchReport, String>>,
    last_progress: Progress,
}

pub(crate) fn start(shared: &Arc<Shared>, request: &FetchRequest<'_>) -> Result<Fetch, FetchError> {
    let written = Written::Bytes(request.span());
    start_command(shared, &request.region.0, request.command(0), written, request.timeout)
}

pub(crate) fn start_pages(shared: &Arc<Shared>, request: &PagesRequest<'_>) -> Result<Fetch, FetchError> {
    let written = Written::Pages(request.pages());
    start_command(shared, &request.cache.0, request.command(0), written, request.timeout)
}

pub(crate) fn start_ring(shared: &Arc<Shared>, request: &RingRequest<'_>) -> Result<Fetch, FetchError> {
    start_command(shared, &request.ring.0, request.command(0), Written::Entries, request.timeout)
}

fn start_command(
    shared: &Arc<Shared>,
    memory: &Arc<Memory>,
    mut command: Command,
    written: Written,
    timeout: Duration,
) -> Result<Fetch, FetchError> {
    if !Arc::ptr_eq(&memory.shared, shared) {
        return Err(FetchError::ForeignRegion);
    }
    let view = match &memory.held {
        Held::Host(arena) => RegionView::Host(arena.bytes() as u64),
        Held::Pages(kv) => RegionView::Pages(kv),
        Held::Ring { ring, .. } => RegionView::Ring(ring),
    };
    command.check(|region| (region == memory.id).then_some(view))?;

    let started = Instant::now();
    let mut state = shared.lock()?;
    if state.is_written_by_abandoned(memory, &written) {
        return Err(FetchError::RegionBusy);
    }
    let id = state.begin(Kind::Fetch, Some(Target { memory: Arc::clone(memory), written }));
    if let Command::Fetch { id: name, .. } = &mut command {
        *name = id;
    }
    let deadline = started.checked_add(timeout);
    let (state, sent) = shared.send(state, &command, deadline);
    drop(state);
    sent?;
    Ok(Fetch {
        id,
        shared: Arc::clone(shared),
        started,
        overdue: deadline.and_then(|deadline| deadline.checked_add(ANSWER_GRACE)),
        ended: None,
        last_progress: Progress::default(),
    })
}

impl Fetch {
    /// Its number in this session: what a ring's entries name it by.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The report, if it has ended. Never blocks.
    ///
    /// # Errors
    /// When it was refused, or the session is over.
    pub fn poll(&mut self) -> Result<Option<FetchReport>, FetchError> {
        match self.wait(Duration::ZERO) {
            Ok(report) => Ok(Some(report)),
            Err(FetchError::StillUnderWay { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for its end, at most `timeout`. Once it has ended, gives the same report at once.
    ///
    /// # Errors
    /// [`FetchError::StillUnderWay`] when the time is over: the fetch goes on. Others when it was refused, or
    /// the session is over.
    pub fn wait(&mut self, timeout: Duration) -> Result<FetchReport, FetchError> {
        if self.ended.is_none() {
            let begun = Instant::now();
            let deadline = begun.checked_add(timeout);
            let shared = Arc::clone(&self.shared);
            let state = self.spin(&shared, begun, timeout)?;
            let id = self.id;
            let (state, answer) = shared.wait_for(state, deadline, |state| state.take_answer(id));
            drop(state);
            match answer {
                Ok((completion, at)) => self.settle(completion, at),
                Err(Unanswered::Lost(lost)) => return Err(lost.into()),
                Err(Unanswered::TimedOut) => {
                    return Err(FetchError::StillUnderWay { waited_ms: timeout.as_millis() });
                }
            }
        }
        match &self.ended {
            Some(Ok(report)) => Ok(report.clone()),
            Some(Err(reason)) => Err(FetchError::Refused { reason: reason.clone() }),
            None => Err(FetchError::StillUnderWay { waited_ms: timeout.as_millis() }),
        }
    }

    /// Waits for its end without a limit of one's own: the data plane keeps the request's deadline.
    ///
    /// # Errors
    /// As [`Fetch::wait`]; [`FetchError::StillUnderWay`] only from a data plane that missed the deadline by
    /// seconds.
    pub fn finish(mut self) -> Result<FetchReport, FetchError> {
        let left = self.overdue.map(|overdue| overdue.saturating_duration_since(Instant::now()));
        self.wait(left.unwrap_or(Duration::MAX))
    }

    /// Takes completions without sleeping for as long as the configuration says.
    fn spin<'a>(
        &self,
        shared: &'a Shared,
        begun: Instant,
        timeout: Duration,
    ) -> Result<Guard<'a>, FetchError> {
        let spin = shared.config.spin.min(timeout);
        loop {
            let mut state = shared.lock()?;
            if let Err(lost) = drain(&mut state) {
                state.lose(lost);
            }
            shared.notify();
            if state.has_answer(self.id) || state.lost.is_some() || begun.elapsed() >= spin {
                return Ok(state);
            }
            drop(state);
            std::hint::spin_loop();
        }
    }

    fn settle(&mut self, completion: Completion, at: Instant) {
        let elapsed = at.saturating_duration_since(self.started);
        self.ended = match completion {
            Completion::Ended {
                outcome, planes, encoded_bytes, delivered_bytes, missing, message, ..
            } => {
                let progress = Progress { planes, encoded_bytes, delivered_bytes };
                self.last_progress = progress;
                Some(Ok(FetchReport { outcome, progress, missing, message, elapsed }))
            }
            Completion::Refused { reason, .. } => Some(Err(reason)),
            // Any other kind has been turned away before it was filed.
            other => Some(Err(format!("an answer of the wrong kind: {other:?}"))),
        };
    }

    /// How far it has come, as last heard: stays zero unless [`FetchRequest::progress`] was set.
    #[must_use]
    pub fn progress(&mut self) -> Progress {
        if self.ended.is_none()
            && let Ok(state) = self.shared.lock()
        {
            self.last_progress = state.progress(self.id).unwrap_or(self.last_progress);
        }
        self.last_progress
    }

    /// Asks the data plane to end it. It still ends once, and may end done if that came first: wait for it.
    ///
    /// # Errors
    /// When the session is over, or the data plane takes no commands.
    pub fn cancel(&mut self) -> Result<(), FetchError> {
        if self.ended.is_some() {
            return Ok(());
        }
        let deadline = Instant::now().checked_add(self.shared.config.timeout);
        let (state, sent) = self.shared.send(self.shared.lock()?, &Command::Cancel { id: self.id }, deadline);
        drop(state);
        Ok(sent?)
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        if self.ended.is_some() || self.shared.is_forked() {
            return;
        }
        // Whatever goes wrong here, the entry keeps the region's memory and reserves its part of it.
        if matches!(self.poll(), Ok(None)) && self.cancel().is_ok() {
            let _ = self.wait(self.shared.config.drop_wait);
        }
        if let Ok(mut state) = self.shared.lock() {
            state.abandon(self.id);
        }
    }
}
