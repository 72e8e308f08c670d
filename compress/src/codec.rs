//! How a plane is encoded: the codec, the axis that shares a scale, and the compression of the codes.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a plane's elements become bytes. `docs/FORMAT.md` specifies each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// The 16-bit elements as they are.
    Raw,
    /// Exact: high and low bytes of the elements apart, each compressed.
    Lossless,
    /// 8-bit codes with shared scales, compressed.
    Int8,
    /// 5-bit codes with shared scales, compressed.
    Int5,
    /// 4-bit codes with shared scales, compressed.
    Int4,
    /// 3-bit codes with shared scales, compressed.
    Int3,
    /// CacheGen's quantizer (arXiv 2310.07240): symmetric bins over all elements of a token, compressed.
    CacheGen,
}

impl Codec {
    /// Every codec, in the order of size, largest first; `cachegen`, whose bins are a choice, last.
    pub const ALL: [Self; 7] =
        [Self::Raw, Self::Lossless, Self::Int8, Self::Int5, Self::Int4, Self::Int3, Self::CacheGen];

    /// The number that stands for this codec in an encoded chunk.
    #[must_use]
    pub const fn wire(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Lossless => 1,
            Self::Int8 => 2,
            Self::Int4 => 3,
            Self::Int5 => 4,
            Self::Int3 => 5,
            Self::CacheGen => 6,
        }
    }

    /// The codec a number in an encoded chunk stands for, or `None` for a number without a meaning.
    #[must_use]
    pub const fn from_wire(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Raw),
            1 => Some(Self::Lossless),
            2 => Some(Self::Int8),
            3 => Some(Self::Int4),
            4 => Some(Self::Int5),
            5 => Some(Self::Int3),
            6 => Some(Self::CacheGen),
            _ => None,
        }
    }

    /// The name used by flags, files and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Lossless => "lossless",
            Self::Int8 => "int8",
            Self::Int5 => "int5",
            Self::Int4 => "int4",
            Self::Int3 => "int3",
            Self::CacheGen => "cachegen",
        }
    }

    /// How its sections are compressed unless told otherwise: what decodes fastest of what makes them about as small as anything
    /// does. `docs/CODEC.md` has the measurement.
    #[must_use]
    pub const fn default_compression(self) -> Compression {
        match self {
            Self::Int8 | Self::Int5 | Self::Int4 | Self::Int3 => Compression::Sliced,
            // High bytes of floats, and codes most of which are the same few: codewords of less than two bits.
            Self::Raw | Self::Lossless | Self::CacheGen => Compression::Zstd,
        }
    }

    /// Whether decoding gives back the very bits that were encoded.
    #[must_use]
    pub const fn is_exact(self) -> bool {
        matches!(self, Self::Raw | Self::Lossless)
    }
}

impl std::fmt::Display for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// A codec's name that no codec has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown codec {0:?}: use one of raw, lossless, int8, int5, int4, int3, cachegen")]
pub struct UnknownCodec(pub String);

impl FromStr for Codec {
    type Err = UnknownCodec;

    fn from_str(name: &str) -> Result<Self, UnknownCodec> {
        Self::ALL.into_iter().find(|codec| codec.name() == name).ok_or_else(|| UnknownCodec(name.to_owned()))
    }
}

/// Which elements of a plane share one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantizer {
    /// No scales: the codec is exact.
    None,
    /// All tokens of one channel (one dimension of one head): `kv_heads * head_dim` scales.
    PerChannel,
    /// All dimensions of one token's head: `tokens * kv_heads` scales.
    PerTokenAndHead,
    /// All heads and dimensions of one token, symmetric: `tokens` largest magnitudes, no offsets. `cachegen` only.
    PerToken,
}

impl Quantizer {
    /// The number that stands for this quantizer in an encoded chunk.
    #[must_use]
    pub const fn wire(self) -> u8 {
        match self {
            Self::None => 0,
            Self::PerChannel => 1,
            Self::PerTokenAndHead => 2,
            Self::PerToken => 3,
        }
    }

    /// The quantizer a number in an encoded chunk stands for, or `None` for a number without a meaning.
    #[must_use]
    pub const fn from_wire(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::None),
            1 => Some(Self::PerChannel),
            2 => Some(Self::PerTokenAndHead),
            3 => Some(Self::PerToken),
            _ => None,
        }
    }
}

impl std::fmt::Display for Quantizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::PerChannel => "per-channel",
            Self::PerTokenAndHead => "per-token-and-head",
            Self::PerToken => "per-token",
        })
    }
}

