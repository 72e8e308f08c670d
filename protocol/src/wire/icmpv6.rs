//! ICMPv6: errors about our packets (RFC 4443) and neighbour discovery (RFC 4861), which is ARP's place in IPv6.

use std::net::{IpAddr, Ipv6Addr};

use super::checksum::pseudo_header;
use super::icmp::{Cause, PathError, Quote};
use super::{be16, be32, ethernet, ipv6, take, udp};
use crate::reason::DropReason;

/// IP protocol number.
pub const PROTOCOL: u8 = 58;
/// Bytes of a neighbour solicitation or advertisement as it is sent, with one option.
pub const NEIGHBOUR_BYTES: usize = 32;
/// Bytes of an untagged frame with one of them.
pub const FRAME_BYTES: usize = ethernet::HEADER_BYTES + ipv6::HEADER_BYTES + NEIGHBOUR_BYTES;
/// What a packet must still have as its hop limit to be from our own network.
const ON_LINK_HOPS: u8 = 255;

const DESTINATION_UNREACHABLE: u8 = 1;
const PACKET_TOO_BIG: u8 = 2;
const PORT_UNREACHABLE: u8 = 4;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const SOURCE_ADDRESS_OPTION: u8 = 1;
const TARGET_ADDRESS_OPTION: u8 = 2;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// The group that a host with this address listens to (RFC 4291 section 2.7.1).
pub fn solicited_node(ip: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = ip.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

/// All hosts of the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// A checked message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Who has `target`?
    Solicitation {
        /// The address asked for.
        target: Ipv6Addr,
        /// The asker's MAC address; `None` from one that does not have its address yet.
        sender_mac: Option<[u8; 6]>,
    },
    /// `target` is at `mac`.
    Advertisement {
        /// The address told of.
        target: Ipv6Addr,
        /// Its MAC address, if told.
        mac: Option<[u8; 6]>,
        /// Whether that replaces what was known.
        overrides: bool,
    },
    /// One of somebody's packets did not arrive.
    Error(PathError),
}

/// Reads a message, the payload of the IP packet with this header.
pub fn read(header: &ipv6::Ipv6, addresses: &[u8], message: &[u8]) -> Result<Message, DropReason> {
    let bytes = u16::try_from(message.len()).map_err(|_| DropReason::BadIcmp)?;
    if message.len() < 8 || pseudo_header(addresses, PROTOCOL, bytes).with(message).checksum() != 0 {
        return Err(DropReason::BadIcmp);
    }
    match (message[0], message[1]) {
        (DESTINATION_UNREACHABLE, PORT_UNREACHABLE) => read_error(Cause::PortUnreachable, message),
        (DESTINATION_UNREACHABLE, _) => read_error(Cause::Unreachable, message),
        (PACKET_TOO_BIG, _) => read_error(Cause::TooBig { mtu_bytes: be32(message, 4) }, message),
        (SOLICITATION, 0) => read_solicitation(header, message),
        (ADVERTISEMENT, 0) => read_advertisement(header, message),
        (SOLICITATION | ADVERTISEMENT, _) => Err(DropReason::BadIcmp),
        _ => Err(DropReason::ForeignIcmp),
    }
}

fn read_error(cause: Cause, message: &[u8]) -> Result<Message, DropReason> {
    let quote = &message[8..];
    let Some((header, datagram)) = quote.split_first_chunk::<{ ipv6::HEADER_BYTES }>() else {
        return Err(DropReason::BadIcmp);
    };
    let Some(ports) = datagram.first_chunk::<4>() else { return Err(DropReason::BadIcmp) };
    // Our own packets have no extension headers.
    if header[0] >> 4 != 6 || header[6] != udp::PROTOCOL {
        return Err(DropReason::ForeignIcmp);
    }
    let ip = |at| IpAddr::V6(Ipv6Addr::from(take::<16>(header, at)));
    let quote = Quote::new(datagram.get(udp::HEADER_BYTES..).unwrap_or_default());
    let (from, to) = ((ip(8), be16(ports, 0)), (ip(24), be16(ports, 2)));
    Ok(Message::Error(PathError { cause, from, to, quote }))
}

/// RFC 4861 section 7.1.1.
fn read_solicitation(header: &ipv6::Ipv6, message: &[u8]) -> Result<Message, DropReason> {
    let (target, sender_mac) = read_neighbour(header, message, SOURCE_ADDRESS_OPTION)?;
    let has_no_address = header.source.is_unspecified();
    if has_no_address && (sender_mac.is_some() || header.destination != solicited_node(target)) {
        return Err(DropReason::BadIcmp);
    }
    Ok(Message::Solicitation { target, sender_mac })
}

