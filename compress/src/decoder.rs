//! From the encoded bytes of a plane to its elements: checksum, decompression and dequantization in one pass over
//! scratch that stays in the core's cache.

use crate::dequantize::{self, Job};
use crate::dtype::BF16_MAX;
use crate::format::PlaneEntry;
use crate::groups::Groups;
use crate::payload::{Codes, Layout, LayoutError, SECTION_LENGTH_BYTES, max_encoded_bytes};
use crate::section::{FrameError, SectionReader};
use crate::{Codec, Dtype, Isa, OutDtype, Quantizer, Shape, checksum, lossless};

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
        out_dtype: &'static str,
    },
    /// The scale of FP8 elements can't be divided by, or leads beyond every float.
    #[error("FP8 elements with a scale of {}: it must be positive, finite and not subnormal, and no quotient may overflow", f32::from_bits(*scale_bits))]
    OutScale {
        /// Bits of the scale.
        scale_bits: u32,
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
    /// What was decompressed elsewhere is not what the plane's section stands for, or the plane has no such section.
    #[error("{got_bytes} decompressed bytes for a plane whose section stands for {expected_bytes}")]
    Decompressed {
        /// Bytes handed in.
        got_bytes: usize,
        /// What the section stands for.
        expected_bytes: usize,
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
    isa: Isa,
    streaming: bool,
    sections: SectionReader,
    /// What sections decompress to: codes, or the two byte planes of a lossless plane.
    decompressed: Vec<u8>,
    /// The codes of one head row.
    row: Vec<u8>,
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

/// zstd's margin for decompression in place: a block, and some bytes for the frame and for each block.
const IN_PLACE_MARGIN_BYTES: usize = 132 << 10;

impl Decoder {
    /// A decoder for planes of at most `max_plane_bytes` decoded bytes.
    ///
    /// # Panics
    /// When memory for the zstd context or the scratch runs out.
    #[must_use]
    pub fn new(max_plane_bytes: usize) -> Self {
        // Filled with something other than zero, so that no page is first touched while a plane is waiting.
        let linear = vec![0xff; max_encoded_bytes(max_plane_bytes)];
        // Scales, offsets and codes take at most the plane's bytes; `int3` leaves 13 of 16 to the others. Magnitudes of
        // tokens are repeated for each head, whose dimensions are at least four.
        let [scales, offsets] = [(); 2].map(|()| vec![1.0; max_plane_bytes / 64 * 13 + 13]);
        let decompressed = vec![0xff; max_plane_bytes];
        let row = vec![0xff; (max_plane_bytes / Dtype::BYTES).min(u16::MAX.into())];
        let (isa, streaming, sections) = (Isa::detect(), false, SectionReader::new());
        let inner = Inner { isa, streaming, sections, decompressed, row, scales, offsets };
        Self { max_plane_bytes, linear, linearized: None, inner }
    }

    /// Chooses the instruction set instead of taking the best that the CPU has: for measurements and tests.
    #[must_use]
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.inner.isa = isa;
        self.inner.sections = self.inner.sections.with_isa(isa);
        self
    }

    /// Whether quantized planes are written past the caches, where destination and rows are aligned to 64 bytes: for
    /// destinations that no CPU reads soon. `docs/CODEC.md` has the measurement.
    #[must_use]
    pub fn with_streaming_stores(mut self, streaming: bool) -> Self {
        self.inner.streaming = streaming;
        self
    }

    /// As [`Decoder::with_streaming_stores`], from the next plane on.
    pub fn set_streaming_stores(&mut self, streaming: bool) {
        self.inner.streaming = streaming;
    }

    /// Whether zstd sections are decompressed in the buffer that holds them, where the scratch has room for zstd's margin:
    /// scratch grows by that. It is no faster; `docs/CODEC.md` has the measurement.
    ///
    /// # Panics
    /// When memory runs out.
    #[must_use]
    pub fn with_in_place(mut self, in_place: bool) -> Self {
        let margin = if in_place { IN_PLACE_MARGIN_BYTES } else { 0 };
        self.inner.decompressed = vec![0xff; self.max_plane_bytes + margin];
        self.inner.sections = self.inner.sections.with_in_place(in_place);
        self
    }

    /// Bytes of memory the decoder holds: scratch and zstd context.
    #[must_use]
    pub fn scratch_bytes(&self) -> usize {
        let Inner { sections, decompressed, row, scales, offsets, .. } = &self.inner;
        let groups = size_of_val(scales.as_slice()) + size_of_val(offsets.as_slice());
        self.linear.len() + decompressed.len() + row.len() + groups + sections.size()
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
        out_dtype: impl Into<OutDtype>,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let out_dtype = out_dtype.into();
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
        out_dtype: impl Into<OutDtype>,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        self.linearize_checked(segments, entry)?;
        self.decode_linearized(shape, entry, out_dtype, out)
    }

    /// Checks length and CRC32C of an encoded plane where its pieces lie, without copying them.
    ///
    /// # Errors
    /// More or fewer bytes than the entry says, or other bytes than the checksum was made of.
    pub fn check_segments<'s>(
        segments: impl IntoIterator<Item = &'s [u8]>,
        entry: &PlaneEntry,
    ) -> Result<(), DecodeError> {
        let (mut got_bytes, mut computed) = (0, 0);
        for segment in segments {
            got_bytes += segment.len();
            computed = checksum::crc32c_append(computed, segment);
        }
        if u32::try_from(got_bytes) != Ok(entry.bytes) {
            return Err(DecodeError::Length { got_bytes, expected_bytes: entry.bytes });
        }
        compare_crc(computed, entry)
    }

    /// Decodes a plane whose checksum was found to be right by [`Decoder::check_segments`] and whose section
    /// ([`PlaneEntry::section`]) somebody else has decompressed to `section`. Of the pieces only what is in front of the section is read.
    ///
    /// # Errors
    /// As [`Decoder::decode`], but for the checksum; nothing is then written to `out`.
    pub fn decode_decompressed<'s>(
        &mut self,
        shape: &Shape,
        entry: &PlaneEntry,
        segments: impl IntoIterator<Item = &'s [u8]>,
        section: &[u8],
        out_dtype: impl Into<OutDtype>,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let out_dtype = out_dtype.into();
        let layout = self.check(shape, entry, out_dtype, out)?;
        let no_section =
            DecodeError::Decompressed { got_bytes: section.len(), expected_bytes: layout.section_bytes };
        let (Some(codes), Some(scale_dtype)) = (layout.codes, entry.scale_dtype) else {
            return Err(no_section);
        };
        if section.len() != layout.section_bytes {
            return Err(no_section);
        }
        self.linearized = None;
        let front = copy_front(segments, &mut self.linear[..layout.before_section()])
            .map_err(|got_bytes| DecodeError::Length { got_bytes, expected_bytes: entry.bytes })?;
        let parts = QuantizedParts::split(&layout, codes, scale_dtype, front);
        self.inner.dequantize(shape, entry, &parts, Some(section), out_dtype, out)
    }

    /// Checks and decodes a plane whose encoded bytes lie in one piece.
    ///
    /// `out` takes [`Shape::elements_per_plane`] elements of `out_dtype`: `[tokens, kv_heads, head_dim]` row-major,
    /// little-endian. The exact codecs deliver `shape.dtype` only, the others any type; what lies beyond a type's
    /// largest finite value becomes that.
    ///
    /// # Errors
    /// Whatever is wrong with destination, entry, checksum or payload; nothing is then written to `out`.
    pub fn decode(
        &mut self,
        shape: &Shape,
        entry: &PlaneEntry,
        encoded: &[u8],
        out_dtype: impl Into<OutDtype>,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let out_dtype = out_dtype.into();
        let layout = self.check_whole(shape, entry, encoded, out_dtype, out)?;
        check_crc(encoded, entry)?;
        self.inner.decode(shape, entry, &layout, encoded, out_dtype, out)
    }

    /// [`Decoder::decode`] of a plane whose checksum was found to be right, so that it isn't computed again.
    ///
    /// # Errors
    /// As [`Decoder::decode`], but for the checksum.
    pub fn decode_without_crc(
        &mut self,
        shape: &Shape,
        entry: &PlaneEntry,
        encoded: &[u8],
        out_dtype: impl Into<OutDtype>,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let out_dtype = out_dtype.into();
        let layout = self.check_whole(shape, entry, encoded, out_dtype, out)?;
        self.inner.decode(shape, entry, &layout, encoded, out_dtype, out)
    }

    /// Checks everything about encoded bytes in one piece but their checksum.
    fn check_whole(
        &self,
        shape: &Shape,
        entry: &PlaneEntry,
        encoded: &[u8],
        out_dtype: OutDtype,
        out: &[u8],
    ) -> Result<Layout, DecodeError> {
        let layout = self.check(shape, entry, out_dtype, out)?;
        if u32::try_from(encoded.len()) != Ok(entry.bytes) {
            return Err(DecodeError::Length { got_bytes: encoded.len(), expected_bytes: entry.bytes });
        }
        Ok(layout)
    }

    /// Checks everything that doesn't need the encoded bytes.
    fn check(
        &self,
        shape: &Shape,
        entry: &PlaneEntry,
        out_dtype: OutDtype,
        out: &[u8],
    ) -> Result<Layout, DecodeError> {
        let plane_bytes = shape.plane_bytes();
        if plane_bytes > self.max_plane_bytes {
            return Err(DecodeError::TooLarge { plane_bytes, max_plane_bytes: self.max_plane_bytes });
        }
        let layout = check_entry(shape, entry)?;
        check_out_dtype(shape, entry.codec, out_dtype)?;
        let expected_bytes = shape.elements_per_plane() * out_dtype.bytes();
        if out.len() != expected_bytes {
            return Err(DecodeError::OutBytes { got_bytes: out.len(), expected_bytes });
        }
        Ok(layout)
    }
}

