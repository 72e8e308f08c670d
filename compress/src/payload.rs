//! How many bytes each part of an encoded plane takes, from its shape and codec alone.

use crate::packing::Packing;
use crate::{Codec, Compression, Dtype, MIN_QUANTIZED_HEAD_DIM, PlaneCodec, Quantizer, Shape, cachegen};

/// Bytes in front of a `lossless` payload: the length of its first section.
pub(crate) const SECTION_LENGTH_BYTES: usize = 4;

/// Why a codec and quantizer can't hold a plane of some shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// An exact codec with a quantizer, a quantizing codec without, or one that it can't go with.
    #[error("codec {codec} can't go with quantizer {quantizer}")]
    Quantizer {
        /// The codec.
        codec: Codec,
        /// The quantizer.
        quantizer: Quantizer,
    },
    /// A scale type where there are no scales, or none where there are.
    #[error("codec {codec} with {}", if *present { "a scale type" } else { "no scale type" })]
    ScaleDtype {
        /// The codec.
        codec: Codec,
        /// Whether a scale type was given.
        present: bool,
    },
    /// A compression that the codec can't go with.
    #[error("codec {codec} can't go with compression {compression}")]
    Compression {
        /// The codec.
        codec: Codec,
        /// The compression.
        compression: Compression,
    },
    /// Bins where there are none, or a number of them that `cachegen` can't have.
    #[error("codec {codec} with {bins} bins: cachegen takes an even number from 4 to 254, other codecs 0")]
    Bins {
        /// The codec.
        codec: Codec,
        /// The bins.
        bins: u8,
    },
    /// The head dimension can't be packed.
    #[error(
        "codec {codec} packs codes of {multiple} dimensions together, but the head dimension is {head_dim}: use \
         lossless"
    )]
    HeadDimMultiple {
        /// The codec.
        codec: Codec,
        /// What the head dimension must be a multiple of.
        multiple: u16,
        /// The head dimension.
        head_dim: u16,
    },
    /// The head dimension is too small for quantization to save anything.
    #[error(
        "codec {codec} needs a head dimension of at least {MIN_QUANTIZED_HEAD_DIM}, not {head_dim}: use lossless"
    )]
    SmallHeadDim {
        /// The codec.
        codec: Codec,
        /// The head dimension.
        head_dim: u16,
    },
    /// Scales, offsets and codes would take more than the plane itself.
    #[error(
        "scales, offsets and codes take {bytes} bytes, the plane only {plane_bytes}: share scales along the other axis"
    )]
    Outgrows {
        /// Bytes of scales, offsets and codes.
        bytes: usize,
        /// Bytes of the decoded plane.
        plane_bytes: usize,
    },
}

/// Sizes of the parts of an encoded plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Groups of elements that share a scale; 0 for the exact codecs.
    pub(crate) groups: usize,
    /// Bytes of all scales.
    pub(crate) scale_bytes: usize,
    /// Bytes of all offsets: as many, or 0 where the quantizer is symmetric.
    pub(crate) offset_bytes: usize,
    /// How codes are packed, and the largest; `None` for the exact codecs.
    pub(crate) codes: Option<Codes>,
    /// Bytes of codes that are never compressed.
    pub(crate) plain_bytes: usize,
    /// Bytes that all sections stand for together; for `raw`, bytes of the plane.
    pub(crate) section_bytes: usize,
    /// Fewest bytes that the encoded plane can take.
    pub(crate) min_bytes: usize,
    /// Most bytes that the encoded plane can take.
    pub(crate) max_bytes: usize,
}

/// The codes of a quantized plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Codes {
    pub(crate) packing: Packing,
    pub(crate) largest: u8,
}

impl Layout {
    /// Bytes in front of the section of a quantized plane.
    pub(crate) const fn before_section(&self) -> usize {
        self.scale_bytes + self.offset_bytes + self.plain_bytes
    }

