//! From the planes of a chunk to its encoded bytes. Runs once per chunk, when a store takes it in.

use zstd_safe::CCtx;

use crate::format::{self, FixedHeader, PlaneEntry, header_bytes};
use crate::payload::{Layout, LayoutError, SECTION_LENGTH_BYTES};
use crate::quantize::{self, Ranges, largest_code};
use crate::{Codec, Dtype, Quantizer, Shape, ShapeError, Side, checksum, frame, lossless, plane_of};

/// The zstd level that stores use for codes unless told otherwise; `docs/FORMAT.md` gives the measurement behind it.
pub const DEFAULT_ZSTD_LEVEL: i32 = 1;

/// Why a chunk can't be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The shape breaks a limit of the format.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The codec can't hold planes of this shape.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A plane has the wrong number of bytes.
    #[error("{side} of layer {layer} has {got_bytes} bytes, the shape gives {expected_bytes}")]
    PlaneBytes {
        /// The layer.
        layer: u16,
        /// K or V.
        side: Side,
        /// Bytes handed in.
        got_bytes: usize,
        /// Bytes that the shape gives.
        expected_bytes: usize,
    },
    /// A plane to be quantized holds an infinity or a NaN.
    #[error(
        "{side} of layer {layer} is infinite or not a number at element {element}: use codec lossless or raw"
    )]
    NotFinite {
        /// The layer.
        layer: u16,
        /// K or V.
        side: Side,
        /// Index of the first such element within the plane.
        element: usize,
    },
    /// zstd failed: out of memory.
    #[error("zstd can't compress: {0}")]
    Zstd(&'static str),
}

/// Encodes chunks with one codec; reuses its buffers and zstd context from chunk to chunk.
pub struct Encoder {
    codec: Codec,
    zstd: Result<CCtx<'static>, &'static str>,
    scratch: Scratch,
}

