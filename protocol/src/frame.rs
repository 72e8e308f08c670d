//! From an Ethernet frame to a datagram for one of our ports, and back.

use std::net::{IpAddr, Ipv6Addr};
use std::ops::Range;

use crate::reason::DropReason;
use crate::wire::checksum::{Sum, pseudo_header};
use crate::wire::ethernet::{self, EtherType, Ethernet};
use crate::wire::icmp::PathError;
use crate::wire::{Ecn, arp, icmp, icmpv6, ipv4, ipv6, udp};

/// Bytes before a datagram's payload when sent over IPv4: Ethernet without a tag, IP, UDP.
pub const IPV4_HEADER_BYTES: usize = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES + udp::HEADER_BYTES;
/// Bytes before a datagram's payload when sent over IPv6: Ethernet without a tag, IP, UDP.
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
    /// Our VLAN: frames are sent with its tag, and taken with no other. Without one, tagged frames are not ours.
    pub vlan: Option<u16>,
}

impl Local {
    /// Whether `port` is one of ours.
    #[inline]
    pub fn owns_port(&self, port: u16) -> bool {
        port.wrapping_sub(self.first_port) < self.ports
    }

    /// Bytes of the Ethernet header of what we send.
    #[inline]
    pub const fn link_bytes(&self) -> usize {
        ethernet::header_bytes(self.vlan)
    }

    /// Bytes before the payload of a datagram that we send.
    #[inline]
    pub const fn header_bytes(&self) -> usize {
        header_bytes(&self.ip) - ethernet::HEADER_BYTES + self.link_bytes()
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
    /// Someone asks for our MAC address, by ARP or neighbour discovery.
    NeighbourRequest {
        /// Who asks: MAC address.
        sender_mac: [u8; 6],
        /// Who asks: IP address; unspecified if it does not have one yet (IPv6 only).
        sender_ip: IpAddr,
    },
    /// Someone told us a MAC address, by ARP or neighbour discovery.
    NeighbourReply {
        /// The MAC address.
        mac: [u8; 6],
        /// Whose.
        ip: IpAddr,
        /// Whether that replaces another MAC address that was known.
        overrides: bool,
    },
    /// A packet that we sent did not arrive, an ICMP message says. Whoever sees our packets can forge one: a hint.
    PathError(PathError),
    /// A datagram for one of our ports.
    Datagram {
        /// Where it came from.
        from: Peer,
        /// Which of our ports it is for.
        to_port: u16,
        /// Whether a router marked it as having met congestion (ECN).
        marked: bool,
        /// Where in the frame its payload lies.
        payload: Range<usize>,
    },
}

/// Reads a received frame. Whatever is not for `local`, or not intact, is dropped under its reason.
#[inline]
pub fn parse(frame: &[u8], local: &Local, hardware: HardwareChecks) -> Result<Incoming, DropReason> {
    parse_chain(frame, std::iter::empty(), frame.len(), local, hardware)
}

/// The same of a frame of `frame_bytes` in several buffers: `first` has all headers, and `rest` is only read to sum the payload.
#[inline]
pub fn parse_chain<'a>(
    first: &'a [u8],
    rest: impl Iterator<Item = &'a [u8]>,
    frame_bytes: usize,
    local: &Local,
    hardware: HardwareChecks,
) -> Result<Incoming, DropReason> {
    let header = Ethernet::new_checked(first)?;
    if header.vlan != local.vlan {
        return Err(DropReason::ForeignVlan);
    }
    let packet = &first[header.header_bytes..];
    let packet_bytes = frame_bytes - header.header_bytes;
    if header.ethertype == EtherType::Arp {
        return parse_arp(&header, packet, local);
    }
    if header.destination != local.mac {
        return parse_group(&header, packet, local);
    }
    let (source, protocol, ecn, ip_bytes, total_bytes, addresses) = match header.ethertype {
        EtherType::Ipv4 => {
            let ip = ipv4::Ipv4::new_checked(packet, packet_bytes, hardware.ip_good)?;
            if IpAddr::V4(ip.destination) != local.ip {
                return Err(DropReason::ForeignIp);
            }
            let addresses = &packet[12..20];
            (IpAddr::V4(ip.source), ip.protocol, ip.ecn, ipv4::HEADER_BYTES, ip.total_bytes, addresses)
        }
        EtherType::Ipv6 => {
            let ip = ipv6::Ipv6::new_checked(packet, packet_bytes)?;
            if IpAddr::V6(ip.destination) != local.ip {
                return Err(DropReason::ForeignIp);
            }
            if ip.protocol == icmpv6::PROTOCOL {
                return parse_icmpv6(&header, &ip, packet, local);
            }
            let addresses = &packet[8..40];
            (IpAddr::V6(ip.source), ip.protocol, ip.ecn, ipv6::HEADER_BYTES, ip.total_bytes, addresses)
        }
        EtherType::Arp => return Err(DropReason::ForeignEthertype),
    };
    if protocol != udp::PROTOCOL {
        let message = packet.get(ip_bytes..total_bytes).ok_or(DropReason::BadLength)?;
        return our_error(icmp::read_error(message)?, local);
    }
    let zero_allowed = header.ethertype == EtherType::Ipv4;
    let udp_bytes = total_bytes - ip_bytes;
    let check = if hardware.udp_good {
        udp::Check::Verified { zero_allowed }
    } else {
        let udp_bytes = u16::try_from(udp_bytes).map_err(|_| DropReason::BadIpLength)?;
        udp::Check::Required { pseudo: pseudo_header(addresses, udp::PROTOCOL, udp_bytes), zero_allowed }
    };
    let datagram = &packet[ip_bytes..total_bytes.min(packet.len()).max(ip_bytes)];
    let rest = cut(rest, udp_bytes.saturating_sub(datagram.len()));
    let ports = udp::Udp::new_checked(datagram, rest, udp_bytes, check)?;
    if !local.owns_port(ports.destination) {
        return Err(DropReason::ForeignPort);
    }
    let begin = header.header_bytes + ip_bytes + udp::HEADER_BYTES;
    Ok(Incoming::Datagram {
        from: Peer { mac: header.source, ip: source, port: ports.source },
        to_port: ports.destination,
        marked: ecn == Ecn::CongestionExperienced,
        payload: begin..header.header_bytes + total_bytes,
    })
}

