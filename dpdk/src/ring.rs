//! Queues between lcores that carry owned items.

use std::ffi::{CString, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

use arrayvec::ArrayVec;
use rustix::io::Errno;

use crate::burst::BURST;
use crate::eal::{Eal, EalInner};
use crate::mbuf::Mbuf;

/// How producers and consumers of a [`Ring`] keep out of each other's way. Any number of threads may use either end, in every mode; for
/// one thread at each end, [`Ring::spsc`] costs less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RingMode {
    /// Fastest when each thread has a CPU of its own. A thread that the kernel interrupts in the midst of it makes others spin.
    #[default]
    Mpmc,
    /// Relaxed tail: others go on while one is interrupted. For threads that share CPUs.
    Relaxed,
}

/// Why a ring was not made.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// DPDK's names are short.
    #[error("ring name {0:?} must be 1 to 28 bytes long without NUL")]
    BadName(String),
    /// The name is taken.
    #[error("there is already a ring named {0:?}")]
    Exists(String),
    /// Not a size that a ring can have.
    #[error("ring {name:?} cannot have {entries} entries: 1 to 1,073,741,824")]
    BadSize {
        /// Name of the ring.
        name: String,
        /// Entries asked for.
        entries: u32,
    },
    /// Too little memory.
    #[error(
        "no memory for ring {name:?} of {entries} entries: give the EAL more (-m), or ask for fewer entries"
    )]
    NoMemory {
        /// Name of the ring.
        name: String,
        /// Entries asked for.
        entries: u32,
    },
    /// Anything else.
    #[error("ring {name:?} was not made: {reason}")]
    Failed {
        /// Name of the ring.
        name: String,
        /// DPDK's message.
        reason: String,
    },
}

/// What can travel through a [`Ring`]: something owned that is one pointer.
///
/// # Safety
/// `from_raw` undoes `into_raw`, and between the two nobody else uses what the pointer leads to.
pub unsafe trait RingItem: Send + Sized {
    /// Gives the item up as a pointer.
    fn into_raw(self) -> NonNull<c_void>;

    /// Takes it back.
    ///
    /// # Safety
    /// `raw` came from `into_raw` of the same type, and is taken back once.
    unsafe fn from_raw(raw: NonNull<c_void>) -> Self;
}

// SAFETY: a box is one pointer that it owns.
unsafe impl<T: Send> RingItem for Box<T> {
    #[inline]
    fn into_raw(self) -> NonNull<c_void> {
        NonNull::from(Box::leak(self)).cast()
    }

    #[inline]
    unsafe fn from_raw(raw: NonNull<c_void>) -> Self {
        // SAFETY: it came from a box of this type.
        unsafe { Box::from_raw(raw.cast().as_ptr()) }
    }
}

// SAFETY: an mbuf is one pointer that it owns.
unsafe impl RingItem for Mbuf {
    #[inline]
    fn into_raw(self) -> NonNull<c_void> {
        Mbuf::into_raw(self).cast()
    }

    #[inline]
    unsafe fn from_raw(raw: NonNull<c_void>) -> Self {
        // SAFETY: it came from an mbuf.
        unsafe { Mbuf::from_raw(raw.cast()) }
    }
}

/// A first-in first-out queue of fixed capacity, without locks; clones share it. What is in it when the last handle goes is dropped.
pub struct Ring<T: RingItem> {
    raw: Arc<RawRing>,
    items: PhantomData<T>,
}

/// The sending end of a ring with one sender and one receiver.
pub struct RingSender<T: RingItem>(Ring<T>);

/// The receiving end of a ring with one sender and one receiver.
pub struct RingReceiver<T: RingItem>(Ring<T>);

/// A ring and how to drop what is in it.
struct RawRing {
    raw: NonNull<dpdk_sys::rte_ring>,
    drop_item: unsafe fn(NonNull<c_void>),
    _eal: Arc<EalInner>,
}

// SAFETY: rte_ring synchronises producers with consumers, and items are Send.
unsafe impl Send for RawRing {}
// SAFETY: as above; that single-producer and single-consumer ends are used by one thread at a time is for their handles to keep.
unsafe impl Sync for RawRing {}

