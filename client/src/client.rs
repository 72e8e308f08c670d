//! The session with the data plane.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use control::message::MAX_KEYS_PER_LOOKUP;
use control::{
    AttachError, CHUNK_TOKENS, ClientSession, Command, CommandError, Completion, GpuMemory, PagedKv,
    SocketError,
};
use hugepages::{Arena, ArenaConfig, PageChoice};
use protocol::key::{ChunkKeys, Key};

use crate::config::ClientConfig;
use crate::dispatch;
use crate::fetch::{self, ANSWER_GRACE, Fetch, FetchError, FetchRequest, milliseconds};
use crate::gpu::{GpuRing, PagedCache, PagesRequest, RingConfig, RingRequest};
use crate::lost::Lost;
use crate::prefix::{Prefix, PrefixChunk};
use crate::region::{Held, Memory, Region, RegisterError};
use crate::save::{self, Save, SaveError, SavePagesRequest, SaveRequest};
use crate::shared::{Kind, NotSent, Shared, Unanswered};

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No data plane, no permission, another version: each says what to do.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The session's thread could not be started.
    #[error("the session's thread could not be started: {0}; raise the limits on threads and descriptors")]
    Thread(#[from] io::Error),
}

/// Why a lookup gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// More tokens than a lookup can name.
    #[error(
        "{tokens} tokens are more than a lookup takes, {limit}: look up the first part",
        limit = MAX_KEYS_PER_LOOKUP * CHUNK_TOKENS as usize
    )]
    TooLong {
        /// How many.
        tokens: usize,
    },
    /// The timeout is out of range.
    #[error(transparent)]
    Invalid(#[from] CommandError),
    /// No store answered, or the lookup went wrong.
    #[error("the lookup failed: {0}")]
    Failed(String),
    /// The data plane does not carry it out.
    #[error("the data plane refused the lookup: {0}")]
    Refused(String),
    /// The data plane did not answer.
    #[error("the data plane did not answer within {waited_ms} ms: it is overloaded; look at its statistics")]
    TimedOut {
        /// How long was waited, milliseconds.
        waited_ms: u128,
    },
    /// The session is over.
    #[error(transparent)]
    Lost(#[from] Lost),
}

/// Why there are no statistics.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// The data plane does not give them.
    #[error("the data plane refused to give statistics: {0}")]
    Refused(String),
    /// The data plane did not answer.
    #[error("the data plane did not answer within {waited_ms} ms: it is overloaded; look at its log")]
    TimedOut {
        /// How long was waited, milliseconds.
        waited_ms: u128,
    },
    /// The session is over.
    #[error(transparent)]
    Lost(#[from] Lost),
}

/// One session with the data plane on this machine.
///
/// Can be used from any number of threads at once. It has a thread of its own, which takes completions and keeps
/// the heartbeat; that thread does not survive a fork, so connect after it. Dropping the client ends the
/// session: the data plane cancels its fetches and forgets its regions.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    root: Key,
    data_plane: String,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Connects to the data plane that listens at `path`.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(path: impl AsRef<Path>, config: &ClientConfig) -> Result<Self, ConnectError> {
        let session = ClientSession::connect(path.as_ref(), &config.name, config.timeout)?;
        let data_plane = session.data_plane().to_owned();
        let fds = session.poll_fds()?;
        let shared = Arc::new(Shared::new(session, config.clone()));
        let theirs = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name("shadowserve".to_owned());
        let thread = builder.spawn(move || dispatch::run(&theirs, &fds))?;
        Ok(Self { shared, root: config.namespace.root(), data_plane, thread: Some(thread) })
    }

    /// What the data plane calls itself: program and version.
    #[must_use]
    pub fn data_plane(&self) -> &str {
        &self.data_plane
    }

    /// Why the session is over; `None` while it is not.
    #[must_use]
    pub fn lost(&self) -> Option<Lost> {
        match self.shared.lock() {
            Ok(state) => state.lost.clone(),
            Err(lost) => Some(lost),
        }
    }

    /// Allocates memory and registers it: hugepages where the machine has them free, else ordinary pages.
    ///
    /// # Errors
    /// When there is no memory, the data plane does not take it, or the session is over.
    pub fn register(&self, bytes: usize) -> Result<Region, RegisterError> {
        let config =
            ArenaConfig { name: "shadowserve-region", bytes, page: PageChoice::Auto, numa_node: None };
        self.register_arena(Arena::new(config)?)
    }

    /// Registers memory that was allocated with choices of one's own, as the page size or the NUMA node. An
    /// arena can be registered once: with one client, and not again after that client is gone.
    ///
    /// # Errors
    /// When the data plane does not take it, or the session is over.
    pub fn register_arena(&self, arena: Arena) -> Result<Region, RegisterError> {
        let id = self.register_with(|session, token| session.register(token, &arena))?;
        let region = Region(self.memory(id, Held::Host(arena)));
        // The data plane has mapped it: from here on nobody else can, nor take its pages away.
        region.arena().close_to_others()?;
        Ok(region)
    }

    /// Registers a paged KV cache in GPU memory of this process.
    ///
    /// # Errors
    /// When the description contradicts itself, the data plane cannot open the memory, or the session is over.
    pub fn register_pages(&self, kv: PagedKv) -> Result<PagedCache, RegisterError> {
        kv.check()?;
        let memory = GpuMemory::Pages(kv.clone());
        let id = self.register_with(|session, token| session.register_gpu(token, &memory, None))?;
        Ok(PagedCache(self.memory(id, Held::Pages(kv))))
    }

    /// Makes a ring in GPU memory of this process and registers it.
    ///
    /// # Errors
    /// As [`Client::register_pages`].
    pub fn register_ring(&self, config: &RingConfig) -> Result<GpuRing, RegisterError> {
        let (ring, words, consumer) = config.make(1)?;
        let memory = GpuMemory::Ring(ring.clone());
        let id = self.register_with(|session, token| session.register_gpu(token, &memory, Some(&words)))?;
        let ring = GpuRing(self.memory(id, Held::Ring { ring, consumer: consumer.into() }));
        words.close_to_others()?;
        Ok(ring)
    }

    fn memory(&self, id: u32, held: Held) -> Arc<Memory> {
        Arc::new(Memory { id, held, shared: Arc::clone(&self.shared) })
    }

    /// Asks for memory to be registered and waits for the region's number.
    fn register_with(
        &self,
        ask: impl FnOnce(&ClientSession, u64) -> Result<(), SocketError>,
    ) -> Result<u32, RegisterError> {
        let timeout = self.shared.config.timeout;
        let deadline = Instant::now().checked_add(timeout);
        let timed_out = || RegisterError::TimedOut { timeout_ms: timeout.as_millis() };
        let mut state = self.shared.lock()?;
        // Regions that were dropped just now count against the limit until the data plane has let go of them.
        self.shared.flush_retired(&mut state);
        let (mut state, unregistered) =
            self.shared.wait_for(state, deadline, |state| (!state.is_unregistering()).then_some(()));
        if let Err(Unanswered::TimedOut) = unregistered {
            return Err(timed_out());
        }
        if let Some(lost) = &state.lost {
            return Err(lost.clone().into());
        }
        let token = state.begin_registering();
        let asked = state.session.as_ref().map_or(Ok(()), |session| ask(session, token));
        if let Err(error) = asked {
            state.forget_registering(token);
            return Err(error.into());
        }
        let (mut state, reply) = self.shared.wait_for(state, deadline, |state| state.take_registered(token));
        if let Err(Unanswered::TimedOut) = reply {
            state.abandon_registering(token);
        }
        drop(state);
        match reply {
            Ok(Ok(id)) => Ok(id),
            Ok(Err(reason)) => Err(RegisterError::Refused { reason }),
            Err(Unanswered::Lost(lost)) => Err(lost.into()),
            Err(Unanswered::TimedOut) => Err(timed_out()),
        }
    }

    /// The keys of a token sequence, one per 256 tokens.
    #[must_use]
    pub fn keys(&self, tokens: &[i32]) -> Vec<Key> {
        ChunkKeys::new(self.root, tokens).collect()
    }

    /// The longest prefix of `tokens` that is stored.
    ///
    /// # Errors
    /// When no store answers within `timeout` (whole milliseconds, rounded up), or the session is over. That nothing is
    /// stored is no error.
    pub fn lookup(&self, tokens: &[i32], timeout: Duration) -> Result<Prefix, LookupError> {
        let keys = self.keys(tokens);
        if keys.is_empty() {
            return Ok(Prefix::default());
        }
        if keys.len() > MAX_KEYS_PER_LOOKUP {
            return Err(LookupError::TooLong { tokens: tokens.len() });
        }
        let command = |id| Command::Lookup {
            id,
            keys: keys.iter().map(|key| key.0).collect(),
            timeout_ms: milliseconds(timeout),
        };
        command(0).check(|_| None)?;
        match self.ask(Kind::Lookup, command, timeout.saturating_add(ANSWER_GRACE)) {
            Ok(Completion::LookedUp { found, last_tokens, encoded_bytes, shape, codec, .. }) => {
                let chunks = pair(&keys, found, last_tokens, tokens.len()).ok_or_else(|| {
                    LookupError::Failed("the stored chunks do not hold the tokens asked for".to_owned())
                })?;
                let found = chunks.iter().map(|chunk| u32::from(chunk.tokens)).sum();
                let asked_chunks = u32::try_from(keys.len()).unwrap_or(u32::MAX);
                Ok(Prefix { chunks, tokens: found, asked_chunks, encoded_bytes, shape, codec })
            }
            Ok(Completion::LookupFailed { message, .. }) => Err(LookupError::Failed(message)),
            Ok(other) => Err(LookupError::Refused(refusal(other))),
            Err(Unasked::Lost(lost)) => Err(lost.into()),
            Err(Unasked::TooLong(reason)) => Err(LookupError::Refused(reason)),
            Err(Unasked::TimedOut(waited)) => Err(LookupError::TimedOut { waited_ms: waited.as_millis() }),
        }
    }

    /// Starts a fetch. Returns as soon as the command is on its way: follow it with the [`Fetch`].
    ///
    /// # Errors
    /// When the request is invalid, the data plane does not take commands, or the session is over.
    pub fn fetch(&self, request: &FetchRequest<'_>) -> Result<Fetch, FetchError> {
        fetch::start(&self.shared, request)
    }

    /// Starts a fetch into the pages of a KV cache, as [`Client::fetch`].
    ///
    /// # Errors
    /// As [`Client::fetch`].
    pub fn fetch_pages(&self, request: &PagesRequest<'_>) -> Result<Fetch, FetchError> {
        fetch::start_pages(&self.shared, request)
    }

    /// Starts a fetch into a ring, as [`Client::fetch`]. Its planes come through [`GpuRing::peek`], each as soon as it is
    /// there; the fetch ends when all have been copied, whether or not they have been taken.
    ///
    /// # Errors
    /// As [`Client::fetch`].
    pub fn fetch_ring(&self, request: &RingRequest<'_>) -> Result<Fetch, FetchError> {
        fetch::start_ring(&self.shared, request)
    }

    /// Starts a save: the data plane encodes chunks out of a region and puts them into a store. Returns as soon as the command
    /// is on its way: follow it with the [`Save`].
    ///
    /// # Errors
    /// When the request is invalid, the data plane does not take commands, or the session is over.
    pub fn save(&self, request: &SaveRequest<'_>) -> Result<Save, SaveError> {
        save::start(&self.shared, request)
    }

    /// The same, out of pages of a KV cache on a GPU.
    ///
    /// # Errors
    /// As [`Client::save`].
    pub fn save_pages(&self, request: &SavePagesRequest<'_>) -> Result<Save, SaveError> {
        save::start_pages(&self.shared, request)
    }

    /// The data plane's counters and latencies, as one JSON object.
    ///
    /// # Errors
    /// When the data plane does not answer, or the session is over.
    pub fn stats(&self) -> Result<String, StatsError> {
        match self.ask(Kind::Stats, |id| Command::Stats { id }, self.shared.config.timeout) {
            Ok(Completion::Stats { json, .. }) => Ok(json),
            Ok(other) => Err(StatsError::Refused(refusal(other))),
            Err(Unasked::Lost(lost)) => Err(lost.into()),
            Err(Unasked::TooLong(reason)) => Err(StatsError::Refused(reason)),
            Err(Unasked::TimedOut(waited)) => Err(StatsError::TimedOut { waited_ms: waited.as_millis() }),
        }
    }

    /// Sends one command and waits for its only answer.
    fn ask(
        &self,
        kind: Kind,
        command: impl FnOnce(u64) -> Command,
        timeout: Duration,
    ) -> Result<Completion, Unasked> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.shared.lock().map_err(Unasked::Lost)?;
        let id = state.begin(kind, None);
        let (state, sent) = self.shared.send(state, &command(id), deadline);
        match sent {
            Ok(()) => {}
            Err(NotSent::Lost(lost)) => return Err(Unasked::Lost(lost)),
            Err(NotSent::Full) => return Err(Unasked::TimedOut(timeout)),
            Err(NotSent::TooLong(error)) => return Err(Unasked::TooLong(error.to_string())),
        }
        let (mut state, answer) = self.shared.wait_for(state, deadline, |state| state.take_answer(id));
        match answer {
            Ok((completion, _)) => Ok(completion),
            Err(Unanswered::Lost(lost)) => Err(Unasked::Lost(lost)),
            Err(Unanswered::TimedOut) => {
                state.abandon(id);
                Err(Unasked::TimedOut(timeout))
            }
        }
    }
}