/// The first `bytes` of `parts`.
#[inline]
fn cut<'a>(parts: impl Iterator<Item = &'a [u8]>, mut bytes: usize) -> impl Iterator<Item = &'a [u8]> {
    parts.map_while(move |part| {
        // A buffer without a byte of the frame is not its end.
        let part = (bytes > 0).then(|| &part[..part.len().min(bytes)])?;
        bytes -= part.len();
        Some(part)
    })
}

#[cold]
fn parse_arp(header: &Ethernet, packet: &[u8], local: &Local) -> Result<Incoming, DropReason> {
    if header.destination != local.mac && header.destination != ethernet::BROADCAST {
        return Err(DropReason::ForeignMac);
    }
    let arp = arp::Arp::new_checked(packet)?;
    if IpAddr::V4(arp.target_ip) != local.ip {
        return Err(DropReason::ForeignIp);
    }
    let (mac, ip) = (arp.sender_mac, IpAddr::V4(arp.sender_ip));
    Ok(match arp.operation {
        arp::Operation::Request => Incoming::NeighbourRequest { sender_mac: mac, sender_ip: ip },
        arp::Operation::Reply => Incoming::NeighbourReply { mac, ip, overrides: true },
    })
}

/// A frame to another MAC address than ours: neighbour discovery speaks to groups.
#[cold]
fn parse_group(header: &Ethernet, packet: &[u8], local: &Local) -> Result<Incoming, DropReason> {
    let (EtherType::Ipv6, IpAddr::V6(own)) = (header.ethertype, local.ip) else {
        return Err(DropReason::ForeignMac);
    };
    let is_of = |group: &Ipv6Addr| ethernet::multicast_mac(*group) == header.destination;
    let groups = [icmpv6::solicited_node(own), icmpv6::ALL_NODES];
    let Some(group) = groups.into_iter().find(is_of) else { return Err(DropReason::ForeignMac) };
    let ip = ipv6::Ipv6::new_checked(packet, packet.len())?;
    if ip.destination != group {
        return Err(DropReason::ForeignIp);
    }
    if ip.protocol != icmpv6::PROTOCOL {
        return Err(DropReason::ForeignProtocol);
    }
    match parse_icmpv6(header, &ip, packet, local)? {
        Incoming::PathError(_) => Err(DropReason::BadIcmp),
        neighbour => Ok(neighbour),
    }
}

#[cold]
fn parse_icmpv6(
    header: &Ethernet,
    ip: &ipv6::Ipv6,
    packet: &[u8],
    local: &Local,
) -> Result<Incoming, DropReason> {
    let message = packet.get(ipv6::HEADER_BYTES..ip.total_bytes).ok_or(DropReason::BadLength)?;
    let from_source = |mac: Option<[u8; 6]>| {
        mac.or(Some(header.source)).filter(|&mac| ethernet::is_unicast(mac)).ok_or(DropReason::BadIcmp)
    };
    match icmpv6::read(ip, &packet[8..40], message)? {
        icmpv6::Message::Solicitation { target, sender_mac } => {
            if IpAddr::V6(target) != local.ip {
                return Err(DropReason::ForeignIp);
            }
            let sender_mac = from_source(sender_mac)?;
            Ok(Incoming::NeighbourRequest { sender_mac, sender_ip: IpAddr::V6(ip.source) })
        }
        icmpv6::Message::Advertisement { target, mac, overrides } => {
            Ok(Incoming::NeighbourReply { mac: from_source(mac)?, ip: IpAddr::V6(target), overrides })
        }
        icmpv6::Message::Error(error) => our_error(error, local),
    }
}

