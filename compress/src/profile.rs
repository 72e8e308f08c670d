//! Profiles: which codec each layer's K and V get, as a small TOML file for one model.
//!
//! ```toml
//! layers = 32
//! kv_heads = 8
//! head_dim = 128
//!
//! [k]
//! "0-9" = "int5"
//! "10-31" = "int4:11"
//!
//! [v]
//! "0-31" = "cachegen:32@0.5"
//! ```
//!
//! Keys are layers, the first is 0, both ends of a range included; values are [`PlaneCodec`]s.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use serde::Deserialize;
use toml::Spanned;

use crate::payload::Layout;
use crate::{CHUNK_TOKENS, Dtype, Encoder, MAX_LAYERS, PlaneCodec, Quantizer, Shape, Side};

/// Why a text is no profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// A line can't be read, or says what can't be.
    #[error("line {line}: {fault}")]
    Line {
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it and what to do.
        fault: String,
    },
    /// Layers without a codec.
    #[error("layer {layer} has no codec for {side}: add a line such as \"{layer}\" = \"int4\" under [{}]", table(*side))]
    Missing {
        /// The first such layer.
        layer: u16,
        /// K or V.
        side: Side,
    },
    /// The KV is not that of the profile's model.
    #[error(
        "the profile is for {} layers with {} heads of {}, the KV has {} layers with {} heads of {}: make a profile \
         from this KV with `shadowserve encode --make-profile`",
        expected[0], expected[1], expected[2], got[0], got[1], got[2]
    )]
    Shape {
        /// Layers, heads and head dimension of the profile.
        expected: [u16; 3],
        /// Those of the KV.
        got: [u16; 3],
    },
}

/// The codec of every plane of one model's chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    layers: u16,
    kv_heads: u16,
    head_dim: u16,
    /// By layer: K's, then V's.
    planes: Vec<[PlaneCodec; 2]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    layers: Spanned<u16>,
    kv_heads: u16,
    head_dim: Spanned<u16>,
    k: BTreeMap<Spanned<String>, Spanned<String>>,
    v: BTreeMap<Spanned<String>, Spanned<String>>,
}

impl Profile {
    /// A profile of `planes`: by layer, the codec of K and that of V.
    ///
    /// # Panics
    /// When there are more layers than the format allows.
    #[must_use]
    pub fn new(kv_heads: u16, head_dim: u16, planes: Vec<[PlaneCodec; 2]>) -> Self {
        let layers = u16::try_from(planes.len()).ok().filter(|&layers| usize::from(layers) <= MAX_LAYERS);
        Self { layers: layers.expect("at most MAX_LAYERS layers"), kv_heads, head_dim, planes }
    }

    /// Reads a profile.
    ///
    /// # Errors
    /// What can't be read or can't be, naming the line and what to do.
    pub fn parse(text: &str) -> Result<Self, ProfileError> {
        let file: File = toml::from_str(text).map_err(|error| ProfileError::Line {
            line: error.span().map_or(1, |span| line_of(text, span.start)),
            fault: error.message().to_owned(),
        })?;
        let layers = *file.layers.get_ref();
        if layers == 0 || usize::from(layers) > MAX_LAYERS {
            let line = line_of(text, file.layers.span().start);
            return Err(ProfileError::Line { line, fault: format!("layers is from 1 to {MAX_LAYERS}") });
        }
        let shape = Shape {
            layers,
            kv_heads: file.kv_heads,
            head_dim: *file.head_dim.get_ref(),
            tokens: u16::try_from(CHUNK_TOKENS).expect("a chunk's tokens fit in 16 bits"),
            dtype: Dtype::Bf16,
        };
        shape.check().map_err(|error| ProfileError::Line {
            line: line_of(text, file.head_dim.span().start),
            fault: error.to_string(),
        })?;
        let k = side_codecs(text, &shape, Side::K, &file.k)?;
        let v = side_codecs(text, &shape, Side::V, &file.v)?;
        Ok(Self::new(shape.kv_heads, shape.head_dim, k.into_iter().zip(v).map(|(k, v)| [k, v]).collect()))
    }

