//! Ethernet ports.

use std::collections::HashSet;
use std::ffi::{CStr, c_int};
use std::fmt;
use std::sync::{Arc, MutexGuard, PoisonError};

use dpdk_sys::rte_eth_stats;

use crate::eal::{Eal, EalInner};
use crate::memif;
use crate::pool::Pool;
use crate::port_config::{self, Capabilities, PortConfig};
use crate::port_error::{PortError, check};
use crate::port_setup::{
    configure, device_arguments, find, info, keep_away, port_name, read_rss, set_up_queues,
};
use crate::queue::{RxQueue, TxQueue};
use crate::ring_ports::SharedRings;
use crate::rss::Rss;
use crate::split::{SplitPools, SplitRxQueue};

/// A port's counters since it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PortStats {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets lost because a receive queue was full.
    pub rx_missed: u64,
    /// Packets received wrong.
    pub rx_errors: u64,
    /// Times that no mbuf was free for a packet.
    pub rx_nombuf: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets that could not be sent.
    pub tx_errors: u64,
}

/// A started port. The device is stopped and closed when this and all of its queues are dropped; one that is virtual is removed then.
#[derive(Debug)]
pub struct Port {
    inner: Arc<PortInner>,
}

/// A port that was just opened, and its queues.
#[derive(Debug)]
pub struct OpenPort {
    /// The port.
    pub port: Port,
    /// Receive queues as ever.
    pub rx: Vec<RxQueue>,
    /// Receive queues whose packets are cut in two.
    pub split_rx: Vec<SplitRxQueue>,
    /// Transmit queues.
    pub tx: Vec<TxQueue>,
}

/// What the port and its queues hold on to.
pub(crate) struct PortInner {
    id: u16,
    name: String,
    driver: String,
    device: *mut dpdk_sys::rte_device,
    mtu: u16,
    capabilities: Capabilities,
    rx_queues: u16,
    rss: Option<Rss>,
    /// The device's configuration points to it.
    rss_key: Option<Vec<u8>>,
    started: bool,
    split_refused: Option<PortError>,
    /// Packets that are left in them go back to their pools.
    _rings: Option<Arc<SharedRings>>,
    /// Where received packets go. They are dropped after the device, whose queues hold mbufs of theirs, and after the rings.
    _pools: Vec<Pool>,
    eal: Arc<EalInner>,
}

// SAFETY: the pointer is the EAL's, which locks what it does with devices; all else is plain data.
unsafe impl Send for PortInner {}
// SAFETY: as above; the functions called by shared reference only read.
unsafe impl Sync for PortInner {}

impl Port {
    /// Opens and starts a port and hands out its queues, once. `name` is the name of a virtual device (`net_memif0`), a PCI address
    /// (`0000:03:00.0`) or a port number. One that was not there at start is attached if it is a PCI device or is named with its
    /// arguments (`net_memif0,role=client,socket=/run/memif.sock`). `pools` has one pool for each receive queue.
    ///
    /// A `net_memif` port opens whether or not its peer is there; [`Port::link_up`] tells. A peer that leaves may come back.
    ///
    /// Checksums, chains of mbufs and RSS are switched on where the device has them; [`Port::capabilities`] says which it has.
    ///
    /// # Errors
    /// See [`PortError`].
    pub fn open(
        eal: &Eal,
        name: &str,
        config: &PortConfig,
        pools: &[Pool],
    ) -> Result<(Port, Vec<RxQueue>, Vec<TxQueue>), PortError> {
        let OpenPort { port, rx, tx, .. } = Self::open_split(eal, name, config, pools, &[])?;
        Ok((port, rx, tx))
    }

