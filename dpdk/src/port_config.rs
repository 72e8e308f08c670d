//! How a port is set up, and what its device can do.

use dpdk_sys::{rte_eth_conf, rte_eth_dev_info};

use crate::port::PortError;

/// How a port is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortConfig {
    /// Receive queues.
    pub rx_queues: u16,
    /// Transmit queues.
    pub tx_queues: u16,
    /// Descriptors of each receive queue, brought into the device's limits.
    pub rx_descriptors: u16,
    /// Descriptors of each transmit queue, brought into the device's limits.
    pub tx_descriptors: u16,
    /// Largest IP packet in bytes, Ethernet header not included.
    pub mtu: u16,
    /// Receive packets that are not for this port's address too, where the device can.
    pub promiscuous: bool,
}

impl Default for PortConfig {
    fn default() -> Self {
        Self {
            rx_queues: 1,
            tx_queues: 1,
            rx_descriptors: 1024,
            tx_descriptors: 1024,
            mtu: 1500,
            promiscuous: false,
        }
    }
}

/// What a port's device does for us; all of it is switched on where it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent abilities of a device")]
pub struct Capabilities {
    /// Checks the IPv4 header's checksum of received packets.
    pub rx_ip_checksum: bool,
    /// Checks the UDP checksum of received packets.
    pub rx_udp_checksum: bool,
    /// Fills in the IPv4 header's checksum of sent packets.
    pub tx_ip_checksum: bool,
    /// Fills in the UDP checksum of sent packets.
    pub tx_udp_checksum: bool,
    /// Puts a received packet that is larger than a buffer into a chain of them.
    pub rx_multi_segment: bool,
    /// Sends chains of mbufs.
    pub tx_multi_segment: bool,
    /// Spreads UDP packets over the receive queues by their addresses and ports.
    pub rss: bool,
}

/// Bytes of Ethernet header and checksum, what most devices count beside the IP packet.
const ETHERNET_BYTES: u32 = 18;

/// The driver of shared-memory ports states a largest packet of 1518 bytes and enforces nothing.
const MEMIF: &str = "net_memif";

const RX_IP: u64 = dpdk_sys::RTE_ETH_RX_OFFLOAD_IPV4_CKSUM as u64;
const RX_UDP: u64 = dpdk_sys::RTE_ETH_RX_OFFLOAD_UDP_CKSUM as u64;
const RX_SCATTER: u64 = dpdk_sys::RTE_ETH_RX_OFFLOAD_SCATTER as u64;
const TX_IP: u64 = dpdk_sys::RTE_ETH_TX_OFFLOAD_IPV4_CKSUM as u64;
const TX_UDP: u64 = dpdk_sys::RTE_ETH_TX_OFFLOAD_UDP_CKSUM as u64;
const TX_MULTI: u64 = dpdk_sys::RTE_ETH_TX_OFFLOAD_MULTI_SEGS as u64;
const RSS_UDP: u64 =
    dpdk_sys::RTE_ETH_RSS_NONFRAG_IPV4_UDP as u64 | dpdk_sys::RTE_ETH_RSS_NONFRAG_IPV6_UDP as u64;

/// The device's settings for a configuration, before its queues are set up.
pub(crate) struct Plan {
    pub(crate) conf: rte_eth_conf,
    pub(crate) capabilities: Capabilities,
    /// The MTU that holds for us, if not the device's.
    pub(crate) mtu: u16,
}

/// Chooses what of the wanted things the device has. `name` is the port's, `driver` its driver's, for the messages.
pub(crate) fn plan(
    name: &str,
    driver: &str,
    config: &PortConfig,
    info: &rte_eth_dev_info,
    smallest_data_room: u16,
) -> Result<Plan, PortError> {
    for (what, asked, most) in [
        ("receive", config.rx_queues, info.max_rx_queues),
        ("transmit", config.tx_queues, info.max_tx_queues),
    ] {
        if asked > most {
            return Err(PortError::TooManyQueues { port: name.to_owned(), what, asked, most });
        }
    }
    let device_mtu = mtu(name, driver, config.mtu, info)?;
    let frame_bytes = u32::from(device_mtu) + ETHERNET_BYTES;
    let buffer_bytes = u32::from(smallest_data_room.saturating_sub(crate::HEADROOM_BYTES));
    let can = |capabilities: u64, flag: u64| capabilities & flag == flag;
    let (rx, tx) = (info.rx_offload_capa, info.tx_offload_capa);
    let scatter = config.rx_queues > 0 && frame_bytes > buffer_bytes;
    if scatter && !can(rx, RX_SCATTER) && driver != MEMIF {
        return Err(PortError::BuffersTooSmall {
            port: name.to_owned(),
            mtu: config.mtu,
            buffer_bytes,
            frame_bytes,
        });
    }
    let rss = config.rx_queues > 1 && info.flow_type_rss_offloads & RSS_UDP != 0;
    let capabilities = Capabilities {
        rx_ip_checksum: can(rx, RX_IP),
        rx_udp_checksum: can(rx, RX_UDP),
        tx_ip_checksum: can(tx, TX_IP),
        tx_udp_checksum: can(tx, TX_UDP),
        rx_multi_segment: can(rx, RX_SCATTER),
        tx_multi_segment: can(tx, TX_MULTI),
        rss,
    };
    let mut conf = rte_eth_conf::default();
    conf.rxmode.mtu = u32::from(device_mtu);
    conf.rxmode.offloads = rx & (RX_IP | RX_UDP | if scatter { RX_SCATTER } else { 0 });
    conf.txmode.offloads = tx & (TX_IP | TX_UDP | TX_MULTI);
    if rss {
        conf.rxmode.mq_mode = dpdk_sys::RTE_ETH_MQ_RX_RSS;
        conf.rx_adv_conf.rss_conf.rss_hf = info.flow_type_rss_offloads & RSS_UDP;
    }
    Ok(Plan { conf, capabilities, mtu: config.mtu })
}

/// The MTU that the device is given: the one wanted, which must be in its limits.
fn mtu(name: &str, driver: &str, wanted: u16, info: &rte_eth_dev_info) -> Result<u16, PortError> {
    let by_frame = u16::try_from(info.max_rx_pktlen.saturating_sub(ETHERNET_BYTES)).unwrap_or(u16::MAX);
    let most = match (info.max_mtu, info.max_rx_pktlen) {
        (most, 0) => most,
        (u16::MAX, _) => by_frame,
        (most, _) => most,
    };
    if driver == MEMIF {
        return Ok(wanted.min(most));
    }
    if wanted > most || wanted < info.min_mtu {
        return Err(PortError::BadMtu { port: name.to_owned(), asked: wanted, least: info.min_mtu, most });
    }
    Ok(wanted)
}
