//! The shared memory of one session: where things lie, and what either side does with them.
//!
//! ```text
//! offset      0  magic u64, version u64, total bytes u64      written once by the data plane
//! offset    256  data plane's words: heartbeat, wants, pid    written by the data plane
//! offset    512  client's words:     heartbeat, wants, pid    written by the client
//! offset   1024  cursors of the command ring
//! offset   1280  cursors of the completion ring
//! offset   4096  data of the command ring      1 MiB
//!        +1 MiB  data of the completion ring   1 MiB
//! ```
//!
//! The offsets are constants of [`crate::VERSION`]: neither side takes one from memory that the other can write.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hugepages::{AdoptError, Arena, ArenaConfig, ArenaError, PageChoice};
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::VERSION;
use crate::doorbell::{Doorbell, WANT_DATA, WANT_SPACE};
use crate::ring::{CURSORS_BYTES, Receiver, RingError, RingSpan, Sender};

/// The first eight bytes of every session's memory.
const MAGIC: u64 = u64::from_le_bytes(*b"SHSERVE\0");
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = 8;
const TOTAL_AT: usize = 16;
const SERVER_WORDS_AT: usize = 256;
const CLIENT_WORDS_AT: usize = 512;
/// Within either side's words. Each on a cache line of its own: the heartbeat is written ten times a second, the
/// wishes by both sides.
const BEAT: usize = 0;
const WANTS: usize = 128;
const PID: usize = 64;

const RING_DATA_BYTES: usize = 1 << 20;
const COMMANDS: RingSpan = RingSpan { cursors: 1024, data: 4096, data_bytes: RING_DATA_BYTES };
const COMPLETIONS: RingSpan =
    RingSpan { cursors: 1024 + CURSORS_BYTES, data: 4096 + RING_DATA_BYTES, data_bytes: RING_DATA_BYTES };
/// Size of a session's memory, bytes.
pub const SESSION_BYTES: usize = 4096 + 2 * RING_DATA_BYTES;

/// Nanoseconds of the monotonic clock, which runs on while nobody looks and is never set.
#[must_use]
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

/// Whether a message went into the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a message that found the ring full was not sent"]
pub enum Sent {
    /// It did.
    Sent,
    /// There is no room. The peer rings the doorbell once there is: try again then.
    Full,
}

/// Why a session's memory cannot be made or taken.
#[derive(Debug, thiserror::Error)]
pub enum SessionMemoryError {
    /// The data plane found no memory for it.
    #[error("no memory for a session ({SESSION_BYTES} bytes): {0}")]
    Create(#[from] ArenaError),
    /// What came over the socket cannot be mapped.
    #[error("the session's memory cannot be used: {0}")]
    Adopt(#[from] AdoptError),
    /// What came over the socket is something else.
    #[error(
        "the memory received is no session of version {VERSION} (magic {magic:#x}, version {version}, \
         {total} bytes): use a client and a data plane of the same release"
    )]
    Foreign {
        /// First word.
        magic: u64,
        /// Second word.
        version: u64,
        /// Third word.
        total: u64,
    },
    /// The rings do not lie inside the memory. Cannot happen while the constants above are right.
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// Makes the memory of a new session: the data plane's part.
///
/// # Errors
/// When there is no memory.
pub fn create() -> Result<Arena, SessionMemoryError> {
    // Ordinary pages: two megabytes of control messages earn no hugepage.
    let config = ArenaConfig {
        name: "shadowserve-session",
        bytes: SESSION_BYTES,
        page: PageChoice::Base,
        numa_node: None,
    };
    let arena = Arena::new(config)?;
    for (offset, value) in
        [(MAGIC_AT, MAGIC), (VERSION_AT, u64::from(VERSION)), (TOTAL_AT, SESSION_BYTES as u64)]
    {
        if let Some(word) = arena.atomic_u64(offset) {
            word.store(value.to_le(), Ordering::Relaxed);
        }
    }
    Ok(arena)
}

/// Maps the memory of a session that the data plane made: the client's part.
///
/// # Errors
/// When it cannot be mapped, or is not a session of this version.
pub fn open(memory: OwnedFd) -> Result<Arena, SessionMemoryError> {
    let arena = Arena::from_fd(memory, SESSION_BYTES)?;
    let read = |offset| {
        arena
            .atomic_u64(offset)
            .map_or(0, |word: &std::sync::atomic::AtomicU64| u64::from_le(word.load(Ordering::Relaxed)))
    };
    let (magic, version, total) = (read(MAGIC_AT), read(VERSION_AT), read(TOTAL_AT));
    if magic != MAGIC || version != u64::from(VERSION) || total != SESSION_BYTES as u64 {
        return Err(SessionMemoryError::Foreign { magic, version, total });
    }
    Ok(arena)
}

/// Which side of a session an [`Endpoint`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Sends completions, receives commands.
    DataPlane,
    /// Sends commands, receives completions.
    Client,
}

/// One side of a session: two rings, a doorbell, heartbeats. Bytes in, bytes out; what they mean is for
/// [`crate::ServerSession`] and [`crate::ClientSession`].
#[derive(Debug)]
pub struct Endpoint {
    arena: Arc<Arena>,
    sender: Sender,
    receiver: Receiver,
    bell: Doorbell,
    own_words_at: usize,
    peer_words_at: usize,
    pulse: Pulse,
}

