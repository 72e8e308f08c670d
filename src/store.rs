//! `shadowserve store`

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use compress::{Codec, Compression, PlaneCodec};
use dpdk::Eal;
use store::chunks::{ChunkStore, LoadConfig};

use crate::flags::{self, EalFlags, NamespaceFlags, PortFlags, STORE_UDP_PORT};

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// KV caches to load: .safetensors files with `k`, `v` [layers, tokens, kv_heads, head_dim] and `tokens`
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    load: Vec<PathBuf>,
    /// How planes are encoded: raw, lossless, int8, int5, int4, int3 or cachegen
    #[arg(long, value_name = "CODEC", default_value = "int4")]
    codec: Codec,
    /// How codes are compressed: zstd, none (larger, and several times faster to decode), or deflate (for compression devices)
    #[arg(long, value_name = "COMPRESSION", default_value = "zstd")]
    compression: Compression,
    /// zstd level: higher is smaller and slower to encode
    #[arg(long, value_name = "LEVEL", default_value_t = compress::DEFAULT_ZSTD_LEVEL, allow_hyphen_values = true)]
    zstd_level: i32,
    /// Most memory for encoded chunks, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    memory_mib: usize,
    /// CPUs to serve on, one queue each, as in 2-3 or 2+4
    #[arg(long, value_name = "CPUS", default_value = "0")]
    lcores: String,
    /// UDP port to serve on
    #[arg(long, value_name = "PORT", default_value_t = STORE_UDP_PORT)]
    udp_port: u16,
    #[command(flatten)]
    port: PortFlags,
    #[command(flatten)]
    namespace: NamespaceFlags,
    #[command(flatten)]
    eal: EalFlags,
    /// Print what was counted as one JSON object on standard output at the end
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let cpus = dataplane::parse_cpus(&flags.lcores).context("--lcores")?;
    let queues = u16::try_from(cpus.len()).context("--lcores: too many CPUs")?;
    let iface = flags.port.config(queues, flags.udp_port)?;
    let stop = flags::stop_on_signals()?;
    let load = LoadConfig {
        files: flags.load.clone(),
        namespace: flags.namespace.namespace(flags.codec),
        codec: PlaneCodec { compression: flags.compression, ..flags.codec.into() },
        level: flags.zstd_level,
        memory_bytes: flags.memory_mib << 20,
        pages: flags.eal.pages(),
    };
    let chunks = Arc::new(ChunkStore::load(&load)?);
    let eal = Eal::start(&flags.eal.config(cpus, &iface.device))?;
    let config = store::Config { iface, first_worker: 0, idle_sleep: flags.eal.idle_sleep() };
    let report = store::run(&eal, &config, chunks, &stop)?;
    if flags.json {
        println!("{report}");
    }
    Ok(ExitCode::SUCCESS)
}