enum Unasked {
    Lost(Lost),
    TimedOut(Duration),
    TooLong(String),
}

/// The reason in a refusal; any other kind has been turned away before it was filed.
fn refusal(completion: Completion) -> String {
    match completion {
        Completion::Refused { reason, .. } => reason,
        other => format!("an answer of the wrong kind: {other:?}"),
    }
}

/// Joins the keys asked for with what was found; `None` if the last chunk does not hold the tokens that its key stands
/// for, or there are more chunks than keys.
fn pair(keys: &[Key], found: u32, last_tokens: u16, tokens: usize) -> Option<Vec<PrefixChunk>> {
    let found = keys.get(..usize::try_from(found).ok()?)?;
    let whole = usize::from(CHUNK_TOKENS);
    let chunks = found.iter().enumerate().map(|(index, &key)| {
        let tokens = u16::try_from((tokens - index * whole).min(whole)).unwrap_or(CHUNK_TOKENS);
        PrefixChunk { key, tokens }
    });
    let chunks: Vec<PrefixChunk> = chunks.collect();
    (chunks.last().map_or(0, |last| last.tokens) == last_tokens).then_some(chunks)
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.shared.is_forked() {
            return;
        }
        if let Ok(mut state) = self.shared.lock() {
            state.lose(Lost::Dropped);
        }
        self.shared.notify();
        if let Some(thread) = self.thread.take() {
            // It looks at the state at least once per heartbeat, and sees that it is over.
            let _ = thread.join();
        }
    }
}
