//! From the encoded bytes of a plane to its elements: checksum, decompression and dequantization in one pass over
//! scratch that stays in the core's cache.

use zstd_safe::DCtx;

use crate::dequantize::{self, Isa, Job};
use crate::format::PlaneEntry;
use crate::frame::{self, FrameError};
use crate::groups::Groups;
use crate::payload::{Layout, LayoutError, SECTION_LENGTH_BYTES, max_encoded_bytes};
use crate::quantize::largest_code;
use crate::{Codec, Dtype, Quantizer, Shape, checksum, lossless};

/// Why a plane can't be decoded. Nothing was written to the destination, and the decoder can take the next plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The plane is larger than the decoder was made for.
    #[error("a plane of {plane_bytes} bytes, this decoder was made for at most {max_plane_bytes}")]
    TooLarge {
        /// Bytes of the decoded plane.
        plane_bytes: usize,
        /// The decoder's limit.
        max_plane_bytes: usize,
    },
    /// More or fewer encoded bytes than the entry says.
    #[error("{got_bytes} encoded bytes, the plane's entry says {expected_bytes}")]
    Length {
        /// Bytes there were; where there were too many, how many had been seen.
        got_bytes: usize,
        /// What the entry says.
        expected_bytes: u32,
    },
    /// The encoded bytes are damaged.
    #[error(
        "the encoded bytes have CRC32C {computed:08x}, the plane's entry says {stored:08x}: fetch them again"
    )]
    Crc {
        /// What the bytes give.
        computed: u32,
        /// What the entry says.
        stored: u32,
    },
    /// The entry can't describe a plane of this shape.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The entry's size can't hold the plane's parts.
    #[error("{bytes} encoded bytes, {codec} takes {min_bytes} to {max_bytes} for this shape")]
    EncodedBytes {
        /// The codec.
        codec: Codec,
        /// What the entry says.
        bytes: u32,
        /// The least there can be.
        min_bytes: usize,
        /// The most there can be.
        max_bytes: usize,
    },
    /// The destination has another size than the plane.
    #[error("a destination of {got_bytes} bytes for a plane of {expected_bytes}")]
    OutBytes {
        /// Bytes of the destination.
        got_bytes: usize,
        /// Bytes of the decoded plane.
        expected_bytes: usize,
    },
    /// An exact codec was asked for another element type than the plane's.
    #[error("codec {codec} delivers the plane's own element type {source_dtype} only, not {out_dtype}")]
    OutDtype {
        /// The codec.
        codec: Codec,
        /// Element type of the plane.
        source_dtype: Dtype,
        /// Element type asked for.
        out_dtype: Dtype,
    },
    /// A group's codes would stand for elements that are infinite, not numbers, or beyond the largest bfloat16.
    #[error(
        "group {group} has scale {scale_bits:04x} and offset {offset_bits:04x}: its elements are not finite"
    )]
    Scale {
        /// Index of the group.
        group: usize,
        /// Bits of its scale, in the entry's scale type.
        scale_bits: u16,
        /// Bits of its offset, in the entry's scale type.
        offset_bits: u16,
    },
    /// The first section's length goes beyond the plane.
    #[error("a lossless plane's first section has {section_bytes} bytes, {payload_bytes} follow")]
    SectionLength {
        /// What the length says.
        section_bytes: u32,
        /// Bytes behind the length.
        payload_bytes: usize,
    },
    /// A compressed section is unreadable.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// No linearized plane is held, or not this one.
    #[error("no checked plane of {expected_bytes} bytes is in the decoder: linearize it first")]
    NotLinearized {
        /// What the entry says.
        expected_bytes: u32,
    },
}

/// Decodes planes on one lcore. Everything is allocated by [`Decoder::new`]; decoding allocates nothing, and an error
/// leaves destination and decoder as they were.
pub struct Decoder {
    max_plane_bytes: usize,
    /// The encoded plane in one piece.
    linear: Vec<u8>,
    /// Length and checksum of the plane in `linear`, if there is a checked one.
    linearized: Option<(u32, u32)>,
    inner: Inner,
}