impl Endpoint {
    /// One side of the session in `arena`, with one end of a [`crate::doorbell::line_pair`].
    ///
    /// # Errors
    /// When `arena` is no session's memory.
    pub fn new(arena: Arena, side: Side, line: Arc<OwnedFd>) -> Result<Self, SessionMemoryError> {
        let arena = Arc::new(arena);
        let (own_words_at, peer_words_at, out, inward) = match side {
            Side::DataPlane => (SERVER_WORDS_AT, CLIENT_WORDS_AT, COMPLETIONS, COMMANDS),
            Side::Client => (CLIENT_WORDS_AT, SERVER_WORDS_AT, COMMANDS, COMPLETIONS),
        };
        let bell = Doorbell::new(Arc::clone(&arena), own_words_at + WANTS, peer_words_at + WANTS, line);
        let bell = bell.ok_or(RingError::BadSpan { span: out, arena_bytes: arena.bytes() })?;
        let endpoint = Self {
            sender: Sender::new(Arc::clone(&arena), out)?,
            receiver: Receiver::new(Arc::clone(&arena), inward)?,
            bell,
            arena,
            own_words_at,
            peer_words_at,
            pulse: Pulse::default(),
        };
        // For whoever looks at the memory with a debugger; nobody here trusts it.
        endpoint.store(own_words_at + PID, u64::from(std::process::id()));
        Ok(endpoint)
    }

    fn store(&self, offset: usize, value: u64) {
        if let Some(word) = self.arena.atomic_u64(offset) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Sends one message and wakes the peer if it sleeps.
    ///
    /// # Errors
    /// As [`Sender::try_send`].
    pub fn send(&mut self, message: &[u8]) -> Result<Sent, RingError> {
        if !self.sender.try_send(message)? {
            // Ask to be woken, then look once more: the peer may have made room before it could see the wish.
            self.bell.want(WANT_SPACE);
            if !self.sender.try_send(message)? {
                return Ok(Sent::Full);
            }
            self.bell.forgo(WANT_SPACE);
        }
        self.bell.notify(WANT_DATA);
        Ok(Sent::Sent)
    }

    /// Takes one message into `out`; `false` if there is none now. Wakes a peer that waits for room once the
    /// ring is half empty, so that it wakes to send many messages and not one.
    ///
    /// # Errors
    /// As [`Receiver::try_receive`].
    pub fn receive(&mut self, out: &mut Vec<u8>) -> Result<bool, RingError> {
        if !self.receiver.try_receive(out)? {
            return Ok(false);
        }
        if self.receiver.is_half_empty() {
            self.bell.notify(WANT_SPACE);
        }
        Ok(true)
    }

    /// `set_sleeping(true)` before waiting on the doorbell: `true` if nothing has arrived meanwhile, so that it
    /// is safe to sleep. `set_sleeping(false)` after waking; it quiets the doorbell and returns `false`. Forgetting the
    /// latter costs system calls and nothing else.
    pub fn set_sleeping(&mut self, sleeping: bool) -> bool {
        if !sleeping {
            self.bell.forgo(WANT_DATA);
            self.bell.clear();
            return false;
        }
        self.bell.want(WANT_DATA);
        // A corrupt ring is something to wake up for, too.
        if self.receiver.is_empty().unwrap_or(false) {
            return true;
        }
        self.bell.forgo(WANT_DATA);
        false
    }

    /// Readable when the peer rings.
    #[must_use]
    pub fn doorbell_fd(&self) -> BorrowedFd<'_> {
        self.bell.fd()
    }

    /// The session's memory, for tests that write to it what no correct peer writes.
    #[must_use]
    pub fn memory(&self) -> &Arena {
        &self.arena
    }

    /// Writes this side's heartbeat word; at least every [`crate::BEAT_INTERVAL_MS`].
    pub fn beat(&self, now_ns: u64) {
        self.store(self.own_words_at + BEAT, now_ns);
    }

    /// Whether the peer's heartbeat word has changed within `limit`; look at least every quarter of that.
    pub fn peer_alive(&mut self, now_ns: u64, limit: Duration) -> bool {
        let beat = self.arena.atomic_u64(self.peer_words_at + BEAT);
        let beat = beat.map_or(0, |word| word.load(Ordering::Relaxed));
        self.pulse.alive(beat, now_ns, limit)
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Watches a word that should keep changing.
///
/// Only changes count, not values: clocks may differ between containers, and the peer may write what it likes.
/// And silence counts only while somebody looks: between two looks at most a quarter of the limit is added. A
/// machine that was suspended, or a watcher that was itself stopped, does not take its own absence for the
/// peer's death.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    last_beat: u64,
    looked_ns: Option<u64>,
    silent_ns: u64,
}

impl Pulse {
    /// Takes a look: whether the word, now `beat`, has been silent for less than `limit`.
    pub(crate) fn alive(&mut self, beat: u64, now_ns: u64, limit: Duration) -> bool {
        let since = now_ns.saturating_sub(self.looked_ns.unwrap_or(now_ns));
        self.looked_ns = Some(now_ns);
        if beat == self.last_beat {
            self.silent_ns = self.silent_ns.saturating_add(since.min(nanoseconds(limit) / 4));
        } else {
            self.last_beat = beat;
            self.silent_ns = 0;
        }
        self.silent_ns < nanoseconds(limit)
    }
}