    /// The profile as [`Profile::parse`] reads it: the same text for equal profiles.
    #[must_use]
    pub fn to_text(&self) -> String {
        let Self { layers, kv_heads, head_dim, planes } = self;
        let mut text = format!("layers = {layers}\nkv_heads = {kv_heads}\nhead_dim = {head_dim}\n");
        for side in [Side::K, Side::V] {
            let codecs: Vec<PlaneCodec> = planes.iter().map(|pair| pair[index(side)]).collect();
            write!(text, "\n[{}]\n", table(side)).expect("strings take everything");
            let mut first = 0;
            for run in codecs.chunk_by(PartialEq::eq) {
                let last = first + run.len() - 1;
                let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
                writeln!(text, "\"{range}\" = \"{}\"", run[0]).expect("strings take everything");
                first = last + 1;
            }
        }
        text
    }

    /// The codec of one plane.
    ///
    /// # Panics
    /// When the model has no such layer; [`Profile::check`] is asked first.
    #[must_use]
    pub fn plane(&self, layer: u16, side: Side) -> PlaneCodec {
        self.planes[usize::from(layer)][index(side)]
    }

    /// Whether KV with so many layers, heads and dimensions is what this profile is for.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self, layers: u16, kv_heads: u16, head_dim: u16) -> Result<(), ProfileError> {
        let (expected, got) = ([self.layers, self.kv_heads, self.head_dim], [layers, kv_heads, head_dim]);
        if expected == got { Ok(()) } else { Err(ProfileError::Shape { expected, got }) }
    }

    /// A name that no other profile has: what stands in the place of the codec's name where chunks are named.
    #[must_use]
    pub fn id(&self) -> String {
        let hash = blake3::hash(self.to_text().as_bytes()).to_hex();
        format!("profile-{}", &hash[..32])
    }
}

/// How the planes of chunks are encoded: all alike, or as a profile says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Codecs {
    /// All planes with one codec.
    One(PlaneCodec),
    /// Each plane as the profile says.
    Each(Arc<Profile>),
}

impl Codecs {
    /// The codec of one plane.
    ///
    /// # Panics
    /// When the profile has no such layer; [`Codecs::check`] is asked first.
    #[must_use]
    pub fn plane(&self, layer: u16, side: Side) -> PlaneCodec {
        match self {
            Self::One(codec) => *codec,
            Self::Each(profile) => profile.plane(layer, side),
        }
    }

    /// What stands in a namespace for how chunks are encoded: the codec's name, or the profile's [`Profile::id`].
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::One(codec) => codec.codec.name().to_owned(),
            Self::Each(profile) => profile.id(),
        }
    }

    /// Whether KV of this shape can be encoded so.
    ///
    /// # Errors
    /// When the profile is for another shape.
    pub fn check(&self, layers: u16, kv_heads: u16, head_dim: u16) -> Result<(), ProfileError> {
        match self {
            Self::One(_) => Ok(()),
            Self::Each(profile) => profile.check(layers, kv_heads, head_dim),
        }
    }

    /// An encoder of such chunks, with zstd at `zstd_level`.
    #[must_use]
    pub fn encoder(&self, zstd_level: i32) -> Encoder {
        let codecs = self.clone();
        Encoder::mixed(move |layer, side| codecs.plane(layer, side), zstd_level)
    }
}

impl From<PlaneCodec> for Codecs {
    fn from(codec: PlaneCodec) -> Self {
        Self::One(codec)
    }
}

const fn table(side: Side) -> &'static str {
    match side {
        Side::K => "k",
        Side::V => "v",
    }
}

