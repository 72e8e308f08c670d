//! A plane's codec as text, in profiles and reports: `CODEC[:BINS][@STEP][/COMPRESSION]`.
//!
//! `int4` is all codes and the codec's own compression; `int4:11` uses eleven of the sixteen codes; `cachegen:32@0.5` keeps the codes of a token
//! at least half its RMS apart; `int8/none` is not compressed.

use std::fmt;
use std::str::FromStr;

use crate::cachegen;
use crate::{Codec, Compression, PlaneCodec};

/// Why a text is no plane's codec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no codec of a plane: {fault}")]
pub struct UnknownPlaneCodec {
    /// The text.
    pub text: String,
    /// What is wrong with it and what is expected.
    pub fault: String,
}

impl fmt::Display for PlaneCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.codec)?;
        if takes_bins(self.codec) && self.bins != 0 {
            write!(f, ":{}", self.bins)?;
        }
        if self.codec == Codec::CacheGen && self.step_milli != 0 {
            write!(f, "@{}", f64::from(self.step_milli) / 1000.0)?;
        }
        if self.codec != Codec::Raw && self.compression != self.codec.default_compression() {
            write!(f, "/{}", self.compression)?;
        }
        Ok(())
    }
}

impl FromStr for PlaneCodec {
    type Err = UnknownPlaneCodec;

    fn from_str(text: &str) -> Result<Self, UnknownPlaneCodec> {
        let unknown = |fault: String| UnknownPlaneCodec { text: text.to_owned(), fault };
        let (rest, compression) = match text.split_once('/') {
            Some((rest, name)) => {
                (rest, Some(name.parse::<Compression>().map_err(|error| unknown(error.to_string()))?))
            }
            None => (text, None),
        };
        let (rest, step) = match rest.split_once('@') {
            Some((rest, step)) => (rest, Some(step)),
            None => (rest, None),
        };
        let (name, bins) = match rest.split_once(':') {
            Some((name, bins)) => (name, Some(bins)),
            None => (rest, None),
        };
        let codec: Codec = name.parse().map_err(|error: crate::UnknownCodec| unknown(error.to_string()))?;
        let mut plane = Self::from(codec);
        if let Some(compression) = compression {
            plane.compression = compression;
        }
        if let Some(bins) = bins {
            plane.bins = parse_bins(codec, bins).map_err(unknown)?;
        }
        if let Some(step) = step {
            plane.step_milli = parse_step(codec, step).map_err(unknown)?;
        }
        if codec == Codec::Raw && compression.is_some_and(|compression| compression != Compression::Zstd) {
            return Err(unknown("raw is never compressed: write raw alone".to_owned()));
        }
        Ok(plane)
    }
}

/// Whether `bins` means something to the codec.
const fn takes_bins(codec: Codec) -> bool {
    !codec.is_exact()
}

fn parse_bins(codec: Codec, text: &str) -> Result<u8, String> {
    let most = match codec {
        Codec::Int3 => 8,
        Codec::Int4 => 16,
        Codec::Int5 => 32,
        Codec::Int8 => 255,
        Codec::CacheGen => {
            let bins = text.parse().ok().filter(|&bins| cachegen::takes(bins));
            return bins.ok_or_else(|| "cachegen takes an even number of bins from 4 to 254".to_owned());
        }
        Codec::Raw | Codec::Lossless => return Err(format!("{codec} has no bins: write {codec} alone")),
    };
    let codes = text.parse().ok().filter(|codes| (2..=most).contains(codes));
    codes.ok_or_else(|| format!("{codec} uses from 2 to {most} codes"))
}

fn parse_step(codec: Codec, text: &str) -> Result<u16, String> {
    if codec != Codec::CacheGen {
        return Err(format!("a step (@{text}) goes with cachegen only"));
    }
    let milli = text.parse::<f64>().ok().map(|step| (step * 1000.0).round());
    let milli = milli.filter(|milli| (1.0..=f64::from(u16::MAX)).contains(milli));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 1 to 65535")]
    let milli = milli.map(|milli| milli as u16);
    milli.ok_or_else(|| "the step is a share of the RMS from 0.001 to 65, as in cachegen:32@0.5".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn faults_name_what_to_write() {
        for (text, hint) in [
            ("int6", "use one of raw"),
            ("int4:17", "from 2 to 16"),
            ("int4:", "from 2 to 16"),
            ("raw:3", "write raw alone"),
            ("raw/none", "write raw alone"),
            ("int4@0.5", "cachegen only"),
            ("cachegen:31", "even number"),
            ("cachegen:32@0", "0.001 to 65"),
            ("cachegen:32@NaN", "0.001 to 65"),
            ("int8/gzip", "none, zstd, deflate, sliced"),
        ] {
            let error = text.parse::<PlaneCodec>().unwrap_err().to_string();
            assert!(error.contains(hint) && error.contains(text), "{error}");
        }
    }

    proptest! {
        #[test]
        fn text_comes_back(
            codec in proptest::sample::select(&Codec::ALL), compression in proptest::sample::select(&Compression::ALL),
            half_bins in 2_u8..=127, step_milli: u16,
        ) {
            let mut plane = PlaneCodec { compression, ..codec.into() };
            match codec {
                Codec::CacheGen => (plane.bins, plane.step_milli) = (2 * half_bins, step_milli),
                Codec::Int8 => plane.bins = 2 * half_bins,
                Codec::Raw => plane.compression = Compression::Zstd,
                _ => {}
            }
            prop_assert_eq!(plane.to_string().parse(), Ok(plane));
        }

        #[test]
        fn any_text_is_taken_or_refused(text in "[a-z0-9:@/.]{0,24}") {
            if let Ok(plane) = text.parse::<PlaneCodec>() {
                prop_assert_eq!(plane.to_string().parse(), Ok(plane));
            }
        }
    }
}
