//! Unix sockets that keep message boundaries and carry file descriptors.
//!
//! Everything here is non-blocking and close-on-exec. Who may connect is a matter of the socket file's mode and
//! group; they are in force before the first connection can be made.

use std::fs::Metadata;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::fs::{AtFlags, FlockOperation, Gid, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::handshake::MAX_SOCKET_BYTES;

/// Most descriptors in one message.
pub const MAX_FDS: usize = 4;
/// Connections that wait for [`crate::Listener::accept`].
const BACKLOG: i32 = 64;
/// For how long binding waits for another process that is binding in the same directory.
const BIND_LOCK_WAIT: Duration = Duration::from_secs(2);

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Longer than a socket's address may be.
    #[error("the socket path {path} is too long: use at most 107 bytes")]
    PathTooLong {
        /// As given.
        path: PathBuf,
    },
    /// The directory is not there or not accessible.
    #[error(
        "the directory of the socket {path} cannot be used: {source}; create it, or choose another --socket"
    )]
    Directory {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something listens there.
    #[error("another process already listens on {path}: stop it, or choose another --socket")]
    InUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// A file that is not ours to remove.
    #[error("{path} exists and is not a socket: it is left alone, choose another --socket")]
    NotASocket {
        /// The socket's path.
        path: PathBuf,
    },
    /// No such group.
    #[error(
        "there is no group {group:?}: create it with `groupadd {group}`, or give another group or a number"
    )]
    UnknownGroup {
        /// As given.
        group: String,
    },
    /// The socket's group cannot be set.
    #[error("the group of {path} cannot be set to {group}: {source}; join that group, or start as root")]
    Group {
        /// The socket's path.
        path: PathBuf,
        /// As given.
        group: String,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot listen on {path} ({step}): {source}")]
    System {
        /// The socket's path.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a socket message was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The peer does not read.
    #[error("the peer does not read its socket, whose buffer is full")]
    Full,
    /// The peer closed its end.
    #[error("the peer closed the connection")]
    HungUp,
    /// Longer than any message, or with more descriptors.
    #[error("a socket message exceeds {MAX_SOCKET_BYTES} bytes or {MAX_FDS} descriptors")]
    TooLong,
    /// Anything else.
    #[error("the connection failed: {0}")]
    System(#[from] io::Error),
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::Full,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Self::HungUp,
            errno => Self::System(errno.into()),
        }
    }
}

