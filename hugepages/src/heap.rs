//! An arena cut into pieces of any size, which come back when they are dropped.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use range_alloc::RangeAllocator;

use crate::arena::Arena;
use crate::page::PageSize;
use crate::slots::SlotsError;

/// Blocks start at, and take, multiples of so many bytes.
pub const BLOCK_ALIGN_BYTES: usize = 4096;

/// A private arena from which blocks of any size are taken and to which they return.
///
/// A block is taken from the smallest hole that holds it, and holes that touch are joined, so that what is lost to
/// fragmentation depends on how sizes differ: blocks of one size lose nothing. Taking and returning a block takes a lock and
/// time in proportion to the number of holes: not for a path that must not wait.
#[derive(Clone)]
pub struct Heap(Arc<Inner>);

struct Inner {
    arena: Arena,
    bytes: usize,
    holes: Mutex<Holes>,
}

struct Holes {
    ranges: RangeAllocator<usize>,
    free_bytes: usize,
    blocks: usize,
}

impl Heap {
    /// Makes a heap of all of `arena`, which must be this process's alone, as for [`crate::Slots::new`].
    ///
    /// # Errors
    /// When the arena is, or may become, another process's too.
    pub fn new(arena: Arena) -> Result<Heap, SlotsError> {
        if arena.is_closed_to_others() {
            return Err(SlotsError::Shared);
        }
        arena.close_to_others()?;
        let bytes = arena.bytes() / BLOCK_ALIGN_BYTES * BLOCK_ALIGN_BYTES;
        let holes = Holes { ranges: RangeAllocator::new(0..bytes), free_bytes: bytes, blocks: 0 };
        Ok(Heap(Arc::new(Inner { arena, bytes, holes: Mutex::new(holes) })))
    }

    /// A block of `bytes`, or `None` if no hole is large enough. What it holds is left over from earlier blocks.
    #[must_use]
    pub fn take(&self, bytes: usize) -> Option<Block> {
        let size = Self::block_bytes(bytes)?;
        let mut holes = self.0.holes();
        let range = holes.ranges.allocate_range(size).ok()?;
        holes.free_bytes -= size;
        holes.blocks += 1;
        // SAFETY: the allocator hands out ranges within `0..self.0.bytes`, which is within the arena's mapping.
        let first = unsafe { self.0.arena.first_byte().add(range.start) };
        Some(Block { heap: Arc::clone(&self.0), first, bytes, range })
    }

    /// Bytes that a block of `bytes` takes from the heap; `None` for none, and for more than an address holds.
    #[must_use]
    pub fn block_bytes(bytes: usize) -> Option<usize> {
        bytes.checked_next_multiple_of(BLOCK_ALIGN_BYTES).filter(|&size| size > 0)
    }

    /// Bytes in all.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Bytes that no block takes, in however many holes.
    #[must_use]
    pub fn free_bytes(&self) -> usize {
        self.0.holes().free_bytes
    }

    /// Blocks that have not come back.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.0.holes().blocks
    }

    /// Where the memory starts, for registering all of it with a device.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.0.arena.addr()
    }

    /// The pages that it stands on.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.0.arena.page_size()
    }

    /// Why it does not stand on larger pages, if larger ones were tried.
    #[must_use]
    pub fn fallback_reason(&self) -> Option<&str> {
        self.0.arena.fallback_reason()
    }
}

impl Inner {
    fn holes(&self) -> MutexGuard<'_, Holes> {
        // The lock is held over whole updates only, none of which panics between two writes.
        self.holes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Heap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heap").field("bytes", &self.bytes()).field("free_bytes", &self.free_bytes()).finish()
    }
}

/// A piece of a heap with one owner. Keeps the arena mapped; its memory is free again when it is dropped.
pub struct Block {
    heap: Arc<Inner>,
    first: NonNull<u8>,
    bytes: usize,
    range: Range<usize>,
}

// SAFETY: a block owns its bytes as a `Box<[u8]>` would: the allocator gives no range out twice before it came back, and the
// arena is reachable through blocks only.
unsafe impl Send for Block {}
// SAFETY: as above; `&Block` gives `&[u8]` only.
unsafe impl Sync for Block {}

impl Block {
    /// Bytes in it: as many as were asked for.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it starts, as a number; a multiple of [`BLOCK_ALIGN_BYTES`].
    #[must_use]
    pub fn addr(&self) -> usize {
        self.first.as_ptr().addr()
    }

    /// Where it starts, in bytes from the start of its heap.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.range.start
    }

    /// Its bytes.
    #[inline]
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `first..first + bytes` is mapped for as long as `heap` lives, initialized (zeroed by the kernel, then
        // written by owners of earlier blocks), and belongs to this block alone.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.bytes) }
    }

    /// Its bytes, to be written.
    #[inline]
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` is the only way to them.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.bytes) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut holes = self.heap.holes();
        holes.free_bytes += self.range.len();
        holes.blocks -= 1;
        holes.ranges.free_range(self.range.clone());
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("offset", &self.offset())
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