/// How the sections of a plane are compressed, without loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all: codes are stored as packed. The least work to decode.
    None,
    /// One zstd frame for each section.
    Zstd,
    /// One raw Deflate stream for each section: what compression devices read. Decodes several times slower than zstd on a core.
    Deflate,
    /// A prefix code of nibbles whose bits are decoded 64 codewords at a time: several times as fast as zstd on a core, and as small
    /// where codes have skew and no repeats.
    Sliced,
}

impl Compression {
    /// Every compression that has a number and a name, in the order of the numbers.
    pub const ALL: [Self; 4] = [Self::None, Self::Zstd, Self::Deflate, Self::Sliced];

    /// The number that stands for this compression in an encoded chunk. 3 is reserved for LZ4.
    #[must_use]
    pub const fn wire(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Zstd => 1,
            Self::Deflate => 2,
            Self::Sliced => 4,
        }
    }

    /// The compression a number in an encoded chunk stands for, or `None` for a number without a meaning.
    #[must_use]
    pub const fn from_wire(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::None),
            1 => Some(Self::Zstd),
            2 => Some(Self::Deflate),
            4 => Some(Self::Sliced),
            _ => None,
        }
    }

    /// The name used by flags, files and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zstd => "zstd",
            Self::Deflate => "deflate",
            Self::Sliced => "sliced",
        }
    }
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// A compression's name that no compression has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown compression {0:?}: use one of none, zstd, deflate, sliced")]
pub struct UnknownCompression(pub String);

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(name: &str) -> Result<Self, UnknownCompression> {
        let named = Self::ALL.into_iter().find(|compression| compression.name() == name);
        named.ok_or_else(|| UnknownCompression(name.to_owned()))
    }
}

/// How one plane is to be encoded. A chunk may mix them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlaneCodec {
    /// How elements become bytes.
    pub codec: Codec,
    /// How those bytes are compressed; [`Codec::Raw`] is not, whatever stands here.
    pub compression: Compression,
    /// Bins of [`Codec::CacheGen`], even, 4 to 254. Of the integer codecs: how many of their codes the encoder uses, at
    /// least 2, or 0 for all; fewer make a smaller section, and decoders need not know. The others leave it alone.
    pub bins: u8,
    /// [`Codec::CacheGen`]: the least distance of two codes, in thousandths of the RMS of the token's elements; 0 is
    /// CacheGen's own rule, whose distance follows from the largest element alone. Decoders need not know.
    pub step_milli: u16,
}

/// Bins of `cachegen` unless told otherwise: what LMCache gives the first layers of Llama-8B and Mistral-7B.
pub const DEFAULT_BINS: u8 = 32;

impl From<Codec> for PlaneCodec {
    /// With [`Codec::default_compression`]; [`DEFAULT_BINS`], and all codes of the integer codecs.
    fn from(codec: Codec) -> Self {
        let bins = if codec == Codec::CacheGen { DEFAULT_BINS } else { 0 };
        Self { codec, compression: codec.default_compression(), bins, step_milli: 0 }
    }
}

impl PlaneCodec {
    /// Without what the codec has no use for: as it stands in an entry.
    pub(crate) fn normalized(self) -> Self {
        let plain = Self { step_milli: 0, ..self };
        match self.codec {
            Codec::Raw => Self { compression: Compression::None, bins: 0, ..plain },
            Codec::CacheGen => plain,
            _ => Self { bins: 0, ..plain },
        }
    }

    /// The largest code that the encoder uses, of an integer codec whose largest is `largest`.
    pub(crate) fn largest_used(self, largest: u8) -> u8 {
        if self.bins == 0 { largest } else { (self.bins - 1).clamp(1, largest) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_go_both_ways() {
        for codec in Codec::ALL {
            assert_eq!(codec.to_string().parse(), Ok(codec));
            assert_eq!(Codec::from_wire(codec.wire()), Some(codec));
        }
        for compression in Compression::ALL {
            assert_eq!(compression.to_string().parse(), Ok(compression));
            assert_eq!(Compression::from_wire(compression.wire()), Some(compression));
        }
        assert_eq!((7..=255).find_map(Codec::from_wire), None);
        assert_eq!((4..=255).find_map(Quantizer::from_wire), None);
        assert_eq!((5..=255).chain([3]).find_map(Compression::from_wire), None);
        assert_eq!("int6".parse::<Codec>(), Err(UnknownCodec("int6".into())));
        assert_eq!("gzip".parse::<Compression>(), Err(UnknownCompression("gzip".into())));
    }
}