impl<T: RingItem> Ring<T> {
    /// Makes a ring that holds `entries` items.
    ///
    /// # Errors
    /// See [`RingError`].
    pub fn new(eal: &Eal, name: &str, entries: u32, mode: RingMode) -> Result<Self, RingError> {
        let flags = match mode {
            RingMode::Mpmc => 0,
            RingMode::Relaxed => dpdk_sys::RING_F_MP_RTS_ENQ | dpdk_sys::RING_F_MC_RTS_DEQ,
        };
        Self::with_flags(eal, name, entries, flags)
    }

    /// Makes a ring with one sender and one receiver.
    ///
    /// # Errors
    /// See [`RingError`].
    pub fn spsc(eal: &Eal, name: &str, entries: u32) -> Result<(RingSender<T>, RingReceiver<T>), RingError> {
        let ring = Self::with_flags(eal, name, entries, dpdk_sys::RING_F_SP_ENQ | dpdk_sys::RING_F_SC_DEQ)?;
        Ok((RingSender(ring.clone()), RingReceiver(ring)))
    }

    fn with_flags(eal: &Eal, name: &str, entries: u32, flags: u32) -> Result<Self, RingError> {
        let raw = RawRing {
            raw: create(name, entries, flags)?,
            drop_item: drop_item::<T>,
            _eal: Arc::clone(eal.inner()),
        };
        Ok(Self { raw: Arc::new(raw), items: PhantomData })
    }

    /// Adds one item.
    ///
    /// # Errors
    /// Gives it back when the ring is full.
    #[inline]
    pub fn enqueue(&self, item: T) -> Result<(), T> {
        let raw = item.into_raw();
        // SAFETY: an item of this ring's type, given up just now.
        if unsafe { self.raw.put(&raw, 1) } == 1 {
            return Ok(());
        }
        // SAFETY: the ring did not take it.
        Err(unsafe { T::from_raw(raw) })
    }

    /// Adds items from the front of `items`, as many as there is room for, and returns how many; the rest stays.
    #[inline]
    pub fn enqueue_burst(&self, items: &mut ArrayVec<T, BURST>) -> usize {
        let mut pointers: ArrayVec<NonNull<c_void>, BURST> = items.drain(..).map(T::into_raw).collect();
        // SAFETY: items of this ring's type, given up just now.
        let taken = unsafe { self.raw.put(pointers.as_ptr(), pointers.len()) };
        // SAFETY: the ring did not take these.
        items.extend(pointers.drain(..).skip(taken).map(|raw| unsafe { T::from_raw(raw) }));
        taken
    }

    /// Takes the oldest item.
    #[inline]
    #[must_use]
    pub fn dequeue(&self) -> Option<T> {
        let mut pointer = NonNull::dangling();
        // SAFETY: room for one; what the ring gives is an item of its type.
        (unsafe { self.raw.take(&raw mut pointer, 1) } == 1).then(|| unsafe { T::from_raw(pointer) })
    }

    /// Appends the oldest items to `items`, up to its free room, and returns how many.
    #[inline]
    pub fn dequeue_burst(&self, items: &mut ArrayVec<T, BURST>) -> usize {
        let mut pointers = [NonNull::dangling(); BURST];
        // SAFETY: room for that many.
        let taken = unsafe { self.raw.take(pointers.as_mut_ptr(), items.remaining_capacity()) };
        // SAFETY: what the ring gives are items of its type.
        items.extend(pointers[..taken].iter().map(|&raw| unsafe { T::from_raw(raw) }));
        taken
    }

    /// Items in the ring, at some moment.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        // SAFETY: the ring lives.
        unsafe { dpdk_sys::shim_ring_count(self.raw.raw.as_ptr()) as usize }
    }

    /// Whether it is empty, at some moment.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Items that it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        // SAFETY: the ring lives.
        unsafe { dpdk_sys::shim_ring_capacity(self.raw.raw.as_ptr()) as usize }
    }
}

impl<T: RingItem> Clone for Ring<T> {
    fn clone(&self) -> Self {
        Self { raw: Arc::clone(&self.raw), items: PhantomData }
    }
}

impl<T: RingItem> fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("len", &self.len())
            .field("capacity", &self.capacity())
            .finish_non_exhaustive()
    }
}

impl<T: RingItem> RingSender<T> {
    /// See [`Ring::enqueue`].
    ///
    /// # Errors
    /// Gives the item back when the ring is full.
    #[inline]
    pub fn enqueue(&mut self, item: T) -> Result<(), T> {
        self.0.enqueue(item)
    }

