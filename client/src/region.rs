//! Memory that fetched planes land in.

use std::sync::Arc;

use control::SocketError;
use hugepages::{Arena, ArenaError, OutOfBounds, SealError};

use crate::lost::Lost;
use crate::shared::Shared;

/// Memory that this process and the data plane both map. Fetches write to it; [`Region::copy_out`] reads.
///
/// Dropping it unregisters it. While a fetch into it is under way the memory stays, whoever drops what.
#[derive(Clone, Debug)]
pub struct Region(pub(crate) Arc<Memory>);

pub(crate) struct Memory {
    pub(crate) id: u32,
    pub(crate) arena: Arena,
    pub(crate) shared: Arc<Shared>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.arena.bytes();
        f.debug_struct("Memory").field("id", &self.id).field("bytes", &bytes).finish_non_exhaustive()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.shared.retire(self.id);
    }
}

/// Why memory was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// There is no memory for it.
    #[error("no memory for a region: {0}")]
    Memory(#[from] ArenaError),
    /// The data plane does not take it.
    #[error("the data plane refused the region: {reason}")]
    Refused {
        /// Its reason, and what to do.
        reason: String,
    },
    /// The data plane did not answer in time.
    #[error(
        "the data plane did not answer within {timeout_ms} ms: give a longer ClientConfig::timeout (mapping \
         many gigabytes takes seconds), or look at its log"
    )]
    TimedOut {
        /// [`crate::ClientConfig::timeout`], milliseconds.
        timeout_ms: u128,
    },
    /// The memory could be taken away again by others.
    #[error("the region's memory cannot be closed to others: {0}")]
    Seal(#[from] SealError),
    /// The request could not be sent.
    #[error("the region could not be passed to the data plane: {0}")]
    Socket(#[from] SocketError),
    /// The session is over.
    #[error(transparent)]
    Lost(#[from] Lost),
}

impl Region {
    /// Its size, bytes: at least what was asked for.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.arena.bytes()
    }

    /// Its number in this session.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id
    }

    /// The memory itself, to be registered with a GPU or read in place. The data plane writes to it while a
    /// fetch is under way, so there is no slice of it.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.0.arena
    }

    /// Copies from `offset` into `out`. Bytes that a fetch under way will write are of either age.
    ///
    /// # Errors
    /// When the range is not within the region; nothing was copied then.
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) -> Result<(), OutOfBounds> {
        self.0.arena.copy_out(offset, out)
    }
}