    /// The same with further receive queues behind those of `config`, one for each of `split`, whose packets are cut in two. Nothing reaches
    /// them but what [`Port::steer`] brings there; what a virtual device receives, its other side brings.
    ///
    /// The port's driver can do it ([`crate::PortProbe::can_split`]), or the CPU does it, if it can write to the memory. The memory was mapped for the port.
    ///
    /// # Errors
    /// See [`PortError`].
    pub fn open_split(
        eal: &Eal,
        name: &str,
        config: &PortConfig,
        pools: &[Pool],
        split: &[SplitPools],
    ) -> Result<OpenPort, PortError> {
        if pools.len() != usize::from(config.rx_queues) {
            return Err(PortError::WrongPools {
                port: name.to_owned(),
                rx_queues: config.rx_queues,
                pools: pools.len(),
            });
        }
        let plain_queues = config.rx_queues;
        let config = &PortConfig {
            rx_queues: plain_queues.saturating_add(u16::try_from(split.len()).unwrap_or(u16::MAX)),
            ..*config
        };
        let by_cpu = split.iter().all(|pools| pools.tail.is_cpu_memory());
        let first = |pools: &SplitPools| pools.head.as_ref().unwrap_or(pools.tail.pool()).clone();
        let pools: Vec<Pool> = pools.iter().cloned().chain(split.iter().map(first)).collect();
        let id = find(eal, name)?;
        let claim = Claim::new(eal.inner(), id, name)?;
        let info = info(id, name)?;
        // SAFETY: the driver's name is a constant string.
        let driver = unsafe { CStr::from_ptr(info.driver_name) }.to_string_lossy().into_owned();
        let smallest = pools.iter().map(Pool::data_room_bytes).min().unwrap_or(u16::MAX);
        let arguments = device_arguments(info.device);
        let plan = port_config::plan(name, &driver, &arguments, config, &info, smallest)?;
        let key = configure(id, name, config, &info, &plan)?;
        let rings = claim.take_rings(&port_name(id));
        let mut inner = PortInner {
            id,
            name: name.to_owned(),
            driver,
            device: info.device,
            mtu: plan.mtu,
            capabilities: plan.capabilities,
            rx_queues: config.rx_queues,
            rss: None,
            rss_key: key,
            started: false,
            split_refused: None,
            _rings: rings,
            _pools: pools.iter().chain(split.iter().map(|pools| pools.tail.pool())).cloned().collect(),
            eal: Arc::clone(eal.inner()),
        };
        claim.keep();
        let is_whole = split.iter().any(|pools| pools.head.is_none());
        let by_device = if by_cpu || is_whole { &[] } else { split };
        inner.split_refused = set_up_queues(id, name, config, &info, &plan, (&pools, by_device))?;
        if !split.is_empty() && plan.capabilities.rss {
            keep_away(id, name, &info, plain_queues)?;
        }
        if inner.is_memif() && memif::is_zero_copy(&arguments) {
            lend(name, &pools)?;
        }
        inner.start(config.promiscuous, &arguments)?;
        inner.rss = if plan.capabilities.rss { read_rss(id, &info, inner.rss_key.clone()) } else { None };
        let inner = Arc::new(inner);
        let rx = (0..plain_queues).map(|queue| RxQueue::new(&inner, queue)).collect();
        let split_rx = (plain_queues..).zip(split).map(|(queue, pools)| {
            let cut_at = (by_cpu && !is_whole).then_some(usize::from(pools.at_bytes));
            SplitRxQueue::new(RxQueue::new(&inner, queue), pools.tail.clone(), cut_at)
        });
        let split_rx = split_rx.collect();
        let tx = (0..config.tx_queues).map(|queue| TxQueue::new(&inner, queue)).collect();
        Ok(OpenPort { port: Port { inner }, rx, split_rx, tx })
    }

    /// Has the device bring UDP datagrams for `udp_port` to one receive queue, whatever RSS would do (`rte_flow`), until the port is closed.
    ///
    /// # Errors
    /// When the driver cannot; the message is its own.
    pub fn steer(&self, ipv6: bool, udp_port: u16, queue: u16) -> Result<(), PortError> {
        let mut why = [0_u8; 128];
        // SAFETY: the port is started; at most `why.len()` bytes are written, with a zero at their end.
        let code = unsafe {
            dpdk_sys::shim_steer_udp(
                self.inner.id,
                c_int::from(ipv6),
                udp_port,
                queue,
                why.as_mut_ptr().cast(),
                why.len(),
            )
        };
        if code == 0 {
            return Ok(());
        }
        let end = why.iter().position(|&byte| byte == 0).unwrap_or(why.len());
        Err(PortError::Failed {
            port: self.inner.name.clone(),
            step: "steering a UDP port to its queue",
            reason: String::from_utf8_lossy(&why[..end]).into_owned(),
        })
    }

    /// Makes two ports joined back to back: what is sent on one is received on the other, with one queue each way. Returns the names to
    /// open them by.
    ///
    /// # Errors
    /// When the name is taken or there is no memory.
    pub fn ring_pair(eal: &Eal, name: &str) -> Result<(String, String), PortError> {
        Self::ring_pair_with(eal, name, 1, 1024)
    }

