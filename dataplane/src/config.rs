//! What the data plane is started with.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use hugepages::PageChoice;
use iface::IfaceConfig;
use protocol::{PlacementError, Schedule, store_id};

use crate::gpu::GpuConfig;
use crate::placement::Placement;

/// Everything that the flags of `shadowserve dataplane` say.
#[derive(Debug, Clone)]
pub struct Config {
    /// The port, its addresses and packet buffers. Its `queues` follow from `placement`.
    pub iface: IfaceConfig,
    /// Which lcore runs which stage.
    pub placement: Placement,
    /// Where the stores are, at least one.
    pub stores: Vec<SocketAddr>,
    /// How many of them keep each chunk.
    pub replicas: usize,
    /// The MAC address that packets for the stores go to, when neither ARP nor neighbour discovery is to find it.
    pub store_mac: Option<[u8; 6]>,
    /// Whom packets for other networks go to.
    pub gateway: Option<IpAddr>,
    /// Where clients connect.
    pub socket: PathBuf,
    /// The group that may connect, beside the owner.
    pub group: Option<String>,
    /// Slots for decoded planes.
    pub slots: usize,
    /// Bytes of a slot: the largest decoded plane.
    pub slot_bytes: usize,
    /// Pages that the slots lie in.
    pub pages: PageChoice,
    /// The compression device that decompresses what it can, if there is one to be used.
    pub compress_dev: Option<String>,
    /// Most packets asked for and not arrived, over all queues; without, as many as memory has room for.
    pub window_segments: Option<u32>,
    /// The link's rate in Mbit/s; 0 to measure it.
    pub link_mbps: u32,
    /// Delay that is not taken for a queue.
    pub queue_tolerance: Duration,
    /// Which fetch is asked for first.
    pub schedule: Schedule,
    /// Fetches carried out at once; more wait.
    pub max_fetches: u16,
    /// Chunks of one fetch.
    pub max_chunks: u32,
    /// Layers of the deepest model.
    pub max_layers: u16,
    /// Least time without an arrival after which everything asked of a store counts as lost.
    pub rto_min: Duration,
    /// Packets that a replica may be asked for while a store is only slow, percent of all that are asked for; 0 to ask replicas for
    /// lookups and headers alone.
    pub hedge_percent: u8,
    /// How long an idle lcore naps; zero never.
    pub idle_sleep: Duration,
    /// The GPUs to deliver to.
    pub gpu: GpuConfig,
    /// Budgets of what is saved.
    pub save: SaveConfig,
}

/// Budgets of what is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveConfig {
    /// Chunks being encoded or offered at once, each in a buffer of its own; zero saves nothing.
    pub chunks: u16,
    /// Bytes of a buffer: the largest encoded chunk, and the worst that one more plane could become.
    pub chunk_bytes: usize,
    /// zstd level.
    pub zstd_level: i32,
}

impl SaveConfig {
    /// Nothing is saved.
    pub const NONE: SaveConfig =
        SaveConfig { chunks: 0, chunk_bytes: 0, zstd_level: compress::DEFAULT_ZSTD_LEVEL };
}

/// Why the data plane cannot run as configured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The store is on another network and there is no gateway.
    #[error(
        "the store {store} is not on the network of --ip {address}: give --gateway, or an --ip on its network"
    )]
    NoRoute {
        /// The store.
        store: SocketAddr,
        /// Our address.
        address: String,
    },
    /// The stores cannot be.
    #[error("--store, --replicas: {0}")]
    Placement(#[from] PlacementError),
    /// A budget is zero.
    #[error("--{0} is 0: give at least 1")]
    Zero(&'static str),
    /// The packet buffers of a queue cannot hold one plane.
    #[error(
        "--mbufs {mbufs} is too little: a queue needs {needed}, its receive ring and the packets of two planes of \
         --slot-kib {slot_kib}"
    )]
    Mbufs {
        /// As given.
        mbufs: u32,
        /// What is needed.
        needed: u32,
        /// Largest plane.
        slot_kib: usize,
    },
    /// More copies of chunks would be offered at once than can be named.
    #[error(
        "--save-chunks {chunks} with --replicas {replicas} are more than 65,534 copies at once: give fewer chunks"
    )]
    Copies {
        /// As given.
        chunks: u16,
        /// As given.
        replicas: usize,
    },
    /// The protocol's messages do not fit the MTU.
    #[error("--mtu {mtu} is too small for the protocol's messages: give at least {least}")]
    Mtu {
        /// As given.
        mtu: u16,
        /// What is needed.
        least: usize,
    },
}

impl Config {
    /// Whom packets for each store go to.
    ///
    /// # Errors
    /// When a store cannot be reached from our address.
    pub fn next_hops(&self) -> Result<Vec<IpAddr>, ConfigError> {
        self.stores.iter().map(|store| self.next_hop(*store)).collect()
    }

    fn next_hop(&self, store: SocketAddr) -> Result<IpAddr, ConfigError> {
        let no_route = || ConfigError::NoRoute { store, address: self.iface.address.to_string() };
        let same_version = store.is_ipv4() == self.iface.address.ip.is_ipv4();
        let hop = if self.iface.address.contains(store.ip()) { Some(store.ip()) } else { self.gateway };
        hop.filter(|hop| same_version && self.iface.address.contains(*hop)).ok_or_else(no_route)
    }

    /// Copies of chunks that may be offered at once.
    ///
    /// # Errors
    /// When there are more than can be named.
    pub fn save_offers(&self) -> Result<u16, ConfigError> {
        let (chunks, replicas) = (self.save.chunks, self.replicas);
        let copies = u16::try_from(usize::from(chunks) * replicas).ok().filter(|copies| *copies < u16::MAX);
        copies.ok_or(ConfigError::Copies { chunks, replicas })
    }

    /// Which store keeps which chunk: by their addresses as printed.
    ///
    /// # Errors
    /// When a store is listed twice, or there are fewer than replicas.
    pub fn store_placement(&self) -> Result<protocol::Placement, ConfigError> {
        let ids: Vec<u64> = self.stores.iter().map(|store| store_id(&store.to_string())).collect();
        Ok(protocol::Placement::new(&ids, self.replicas)?)
    }
}
