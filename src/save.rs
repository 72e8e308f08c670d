//! `shadowserve save`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use client::{
    Client, ClientConfig, Dtype, FewerCopies, Outcome, Region, SaveCodec, SaveReport, SaveRequest, Shape,
};
use compress::{Codec, Codecs, PlaneCodec, Side};
use serde_json::{Value, json};
use store::kv_file::{KvFile, SequenceShape};

use crate::flags::{self, DEFAULT_SOCKET, NamespaceFlags};
use crate::out::{print_line, say};
use crate::verify::plane_offset;

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// The KV to save: a .safetensors file with `k`, `v` [layers, tokens, kv_heads, head_dim] and `tokens`
    #[arg(long, value_name = "FILE", required = true)]
    input: Option<PathBuf>,
    /// How planes are encoded: raw, lossless, int8, int5, int4, int3 or cachegen
    #[arg(long, value_name = "CODEC", default_value = "int4", conflicts_with = "profile")]
    codec: Codec,
    /// Encode each layer's K and V as this file says, which `shadowserve encode --make-profile` writes
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Offer also the leading chunks that a lookup finds stored
    #[arg(long)]
    all: bool,
    /// Unix socket of the data plane
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// How long the lookup, and then the save, may take, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    timeout_ms: u64,
    #[command(flatten)]
    namespace: NamespaceFlags,
    /// Print one JSON object on standard output and nothing else there
    #[arg(long)]
    json: bool,
    /// TOML file with a table per subcommand and the names of these flags; flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let file = KvFile::open(flags.input.as_deref().context("--input is missing")?)?;
    let (shape, timeout) = (file.shape(), Duration::from_millis(flags.timeout_ms));
    let codecs = match &flags.profile {
        Some(path) => flags::read_profile(path)?,
        None => PlaneCodec::from(flags.codec).into(),
    };
    codecs.check(shape.layers, shape.kv_heads, shape.head_dim).context("--profile")?;
    let client = Client::connect(&flags.socket, &ClientConfig::new(flags.namespace.namespace(&codecs)))?;
    let chunks = shape.chunks();
    // What the store has need not be encoded. If it does not answer, the save will say so.
    let known = if flags.all {
        Ok(0)
    } else {
        client.lookup(file.tokens(), timeout).map(|prefix| prefix.chunks.len())
    };
    let known = known.unwrap_or(0);
    let report = if known < chunks {
        let region = client.register(2 * shape.tensor_bytes())?;
        load(&file, &region)?;
        let keys = client.keys(file.tokens());
        let codec = match &codecs {
            Codecs::One(codec) => SaveCodec::One(codec.codec.name().parse().context("--codec")?),
            Codecs::Each(profile) => SaveCodec::Profile { id: profile.id(), text: profile.to_text() },
        };
        let mut request = SaveRequest::sequence(&region, client_shape(&shape), codec, &keys, shape.tokens)?;
        request.chunks.drain(..known);
        request.timeout = timeout;
        client.save(&request)?.finish()?
    } else {
        SaveReport::nothing()
    };
    let chunk = |missed: &client::NotSaved| known + missed.chunk as usize;
    if flags.json {
        print_line!("{}", to_json(&report, chunks, known, shape.tensor_bytes()))?;
    } else {
        let ms = report.elapsed.as_millis();
        print_line!(
            "{} of {chunks} chunks put, {} bytes encoded, in {ms} ms; {} were stored before",
            report.stored,
            report.encoded_bytes,
            known + report.already_stored as usize
        )?;
    }
    for fewer in &report.fewer_copies {
        let FewerCopies { chunk, copies, replicas, reason } = fewer;
        let chunk = known + *chunk as usize;
        say!("warning: chunk {chunk} is on {copies} of {replicas} stores: {reason}");
    }
    if report.outcome == Outcome::Done {
        return Ok(ExitCode::SUCCESS);
    }
    say!("error: {}", report.message);
    for missed in &report.not_saved {
        say!("error: chunk {} was not saved: {}", chunk(missed), missed.reason);
    }
    Ok(ExitCode::FAILURE)
}

/// Copies the file's planes into the region, as two tensors.
fn load(file: &KvFile, region: &Region) -> anyhow::Result<()> {
    let (shape, mut plane) = (file.shape(), Vec::new());
    for chunk in 0..shape.chunks() {
        for layer in 0..shape.layers {
            for side in [Side::K, Side::V] {
                file.read_plane(chunk, layer, side, &mut plane)?;
                let at = plane_offset(&shape, chunk, layer, side);
                region
                    .arena()
                    .copy_in(at, &plane)
                    .context("the region is smaller than the file's tensors")?;
            }
        }
    }
    Ok(())
}

fn client_shape(shape: &SequenceShape) -> Shape {
    let dtype = match shape.dtype {
        compress::Dtype::Bf16 => Dtype::Bf16,
        compress::Dtype::F16 => Dtype::F16,
    };
    Shape { layers: shape.layers, kv_heads: shape.kv_heads, head_dim: shape.head_dim, dtype }
}

fn to_json(report: &SaveReport, chunks: usize, known: usize, tensor_bytes: usize) -> Value {
    let outcome = match report.outcome {
        Outcome::Done => "done",
        Outcome::Failed => "failed",
        Outcome::Cancelled => "cancelled",
    };
    let not_saved: Vec<Value> = report
        .not_saved
        .iter()
        .map(|missed| json!({ "chunk": known + missed.chunk as usize, "reason": missed.reason.to_string() }))
        .collect();
    let fewer_copies: Vec<Value> = report
        .fewer_copies
        .iter()
        .map(|fewer| {
            json!({
                "chunk": known + fewer.chunk as usize,
                "copies": fewer.copies,
                "replicas": fewer.replicas,
                "reason": fewer.reason.to_string(),
            })
        })
        .collect();
    json!({
        "outcome": outcome,
        "chunks": chunks,
        "stored": report.stored,
        "already_stored": known + report.already_stored as usize,
        "not_saved": not_saved,
        "fewer_copies": fewer_copies,
        "raw_bytes": 2 * tensor_bytes,
        "encoded_bytes": report.encoded_bytes,
        "elapsed_us": u64::try_from(report.elapsed.as_micros()).unwrap_or(u64::MAX),
    })
}
