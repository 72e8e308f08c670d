//! How many bytes each part of an encoded plane takes, from its shape and codec alone.

use crate::{Codec, Dtype, MIN_QUANTIZED_HEAD_DIM, Quantizer, Shape};

/// Bytes in front of a `lossless` payload: the length of its first section.
pub(crate) const SECTION_LENGTH_BYTES: usize = 4;

/// Why a codec and quantizer can't hold a plane of some shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// An exact codec with a quantizer, or a quantizing codec without.
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
    /// The head dimension is odd, so codes can't be packed in pairs.
    #[error(
        "codec int4 packs two dimensions in a byte, but the head dimension {0} is odd: use int8 or lossless"
    )]
    OddHeadDim(u16),
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
    /// Groups of elements that share a scale and an offset; 0 for the exact codecs.
    pub(crate) groups: usize,
    /// Bytes of all scales; the offsets take as many.
    pub(crate) scale_bytes: usize,
    /// Bytes of the codes once decompressed; for the exact codecs, bytes of the plane.
    pub(crate) code_bytes: usize,
    /// Fewest bytes that the encoded plane can take.
    pub(crate) min_bytes: usize,
    /// Most bytes that the encoded plane can take.
    pub(crate) max_bytes: usize,
}

impl Layout {
    /// The layout of a plane of this shape; `shape` has passed [`Shape::check`].
    pub(crate) fn new(shape: &Shape, codec: Codec, quantizer: Quantizer) -> Result<Self, LayoutError> {
        let plane_bytes = shape.plane_bytes();
        let groups = match (codec, quantizer) {
            (Codec::Raw | Codec::Lossless, Quantizer::None) => 0,
            (Codec::Int8 | Codec::Int4, Quantizer::PerChannel) => shape.channels(),
            (Codec::Int8 | Codec::Int4, Quantizer::PerTokenAndHead) => shape.head_rows(),
            _ => return Err(LayoutError::Quantizer { codec, quantizer }),
        };
        let scale_bytes = groups * Dtype::BYTES;
        let code_bytes = match codec {
            Codec::Raw => {
                let [code_bytes, min_bytes, max_bytes] = [plane_bytes; 3];
                return Ok(Self { groups, scale_bytes, code_bytes, min_bytes, max_bytes });
            }
            Codec::Lossless => {
                // Two sections of at least one byte each.
                let (min_bytes, max_bytes) = (SECTION_LENGTH_BYTES + 2, SECTION_LENGTH_BYTES + plane_bytes);
                return Ok(Self { groups, scale_bytes, code_bytes: plane_bytes, min_bytes, max_bytes });
            }
            Codec::Int8 => plane_bytes / 2,
            Codec::Int4 if shape.head_dim % 2 == 1 => return Err(LayoutError::OddHeadDim(shape.head_dim)),
            Codec::Int4 => plane_bytes / 4,
        };
        if shape.head_dim < MIN_QUANTIZED_HEAD_DIM {
            return Err(LayoutError::SmallHeadDim { codec, head_dim: shape.head_dim });
        }
        let max_bytes = 2 * scale_bytes + code_bytes;
        if max_bytes > plane_bytes {
            return Err(LayoutError::Outgrows { bytes: max_bytes, plane_bytes });
        }
        Ok(Self { groups, scale_bytes, code_bytes, min_bytes: 2 * scale_bytes + 1, max_bytes })
    }
}

/// Most bytes that an encoded plane of `plane_bytes` decoded bytes can take, whatever its codec.
///
/// Every part of a payload that compression would enlarge is stored instead, so the bound is close.
#[must_use]
pub const fn max_encoded_bytes(plane_bytes: usize) -> usize {
    plane_bytes + SECTION_LENGTH_BYTES
}
