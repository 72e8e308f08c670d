//! Ethernet II, with or without one 802.1Q tag.

use std::net::Ipv6Addr;

use super::{be16, take};
use crate::reason::DropReason;

/// Bytes of an untagged header.
pub const HEADER_BYTES: usize = 14;
/// Bytes that an 802.1Q tag adds.
pub const TAG_BYTES: usize = 4;
/// Smallest frame on the wire, without its check sequence; shorter ones are padded by the sender.
pub const MIN_FRAME_BYTES: usize = 60;
/// Every station.
pub const BROADCAST: [u8; 6] = [0xff; 6];
/// Highest VLAN there is.
pub const MAX_VLAN: u16 = 4094;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum EtherType {
    /// IPv4.
    Ipv4 = 0x0800,
    /// ARP.
    Arp = 0x0806,
    /// IPv6.
    Ipv6 = 0x86dd,
}

const TAG: u16 = 0x8100;

/// A checked frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// Destination address.
    pub destination: [u8; 6],
    /// Source address.
    pub source: [u8; 6],
    /// The VLAN of the frame's tag; a tag of VLAN 0 is a priority and no VLAN (IEEE 802.1Q section 6.9.1).
    pub vlan: Option<u16>,
    /// What follows.
    pub ethertype: EtherType,
    /// Bytes of this header, a tag included.
    pub header_bytes: usize,
}

impl Ethernet {
    /// Reads the header of `frame`.
    #[inline]
    pub fn new_checked(frame: &[u8]) -> Result<Ethernet, DropReason> {
        if frame.len() < HEADER_BYTES {
            return Err(DropReason::Truncated);
        }
        let mut header_bytes = HEADER_BYTES;
        let mut number = be16(frame, 12);
        let mut vlan = None;
        if number == TAG {
            header_bytes += TAG_BYTES;
            if frame.len() < header_bytes {
                return Err(DropReason::Truncated);
            }
            vlan = Some(be16(frame, 14) & 0x0fff).filter(|&vlan| vlan != 0);
            number = be16(frame, 16);
        }
        let ethertype = match number {
            0x0800 => EtherType::Ipv4,
            0x0806 => EtherType::Arp,
            0x86dd => EtherType::Ipv6,
            _ => return Err(DropReason::ForeignEthertype),
        };
        Ok(Ethernet { destination: take(frame, 0), source: take(frame, 6), vlan, ethertype, header_bytes })
    }
}

/// Bytes of the header of a frame in `vlan`, or in none.
#[inline]
pub const fn header_bytes(vlan: Option<u16>) -> usize {
    match vlan {
        Some(_) => HEADER_BYTES + TAG_BYTES,
        None => HEADER_BYTES,
    }
}

/// Writes a header, tagged (priority 0) if there is a VLAN, and returns what follows it; `None` if `out` is too short.
#[inline]
pub fn emit(
    out: &mut [u8],
    destination: [u8; 6],
    source: [u8; 6],
    vlan: Option<u16>,
    ethertype: EtherType,
) -> Option<&mut [u8]> {
    let (addresses, mut rest) = out.split_first_chunk_mut::<12>()?;
    addresses[0..6].copy_from_slice(&destination);
    addresses[6..12].copy_from_slice(&source);
    if let Some(vlan) = vlan {
        let (tag, behind) = rest.split_first_chunk_mut::<TAG_BYTES>()?;
        tag[0..2].copy_from_slice(&TAG.to_be_bytes());
        tag[2..4].copy_from_slice(&vlan.to_be_bytes());
        rest = behind;
    }
    let (number, rest) = rest.split_first_chunk_mut::<2>()?;
    *number = (ethertype as u16).to_be_bytes();
    Some(rest)
}

/// Whether `mac` can be one station's address: neither multicast nor all zero.
#[inline]
pub fn is_unicast(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// The MAC address of an IPv6 multicast group (RFC 2464 section 7).
pub const fn multicast_mac(group: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}
