//! From an Ethernet frame to a datagram for one of our ports, and back.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;

use crate::reason::DropReason;
use crate::wire::checksum::{Sum, pseudo_header};
use crate::wire::ethernet::{self, EtherType, Ethernet};
use crate::wire::{arp, ipv4, ipv6, udp};

/// Bytes before a datagram's payload when sent over IPv4: Ethernet, IP, UDP.
pub const IPV4_HEADER_BYTES: usize = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES + udp::HEADER_BYTES;
/// Bytes before a datagram's payload when sent over IPv6: Ethernet, IP, UDP.
pub const IPV6_HEADER_BYTES: usize = ethernet::HEADER_BYTES + ipv6::HEADER_BYTES + udp::HEADER_BYTES;

/// This end: one address and a range of UDP ports, one port per receive queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// Our MAC address.
    pub mac: [u8; 6],
    /// Our IP address.
    pub ip: IpAddr,
    /// First of our UDP ports: that of queue 0.
    pub first_port: u16,
    /// How many consecutive ports are ours, at least 1.
    pub ports: u16,
}

impl Local {
    /// Whether `port` is one of ours.
    #[inline]
    pub fn owns_port(&self, port: u16) -> bool {
        port.wrapping_sub(self.first_port) < self.ports
    }
}

/// The other end of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// MAC address of the next hop towards the peer; of a received frame, its sender.
    pub mac: [u8; 6],
    /// IP address.
    pub ip: IpAddr,
    /// UDP port.
    pub port: u16,
}

/// Which checksums the hardware has verified and found right. Software verifies the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardwareChecks {
    /// The IPv4 header checksum is right.
    pub ip_good: bool,
    /// The UDP checksum is right.
    pub udp_good: bool,
}

/// A frame for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Someone asks for our MAC address.
    ArpRequest {
        /// Who asks: MAC address.
        sender_mac: [u8; 6],
        /// Who asks: IPv4 address.
        sender_ip: Ipv4Addr,
    },
    /// Someone told us its MAC address.
    ArpReply {
        /// MAC address of `sender_ip`.
        sender_mac: [u8; 6],
        /// IPv4 address of the sender.
        sender_ip: Ipv4Addr,
    },
    /// A datagram for one of our ports.
    Datagram {
        /// Where it came from.
        from: Peer,
        /// Which of our ports it is for.
        to_port: u16,
        /// Where in the frame its payload lies.
        payload: Range<usize>,
    },
}

/// Reads a received frame. Whatever is not for `local`, or not intact, is dropped under its reason.
#[inline]
pub fn parse(frame: &[u8], local: &Local, hardware: HardwareChecks) -> Result<Incoming, DropReason> {
    let header = Ethernet::new_checked(frame)?;
    let packet = &frame[header.header_bytes..];
    if header.ethertype == EtherType::Arp {
        return parse_arp(&header, packet, local);
    }
    if header.destination != local.mac {
        return Err(DropReason::ForeignMac);
    }
    let (source, ip_bytes, total_bytes, addresses) = match header.ethertype {
        EtherType::Ipv4 => {
            let ip = ipv4::Ipv4::new_checked(packet, hardware.ip_good)?;
            if IpAddr::V4(ip.destination) != local.ip {
                return Err(DropReason::ForeignIp);
            }
            (IpAddr::V4(ip.source), ipv4::HEADER_BYTES, ip.total_bytes, &packet[12..20])
        }
        EtherType::Ipv6 => {
            let ip = ipv6::Ipv6::new_checked(packet)?;
            if IpAddr::V6(ip.destination) != local.ip {
                return Err(DropReason::ForeignIp);
            }
            (IpAddr::V6(ip.source), ipv6::HEADER_BYTES, ip.total_bytes, &packet[8..40])
        }
        EtherType::Arp => return Err(DropReason::ForeignEthertype),
    };
    let zero_allowed = header.ethertype == EtherType::Ipv4;
    let check = if hardware.udp_good {
        udp::Check::Verified { zero_allowed }
    } else {
        let udp_bytes = u16::try_from(total_bytes - ip_bytes).map_err(|_| DropReason::BadIpLength)?;
        udp::Check::Required { pseudo: pseudo_header(addresses, udp::PROTOCOL, udp_bytes), zero_allowed }
    };
    let ports = udp::Udp::new_checked(&packet[ip_bytes..total_bytes], check)?;
    if !local.owns_port(ports.destination) {
        return Err(DropReason::ForeignPort);
    }
    let first = header.header_bytes + ip_bytes + udp::HEADER_BYTES;
    Ok(Incoming::Datagram {
        from: Peer { mac: header.source, ip: source, port: ports.source },
        to_port: ports.destination,
        payload: first..header.header_bytes + total_bytes,
    })
}

fn parse_arp(header: &Ethernet, packet: &[u8], local: &Local) -> Result<Incoming, DropReason> {
    if header.destination != local.mac && header.destination != ethernet::BROADCAST {
        return Err(DropReason::ForeignMac);
    }
    let arp = arp::Arp::new_checked(packet)?;
    if IpAddr::V4(arp.target_ip) != local.ip {
        return Err(DropReason::ForeignIp);
    }
    let (sender_mac, sender_ip) = (arp.sender_mac, arp.sender_ip);
    Ok(match arp.operation {
        arp::Operation::Request => Incoming::ArpRequest { sender_mac, sender_ip },
        arp::Operation::Reply => Incoming::ArpReply { sender_mac, sender_ip },
    })
}

