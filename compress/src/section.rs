//! A section: bytes compressed without loss, or stored where that would not be smaller.
//!
//! The reader knows how many bytes a section decompresses to. A section of that very length is stored; a shorter one
//! is what the plane's compression made of it. Nothing else says which: what isn't shorter is never written.
//!
//! A further compression is one more arm in [`SectionWriter::write`] and in [`SectionReader::read`].

use libdeflater::{CompressionLvl, Compressor, DecompressionError, Decompressor};
use zstd_safe::{CCtx, CParameter, DCtx, ErrorCode, ParamSwitch};

use crate::in_place::InPlace;
use crate::{Compression, Isa, SlicedError, sliced};

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
    /// A section of a plane without compression has another length than its content.
    #[error("an uncompressed section of {got_bytes} bytes, it must have {expected_bytes}")]
    Uncompressed {
        /// Bytes of the section.
        got_bytes: usize,
        /// Bytes that it must have.
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
    /// The section is no Deflate stream.
    #[error("a section is no Deflate stream: bad data, or it ends too early")]
    Deflate,
    /// A Deflate stream holds more or fewer bytes than it must.
    #[error("a Deflate stream holds {}, it must hold {expected_bytes} bytes", DeflateBytes(*got_bytes))]
    DeflateSize {
        /// Bytes in it; `None` if they are more than must be.
        got_bytes: Option<usize>,
        /// Bytes that it must give.
        expected_bytes: usize,
    },
    /// A sliced section has other parts than it should.
    #[error(transparent)]
    Sliced(#[from] SlicedError),
}

struct DeflateBytes(Option<usize>);

impl std::fmt::Display for DeflateBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "{bytes} bytes"),
            None => f.write_str("more"),
        }
    }
}

/// What a decompression that gave `result` gave, if it is not exactly `expected_bytes`.
pub(crate) fn check_deflate(
    result: Result<usize, DecompressionError>,
    expected_bytes: usize,
) -> Result<(), FrameError> {
    match result {
        Ok(got) if got == expected_bytes => Ok(()),
        Ok(got) => Err(FrameError::DeflateSize { got_bytes: Some(got), expected_bytes }),
        Err(DecompressionError::InsufficientSpace) => {
            Err(FrameError::DeflateSize { got_bytes: None, expected_bytes })
        }
        Err(DecompressionError::BadData) => Err(FrameError::Deflate),
    }
}

fn zstd_error(code: ErrorCode) -> FrameError {
    FrameError::Zstd(zstd_safe::get_error_name(code))
}

/// What is compressed: each compression chooses its level by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Packed codes: skew and hardly any repeats.
    Codes,
    /// High or low bytes of floats: matches cost more bits than they save, and most of the time of decoding.
    FloatBytes,
}

/// Level of Deflate. Codes have skew and hardly any repeats, for which higher levels would look.
const DEFLATE_LEVEL: i32 = 1;

/// Writes sections; reuses its context and buffer.
pub(crate) struct SectionWriter {
    deflate: Option<Compressor>,
    zstd: Result<CCtx<'static>, &'static str>,
    zstd_level: i32,
    isa: Isa,
    parts: sliced::Parts,
    scratch: Vec<u8>,
}

impl SectionWriter {
    /// A writer that compresses codes with zstd at `zstd_level`.
    pub(crate) fn new(zstd_level: i32) -> Self {
        Self {
            deflate: None,
            zstd: zstd_context(),
            zstd_level,
            isa: Isa::detect(),
            parts: sliced::Parts::default(),
            scratch: Vec::new(),
        }
    }

    /// Chooses the instruction set instead of taking the best that the CPU has.
    pub(crate) fn with_isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    /// Appends `bytes` to `out` as one section, compressed if that is shorter.
    ///
    /// # Errors
    /// The name of what went wrong: only running out of memory can.
    pub(crate) fn write(
        &mut self,
        compression: Compression,
        content: Content,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), &'static str> {
        self.scratch.clear();
        match compression {
            Compression::None => {
                out.extend_from_slice(bytes);
                return Ok(());
            }
            Compression::Zstd => self.write_frame(content, bytes)?,
            Compression::Deflate => self.write_deflate(bytes)?,
            Compression::Sliced => {
                let code = sliced::Code::new(self.isa, bytes);
                if code.section_bytes() < bytes.len() {
                    sliced::encode(self.isa, &code, bytes, &mut self.parts, out);
                } else {
                    out.extend_from_slice(bytes);
                }
                return Ok(());
            }
        }
        out.extend_from_slice(if self.scratch.len() < bytes.len() { &self.scratch } else { bytes });
        Ok(())
    }

    /// Compresses `bytes` into the empty scratch.
    fn write_deflate(&mut self, bytes: &[u8]) -> Result<(), &'static str> {
        let level = CompressionLvl::new(DEFLATE_LEVEL).unwrap_or_default();
        let deflate = self.deflate.get_or_insert_with(|| Compressor::new(level));
        self.scratch.resize(deflate.deflate_compress_bound(bytes.len()), 0);
        let written = deflate.deflate_compress(bytes, &mut self.scratch);
        self.scratch.truncate(written.map_err(|_| "Deflate outgrew its own bound")?);
        Ok(())
    }

    /// Compresses `bytes` into the empty scratch.
    fn write_frame(&mut self, content: Content, bytes: &[u8]) -> Result<(), &'static str> {
        let zstd = self.zstd.as_mut().map_err(|name| *name)?;
        let level = match content {
            Content::Codes => self.zstd_level,
            Content::FloatBytes => zstd_safe::min_c_level(),
        };
        zstd.set_parameter(CParameter::CompressionLevel(level)).map_err(zstd_safe::get_error_name)?;
        self.scratch.reserve(zstd_safe::compress_bound(bytes.len()));
        zstd.compress2(&mut self.scratch, bytes).map(drop).map_err(zstd_safe::get_error_name)
    }
}

