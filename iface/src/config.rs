//! What the command line says of a port.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use dpdk::Rss;

/// An address and the length of its network's prefix, as in `10.0.0.2/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpPrefix {
    /// The address.
    pub ip: IpAddr,
    /// Bits of the network's prefix.
    pub bits: u8,
}

/// The text is no address with a prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an address with a prefix: write for example 10.0.0.2/24 or fd00::2/64")]
pub struct BadPrefix(String);

impl FromStr for IpPrefix {
    type Err = BadPrefix;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadPrefix(text.into());
        let (ip, bits) = text.split_once('/').ok_or_else(bad)?;
        let ip: IpAddr = ip.parse().map_err(|_| bad())?;
        let bits: u8 = bits.parse().map_err(|_| bad())?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        if bits > most || ip.is_unspecified() || ip.is_multicast() {
            return Err(bad());
        }
        Ok(Self { ip, bits })
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.ip, self.bits)
    }
}

impl IpPrefix {
    /// Whether `other` is on this network, that is, can be reached without a gateway.
    #[must_use]
    pub fn contains(&self, other: IpAddr) -> bool {
        match (self.ip, other) {
            (IpAddr::V4(ours), IpAddr::V4(other)) => {
                let host_bits = 32 - u32::from(self.bits);
                (u32::from(ours) ^ u32::from(other)).checked_shr(host_bits).unwrap_or(0) == 0
            }
            (IpAddr::V6(ours), IpAddr::V6(other)) => {
                let host_bits = 128 - u32::from(self.bits);
                (u128::from(ours) ^ u128::from(other)).checked_shr(host_bits).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

/// A port: its device, addresses and budgets.
#[derive(Debug, Clone)]
pub struct IfaceConfig {
    /// What DPDK calls it: a PCI address, or the name of a virtual device.
    pub device: String,
    /// Our address.
    pub address: IpPrefix,
    /// The VLAN that we are in: frames are sent with its tag, and taken with no other.
    pub vlan: Option<u16>,
    /// UDP port of the first queue.
    pub udp_port: u16,
    /// Largest IP packet, in bytes.
    pub mtu: u16,
    /// Queues, each with its own lcore.
    pub queues: u16,
    /// Receive descriptors per queue.
    pub rx_descriptors: u16,
    /// Transmit descriptors per queue.
    pub tx_descriptors: u16,
    /// Packet buffers per queue.
    pub mbufs: u32,
    /// How the device spreads packets over its queues, if that is known and the device does not tell.
    pub rss: Option<Rss>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_parse_and_contain() {
        let prefix: IpPrefix = "10.1.2.3/24".parse().unwrap();
        assert!(prefix.contains("10.1.2.200".parse().unwrap()));
        assert!(!prefix.contains("10.1.3.3".parse().unwrap()));
        assert!(!prefix.contains("fd00::1".parse().unwrap()));
        let all: IpPrefix = "10.1.2.3/0".parse().unwrap();
        assert!(all.contains("192.0.2.1".parse().unwrap()));
        let prefix: IpPrefix = "fd00::2/64".parse().unwrap();
        assert!(prefix.contains("fd00::ffff".parse().unwrap()));
        assert!(!prefix.contains("fd00:0:0:1::1".parse().unwrap()));
        for bad in ["10.0.0.1", "10.0.0.1/33", "0.0.0.0/8", "ff02::1/64", "x/8"] {
            assert!(bad.parse::<IpPrefix>().unwrap_err().to_string().contains(bad));
        }
    }
}