/// RFC 4861 section 7.1.2.
fn read_advertisement(header: &ipv6::Ipv6, message: &[u8]) -> Result<Message, DropReason> {
    let (target, mac) = read_neighbour(header, message, TARGET_ADDRESS_OPTION)?;
    let is_solicited = message[4] & SOLICITED != 0;
    if header.source.is_unspecified() || (header.destination.is_multicast() && is_solicited) {
        return Err(DropReason::BadIcmp);
    }
    Ok(Message::Advertisement { target, mac, overrides: message[4] & OVERRIDE != 0 })
}

/// Target and MAC address of a solicitation or advertisement.
fn read_neighbour(
    header: &ipv6::Ipv6,
    message: &[u8],
    wanted: u8,
) -> Result<(Ipv6Addr, Option<[u8; 6]>), DropReason> {
    if header.hop_limit != ON_LINK_HOPS || message.len() < 24 {
        return Err(DropReason::BadIcmp);
    }
    let target = Ipv6Addr::from(take::<16>(message, 8));
    if target.is_multicast() || target.is_unspecified() {
        return Err(DropReason::BadIcmp);
    }
    let (mut options, mut mac) = (&message[24..], None);
    while !options.is_empty() {
        // Lengths are in units of 8 bytes; none is zero.
        let bytes = options.get(1).map_or(0, |&units| usize::from(units) * 8);
        if bytes == 0 || bytes > options.len() {
            return Err(DropReason::BadIcmp);
        }
        if options[0] == wanted && bytes == 8 {
            mac = Some(take::<6>(options, 2)).filter(|&mac| ethernet::is_unicast(mac));
            if mac.is_none() {
                return Err(DropReason::BadIcmp);
            }
        }
        options = &options[bytes..];
    }
    Ok((target, mac))
}

/// Who we are in a solicitation or advertisement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Our MAC address.
    pub mac: [u8; 6],
    /// Our address.
    pub ip: Ipv6Addr,
    /// Our VLAN.
    pub vlan: Option<u16>,
}

/// Writes a frame that asks all hosts that may have `target` for its MAC address; returns its length, or `None` if `out` is
/// too short.
pub fn emit_solicitation(out: &mut [u8], sender: &Sender, target: Ipv6Addr) -> Option<usize> {
    let group = solicited_node(target);
    let destination = (ethernet::multicast_mac(group), group);
    emit(out, sender, destination, SOLICITATION, 0, target, SOURCE_ADDRESS_OPTION)
}

/// Writes a frame that tells `to` our MAC address, or everybody, if the asker has no address yet; returns its length, or
/// `None` if `out` is too short.
pub fn emit_advertisement(out: &mut [u8], sender: &Sender, to: ([u8; 6], Ipv6Addr)) -> Option<usize> {
    let (destination, flags) = match to.1.is_unspecified() {
        true => ((ethernet::multicast_mac(ALL_NODES), ALL_NODES), OVERRIDE),
        false => (to, SOLICITED | OVERRIDE),
    };
    emit(out, sender, destination, ADVERTISEMENT, flags, sender.ip, TARGET_ADDRESS_OPTION)
}

fn emit(
    out: &mut [u8],
    sender: &Sender,
    (mac, ip): ([u8; 6], Ipv6Addr),
    kind: u8,
    flags: u8,
    target: Ipv6Addr,
    option: u8,
) -> Option<usize> {
    let bytes = FRAME_BYTES - ethernet::HEADER_BYTES + ethernet::header_bytes(sender.vlan);
    let out = out.get_mut(..bytes)?;
    let packet = ethernet::emit(out, mac, sender.mac, sender.vlan, ethernet::EtherType::Ipv6)?;
    let (header, message) = packet.split_first_chunk_mut::<{ ipv6::HEADER_BYTES }>()?;
    let message_bytes = u16::try_from(NEIGHBOUR_BYTES).ok()?;
    ipv6::emit(header, sender.ip, ip, message_bytes, super::Ecn::NotCapable);
    (header[6], header[7]) = (PROTOCOL, ON_LINK_HOPS);
    message.fill(0);
    (message[0], message[4]) = (kind, flags);
    message[8..24].copy_from_slice(&target.octets());
    (message[24], message[25]) = (option, 1);
    message[26..32].copy_from_slice(&sender.mac);
    let sum = pseudo_header(&header[8..40], PROTOCOL, message_bytes).with(message).checksum();
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    Some(bytes)
}
