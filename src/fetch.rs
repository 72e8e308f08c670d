//! `shadowserve fetch`

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use client::{Client, ClientConfig, FetchReport, FetchRequest, Outcome, Prefix, Region};
use compress::{Codec, Codecs, PlaneCodec};
use indicatif::{ProgressBar, ProgressStyle};
use store::kv_file::{self, KvFile};

use crate::flags::{self, DEFAULT_SOCKET, NamespaceFlags};
use crate::out::{print_line, say};
use crate::report::Report;
use crate::verify::{Expected, contents, sequence_shape};

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// Whose KV to fetch: a .safetensors file with a tensor `tokens`, or a JSON list of token ids
    #[arg(long, value_name = "FILE", required = true)]
    tokens_from: Option<PathBuf>,
    /// Where to write what arrived: `k` and `v`, [layers, tokens, kv_heads, head_dim], and `tokens`
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Compare with what the codec must give of the `k` and `v` in --tokens-from
    #[arg(long)]
    verify: bool,
    /// Codec that the store encodes with: raw, lossless, int8, int5, int4, int3 or cachegen
    #[arg(long, value_name = "CODEC", default_value = "int4")]
    codec: Codec,
    /// Profile that the store encodes with, in the place of --codec
    #[arg(long, value_name = "FILE", conflicts_with = "codec")]
    profile: Option<PathBuf>,
    /// Unix socket of the data plane
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// How long the lookup, and then the fetch, may take, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    timeout_ms: u64,
    /// How often to fetch, into the same memory
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    repeat: usize,
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
    let tokens_from = flags.tokens_from.as_deref().context("--tokens-from is missing")?;
    let tokens = read_tokens(tokens_from)?;
    let timeout = Duration::from_millis(flags.timeout_ms);
    let codecs = match &flags.profile {
        Some(path) => flags::read_profile(path)?,
        None => PlaneCodec::from(flags.codec).into(),
    };
    let client = Client::connect(&flags.socket, &ClientConfig::new(flags.namespace.namespace(&codecs)))?;
    let prefix = client.lookup(&tokens, timeout)?;
    if prefix.is_empty() {
        bail!(
            "nothing of {} is stored under this name: --model, --layout, --codec or --profile, --rank and --salt must be those of \
             the store",
            tokens_from.display()
        );
    }
    if !prefix.is_whole() {
        say!("only the first {} of {} tokens are stored: fetching those", prefix.tokens, tokens.len());
    }
    let region = client.register(prefix.sequence_bytes().context("the prefix has no size")?)?;
    let expected = if flags.verify { Some(expected(tokens_from, &codecs, &prefix)?) } else { None };
    let run = Run { client: &client, prefix: &prefix, region: &region, timeout, bar: !flags.json };
    let (report, last) = run.fetch(&codecs, flags.repeat, expected.as_ref())?;
    if let Some(out) = &flags.out {
        run.write(out, &tokens)?;
    }
    if flags.json {
        print_line!("{}", report.to_json())?;
    } else {
        report.print()?;
    }
    if last.outcome != Outcome::Done {
        say!("error: {}", last.message);
        return Ok(ExitCode::FAILURE);
    }
    if report.verified() == Some(false) {
        say!("error: {} planes differ from what the codec must give", report.mismatched_planes.unwrap_or(0));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn expected(file: &Path, codecs: &Codecs, prefix: &Prefix) -> anyhow::Result<Expected> {
    let file = KvFile::open(file).context("--verify needs `k` and `v`")?;
    if !prefix.is_whole() {
        bail!("--verify needs the whole sequence to be stored");
    }
    let shape = file.shape();
    codecs.check(shape.layers, shape.kv_heads, shape.head_dim)?;
    Expected::new(&file, codecs)
}

fn read_tokens(path: &Path) -> anyhow::Result<Vec<i32>> {
    if path.extension().is_some_and(|extension| extension == "json") {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        return serde_json::from_str(&text)
            .with_context(|| format!("{} is not a JSON list of token ids", path.display()));
    }
    Ok(kv_file::read_tokens(path)?)
}

/// Fetches of one prefix into one region.
pub(crate) struct Run<'a> {
    pub(crate) client: &'a Client,
    pub(crate) prefix: &'a Prefix,
    pub(crate) region: &'a Region,
    pub(crate) timeout: Duration,
    /// Whether to show a progress bar, if standard error is a terminal.
    pub(crate) bar: bool,
}

