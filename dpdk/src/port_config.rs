//! How a port is set up, and what its device can do.

use dpdk_sys::{rte_eth_conf, rte_eth_dev_info};

use crate::memif;
use crate::port_error::PortError;

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

const RX_IP: u64 = dpdk_sys::RTE_ETH_RX_OFFLOAD_IPV4_CKSUM;
pub(crate) const RX_UDP: u64 = dpdk_sys::RTE_ETH_RX_OFFLOAD_UDP_CKSUM;
pub(crate) const RX_SCATTER: u64 = dpdk_sys::RTE_ETH_RX_OFFLOAD_SCATTER;
const TX_IP: u64 = dpdk_sys::RTE_ETH_TX_OFFLOAD_IPV4_CKSUM;
const TX_UDP: u64 = dpdk_sys::RTE_ETH_TX_OFFLOAD_UDP_CKSUM;
const TX_MULTI: u64 = dpdk_sys::RTE_ETH_TX_OFFLOAD_MULTI_SEGS;
pub(crate) const RSS_UDP: u64 =
    dpdk_sys::RTE_ETH_RSS_NONFRAG_IPV4_UDP | dpdk_sys::RTE_ETH_RSS_NONFRAG_IPV6_UDP;

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
    arguments: &str,
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
    let device_mtu = mtu(name, driver, arguments, config.mtu, info)?;
    let frame_bytes = u32::from(config.mtu) + ETHERNET_BYTES;
    let buffer_bytes = u32::from(smallest_data_room.saturating_sub(crate::HEADROOM_BYTES));
    let can = |capabilities: u64, flag: u64| capabilities & flag == flag;
    let (rx, tx) = (info.rx_offload_capa, info.tx_offload_capa);
    let scatter = config.rx_queues > 0 && frame_bytes > buffer_bytes;
    // net_memif has no such offload: it always scatters, but loses mbufs when it runs out of them in the midst of a packet.
    if scatter && !can(rx, RX_SCATTER) {
        return Err(PortError::BuffersTooSmall {
            port: name.to_owned(),
            mtu: config.mtu,
            buffer_bytes,
            frame_bytes,
        });
    }
    // What it sends its server reads where it lies, which must be in the pools.
    let lends = driver == memif::DRIVER && memif::is_zero_copy(arguments);
    let rss = config.rx_queues > 1 && info.flow_type_rss_offloads & RSS_UDP != 0;
    let capabilities = Capabilities {
        rx_ip_checksum: can(rx, RX_IP),
        rx_udp_checksum: can(rx, RX_UDP),
        tx_ip_checksum: can(tx, TX_IP),
        tx_udp_checksum: can(tx, TX_UDP),
        rx_multi_segment: can(rx, RX_SCATTER),
        tx_multi_segment: can(tx, TX_MULTI) && !lends,
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
fn mtu(
    name: &str,
    driver: &str,
    arguments: &str,
    wanted: u16,
    info: &rte_eth_dev_info,
) -> Result<u16, PortError> {
    let by_frame = u16::try_from(info.max_rx_pktlen.saturating_sub(ETHERNET_BYTES)).unwrap_or(u16::MAX);
    let most = match (info.max_mtu, info.max_rx_pktlen) {
        (most, 0) => most,
        (u16::MAX, _) => by_frame,
        (most, _) => most,
    };
    if driver == memif::DRIVER {
        check_memif_buffers(name, arguments, wanted)?;
        return Ok(wanted.min(most));
    }
    if wanted > most || wanted < info.min_mtu {
        return Err(PortError::BadMtu { port: name.to_owned(), asked: wanted, least: info.min_mtu, most });
    }
    Ok(wanted)
}

/// The driver of shared-memory ports spreads a frame that is larger than its buffers over several of them, and loses and garbles such
/// frames (seen with 22.11 at an MTU of 9000). The client's argument `bsize` is the size for both sides, so the server cannot tell.
fn check_memif_buffers(name: &str, arguments: &str, mtu: u16) -> Result<(), PortError> {
    let (bsize, frame_bytes) = (memif::bsize(arguments), u32::from(mtu) + ETHERNET_BYTES);
    if memif::is_client(arguments) && frame_bytes > bsize {
        return Err(PortError::MemifBuffersTooSmall { port: name.to_owned(), mtu, bsize, frame_bytes });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> rte_eth_dev_info {
        rte_eth_dev_info {
            min_mtu: 68,
            max_mtu: 9000,
            max_rx_pktlen: 9018,
            max_rx_queues: 4,
            max_tx_queues: 4,
            rx_offload_capa: RX_UDP | RX_SCATTER,
            tx_offload_capa: TX_MULTI,
            flow_type_rss_offloads: dpdk_sys::RTE_ETH_RSS_NONFRAG_IPV4_UDP
                | dpdk_sys::RTE_ETH_RSS_NONFRAG_IPV4_TCP,
            ..Default::default()
        }
    }

    #[test]
    fn what_the_device_has_is_used_and_nothing_else() {
        let config = PortConfig { rx_queues: 2, ..PortConfig::default() };
        let plan = plan("p", "net_x", "", &config, &device(), 2176).expect("in the limits");
        assert_eq!(plan.conf.rxmode.offloads, RX_UDP);
        assert_eq!(plan.conf.txmode.offloads, TX_MULTI);
        assert_eq!(plan.conf.rx_adv_conf.rss_conf.rss_hf, dpdk_sys::RTE_ETH_RSS_NONFRAG_IPV4_UDP);
        let has = plan.capabilities;
        assert!(has.rx_udp_checksum && has.rx_multi_segment && has.tx_multi_segment && has.rss);
        assert!(!has.rx_ip_checksum && !has.tx_ip_checksum && !has.tx_udp_checksum);
    }

    #[test]
    fn large_packets_are_scattered_or_refused() {
        let config = PortConfig { mtu: 9000, ..PortConfig::default() };
        let scattered = plan("p", "net_x", "", &config, &device(), 2176).expect("in the limits");
        assert_eq!(scattered.conf.rxmode.offloads, RX_UDP | RX_SCATTER);
        let one_buffer =
            plan("p", "net_x", "", &config, &device(), 9018 + crate::HEADROOM_BYTES).expect("in the limits");
        assert_eq!(one_buffer.conf.rxmode.offloads, RX_UDP);
        let cannot = rte_eth_dev_info { rx_offload_capa: 0, ..device() };
        assert!(matches!(
            plan("p", "net_x", "", &config, &cannot, 2176),
            Err(PortError::BuffersTooSmall { .. })
        ));
    }

    #[test]
    fn limits_are_kept() {
        let try_with = |config: PortConfig, info| {
            plan("p", "net_x", "", &config, &info, 9999).map(|plan| plan.conf.rxmode.mtu)
        };
        let mtu = |mtu| PortConfig { mtu, ..PortConfig::default() };
        assert!(matches!(try_with(mtu(9001), device()), Err(PortError::BadMtu { most: 9000, .. })));
        assert!(matches!(try_with(mtu(67), device()), Err(PortError::BadMtu { least: 68, .. })));
        assert_eq!(try_with(mtu(9000), device()).expect("in the limits"), 9000);
        let by_frame = rte_eth_dev_info { max_mtu: u16::MAX, max_rx_pktlen: 1518, ..device() };
        assert!(matches!(try_with(mtu(1501), by_frame), Err(PortError::BadMtu { most: 1500, .. })));
        let queues = PortConfig { tx_queues: 5, ..PortConfig::default() };
        assert!(matches!(
            try_with(queues, device()),
            Err(PortError::TooManyQueues { what: "transmit", asked: 5, most: 4, .. })
        ));
    }

    #[test]
    fn memif_takes_what_its_buffers_take() {
        let info = rte_eth_dev_info {
            max_mtu: u16::MAX,
            max_rx_pktlen: 1518,
            rx_offload_capa: 0,
            max_rx_queues: 1,
            max_tx_queues: 1,
            ..device()
        };
        let try_with = |arguments, mtu, room| {
            plan("p", memif::DRIVER, arguments, &PortConfig { mtu, ..PortConfig::default() }, &info, room)
        };
        let fits = try_with("role=client,bsize=9216", 9000, 9500).expect("in the limits");
        assert_eq!(
            (fits.conf.rxmode.mtu, fits.mtu),
            (1500, 9000),
            "configured as the driver wants it, used as we want it"
        );
        assert!(try_with("role=client", 2030, 2176).is_ok());
        let small = try_with("socket=/s,role=client", 2031, 9500).err().expect("too large").to_string();
        assert!(small.contains("bsize=2049"), "{small}");
        assert!(try_with("role=server", 9000, 9500).is_ok(), "the client's buffers count");
        assert!(matches!(try_with("role=server", 9000, 2176), Err(PortError::BuffersTooSmall { .. })));
    }
}