#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    ranges: Ranges,
    scales: Vec<f32>,
    offsets: Vec<f32>,
    codes: Vec<u8>,
    packed: [Vec<u8>; 2],
    frame: Vec<u8>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("codec", &self.codec).finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder for `codec`, compressing codes with zstd at `zstd_level` ([`DEFAULT_ZSTD_LEVEL`]; zstd takes
    /// -131072 to 22 and moves others to the nearest of these). `lossless` is compressed at zstd's lowest level, whose
    /// entropy coding alone makes it both smaller and faster than any other; `raw` is not compressed.
    #[must_use]
    pub fn new(codec: Codec, zstd_level: i32) -> Self {
        // Matches in the bytes of floats cost more bits than they save, and most of the time of decoding.
        let level = if codec == Codec::Lossless { zstd_safe::min_c_level() } else { zstd_level };
        Self { codec, zstd: frame::compression_context(level), scratch: Scratch::default() }
    }

    /// The codec of the chunks that this encoder writes.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Replaces the content of `out` by the encoded chunk of these planes.
    ///
    /// `plane(layer, side)` gives the bytes of one plane: `[tokens, kv_heads, head_dim]` row-major, little-endian
    /// elements of `shape.dtype`.
    ///
    /// # Errors
    /// A shape beyond the limits or one that the codec can't hold, a plane of the wrong size, and, for `int8` and
    /// `int4`, an element that is not finite. `out` is then empty.
    pub fn encode_chunk<'p>(
        &mut self,
        key: &[u8; 32],
        shape: &Shape,
        plane: impl Fn(u16, Side) -> &'p [u8],
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        out.clear();
        let encoded = self.write_chunk(key, shape, plane, out);
        if encoded.is_err() {
            out.clear();
        }
        encoded
    }

    fn write_chunk<'p>(
        &mut self,
        key: &[u8; 32],
        shape: &Shape,
        plane: impl Fn(u16, Side) -> &'p [u8],
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        shape.check()?;
        out.resize(header_bytes(shape.planes()), 0);
        let mut entries = Vec::with_capacity(shape.planes());
        for (layer, side) in (0..shape.planes()).map(plane_of) {
            entries.push(self.write_plane(shape, layer, side, plane(layer, side), out)?);
        }
        let header = FixedHeader { key: *key, shape: *shape, chunk_bytes: out.len() as u64 };
        format::write_header(&header, &entries, out);
        Ok(())
    }

    fn write_plane(
        &mut self,
        shape: &Shape,
        layer: u16,
        side: Side,
        plane: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<PlaneEntry, EncodeError> {
        let (got_bytes, expected_bytes) = (plane.len(), shape.plane_bytes());
        if got_bytes != expected_bytes {
            return Err(EncodeError::PlaneBytes { layer, side, got_bytes, expected_bytes });
        }
        let codec = self.codec;
        let quantizer = Quantizer::choose(codec, shape, side);
        // Refuses, among others, a head dimension that can't be packed.
        Layout::new(shape, codec, quantizer)?;
        let offset = out.len();
        let scale_dtype = match codec {
            Codec::Raw => {
                out.extend_from_slice(plane);
                None
            }
            Codec::Lossless => {
                self.write_lossless(plane, out)?;
                None
            }
            Codec::Int8 | Codec::Int4 => {
                quantize::widen(plane, shape.dtype, &mut self.scratch.values)
                    .map_err(|element| EncodeError::NotFinite { layer, side, element })?;
                Some(self.write_quantized(shape, quantizer, out)?)
            }
        };
        let encoded = &out[offset..];
        let bytes =
            u32::try_from(encoded.len()).expect("an encoded plane is at most MAX_PLANE_BYTES + 4 bytes");
        Ok(PlaneEntry {
            offset: offset as u64,
            bytes,
            crc32c: checksum::crc32c(encoded),
            codec,
            quantizer,
            scale_dtype,
        })
    }

    fn write_lossless(&mut self, plane: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let zstd = self.zstd.as_mut().map_err(|name| EncodeError::Zstd(name))?;
        let Scratch { packed: [high, low], frame, .. } = &mut self.scratch;
        high.clear();
        low.clear();
        lossless::split(plane, high, low);
        let start = out.len();
        out.extend_from_slice(&[0; SECTION_LENGTH_BYTES]);
        frame::write_section(zstd, frame, high, out).map_err(EncodeError::Zstd)?;
        let section_bytes =
            u32::try_from(out.len() - start - SECTION_LENGTH_BYTES).expect("at most half a plane");
        out[start..start + SECTION_LENGTH_BYTES].copy_from_slice(&section_bytes.to_le_bytes());
        frame::write_section(zstd, frame, low, out).map_err(EncodeError::Zstd)
    }

    /// Writes scales, offsets and codes of the plane in `scratch.values`; returns the type of scales and offsets.
    fn write_quantized(
        &mut self,
        shape: &Shape,
        quantizer: Quantizer,
        out: &mut Vec<u8>,
    ) -> Result<Dtype, EncodeError> {
        let zstd = self.zstd.as_mut().map_err(|name| EncodeError::Zstd(name))?;
        let Scratch { values, ranges, scales, offsets, codes, packed: [packed, _], frame } =
            &mut self.scratch;
        // Offsets are elements, so in the elements' own type they are exact.
        let dtype = shape.dtype;
        ranges.measure(values, shape, quantizer);
        scales.clear();
        offsets.clear();
        let start = out.len();
        out.resize(start + 4 * ranges.smallest.len(), 0);
        let (scale_bytes, offset_bytes) = out[start..].split_at_mut(2 * ranges.smallest.len());
        let bytes = scale_bytes.chunks_exact_mut(2).zip(offset_bytes.chunks_exact_mut(2));
        for ((&smallest, &largest), (scale_bytes, offset_bytes)) in
            ranges.smallest.iter().zip(&ranges.largest).zip(bytes)
        {
            let (scale, offset) = quantize::scale_and_offset(smallest, largest, self.codec, dtype);
            scale_bytes.copy_from_slice(&scale.to_le_bytes());
            offset_bytes.copy_from_slice(&offset.to_le_bytes());
            scales.push(dtype.widen(scale));
            offsets.push(dtype.widen(offset));
        }
        quantize::quantize(values, scales, offsets, shape, quantizer, largest_code(self.codec), codes);
        let codes = if self.codec == Codec::Int4 {
            packed.clear();
            quantize::pack_int4(codes, usize::from(shape.head_dim), packed);
            packed
        } else {
            codes
        };
        frame::write_section(zstd, frame, codes, out).map_err(EncodeError::Zstd)?;
        Ok(dtype)
    }
}