/// An error that quotes a packet which we cannot have sent is none of ours.
fn our_error(error: PathError, local: &Local) -> Result<Incoming, DropReason> {
    let (ip, port) = error.from;
    if ip != local.ip || !local.owns_port(port) {
        return Err(DropReason::ForeignIcmp);
    }
    Ok(Incoming::PathError(error))
}

/// Bytes before the payload of a datagram to or from `ip`, without a VLAN tag.
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

/// A datagram to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing<'a> {
    /// Which of our UDP ports it comes from.
    pub source_port: u16,
    /// Whom it goes to.
    pub to: Peer,
    /// Bytes of payload, `attached` included.
    pub payload_bytes: usize,
    /// The payload's end, where it lies in another buffer; empty where it does not.
    pub attached: &'a [u8],
    /// Who computes the checksums.
    pub checksum: TxChecksum,
    /// What to say of congestion: that marks are answered, or not.
    pub ecn: Ecn,
}

/// Writes the headers of a datagram into the first [`Local::header_bytes`] of `buf` and returns the frame's length.
///
/// The payload follows the headers; for [`TxChecksum::Software`] it must already be there, or attached. Nothing is padded to
/// Ethernet's minimum: drivers do that.
#[inline]
pub fn emit_udp(buf: &mut [u8], local: &Local, datagram: &Outgoing<'_>) -> Result<usize, EmitError> {
    let Outgoing { source_port, to, payload_bytes, attached, checksum, ecn } = *datagram;
    let ip_bytes = header_bytes(&local.ip) - ethernet::HEADER_BYTES;
    let too_long = |_| EmitError::TooLong(payload_bytes);
    let udp_bytes = u16::try_from(payload_bytes.saturating_add(udp::HEADER_BYTES)).map_err(too_long)?;
    let total_bytes = u16::try_from(payload_bytes.saturating_add(ip_bytes)).map_err(too_long)?;
    let version = if local.ip.is_ipv4() { EtherType::Ipv4 } else { EtherType::Ipv6 };
    let rest = ethernet::emit(buf, to.mac, local.mac, local.vlan, version).ok_or(EmitError::ShortBuffer)?;
    let (pseudo, rest) = match (local.ip, to.ip) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let (header, rest) = rest.split_first_chunk_mut().ok_or(EmitError::ShortBuffer)?;
            ipv4::emit(header, source, destination, total_bytes, ecn, checksum != TxChecksum::Hardware);
            (pseudo_header(&header[12..20], udp::PROTOCOL, udp_bytes), rest)
        }
        (IpAddr::V6(_), IpAddr::V6(_)) if checksum == TxChecksum::Absent => {
            return Err(EmitError::ChecksumNeeded);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let (header, rest) = rest.split_first_chunk_mut().ok_or(EmitError::ShortBuffer)?;
            ipv6::emit(header, source, destination, udp_bytes, ecn);
            (pseudo_header(&header[8..40], udp::PROTOCOL, udp_bytes), rest)
        }
        _ => return Err(EmitError::MixedIpVersions),
    };
    let udp_header = rest.first_chunk_mut().ok_or(EmitError::ShortBuffer)?;
    udp::emit(udp_header, source_port, to.port, udp_bytes);
    let field = match checksum {
        TxChecksum::Software => udp_checksum(pseudo, rest, attached, usize::from(udp_bytes))?,
        TxChecksum::Hardware => pseudo.folded(),
        TxChecksum::Absent => 0,
    };
    rest[6..8].copy_from_slice(&field.to_be_bytes());
    Ok(local.header_bytes() + payload_bytes)
}

/// The checksum of a datagram whose field is still zero; a sum of zero is sent as all ones (RFC 768).
fn udp_checksum(pseudo: Sum, datagram: &[u8], attached: &[u8], udp_bytes: usize) -> Result<u16, EmitError> {
    let here = udp_bytes.checked_sub(attached.len()).ok_or(EmitError::ShortBuffer)?;
    let datagram = datagram.get(..here).ok_or(EmitError::ShortBuffer)?;
    let checksum = pseudo.with_parts(datagram, std::iter::once(attached)).checksum();
    Ok(if checksum == 0 { 0xffff } else { checksum })
}
