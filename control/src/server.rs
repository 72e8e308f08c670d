//! The data plane's side of one client's session.
//!
//! It is driven by the control thread, which polls [`crate::Listener::fd`], and of each session
//! [`ServerSession::fd`] and [`ServerSession::doorbell_fd`]. Nothing blocks. One pass over a session is:
//!
//! 1. `set_sleeping(false)`; `handle_socket` (regions come and the session may end);
//! 2. `next_command` until it gives none; act on each;
//! 3. `complete` what has ended; keep what did not fit and try again when the doorbell rings;
//! 4. `beat`, `peer_alive`; then `set_sleeping(true)`, and poll if every session says that it is safe.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use hugepages::Arena;

use crate::codec::{DecodeError, decode_command, encode};
use crate::doorbell::line_pair;
use crate::gpu::GpuMemory;
use crate::handshake::{FromClient, FromDataPlane, HandshakeError, datagram, parse, refusal};
use crate::listener::Limits;
use crate::message::{Command, Completion, MAX_STATS_BYTES, cut_text};
use crate::ring::RingError;
use crate::session::{Endpoint, Pulse, Sent, SessionMemoryError, Side, create};
use crate::socket::{Peer, SocketError, Stream};
use crate::work::Work;

/// Why a session cannot go on. Drop it: the client sees its socket hang up.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The socket failed, or the client does not read it.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The client sent something over the socket that is not in the protocol.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// A message that does not belong there, such as a second hello.
    #[error("the client broke the order of the handshake: {0}")]
    Order(&'static str),
    /// The session's memory cannot be made.
    #[error(transparent)]
    Memory(#[from] SessionMemoryError),
    /// The session's memory cannot be taken back from others.
    #[error("the session's memory cannot be closed to others: {0}")]
    Seal(#[from] hugepages::SealError),
    /// The client wrote nonsense into the ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The client sent what is no command.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The caller completed something that is not under way: each command ends once.
    #[error("completion for {id}, which is not under way: every command is completed exactly once")]
    NotUnderWay {
        /// The completion's id.
        id: u64,
    },
    /// The caller's completion is too long to send.
    #[error("a completion of {bytes} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Its size, bytes.
        bytes: usize,
        /// What fits, bytes.
        limit: usize,
    },
}

/// What came over the socket.
#[derive(Debug)]
pub enum SocketEvent {
    /// The client is attached: commands may come.
    Attached {
        /// What it calls itself.
        name: String,
    },
    /// The region can be written to. Keep the arena for as long as a fetch into it is under way.
    RegionRegistered {
        /// Its number in [`Command::Fetch`].
        id: u32,
        /// Its memory, mapped.
        arena: Arc<Arena>,
    },
    /// The client lends GPU memory, as described found sound. Open it, and then call [`ServerSession::answer_gpu`].
    GpuOffered {
        /// To be given back with the answer.
        token: u64,
        /// What is lent.
        memory: GpuMemory,
        /// The host memory of a ring, mapped.
        words: Option<Arc<Arena>>,
    },
    /// The client is gone: end its fetches as cancelled and drop the session.
    Closed {
        /// Why, for the log.
        reason: String,
    },
}

/// Socket messages read in one call, so that one client cannot keep the control thread.
const SOCKET_MESSAGES_PER_PASS: usize = 16;
/// Commands refused in one call, for the same reason.
const REFUSALS_PER_PASS: usize = 64;

#[derive(Debug)]
enum State {
    /// Connected, nothing said. Holds the client's end of the doorbell line.
    Greeting(OwnedFd),
    /// The memory is on its way to the client; nothing in it is touched until the client has mapped it.
    Offered { arena: Arena, name: String },
    /// In use.
    Attached(Box<Endpoint>),
    /// The client is gone.
    Closed,
}

/// One client. See the module's documentation for the order of calls.
#[derive(Debug)]
pub struct ServerSession {
    stream: Stream,
    peer: Peer,
    name: String,
    line: Arc<OwnedFd>,
    state: State,
    /// Watches clients that have not attached.
    greeting: Pulse,
    work: Work,
    /// A refusal that found the completion ring full.
    unsent: Option<Completion>,
    buffer: Vec<u8>,
    /// Its count is the number of sessions.
    _counted: Arc<()>,
}

impl ServerSession {
    pub(crate) fn new(stream: Stream, limits: Limits, name: String, counted: Arc<()>) -> io::Result<Self> {
        let (ours, theirs) = line_pair()?;
        let peer = stream.peer();
        Ok(Self {
            stream,
            peer,
            name,
            line: Arc::new(ours),
            state: State::Greeting(theirs),
            greeting: Pulse::default(),
            work: Work::new(limits),
            unsent: None,
            buffer: Vec::new(),
            _counted: counted,
        })
    }

    /// The socket: readable when [`ServerSession::handle_socket`] has something to do.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.fd()
    }

    /// The doorbell: readable when the client has rung.
    #[must_use]
    pub fn doorbell_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }

    /// The client's process id, 0 if it lives in a PID namespace that this process cannot see.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.peer.pid
    }

    /// The client's process, user and group.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Whether the client has attached and has not gone.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        matches!(self.state, State::Attached(_))
    }

    /// Commands taken and not completed.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.work.commands.len()
    }

    /// The memory of a registered region in host memory.
    #[must_use]
    pub fn region(&self, region: u32) -> Option<&Arc<Arena>> {
        self.work.regions.get(&region)?.arena()
    }

    /// Reads what waits on the socket: the handshake, regions, the client's end.
    ///
    /// # Errors
    /// When the client broke the protocol or the system failed. The client has been told; drop the session, as
    /// after [`SocketEvent::Closed`].
    pub fn handle_socket(&mut self) -> Result<Vec<SocketEvent>, SessionError> {
        let mut events = Vec::new();
        for _ in 0..SOCKET_MESSAGES_PER_PASS {
            let fds = match self.stream.receive(&mut self.buffer) {
                Ok(Some(fds)) => fds,
                Ok(None) => break,
                Err(SocketError::HungUp) => {
                    self.state = State::Closed;
                    events.push(SocketEvent::Closed { reason: "the client closed its socket".to_owned() });
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            match self.handle_message(fds) {
                Ok(event) => events.extend(event),
                Err(error) => return Err(self.end(error)),
            }
        }
        Ok(events)
    }

    /// Tells the client why its session ends.
    fn end(&mut self, error: SessionError) -> SessionError {
        // It is being let go whether it hears this or not.
        let _ = self.stream.send(&refusal(&error.to_string()), &[]);
        self.state = State::Closed;
        error
    }

    fn handle_message(&mut self, fds: Vec<OwnedFd>) -> Result<Option<SocketEvent>, SessionError> {
        match parse::<FromClient>(&self.buffer)? {
            FromClient::Hello { name } => self.welcome(name).map(|()| None),
            FromClient::Attached => self.attach().map(Some),
            FromClient::Register { token, bytes } if self.is_attached() => self.register(token, bytes, fds),
            FromClient::RegisterGpu { token, memory } if self.is_attached() => {
                self.offer_gpu(token, memory, fds)
            }
            FromClient::Register { .. } | FromClient::RegisterGpu { .. } => {
                Err(SessionError::Order("a region before the session is attached"))
            }
        }
    }

    fn welcome(&mut self, mut name: String) -> Result<(), SessionError> {
        cut_text(&mut name);
        let State::Greeting(theirs) = std::mem::replace(&mut self.state, State::Closed) else {
            return Err(SessionError::Order("a second hello"));
        };
        let arena = create()?;
        let welcome = datagram(&FromDataPlane::Welcome { name: self.name.clone() });
        self.stream.send(&welcome, &[arena.fd(), theirs.as_fd()])?;
        self.state = State::Offered { arena, name };
        Ok(())
    }

    fn attach(&mut self) -> Result<SocketEvent, SessionError> {
        let State::Offered { arena, name } = std::mem::replace(&mut self.state, State::Closed) else {
            return Err(SessionError::Order("memory attached that was not offered"));
        };
        arena.close_to_others()?;
        let endpoint = Endpoint::new(arena, Side::DataPlane, Arc::clone(&self.line))?;
        self.state = State::Attached(Box::new(endpoint));
        Ok(SocketEvent::Attached { name })
    }

    fn register(
        &mut self,
        token: u64,
        bytes: u64,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<SocketEvent>, SessionError> {
        let (answer, event) = match self.work.add_region(bytes, fds) {
            Ok((id, arena)) => (
                FromDataPlane::Registered { token, region: id },
                Some(SocketEvent::RegionRegistered { id, arena }),
            ),
            Err(error) => (region_refused(token, error.to_string()), None),
        };
        self.stream.send(&datagram(&answer), &[])?;
        Ok(event)
    }

    fn offer_gpu(
        &mut self,
        token: u64,
        memory: GpuMemory,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<SocketEvent>, SessionError> {
        match self.work.check_gpu(&memory, fds) {
            Ok(words) => Ok(Some(SocketEvent::GpuOffered { token, memory, words })),
            Err(error) => {
                self.stream.send(&datagram(&region_refused(token, error.to_string())), &[])?;
                Ok(None)
            }
        }
    }

    /// Answers [`SocketEvent::GpuOffered`]: with the memory, now open, or with why it is not. Returns the region's
    /// number, if it has one.
    ///
    /// # Errors
    /// When the client does not read its socket: drop the session.
    pub fn answer_gpu(
        &mut self,
        token: u64,
        opened: Result<GpuMemory, String>,
    ) -> Result<Option<u32>, SessionError> {
        let region = opened.and_then(|memory| self.work.add_gpu(memory).map_err(|error| error.to_string()));
        let (answer, id) = match region {
            Ok(region) => (FromDataPlane::Registered { token, region }, Some(region)),
            Err(reason) => (region_refused(token, reason), None),
        };
        self.stream.send(&datagram(&answer), &[])?;
        Ok(id)
    }

    /// The next command. It has been checked: counts, timeouts, its region and every place in it, that its id is
    /// free, that limits are kept; what fails has been refused already. Each command returned but
    /// [`Command::Cancel`] is to be completed exactly once. A cancel is returned only if what it names is under way.
    ///
    /// # Errors
    /// When the client wrote what no correct client writes. It has been told; drop the session.
    pub fn next_command(&mut self) -> Result<Option<Command>, SessionError> {
        for _ in 0..REFUSALS_PER_PASS {
            if self.send_unsent()? == Sent::Full {
                return Ok(None);
            }
            let command = match self.receive() {
                Ok(Some(command)) => command,
                Ok(None) => return Ok(None),
                Err(error) => return Err(self.end(error)),
            };
            match self.work.admit(&command) {
                Ok(true) => return Ok(Some(command)),
                Ok(false) => {}
                Err(error) => {
                    self.unsent = Some(Completion::Refused { id: command.id(), reason: error.to_string() });
                }
            }
        }
        Ok(None)
    }

    fn send_unsent(&mut self) -> Result<Sent, SessionError> {
        let Some(refusal) = self.unsent.take() else { return Ok(Sent::Sent) };
        let sent = self.send(&refusal)?;
        if sent == Sent::Full {
            self.unsent = Some(refusal);
        }
        Ok(sent)
    }

    fn receive(&mut self) -> Result<Option<Command>, SessionError> {
        let State::Attached(endpoint) = &mut self.state else { return Ok(None) };
        if !endpoint.receive(&mut self.buffer)? {
            return Ok(None);
        }
        Ok(Some(decode_command(&self.buffer)?))
    }

    fn send(&mut self, completion: &Completion) -> Result<Sent, SessionError> {
        // To a client that is gone, everything can be said.
        let State::Attached(endpoint) = &mut self.state else { return Ok(Sent::Sent) };
        encode(completion, &mut self.buffer);
        if completion.has_long_text() {
            let mut cut = completion.clone();
            cut.cut_texts();
            encode(&cut, &mut self.buffer);
        }
        match endpoint.send(&self.buffer) {
            Ok(sent) => Ok(sent),
            Err(RingError::TooLong { bytes, limit }) => Err(SessionError::TooLong { bytes, limit }),
            Err(error) => Err(self.end(error.into())),
        }
    }

    /// Sends a completion. [`Sent::Full`] when the client does not keep up: keep it (progress may be dropped)
    /// and try again when the doorbell rings. After the client has gone, everything counts as sent.
    ///
    /// # Errors
    /// [`SessionError::NotUnderWay`] and [`SessionError::TooLong`] are the caller's mistakes, and nothing was sent;
    /// anything else is the client's: drop the session.
    pub fn complete(&mut self, completion: &Completion) -> Result<Sent, SessionError> {
        match completion {
            Completion::Stats { json, .. } if json.len() > MAX_STATS_BYTES => {
                return Err(SessionError::TooLong { bytes: json.len(), limit: MAX_STATS_BYTES });
            }
            _ => {}
        }
        if !self.work.is_answer(completion) {
            return Err(SessionError::NotUnderWay { id: completion.id() });
        }
        let sent = self.send(completion)?;
        if sent == Sent::Sent && !completion.is_interim() {
            self.work.finish(completion.id());
        }
        Ok(sent)
    }

    /// `set_sleeping(true)` before polling: `true` if no command waits, so that it is safe to sleep until
    /// [`ServerSession::fd`] or [`ServerSession::doorbell_fd`] is readable. `set_sleeping(false)` after polling;
    /// it quiets the doorbell and returns `false`.
    pub fn set_sleeping(&mut self, sleeping: bool) -> bool {
        match &mut self.state {
            State::Attached(endpoint) => {
                let safe = endpoint.set_sleeping(sleeping);
                // A refusal that waits for room holds up the commands behind it: the bell rings for room.
                safe || (sleeping && self.unsent.is_some())
            }
            _ => sleeping,
        }
    }

    /// Writes the data plane's heartbeat word; at least every [`crate::BEAT_INTERVAL_MS`].
    pub fn beat(&mut self, now_ns: u64) {
        if let State::Attached(endpoint) = &mut self.state {
            endpoint.beat(now_ns);
        }
    }

    /// Whether the client's heartbeat word has changed within `limit`; look at least every quarter of that. A
    /// client that is silent may only be stopped in a debugger: note it. One that is silent before it has
    /// attached ([`ServerSession::is_attached`]) holds a place for nothing: drop it.
    pub fn peer_alive(&mut self, now_ns: u64, limit: Duration) -> bool {
        match &mut self.state {
            State::Attached(endpoint) => endpoint.peer_alive(now_ns, limit),
            State::Closed => false,
            State::Greeting(_) | State::Offered { .. } => self.greeting.alive(0, now_ns, limit),
        }
    }
}

fn region_refused(token: u64, mut reason: String) -> FromDataPlane {
    cut_text(&mut reason);
    FromDataPlane::RegionRefused { token, reason }
}
