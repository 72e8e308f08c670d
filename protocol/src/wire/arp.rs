//! ARP for IPv4 over Ethernet (RFC 826).

use std::net::Ipv4Addr;

use super::{be16, ethernet, take};
use crate::reason::DropReason;

/// Bytes of an ARP packet.
pub const PACKET_BYTES: usize = 28;
/// Bytes of an untagged frame with an ARP packet, padded to Ethernet's minimum.
pub const FRAME_BYTES: usize = ethernet::MIN_FRAME_BYTES;

/// What an ARP packet wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Who has the target address?
    Request = 1,
    /// The sender has the sender address.
    Reply = 2,
}

/// A checked ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// Request or reply.
    pub operation: Operation,
    /// MAC address of the sender, always a unicast address.
    pub sender_mac: [u8; 6],
    /// IPv4 address of the sender.
    pub sender_ip: Ipv4Addr,
    /// MAC address asked for; meaningless in a request.
    pub target_mac: [u8; 6],
    /// IPv4 address asked for.
    pub target_ip: Ipv4Addr,
}

impl Arp {
    /// Reads the packet after the Ethernet header; padding behind it is ignored.
    pub fn new_checked(packet: &[u8]) -> Result<Arp, DropReason> {
        if packet.len() < PACKET_BYTES {
            return Err(DropReason::Truncated);
        }
        // Hardware type Ethernet, protocol IPv4, their address lengths.
        if packet[0..6] != [0, 1, 0x08, 0x00, 6, 4] {
            return Err(DropReason::BadArp);
        }
        let operation = match be16(packet, 6) {
            1 => Operation::Request,
            2 => Operation::Reply,
            _ => return Err(DropReason::BadArp),
        };
        let sender_mac = take(packet, 8);
        if !ethernet::is_unicast(sender_mac) {
            return Err(DropReason::BadArp);
        }
        Ok(Arp {
            operation,
            sender_mac,
            sender_ip: Ipv4Addr::from(take::<4>(packet, 14)),
            target_mac: take(packet, 18),
            target_ip: Ipv4Addr::from(take::<4>(packet, 24)),
        })
    }

    /// Writes a whole frame to `destination`, tagged if there is a VLAN; returns its length, or `None` if `out` is too
    /// short.
    pub fn emit_frame(&self, out: &mut [u8], destination: [u8; 6], vlan: Option<u16>) -> Option<usize> {
        let bytes = FRAME_BYTES - ethernet::HEADER_BYTES + ethernet::header_bytes(vlan);
        let frame = out.get_mut(..bytes)?;
        frame.fill(0);
        let packet = ethernet::emit(frame, destination, self.sender_mac, vlan, ethernet::EtherType::Arp)?;
        packet[0..6].copy_from_slice(&[0, 1, 0x08, 0x00, 6, 4]);
        packet[6..8].copy_from_slice(&(self.operation as u16).to_be_bytes());
        packet[8..14].copy_from_slice(&self.sender_mac);
        packet[14..18].copy_from_slice(&self.sender_ip.octets());
        packet[18..24].copy_from_slice(&self.target_mac);
        packet[24..28].copy_from_slice(&self.target_ip.octets());
        Some(bytes)
    }
}