impl Run<'_> {
    /// Fetches `repeat` times and compares each with `expected`, until one does not end done. Returns the report and
    /// the end of the last fetch.
    pub(crate) fn fetch(
        &self,
        codecs: &Codecs,
        repeat: usize,
        expected: Option<&Expected>,
    ) -> anyhow::Result<(Report, FetchReport)> {
        let shape = self.prefix.shape.context("the prefix has no shape")?;
        let bytes = self.prefix.sequence_bytes().context("the prefix has no size")?;
        let planes = u64::from(shape.planes()) * self.prefix.chunks.len() as u64;
        let bar = self.progress_bar(planes * repeat as u64);
        let mut mismatched = expected.map(|_| 0);
        let mut times = Vec::new();
        let mut last = None;
        for _ in 0..repeat.max(1) {
            // What an earlier fetch delivered must not pass for what this one did.
            self.region.arena().zero(0, bytes).context("the region is smaller than the prefix")?;
            let report = self.fetch_once(&bar)?;
            times.push(report.elapsed);
            if let (Some(expected), Some(mismatched)) = (expected, &mut mismatched) {
                *mismatched += expected.mismatched_planes(&contents(self.region, bytes)?);
            }
            let done = report.outcome == Outcome::Done;
            last = Some(report);
            if !done {
                break;
            }
        }
        bar.finish_and_clear();
        let last = last.context("nothing was fetched")?;
        let stats = serde_json::from_str(&self.client.stats()?).context("the data plane's statistics")?;
        let report = Report {
            codec: codecs.name(),
            chunks: self.prefix.chunks.len(),
            planes: u64::from(last.progress.planes),
            raw_bytes: last.progress.delivered_bytes,
            encoded_bytes: last.progress.encoded_bytes,
            times,
            mismatched_planes: mismatched,
            stats,
        };
        Ok((report, last))
    }

    fn fetch_once(&self, bar: &ProgressBar) -> anyhow::Result<FetchReport> {
        let mut request = FetchRequest::sequence(self.prefix, self.region)?;
        request.timeout = self.timeout;
        request.progress = !bar.is_hidden();
        let mut fetch = self.client.fetch(&request)?;
        let before = bar.position();
        while !bar.is_hidden() {
            match fetch.wait(Duration::from_millis(20)) {
                Err(client::FetchError::StillUnderWay { .. }) => {
                    bar.set_position(before + u64::from(fetch.progress().planes));
                }
                ended => {
                    let report = ended?;
                    bar.set_position(before + u64::from(report.progress.planes));
                    return Ok(report);
                }
            }
        }
        Ok(fetch.finish()?)
    }

    fn progress_bar(&self, planes: u64) -> ProgressBar {
        if !self.bar || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("fetching {wide_bar} {pos}/{len} planes")
            .expect("the template is valid");
        ProgressBar::new(planes).with_style(style)
    }

    /// Writes what lies in the region to `path`.
    pub(crate) fn write(&self, path: &Path, tokens: &[i32]) -> anyhow::Result<()> {
        let count = usize::try_from(self.prefix.tokens).context("tokens")?;
        let shape = sequence_shape(&self.prefix.shape.context("the prefix has no shape")?, count);
        let arrived = contents(self.region, 2 * shape.tensor_bytes())?;
        let (k, v) = arrived.split_at(shape.tensor_bytes());
        kv_file::write(path, shape, k, v, &tokens[..count])?;
        Ok(())
    }
}
