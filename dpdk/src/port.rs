//! Ethernet ports.

use std::collections::HashSet;
use std::ffi::{CStr, CString, c_int};
use std::fmt;
use std::ptr;
use std::sync::{Arc, MutexGuard, PoisonError};

use dpdk_sys::{rte_eth_dev_info, rte_eth_stats};

use crate::eal::{AttachError, Eal, EalInner};
use crate::memif;
use crate::pool::Pool;
use crate::port_config::{self, Capabilities, Plan, PortConfig};
use crate::queue::{RxQueue, TxQueue};
use crate::ring_ports::SharedRings;
use crate::rss::{MICROSOFT_KEY, Rss};

/// Why a port was not opened.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// No such port.
    #[error(
        "there is no port {port:?}; there are: {known}. A PCI device must be bound to vfio-pci (or be an mlx5), a virtual one be \
         given with --vdev"
    )]
    NoSuchPort {
        /// The name asked for.
        port: String,
        /// Names of the ports that exist.
        known: String,
    },
    /// It was named with arguments, or is a PCI device that was not probed at start, and cannot be had.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// It is open already.
    #[error("port {0:?} is already open")]
    AlreadyOpen(String),
    /// One pool per receive queue is needed.
    #[error(
        "port {port:?} has {rx_queues} receive queues but was given {pools} pools: one for each is needed"
    )]
    WrongPools {
        /// The port.
        port: String,
        /// Receive queues asked for.
        rx_queues: u16,
        /// Pools given.
        pools: usize,
    },
    /// The device has not so many queues.
    #[error("port {port:?} has at most {most} {what} queues, {asked} were asked for")]
    TooManyQueues {
        /// The port.
        port: String,
        /// "receive" or "transmit".
        what: &'static str,
        /// Queues asked for.
        asked: u16,
        /// What the device has.
        most: u16,
    },
    /// The device cannot have this MTU.
    #[error("port {port:?} takes an MTU from {least} to {most} bytes, not {asked}")]
    BadMtu {
        /// The port.
        port: String,
        /// MTU asked for.
        asked: u16,
        /// The device's smallest.
        least: u16,
        /// The device's largest.
        most: u16,
    },
    /// Packets do not fit the pool's buffers and the device cannot use several for one.
    #[error(
        "port {port:?} cannot split a packet over buffers: an MTU of {mtu} makes frames of {frame_bytes} bytes, the pool's buffers take \
         {buffer_bytes}. Use a larger data room or a smaller MTU"
    )]
    BuffersTooSmall {
        /// The port.
        port: String,
        /// MTU asked for.
        mtu: u16,
        /// What a buffer takes.
        buffer_bytes: u32,
        /// What a frame can have.
        frame_bytes: u32,
    },
    /// A shared-memory port cannot be trusted with frames larger than its buffers.
    #[error(
        "port {port:?}: an MTU of {mtu} makes frames of {frame_bytes} bytes, its shared buffers take {bsize}: add bsize={frame_bytes} (or \
         more) to the arguments of the side with role=client"
    )]
    MemifBuffersTooSmall {
        /// The port.
        port: String,
        /// MTU asked for.
        mtu: u16,
        /// What a shared buffer takes.
        bsize: u32,
        /// What a frame can have.
        frame_bytes: u32,
    },
    /// The driver refused.
    #[error("port {port:?}: {step} failed: {reason}")]
    Failed {
        /// The port.
        port: String,
        /// What was being done.
        step: &'static str,
        /// DPDK's message.
        reason: String,
    },
}

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
    /// Where received packets go. They are dropped after the device, whose queues hold mbufs of theirs.
    _pools: Vec<Pool>,
    _rings: Option<Arc<SharedRings>>,
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
        if pools.len() != usize::from(config.rx_queues) {
            return Err(PortError::WrongPools {
                port: name.to_owned(),
                rx_queues: config.rx_queues,
                pools: pools.len(),
            });
        }
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
            _pools: pools.to_vec(),
            _rings: rings,
            eal: Arc::clone(eal.inner()),
        };
        claim.keep();
        set_up_queues(&inner, config, &info, &plan, pools)?;
        inner.start(config.promiscuous, &arguments)?;
        inner.rss = if plan.capabilities.rss { read_rss(id, &info, inner.rss_key.clone()) } else { None };
        let inner = Arc::new(inner);
        let rx = (0..config.rx_queues).map(|queue| RxQueue::new(&inner, queue)).collect();
        let tx = (0..config.tx_queues).map(|queue| TxQueue::new(&inner, queue)).collect();
        Ok((Port { inner }, rx, tx))
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

    pub(crate) fn is_memif(&self) -> bool {
        self.driver == memif::DRIVER
    }

    fn start(&mut self, promiscuous: bool, arguments: &str) -> Result<(), PortError> {
        let code = if self.is_memif() {
            // SAFETY: the port is configured and its queues are set up.
            unsafe { dpdk_sys::shim_memif_start(self.id, c_int::from(memif::is_client(arguments))) }
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
        // SAFETY: the port exists, its queues' handles are gone, so no other thread uses it. The name of its bus is a constant string.
        unsafe {
            let is_virtual = CStr::from_ptr(dpdk_sys::shim_device_bus(self.device)).to_bytes() == b"vdev";
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

pub(crate) fn check(port: &str, step: &'static str, code: c_int) -> Result<(), PortError> {
    if code >= 0 {
        return Ok(());
    }
    Err(PortError::Failed { port: port.to_owned(), step, reason: crate::error_text(code) })
}

fn find(eal: &Eal, name: &str) -> Result<u16, PortError> {
    let device = name.split(',').next().unwrap_or(name);
    if let Some(id) = by_name(device).or_else(|| by_number(device)) {
        return Ok(id);
    }
    let is_pci = device.contains(':') && device.contains('.');
    if is_pci || device != name {
        eal.attach(name)?;
        if let Some(id) = by_name(device) {
            return Ok(id);
        }
    }
    let known: Vec<String> =
        (0..u16::MAX).take_while(|&id| id < MAX_PORTS).filter(|&id| exists(id)).map(port_name).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(PortError::NoSuchPort { port: name.to_owned(), known })
}

/// Ports that DPDK has room for; far more than any build is made with.
const MAX_PORTS: u16 = 1024;

fn exists(id: u16) -> bool {
    // SAFETY: accepts any number.
    unsafe { dpdk_sys::rte_eth_dev_is_valid_port(id) == 1 }
}

fn by_number(name: &str) -> Option<u16> {
    name.parse().ok().filter(|&id| exists(id))
}

fn by_name(name: &str) -> Option<u16> {
    let name = CString::new(name).ok()?;
    let mut id = 0;
    // SAFETY: reads a C string, writes a number.
    let code = unsafe { dpdk_sys::rte_eth_dev_get_port_by_name(name.as_ptr(), &raw mut id) };
    (code == 0).then_some(id)
}

fn port_name(id: u16) -> String {
    let mut name = [0_u8; 256];
    // SAFETY: writes at most RTE_ETH_NAME_MAX_LEN (64) bytes, or nothing.
    unsafe { dpdk_sys::rte_eth_dev_get_name_by_port(id, name.as_mut_ptr().cast()) };
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}

fn info(id: u16, name: &str) -> Result<rte_eth_dev_info, PortError> {
    let mut info = rte_eth_dev_info::default();
    // SAFETY: the port exists; the structure is written or stays as it is.
    check(name, "asking for the device's limits", unsafe {
        dpdk_sys::rte_eth_dev_info_get(id, &raw mut info)
    })?;
    Ok(info)
}

/// What follows the name in the device's arguments.
fn device_arguments(device: *mut dpdk_sys::rte_device) -> String {
    // SAFETY: the device of an existing port.
    let arguments = unsafe { dpdk_sys::shim_device_arguments(device) };
    if arguments.is_null() {
        return String::new();
    }
    // SAFETY: a C string that lives as long as the device.
    unsafe { CStr::from_ptr(arguments) }.to_string_lossy().into_owned()
}

/// Configures the device. Returns the RSS key that it was given; one that refuses it keeps its own.
fn configure(
    id: u16,
    name: &str,
    config: &PortConfig,
    info: &rte_eth_dev_info,
    plan: &Plan,
) -> Result<Option<Vec<u8>>, PortError> {
    let step = "configuring the device";
    // SAFETY: the port exists and is not started; what the structure points to outlives the call.
    let apply =
        |conf| unsafe { dpdk_sys::rte_eth_dev_configure(id, config.rx_queues, config.tx_queues, conf) };
    let mut conf = plan.conf;
    if plan.capabilities.rss && info.hash_key_size > 0 {
        let mut key: Vec<u8> =
            MICROSOFT_KEY.iter().copied().cycle().take(usize::from(info.hash_key_size)).collect();
        conf.rx_adv_conf.rss_conf.rss_key = key.as_mut_ptr();
        conf.rx_adv_conf.rss_conf.rss_key_len = info.hash_key_size;
        if apply(&raw const conf) == 0 {
            return Ok(Some(key));
        }
        conf.rx_adv_conf.rss_conf.rss_key = ptr::null_mut();
        conf.rx_adv_conf.rss_conf.rss_key_len = 0;
    }
    check(name, step, apply(&raw const conf))?;
    Ok(None)
}

fn set_up_queues(
    port: &PortInner,
    config: &PortConfig,
    info: &rte_eth_dev_info,
    plan: &Plan,
    pools: &[Pool],
) -> Result<(), PortError> {
    let (mut rx_descriptors, mut tx_descriptors) = (config.rx_descriptors, config.tx_descriptors);
    // SAFETY: the port is configured; the numbers are brought into its limits.
    let code = unsafe {
        dpdk_sys::rte_eth_dev_adjust_nb_rx_tx_desc(port.id, &raw mut rx_descriptors, &raw mut tx_descriptors)
    };
    check(&port.name, "choosing the number of descriptors", code)?;
    // SAFETY: the port exists.
    let node = unsafe { dpdk_sys::rte_eth_dev_socket_id(port.id) };
    #[expect(clippy::cast_sign_loss, reason = "C passes SOCKET_ID_ANY, which is -1, as unsigned")]
    let node = node as u32;
    for (queue, pool) in (0..config.rx_queues).zip(pools) {
        let mut conf = info.default_rxconf;
        conf.offloads = plan.conf.rxmode.offloads;
        // SAFETY: the queue exists; the port holds the pool.
        let code = unsafe {
            dpdk_sys::rte_eth_rx_queue_setup(
                port.id,
                queue,
                rx_descriptors,
                node,
                &raw const conf,
                pool.raw(),
            )
        };
        check(&port.name, "setting up a receive queue", code)?;
    }
    for queue in 0..config.tx_queues {
        let mut conf = info.default_txconf;
        conf.offloads = plan.conf.txmode.offloads;
        // SAFETY: the queue exists.
        let code = unsafe {
            dpdk_sys::rte_eth_tx_queue_setup(port.id, queue, tx_descriptors, node, &raw const conf)
        };
        check(&port.name, "setting up a transmit queue", code)?;
    }
    Ok(())
}

/// Reads back key and indirection table. A device that does not tell its key has the one that it was given.
fn read_rss(id: u16, info: &rte_eth_dev_info, given: Option<Vec<u8>>) -> Option<Rss> {
    let mut key = vec![0_u8; usize::from(info.hash_key_size)];
    let mut conf = dpdk_sys::rte_eth_rss_conf {
        rss_key: key.as_mut_ptr(),
        rss_key_len: info.hash_key_size,
        ..Default::default()
    };
    // SAFETY: the port is started; at most `rss_key_len` bytes are written.
    let told = unsafe { dpdk_sys::rte_eth_dev_rss_hash_conf_get(id, &raw mut conf) } == 0
        && key.iter().any(|&byte| byte != 0);
    let key = if told { key } else { given? };
    let group = dpdk_sys::RTE_ETH_RETA_GROUP_SIZE as usize;
    let mut groups =
        vec![dpdk_sys::rte_eth_rss_reta_entry64::default(); usize::from(info.reta_size).div_ceil(group)];
    groups.iter_mut().for_each(|entries| entries.mask = u64::MAX);
    // SAFETY: there are as many groups as `reta_size` entries need.
    let code = unsafe { dpdk_sys::rte_eth_dev_rss_reta_query(id, groups.as_mut_ptr(), info.reta_size) };
    if code != 0 {
        return None;
    }
    let entries = groups.iter().flat_map(|entries| entries.reta).take(usize::from(info.reta_size));
    Some(Rss { key, reta: entries.collect() })
}
