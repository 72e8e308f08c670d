//! What the store's engine and its caller say to each other.

use std::ops::Range;

use crate::key::Key;
use crate::pull::tag;

/// A chunk that is being taken in, from [`AcceptEvent::Reserve`] to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Intake(pub(super) u32);

impl Intake {
    /// Below `AcceptConfig::max_intakes`, and different for all that are under way: the caller's array index.
    #[inline]
    pub fn slot(self) -> usize {
        usize::from(tag::slot_of(self.0))
    }
}

/// What became of a received datagram that was not dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The engine has taken what it needs.
    Control,
    /// A segment: the caller copies it into the chunk's memory now.
    Segment {
        /// Which chunk.
        intake: Intake,
        /// Where in the chunk it belongs, bytes.
        offset: u64,
        /// Where in the datagram's payload its bytes lie.
        data: Range<usize>,
    },
}

/// Something for the caller to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcceptEvent {
    /// Find memory for a chunk and answer with [`AcceptEngine::reserved`], now or later.
    Reserve {
        /// Which.
        intake: Intake,
        /// Its name.
        key: Key,
        /// Bytes needed.
        bytes: u32,
    },
    /// All bytes have arrived: check them and answer with [`AcceptEngine::verdict`], now or later.
    Arrived {
        /// Which.
        intake: Intake,
        /// Its name, which its header must hold.
        key: Key,
        /// Bytes of the chunk.
        bytes: u32,
        /// Bytes of its header, as offered.
        header_bytes: u32,
    },
    /// It will not arrive: free its memory. Needs no answer.
    Dropped {
        /// Which.
        intake: Intake,
    },
}

/// Why there is no memory for a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Declined {
    /// It is stored already.
    AlreadyStored,
    /// Memory is in use by chunks that are going or coming, or another data plane is putting the same chunk.
    Busy,
    /// Everything that fills the store is pinned.
    Full,
    /// It exceeds the store's whole budget.
    TooLarge,
}

/// What the caller says of a chunk that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PutVerdict {
    /// Right, and visible to lookups from now on.
    Stored,
    /// Right, but another was stored under its name meanwhile.
    AlreadyStored,
    /// Wrong in the places given to [`AcceptEngine::mark_corrupt`].
    Corrupt,
    /// Its header contradicts the format, its size or its name: it would be no better the next time.
    BadChunk,
}
