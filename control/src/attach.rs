//! The serving process's side of a session: connecting, and the two rings. The `client` crate drives it; a
//! serving process uses that.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hugepages::Arena;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::codec::{DecodeError, decode_completion, encode};
use crate::gpu::GpuMemory;
use crate::handshake::{FromClient, FromDataPlane, HandshakeError, WELCOME_FDS, datagram, parse};
use crate::message::{Command, Completion, cut_text};
use crate::ring::RingError;
use crate::session::{Endpoint, Sent, SessionMemoryError, Side, open};
use crate::socket::{Peer, SocketError, Stream, connect};

/// Why no session came about.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Nobody listens.
    #[error("no data plane listens on {path}: start one with `shadowserve dataplane --socket {path}`")]
    NoDataPlane {
        /// The socket's path.
        path: PathBuf,
    },
    /// The socket's mode and group do not let this process in.
    #[error(
        "no permission to connect to {path}: it admits the group it was started with; add this process's user \
         to that group (see `ls -l {path}`), or start the data plane with another --socket-group"
    )]
    Permission {
        /// The socket's path.
        path: PathBuf,
    },
    /// Not a path that can name a socket.
    #[error("{path} cannot name a socket: a socket's path has at most 107 bytes")]
    BadPath {
        /// As given.
        path: PathBuf,
    },
    /// Somebody listens and does not answer.
    #[error(
        "the data plane on {path} did not answer within {waited_ms} ms: it hangs or is overloaded; look at its \
         log, or give a longer timeout"
    )]
    Timeout {
        /// The socket's path.
        path: PathBuf,
        /// How long was waited, milliseconds.
        waited_ms: u128,
    },
    /// It is another version, or refused, or is no data plane.
    #[error("no session with the data plane on {path}: {source}")]
    Handshake {
        /// The socket's path.
        path: PathBuf,
        /// What came instead of a welcome.
        source: HandshakeError,
    },
    /// The memory that came with the welcome cannot be used.
    #[error(transparent)]
    Memory(#[from] SessionMemoryError),
    /// The connection broke during the handshake.
    #[error("the connection to {path} failed: {source}")]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// How.
        source: SocketError,
    },
}

/// Why an attached session is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum ClientSessionError {
    /// The socket failed or hung up.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The data plane ended the session, or sent nonsense over the socket.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The data plane wrote nonsense into the ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The data plane sent what is no completion.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// The data plane's answer to [`ClientSession::register`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionReply {
    /// As given with the request.
    pub token: u64,
    /// The region's number, or why there is none.
    pub result: Result<u32, String>,
}

/// An attached session. Nothing here blocks; whoever owns it polls [`ClientSession::fd`] and
/// [`ClientSession::doorbell_fd`].
#[derive(Debug)]
pub struct ClientSession {
    stream: Stream,
    endpoint: Endpoint,
    line: Arc<OwnedFd>,
    data_plane: String,
    buffer: Vec<u8>,
    /// Of the process that connected.
    pid: u32,
}

impl Drop for ClientSession {
    /// Hangs up, whoever still holds duplicates of the socket; but not in a forked child, whose parent goes on.
    fn drop(&mut self) {
        if std::process::id() == self.pid {
            // Fails only if the peer hung up first.
            let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
        }
    }
}

impl ClientSession {
    /// Connects to the data plane at `path`, waiting at most `timeout`. `name` is for its logs.
    ///
    /// # Errors
    /// See [`AttachError`]; each says what to do.
    pub fn connect(path: &Path, name: &str, timeout: Duration) -> Result<Self, AttachError> {
        let start = Instant::now();
        let deadline = start.checked_add(timeout);
        let timed_out =
            || AttachError::Timeout { path: path.to_owned(), waited_ms: start.elapsed().as_millis() };
        let socket = |source| AttachError::Socket { path: path.to_owned(), source };
        let handshake = |source| AttachError::Handshake { path: path.to_owned(), source };

        let stream = dial(path, deadline)?.ok_or_else(timed_out)?;
        let mut name = name.to_owned();
        cut_text(&mut name);
        match stream.send(&datagram(&FromClient::Hello { name }), &[]) {
            // Turned away before it could say hello: the reason waits to be read.
            Ok(()) | Err(SocketError::HungUp) => {}
            Err(error) => return Err(socket(error)),
        }
        let mut buffer = Vec::new();
        let fds = await_message(&stream, &mut buffer, deadline).map_err(socket)?.ok_or_else(timed_out)?;
        let FromDataPlane::Welcome { name: data_plane } = parse(&buffer).map_err(handshake)? else {
            return Err(handshake(HandshakeError::Foreign));
        };
        let count = fds.len();
        let mut fds = fds.into_iter();
        let (Some(memory), Some(line), WELCOME_FDS) = (fds.next(), fds.next(), count) else {
            return Err(handshake(HandshakeError::Foreign));
        };
        let line = Arc::new(line);
        let endpoint = Endpoint::new(open(memory)?, Side::Client, Arc::clone(&line))?;
        endpoint.beat(crate::now_ns());
        stream.send(&datagram(&FromClient::Attached), &[]).map_err(socket)?;
        Ok(Self { stream, endpoint, line, data_plane, buffer, pid: std::process::id() })
    }

