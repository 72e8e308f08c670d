//! Packet buffers.

use std::fmt;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;

use dpdk_sys::rte_mbuf;

/// Bytes left free in front of a packet in a fresh mbuf, for headers to be prepended.
pub const HEADROOM_BYTES: u16 = {
    assert!(dpdk_sys::RTE_PKTMBUF_HEADROOM <= u16::MAX as u32, "the headroom is part of a 16-bit length");
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    {
        dpdk_sys::RTE_PKTMBUF_HEADROOM as u16
    }
};

/// What the device found about a checksum of a received packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// Not looked at: check it in software.
    Unknown,
    /// Right.
    Good,
    /// Wrong: drop the packet.
    Bad,
    /// Not in the packet, which is intact all the same (from a virtual machine on the same host).
    None,
}

/// A packet buffer, or a chain of them that holds one packet. Owned: dropping it returns the whole chain to its pool.
///
/// The content of bytes that [`Mbuf::append`] and [`Mbuf::prepend`] add is whatever was there before.
#[repr(transparent)]
pub struct Mbuf {
    raw: NonNull<rte_mbuf>,
}

// SAFETY: an mbuf may be freed by another thread than the one that took it; its pool is shared by threads.
unsafe impl Send for Mbuf {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for Mbuf {}

/// Reads or writes a field by its C name: the Rust paths of fields differ between DPDK releases.
macro_rules! field {
    ($raw:expr, $offset:ident as $type:ty) => {
        // SAFETY: `$raw` points to an rte_mbuf that lives and is not written by anybody else, and the offset and type are C's own.
        unsafe { $raw.as_ptr().byte_add(dpdk_sys::$offset as usize).cast::<$type>().read() }
    };
    ($raw:expr, $offset:ident as $type:ty = $value:expr) => {{
        let value: $type = $value;
        // SAFETY: as above, and nobody else reads it.
        unsafe { $raw.as_ptr().byte_add(dpdk_sys::$offset as usize).cast::<$type>().write(value) }
    }};
}

pub(crate) use field;

#[inline]
fn bytes_of<'a>(raw: NonNull<rte_mbuf>) -> &'a [u8] {
    let start = field!(raw, SHIM_MBUF_BUF_ADDR as *const u8);
    let offset = usize::from(field!(raw, SHIM_MBUF_DATA_OFF as u16));
    let length = usize::from(field!(raw, SHIM_MBUF_DATA_LEN as u16));
    // SAFETY: data_off and data_len stay within the buffer at buf_addr; callers bind 'a to a borrow of the owning Mbuf.
    unsafe { std::slice::from_raw_parts(start.add(offset), length) }
}

/// Whether the buffer is memory that others read too: it must not be written to.
#[inline]
fn is_external(raw: NonNull<rte_mbuf>) -> bool {
    field!(raw, SHIM_MBUF_OL_FLAGS as u64) & dpdk_sys::RTE_MBUF_F_EXTERNAL != 0
}

impl Mbuf {
    /// Takes over an mbuf.
    ///
    /// # Safety
    /// `raw` is the head of an mbuf chain with a reference count of 1 that nobody else uses, and its pool outlives it.
    #[inline]
    #[must_use]
    pub unsafe fn from_raw(raw: NonNull<rte_mbuf>) -> Self {
        Self { raw }
    }

    /// Gives the mbuf up; whoever takes the pointer frees it.
    #[inline]
    #[must_use]
    pub fn into_raw(self) -> NonNull<rte_mbuf> {
        ManuallyDrop::new(self).raw
    }

    /// The mbuf as DPDK sees it, still owned by this.
    #[inline]
    pub(crate) fn as_raw(&self) -> NonNull<rte_mbuf> {
        self.raw
    }

    /// The packet's bytes in the first buffer.
    #[inline]
    #[must_use]
    pub fn data(&self) -> &[u8] {
        bytes_of(self.raw)
    }

    /// The same, to be changed; empty if the bytes are not the mbuf's own ([`crate::Attacher`]).
    #[inline]
    #[must_use]
    pub fn data_mut(&mut self) -> &mut [u8] {
        let data = if is_external(self.raw) { &[] } else { bytes_of(self.raw) };
        // SAFETY: the mbuf is borrowed exclusively and its buffer belongs to it alone.
        unsafe { std::slice::from_raw_parts_mut(data.as_ptr().cast_mut(), data.len()) }
    }

    /// Bytes of the packet, all buffers of the chain together.
    #[inline]
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        field!(self.raw, SHIM_MBUF_PKT_LEN as u32) as usize
    }

    /// Buffers in the chain, at least 1.
    #[inline]
    #[must_use]
    pub fn segment_count(&self) -> usize {
        usize::from(field!(self.raw, SHIM_MBUF_NB_SEGS as u16))
    }

