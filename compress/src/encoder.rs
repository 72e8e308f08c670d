//! From the planes of a chunk to its encoded bytes. Runs once per chunk, when a store takes it in.

use crate::format::{self, FixedHeader, PlaneEntry, header_bytes};
use crate::payload::{Codes, Layout, LayoutError, SECTION_LENGTH_BYTES};
use crate::quantize;
use crate::section::{Content, SectionWriter};
use crate::{
    Codec, Compression, Isa, PlaneCodec, Quantizer, Shape, ShapeError, Side, cachegen, checksum, lossless,
    plane_of,
};

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
    /// Compression failed: out of memory.
    #[error("can't compress: {0}")]
    Compression(&'static str),
}

/// Encodes chunks; reuses its buffers and contexts from chunk to chunk.
pub struct Encoder {
    codecs: Box<dyn Fn(u16, Side) -> PlaneCodec + Send>,
    /// Takes the place of `codecs`.
    chosen: Option<PlaneCodec>,
    isa: Isa,
    sections: SectionWriter,
    scratch: Scratch,
}

#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    groups: quantize::Scratch,
    codes: Vec<u8>,
    packed: [Vec<u8>; 2],
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder of chunks all of whose planes have one codec, compressing codes with zstd at `zstd_level`
    /// ([`DEFAULT_ZSTD_LEVEL`]; zstd takes -131072 to 22 and moves others to the nearest of these). `lossless` is
    /// compressed at zstd's lowest level, whose entropy coding alone makes it both smaller and faster than any other.
    #[must_use]
    pub fn new(codec: impl Into<PlaneCodec>, zstd_level: i32) -> Self {
        let codec = codec.into();
        Self::mixed(move |_, _| codec, zstd_level)
    }

    /// An encoder of chunks whose planes have each their own codec: `codecs(layer, side)`.
    ///
    /// ```
    /// # use compress::{Codec, Compression, Encoder, PlaneCodec, Side};
    /// let encoder = Encoder::mixed(
    ///     |layer, side| match (layer, side) {
    ///         (0..2, _) => Codec::Int8.into(),
    ///         (_, Side::K) => Codec::Int4.into(),
    ///         (_, Side::V) => PlaneCodec { compression: Compression::None, ..Codec::Int4.into() },
    ///     },
    ///     compress::DEFAULT_ZSTD_LEVEL,
    /// );
    /// ```
    #[must_use]
    pub fn mixed(codecs: impl Fn(u16, Side) -> PlaneCodec + Send + 'static, zstd_level: i32) -> Self {
        Self {
            codecs: Box::new(codecs),
            chosen: None,
            isa: Isa::detect(),
            sections: SectionWriter::new(zstd_level),
            scratch: Scratch::default(),
        }
    }

    /// Chooses the instruction set instead of taking the best that the CPU has.
    #[must_use]
    pub fn with_isa(mut self, isa: Isa) -> Self {
        self.isa = isa;
        self.sections = self.sections.with_isa(isa);
        self
    }

    /// Encodes planes so from now on, whatever the encoder was made for: for who is told plane by plane.
    pub fn choose(&mut self, codec: PlaneCodec) {
        self.chosen = Some(codec);
    }

    /// Replaces the content of `out` by the encoded chunk of these planes.
    ///
    /// `plane(layer, side)` gives the bytes of one plane: `[tokens, kv_heads, head_dim]` row-major, little-endian
    /// elements of `shape.dtype`.
    ///
    /// # Errors
    /// A shape beyond the limits or one that the codec can't hold, a plane of the wrong size, and, for the
    /// quantizing codecs, an element that is not finite. `out` is then empty.
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

    /// Appends one plane to `out`, whose start is the chunk's.
    pub(crate) fn write_plane(
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
        let asked = self.chosen.unwrap_or_else(|| (self.codecs)(layer, side));
        let plane_codec = asked.normalized();
        let PlaneCodec { codec, compression, bins, .. } = plane_codec;
        let quantizer = Quantizer::choose(codec, shape, side);
        // Refuses, among others, a head dimension that can't be packed.
        let layout = Layout::new(shape, plane_codec, quantizer)?;
        let offset = out.len();
        let scale_dtype = match layout.codes {
            None if codec == Codec::Lossless => {
                self.write_lossless(compression, plane, out)?;
                None
            }
            None => {
                out.extend_from_slice(plane);
                None
            }
            Some(codes) => {
                if quantizer == Quantizer::PerToken {
                    if let Some(element) = quantize::first_not_finite(plane, shape.dtype) {
                        return Err(EncodeError::NotFinite { layer, side, element });
                    }
                    self.quantize_tokens(shape, asked, codes, plane, out);
                    self.write_codes(compression, out)?;
                } else {
                    let job = quantize::Job {
                        plane,
                        shape,
                        quantizer,
                        packing: codes.packing,
                        largest_used: asked.largest_used(codes.largest),
                        largest_code: codes.largest,
                    };
                    self.write_quantized(&job, &layout, compression, out)?
                        .map_err(|element| EncodeError::NotFinite { layer, side, element })?;
                }
                // Offsets and magnitudes are elements, so in the elements' own type they are exact.
                Some(shape.dtype)
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
            compression,
            bins,
        })
    }

    /// Writes scales, offsets and codes, whose place in `out` is where they are made unless they are to be compressed. The inner error is the
    /// index of the first element that is not finite.
    fn write_quantized(
        &mut self,
        job: &quantize::Job<'_>,
        layout: &Layout,
        compression: Compression,
        out: &mut Vec<u8>,
    ) -> Result<Result<(), usize>, EncodeError> {
        let Scratch { groups, packed: [codes, _], .. } = &mut self.scratch;
        let (start, front_bytes) = (out.len(), layout.before_section());
        if compression == Compression::None {
            out.resize(start + front_bytes + layout.section_bytes, 0);
            let (front, section) = out[start..].split_at_mut(front_bytes);
            return Ok(quantize::quantize(self.isa, job, groups, front, section));
        }
        out.resize(start + front_bytes, 0);
        codes.resize(layout.section_bytes, 0);
        let quantized = quantize::quantize(self.isa, job, groups, &mut out[start..], codes);
        if quantized.is_ok() {
            self.write_codes(compression, out)?;
        }
        Ok(quantized)
    }

    /// Compresses the codes in `scratch.packed[0]`.
    fn write_codes(&mut self, compression: Compression, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let codes = &self.scratch.packed[0];
        self.sections.write(compression, Content::Codes, codes, out).map_err(EncodeError::Compression)
    }

    fn write_lossless(
        &mut self,
        compression: Compression,
        plane: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let Self { sections, scratch: Scratch { packed: [high, low], .. }, .. } = self;
        high.clear();
        low.clear();
        lossless::split(plane, high, low);
        let start = out.len();
        out.extend_from_slice(&[0; SECTION_LENGTH_BYTES]);
        let mut write = |bytes: &[u8], out: &mut Vec<u8>| {
            sections.write(compression, Content::FloatBytes, bytes, out).map_err(EncodeError::Compression)
        };
        write(high, out)?;
        let section_bytes =
            u32::try_from(out.len() - start - SECTION_LENGTH_BYTES).expect("at most half a plane");
        out[start..start + SECTION_LENGTH_BYTES].copy_from_slice(&section_bytes.to_le_bytes());
        write(low, out)
    }

    /// Writes the largest magnitude of each token and the plain part of the codes, and leaves what is to be compressed in
    /// `scratch.packed[0]`.
    fn quantize_tokens(
        &mut self,
        shape: &Shape,
        codec: PlaneCodec,
        packing: Codes,
        plane: &[u8],
        out: &mut Vec<u8>,
    ) {
        let Scratch { values, codes, packed: [section, _], .. } = &mut self.scratch;
        quantize::widen(plane, shape.dtype, values);
        codes.clear();
        for token in values.chunks_exact(shape.channels()) {
            let magnitude = cachegen::quantize_token(token, codec, shape.dtype, codes);
            out.extend_from_slice(&magnitude.to_le_bytes());
        }
        section.clear();
        packing.packing.pack(codes, usize::from(shape.head_dim), out, section);
    }
}
