//! `shadowserve encode`: a KV cache into a file of encoded chunks, and profiles from a sample of KV.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use compress::{Codecs, Shape, Side, plane_index};
use protocol::key::{Key, chain};
use serde_json::json;
use store::kv_file::KvFile;

use crate::flags::{CodecFlags, NamespaceFlags};
use crate::make_profile;
use crate::out::print_line;

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// KV cache to encode: a .safetensors file with `k`, `v` [layers, tokens, kv_heads, head_dim] and `tokens`
    #[arg(long, value_name = "FILE", required = true)]
    input: PathBuf,
    /// Where to write the encoded chunks, one behind the other
    #[arg(long, value_name = "FILE", required_unless_present = "make_profile")]
    out: Option<PathBuf>,
    #[command(flatten)]
    codec: CodecFlags,
    /// zstd level: higher is smaller and slower to encode
    #[arg(long, value_name = "LEVEL", default_value_t = compress::DEFAULT_ZSTD_LEVEL, allow_hyphen_values = true)]
    zstd_level: i32,
    /// Choose a codec for each layer's K and V by what it costs and errs on the input, and write the choice here
    #[arg(long, value_name = "FILE", conflicts_with_all = ["codec", "profile", "compression"])]
    make_profile: Option<PathBuf>,
    /// With --make-profile: the least error at this ratio of 16-bit elements to encoded bytes
    #[arg(long, value_name = "RATIO", requires = "make_profile", conflicts_with = "target_error")]
    target_ratio: Option<f64>,
    /// With --make-profile: the best ratio at this error, the mean over all planes of the weighted relative squared error
    #[arg(long, value_name = "ERROR", requires = "make_profile")]
    target_error: Option<f64>,
    /// With --make-profile: TOML with lists `k` and `v`, what an error in each layer weighs [default: K 3.5, V 1]
    #[arg(long, value_name = "FILE", requires = "make_profile")]
    sensitivity: Option<PathBuf>,
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
    let file = KvFile::open(&flags.input)?;
    let codecs = match &flags.make_profile {
        Some(path) => {
            let target = match (flags.target_ratio, flags.target_error) {
                (Some(ratio), None) => make_profile::Target::Ratio(ratio),
                (None, Some(error)) => make_profile::Target::Error(error),
                _ => bail!("--make-profile needs --target-ratio or --target-error"),
            };
            let sensitivity = flags.sensitivity.as_deref();
            make_profile::run(&file, &flags.input, path, target, sensitivity, flags.zstd_level)?
        }
        None => flags.codec.codecs()?,
    };
    let shape = file.shape();
    codecs.check(shape.layers, shape.kv_heads, shape.head_dim)?;
    let keys = chain(&flags.namespace.namespace(&codecs), file.tokens());
    let chunks = encode(&file, &codecs, flags.zstd_level, &keys)?;
    if let Some(out) = &flags.out {
        write_whole(out, &chunks.concat())?;
    }
    report(flags, &codecs, 2 * shape.tensor_bytes(), &chunks)?;
    Ok(ExitCode::SUCCESS)
}

/// The encoded chunks of a file.
fn encode(file: &KvFile, codecs: &Codecs, level: i32, keys: &[Key]) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut encoder = codecs.encoder(level);
    let mut chunks = Vec::new();
    for (chunk, key) in keys.iter().enumerate() {
        let (shape, planes) = read_chunk(file, chunk)?;
        let mut bytes = Vec::new();
        let plane = |layer, side| planes[plane_index(layer, side)].as_slice();
        encoder.encode_chunk(&key.0, &shape, plane, &mut bytes).with_context(|| format!("chunk {chunk}"))?;
        chunks.push(bytes);
    }
    Ok(chunks)
}

/// The shape of a chunk and its planes, in the order of the format.
pub(crate) fn read_chunk(file: &KvFile, chunk: usize) -> anyhow::Result<(Shape, Vec<Vec<u8>>)> {
    let shape = file.shape().chunk(chunk);
    let mut planes = vec![Vec::new(); shape.planes()];
    for layer in 0..shape.layers {
        for side in [Side::K, Side::V] {
            file.read_plane(chunk, layer, side, &mut planes[plane_index(layer, side)])?;
        }
    }
    Ok((shape, planes))
}

/// Writes a file that is there whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::Builder::new().permissions(permissions()).tempfile_in(folder)?;
        std::io::Write::write_all(&mut file, bytes)?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().with_context(|| format!("{} can't be written", path.display()))
}

/// Those of any file that a program creates; the umask takes away from them.
fn permissions() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o666)
}

fn report(flags: &Flags, codecs: &Codecs, raw_bytes: usize, chunks: &[Vec<u8>]) -> anyhow::Result<()> {
    let encoded_bytes: usize = chunks.iter().map(Vec::len).sum();
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    let ratio = raw_bytes as f64 / encoded_bytes as f64;
    if flags.json {
        let object = json!({
            "codec": codecs.name(),
            "chunks": chunks.len(),
            "raw_bytes": raw_bytes,
            "encoded_bytes": encoded_bytes,
            "ratio": ratio,
            "profile": flags.make_profile,
        });
        print_line!("{object}")
    } else {
        let count = chunks.len();
        print_line!(
            "{}: {count} chunks, {raw_bytes} bytes in {encoded_bytes}, ratio {ratio:.3}",
            codecs.name()
        )
    }
}
