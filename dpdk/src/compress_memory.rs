//! Memory in one piece that a device sees as an mbuf or a chain of them.

use std::ptr::NonNull;

use dpdk_sys::rte_mbuf;

use crate::compress::DevInner;
use crate::compress_error::CompressError;
use crate::mbuf::{Mbuf, Segments};

/// Bytes of one mbuf at most: their number has 16 bits, and pieces start at cache lines.
pub(crate) const PIECE_BYTES: usize = 65_472;

/// A destination has so many bytes more than the output: a driver that has filled the destination before it has read the end of the stream, which
/// may lie in the source's next buffer, reports that the destination was too small.
pub(crate) const OUTPUT_SLACK_BYTES: usize = 64;

/// In front of the data: the count of mbufs that are attached to it, on a cache line of its own.
const FRONT_BYTES: usize = 64;

const _: () = assert!(size_of::<dpdk_sys::rte_mbuf_ext_shared_info>() <= FRONT_BYTES);

/// Memory of DPDK's own, so that a device can reach it, and the mbufs attached to it.
pub(crate) struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    /// Dropped before the memory is freed.
    mbuf: Option<Mbuf>,
    /// The device reads the packet's length, not the buffer's.
    is_long: bool,
}

impl Memory {
    /// A destination of the device's size.
    pub(crate) fn destination(dev: &DevInner) -> Result<Self, CompressError> {
        Self::new(dev, dev.output_bytes + OUTPUT_SLACK_BYTES)
    }

    /// A source for a device that reads no chains.
    pub(crate) fn source(dev: &DevInner) -> Result<Self, CompressError> {
        Self::new(dev, dev.max_linear_bytes())
    }

    fn new(dev: &DevInner, bytes: usize) -> Result<Self, CompressError> {
        let no_memory = || CompressError::NoMemory { name: dev.name.clone(), mib: bytes.div_ceil(1 << 20) };
        // SAFETY: returns memory of that size and alignment, or null.
        let front = unsafe {
            dpdk_sys::rte_malloc_socket(std::ptr::null(), FRONT_BYTES + bytes, 64, dpdk_sys::SOCKET_ID_ANY)
        };
        let front = NonNull::new(front.cast::<u8>()).ok_or_else(no_memory)?;
        // SAFETY: the memory is FRONT_BYTES longer.
        let start = unsafe { front.add(FRONT_BYTES) };
        // Written now, so that reading what a device says it has written is never reading what nobody has.
        // SAFETY: `bytes` bytes from `start` are ours.
        unsafe { start.as_ptr().write_bytes(0xff, bytes) };
        let mut memory = Self { start, bytes, mbuf: None, is_long: dev.long_buffers };
        let pieces = if memory.is_long { 1 } else { bytes.div_ceil(PIECE_BYTES) };
        let shared = front.cast::<dpdk_sys::rte_mbuf_ext_shared_info>().as_ptr();
        // SAFETY: the front is large enough, aligned, and lives as long as the mbufs that point to it.
        unsafe { dpdk_sys::shim_mbuf_share(shared, u16::try_from(pieces).unwrap_or(u16::MAX)) };
        for piece in 0..pieces {
            let offset = piece * PIECE_BYTES;
            let length = if memory.is_long { bytes } else { PIECE_BYTES.min(bytes - offset) };
            let data = u16::try_from(length).unwrap_or(u16::MAX);
            let mbuf = dev.mbufs().alloc().ok_or_else(no_memory)?;
            let raw = mbuf.into_raw();
            // SAFETY: a fresh mbuf of ours; the memory from `offset` on has `length` bytes.
            let mbuf = unsafe {
                let data_start = start.as_ptr().add(offset).cast();
                let packet = u32::try_from(length).unwrap_or(u32::MAX);
                dpdk_sys::shim_mbuf_attach(raw.as_ptr(), data_start, data, packet, shared);
                Mbuf::from_raw(raw)
            };
            match &mut memory.mbuf {
                None => memory.mbuf = Some(mbuf),
                Some(head) => head.chain(mbuf).map_err(|_| no_memory())?,
            }
        }
        Ok(memory)
    }

    /// The mbuf or chain.
    pub(crate) fn mbuf(&self) -> NonNull<rte_mbuf> {
        self.mbuf.as_ref().map_or(NonNull::dangling(), Mbuf::as_raw)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its first `n` bytes, which no device is writing.
    pub(crate) fn get(&self, n: usize) -> &[u8] {
        assert!(n <= self.bytes, "a device wrote no more than there is");
        // SAFETY: that many bytes are ours and were written when the memory was made.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), n) }
    }

    /// Copies the segments but their first `skip` bytes, which must fit, and returns the mbuf to hand to the device.
    pub(crate) fn fill(&mut self, segments: Segments<'_>, skip: usize) -> NonNull<rte_mbuf> {
        // SAFETY: the memory is ours and no device has it.
        let mut room = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) };
        let mut skip = skip;
        for segment in segments {
            let data = segment.get(skip..).unwrap_or(&[]);
            skip = skip.saturating_sub(segment.len());
            let (front, rest) = room.split_at_mut(data.len());
            front.copy_from_slice(data);
            room = rest;
        }
        self.mbuf()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.mbuf = None;
        // SAFETY: no mbuf points to the memory any more; it was allocated with its front.
        unsafe { dpdk_sys::rte_free(self.start.sub(FRONT_BYTES).as_ptr().cast()) };
    }
}
