//! Flags that several subcommands share.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use compress::{Codec, Codecs, Compression, PlaneCodec, Profile};
use dpdk::EalConfig;
use hugepages::PageChoice;
use iface::{IfaceConfig, IpPrefix};
use protocol::Namespace;
use protocol::wire::ethernet::MAX_VLAN;

/// Where `shadowserve` processes of one host meet.
pub(crate) const DEFAULT_SOCKET: &str = "/run/shadowserve.sock";

/// UDP port of a store.
pub(crate) const STORE_UDP_PORT: u16 = 4791;

/// The port, its addresses and the memory for packets.
#[derive(Debug, Clone, Args)]
pub(crate) struct PortFlags {
    /// Device to use: a PCI address (0000:03:00.0) or a virtual device (net_memif0,role=client,socket=/run/memif.sock)
    #[arg(long, value_name = "DEVICE", required = true)]
    pub(crate) port: Option<String>,
    /// Address of this end with its network's prefix length, IPv4 or IPv6
    #[arg(long, value_name = "ADDRESS/BITS", required = true)]
    pub(crate) ip: Option<IpPrefix>,
    /// VLAN to be in (1 to 4094): frames are sent with its tag and taken with no other [default: none, no tags]
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_VLAN)))]
    pub(crate) vlan: Option<u16>,
    /// Largest IP packet, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 1500)]
    pub(crate) mtu: u16,
    /// Packet buffers per queue
    #[arg(long, value_name = "COUNT", default_value_t = 16384)]
    pub(crate) mbufs: u32,
    /// Receive descriptors per queue
    #[arg(long, value_name = "COUNT", default_value_t = 1024)]
    pub(crate) rx_descriptors: u16,
    /// Transmit descriptors per queue
    #[arg(long, value_name = "COUNT", default_value_t = 1024)]
    pub(crate) tx_descriptors: u16,
}

impl PortFlags {
    /// The port with `queues` queues and this end's first UDP port.
    pub(crate) fn config(&self, queues: u16, udp_port: u16) -> anyhow::Result<IfaceConfig> {
        let device = self.port.clone().context("--port is missing")?;
        // As many as lie in its rings, whatever the flags say.
        let lent = dpdk::lent_mbufs(&device);
        Ok(IfaceConfig {
            device,
            address: self.ip.context("--ip is missing")?,
            vlan: self.vlan,
            udp_port,
            mtu: self.mtu,
            queues,
            rx_descriptors: lent.unwrap_or(self.rx_descriptors),
            tx_descriptors: lent.unwrap_or(self.tx_descriptors),
            mbufs: self.mbufs,
            rss: None,
        })
    }
}

/// How DPDK is started.
#[derive(Debug, Clone, Args)]
pub(crate) struct EalFlags {
    /// Run on ordinary pages: slower, reaches no NIC, needs no privilege
    #[arg(long)]
    pub(crate) no_huge: bool,
    /// Memory that DPDK takes at start, in MiB [default: as needed, with --no-huge 256]
    #[arg(long, value_name = "MIB")]
    pub(crate) dpdk_memory_mib: Option<u32>,
    /// How long a lcore naps once it has been idle for a while, in microseconds; 0 polls without pause
    #[arg(long, value_name = "US", default_value_t = 0)]
    pub(crate) idle_sleep_us: u64,
    /// TOML file with a table per subcommand and the names of these flags; flags win
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Arguments for DPDK's EAL, as they are
    #[arg(last = true, value_name = "EAL ARGUMENTS")]
    pub(crate) eal: Vec<String>,
}

impl EalFlags {
    /// Workers pinned to `cpus`; `device` is made if it is a virtual one.
    pub(crate) fn config(&self, cpus: impl IntoIterator<Item = usize>, device: &str) -> EalConfig {
        EalConfig {
            vdevs: device.starts_with("net_").then(|| device.to_owned()).into_iter().collect(),
            lcores: cpus.into_iter().collect(),
            file_prefix: format!("shadowserve-{}", std::process::id()),
            huge: !self.no_huge,
            memory_mib: self.dpdk_memory_mib,
            extra: self.eal.clone(),
            ..EalConfig::default()
        }
    }

    pub(crate) fn idle_sleep(&self) -> Duration {
        Duration::from_micros(self.idle_sleep_us)
    }

    /// Pages for our own memory.
    pub(crate) fn pages(&self) -> PageChoice {
        if self.no_huge { PageChoice::Base } else { PageChoice::Auto }
    }
}

/// How planes are encoded.
#[derive(Debug, Clone, Args)]
pub(crate) struct CodecFlags {
    /// How planes are encoded: raw, lossless, int8, int5, int4, int3 or cachegen
    #[arg(long, value_name = "CODEC", default_value = "int4", conflicts_with = "profile")]
    pub(crate) codec: Codec,
    /// How codes are compressed: zstd, sliced (as small, and several times faster to decode), none (larger, and faster still), or deflate (for compression devices)
    /// [default: sliced for int8 to int3, zstd for the others]
    #[arg(long, value_name = "COMPRESSION", conflicts_with = "profile")]
    pub(crate) compression: Option<Compression>,
    /// Encode each layer's K and V as this file says, which `shadowserve encode --make-profile` writes
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
}

impl CodecFlags {
    pub(crate) fn codecs(&self) -> anyhow::Result<Codecs> {
        match &self.profile {
            Some(path) => read_profile(path),
            None => Ok(self.plane_codec().into()),
        }
    }
}

impl CodecFlags {
    fn plane_codec(&self) -> PlaneCodec {
        let plane = PlaneCodec::from(self.codec);
        PlaneCodec { compression: self.compression.unwrap_or(plane.compression), ..plane }
    }

    /// These flags again, for another process.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let text = |text: &str| text.to_owned();
        match &self.profile {
            Some(path) => vec![text("--profile"), path.to_string_lossy().into_owned()],
            None => vec![
                text("--codec"),
                text(self.codec.name()),
                text("--compression"),
                text(self.plane_codec().compression.name()),
            ],
        }
    }
}

/// Reads `--profile`.
pub(crate) fn read_profile(path: &Path) -> anyhow::Result<Codecs> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--profile {}", path.display()))?;
    let profile = Profile::parse(&text).with_context(|| format!("--profile {}", path.display()))?;
    Ok(Codecs::Each(Arc::new(profile)))
}

/// What chunks are named after, beside their tokens. Store and client must say the same.
#[derive(Debug, Clone, Args)]
pub(crate) struct NamespaceFlags {
    /// Name of the model that the KV belongs to
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(crate) model: String,
    /// How planes lie in a chunk
    #[arg(long, value_name = "NAME", default_value = "nhd")]
    pub(crate) layout: String,
    /// Tensor-parallel rank
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) rank: u32,
    /// Keeps tenants apart: keys of different salts never meet
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) salt: String,
}

impl NamespaceFlags {
    /// The namespace of chunks that are encoded so.
    pub(crate) fn namespace(&self, codecs: &Codecs) -> Namespace {
        Namespace {
            model: self.model.clone(),
            layout: self.layout.clone(),
            codec: codecs.name(),
            rank: self.rank,
            salt: self.salt.clone(),
        }
    }
}

/// A flag that SIGTERM and SIGINT set. A second signal ends the process at once.
pub(crate) fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .context("signals cannot be handled")?;
    }
    Ok(stop)
}

/// `aa:bb:cc:dd:ee:ff`
pub(crate) fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2)).collect();
    bytes
        .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
        .ok_or_else(|| format!("`{text}` is not a MAC address: write for example 02:00:00:00:00:01"))
}