/// Checks that a codec can deliver elements of a type.
pub(crate) fn check_out_dtype(shape: &Shape, codec: Codec, out_dtype: OutDtype) -> Result<(), DecodeError> {
    if codec.is_exact() && !out_dtype.is(shape.dtype) {
        let out_dtype = out_dtype.name();
        return Err(DecodeError::OutDtype { codec, source_dtype: shape.dtype, out_dtype });
    }
    match out_dtype {
        OutDtype::Fp8E4M3 { scale } if out_dtype.divisor().is_none() => {
            Err(DecodeError::OutScale { scale_bits: scale.to_bits() })
        }
        _ => Ok(()),
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
    compare_crc(checksum::crc32c(encoded), entry)
}

fn compare_crc(computed: u32, entry: &PlaneEntry) -> Result<(), DecodeError> {
    if computed == entry.crc32c {
        return Ok(());
    }
    Err(DecodeError::Crc { computed, stored: entry.crc32c })
}

/// Copies the first bytes of the pieces, as many as `front` has; an error says how many there were.
fn copy_front<'f, 's>(
    segments: impl IntoIterator<Item = &'s [u8]>,
    front: &'f mut [u8],
) -> Result<&'f [u8], usize> {
    let mut filled = 0;
    for segment in segments {
        let bytes = segment.len().min(front.len() - filled);
        front[filled..filled + bytes].copy_from_slice(&segment[..bytes]);
        filled += bytes;
        if filled == front.len() {
            break;
        }
    }
    if filled < front.len() { Err(filled) } else { Ok(front) }
}

