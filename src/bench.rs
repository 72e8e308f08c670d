//! `shadowserve bench`: one part alone. `perf/bench.py` runs it beside what it is to be compared with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use compress::{Codec, PlaneCodec};
use dataplane::receive_only::{Wanted, receive_only};
use dataplane::{Config, Placement};
use dpdk::Eal;
use protocol::ChunkShape;
use protocol::key::chain;
use store::kv_file::KvFile;

use crate::bench_tx::{self, TxFlags};
use crate::dataplane::{DEFAULT_HEDGE_PERCENT, DEFAULT_QUEUE_TOLERANCE_US};
use crate::flags::{EalFlags, NamespaceFlags, PortFlags};
use crate::out::print_line;
use crate::{bench_codec, bench_gpu, bench_pages};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The data plane's receive path: everything up to whole planes, which are then thrown away
    Rx(Box<RxFlags>),
    /// The store's send path: segments copied into packets beside segments sent from where they lie
    Tx(TxFlags),
    /// Copies into GPU memory by the sinks, beside bare copies of the same pieces
    Gpu(bench_gpu::Flags),
    /// Fetches into GPU pages that another process describes
    Pages(bench_pages::Flags),
    /// What `bench gpu` starts to hold the GPU memory
    #[command(hide = true)]
    GpuHolder(bench_gpu::HolderFlags),
    /// Codecs, compressions and back ends: what each costs and gives, on one core and on several
    Codec(bench_codec::Flags),
}

#[derive(Debug, Args)]
pub(crate) struct RxFlags {
    /// KV cache that the store serves with --codec raw
    #[arg(long, value_name = "FILE", required = true)]
    tokens_from: PathBuf,
    /// Where the store is
    #[arg(long, value_name = "ADDRESS:PORT", required = true)]
    store: SocketAddr,
    /// CPU to receive on
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    lcore: usize,
    /// How long to receive, in seconds, after a second of warming up
    #[arg(long, value_name = "S", default_value_t = 2)]
    seconds: u64,
    /// Packets that may be asked for and not have arrived
    #[arg(long, value_name = "PACKETS", default_value_t = 1024)]
    window: u32,
    /// Rate of the link in Gbit/s [default: it is measured]
    #[arg(long, value_name = "GBPS")]
    link_gbps: Option<u32>,
    /// Delay beyond the least round trip that is not taken for a queue, in microseconds
    #[arg(long, value_name = "US", default_value_t = DEFAULT_QUEUE_TOLERANCE_US)]
    queue_tolerance_us: u64,
    #[command(flatten)]
    port: PortFlags,
    #[command(flatten)]
    namespace: NamespaceFlags,
    #[command(flatten)]
    eal: EalFlags,
}

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Rx(flags) => rx(flags),
        Command::Tx(flags) => bench_tx::run(flags),
        Command::Gpu(flags) => bench_gpu::run(flags),
        Command::Pages(flags) => bench_pages::run(flags),
        Command::GpuHolder(flags) => bench_gpu::hold(flags),
        Command::Codec(flags) => bench_codec::run(flags),
    }
}

fn rx(flags: &RxFlags) -> anyhow::Result<ExitCode> {
    let file = KvFile::open(&flags.tokens_from)?;
    let shape = file.shape();
    let mut keys = chain(&flags.namespace.namespace(&PlaneCodec::from(Codec::Raw).into()), file.tokens());
    // Whole chunks only, and long fetches: what is measured is receiving, not starting.
    keys.truncate((shape.tokens / compress::CHUNK_TOKENS).max(1));
    let keys = keys.iter().copied().cycle().take(2048).collect();
    let wanted = Wanted {
        keys,
        expect: ChunkShape {
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype: shape.dtype.wire(),
        },
        fetches: 4,
    };
    let config = config(flags)?;
    let eal = Eal::start(&flags.eal.config([flags.lcore], &config.iface.device))?;
    let stop = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(flags.seconds + 1));
            stop.store(true, Ordering::Relaxed);
        });
        receive_only(&eal, &config, &wanted, Duration::from_secs(1), &stop)
    })?;
    print_line!("{report}")?;
    Ok(ExitCode::SUCCESS)
}

fn config(flags: &RxFlags) -> anyhow::Result<Config> {
    let placement: Placement =
        format!("rx@{0},decode@{0},dma@{0}", flags.lcore).parse().context("--lcore")?;
    Ok(Config {
        iface: flags.port.config(1, 4800)?,
        placement,
        stores: vec![flags.store],
        replicas: 1,
        store_mac: None,
        gateway: None,
        socket: PathBuf::new(),
        group: None,
        slots: 1,
        slot_bytes: 1 << 20,
        pages: flags.eal.pages(),
        compress_dev: None,
        window_segments: Some(flags.window),
        link_mbps: flags.link_gbps.unwrap_or(0) * 1000,
        queue_tolerance: Duration::from_micros(flags.queue_tolerance_us),
        schedule: protocol::Schedule::default(),
        max_fetches: 4,
        max_chunks: 2048,
        max_layers: 128,
        rto_min: Duration::from_millis(5),
        hedge_percent: DEFAULT_HEDGE_PERCENT,
        idle_sleep: Duration::ZERO,
        gpu: dataplane::GpuConfig::default(),
        save: dataplane::SaveConfig::NONE,
    })
}
