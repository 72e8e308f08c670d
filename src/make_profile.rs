//! `shadowserve encode --make-profile`: what every codec costs and errs on every plane of a sample, and the best choice.
//!
//! The error of a plane is its squared error relative to what attention can tell apart: of K, the spread of each channel
//! over the chunk's tokens (a constant added to all keys changes no attention weight); of V, the length of each token's
//! vector, token by token, since attention may look at any token, and at short ones most of all. What that error does to
//! the model's output differs by layer and side: the weights. Those of SmolLM2, and how well this predicts the output, is
//! measured in `perf/quality/`.

use std::path::Path;

use anyhow::{Context, bail};
use compress::{
    Candidate, Codecs, Decoder, Dtype, Encoder, Goal, PlaneCodec, Profile, Shape, Side, allocate,
};
use serde::Deserialize;
use store::kv_file::KvFile;
use toml::Spanned;

use crate::encode::write_whole;

/// What the profile is to reach.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// Bytes of 16-bit elements for each encoded byte.
    Ratio(f64),
    /// Mean over all planes of weight times relative squared error.
    Error(f64),
}

/// Weights of K and V where nothing is known of the layers: the geometric means over SmolLM2's layers stand 3.5 to 1.
const DEFAULT_WEIGHTS: [f64; 2] = [3.5, 1.0];

/// Codecs to choose from, on either side.
const CANDIDATES: &[&str] = &[
    "int8",
    "int8:128",
    "int8:96",
    "int8:64",
    "int5",
    "int5:26",
    "int5:22",
    "int5:18",
    "int4",
    "int4:14",
    "int4:13",
    "int4:12",
    "int4:11",
    "int4:10",
    "int4:9",
    "int4:8",
    "int4:7",
    "int4:6",
    "int4:5",
    "cachegen:64@0.15",
    "cachegen:64@0.2",
    "cachegen:64@0.25",
    "cachegen:32@0.2",
    "cachegen:32@0.25",
    "cachegen:32@0.3",
    "cachegen:32@0.35",
    "cachegen:32@0.4",
    "cachegen:32@0.45",
    "cachegen:32@0.5",
    "cachegen:32@0.55",
    "cachegen:32@0.6",
    "cachegen:32@0.7",
    "cachegen:32@0.8",
    "cachegen:32@0.9",
    "cachegen:32@1",
    "cachegen:32@1.2",
    "cachegen:16@0.5",
    "cachegen:16@0.6",
    "cachegen:16@0.7",
    "cachegen:16@0.8",
    "cachegen:16@1",
    "cachegen:16@1.2",
];

/// What an error in each layer weighs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sensitivity {
    k: Spanned<Vec<f64>>,
    v: Spanned<Vec<f64>>,
}

/// Chooses, writes the profile to `out`, and returns it.
pub(crate) fn run(
    file: &KvFile,
    input: &Path,
    out: &Path,
    target: Target,
    sensitivity: Option<&Path>,
    level: i32,
) -> anyhow::Result<Codecs> {
    let shape = file.shape();
    let weights = weights(sensitivity, shape.layers)?;
    let codecs = candidates(&shape.chunk(0));
    let mut planes = Vec::new();
    for layer in 0..shape.layers {
        for (side, weight) in [Side::K, Side::V].into_iter().zip(weights[usize::from(layer)]) {
            planes.push(measure(file, layer, side, weight, &codecs, level)?);
        }
    }
    let goal = match target {
        Target::Ratio(ratio) if ratio.is_finite() && ratio > 0.0 => Goal::Bytes(most_bytes(file, ratio)),
        #[expect(clippy::cast_precision_loss, reason = "at most 1024 planes")]
        Target::Error(error) if error >= 0.0 => Goal::Error(error * planes.len() as f64),
        _ => bail!("--target-ratio and --target-error are positive numbers"),
    };
    let chosen = allocate(&planes, goal);
    let picked: Vec<PlaneCodec> = chosen.iter().map(|&at| codecs[at]).collect();
    let profile = Profile::new(
        shape.kv_heads,
        shape.head_dim,
        picked.chunks(2).map(|pair| [pair[0], pair[1]]).collect(),
    );
    write_whole(out, (heading(input, target, &planes, &chosen) + &profile.to_text()).as_bytes())?;
    Ok(Codecs::Each(profile.into()))
}

/// The candidates that can hold planes of this shape.
fn candidates(shape: &Shape) -> Vec<PlaneCodec> {
    let fits = |codec: &PlaneCodec| {
        let one = Shape { layers: 1, ..*shape };
        let zeros = vec![0; one.plane_bytes()];
        Encoder::new(*codec, 1).encode_chunk(&[0; 32], &one, |_, _| &zeros, &mut Vec::new()).is_ok()
    };
    CANDIDATES.iter().map(|text| text.parse().expect("candidates are codecs")).filter(fits).collect()
}

/// The most bytes that planes may take for the whole file, headers included, to have this ratio.
fn most_bytes(file: &KvFile, ratio: f64) -> u64 {
    let shape = file.shape();
    let headers = shape.chunks() * compress::header_bytes(shape.chunk(0).planes());
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "sizes of files, rounded down; a negative one becomes 0"
    )]
    let bytes = (2.0 * shape.tensor_bytes() as f64 / ratio - headers as f64) as u64;
    bytes
}

