//! Copies past the cache.
//!
//! A plane that goes to another process, or to a device, is not read again by the core that wrote it. Ordinary stores
//! would first fetch every line of the destination from memory and then push the decoder's own data out of the cache;
//! non-temporal stores do neither. `gpu-dma/benches/host_ring.rs` compares them.

use crate::access::OutOfBounds;
use crate::arena::Arena;

/// Shorter copies are made through the cache: waiting for the stores at the end costs as much as they save (measured on
/// an EPYC: even at 4 KiB, a third faster at 8 KiB).
#[cfg(target_arch = "x86_64")]
const WORTH_STREAMING_BYTES: usize = 8192;

impl Arena {
    /// As [`copy_in`](Arena::copy_in), for bytes that this core will not read again soon. A release operation after it
    /// publishes the bytes as it does for any other store.
    #[inline]
    pub fn copy_in_streaming(&self, offset: usize, bytes: &[u8]) -> Result<(), OutOfBounds> {
        #[cfg(target_arch = "x86_64")]
        if bytes.len() >= WORTH_STREAMING_BYTES {
            return self.stream(offset, bytes);
        }
        self.copy_in(offset, bytes)
    }

    #[cfg(target_arch = "x86_64")]
    fn stream(&self, offset: usize, bytes: &[u8]) -> Result<(), OutOfBounds> {
        self.range(offset, bytes.len())?;
        // The mapping starts on a page, so offsets are as aligned as addresses. Lines at the ends that belong to others
        // too are written through the cache.
        let (head, rest) = bytes.split_at(offset.next_multiple_of(LINE_BYTES) - offset);
        let (lines, tail) = rest.split_at(rest.len() / LINE_BYTES * LINE_BYTES);
        let lines_at = offset + head.len();
        self.copy_in(offset, head)?;
        let to = self.range(lines_at, lines.len())?;
        // SAFETY: in bounds by `range`, a multiple of a line in address and length, and no slice into an arena exists.
        unsafe { stream_lines(to.as_ptr(), lines) };
        self.copy_in(lines_at + lines.len(), tail)
    }
}

#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

/// Stores lines past the cache, and orders these stores before all that follow.
///
/// The stores are instructions that the compiler does not look into (the standard library has them as inline assembly),
/// so that another process may race with them, as `access` explains.
///
/// # Safety
///
/// `to` is valid for writes of `lines.len()` bytes, and both it and the length are multiples of [`LINE_BYTES`].
#[cfg(target_arch = "x86_64")]
unsafe fn stream_lines(to: *mut u8, lines: &[u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    for at in (0..lines.len()).step_by(LINE_BYTES) {
        for lane in (at..at + LINE_BYTES).step_by(16) {
            // SAFETY: the 16 bytes at `lane` lie within `lines` and, by this function's contract, are valid and aligned at
            // `to`; the fence below comes before any other use of them.
            unsafe {
                let value = _mm_loadu_si128(lines.as_ptr().add(lane).cast::<__m128i>());
                _mm_stream_si128(to.add(lane).cast::<__m128i>(), value);
            }
        }
    }
    // SAFETY: every x86-64 has the instruction.
    unsafe { _mm_sfence() };
}
