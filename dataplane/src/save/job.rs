//! What travels between the stages of a save.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use compress::{ChunkWriter, Codecs, Shape};
use control::NotSavedReason;
use gpu_dma::Origin;
use protocol::Key;
use protocol::put::{OfferFailure, OfferId};
use protocol::wire::offer::OfferStatus;

/// What one save wants, shared by every stage.
pub(crate) struct SaveShared {
    /// How they are encoded; fits their shape.
    pub(crate) codecs: Codecs,
    /// Its chunks, in the order that the client named them.
    pub(crate) chunks: Vec<SaveChunk>,
    /// When it must have ended, in nanoseconds of the data plane's clock.
    pub(crate) deadline_ns: u64,
    /// Set once, to have every stage let go of it.
    pub(crate) cancelled: AtomicBool,
}

/// One chunk of a save.
pub(crate) struct SaveChunk {
    pub(crate) key: Key,
    pub(crate) shape: Shape,
    pub(crate) from: Origin,
}

impl SaveShared {
    /// Why nothing more is to be done for it, if so.
    pub(crate) fn is_over(&self, now_ns: u64) -> Option<NotSavedReason> {
        if self.cancelled.load(Relaxed) {
            return Some(NotSavedReason::Cancelled);
        }
        (self.deadline_ns <= now_ns).then_some(NotSavedReason::Deadline)
    }
}

/// How a chunk's way to the store ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SaveOutcome {
    Pending,
    Stored,
    AlreadyStored,
    NotSaved(NotSavedReason),
}

/// A chunk on its way out, and the memory that it is encoded into.
pub(crate) struct SaveJob {
    /// Its save, while it has one.
    pub(crate) save: Option<Arc<SaveShared>>,
    /// Its chunk within the save.
    pub(crate) chunk: usize,
    pub(crate) writer: ChunkWriter,
    /// What its queue's engine calls it.
    pub(crate) offer: Option<OfferId>,
    pub(crate) outcome: SaveOutcome,
}

impl SaveJob {
    pub(crate) fn new(chunk_bytes: usize) -> Box<Self> {
        let writer = ChunkWriter::new(chunk_bytes);
        Box::new(Self { save: None, chunk: 0, writer, offer: None, outcome: SaveOutcome::Pending })
    }

    /// The queue that offers it.
    pub(crate) fn queue(&self, queues: usize) -> usize {
        self.chunk % queues
    }
}

/// The client's word for why a chunk was not saved.
pub(crate) fn not_saved_reason(failure: OfferFailure) -> NotSavedReason {
    match failure {
        OfferFailure::Silent | OfferFailure::Unreachable => NotSavedReason::StoreUnreachable,
        OfferFailure::Deadline => NotSavedReason::Deadline,
        OfferFailure::Busy | OfferFailure::Refused(OfferStatus::Busy) => NotSavedReason::StoreBusy,
        OfferFailure::Cancelled => NotSavedReason::Cancelled,
        OfferFailure::Refused(OfferStatus::Full) => NotSavedReason::StoreFull,
        OfferFailure::Refused(OfferStatus::TooLarge) => NotSavedReason::TooLarge,
        OfferFailure::Refused(OfferStatus::Closed) => NotSavedReason::StoreClosed,
        OfferFailure::Refused(OfferStatus::Corrupt) => NotSavedReason::Corrupt,
        OfferFailure::Refused(_) => NotSavedReason::Refused,
    }
}