    /// What the data plane calls itself: program and version.
    #[must_use]
    pub fn data_plane(&self) -> &str {
        &self.data_plane
    }

    /// The data plane's process, user and group.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.stream.peer()
    }

    /// The socket: readable when an answer about a region, or the end, has arrived.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.fd()
    }

    /// The doorbell: readable when the data plane has rung.
    #[must_use]
    pub fn doorbell_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }

    /// Duplicates of [`ClientSession::fd`] and [`ClientSession::doorbell_fd`], to be polled without holding
    /// the session.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn poll_fds(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([self.fd().try_clone_to_owned()?, self.doorbell_fd().try_clone_to_owned()?])
    }

    /// Asks for `arena` to be registered; the answer comes from [`ClientSession::handle_socket`].
    ///
    /// # Errors
    /// When the socket is gone or full.
    pub fn register(&self, token: u64, arena: &Arena) -> Result<(), SocketError> {
        let bytes = arena.bytes() as u64;
        self.stream.send(&datagram(&FromClient::Register { token, bytes }), &[arena.fd()])
    }

    /// Asks for GPU memory to be registered, with `words`, its host memory, if it is a ring; the answer comes from
    /// [`ClientSession::handle_socket`].
    ///
    /// # Errors
    /// When the socket is gone or full.
    pub fn register_gpu(
        &self,
        token: u64,
        memory: &GpuMemory,
        words: Option<&Arena>,
    ) -> Result<(), SocketError> {
        let request = datagram(&FromClient::RegisterGpu { token, memory: memory.clone() });
        let fds: Vec<BorrowedFd<'_>> = words.map(Arena::fd).into_iter().collect();
        self.stream.send(&request, &fds)
    }

    /// The next answer about a region, if one has arrived.
    ///
    /// # Errors
    /// When the data plane is gone, ended the session, or broke the protocol.
    pub fn handle_socket(&mut self) -> Result<Option<RegionReply>, ClientSessionError> {
        if self.stream.receive(&mut self.buffer)?.is_none() {
            return Ok(None);
        }
        match parse(&self.buffer)? {
            FromDataPlane::Registered { token, region } => {
                Ok(Some(RegionReply { token, result: Ok(region) }))
            }
            FromDataPlane::RegionRefused { token, mut reason } => {
                cut_text(&mut reason);
                Ok(Some(RegionReply { token, result: Err(reason) }))
            }
            FromDataPlane::Welcome { .. } => {
                Err(HandshakeError::Malformed(postcard::Error::DeserializeBadEnum).into())
            }
        }
    }

    /// Sends a command. [`Sent::Full`] when the data plane does not keep up: the doorbell rings for room.
    ///
    /// # Errors
    /// When the command is too long, or the data plane corrupted the ring.
    pub fn send(&mut self, command: &Command) -> Result<Sent, RingError> {
        encode(command, &mut self.buffer);
        self.endpoint.send(&self.buffer)
    }

    /// The next completion, if one has arrived.
    ///
    /// # Errors
    /// When the data plane broke the protocol: end the session.
    pub fn next_completion(&mut self) -> Result<Option<Completion>, ClientSessionError> {
        if !self.endpoint.receive(&mut self.buffer)? {
            return Ok(None);
        }
        Ok(Some(decode_completion(&self.buffer)?))
    }

    /// As [`crate::ServerSession::set_sleeping`].
    pub fn set_sleeping(&mut self, sleeping: bool) -> bool {
        self.endpoint.set_sleeping(sleeping)
    }

    /// Writes the client's heartbeat word; at least every [`crate::BEAT_INTERVAL_MS`].
    pub fn beat(&self, now_ns: u64) {
        self.endpoint.beat(now_ns);
    }

    /// Whether the data plane's heartbeat word has changed within `limit`; look at least every quarter of that.
    pub fn peer_alive(&mut self, now_ns: u64, limit: Duration) -> bool {
        self.endpoint.peer_alive(now_ns, limit)
    }
}

/// Connects; `None` if the deadline passed while too many others were waiting.
fn dial(path: &Path, deadline: Option<Instant>) -> Result<Option<Stream>, AttachError> {
    let path = path.to_owned();
    loop {
        match connect(&path) {
            Ok(stream) => return Ok(Some(stream)),
            Err(Errno::AGAIN | Errno::INTR) if !passed(deadline) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(Errno::NOENT | Errno::CONNREFUSED) => return Err(AttachError::NoDataPlane { path }),
            Err(Errno::ACCESS | Errno::PERM) => return Err(AttachError::Permission { path }),
            Err(Errno::NAMETOOLONG | Errno::INVAL) => return Err(AttachError::BadPath { path }),
            Err(errno) => return Err(AttachError::Socket { path, source: errno.into() }),
        }
    }
}

fn passed(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

/// Waits for one message; `None` if the deadline passed.
fn await_message(
    stream: &Stream,
    buffer: &mut Vec<u8>,
    deadline: Option<Instant>,
) -> Result<Option<Vec<OwnedFd>>, SocketError> {
    loop {
        if let Some(fds) = stream.receive(buffer)? {
            return Ok(Some(fds));
        }
        if passed(deadline) {
            return Ok(None);
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(&mut [PollFd::new(stream, PollFlags::IN)], left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