const fn index(side: Side) -> usize {
    match side {
        Side::K => 0,
        Side::V => 1,
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}

/// The codecs of one side, by layer.
fn side_codecs(
    text: &str,
    shape: &Shape,
    side: Side,
    entries: &BTreeMap<Spanned<String>, Spanned<String>>,
) -> Result<Vec<PlaneCodec>, ProfileError> {
    let mut codecs = vec![None; usize::from(shape.layers)];
    for (range, value) in entries {
        let fault = |fault: String| ProfileError::Line { line: line_of(text, range.span().start), fault };
        let (first, last) = layer_range(range.get_ref(), shape.layers).map_err(fault)?;
        let codec: PlaneCodec =
            value.get_ref().parse().map_err(|error: crate::UnknownPlaneCodec| fault(error.to_string()))?;
        Layout::new(shape, codec.normalized(), Quantizer::choose(codec.codec, shape, side))
            .map_err(|error| fault(error.to_string()))?;
        for (layer, place) in (first..=last).zip(&mut codecs[usize::from(first)..]) {
            if place.replace(codec).is_some() {
                return Err(fault(format!("layer {layer} is named twice under [{}]", table(side))));
            }
        }
    }
    let missing = |layer: usize| ProfileError::Missing { layer: u16::try_from(layer).unwrap_or(0), side };
    codecs.into_iter().enumerate().map(|(layer, codec)| codec.ok_or_else(|| missing(layer))).collect()
}

/// First and last of `"7"` or `"3-9"`.
fn layer_range(text: &str, layers: u16) -> Result<(u16, u16), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = first.parse().ok().zip(last.parse().ok());
    range.filter(|&(first, last)| first <= last && last < layers).ok_or_else(|| {
        format!("{text:?} is no range of layers: write \"7\" or \"3-9\", from 0 to {}", layers - 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Codec;
    use proptest::prelude::*;

    const TEXT: &str = "layers = 3\nkv_heads = 8\nhead_dim = 128\n\n[k]\n\"0\" = \"int5\"\n\"1-2\" = \"int4:11\"\n\n\
                        [v]\n\"0-2\" = \"cachegen:32@0.5\"\n";

    #[test]
    fn a_profile_names_every_plane() {
        let profile = Profile::parse(TEXT).unwrap();
        assert_eq!(profile.plane(0, Side::K), Codec::Int5.into());
        assert_eq!(profile.plane(2, Side::K).bins, 11);
        assert_eq!(profile.plane(1, Side::V).step_milli, 500);
        assert_eq!(profile.to_text(), TEXT);
        assert_eq!(profile.check(3, 8, 128), Ok(()));
        assert!(profile.check(3, 8, 64).unwrap_err().to_string().contains("8 heads of 64"));
        let other = Profile::parse(&TEXT.replace("0.5", "0.6")).unwrap();
        assert!(other.id() != profile.id() && profile.id() == Profile::parse(TEXT).unwrap().id());
    }

    #[test]
    fn faults_name_the_line() {
        for (from, to, expected) in [
            ("\"1-2\"", "\"1-3\"", "line 7: \"1-3\" is no range"),
            ("\"1-2\"", "\"0-2\"", "layer 0 is named twice under [k]"),
            ("\"1-2\"", "\"2\"", "layer 1 has no codec for K"),
            ("int4:11", "int4:99", "line 7: \"int4:99\" is no codec"),
            ("cachegen:32@0.5", "cachegen:7", "line 10"),
            ("head_dim = 128", "head_dim = 12", "line 6: codec int5 packs codes of 8"),
            ("layers = 3", "layers = 0", "line 1: layers is from 1"),
            ("kv_heads", "heads", "line 2"),
            ("[v]", "[v", "line 9"),
        ] {
            let error = Profile::parse(&TEXT.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn text_comes_back(choices in proptest::collection::vec((0..4_usize, 0..4_usize), 1..40)) {
            let codecs = ["int8", "int5:20", "int4:9/none", "cachegen:24@0.75"].map(|text| text.parse().unwrap());
            let planes = choices.iter().map(|&(k, v)| [codecs[k], codecs[v]]).collect();
            let profile = Profile::new(2, 64, planes);
            prop_assert_eq!(Profile::parse(&profile.to_text()), Ok(profile));
        }
    }
}
