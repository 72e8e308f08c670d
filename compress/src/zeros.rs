//! Zeros written as a decoder writes its elements: the yardstick of what a core can write to some memory.

/// Fills `out` with zeros, past the caches if `streaming` is set, the CPU has such stores and `out` is aligned to
/// 64 bytes.
pub fn write_zeros(out: &mut [u8], streaming: bool) {
    #[cfg(target_arch = "x86_64")]
    if streaming && is_x86_feature_detected!("avx") && out.as_ptr().addr().is_multiple_of(64) {
        // SAFETY: the CPU has AVX, and `out` is aligned.
        return unsafe { stream(out) };
    }
    let _ = streaming;
    out.fill(0);
}

/// # Safety
/// The CPU has AVX, and `out` is aligned to 32 bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn stream(out: &mut [u8]) {
    use std::arch::x86_64::{_mm_sfence, _mm256_setzero_si256, _mm256_stream_si256};

    let mut blocks = out.chunks_exact_mut(64);
    for block in &mut blocks {
        let block = block.as_mut_ptr();
        // SAFETY: two aligned stores within 64 bytes.
        unsafe {
            _mm256_stream_si256(block.cast(), _mm256_setzero_si256());
            _mm256_stream_si256(block.add(32).cast(), _mm256_setzero_si256());
        }
    }
    blocks.into_remainder().fill(0);
    // As a decoder must, before it tells others.
    _mm_sfence();
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_byte_becomes_zero_and_no_other() {
        for (start, bytes) in [(0, 0), (0, 64), (0, 200), (0, 255), (7, 130), (32, 96)] {
            for streaming in [false, true] {
                let mut buffer = vec![1_u8; 512];
                let at = buffer.as_ptr().align_offset(64) + start;
                super::write_zeros(&mut buffer[at..at + bytes], streaming);
                let zeros = buffer.iter().filter(|&&byte| byte == 0).count();
                assert!(zeros == bytes && buffer[at..at + bytes].iter().all(|&byte| byte == 0));
            }
        }
    }
}