/// A compression context that writes frames as the format wants them: content size in, checksum and dictionary out.
fn zstd_context() -> Result<CCtx<'static>, &'static str> {
    let mut context = CCtx::create();
    let parameters = [
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

/// Decompresses sections; everything it needs is allocated when it is made.
pub struct SectionReader {
    isa: Isa,
    zstd: DCtx<'static>,
    /// What decompresses zstd frames instead, if they are to be decompressed in place.
    in_place: Option<InPlace>,
    deflate: Decompressor,
}

impl Default for SectionReader {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for SectionReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SectionReader").finish_non_exhaustive()
    }
}

/// Bytes of libdeflate's decompressor, which does not tell: Huffman tables of 2342, 402 and 128 entries and what they are made of.
const DEFLATE_BYTES: usize = 12 << 10;

impl SectionReader {
    /// A reader of sections of any compression.
    ///
    /// # Panics
    /// When memory runs out.
    #[must_use]
    pub fn new() -> Self {
        Self { isa: Isa::detect(), zstd: DCtx::create(), in_place: None, deflate: Decompressor::new() }
    }

    /// Whether zstd frames are copied to the end of the scratch and decompressed towards them, where it has room for
    /// zstd's margin of 128 KiB and some bytes. It touches less memory, and is no faster: `docs/CODEC.md`.
    ///
    /// # Panics
    /// When memory runs out.
    #[must_use]
    pub fn with_in_place(mut self, in_place: bool) -> Self {
        self.in_place = in_place.then(InPlace::new);
        self
    }

    /// Chooses the instruction set instead of taking the best that the CPU has.
    #[must_use]
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self
    }

    /// Bytes of memory held.
    pub(crate) fn size(&self) -> usize {
        self.zstd.sizeof() + self.in_place.as_ref().map_or(0, InPlace::size) + DEFLATE_BYTES
    }

    /// The `expected_bytes` bytes of a section: the section itself if stored, else decompressed into the front of
    /// `scratch`, which is at least as long; zstd is fastest if it is twice as long and 128 KiB more. Neither allocates.
    ///
    /// # Errors
    /// What is wrong with the section.
    ///
    /// # Panics
    /// When `scratch` is too short.
    pub fn read<'a>(
        &mut self,
        compression: Compression,
        section: &'a [u8],
        expected_bytes: usize,
        scratch: &'a mut [u8],
    ) -> Result<&'a [u8], FrameError> {
        let got_bytes = section.len();
        if got_bytes == expected_bytes {
            return Ok(section);
        }
        if got_bytes > expected_bytes {
            return Err(FrameError::Outgrown { got_bytes, expected_bytes });
        }
        match compression {
            Compression::None => return Err(FrameError::Uncompressed { got_bytes, expected_bytes }),
            Compression::Zstd => self.read_frame(section, expected_bytes, scratch)?,
            Compression::Deflate => check_deflate(
                self.deflate.deflate_decompress(section, &mut scratch[..expected_bytes]),
                expected_bytes,
            )?,
            Compression::Sliced => sliced::decode(self.isa, section, &mut scratch[..expected_bytes])?,
        }
        Ok(&scratch[..expected_bytes])
    }

    /// Fills the front of `scratch` from a section that must be one frame of so many bytes.
    fn read_frame(
        &mut self,
        section: &[u8],
        expected_bytes: usize,
        scratch: &mut [u8],
    ) -> Result<(), FrameError> {
        check_frame(section, expected_bytes)?;
        let in_place = self.in_place.as_mut();
        let in_place = in_place.and_then(|zstd| zstd.decompress(section, expected_bytes, scratch));
        // All of the scratch: zstd decodes literals behind the block's place if there is room for them, and otherwise
        // in two pieces, one of which it then moves: an eighth of its time. `docs/CODEC.md` has the measurement.
        let written =
            in_place.unwrap_or_else(|| self.zstd.decompress(scratch, section)).map_err(zstd_error)?;
        if written != expected_bytes {
            return Err(FrameError::ContentSize { got_bytes: Some(written as u64), expected_bytes });
        }
        Ok(())
    }
}

/// Checks that a section is exactly one frame that says it holds `expected_bytes`.
fn check_frame(section: &[u8], expected_bytes: usize) -> Result<(), FrameError> {
    let section_bytes = section.len();
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
