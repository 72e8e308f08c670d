//! `shadowserve decode`: a file of encoded chunks back into a KV cache.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use compress::{ChunkView, Decoder, Shape, Side, plane_of};
use serde_json::json;
use store::kv_file::{self, SequenceShape};

use crate::out::print_line;

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// Encoded chunks of one sequence, one behind the other, as `shadowserve encode` writes them
    #[arg(long, value_name = "FILE", required = true)]
    input: PathBuf,
    /// The .safetensors file to write: `k` and `v`, [layers, tokens, kv_heads, head_dim], and `tokens`
    #[arg(long, value_name = "FILE", required = true)]
    out: PathBuf,
    /// File whose `tokens` to take over: chunks name their tokens but don't hold them [default: -1 for each]
    #[arg(long, value_name = "FILE")]
    tokens_from: Option<PathBuf>,
    /// Print one JSON object on standard output and nothing else there
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let name = || flags.input.display().to_string();
    let bytes = std::fs::read(&flags.input).with_context(name)?;
    let chunks = split(&bytes).with_context(name)?;
    let shape = sequence_shape(&chunks).with_context(name)?;
    let (k, v) = decode(&chunks, &shape).with_context(name)?;
    let tokens = tokens(flags.tokens_from.as_deref(), shape.tokens)?;
    kv_file::write(&flags.out, shape, &k, &v, &tokens)?;
    if flags.json {
        print_line!(
            "{}",
            json!({ "chunks": chunks.len(), "tokens": shape.tokens, "encoded_bytes": bytes.len() })
        )?;
    } else {
        print_line!("{} chunks, {} tokens", chunks.len(), shape.tokens)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A chunk's bytes and what its header says.
type Chunk<'a> = (&'a [u8], ChunkView<'a>);

/// Cuts the file into chunks; each says how long it is.
fn split(bytes: &[u8]) -> anyhow::Result<Vec<Chunk<'_>>> {
    let (mut chunks, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let at = || format!("chunk {} at byte {}", chunks.len(), bytes.len() - rest.len());
        let view = ChunkView::parse(rest).with_context(at)?;
        let length = usize::try_from(view.chunk_bytes()).ok().filter(|&length| length <= rest.len());
        let Some(length) = length else {
            bail!("{} has {} bytes, but only {} are there", at(), view.chunk_bytes(), rest.len());
        };
        chunks.push((&rest[..length], view));
        rest = &rest[length..];
    }
    Ok(chunks)
}

/// The shape of the sequence that the chunks make up.
fn sequence_shape(chunks: &[Chunk<'_>]) -> anyhow::Result<SequenceShape> {
    let Some((_, first)) = chunks.first() else { bail!("the file holds no chunks") };
    let &Shape { layers, kv_heads, head_dim, dtype, .. } = first.shape();
    for (number, (_, view)) in chunks.iter().enumerate() {
        let shape = view.shape();
        let whole = number + 1 == chunks.len() || usize::from(shape.tokens) == compress::CHUNK_TOKENS;
        if !whole || *shape != (Shape { tokens: shape.tokens, ..*first.shape() }) {
            bail!("chunk {number} does not continue chunk 0: other shape, or a short chunk within");
        }
    }
    let tokens = chunks.iter().map(|(_, view)| usize::from(view.shape().tokens)).sum();
    Ok(SequenceShape { layers, tokens, kv_heads, head_dim, dtype })
}

/// K and V of the sequence, `[layers, tokens, kv_heads, head_dim]` each.
fn decode(chunks: &[Chunk<'_>], sequence: &SequenceShape) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
    let (mut k, mut v) = (vec![0; sequence.tensor_bytes()], vec![0; sequence.tensor_bytes()]);
    let mut decoder = Decoder::new(sequence.chunk(0).plane_bytes());
    for (number, (bytes, view)) in chunks.iter().enumerate() {
        let shape = view.shape();
        for (index, entry) in view.planes().enumerate() {
            let (layer, side) = plane_of(index);
            let tensor = if side == Side::K { &mut k } else { &mut v };
            let row = usize::from(layer) * sequence.tokens + number * compress::CHUNK_TOKENS;
            let start = row * sequence.row_bytes();
            let encoded = usize::try_from(entry.offset)
                .ok()
                .and_then(|offset| bytes.get(offset..)?.get(..usize::try_from(entry.bytes).ok()?))
                .with_context(|| format!("chunk {number}: {side} of layer {layer} lies outside"))?;
            decoder
                .decode(shape, &entry, encoded, shape.dtype, &mut tensor[start..start + shape.plane_bytes()])
                .with_context(|| format!("chunk {number}, layer {layer}, {side}"))?;
        }
    }
    Ok((k, v))
}

fn tokens(from: Option<&Path>, count: usize) -> anyhow::Result<Vec<i32>> {
    let Some(path) = from else { return Ok(vec![-1; count]) };
    let mut tokens = kv_file::read_tokens(path)?;
    if tokens.len() < count {
        bail!("{} has {} tokens, the chunks have {count}", path.display(), tokens.len());
    }
    tokens.truncate(count);
    Ok(tokens)
}
