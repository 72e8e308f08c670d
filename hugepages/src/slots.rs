//! An arena cut into pieces that each have one owner.

use std::fmt;
use std::sync::Arc;

use crate::arena::Arena;
use crate::foreign::SealError;
use crate::page::PageSize;

/// Every slot starts at a multiple of so many bytes.
pub const SLOT_ALIGN_BYTES: usize = 4096;

/// Why an arena was not cut into slots.
#[derive(Debug, thiserror::Error)]
pub enum SlotsError {
    /// The arena is, or was, mapped by another process too, so slices into it would not be exclusive.
    #[error("the arena is shared with another process: slots need one of their own")]
    Shared,
    /// Later writers could not be ruled out.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// Not one slot fits.
    #[error(
        "no slot of {slot_bytes} bytes (in steps of {SLOT_ALIGN_BYTES}) fits an arena of {arena_bytes} bytes: ask for slots \
         of at least 1 byte and an arena of at least one slot"
    )]
    NoneFits {
        /// Bytes asked for in each slot.
        slot_bytes: usize,
        /// Bytes in the arena.
        arena_bytes: usize,
    },
}

/// A private arena cut into equal slots, which are handed out once.
#[derive(Debug)]
pub struct Slots {
    arena: Arc<Arena>,
    slot_bytes: usize,
    count: usize,
    left: Vec<Slot>,
}

impl Slots {
    /// Cuts `arena` into as many slots of `slot_bytes` (rounded up to [`SLOT_ALIGN_BYTES`]) as fit.
    ///
    /// The arena must be this process's alone: its descriptor never passed to another, nor mapped a second time. What
    /// can be checked of that is: arenas that came from a peer or were lent with [`Arena::from_fd`] are refused, and
    /// from here on the kernel refuses new writable mappings.
    pub fn new(arena: Arena, slot_bytes: usize) -> Result<Slots, SlotsError> {
        if arena.is_closed_to_others() {
            return Err(SlotsError::Shared);
        }
        let none_fits = SlotsError::NoneFits { slot_bytes, arena_bytes: arena.bytes() };
        let step = slot_bytes.checked_next_multiple_of(SLOT_ALIGN_BYTES).unwrap_or(0);
        let Some(count) = arena.bytes().checked_div(step).filter(|&count| count > 0) else {
            return Err(none_fits);
        };
        arena.close_to_others()?;
        let arena = Arc::new(arena);
        let left = (0..count)
            .map(|index| {
                // SAFETY: `index * step < bytes`, so this is within the mapping.
                let first = unsafe { arena.first_byte().add(index * step) };
                Slot { arena: Arc::clone(&arena), first, bytes: step, index }
            })
            .collect();
        Ok(Slots { arena, slot_bytes: step, count, left })
    }

    /// All slots, in order of their index; empty when called again.
    pub fn take(&mut self) -> Vec<Slot> {
        std::mem::take(&mut self.left)
    }

    /// How many slots there are, handed out or not.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes in each slot.
    #[must_use]
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Where the arena starts, for registering all of it with a device.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.arena.addr()
    }

    /// Bytes in the arena.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// The pages that the slots stand on.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.arena.page_size()
    }

    /// Why the slots do not stand on larger pages, if larger ones were tried.
    #[must_use]
    pub fn fallback_reason(&self) -> Option<&str> {
        self.arena.fallback_reason()
    }
}

/// A piece of memory with one owner. Keeps its arena mapped.
pub struct Slot {
    arena: Arc<Arena>,
    first: std::ptr::NonNull<u8>,
    bytes: usize,
    index: usize,
}

// SAFETY: a slot owns its bytes as a `Box<[u8]>` would: no other slot overlaps it, and the arena that it came from is
// reachable through slots only.
unsafe impl Send for Slot {}
// SAFETY: as above; `&Slot` gives `&[u8]` only.
unsafe impl Sync for Slot {}

impl Slot {
    /// Its number among the slots of its arena, from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Where it starts, as a number; a multiple of [`SLOT_ALIGN_BYTES`].
    #[must_use]
    pub fn addr(&self) -> usize {
        self.first.as_ptr().addr()
    }

    /// Where it starts, in bytes from the start of its arena.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.addr() - self.arena.addr()
    }

    /// Bytes in it.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `first..first + bytes` is mapped for as long as `arena` lives, initialized (zeroed by the kernel), and
        // belongs to this slot alone.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.bytes) }
    }

    /// Its bytes, to be written.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` is the only way to them.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.bytes) }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("index", &self.index).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
