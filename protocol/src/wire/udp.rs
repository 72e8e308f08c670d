//! UDP (RFC 768, RFC 8200 section 8.1).

use super::be16;
use super::checksum::Sum;
use crate::reason::DropReason;

/// IP protocol number.
pub const PROTOCOL: u8 = 17;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 8;

/// How the checksum of a received datagram is to be treated.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// The hardware has found it right; a checksum of zero is still refused where `Check::Required` would.
    Verified {
        /// Whether zero, "no checksum", is allowed: over IPv4 only.
        zero_allowed: bool,
    },
    /// Verify against this sum of the pseudo header.
    Required {
        /// Sum of the pseudo header.
        pseudo: Sum,
        /// Whether zero, "no checksum", is allowed: over IPv4 only.
        zero_allowed: bool,
    },
}

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Udp {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
}

impl Udp {
    /// Reads a datagram, which is exactly the payload of its IP packet: `datagram`, and behind it what else of it lies in further
    /// buffers.
    #[inline]
    pub fn new_checked<'a>(
        datagram: &'a [u8],
        rest: impl Iterator<Item = &'a [u8]>,
        datagram_bytes: usize,
        check: Check,
    ) -> Result<Udp, DropReason> {
        if datagram.len() < HEADER_BYTES {
            return Err(DropReason::Truncated);
        }
        if usize::from(be16(datagram, 4)) != datagram_bytes {
            return Err(DropReason::BadUdpLength);
        }
        let absent = be16(datagram, 6) == 0;
        let right = match check {
            Check::Verified { zero_allowed } | Check::Required { zero_allowed, .. } if absent => zero_allowed,
            Check::Verified { .. } => true,
            Check::Required { pseudo, .. } => pseudo.with_parts(datagram, rest).checksum() == 0,
        };
        if !right {
            return Err(DropReason::BadUdpChecksum);
        }
        Ok(Udp { source: be16(datagram, 0), destination: be16(datagram, 2) })
    }
}

/// Writes a header with a zero checksum.
#[inline]
pub fn emit(out: &mut [u8; HEADER_BYTES], source: u16, destination: u16, udp_bytes: u16) {
    out[0..2].copy_from_slice(&source.to_be_bytes());
    out[2..4].copy_from_slice(&destination.to_be_bytes());
    out[4..6].copy_from_slice(&udp_bytes.to_be_bytes());
    out[6..8].fill(0);
}
