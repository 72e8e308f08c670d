//! Reading and writing memory that another process may write at the same moment.
//!
//! # Why this is sound
//!
//! The other process is outside of Rust's memory model, but its effect is that of a thread that races with us, so
//! three rules hold here, as they do in Firecracker's `vm-memory`:
//!
//! 1. No `&[u8]` and no `&mut [u8]` into a shared arena ever exists. A reference would promise the compiler that the
//!    bytes stay as they are. Words that both ends touch are reached as atomics only.
//! 2. Bytes are copied by the C library's `memcpy`, through a pointer whose value the compiler cannot know. To the
//!    compiler this is a foreign function that may do anything to memory that has escaped, such as relaxed atomic loads
//!    and stores of single bytes, which is what it amounts to: every byte that arrives is one that was there at some
//!    moment, and bytes may come from different moments. In particular the compiler cannot read the source a second
//!    time after a check (it may with `ptr::copy_nonoverlapping`, whose copies it is free to forward).
//! 3. Callers copy out once, then check the copy.
//!
//! Two threads of this process that copy to and from the same range at once get mixed bytes for the same reason, and
//! nothing worse. A word in use as an atomic should not be copied over at the same time.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::arena::Arena;

/// The range does not lie within the arena. Nothing was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {offset}..+{bytes} lie outside of an arena of {arena_bytes} bytes")]
pub struct OutOfBounds {
    /// First byte asked for.
    pub offset: usize,
    /// Number of bytes asked for.
    pub bytes: usize,
    /// Bytes in the arena.
    pub arena_bytes: usize,
}

type CopyFn = unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> *mut c_void;
type FillFn = unsafe extern "C" fn(*mut c_void, i32, usize) -> *mut c_void;

/// The C library's `memcpy` as a function of which the compiler knows nothing.
#[inline(always)]
fn opaque_memcpy() -> CopyFn {
    let mut function: CopyFn = libc::memcpy;
    // SAFETY: an empty template leaves the register as it is; naming it as an output makes its value unknown to the
    // compiler, which is needed so that it does not see a `memcpy` that it may split, forward or repeat.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) function, options(nostack, preserves_flags)) };
    function
}

#[inline(always)]
fn opaque_memset() -> FillFn {
    let mut function: FillFn = libc::memset;
    // SAFETY: as in `opaque_memcpy`.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) function, options(nostack, preserves_flags)) };
    function
}

impl Arena {
    /// The first byte of `offset..offset + bytes`, if all of it lies within the arena.
    #[inline]
    pub(crate) fn range(&self, offset: usize, bytes: usize) -> Result<NonNull<u8>, OutOfBounds> {
        match offset.checked_add(bytes) {
            // SAFETY: `offset <= end <= self.bytes()`, so the result points into the mapping or one past its end.
            Some(end) if end <= self.bytes() => Ok(unsafe { self.first_byte().add(offset) }),
            _ => Err(OutOfBounds { offset, bytes, arena_bytes: self.bytes() }),
        }
    }

    /// Copies `bytes` to `offset`. The other process may see any mixture of old and new bytes until both ends
    /// synchronize on an atomic word of the arena.
    #[inline]
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), OutOfBounds> {
        let to = self.range(offset, bytes.len())?;
        // SAFETY: `range` checked that the destination lies in this arena's mapping, which is writable and whose pages
        // cannot go away; `bytes` is a live slice, and cannot overlap since no slice into an arena exists.
        unsafe { opaque_memcpy()(to.as_ptr().cast(), bytes.as_ptr().cast(), bytes.len()) };
        Ok(())
    }

    /// Fills `bytes` from `offset`. Check what was copied out, never the arena.
    #[inline]
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) -> Result<(), OutOfBounds> {
        let from = self.range(offset, bytes.len())?;
        // SAFETY: as in `copy_in`, with the directions changed.
        unsafe { opaque_memcpy()(bytes.as_mut_ptr().cast(), from.as_ptr().cast(), bytes.len()) };
        Ok(())
    }

    /// Writes zeros to `offset..offset + bytes`.
    pub fn zero(&self, offset: usize, bytes: usize) -> Result<(), OutOfBounds> {
        let to = self.range(offset, bytes)?;
        // SAFETY: `range` checked that these bytes lie in this arena's writable mapping.
        unsafe { opaque_memset()(to.as_ptr().cast(), 0, bytes) };
        Ok(())
    }

    /// The 8-byte word at `offset`; `None` if it is not 8-byte aligned or not within the arena.
    #[inline]
    #[must_use]
    pub fn atomic_u64(&self, offset: usize) -> Option<&AtomicU64> {
        let at = self.range(offset, 8).ok().filter(|_| offset.is_multiple_of(8))?;
        // SAFETY: in bounds and aligned (the mapping starts on a page), lives as long as `self`, and an atomic may be
        // written by others while it is referred to.
        Some(unsafe { AtomicU64::from_ptr(at.as_ptr().cast()) })
    }

    /// The 4-byte word at `offset`; `None` if it is not 4-byte aligned or not within the arena.
    #[inline]
    #[must_use]
    pub fn atomic_u32(&self, offset: usize) -> Option<&AtomicU32> {
        let at = self.range(offset, 4).ok().filter(|_| offset.is_multiple_of(4))?;
        // SAFETY: as in `atomic_u64`.
        Some(unsafe { AtomicU32::from_ptr(at.as_ptr().cast()) })
    }
}
