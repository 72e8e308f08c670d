//! A section: bytes compressed as one zstd frame, or stored where a frame would not be smaller.
//!
//! The reader knows how many bytes a section decompresses to. A section of that very length is stored; a shorter one
//! is a frame. Nothing says which: a frame that isn't shorter is never written.

use zstd_safe::{CCtx, CParameter, DCtx, ErrorCode, ParamSwitch};

/// First bytes of a zstd frame, RFC 8878.
const FRAME_MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();

/// Why a section can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The section is longer than what it would decompress to.
    #[error("a section of {got_bytes} bytes for {expected_bytes} bytes: it should be stored")]
    Outgrown {
        /// Bytes of the section.
        got_bytes: usize,
        /// Bytes that it must give.
        expected_bytes: usize,
    },
    /// The section doesn't start with the magic number of a zstd frame.
    #[error("a section is no zstd frame")]
    Magic,
    /// The frame says that it holds another number of bytes, or doesn't say how many.
    #[error("a zstd frame says it holds {got_bytes:?} bytes, it must hold {expected_bytes}")]
    ContentSize {
        /// What the frame says; `None` if it doesn't.
        got_bytes: Option<u64>,
        /// Bytes that it must give.
        expected_bytes: usize,
    },
    /// The frame ends before the section does.
    #[error("a zstd frame of {frame_bytes} bytes in a section of {section_bytes}")]
    Trailing {
        /// Bytes of the frame.
        frame_bytes: usize,
        /// Bytes of the section.
        section_bytes: usize,
    },
    /// zstd refuses the frame.
    #[error("zstd can't decompress a frame: {0}")]
    Zstd(&'static str),
}

fn zstd_error(code: ErrorCode) -> FrameError {
    FrameError::Zstd(zstd_safe::get_error_name(code))
}

/// Appends `bytes` to `out` as one section, compressed if that is shorter.
///
/// # Errors
/// zstd's name for what went wrong: only running out of memory can.
pub(crate) fn write_section(
    context: &mut CCtx<'static>,
    scratch: &mut Vec<u8>,
    bytes: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), &'static str> {
    scratch.clear();
    scratch.reserve(zstd_safe::compress_bound(bytes.len()));
    context.compress2(scratch, bytes).map_err(zstd_safe::get_error_name)?;
    out.extend_from_slice(if scratch.len() < bytes.len() { scratch } else { bytes });
    Ok(())
}

/// A compression context that writes frames as the format wants them: content size in, checksum and dictionary out.
pub(crate) fn compression_context(level: i32) -> Result<CCtx<'static>, &'static str> {
    let mut context = CCtx::create();
    let parameters = [
        CParameter::CompressionLevel(level),
        CParameter::ContentSizeFlag(true),
        CParameter::ChecksumFlag(false),
        CParameter::DictIdFlag(false),
        // Codes have skew and hardly any repeats: entropy coding is the whole gain, and negative levels switch it off.
        CParameter::LiteralCompressionMode(ParamSwitch::Enable),
    ];
    for parameter in parameters {
        context.set_parameter(parameter).map_err(zstd_safe::get_error_name)?;
    }
    Ok(context)
}

/// The `expected_bytes` bytes of a section: the section itself if stored, else decompressed into the front of
/// `scratch`, which is at least as long. Neither allocates.
pub(crate) fn read_section<'a>(
    context: &mut DCtx<'static>,
    section: &'a [u8],
    expected_bytes: usize,
    scratch: &'a mut [u8],
) -> Result<&'a [u8], FrameError> {
    let section_bytes = section.len();
    if section_bytes == expected_bytes {
        return Ok(section);
    }
    check_frame(section, expected_bytes)?;
    let out = &mut scratch[..expected_bytes];
    let written = context.decompress(out, section).map_err(zstd_error)?;
    if written != expected_bytes {
        return Err(FrameError::ContentSize { got_bytes: Some(written as u64), expected_bytes });
    }
    Ok(out)
}

/// Checks that a section is exactly one frame that says it holds `expected_bytes`.
fn check_frame(section: &[u8], expected_bytes: usize) -> Result<(), FrameError> {
    let section_bytes = section.len();
    if section_bytes > expected_bytes {
        return Err(FrameError::Outgrown { got_bytes: section_bytes, expected_bytes });
    }
    if !section.starts_with(&FRAME_MAGIC) {
        return Err(FrameError::Magic);
    }
    let got_bytes = zstd_safe::get_frame_content_size(section).unwrap_or(None);
    if got_bytes != Some(expected_bytes as u64) {
        return Err(FrameError::ContentSize { got_bytes, expected_bytes });
    }
    let frame_bytes = zstd_safe::find_frame_compressed_size(section).map_err(zstd_error)?;
    if frame_bytes != section_bytes {
        return Err(FrameError::Trailing { frame_bytes, section_bytes });
    }
    Ok(())
}
