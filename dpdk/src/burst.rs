//! A handful of mbufs, as devices take and give them.

use std::fmt;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

use crate::mbuf::Mbuf;

/// Mbufs that a [`Burst`] holds at most.
pub const BURST: usize = 32;

/// Up to [`BURST`] mbufs in order, without heap memory. Dereferences to the slice of them; dropping it frees them.
pub struct Burst {
    mbufs: [MaybeUninit<Mbuf>; BURST],
    /// Those from `start` to `end` are there.
    start: usize,
    end: usize,
}

impl Burst {
    /// An empty burst.
    #[inline]
    #[must_use]
    pub const fn new() -> Self {
        Self { mbufs: [const { MaybeUninit::uninit() }; BURST], start: 0, end: 0 }
    }

    /// Mbufs in it.
    #[inline]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether it has none.
    #[inline]
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether it has [`BURST`] of them.
    #[inline]
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.len() == BURST
    }

    /// Adds one at the end.
    ///
    /// # Errors
    /// Gives it back when the burst is full.
    #[inline]
    pub fn push(&mut self, mbuf: Mbuf) -> Result<(), Mbuf> {
        if self.is_full() {
            return Err(mbuf);
        }
        self.move_to_front();
        self.mbufs[self.end].write(mbuf);
        self.end += 1;
        Ok(())
    }

    /// Takes the first.
    #[inline]
    pub fn pop_front(&mut self) -> Option<Mbuf> {
        if self.is_empty() {
            return None;
        }
        let first = self.start;
        self.start += 1;
        // SAFETY: it was there, and is now outside the range.
        Some(unsafe { self.mbufs[first].assume_init_read() })
    }

    /// Takes the last.
    #[inline]
    pub fn pop(&mut self) -> Option<Mbuf> {
        if self.is_empty() {
            return None;
        }
        self.end -= 1;
        // SAFETY: it was there, and is now outside the range.
        Some(unsafe { self.mbufs[self.end].assume_init_read() })
    }

    /// Takes all, in order. Those not taken from the iterator are freed when it is dropped.
    #[inline]
    pub fn drain(&mut self) -> Drain<'_> {
        Drain { burst: self }
    }

    /// Frees all.
    pub fn clear(&mut self) {
        let count = u32::try_from(self.len()).unwrap_or(0);
        let (start, end) = (self.start, self.end);
        (self.start, self.end) = (0, 0);
        if count > 0 {
            let first = self.mbufs[start..end].as_mut_ptr().cast();
            // SAFETY: `count` mbufs that are owned here and were just given up; an Mbuf is a pointer.
            unsafe { dpdk_sys::rte_pktmbuf_free_bulk(first, count) };
        }
    }

    /// The mbufs as the array of pointers that DPDK reads, and their number.
    #[inline]
    pub(crate) fn as_raw(&mut self) -> (*mut *mut dpdk_sys::rte_mbuf, u16) {
        let count = self.len();
        #[expect(clippy::cast_possible_truncation, reason = "at most BURST")]
        (self.mbufs[self.start..].as_mut_ptr().cast(), count as u16)
    }

    /// Gives up the first `n`, which DPDK has taken over.
    ///
    /// # Safety
    /// At most [`Burst::len`], and somebody else owns them now.
    #[inline]
    pub(crate) unsafe fn forget_front(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end, "more taken than there were");
        self.move_to_front();
    }

    /// Where DPDK may write more pointers, and how many.
    #[inline]
    pub(crate) fn spare(&mut self) -> (*mut *mut dpdk_sys::rte_mbuf, usize) {
        self.move_to_front();
        (self.mbufs[self.end..].as_mut_ptr().cast(), BURST - self.end)
    }

    /// Takes over `n` mbufs that were written to [`Burst::spare`].
    ///
    /// # Safety
    /// They were written, and nobody else owns them.
    #[inline]
    pub(crate) unsafe fn grow(&mut self, n: usize) {
        self.end += n;
        debug_assert!(self.end <= BURST, "more written than there was room");
    }

    #[inline]
    fn move_to_front(&mut self) {
        if self.start == 0 {
            return;
        }
        let count = self.len();
        // SAFETY: moves the pointers that are there to the front of the same array.
        unsafe {
            let base = self.mbufs.as_mut_ptr();
            std::ptr::copy(base.add(self.start), base, count);
        }
        (self.start, self.end) = (0, count);
    }
}

impl Default for Burst {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Burst {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Deref for Burst {
    type Target = [Mbuf];

    #[inline]
    fn deref(&self) -> &[Mbuf] {
        let there = &self.mbufs[self.start..self.end];
        // SAFETY: those in the range are there, and MaybeUninit has the layout of what it holds.
        unsafe { &*(std::ptr::from_ref(there) as *const [Mbuf]) }
    }
}

impl DerefMut for Burst {
    #[inline]
    fn deref_mut(&mut self) -> &mut [Mbuf] {
        let there = &mut self.mbufs[self.start..self.end];
        // SAFETY: as above.
        unsafe { &mut *(std::ptr::from_mut(there) as *mut [Mbuf]) }
    }
}

impl fmt::Debug for Burst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Takes the mbufs out of a burst.
#[derive(Debug)]
pub struct Drain<'a> {
    burst: &'a mut Burst,
}

impl Iterator for Drain<'_> {
    type Item = Mbuf;

    #[inline]
    fn next(&mut self) -> Option<Mbuf> {
        self.burst.pop_front()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.burst.len(), Some(self.burst.len()))
    }
}

impl ExactSizeIterator for Drain<'_> {}

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        self.burst.clear();
    }
}
