//! What travels between the stages of a save.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use arrayvec::ArrayVec;
use compress::{ChunkWriter, Codecs, Shape};
use control::NotSavedReason;
use gpu_dma::Origin;
use protocol::Key;
use protocol::placement::MAX_REPLICAS;
use protocol::put::{OfferEnd, OfferFailure, OfferId};
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

/// How a chunk's way to the stores ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SaveOutcome {
    Pending,
    /// At least one has it.
    Stored(Copies),
    NotSaved(NotSavedReason),
}

/// How the offers of a chunk ended, of which there is one for each store that is to keep it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Copies {
    pub(crate) stored: u8,
    pub(crate) already_stored: u8,
    /// Those that failed, and why the first did.
    pub(crate) failed: u8,
    pub(crate) reason: Option<NotSavedReason>,
}

impl Copies {
    pub(crate) fn add(&mut self, end: OfferEnd) {
        match end {
            OfferEnd::Stored => self.stored += 1,
            OfferEnd::AlreadyStored => self.already_stored += 1,
            OfferEnd::Failed(failure) => {
                self.failed += 1;
                self.reason = self.reason.or(Some(not_saved_reason(failure)));
            }
        }
    }

    /// Stores that have the chunk.
    pub(crate) fn made(&self) -> u8 {
        self.stored + self.already_stored
    }

    /// What became of the chunk, once all offers have ended.
    pub(crate) fn outcome(self) -> SaveOutcome {
        match self.reason {
            Some(reason) if self.made() == 0 => SaveOutcome::NotSaved(reason),
            _ => SaveOutcome::Stored(self),
        }
    }
}

/// A chunk on its way out, and the memory that it is encoded into.
pub(crate) struct SaveJob {
    /// Its save, while it has one.
    pub(crate) save: Option<Arc<SaveShared>>,
    /// Its chunk within the save.
    pub(crate) chunk: usize,
    pub(crate) writer: ChunkWriter,
    /// Its offers under way, as its queue's engine calls them, and how the others ended.
    pub(crate) offers: ArrayVec<OfferId, MAX_REPLICAS>,
    pub(crate) copies: Copies,
    pub(crate) outcome: SaveOutcome,
}

impl SaveJob {
    pub(crate) fn new(chunk_bytes: usize) -> Box<Self> {
        let writer = ChunkWriter::new(chunk_bytes);
        Box::new(Self {
            save: None,
            chunk: 0,
            writer,
            offers: ArrayVec::new(),
            copies: Copies::default(),
            outcome: SaveOutcome::Pending,
        })
    }

    /// The queue that offers it.
    pub(crate) fn queue(&self, queues: usize) -> usize {
        self.chunk % queues
    }
}

/// The client's word for why a chunk was not saved.
fn not_saved_reason(failure: OfferFailure) -> NotSavedReason {
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