/// What decoding needs besides the encoded bytes.
struct Inner {
    zstd: DCtx<'static>,
    isa: Isa,
    /// Decompressed codes, or the two byte planes of a lossless plane.
    codes: Vec<u8>,
    /// Scales widened to `f32`.
    scales: Vec<f32>,
    /// Offsets widened to `f32`.
    offsets: Vec<f32>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("max_plane_bytes", &self.max_plane_bytes).finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder for planes of at most `max_plane_bytes` decoded bytes.
    ///
    /// # Panics
    /// When memory for the zstd context or the scratch runs out.
    #[must_use]
    pub fn new(max_plane_bytes: usize) -> Self {
        // Filled with something other than zero, so that no page is first touched while a plane is waiting.
        let linear = vec![0xff; max_encoded_bytes(max_plane_bytes)];
        // Scales, offsets and codes take at most the plane's bytes; `int4` leaves three quarters of them to the others.
        let [scales, offsets] = [(); 2].map(|()| vec![1.0; max_plane_bytes / 16 * 3 + 3]);
        let codes = vec![0xff; max_plane_bytes];
        let inner = Inner { zstd: DCtx::create(), isa: Isa::detect(), codes, scales, offsets };
        Self { max_plane_bytes, linear, linearized: None, inner }
    }

    /// Bytes of memory the decoder holds: scratch and zstd context.
    #[must_use]
    pub fn scratch_bytes(&self) -> usize {
        let Inner { zstd, codes, scales, offsets, .. } = &self.inner;
        let groups = size_of_val(scales.as_slice()) + size_of_val(offsets.as_slice());
        self.linear.len() + codes.len() + groups + zstd.sizeof()
    }

    /// Copies the pieces of an encoded plane into one and checks length and CRC32C; [`Decoder::decode_linearized`]
    /// then decodes it.
    ///
    /// # Errors
    /// More or fewer bytes than the entry says, other bytes than the checksum was made of, or a plane too large for
    /// this decoder. The decoder then holds no plane.
    pub fn linearize_checked<'s>(
        &mut self,
        segments: impl IntoIterator<Item = &'s [u8]>,
        entry: &PlaneEntry,
    ) -> Result<(), DecodeError> {
        self.linearized = None;
        let expected_bytes = entry.bytes;
        let too_large = DecodeError::TooLarge {
            plane_bytes: usize::try_from(expected_bytes).unwrap_or(usize::MAX),
            max_plane_bytes: self.max_plane_bytes,
        };
        let linear = usize::try_from(expected_bytes).ok().and_then(|bytes| self.linear.get_mut(..bytes));
        let linear = linear.ok_or(too_large)?;
        let mut filled = 0;
        for segment in segments {
            let end = filled + segment.len();
            let length = DecodeError::Length { got_bytes: end, expected_bytes };
            linear.get_mut(filled..end).ok_or(length)?.copy_from_slice(segment);
            filled = end;
        }
        if filled != linear.len() {
            return Err(DecodeError::Length { got_bytes: filled, expected_bytes });
        }
        check_crc(linear, entry)?;
        self.linearized = Some((entry.bytes, entry.crc32c));
        Ok(())
    }

    /// Decodes the plane that [`Decoder::linearize_checked`] took last, with the same entry. The plane stays, so that
    /// a second destination can be filled.
    ///
    /// # Errors
    /// As [`Decoder::decode`], or no such plane is held.
    pub fn decode_linearized(
        &mut self,
        shape: &Shape,
        entry: &PlaneEntry,
        out_dtype: Dtype,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        if self.linearized != Some((entry.bytes, entry.crc32c)) {
            return Err(DecodeError::NotLinearized { expected_bytes: entry.bytes });
        }
        let layout = self.check(shape, entry, out_dtype, out)?;
        let linear = usize::try_from(entry.bytes).ok().and_then(|bytes| self.linear.get(..bytes));
        let encoded = linear.ok_or(DecodeError::NotLinearized { expected_bytes: entry.bytes })?;
        self.inner.decode(shape, entry, &layout, encoded, out_dtype, out)
    }

    /// [`Decoder::linearize_checked`], then [`Decoder::decode_linearized`].
    ///
    /// # Errors
    /// As these two.
    pub fn decode_segments<'s>(
        &mut self,
        shape: &Shape,
        entry: &PlaneEntry,
        segments: impl IntoIterator<Item = &'s [u8]>,
        out_dtype: Dtype,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        self.linearize_checked(segments, entry)?;
        self.decode_linearized(shape, entry, out_dtype, out)
    }

    /// Checks and decodes a plane whose encoded bytes lie in one piece.
    ///
    /// `out` takes [`Shape::plane_bytes`] bytes: `[tokens, kv_heads, head_dim]` row-major, little-endian elements of
    /// `out_dtype`. The exact codecs deliver `shape.dtype` only; `int8` and `int4` deliver either type, and in `f16`
    /// what lies beyond its largest finite value becomes that.
    ///
    /// # Errors
    /// Whatever is wrong with destination, entry, checksum or payload; nothing is then written to `out`.
    pub fn decode(
        &mut self,
        shape: &Shape,
        entry: &PlaneEntry,
        encoded: &[u8],
        out_dtype: Dtype,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let layout = self.check(shape, entry, out_dtype, out)?;
        if u32::try_from(encoded.len()) != Ok(entry.bytes) {
            return Err(DecodeError::Length { got_bytes: encoded.len(), expected_bytes: entry.bytes });
        }
        check_crc(encoded, entry)?;
        self.inner.decode(shape, entry, &layout, encoded, out_dtype, out)
    }

    /// Checks everything that doesn't need the encoded bytes.
    fn check(
        &self,
        shape: &Shape,
        entry: &PlaneEntry,
        out_dtype: Dtype,
        out: &[u8],
    ) -> Result<Layout, DecodeError> {
        let plane_bytes = shape.plane_bytes();
        if plane_bytes > self.max_plane_bytes {
            return Err(DecodeError::TooLarge { plane_bytes, max_plane_bytes: self.max_plane_bytes });
        }
        let layout = check_entry(shape, entry)?;
        if entry.codec.is_exact() && out_dtype != shape.dtype {
            return Err(DecodeError::OutDtype { codec: entry.codec, source_dtype: shape.dtype, out_dtype });
        }
        if out.len() != plane_bytes {
            return Err(DecodeError::OutBytes { got_bytes: out.len(), expected_bytes: plane_bytes });
        }
        Ok(layout)
    }
}