    /// See [`Ring::enqueue_burst`].
    #[inline]
    pub fn enqueue_burst(&mut self, items: &mut ArrayVec<T, BURST>) -> usize {
        self.0.enqueue_burst(items)
    }

    /// Items in the ring, at some moment.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it is empty, at some moment.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Items that it can hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.0.capacity()
    }
}

impl<T: RingItem> RingReceiver<T> {
    /// See [`Ring::dequeue`].
    #[inline]
    #[must_use]
    pub fn dequeue(&mut self) -> Option<T> {
        self.0.dequeue()
    }

    /// See [`Ring::dequeue_burst`].
    #[inline]
    pub fn dequeue_burst(&mut self, items: &mut ArrayVec<T, BURST>) -> usize {
        self.0.dequeue_burst(items)
    }

    /// Items in the ring, at some moment.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it is empty, at some moment.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T: RingItem> fmt::Debug for RingSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: RingItem> fmt::Debug for RingReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl RawRing {
    /// Enqueues up to `n` items, returns how many.
    ///
    /// # Safety
    /// `items` are `n` items of the ring's type; the ring owns those it takes.
    #[inline]
    unsafe fn put(&self, items: *const NonNull<c_void>, n: usize) -> usize {
        let n = u32::try_from(n).unwrap_or(0);
        // SAFETY: as promised by the caller; a NonNull is a pointer.
        unsafe { dpdk_sys::shim_ring_enqueue_burst(self.raw.as_ptr(), items.cast(), n) as usize }
    }

    /// Dequeues up to `n` items, returns how many.
    ///
    /// # Safety
    /// `items` has room for `n`; the caller owns those that were written.
    #[inline]
    unsafe fn take(&self, items: *mut NonNull<c_void>, n: usize) -> usize {
        let n = u32::try_from(n).unwrap_or(0);
        // SAFETY: as promised by the caller; only pointers that are not null were ever enqueued.
        unsafe { dpdk_sys::shim_ring_dequeue_burst(self.raw.as_ptr(), items.cast(), n) as usize }
    }
}

impl Drop for RawRing {
    fn drop(&mut self) {
        let mut item = NonNull::dangling();
        // SAFETY: this was the last handle; there is room for one.
        while unsafe { self.take(&raw mut item, 1) } == 1 {
            // SAFETY: each item is taken once, and has the type that `drop_item` was made for.
            unsafe { (self.drop_item)(item) };
        }
        // SAFETY: no handle is left.
        unsafe { dpdk_sys::rte_ring_free(self.raw.as_ptr()) };
    }
}

/// # Safety
/// As [`RingItem::from_raw`].
unsafe fn drop_item<T: RingItem>(raw: NonNull<c_void>) {
    // SAFETY: as promised by the caller.
    drop(unsafe { T::from_raw(raw) });
}

/// Makes an rte_ring of exactly `entries` entries, on any NUMA node.
pub(crate) fn create(name: &str, entries: u32, flags: u32) -> Result<NonNull<dpdk_sys::rte_ring>, RingError> {
    if entries == 0 || entries > 1 << 30 {
        return Err(RingError::BadSize { name: name.to_owned(), entries });
    }
    let bad_name = || RingError::BadName(name.to_owned());
    // RTE_RING_NAMESIZE.
    let c_name = CString::new(name).ok().filter(|_| (1..=28).contains(&name.len())).ok_or_else(bad_name)?;
    let flags = flags | dpdk_sys::RING_F_EXACT_SZ;
    // SAFETY: the environment is up, whoever calls holds it; the name is copied.
    let raw = unsafe { dpdk_sys::rte_ring_create(c_name.as_ptr(), entries, dpdk_sys::SOCKET_ID_ANY, flags) };
    NonNull::new(raw).ok_or_else(|| {
        // SAFETY: reads a thread-local variable.
        let errno = unsafe { dpdk_sys::shim_errno() };
        let name = name.to_owned();
        match Errno::from_raw_os_error(errno) {
            Errno::EXIST => RingError::Exists(name),
            Errno::NOMEM | Errno::NOSPC | Errno::NOBUFS => RingError::NoMemory { name, entries },
            _ => RingError::Failed { name, reason: crate::error_text(errno) },
        }
    })
}