    /// The same with `queues` queues each way, of `entries` packets: queue `i` of one sends to queue `i` of the other.
    ///
    /// # Errors
    /// As [`Port::ring_pair`].
    pub fn ring_pair_with(
        eal: &Eal,
        name: &str,
        queues: u16,
        entries: u32,
    ) -> Result<(String, String), PortError> {
        crate::ring_ports::make(eal.inner(), name, queues, entries)
    }

    pub(crate) fn inner(&self) -> &Arc<PortInner> {
        &self.inner
    }

    /// The port's Ethernet address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        let mut address = dpdk_sys::rte_ether_addr::default();
        // SAFETY: the port exists; the address is written or stays 0.
        unsafe { dpdk_sys::rte_eth_macaddr_get(self.inner.id, &raw mut address) };
        address.addr_bytes
    }

    /// Largest IP packet in bytes.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.inner.mtu
    }

    /// Name of the driver: `net_memif`, `mlx5_pci`.
    #[must_use]
    pub fn driver(&self) -> &str {
        &self.inner.driver
    }

    /// The name that it was opened by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Whether the link is up (for `net_memif`: whether the peer is there).
    #[must_use]
    pub fn link_up(&self) -> bool {
        // SAFETY: the port exists.
        unsafe { dpdk_sys::shim_link_up(self.inner.id) == 1 }
    }

    /// NUMA node of the device, if it has one.
    #[must_use]
    pub fn numa_node(&self) -> Option<u32> {
        // SAFETY: the port exists.
        u32::try_from(unsafe { dpdk_sys::rte_eth_dev_socket_id(self.inner.id) }).ok()
    }

    /// The device's counters; zeros if it has none. (`net_memif` forgets its own when the peer leaves.)
    #[must_use]
    pub fn stats(&self) -> PortStats {
        let mut stats = rte_eth_stats::default();
        // SAFETY: the port exists; the counters are written or stay 0.
        unsafe { dpdk_sys::rte_eth_stats_get(self.inner.id, &raw mut stats) };
        PortStats {
            rx_packets: stats.ipackets,
            rx_bytes: stats.ibytes,
            rx_missed: stats.imissed,
            rx_errors: stats.ierrors,
            rx_nombuf: stats.rx_nombuf,
            tx_packets: stats.opackets,
            tx_bytes: stats.obytes,
            tx_errors: stats.oerrors,
        }
    }

    /// Has the device receive packets to these multicast addresses too, beside its own and broadcasts: by its filter, else by taking
    /// every multicast. Returns false if it can do neither.
    pub fn listen_to_groups(&self, groups: &[[u8; 6]]) -> bool {
        let mut addresses: Vec<_> =
            groups.iter().map(|&addr_bytes| dpdk_sys::rte_ether_addr { addr_bytes }).collect();
        let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
        // SAFETY: the port exists and is started; as many addresses are read as there are.
        unsafe {
            dpdk_sys::rte_eth_dev_set_mc_addr_list(self.inner.id, addresses.as_mut_ptr(), count) == 0
                || dpdk_sys::rte_eth_allmulticast_enable(self.inner.id) == 0
        }
    }

    /// Why the driver refused to cut packets in two: the queues that were to do that receive whole packets into host memory then.
    #[must_use]
    pub fn split_refused(&self) -> Option<&PortError> {
        self.inner.split_refused.as_ref()
    }

    /// What the device does for us.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.inner.capabilities
    }

    /// How packets are spread over the receive queues, where [`Capabilities::rss`] and the device tells.
    #[must_use]
    pub fn rss(&self) -> Option<Rss> {
        self.inner.rss.clone()
    }
}

impl PortInner {
    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    pub(crate) fn device(&self) -> *mut dpdk_sys::rte_device {
        self.device
    }

    /// Whether it is no hardware.
    pub(crate) fn is_virtual(&self) -> bool {
        // SAFETY: the device exists, and the name of its bus is a constant string.
        unsafe { CStr::from_ptr(dpdk_sys::shim_device_bus(self.device)) }.to_bytes() == b"vdev"
    }

    pub(crate) fn is_memif(&self) -> bool {
        self.driver == memif::DRIVER
    }

