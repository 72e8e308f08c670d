//! ICMP errors over IPv4 (RFC 792, RFC 1191): which of our packets did not get where, and why. Nothing else of ICMP is read.

use std::net::{IpAddr, Ipv4Addr};

use super::checksum::Sum;
use super::{be16, take, udp};
use crate::reason::DropReason;

/// IP protocol number.
pub const PROTOCOL: u8 = 1;
/// Bytes before the packet that an error quotes.
const HEADER_BYTES: usize = 8;
const DESTINATION_UNREACHABLE: u8 = 3;
const PORT_UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its destination runs, and nobody listens at the port.
    PortUnreachable,
    /// It did not reach its destination.
    Unreachable,
    /// It was larger than a link on the way carries; 0 if the router did not say what that is.
    TooBig {
        /// The link's MTU in bytes.
        mtu_bytes: u32,
    },
}

/// Bytes of a quoted datagram's payload that are kept: what tells one message to a store from another.
pub const QUOTE_BYTES: usize = 48;

/// The beginning of the payload of the datagram that an error is about, as far as it was quoted and up to [`QUOTE_BYTES`]. Who
/// does not see our packets cannot make it up: it holds numbers that differ from packet to packet and from run to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quote {
    bytes: [u8; QUOTE_BYTES],
    len: usize,
}

impl Quote {
    /// Of a payload that was quoted so far.
    pub fn new(payload: &[u8]) -> Quote {
        let len = payload.len().min(QUOTE_BYTES);
        let mut bytes = [0; QUOTE_BYTES];
        bytes[..len].copy_from_slice(&payload[..len]);
        Quote { bytes, len }
    }

    /// What was quoted.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// An error about a UDP packet, as the packet that it quotes tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathError {
    /// What became of the packet.
    pub cause: Cause,
    /// Who sent the packet.
    pub from: (IpAddr, u16),
    /// Whom it was for.
    pub to: (IpAddr, u16),
    /// What it said.
    pub quote: Quote,
}

/// Reads an ICMP message, the payload of its IP packet.
pub fn read_error(message: &[u8]) -> Result<PathError, DropReason> {
    if message.len() < HEADER_BYTES || Sum::default().with(message).checksum() != 0 {
        return Err(DropReason::BadIcmp);
    }
    let cause = match (message[0], message[1]) {
        (DESTINATION_UNREACHABLE, PORT_UNREACHABLE) => Cause::PortUnreachable,
        (DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED) => {
            Cause::TooBig { mtu_bytes: be16(message, 6).into() }
        }
        (DESTINATION_UNREACHABLE, _) => Cause::Unreachable,
        _ => return Err(DropReason::ForeignIcmp),
    };
    let quote = &message[HEADER_BYTES..];
    // Our own packets have no options: a quote with options is of somebody else's.
    let Some((header, datagram)) = quote.split_first_chunk::<20>() else { return Err(DropReason::BadIcmp) };
    let Some(ports) = datagram.first_chunk::<4>() else { return Err(DropReason::BadIcmp) };
    if header[0] != 0x45 || header[9] != udp::PROTOCOL || be16(header, 6) & 0x1fff != 0 {
        return Err(DropReason::ForeignIcmp);
    }
    let ip = |at| IpAddr::V4(Ipv4Addr::from(take::<4>(header, at)));
    let quote = Quote::new(datagram.get(udp::HEADER_BYTES..).unwrap_or_default());
    Ok(PathError { cause, from: (ip(12), be16(ports, 0)), to: (ip(16), be16(ports, 2)), quote })
}