/// Cost and weighted error of every codec on one plane of all chunks.
fn measure(
    file: &KvFile,
    layer: u16,
    side: Side,
    weight: f64,
    codecs: &[PlaneCodec],
    level: i32,
) -> anyhow::Result<Vec<Candidate>> {
    let mut totals = vec![Candidate { bytes: 0, error: 0.0 }; codecs.len()];
    let mut encoders: Vec<Encoder> = codecs.iter().map(|&codec| Encoder::new(codec, level)).collect();
    let mut decoder = Decoder::new(file.shape().chunk(0).plane_bytes());
    let (mut plane, mut encoded) = (Vec::new(), Vec::new());
    for chunk in 0..file.shape().chunks() {
        file.read_plane(chunk, layer, side, &mut plane)?;
        // A chunk of this plane alone, as K and as V: which one it is decides the axis.
        let shape = Shape { layers: 1, ..file.shape().chunk(chunk) };
        let original = widen(&plane, shape.dtype);
        let share = f64::from(shape.tokens) / f64::from(u32::try_from(file.shape().tokens)?);
        for (total, encoder) in totals.iter_mut().zip(&mut encoders) {
            encoder
                .encode_chunk(&[0; 32], &shape, |_, _| &plane, &mut encoded)
                .with_context(|| format!("chunk {chunk}, layer {layer}, {side}"))?;
            let view = compress::ChunkView::parse(&encoded)?;
            let index = compress::plane_index(0, side);
            let entry = view.planes().nth(index).context("a chunk of one layer has two planes")?;
            let start = usize::try_from(entry.offset)?;
            let bytes = &encoded[start..start + usize::try_from(entry.bytes)?];
            let mut decoded = vec![0; shape.plane_bytes()];
            decoder.decode(&shape, &entry, bytes, shape.dtype, &mut decoded)?;
            let decoded = widen(&decoded, shape.dtype);
            total.bytes += u64::from(entry.bytes);
            total.error += weight * share * relative_error(&original, &decoded, &shape, side);
        }
    }
    Ok(totals)
}

/// The plane's squared error, relative to what attention can tell apart.
fn relative_error(original: &[f64], decoded: &[f64], shape: &Shape, side: Side) -> f64 {
    let channels = usize::from(shape.kv_heads) * usize::from(shape.head_dim);
    let squares = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
    let quotient = |error: f64, size: f64| if error == 0.0 { 0.0 } else { error / size };
    let rows = || original.chunks_exact(channels);
    match side {
        Side::K => {
            let mut mean = vec![0.0; channels];
            for row in rows() {
                mean.iter_mut().zip(row).for_each(|(mean, value)| *mean += value / f64::from(shape.tokens));
            }
            quotient(squares(original, decoded), rows().map(|row| squares(row, &mean)).sum())
        }
        Side::V => {
            let zeros = vec![0.0; channels];
            let errors = rows().zip(decoded.chunks_exact(channels));
            let sum: f64 =
                errors.map(|(row, decoded)| quotient(squares(row, decoded), squares(row, &zeros))).sum();
            sum / f64::from(shape.tokens)
        }
    }
}

fn widen(plane: &[u8], dtype: Dtype) -> Vec<f64> {
    plane
        .chunks_exact(2)
        .map(|element| f64::from(dtype.widen(u16::from_le_bytes([element[0], element[1]]))))
        .collect()
}

/// By layer, what an error weighs in K and in V.
fn weights(path: Option<&Path>, layers: u16) -> anyhow::Result<Vec<[f64; 2]>> {
    let Some(path) = path else { return Ok(vec![DEFAULT_WEIGHTS; usize::from(layers)]) };
    let name = || format!("--sensitivity {}", path.display());
    let text = std::fs::read_to_string(path).with_context(name)?;
    let sensitivity: Sensitivity = toml::from_str(&text).with_context(name)?;
    for (side, list) in [("k", &sensitivity.k), ("v", &sensitivity.v)] {
        let line = text[..list.span().start].matches('\n').count() + 1;
        let values = list.get_ref();
        if values.len() != usize::from(layers) {
            bail!(
                "{}: line {line}: `{side}` has {} weights, the KV has {layers} layers",
                name(),
                values.len()
            );
        }
        if values.iter().any(|weight| !weight.is_finite() || *weight < 0.0) {
            bail!("{}: line {line}: `{side}` holds a weight that is not a positive number", name());
        }
    }
    let pairs = sensitivity.k.into_inner().into_iter().zip(sensitivity.v.into_inner());
    Ok(pairs.map(|(k, v)| [k, v]).collect())
}

/// The comment on top of a profile: where it comes from and what it reaches there.
fn heading(input: &Path, target: Target, planes: &[Vec<Candidate>], chosen: &[usize]) -> String {
    let picked = || planes.iter().zip(chosen).map(|(plane, &at)| plane[at]);
    #[expect(clippy::cast_precision_loss, reason = "a mean for people")]
    let error = picked().map(|candidate| candidate.error).sum::<f64>() / planes.len() as f64;
    let bytes: u64 = picked().map(|candidate| candidate.bytes).sum();
    let target = match target {
        Target::Ratio(ratio) => format!("ratio {ratio}"),
        Target::Error(error) => format!("error {error}"),
    };
    let name = input.file_name().unwrap_or_default().display();
    format!(
        "# Made by `shadowserve encode --make-profile` from {name}, target {target}.\n\
         # There its planes take {bytes} bytes, and their mean weighted error is {error:.3e}.\n"
    )
}
