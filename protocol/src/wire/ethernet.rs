//! Ethernet II; one 802.1Q tag is skipped on receive, none is sent.

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
        if number == TAG {
            header_bytes += TAG_BYTES;
            if frame.len() < header_bytes {
                return Err(DropReason::Truncated);
            }
            number = be16(frame, 16);
        }
        let ethertype = match number {
            0x0800 => EtherType::Ipv4,
            0x0806 => EtherType::Arp,
            0x86dd => EtherType::Ipv6,
            _ => return Err(DropReason::ForeignEthertype),
        };
        Ok(Ethernet { destination: take(frame, 0), source: take(frame, 6), ethertype, header_bytes })
    }
}

/// Writes an untagged header.
#[inline]
pub fn emit(out: &mut [u8; HEADER_BYTES], destination: [u8; 6], source: [u8; 6], ethertype: EtherType) {
    out[0..6].copy_from_slice(&destination);
    out[6..12].copy_from_slice(&source);
    out[12..14].copy_from_slice(&(ethertype as u16).to_be_bytes());
}

/// Whether `mac` can be one station's address: neither multicast nor all zero.
#[inline]
pub fn is_unicast(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}