impl Inner {
    /// Decodes a plane whose length and checksum are right; nothing is written to `out` unless all of it is.
    fn decode(
        &mut self,
        shape: &Shape,
        entry: &PlaneEntry,
        layout: &Layout,
        encoded: &[u8],
        out_dtype: OutDtype,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        match (layout.codes, entry.scale_dtype) {
            (Some(codes), Some(scale_dtype)) => {
                let parts = QuantizedParts::split(layout, codes, scale_dtype, encoded);
                return self.dequantize(shape, entry, &parts, None, out_dtype, out);
            }
            _ if entry.codec == Codec::Lossless => {
                let (high_section, low_section) = lossless_sections(encoded)?;
                let half = layout.section_bytes / 2;
                let (high, low) = self.decompressed.split_at_mut(half);
                let high = self.sections.read(entry.compression, high_section, half, high)?;
                let low = self.sections.read(entry.compression, low_section, half, low)?;
                lossless::join(high, low, out);
            }
            _ => out.copy_from_slice(encoded),
        }
        Ok(())
    }

    /// Decodes a quantized plane, whose section somebody else may have decompressed.
    fn dequantize(
        &mut self,
        shape: &Shape,
        entry: &PlaneEntry,
        parts: &QuantizedParts<'_>,
        section: Option<&[u8]>,
        out_dtype: OutDtype,
        out: &mut [u8],
    ) -> Result<(), DecodeError> {
        let Self { isa, streaming, sections, decompressed, row, scales, offsets } = self;
        let (isa, streaming) = (*isa, *streaming);
        let divisor = out_dtype.divisor().unwrap_or(1.0);
        let (scales, offsets) = parts.groups.widen(usize::from(shape.kv_heads), divisor, scales, offsets)?;
        let section = match section {
            Some(section) => section,
            None => sections.read(entry.compression, parts.section, parts.section_bytes, decompressed)?,
        };
        let job = Job {
            packing: parts.codes.packing,
            plain: parts.plain,
            section,
            scales,
            offsets,
            per_channel: entry.quantizer == Quantizer::PerChannel,
            head_dim: usize::from(shape.head_dim),
            out_dtype,
            streaming,
        };
        // Scales were checked with the largest code. Codes beyond it mean nothing, but there are bits for them: their
        // elements may be infinite, and so may products whose sums with the offset are not. Only plain loops then
        // give what the format says: kernels that fuse the two count on exact products.
        let most = f32::from(parts.codes.packing.largest_code());
        let may_overflow = |(scale, offset): (&f32, &f32)| (most * scale + offset).abs() > BF16_MAX;
        if entry.codec != Codec::CacheGen || !job.scales.iter().zip(job.offsets).any(may_overflow) {
            dequantize::dequantize(isa, &job, row, out);
            return Ok(());
        }
        dequantize::dequantize(Isa::Scalar, &Job { streaming: false, ..job }, row, out);
        if matches!(out_dtype, OutDtype::Bf16) {
            make_finite(out);
        }
        Ok(())
    }
}

