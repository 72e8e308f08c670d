//! `shadowserve bench pages`: fetches into GPU pages that another process has exported and described, at full speed or at
//! a given one. `perf/gpu/` runs it beside PyTorch.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use client::{ChunkPlace, Client, ClientConfig, Fetch, Outcome, PagedKv, PagesRequest};
use compress::{Codec, PlaneCodec};
use serde::Deserialize;
use serde_json::{Value, json};
use store::kv_file;

use crate::flags::{DEFAULT_SOCKET, NamespaceFlags};
use crate::out::print_line;

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// JSON with `kv`, the cache as the control protocol describes it, and `table`, the pages of the tokens in order
    #[arg(long, value_name = "FILE", required = true)]
    pages: PathBuf,
    /// Whose KV to fetch: a .safetensors file with a tensor `tokens`
    #[arg(long, value_name = "FILE", required = true)]
    tokens_from: PathBuf,
    /// Codec that the store encodes with
    #[arg(long, value_name = "CODEC", default_value = "int4")]
    codec: Codec,
    /// Unix socket of the data plane
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// How long to go on fetching, in milliseconds; 0 fetches everything once
    #[arg(long, value_name = "MS", default_value_t = 0)]
    duration_ms: u64,
    /// Chunks in one fetch
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    chunks: usize,
    /// Fetches under way at once
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    fetches: usize,
    /// Encoded Gbit/s to keep to; 0 for as fast as it goes
    #[arg(long, value_name = "GBPS", default_value_t = 0.0)]
    rate_gbps: f64,
    #[command(flatten)]
    namespace: NamespaceFlags,
}

/// GPU pages of another process.
#[derive(Deserialize)]
pub(crate) struct Description {
    /// The cache.
    pub(crate) kv: PagedKv,
    /// Its pages, in the order of the tokens.
    pub(crate) table: Vec<u32>,
}

/// What has been fetched.
#[derive(Default)]
struct Sum {
    fetches: u64,
    planes: u64,
    encoded_bytes: u64,
    delivered_bytes: u64,
    times: Vec<Duration>,
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let text = std::fs::read_to_string(&flags.pages).with_context(|| flags.pages.display().to_string())?;
    let Description { kv, table } =
        serde_json::from_str(&text).with_context(|| flags.pages.display().to_string())?;
    let tokens = kv_file::read_tokens(&flags.tokens_from)?;
    let client = Client::connect(
        &flags.socket,
        &ClientConfig::new(flags.namespace.namespace(&PlaneCodec::from(flags.codec).into())),
    )?;
    let prefix = client.lookup(&tokens, Duration::from_secs(10))?;
    anyhow::ensure!(prefix.is_whole(), "{} of {} tokens are stored", prefix.tokens, tokens.len());
    let cache = client.register_pages(kv)?;
    let whole = PagesRequest::prefix(&prefix, &cache, table)?;
    let parts: Vec<PagesRequest<'_>> = whole
        .chunks
        .chunks(flags.chunks.max(1))
        .map(|chunks| part(&whole, chunks, cache.kv().page_tokens))
        .collect();
    let before: Value = serde_json::from_str(&client.stats()?)?;
    let begun = Instant::now();
    let (mut under_way, mut next, mut sum) = (VecDeque::new(), 0, Sum::default());
    let wanted = |next: usize| {
        if flags.duration_ms == 0 {
            next < parts.len()
        } else {
            begun.elapsed() < Duration::from_millis(flags.duration_ms)
        }
    };
    while wanted(next) || !under_way.is_empty() {
        let due = may_start(&sum, under_way.len(), begun.elapsed(), flags.rate_gbps);
        // Two fetches into the same pages would race for them.
        if wanted(next) && under_way.len() < flags.fetches.clamp(1, parts.len()) && due {
            under_way.push_back(client.fetch_pages(&parts[next % parts.len()])?);
            next += 1;
            continue;
        }
        finish_some(&mut under_way, &mut sum)?;
    }
    let elapsed = begun.elapsed();
    let after: Value = serde_json::from_str(&client.stats()?)?;
    print_line!("{}", report(&sum, elapsed, &before, &after))?;
    Ok(ExitCode::SUCCESS)
}