/// Checks an entry against the shape it is used with: it may not come from a parsed table.
pub(crate) fn check_entry(shape: &Shape, entry: &PlaneEntry) -> Result<Layout, DecodeError> {
    let layout = entry.layout(shape)?;
    let (min_bytes, max_bytes) = (layout.min_bytes, layout.max_bytes);
    if usize::try_from(entry.bytes).is_ok_and(|bytes| (min_bytes..=max_bytes).contains(&bytes)) {
        return Ok(layout);
    }
    Err(DecodeError::EncodedBytes { codec: entry.codec, bytes: entry.bytes, min_bytes, max_bytes })
}

pub(crate) fn check_crc(encoded: &[u8], entry: &PlaneEntry) -> Result<(), DecodeError> {
    let computed = checksum::crc32c(encoded);
    if computed == entry.crc32c {
        return Ok(());
    }
    Err(DecodeError::Crc { computed, stored: entry.crc32c })
}

impl Inner {
    /// Decodes a plane whose length and checksum are right; nothing is written to `out` unless all of it is.
    fn decode(
        &mut self,
        shape: &Shape,
        entry: &PlaneEntry,
        layout: &Layout,
        encoded: &[u8],
        out_dtype: Dtype,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let Self { zstd, isa, codes, scales, offsets } = self;
        match (entry.codec, entry.scale_dtype) {
            (Codec::Int8 | Codec::Int4, Some(scale_dtype)) => {
                let (scale_bytes, rest) = encoded.split_at(layout.scale_bytes);
                let (offset_bytes, section) = rest.split_at(layout.scale_bytes);
                let groups = Groups { scale_bytes, offset_bytes, dtype: scale_dtype };
                let pairs = entry.quantizer == Quantizer::PerChannel
                    && dequantize::in_pairs(entry.codec, shape.head_dim.into());
                let (scales, offsets) = groups.widen(largest_code(entry.codec), pairs, scales, offsets)?;
                let codes = frame::read_section(zstd, section, layout.code_bytes, codes)?;
                let head_dim = usize::from(shape.head_dim);
                let (codec, quantizer) = (entry.codec, entry.quantizer);
                dequantize::dequantize(
                    *isa,
                    &Job { codes, scales, offsets, head_dim, codec, quantizer, out_dtype },
                    out,
                );
            }
            (Codec::Lossless, _) => {
                let (high_section, low_section) = lossless_sections(encoded)?;
                let (high, low) = codes.split_at_mut(layout.code_bytes / 2);
                let high = frame::read_section(zstd, high_section, layout.code_bytes / 2, high)?;
                let low = frame::read_section(zstd, low_section, layout.code_bytes / 2, low)?;
                lossless::join(high, low, out);
            }
            _ => out.copy_from_slice(encoded),
        }
        Ok(())
    }
}

/// The two sections of a `lossless` payload, which has passed [`check_entry`].
pub(crate) fn lossless_sections(encoded: &[u8]) -> Result<(&[u8], &[u8]), DecodeError> {
    let (length, payload) = encoded.split_at(SECTION_LENGTH_BYTES);
    let section_bytes = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
    let end = usize::try_from(section_bytes).ok();
    end.and_then(|end| payload.split_at_checked(end))
        .ok_or(DecodeError::SectionLength { section_bytes, payload_bytes: payload.len() })
}