    /// The bytes of each buffer of the chain, in order.
    #[inline]
    #[must_use]
    pub fn segments(&self) -> Segments<'_> {
        Segments { next: Some(self.raw), owner: PhantomData }
    }

    /// Bytes that can be prepended.
    #[inline]
    #[must_use]
    pub fn headroom(&self) -> usize {
        if is_external(self.raw) {
            return 0;
        }
        usize::from(field!(self.raw, SHIM_MBUF_DATA_OFF as u16))
    }

    /// Bytes that can be appended, to the last buffer of the chain.
    #[inline]
    #[must_use]
    pub fn tailroom(&self) -> usize {
        let last = self.last();
        if is_external(last) {
            return 0;
        }
        let used = usize::from(field!(last, SHIM_MBUF_DATA_OFF as u16))
            + usize::from(field!(last, SHIM_MBUF_DATA_LEN as u16));
        usize::from(field!(last, SHIM_MBUF_BUF_LEN as u16)).saturating_sub(used)
    }

    /// Adds `n` bytes at the end of the last buffer and returns them, or `None` if it has no room for them.
    #[inline]
    pub fn append(&mut self, n: usize) -> Option<&mut [u8]> {
        let last = self.last();
        let added = u16::try_from(n).ok().filter(|_| n <= self.tailroom())?;
        let length = field!(last, SHIM_MBUF_DATA_LEN as u16);
        field!(last, SHIM_MBUF_DATA_LEN as u16 = length + added);
        self.set_total(|total| total + u32::from(added));
        let data = bytes_of(last);
        // SAFETY: the chain is borrowed exclusively and the buffer belongs to it alone; the range is within `data`.
        Some(unsafe { std::slice::from_raw_parts_mut(data.as_ptr().add(usize::from(length)).cast_mut(), n) })
    }

    /// Adds `n` bytes in front of the packet and returns them, or `None` if the first buffer has no room for them.
    #[inline]
    pub fn prepend(&mut self, n: usize) -> Option<&mut [u8]> {
        let offset = field!(self.raw, SHIM_MBUF_DATA_OFF as u16);
        let added = u16::try_from(n).ok().filter(|&added| added <= offset && !is_external(self.raw))?;
        let length = field!(self.raw, SHIM_MBUF_DATA_LEN as u16).checked_add(added)?;
        field!(self.raw, SHIM_MBUF_DATA_OFF as u16 = offset - added);
        field!(self.raw, SHIM_MBUF_DATA_LEN as u16 = length);
        self.set_total(|total| total + u32::from(added));
        Some(&mut self.data_mut()[..n])
    }

    /// Removes the first `n` bytes of the packet; false, and nothing is changed, if the first buffer holds fewer.
    #[inline]
    pub fn trim_front(&mut self, n: usize) -> bool {
        let length = field!(self.raw, SHIM_MBUF_DATA_LEN as u16);
        let Some(removed) = u16::try_from(n).ok().filter(|&removed| removed <= length) else { return false };
        let offset = field!(self.raw, SHIM_MBUF_DATA_OFF as u16);
        field!(self.raw, SHIM_MBUF_DATA_OFF as u16 = offset + removed);
        field!(self.raw, SHIM_MBUF_DATA_LEN as u16 = length - removed);
        self.set_total(|total| total.saturating_sub(u32::from(removed)));
        true
    }

    /// Removes the last `n` bytes of the packet; false, and nothing is changed, if the last buffer holds fewer.
    #[inline]
    pub fn trim_back(&mut self, n: usize) -> bool {
        let last = self.last();
        let length = field!(last, SHIM_MBUF_DATA_LEN as u16);
        let Some(removed) = u16::try_from(n).ok().filter(|&removed| removed <= length) else { return false };
        field!(last, SHIM_MBUF_DATA_LEN as u16 = length - removed);
        self.set_total(|total| total.saturating_sub(u32::from(removed)));
        true
    }

    /// Appends the buffers of `tail` to this packet without copying.
    ///
    /// # Errors
    /// Gives `tail` back when the chain would have more buffers than DPDK can count (65,535).
    #[inline]
    pub fn chain(&mut self, tail: Mbuf) -> Result<(), Mbuf> {
        // SAFETY: two chains that we own; on success the second becomes part of the first.
        if unsafe { dpdk_sys::shim_mbuf_chain(self.raw.as_ptr(), tail.raw.as_ptr()) } != 0 {
            return Err(tail);
        }
        let _ = tail.into_raw();
        Ok(())
    }

    /// What the device found about the IP header's checksum.
    #[inline]
    #[must_use]
    pub fn ip_checksum(&self) -> Checksum {
        self.checksum(dpdk_sys::RTE_MBUF_F_RX_IP_CKSUM_GOOD, dpdk_sys::RTE_MBUF_F_RX_IP_CKSUM_BAD)
    }

    /// What the device found about the UDP or TCP checksum.
    #[inline]
    #[must_use]
    pub fn l4_checksum(&self) -> Checksum {
        self.checksum(dpdk_sys::RTE_MBUF_F_RX_L4_CKSUM_GOOD, dpdk_sys::RTE_MBUF_F_RX_L4_CKSUM_BAD)
    }

    /// Takes over what the device found about the checksums of `other`, whose bytes this packet has.
    #[inline]
    pub fn copy_checksum_flags(&mut self, other: &Self) {
        const FLAGS: u64 = dpdk_sys::RTE_MBUF_F_RX_IP_CKSUM_GOOD
            | dpdk_sys::RTE_MBUF_F_RX_IP_CKSUM_BAD
            | dpdk_sys::RTE_MBUF_F_RX_L4_CKSUM_GOOD
            | dpdk_sys::RTE_MBUF_F_RX_L4_CKSUM_BAD;
        let found = field!(other.raw, SHIM_MBUF_OL_FLAGS as u64) & FLAGS;
        let flags = field!(self.raw, SHIM_MBUF_OL_FLAGS as u64) & !FLAGS;
        field!(self.raw, SHIM_MBUF_OL_FLAGS as u64 = flags | found);
    }

    /// Has the CPU fetch the packet's first bytes, its headers, into its cache.
    #[inline]
    pub fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let data = self.data().as_ptr().cast::<i8>();
            // SAFETY: a prefetch reads nothing that the program could see, whatever the address.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(data);
                _mm_prefetch::<_MM_HINT_T0>(data.wrapping_add(64));
            }
        }
    }

    /// The hash by which the device chose the receive queue; 0 if it does not say.
    #[inline]
    #[must_use]
    pub fn rss_hash(&self) -> u32 {
        let hashed = field!(self.raw, SHIM_MBUF_OL_FLAGS as u64) & dpdk_sys::RTE_MBUF_F_RX_RSS_HASH != 0;
        if hashed { field!(self.raw, SHIM_MBUF_HASH_RSS as u32) } else { 0 }
    }

    /// Asks the device to fill in the UDP checksum and, for IPv4, the header checksum, when the packet is sent. The caller writes the
    /// pseudo-header's sum into the UDP checksum field and 0 into the IPv4 header's, and has made sure that the port can do it
    /// ([`crate::Capabilities`]). `l2_len` and `l3_len` are the bytes of the link and the network header, at most 127 and 511; false,
    /// and nothing is asked for, if they are more.
    #[inline]
    pub fn request_tx_checksum(&mut self, l2_len: u8, l3_len: u16, ipv6: bool) -> bool {
        if l2_len > 127 || l3_len > 511 {
            return false;
        }
        let ip = if ipv6 {
            dpdk_sys::RTE_MBUF_F_TX_IPV6
        } else {
            dpdk_sys::RTE_MBUF_F_TX_IPV4 | dpdk_sys::RTE_MBUF_F_TX_IP_CKSUM
        };
        let flags = field!(self.raw, SHIM_MBUF_OL_FLAGS as u64);
        field!(self.raw, SHIM_MBUF_OL_FLAGS as u64 = flags | ip | dpdk_sys::RTE_MBUF_F_TX_UDP_CKSUM);
        // 7 bits of l2_len, 9 of l3_len, 8 of l4_len: the order on little-endian machines, which are all that DPDK runs on here.
        field!(self.raw, SHIM_MBUF_TX_OFFLOAD as u64 = u64::from(l2_len) | u64::from(l3_len) << 7 | 8 << 16);
        true
    }

    #[inline]
    fn checksum(&self, good: u64, bad: u64) -> Checksum {
        let flags = field!(self.raw, SHIM_MBUF_OL_FLAGS as u64);
        match (flags & good != 0, flags & bad != 0) {
            (false, false) => Checksum::Unknown,
            (true, false) => Checksum::Good,
            (false, true) => Checksum::Bad,
            (true, true) => Checksum::None,
        }
    }

    #[inline]
    fn set_total(&mut self, change: impl FnOnce(u32) -> u32) {
        let total = field!(self.raw, SHIM_MBUF_PKT_LEN as u32);
        field!(self.raw, SHIM_MBUF_PKT_LEN as u32 = change(total));
    }

    #[inline]
    fn last(&self) -> NonNull<rte_mbuf> {
        let mut last = self.raw;
        // Where the next is lies in another cache line, which is not looked at for nothing.
        if self.segment_count() == 1 {
            return last;
        }
        // Bounded: a chain has at most 65,535 buffers and no cycle.
        while let Some(next) = NonNull::new(field!(last, SHIM_MBUF_NEXT as *mut rte_mbuf)) {
            last = next;
        }
        last
    }
}

impl fmt::Debug for Mbuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mbuf")
            .field("total_bytes", &self.total_bytes())
            .field("segments", &self.segment_count())
            .finish()
    }
}

impl Drop for Mbuf {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: this is the only owner of the chain.
        unsafe { dpdk_sys::shim_mbuf_free(self.raw.as_ptr()) }
    }
}

/// Iterates over the buffers of a chain.
#[derive(Debug, Clone)]
pub struct Segments<'a> {
    next: Option<NonNull<rte_mbuf>>,
    owner: PhantomData<&'a Mbuf>,
}

impl<'a> Iterator for Segments<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        let current = self.next?;
        self.next = NonNull::new(field!(current, SHIM_MBUF_NEXT as *mut rte_mbuf));
        Some(bytes_of(current))
    }
}