/// Replaces infinite bf16 elements by the largest finite ones.
fn make_finite(out: &mut [u8]) {
    const INFINITE: u16 = 0x7f80;
    for element in out.chunks_exact_mut(Dtype::BYTES) {
        let bits = u16::from_le_bytes([element[0], element[1]]);
        if bits & 0x7fff == INFINITE {
            element.copy_from_slice(&(bits - 1).to_le_bytes());
        }
    }
}

/// The parts of a quantized plane's encoded bytes.
struct QuantizedParts<'a> {
    groups: Groups<'a>,
    plain: &'a [u8],
    section: &'a [u8],
    /// What the section stands for.
    section_bytes: usize,
    codes: Codes,
}

impl<'a> QuantizedParts<'a> {
    /// `encoded` has at least the bytes that the layout demands.
    fn split(layout: &Layout, codes: Codes, dtype: Dtype, encoded: &'a [u8]) -> Self {
        let (scale_bytes, rest) = encoded.split_at(layout.scale_bytes);
        let (offset_bytes, rest) = rest.split_at(layout.offset_bytes);
        let (plain, section) = rest.split_at(layout.plain_bytes);
        let groups = Groups { scale_bytes, offset_bytes, dtype, largest_code: codes.largest };
        Self { groups, plain, section, section_bytes: layout.section_bytes, codes }
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
