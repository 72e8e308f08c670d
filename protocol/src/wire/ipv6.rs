//! IPv6 headers directly followed by UDP or ICMPv6; packets with extension headers are refused.

use std::net::Ipv6Addr;

use super::{Ecn, be16, icmpv6, take, udp};
use crate::reason::DropReason;

/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 40;

/// A checked header and where its payload ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6 {
    /// Source address: not multicast, and unspecified in ICMPv6 only.
    pub source: Ipv6Addr,
    /// Destination address.
    pub destination: Ipv6Addr,
    /// What follows the header: [`udp::PROTOCOL`] or [`icmpv6::PROTOCOL`].
    pub protocol: u8,
    /// Hops that are left: 255 of a packet from our own network.
    pub hop_limit: u8,
    /// What the network said of congestion.
    pub ecn: Ecn,
    /// Header and payload in bytes, at most what the frame holds; behind it is padding.
    pub total_bytes: usize,
}

impl Ipv6 {
    /// Reads the header of an IPv6 packet that carries UDP or ICMPv6. `packet_bytes` is what the frame holds, of which
    /// `packet` may be only the beginning.
    #[inline]
    pub fn new_checked(packet: &[u8], packet_bytes: usize) -> Result<Ipv6, DropReason> {
        if packet.len() < HEADER_BYTES {
            return Err(DropReason::Truncated);
        }
        let header: [u8; HEADER_BYTES] = take(packet, 0);
        if header[0] >> 4 != 6 {
            return Err(DropReason::BadIpVersion);
        }
        let total_bytes = HEADER_BYTES + usize::from(be16(&header, 4));
        if total_bytes > packet_bytes {
            return Err(DropReason::BadIpLength);
        }
        const FRAGMENT_HEADER: u8 = 44;
        match header[6] {
            udp::PROTOCOL | icmpv6::PROTOCOL => {}
            FRAGMENT_HEADER => return Err(DropReason::Fragment),
            _ => return Err(DropReason::ForeignProtocol),
        }
        let source = Ipv6Addr::from(take::<16>(&header, 8));
        if source.is_multicast() || (source.is_unspecified() && header[6] == udp::PROTOCOL) {
            return Err(DropReason::ForeignIp);
        }
        Ok(Ipv6 {
            source,
            destination: Ipv6Addr::from(take::<16>(&header, 24)),
            protocol: header[6],
            hop_limit: header[7],
            ecn: Ecn::from_bits(header[1] >> 4),
            total_bytes,
        })
    }
}

/// Writes the header of a UDP packet: hop limit 64, DSCP and flow label zero.
#[inline]
pub fn emit(
    out: &mut [u8; HEADER_BYTES],
    source: Ipv6Addr,
    destination: Ipv6Addr,
    payload_bytes: u16,
    ecn: Ecn,
) {
    *out = [0; HEADER_BYTES];
    out[0] = 0x60;
    out[1] = (ecn as u8) << 4;
    out[4..6].copy_from_slice(&payload_bytes.to_be_bytes());
    out[6] = udp::PROTOCOL;
    out[7] = 64;
    out[8..24].copy_from_slice(&source.octets());
    out[24..40].copy_from_slice(&destination.octets());
}