/// Some of the chunks, and the part of the table that they need.
fn part<'a>(whole: &PagesRequest<'a>, chunks: &[ChunkPlace], page_tokens: u16) -> PagesRequest<'a> {
    let first = chunks.first().map_or(0, |chunk| chunk.offset);
    let page_tokens = u64::from(page_tokens);
    let first_page = first / page_tokens;
    let last = chunks.last().map_or(0, |chunk| chunk.offset + u64::from(chunk.tokens));
    let pages =
        usize::try_from(first_page).unwrap_or(0)..usize::try_from(last.div_ceil(page_tokens)).unwrap_or(0);
    let chunks = chunks
        .iter()
        .map(|chunk| ChunkPlace { offset: chunk.offset - first_page * page_tokens, ..*chunk })
        .collect();
    PagesRequest {
        table: whole.table[pages].to_vec(),
        chunks,
        timeout: Duration::from_secs(20),
        ..whole.clone()
    }
}

/// Whether the rate leaves room for another fetch, those under way being as large as the ones so far.
fn may_start(sum: &Sum, under_way: usize, elapsed: Duration, rate_gbps: f64) -> bool {
    if rate_gbps <= 0.0 {
        return true;
    }
    if sum.fetches == 0 {
        return under_way == 0;
    }
    #[expect(clippy::cast_precision_loss, reason = "a pace, not a count")]
    let bits = {
        let per_fetch = sum.encoded_bytes as f64 * 8.0 / sum.fetches as f64;
        sum.encoded_bytes as f64 * 8.0 + per_fetch * under_way as f64
    };
    bits <= elapsed.as_secs_f64() * rate_gbps * 1e9
}

fn finish_some(under_way: &mut VecDeque<Fetch>, sum: &mut Sum) -> anyhow::Result<()> {
    let before = under_way.len();
    let mut left = VecDeque::with_capacity(before);
    for mut fetch in under_way.drain(..) {
        let Some(report) = fetch.poll()? else {
            left.push_back(fetch);
            continue;
        };
        if report.outcome != Outcome::Done {
            bail!("a fetch failed: {}", report.message);
        }
        sum.fetches += 1;
        sum.planes += u64::from(report.progress.planes);
        sum.encoded_bytes += report.progress.encoded_bytes;
        sum.delivered_bytes += report.progress.delivered_bytes;
        sum.times.push(report.elapsed);
    }
    *under_way = left;
    if under_way.len() == before {
        std::thread::sleep(Duration::from_micros(20));
    }
    Ok(())
}

/// Rates over all of it, and what each lcore of the data plane did meanwhile.
fn report(sum: &Sum, elapsed: Duration, before: &Value, after: &Value) -> Value {
    #[expect(clippy::cast_precision_loss, reason = "rates are printed with a few digits")]
    let gbps = |bytes: u64| bytes as f64 * 8.0 / elapsed.as_secs_f64() / 1e9;
    let busy = |stats: &Value, lcore: usize| stats["lcores"][lcore]["busy_us"].as_u64().unwrap_or(0);
    let count = after["lcores"].as_array().map_or(0, Vec::len);
    let lcores = (0..count).map(|lcore| {
        let busy_us = busy(after, lcore).saturating_sub(busy(before, lcore));
        #[expect(clippy::cast_precision_loss, reason = "a fraction")]
        let busy = busy_us as f64 / elapsed.as_micros() as f64;
        json!({ "stages": after["lcores"][lcore]["stages"], "busy": busy })
    });
    let mut times: Vec<u128> = sum.times.iter().map(Duration::as_micros).collect();
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or(0);
    json!({
        "seconds": elapsed.as_secs_f64(),
        "fetches": sum.fetches,
        "planes": sum.planes,
        "encoded_gbps": gbps(sum.encoded_bytes),
        "delivered_gbps": gbps(sum.delivered_bytes),
        "fetch_us": { "p50": at(50), "p99": at(99) },
        "lcores": lcores.collect::<Vec<_>>(),
        "gpu": after["gpu"],
        "stages": after["stages"],
        "dropped": after["counters"]["dropped"],
    })
}