    fn start(&mut self, promiscuous: bool, arguments: &str) -> Result<(), PortError> {
        let code = if self.is_memif() {
            let (client, lends) = (memif::is_client(arguments), memif::is_zero_copy(arguments));
            // SAFETY: the port is configured and its queues are set up; pools whose mbufs it lends were noted.
            unsafe { dpdk_sys::shim_memif_start(self.id, c_int::from(client), c_int::from(lends)) }
        } else {
            // SAFETY: as above.
            unsafe { dpdk_sys::rte_eth_dev_start(self.id) }
        };
        check(&self.name, "starting the device", code)?;
        self.started = true;
        if promiscuous {
            // SAFETY: the port is started. A device that cannot is left as it is.
            unsafe { dpdk_sys::rte_eth_promiscuous_enable(self.id) };
        }
        Ok(())
    }

    /// Frees what lies in the device's queues. A `net_ring` port would lose it: its rings are no memory of its own.
    fn drain(&self) {
        for queue in 0..self.rx_queues {
            let mut burst = crate::Burst::new();
            // Bounded: nobody sends to a port of its own, whose queues are gone, and a ring holds no more than this.
            for _ in 0..1 << 16 {
                let (spare, room) = burst.spare();
                let room = u16::try_from(room).unwrap_or(0);
                // SAFETY: the port is started, its queue handles are gone, `spare` has that much room.
                let received = unsafe { dpdk_sys::shim_rx_burst(self.id, queue, spare, room) };
                if received == 0 {
                    break;
                }
                // SAFETY: just written.
                unsafe { burst.grow(usize::from(received)) };
                burst.clear();
            }
        }
    }
}

impl Drop for PortInner {
    fn drop(&mut self) {
        if self.started && self.driver == "net_ring" && self._rings.is_none() {
            self.drain();
        }
        // SAFETY: the port exists, its queues' handles are gone, so no other thread uses it.
        unsafe {
            let is_virtual = self.is_virtual();
            if self.is_memif() {
                dpdk_sys::shim_memif_close(self.id);
            } else {
                if self.started {
                    dpdk_sys::rte_eth_dev_stop(self.id);
                }
                dpdk_sys::rte_eth_dev_close(self.id);
            }
            if is_virtual {
                dpdk_sys::rte_dev_remove(self.device);
            }
        }
        open_ports(&self.eal).remove(&self.id);
    }
}

impl fmt::Debug for PortInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortInner")
            .field("name", &self.name)
            .field("driver", &self.driver)
            .finish_non_exhaustive()
    }
}

/// Notes the pools whose mbufs the server of a shared-memory port will write to.
fn lend(port: &str, pools: &[Pool]) -> Result<(), PortError> {
    let cannot = |why| Err(PortError::CannotLend { port: port.to_owned(), why });
    if cfg!(feature = "shared") {
        return cannot("the driver of the shared libdpdk loses them when the server leaves (docs/DPDK.md)");
    }
    for pool in pools {
        // SAFETY: the pool lives.
        match unsafe { dpdk_sys::shim_memif_share(pool.raw()) } {
            0 => {}
            code if code == -rustix::io::Errno::XDEV.raw_os_error() => {
                return cannot("those of another port lie in memory of another NUMA node or page size");
            }
            _ => return cannot("they lie in several pieces of memory, or beyond its first 4 GiB"),
        }
    }
    Ok(())
}

/// A port's number, reserved until it is open.
struct Claim<'a> {
    eal: &'a EalInner,
    id: u16,
    kept: bool,
}

impl<'a> Claim<'a> {
    fn new(eal: &'a EalInner, id: u16, name: &str) -> Result<Self, PortError> {
        if !open_ports(eal).insert(id) {
            return Err(PortError::AlreadyOpen(name.to_owned()));
        }
        Ok(Self { eal, id, kept: false })
    }

    fn take_rings(&self, port: &str) -> Option<Arc<SharedRings>> {
        self.eal.ring_ports.lock().unwrap_or_else(PoisonError::into_inner).remove(port)
    }

    /// From here on the port's own drop gives the number back.
    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.kept {
            open_ports(self.eal).remove(&self.id);
        }
    }
}

fn open_ports(eal: &EalInner) -> MutexGuard<'_, HashSet<u16>> {
    eal.open_ports.lock().unwrap_or_else(PoisonError::into_inner)
}
