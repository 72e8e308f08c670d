//! `shadowserve store`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use dpdk::Eal;
use protocol::put::AcceptConfig;
use store::ZeroCopy;
use store::keeper::Keeper;
use store::load::{LoadConfig, Share};

use crate::flags::{self, CodecFlags, EalFlags, NamespaceFlags, PortFlags, STORE_UDP_PORT};
use crate::out::print_line;

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// KV caches to load: .safetensors files with `k`, `v` [layers, tokens, kv_heads, head_dim] and `tokens`
    #[arg(long, value_name = "FILE", required_unless_present = "memory_mib", num_args = 1..)]
    load: Vec<PathBuf>,
    #[command(flatten)]
    codec: CodecFlags,
    /// zstd level: higher is smaller and slower to encode
    #[arg(long, value_name = "LEVEL", default_value_t = compress::DEFAULT_ZSTD_LEVEL, allow_hyphen_values = true)]
    zstd_level: i32,
    /// Memory for encoded chunks, loaded and saved, in MiB. Without it, what the loaded ones need, and nothing can be saved
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<usize>,
    /// Never evict the loaded chunks, even for others that are saved
    #[arg(long)]
    pin_loaded: bool,
    /// Largest encoded chunk that can be saved, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    max_chunk_mib: u32,
    /// Chunks on their way in at once, per queue
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    max_intakes: u16,
    /// Most packets of chunks on their way in that may be asked for and not have arrived, per queue; what the link and the ways to the
    /// data planes hold is found, and is less
    #[arg(long, value_name = "PACKETS", default_value_t = 8192)]
    put_window: u32,
    /// Rate of the link in Gbit/s, which chunks on their way in are to fill and never exceed [default: it is measured]
    #[arg(long, value_name = "GBPS", value_parser = crate::dataplane::parse_gbps)]
    link_gbps: Option<u32>,
    /// All stores that share the chunks, this one too, as address and port; it then loads its share. Give the same to the data
    /// planes as --store
    #[arg(long, value_name = "ADDRESS:PORT,...", value_delimiter = ',')]
    stores: Vec<SocketAddr>,
    /// How many of --stores keep each chunk
    #[arg(long, value_name = "COUNT", default_value_t = 1, requires = "stores")]
    replicas: usize,
    /// Whether segments are sent from where they lie (on), copied into packets (off), or as the port allows (auto)
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = zero_copy)]
    zero_copy: ZeroCopy,
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
    let own = SocketAddr::new(iface.address.ip, flags.udp_port);
    let share = match flags.stores.as_slice() {
        [] => None,
        stores => Some(Share::new(stores, own, flags.replicas)?),
    };
    let codecs = flags.codec.codecs()?;
    let load = LoadConfig {
        files: flags.load.clone(),
        namespace: flags.namespace.namespace(&codecs),
        codecs,
        level: flags.zstd_level,
        memory_bytes: flags.memory_mib.map(|mib| mib << 20),
        pin: flags.pin_loaded,
        pages: flags.eal.pages(),
        share,
    };
    let mut keeper = Keeper::load(&load)?;
    let eal = Eal::start(&flags.eal.config(cpus, &iface.device))?;
    let max_chunk_bytes =
        flags.max_chunk_mib.checked_mul(1 << 20).context("--max-chunk-mib: at most 4095")?;
    if max_chunk_bytes == 0 || flags.put_window == 0 {
        bail!("--max-chunk-mib and --put-window must be at least 1");
    }
    let accept = AcceptConfig {
        max_chunk_bytes,
        max_intakes: flags.max_intakes,
        window_segments: flags.put_window,
        link_mbps: flags.link_gbps.map_or(0, |mbps| (mbps / u32::from(queues)).max(1)),
        ..AcceptConfig::default()
    };
    let config = store::Config {
        iface,
        first_worker: 0,
        idle_sleep: flags.eal.idle_sleep(),
        accept,
        zero_copy: flags.zero_copy,
    };
    let report = store::run(&eal, &config, &mut keeper, &stop)?;
    if flags.json {
        print_line!("{report}")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn zero_copy(text: &str) -> Result<ZeroCopy, String> {
    match text {
        "auto" => Ok(ZeroCopy::Auto),
        "on" => Ok(ZeroCopy::On),
        "off" => Ok(ZeroCopy::Off),
        other => Err(format!("`{other}` is not auto, on or off")),
    }
}