/// Bytes before the payload of a datagram to or from `ip`.
#[inline]
pub const fn header_bytes(ip: &IpAddr) -> usize {
    match ip {
        IpAddr::V4(_) => IPV4_HEADER_BYTES,
        IpAddr::V6(_) => IPV6_HEADER_BYTES,
    }
}

/// The largest segment, a multiple of 32 bytes, whose DATA message fits one packet of `mtu_bytes` (the IP packet,
/// without Ethernet's header). Zero if none fits.
pub fn max_segment_bytes(mtu_bytes: u16, ip: &IpAddr) -> u16 {
    let overhead = header_bytes(ip) - ethernet::HEADER_BYTES + crate::wire::message::DATA_HEADER_BYTES;
    let room = usize::from(mtu_bytes).saturating_sub(overhead);
    u16::try_from(room / 32 * 32).unwrap_or(0)
}

/// Who computes the checksums of a sent datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxChecksum {
    /// We do, over the payload in `buf`.
    Software,
    /// The hardware does: the UDP field gets the pseudo header's sum, the IPv4 field zero, as DPDK asks for.
    Hardware,
    /// Nobody: IPv4 only, where zero means "no checksum". The IPv4 header checksum is computed.
    Absent,
}

/// Why a frame could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EmitError {
    /// The buffer is too short for the headers, or for the payload that must be summed.
    #[error("the packet buffer is too short for the headers and payload; use larger mbufs or a smaller MTU")]
    ShortBuffer,
    /// The payload does not fit a UDP datagram.
    #[error("a payload of {0} bytes does not fit a UDP datagram; lower the segment size")]
    TooLong(usize),
    /// One end is IPv4 and the other IPv6.
    #[error("the local address and the peer's are of different IP versions; use one version on a port")]
    MixedIpVersions,
    /// IPv6 needs a checksum.
    #[error("IPv6 datagrams need a UDP checksum; choose software or hardware checksums")]
    ChecksumNeeded,
}

/// Writes the headers of a datagram into the first [`header_bytes`] of `buf` and returns the frame's length.
///
/// The payload of `payload_bytes` follows the headers; for [`TxChecksum::Software`] it must already be there, otherwise
/// it may live elsewhere (a chained buffer). Nothing is padded to Ethernet's minimum: drivers do that.
#[inline]
pub fn emit_udp(
    buf: &mut [u8],
    local: &Local,
    source_port: u16,
    to: &Peer,
    payload_bytes: usize,
    checksum: TxChecksum,
) -> Result<usize, EmitError> {
    let ip_bytes = header_bytes(&local.ip) - ethernet::HEADER_BYTES;
    let too_long = |_| EmitError::TooLong(payload_bytes);
    let udp_bytes = u16::try_from(payload_bytes.saturating_add(udp::HEADER_BYTES)).map_err(too_long)?;
    let total_bytes = u16::try_from(payload_bytes.saturating_add(ip_bytes)).map_err(too_long)?;
    let (link, rest) = buf.split_first_chunk_mut().ok_or(EmitError::ShortBuffer)?;
    let (pseudo, rest) = match (local.ip, to.ip) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let (header, rest) = rest.split_first_chunk_mut().ok_or(EmitError::ShortBuffer)?;
            ethernet::emit(link, to.mac, local.mac, EtherType::Ipv4);
            ipv4::emit(header, source, destination, total_bytes, checksum != TxChecksum::Hardware);
            (pseudo_header(&header[12..20], udp::PROTOCOL, udp_bytes), rest)
        }
        (IpAddr::V6(_), IpAddr::V6(_)) if checksum == TxChecksum::Absent => {
            return Err(EmitError::ChecksumNeeded);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let (header, rest) = rest.split_first_chunk_mut().ok_or(EmitError::ShortBuffer)?;
            ethernet::emit(link, to.mac, local.mac, EtherType::Ipv6);
            ipv6::emit(header, source, destination, udp_bytes);
            (pseudo_header(&header[8..40], udp::PROTOCOL, udp_bytes), rest)
        }
        _ => return Err(EmitError::MixedIpVersions),
    };
    let udp_header = rest.first_chunk_mut().ok_or(EmitError::ShortBuffer)?;
    udp::emit(udp_header, source_port, to.port, udp_bytes);
    let field = match checksum {
        TxChecksum::Software => udp_checksum(pseudo, rest, usize::from(udp_bytes))?,
        TxChecksum::Hardware => pseudo.folded(),
        TxChecksum::Absent => 0,
    };
    rest[6..8].copy_from_slice(&field.to_be_bytes());
    Ok(header_bytes(&local.ip) + payload_bytes)
}

/// The checksum of a datagram whose field is still zero; a sum of zero is sent as all ones (RFC 768).
fn udp_checksum(pseudo: Sum, datagram: &[u8], udp_bytes: usize) -> Result<u16, EmitError> {
    let datagram = datagram.get(..udp_bytes).ok_or(EmitError::ShortBuffer)?;
    let checksum = pseudo.with(datagram).checksum();
    Ok(if checksum == 0 { 0xffff } else { checksum })
}
