//! zstd frames decompressed in the buffer that holds them, as `zstd.h` allows with `ZSTD_DECOMPRESSION_MARGIN`.

use std::ptr::NonNull;

use zstd_safe::zstd_sys;

/// A context for decompression in place; `zstd-safe` has no call whose source and destination may overlap.
pub(crate) struct InPlace(NonNull<zstd_sys::ZSTD_DCtx>);

// SAFETY: a context belongs to no thread; it is used through `&mut` alone.
unsafe impl Send for InPlace {}
// SAFETY: a shared context can't be used.
unsafe impl Sync for InPlace {}

impl InPlace {
    /// A context.
    ///
    /// # Panics
    /// When memory runs out.
    pub(crate) fn new() -> Self {
        // SAFETY: creating a context has no conditions.
        let context = unsafe { zstd_sys::ZSTD_createDCtx() };
        Self(NonNull::new(context).expect("memory for a zstd context"))
    }

    /// Bytes of memory held.
    pub(crate) fn size(&self) -> usize {
        // SAFETY: the context is alive.
        unsafe { zstd_sys::ZSTD_sizeof_DCtx(self.0.as_ptr()) }
    }

    /// Fills the front of `buffer` from `frame`, which is copied to where its content and zstd's margin end; `None` if
    /// that is beyond the buffer.
    pub(crate) fn decompress(
        &mut self,
        frame: &[u8],
        content_bytes: usize,
        buffer: &mut [u8],
    ) -> Option<zstd_safe::SafeResult> {
        let margin = zstd_safe::decompression_margin(frame).ok()?;
        let end = content_bytes.checked_add(margin).filter(|&end| end <= buffer.len())?;
        let at = end.checked_sub(frame.len())?;
        buffer[at..end].copy_from_slice(frame);
        let buffer = buffer.as_mut_ptr();
        // SAFETY: both ranges are in the buffer and reached through its one pointer. That they overlap so is allowed:
        // zstd writes no byte at or behind the place it reads at, whatever the frame holds.
        let code = unsafe {
            let source = buffer.add(at).cast();
            zstd_sys::ZSTD_decompressDCtx(self.0.as_ptr(), buffer.cast(), end, source, frame.len())
        };
        // SAFETY: any code may be asked about.
        Some(if unsafe { zstd_sys::ZSTD_isError(code) } == 0 { Ok(code) } else { Err(code) })
    }
}

impl Drop for InPlace {
    fn drop(&mut self) {
        // SAFETY: the context is alive, and nobody uses it afterwards.
        unsafe { zstd_sys::ZSTD_freeDCtx(self.0.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two blocks and a half, of bytes that compress to half.
    fn content() -> Vec<u8> {
        let next = |state: &u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        std::iter::successors(Some(1_u64), next).take(320_000).map(|state| (state >> 60) as u8).collect()
    }

    #[test]
    fn frames_that_reach_into_what_they_give() {
        let content = content();
        let mut frame = vec![0; content.len()];
        let written = zstd_safe::compress(&mut frame[..], &content, 1).unwrap();
        frame.truncate(written);
        let margin = zstd_safe::decompression_margin(&frame).unwrap();
        assert!(frame.len() > margin, "nothing overlaps");
        let mut buffer = vec![0xa5; content.len() + margin];
        let (short, _) = buffer.split_at_mut(content.len() + margin - 1);
        assert_eq!(InPlace::new().decompress(&frame, content.len(), short), None);
        let mut zstd = InPlace::new();
        assert_eq!(zstd.decompress(&frame, content.len(), &mut buffer), Some(Ok(content.len())));
        assert!(buffer[..content.len()] == content);
        // Whatever is wrong with a frame, the context goes on.
        for at in (0..frame.len()).step_by(frame.len() / 200) {
            let mut damaged = frame.clone();
            damaged[at] ^= 0x5a;
            let _ = zstd.decompress(&damaged, content.len(), &mut buffer);
        }
        assert_eq!(zstd.decompress(&frame, content.len(), &mut buffer), Some(Ok(content.len())));
        assert!(buffer[..content.len()] == content);
    }
}