/// Who is at the other end, as the kernel saw it when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id; 0 if it lives in a PID namespace that this process cannot see.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A connected socket.
#[derive(Debug)]
pub struct Stream(OwnedFd);

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream {
    /// Takes over a connected `SOCK_SEQPACKET` socket.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Readable when a message or the peer's end has arrived.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> Peer {
        getsockopt(&self.0, PeerCredentials).map_or(Peer { pid: 0, uid: u32::MAX, gid: u32::MAX }, |who| {
            Peer { pid: who.pid(), uid: who.uid(), gid: who.gid() }
        })
    }

    /// Sends one message with descriptors, of which the receiver gets duplicates.
    ///
    /// # Errors
    /// [`SocketError::Full`] when the peer does not read, [`SocketError::HungUp`] when it is gone.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        if bytes.len() > MAX_SOCKET_BYTES || fds.len() > MAX_FDS {
            return Err(SocketError::TooLong);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(SocketError::TooLong);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&self.0, &[io::IoSlice::new(bytes)], &mut ancillary, flags)?;
        Ok(())
    }

    /// Receives one message into `bytes`, replacing what was there, and its descriptors; `None` if there is
    /// none now. Descriptors that nobody takes are closed when the list is dropped.
    ///
    /// # Errors
    /// [`SocketError::HungUp`] when the peer is gone, [`SocketError::TooLong`] for an over-long message.
    pub fn receive(&self, bytes: &mut Vec<u8>) -> Result<Option<Vec<OwnedFd>>, SocketError> {
        bytes.resize(MAX_SOCKET_BYTES, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut receive =
            || rustix::net::recvmsg(&self.0, &mut [io::IoSliceMut::new(bytes)], &mut ancillary, flags);
        // A peer that closed with our bytes unread resets the connection; what it had sent before, such as why,
        // can be read after that.
        let received = match receive() {
            Err(Errno::CONNRESET) => receive(),
            received => received,
        };
        let received = match received {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let fds: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(SocketError::TooLong);
        }
        // Our messages are never empty, so this is the end.
        if received.bytes == 0 {
            return Err(SocketError::HungUp);
        }
        bytes.truncate(received.bytes);
        Ok(Some(fds))
    }
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// Connects to the socket at `path`. [`Errno::AGAIN`] means that somebody listens but too many are waiting.
///
/// # Errors
/// What `connect` answers.
pub fn connect(path: &Path) -> Result<Stream, Errno> {
    let socket = new_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(Stream(socket))
}

/// A listening socket and the file that names it.
#[derive(Debug)]
pub(crate) struct Bound {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the socket file, so that only this very file is removed at the end.
    file: Option<(u64, u64)>,
}

impl Bound {
    /// Listens at `path`. A socket file on which nobody answers is removed first; any other file is left alone.
    pub(crate) fn new(path: &Path, mode: u32, group: Option<&str>) -> Result<Self, BindError> {
        let owned = || path.to_owned();
        let system =
            |step| move |errno: Errno| BindError::System { path: owned(), step, source: errno.into() };
        let address = SocketAddrUnix::new(path).map_err(|_| BindError::PathTooLong { path: owned() })?;
        let gid = group.map(|name| lookup_group(name).map(|gid| (name, gid))).transpose()?;
        // Looking for a stale file, removing it and binding are three steps. The lock makes them one among
        // all who bind through here; it lasts until it is dropped.
        let _lock = lock_directory(path)?;
        remove_stale(path)?;

        let socket = new_socket().map_err(system("socket"))?;
        // Linux gives the file the mode of the socket's inode: nobody else can connect before the group is set.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(system("fchmod"))?;
        rustix::net::bind(&socket, &address).map_err(system("bind"))?;
        let mut bound = Self { socket, path: owned(), file: None };
        bound.file = std::fs::symlink_metadata(path).ok().map(|file| identity(&file));
        if let Some((name, gid)) = gid {
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(rustix::fs::CWD, path, None, Some(gid), flags).map_err(|errno| {
                BindError::Group { path: owned(), group: name.to_owned(), source: errno.into() }
            })?;
        }
        rustix::fs::chmod(path, Mode::from_raw_mode(mode & 0o777)).map_err(system("chmod"))?;
        rustix::net::listen(&bound.socket, BACKLOG).map_err(system("listen"))?;
        Ok(bound)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection, if one waits.
    pub(crate) fn accept(&self) -> io::Result<Option<Stream>> {
        match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Ok(Some(Stream(socket))),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let there = std::fs::symlink_metadata(&self.path).ok().map(|file| identity(&file));
        if self.file.is_some() && there == self.file {
            // Nothing to be done about a failure: the next to bind finds that nobody answers and removes it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

fn lookup_group(name: &str) -> Result<Gid, BindError> {
    if let Ok(number) = name.parse::<u32>() {
        return Ok(Gid::from_raw(number));
    }
    match nix::unistd::Group::from_name(name) {
        Ok(Some(group)) => Ok(Gid::from_raw(group.gid.as_raw())),
        _ => Err(BindError::UnknownGroup { group: name.to_owned() }),
    }
}

/// Locks the directory that `path` is in against others who bind there.
fn lock_directory(path: &Path) -> Result<OwnedFd, BindError> {
    let failed = |errno: Errno| BindError::Directory { path: path.to_owned(), source: errno.into() };
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty()).map_err(failed)?;
    let deadline = Instant::now() + BIND_LOCK_WAIT;
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(directory),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(BindError::Directory { path: path.to_owned(), source }),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match connect(path) {
        Err(Errno::CONNREFUSED) => {}
        // A connection, a full backlog, another type of socket, no permission to ask: somebody may be there.
        Ok(_) | Err(_) => return Err(BindError::InUse { path: path.to_owned() }),
    }
    std::fs::remove_file(path).map_err(|source| BindError::System {
        path: path.to_owned(),
        step: "removing the file that a dead process left",
        source,
    })
}