    /// The layout of a plane of this shape; `shape` has passed [`Shape::check`].
    pub(crate) fn new(shape: &Shape, plane: PlaneCodec, quantizer: Quantizer) -> Result<Self, LayoutError> {
        let PlaneCodec { codec, compression, bins, .. } = plane;
        let plane_bytes = shape.plane_bytes();
        match (codec, quantizer) {
            (Codec::Raw, Quantizer::None) if compression == Compression::None => {
                Ok(Self::exact(plane_bytes, plane_bytes, plane_bytes))
            }
            (Codec::Raw, Quantizer::None) => Err(LayoutError::Compression { codec, compression }),
            // Two sections of at least one byte each.
            (Codec::Lossless, Quantizer::None) => {
                Ok(Self::exact(plane_bytes, SECTION_LENGTH_BYTES + 2, SECTION_LENGTH_BYTES + plane_bytes))
            }
            (Codec::CacheGen, Quantizer::PerToken) if !cachegen::takes(bins) => {
                Err(LayoutError::Bins { codec, bins })
            }
            (Codec::CacheGen, Quantizer::PerToken) => {
                Self::quantized(shape, plane, usize::from(shape.tokens), 0)
            }
            (Codec::Int8 | Codec::Int5 | Codec::Int4 | Codec::Int3, Quantizer::PerChannel) => {
                Self::quantized(shape, plane, shape.channels(), shape.channels())
            }
            (Codec::Int8 | Codec::Int5 | Codec::Int4 | Codec::Int3, Quantizer::PerTokenAndHead) => {
                Self::quantized(shape, plane, shape.head_rows(), shape.head_rows())
            }
            _ => Err(LayoutError::Quantizer { codec, quantizer }),
        }
    }

    fn exact(section_bytes: usize, min_bytes: usize, max_bytes: usize) -> Self {
        Self {
            groups: 0,
            scale_bytes: 0,
            offset_bytes: 0,
            codes: None,
            plain_bytes: 0,
            section_bytes,
            min_bytes,
            max_bytes,
        }
    }

    fn quantized(
        shape: &Shape,
        PlaneCodec { codec, compression, bins, .. }: PlaneCodec,
        groups: usize,
        offsets: usize,
    ) -> Result<Self, LayoutError> {
        let head_dim = shape.head_dim;
        let largest = largest_code(codec, bins);
        let packing = Packing::new(codec, largest)
            .ok_or(LayoutError::Quantizer { codec, quantizer: Quantizer::None })?;
        let multiple = packing.dims_multiple();
        if !head_dim.is_multiple_of(multiple) {
            return Err(LayoutError::HeadDimMultiple { codec, multiple, head_dim });
        }
        if head_dim < MIN_QUANTIZED_HEAD_DIM {
            return Err(LayoutError::SmallHeadDim { codec, head_dim });
        }
        let elements = shape.elements_per_plane();
        let (scale_bytes, offset_bytes) = (groups * Dtype::BYTES, offsets * Dtype::BYTES);
        let (plain_bytes, section_bytes) = (packing.plain_bytes(elements), packing.section_bytes(elements));
        let before_section = scale_bytes + offset_bytes + plain_bytes;
        let max_bytes = before_section + section_bytes;
        let plane_bytes = shape.plane_bytes();
        if max_bytes > plane_bytes {
            return Err(LayoutError::Outgrows { bytes: max_bytes, plane_bytes });
        }
        let min_bytes = if compression == Compression::None { max_bytes } else { before_section + 1 };
        let codes = Some(Codes { packing, largest });
        Ok(Self {
            groups,
            scale_bytes,
            offset_bytes,
            codes,
            plain_bytes,
            section_bytes,
            min_bytes,
            max_bytes,
        })
    }
}

/// Largest code of a quantizing codec; the smallest is 0.
pub(crate) const fn largest_code(codec: Codec, bins: u8) -> u8 {
    match codec {
        Codec::Int3 => 7,
        Codec::Int4 => 15,
        Codec::Int5 => 31,
        Codec::CacheGen => 2 * cachegen::zero_code(bins),
        Codec::Raw | Codec::Lossless | Codec::Int8 => 255,
    }
}

/// Most bytes that an encoded plane of `plane_bytes` decoded bytes can take, whatever its codec.
///
/// Every part of a payload that compression would enlarge is stored instead, so the bound is close.
#[must_use]
pub const fn max_encoded_bytes(plane_bytes: usize) -> usize {
    plane_bytes + SECTION_LENGTH_BYTES
}
