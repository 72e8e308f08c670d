//! How a plane is encoded: the codec, and the axis that shares a scale.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a plane's elements become bytes. `docs/FORMAT.md` specifies each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// The 16-bit elements as they are.
    Raw,
    /// Exact: high and low bytes of the elements apart, each compressed with zstd.
    Lossless,
    /// 8-bit codes with shared scales, compressed with zstd.
    Int8,
    /// 4-bit codes with shared scales, compressed with zstd.
    Int4,
}

impl Codec {
    /// Every codec, in the order of size, largest first.
    pub const ALL: [Self; 4] = [Self::Raw, Self::Lossless, Self::Int8, Self::Int4];

    /// The number that stands for this codec in an encoded chunk.
    #[must_use]
    pub const fn wire(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Lossless => 1,
            Self::Int8 => 2,
            Self::Int4 => 3,
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
            Self::Int4 => "int4",
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
#[error("unknown codec {0:?}: use one of raw, lossless, int8, int4")]
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
}

impl Quantizer {
    /// The number that stands for this quantizer in an encoded chunk.
    #[must_use]
    pub const fn wire(self) -> u8 {
        match self {
            Self::None => 0,
            Self::PerChannel => 1,
            Self::PerTokenAndHead => 2,
        }
    }

    /// The quantizer a number in an encoded chunk stands for, or `None` for a number without a meaning.
    #[must_use]
    pub const fn from_wire(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::None),
            1 => Some(Self::PerChannel),
            2 => Some(Self::PerTokenAndHead),
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
        })
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
        assert_eq!((4..=255).find_map(Codec::from_wire), None);
        assert_eq!((3..=255).find_map(Quantizer::from_wire), None);
        assert_eq!("int5".parse::<Codec>(), Err(UnknownCodec("int5".into())));
    }
}
