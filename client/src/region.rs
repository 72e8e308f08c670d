//! Memory that fetched planes land in.

use std::sync::{Arc, PoisonError};

use control::{GpuMemoryError, PagedKv, RingKv, SocketError};
use hugepages::{Arena, ArenaError, OutOfBounds, SealError};

use crate::gpu::{Consumer, RingError};
use crate::lost::Lost;
use crate::shared::Shared;

/// Memory that this process and the data plane both map. Fetches write to it; [`Region::copy_out`] reads.
///
/// Dropping it unregisters it. While a fetch into it is under way the memory stays, whoever drops what.
#[derive(Clone, Debug)]
pub struct Region(pub(crate) Arc<Memory>);

pub(crate) struct Memory {
    pub(crate) id: u32,
    pub(crate) held: Held,
    pub(crate) shared: Arc<Shared>,
}

/// What was registered.
pub(crate) enum Held {
    /// Memory of this machine.
    Host(Arena),
    /// A paged KV cache on a GPU.
    Pages(PagedKv),
    /// A ring on a GPU, and its host side.
    Ring { ring: RingKv, consumer: Consumer },
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Held::Ring { consumer, .. } = &mut self.held
            && !self.shared.is_forked()
        {
            consumer.get_mut().unwrap_or_else(PoisonError::into_inner).revoke();
        }
        self.shared.retire(self.id);
    }
}

/// Why memory was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// There is no memory for it.
    #[error("no memory for a region: {0}")]
    Memory(#[from] ArenaError),
    /// GPU memory was described wrongly.
    #[error(transparent)]
    Gpu(#[from] GpuMemoryError),
    /// A ring could not be made.
    #[error(transparent)]
    Ring(#[from] RingError),
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
        self.arena().bytes()
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
        match &self.0.held {
            Held::Host(arena) => arena,
            Held::Pages(_) | Held::Ring { .. } => unreachable!("a region is host memory"),
        }
    }

    /// Copies from `offset` into `out`. Bytes that a fetch under way will write are of either age.
    ///
    /// # Errors
    /// When the range is not within the region; nothing was copied then.
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) -> Result<(), OutOfBounds> {
        self.arena().copy_out(offset, out)
    }
}
