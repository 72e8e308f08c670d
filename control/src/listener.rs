//! Where clients arrive, and what they are granted.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use crate::handshake::refusal;
use crate::server::ServerSession;
use crate::socket::{BindError, Bound};

/// What one data plane grants to its clients. All of it is memory or work that a client can cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Clients at a time, those that have not said hello included.
    pub sessions: usize,
    /// Regions that one client may have registered.
    pub regions: usize,
    /// Memory that one client may have registered, all regions together, bytes.
    pub region_bytes: u64,
    /// Commands of one client under way.
    pub commands: usize,
}

impl Default for Limits {
    /// 64 clients; each 16 regions, 64 GiB of them, and 1024 commands under way.
    fn default() -> Self {
        Self { sessions: 64, regions: 16, region_bytes: 64 << 30, commands: 1024 }
    }
}

/// The socket on which clients arrive. Dropping it removes the socket file.
#[derive(Debug)]
pub struct Listener {
    bound: Bound,
    limits: Limits,
    name: String,
    /// One clone per session: their count is the number of sessions.
    sessions: Arc<()>,
}

impl Listener {
    /// Listens at `path` with [`Limits::default`]. Only those may connect whom `mode` (0o660 in general) lets
    /// write to the file; `group` names the group or its number.
    ///
    /// # Errors
    /// See [`BindError`]; a stale socket file is no error, it is replaced.
    pub fn bind(path: impl AsRef<Path>, mode: u32, group: Option<&str>) -> Result<Self, BindError> {
        let bound = Bound::new(path.as_ref(), mode, group)?;
        let name = format!("shadowserve {}", env!("CARGO_PKG_VERSION"));
        Ok(Self { bound, limits: Limits::default(), name, sessions: Arc::new(()) })
    }

    /// Sets what later clients are granted.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Readable when a client waits.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.bound.fd()
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.bound.path()
    }

    /// Sessions that exist now.
    #[must_use]
    pub fn sessions(&self) -> usize {
        Arc::strong_count(&self.sessions) - 1
    }

    /// The next client, if one waits. Its session becomes usable in [`ServerSession::handle_socket`]; until
    /// then it has no commands. A client beyond [`Limits::sessions`] is told so and let go.
    ///
    /// # Errors
    /// When the system has no descriptor left for it. The client goes on waiting and [`Listener::fd`] stays
    /// readable: wait a little before the next call.
    pub fn accept(&self) -> io::Result<Option<ServerSession>> {
        let Some(stream) = self.bound.accept()? else { return Ok(None) };
        if self.sessions() >= self.limits.sessions {
            let reason = format!(
                "the data plane has {} clients, which is its limit: close one, or raise its limit",
                self.limits.sessions
            );
            let _ = stream.send(&refusal(&reason), &[]);
            return Ok(None);
        }
        let session = ServerSession::new(stream, self.limits, self.name.clone(), Arc::clone(&self.sessions))?;
        Ok(Some(session))
    }
}
