//! Packets as bytes.

use protocol::frame::{Local, Outgoing, Peer, TxChecksum, emit_udp};
use protocol::wire::Ecn;

/// Bytes before a UDP payload.
pub(crate) const HEADERS: usize = 42;
const IP: usize = 14;
const UDP: usize = 34;

/// A packet, in one buffer or in two.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) bytes: Vec<u8>,
    /// Where the second buffer begins.
    pub(crate) split: Option<usize>,
}

impl From<Vec<u8>> for Frame {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, split: None }
    }
}

/// A datagram in its packet.
pub(crate) fn datagram(from: &Local, to: &Peer, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADERS];
    bytes.extend_from_slice(payload);
    let (source_port, payload_bytes) = (from.first_port, payload.len());
    let (checksum, ecn) = (TxChecksum::Software, Ecn::Ect0);
    let datagram = Outgoing { source_port, to: *to, payload_bytes, attached: &[], checksum, ecn };
    let written = emit_udp(&mut bytes, from, &datagram);
    assert_eq!(written, Ok(bytes.len()));
    bytes
}

/// The Internet checksum, word by word.
pub(crate) fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts
        .iter()
        .flat_map(|part| part.chunks(2))
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

/// Makes the IPv4 header's checksum right.
pub(crate) fn seal_ip(frame: &mut [u8]) {
    frame[IP + 10..IP + 12].fill(0);
    let sum = checksum(&[&frame[IP..UDP]]);
    frame[IP + 10..IP + 12].copy_from_slice(&sum);
}

/// Makes lengths and checksums right for what the packet holds.
pub(crate) fn seal(frame: &mut [u8]) {
    let ip_bytes = u16::try_from(frame.len() - IP).unwrap();
    frame[IP + 2..IP + 4].copy_from_slice(&ip_bytes.to_be_bytes());
    seal_ip(frame);
    let udp_bytes = (ip_bytes - 20).to_be_bytes();
    frame[UDP + 4..UDP + 6].copy_from_slice(&udp_bytes);
    frame[UDP + 6..UDP + 8].fill(0);
    let sum = checksum(&[&frame[IP + 12..IP + 20], &[0, 17], &udp_bytes, &frame[UDP..]]);
    let sum = if sum == [0, 0] { [0xff, 0xff] } else { sum };
    frame[UDP + 6..UDP + 8].copy_from_slice(&sum);
}

/// The packet with an 802.1Q tag of priority 1 in a VLAN; 0 is none.
pub(crate) fn tagged(frame: &[u8], vlan: u8) -> Vec<u8> {
    [&frame[..12], &[0x81, 0, 0x20, vlan], &frame[12..]].concat()
}

/// The packet with another payload.
pub(crate) fn with_payload(frame: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = [&frame[..HEADERS], payload].concat();
    seal(&mut bytes);
    bytes
}

/// What a host or router says when `packet`, over IPv4, cannot be delivered: destination unreachable with this code. It quotes as much as
/// fits 576 bytes (RFC 1812 section 4.3.2.3).
pub(crate) fn unreachable(packet: &[u8], code: u8) -> Vec<u8> {
    let quote = &packet[IP..packet.len().min(IP + 548)];
    let mut message = [&[3, code, 0, 0, 0, 0, 0, 0][..], quote].concat();
    let sum = checksum(&[&message]);
    message[2..4].copy_from_slice(&sum);
    let mut bytes = [&packet[6..12], &packet[..6], &packet[12..IP + 20], &message].concat();
    let ip_bytes = u16::try_from(bytes.len() - IP).unwrap();
    bytes[IP + 2..IP + 4].copy_from_slice(&ip_bytes.to_be_bytes());
    bytes[IP + 9] = 1;
    bytes[IP + 12..IP + 16].copy_from_slice(&packet[IP + 16..IP + 20]);
    bytes[IP + 16..IP + 20].copy_from_slice(&packet[IP + 12..IP + 16]);
    seal_ip(&mut bytes);
    bytes
}

/// The tag of a DATA message.
pub(crate) fn data_tag(frame: &[u8]) -> Option<u32> {
    (frame.len() > HEADERS + 32 && frame[HEADERS + 5] == 4)
        .then(|| u32::from_le_bytes(frame[HEADERS + 8..HEADERS + 12].try_into().unwrap()))
}
