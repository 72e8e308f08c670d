//! IPv4 headers without options; fragments are refused, so nothing is ever reassembled.

use std::net::Ipv4Addr;

use super::checksum::Sum;
use super::{Ecn, be16, take, udp};
use crate::reason::DropReason;

/// Bytes of a header without options.
pub const HEADER_BYTES: usize = 20;

/// A checked header and where its payload ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    /// Source address: neither multicast, broadcast nor unspecified.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
    /// What follows the header: [`udp::PROTOCOL`] or [`super::icmp::PROTOCOL`].
    pub protocol: u8,
    /// What the network said of congestion.
    pub ecn: Ecn,
    /// Header and payload in bytes, at least 20 and at most what the frame holds; behind it is padding.
    pub total_bytes: usize,
}

impl Ipv4 {
    /// Reads the header of an IPv4 packet that carries UDP or ICMP. `packet_bytes` is what the frame holds, of which `packet` may be
    /// only the beginning; `checksum_verified` says that the hardware has found the header checksum right.
    #[inline]
    pub fn new_checked(
        packet: &[u8],
        packet_bytes: usize,
        checksum_verified: bool,
    ) -> Result<Ipv4, DropReason> {
        if packet.len() < HEADER_BYTES {
            return Err(DropReason::Truncated);
        }
        let header: [u8; HEADER_BYTES] = take(packet, 0);
        if header[0] >> 4 != 4 {
            return Err(DropReason::BadIpVersion);
        }
        if header[0] & 0x0f != 5 {
            return Err(DropReason::IpOptions);
        }
        if !checksum_verified && Sum::default().with(&header).checksum() != 0 {
            return Err(DropReason::BadIpChecksum);
        }
        let total_bytes = usize::from(be16(&header, 2));
        if total_bytes < HEADER_BYTES || total_bytes > packet_bytes {
            return Err(DropReason::BadIpLength);
        }
        // More-fragments flag or a fragment offset; the don't-fragment flag is the sender's business.
        if be16(&header, 6) & 0x3fff != 0 {
            return Err(DropReason::Fragment);
        }
        if !matches!(header[9], udp::PROTOCOL | super::icmp::PROTOCOL) {
            return Err(DropReason::ForeignProtocol);
        }
        let source = Ipv4Addr::from(take::<4>(&header, 12));
        if source.is_multicast() || source.is_broadcast() || source.is_unspecified() {
            return Err(DropReason::ForeignIp);
        }
        let destination = Ipv4Addr::from(take::<4>(&header, 16));
        Ok(Ipv4 { source, destination, protocol: header[9], ecn: Ecn::from_bits(header[1]), total_bytes })
    }
}

/// Writes the header of a UDP packet: time to live 64, don't fragment, identification 0 (RFC 6864), DSCP 0.
/// With `checksum` false the field stays zero for the hardware to fill.
#[inline]
pub fn emit(
    out: &mut [u8; HEADER_BYTES],
    source: Ipv4Addr,
    destination: Ipv4Addr,
    total_bytes: u16,
    ecn: Ecn,
    checksum: bool,
) {
    *out = [0; HEADER_BYTES];
    // Words, not bytes: the checksum reads words at once, and a word that was just written as two bytes would hold it up.
    out[..2].copy_from_slice(&(0x4500 | u16::from(ecn as u8)).to_be_bytes());
    out[2..4].copy_from_slice(&total_bytes.to_be_bytes());
    out[6..8].copy_from_slice(&0x4000_u16.to_be_bytes());
    out[8..10].copy_from_slice(&[64, udp::PROTOCOL]);
    out[12..16].copy_from_slice(&source.octets());
    out[16..20].copy_from_slice(&destination.octets());
    if checksum {
        let sum = Sum::default().with(out).checksum();
        out[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}
