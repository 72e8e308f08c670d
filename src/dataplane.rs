//! `shadowserve dataplane`

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use dataplane::{Config, Placement, SaveConfig, StageKind};
use dpdk::Eal;
use protocol::Schedule;

use crate::flags::{self, DEFAULT_SOCKET, EalFlags, PortFlags, parse_mac};
use crate::gpu_flags::GpuFlags;

/// A poll loop's turn, a burst of interrupts, another thread on the core: what is no queue of the network.
pub(crate) const DEFAULT_QUEUE_TOLERANCE_US: u64 = 100;

/// What waiting for one slow store may cost the link in packets that come twice.
pub(crate) const DEFAULT_HEDGE_PERCENT: u8 = 5;

/// Gbit/s, with a fraction, as Mbit/s.
pub(crate) fn parse_gbps(text: &str) -> Result<u32, String> {
    let gbps: f64 = text.parse().map_err(|_| format!("'{text}' is no number of Gbit/s"))?;
    if !(0.001..=4000.0).contains(&gbps) {
        return Err(format!("{gbps} Gbit/s is outside 0.001 to 4000"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded above")]
    Ok((gbps * 1000.0) as u32)
}

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// Where the stores are: address and UDP port of each; again for another, or separated by commas
    #[arg(long, value_name = "ADDRESS:PORT", required = true, value_delimiter = ',')]
    store: Vec<SocketAddr>,
    /// How many of the stores keep each chunk; the same as their own --replicas
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    replicas: usize,
    /// MAC address that packets for the stores go to, instead of asking by ARP or neighbour
    /// discovery
    #[arg(long, value_name = "MAC", value_parser = parse_mac)]
    store_mac: Option<[u8; 6]>,
    /// Router for stores on other networks
    #[arg(long, value_name = "ADDRESS")]
    gateway: Option<IpAddr>,
    #[command(flatten)]
    port: PortFlags,
    /// First local UDP port; each rx queue uses one of its own from here on
    #[arg(long, value_name = "PORT", default_value_t = 4800)]
    udp_port: u16,
    #[command(flatten)]
    pub(crate) pipeline: PipelineFlags,
    #[command(flatten)]
    pub(crate) gpu: GpuFlags,
    /// Unix socket where serving processes connect
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Group whose members may connect, by name or number, beside this user
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
    #[command(flatten)]
    eal: EalFlags,
}

/// Placement and budgets.
#[derive(Debug, Clone, Args)]
pub(crate) struct PipelineFlags {
    /// Which CPU runs which stage; a stage may have several CPUs, a CPU several stages: rx@2,decode@3-6,dma@7
    #[arg(long, value_name = "STAGE@CPUS,...", default_value = "rx@0,decode@0,dma@0")]
    pub(crate) lcores: Placement,
    /// Slots for decoded planes; few stay in cache [default: two per decode and dma lcore]
    #[arg(long, value_name = "COUNT")]
    pub(crate) slots: Option<usize>,
    /// Size of a slot, in KiB: the largest decoded plane (256 tokens of one layer's K or V)
    #[arg(long, value_name = "KIB", default_value_t = 1024)]
    pub(crate) slot_kib: usize,
    /// Compression device that decompresses Deflate planes: compress_isal, compress_zlib or a BlueField's PCI address
    #[arg(long, value_name = "DEVICE")]
    pub(crate) compress_dev: Option<String>,
    /// Most packets that may be asked for and not have arrived, over all queues [default: as many as --mbufs has room for]
    #[arg(long, value_name = "PACKETS")]
    pub(crate) window: Option<u32>,
    /// Rate of the link in Gbit/s, to be filled from the first moment and never exceeded [default: it is measured]
    #[arg(long, value_name = "GBPS", value_parser = parse_gbps)]
    pub(crate) link_gbps: Option<u32>,
    /// Delay beyond the least round trip that is not taken for a queue, in microseconds: what the machine itself adds
    #[arg(long, value_name = "US", default_value_t = DEFAULT_QUEUE_TOLERANCE_US)]
    pub(crate) queue_tolerance_us: u64,
    /// Which fetch is asked for first: srf (shortest remaining), edf (earliest deadline) or rr (round robin)
    #[arg(long, value_name = "SCHEDULE", default_value_t = Schedule::default())]
    pub(crate) schedule: Schedule,
    /// Fetches carried out at once; more wait
    #[arg(long, value_name = "COUNT", default_value_t = 64)]
    pub(crate) max_fetches: u16,
    /// Chunks (of 256 tokens) of one fetch
    #[arg(long, value_name = "COUNT", default_value_t = 4096)]
    pub(crate) max_chunks: u32,
    /// Layers of the deepest model
    #[arg(long, value_name = "COUNT", default_value_t = 128)]
    pub(crate) max_layers: u16,
    /// Least time without a packet after which everything asked of a store counts as lost, in microseconds
    #[arg(long, value_name = "US", default_value_t = 5_000)]
    pub(crate) rto_min_us: u64,
    /// Packets that a replica may be asked for, too, while a store says nothing for longer than 99 % of its answers took: percent of all packets
    /// asked for, at most 100. With 0 only lookups and headers are asked of replicas then; without --replicas, nothing is
    #[arg(long, value_name = "PERCENT", default_value_t = DEFAULT_HEDGE_PERCENT, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) hedge_percent: u8,
    /// Chunks that are saved at once, each encoded into a buffer of its own; 0 saves nothing
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    pub(crate) save_chunks: u16,
    /// Size of such a buffer, in MiB: the largest encoded chunk, and one decoded plane more
    #[arg(long, value_name = "MIB", default_value_t = 16)]
    pub(crate) save_chunk_mib: usize,
    /// zstd level at which chunks are saved: higher is smaller and slower
    #[arg(long, value_name = "LEVEL", default_value_t = compress::DEFAULT_ZSTD_LEVEL, allow_hyphen_values = true)]
    pub(crate) save_zstd_level: i32,
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let queues =
        u16::try_from(flags.pipeline.lcores.count(StageKind::Rx)).context("--lcores: too many queues")?;
    let config = Config {
        iface: flags.port.config(queues, flags.udp_port)?,
        placement: flags.pipeline.lcores.clone(),
        stores: flags.store.clone(),
        replicas: flags.replicas,
        store_mac: flags.store_mac,
        gateway: flags.gateway,
        socket: flags.socket.clone(),
        group: flags.group.clone(),
        slots: flags.pipeline.slots.unwrap_or_else(|| flags.pipeline.lcores.default_slots()),
        slot_bytes: flags.pipeline.slot_kib << 10,
        pages: flags.eal.pages(),
        compress_dev: flags.pipeline.compress_dev.clone(),
        window_segments: flags.pipeline.window,
        link_mbps: flags.pipeline.link_gbps.unwrap_or(0),
        queue_tolerance: Duration::from_micros(flags.pipeline.queue_tolerance_us),
        schedule: flags.pipeline.schedule,
        max_fetches: flags.pipeline.max_fetches,
        max_chunks: flags.pipeline.max_chunks,
        max_layers: flags.pipeline.max_layers,
        rto_min: Duration::from_micros(flags.pipeline.rto_min_us),
        hedge_percent: flags.pipeline.hedge_percent,
        idle_sleep: flags.eal.idle_sleep(),
        gpu: flags.gpu.config()?,
        save: SaveConfig {
            chunks: flags.pipeline.save_chunks,
            chunk_bytes: flags.pipeline.save_chunk_mib << 20,
            zstd_level: flags.pipeline.save_zstd_level,
        },
    };
    config.next_hops()?;
    config.store_placement()?;
    let stop = flags::stop_on_signals()?;
    let eal = Eal::start(&flags.eal.config(flags.pipeline.lcores.cpus(), &config.iface.device))?;
    dataplane::run(&eal, &config, &stop)?;
    Ok(ExitCode::SUCCESS)
}
