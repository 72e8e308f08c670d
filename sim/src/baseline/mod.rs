//! Two other designs over the same network, to compare with: what a fetch protocol without the machinery of ours
//! would do. Both move a fetch as one flow of segments, with the same segment and header sizes.
//!
//! - [`fixed`]: the receiver asks for segments, so many at once from each store as one window, which is fixed; what does
//!   not come within a timeout is asked for again.
//! - [`tcp`]: the sender sends as its congestion window allows, which grows by one segment a round trip and is halved by a
//!   loss (NewReno, RFC 6582, with selective acknowledgements and without delayed ones).

pub mod fixed;
pub mod tcp;

use crate::packet::Packet;

/// Bytes of a message's header, as many as those of our DATA.
pub const HEADER_BYTES: usize = protocol::wire::message::DATA_HEADER_BYTES;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Receiver to sender: send segments.
    Request = 1,
    /// Sender to receiver: one segment.
    Segment = 2,
    /// Receiver to sender: what has arrived.
    Ack = 3,
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Which fetch.
    pub flow: u32,
    /// A segment's number, or the first of a request.
    pub segment: u32,
    /// Segments of a request; of an acknowledgement, the first segment that is missing.
    pub count: u32,
    /// Bytes of the flow in a request; the segments before `segment` that have arrived, in an acknowledgement.
    pub more: u64,
}

impl Header {
    /// Writes the header into a packet.
    pub fn emit(&self, packet: &mut Packet) {
        packet.bytes.extend_from_slice(&[self.kind as u8, 0, 0, 0]);
        packet.bytes.extend_from_slice(&self.flow.to_le_bytes());
        packet.bytes.extend_from_slice(&self.segment.to_le_bytes());
        packet.bytes.extend_from_slice(&self.count.to_le_bytes());
        packet.bytes.extend_from_slice(&self.more.to_le_bytes());
        packet.bytes.resize(HEADER_BYTES, 0);
    }

    /// Reads a packet's header.
    pub fn read(packet: &Packet) -> Option<Header> {
        let bytes: &[u8; HEADER_BYTES] = packet.bytes.as_slice().try_into().ok()?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let kind = match bytes[0] {
            1 => Kind::Request,
            2 => Kind::Segment,
            3 => Kind::Ack,
            _ => return None,
        };
        let more = u64::from(word(16)) | u64::from(word(20)) << 32;
        Some(Header { kind, flow: word(4), segment: word(8), count: word(12), more })
    }
}

/// Segments of a flow, and which of them have arrived.
#[derive(Debug)]
pub struct Arrivals {
    /// How many there are.
    pub segments: u32,
    /// How many have arrived.
    pub arrived: u32,
    /// The first that has not.
    pub first_missing: u32,
    bits: Vec<u64>,
}

impl Arrivals {
    /// None of `segments` has arrived.
    pub fn new(segments: u32) -> Arrivals {
        Arrivals { segments, arrived: 0, first_missing: 0, bits: vec![0; segments.div_ceil(64) as usize] }
    }

    /// Whether a segment has arrived.
    pub fn has(&self, segment: u32) -> bool {
        self.bits.get((segment / 64) as usize).is_some_and(|word| word >> (segment % 64) & 1 == 1)
    }

    /// Notes a segment; false if it was there or does not exist.
    pub fn note(&mut self, segment: u32) -> bool {
        if segment >= self.segments || self.has(segment) {
            return false;
        }
        self.bits[(segment / 64) as usize] |= 1 << (segment % 64);
        self.arrived += 1;
        while self.has(self.first_missing) {
            self.first_missing += 1;
        }
        true
    }

    /// Whether the 64 segments up to and including `last` have arrived: bit 0 is `last`.
    pub fn before(&self, last: u32) -> u64 {
        (0..64).filter(|back| *back <= last && self.has(last - back)).fold(0, |bits, back| bits | 1 << back)
    }
}

/// Round-trip time as RFC 6298 has it, and a timeout that is generous: twice that and four deviations, so that no
/// timeout is spurious on a path whose delay stays the same.
#[derive(Clone, Copy, Debug)]
pub struct Timeout {
    srtt: u64,
    rttvar: u64,
    least: u64,
    backoff: u32,
}

impl Timeout {
    /// Nothing measured; the timeout is at least `least` nanoseconds.
    pub fn new(least: u64) -> Timeout {
        Timeout { srtt: 0, rttvar: 0, least, backoff: 0 }
    }

    /// Takes in a round-trip time.
    pub fn sample(&mut self, rtt: u64) {
        if self.srtt == 0 {
            (self.srtt, self.rttvar) = (rtt, rtt / 2);
        } else {
            self.rttvar = (3 * self.rttvar + self.srtt.abs_diff(rtt)) / 4;
            self.srtt = (7 * self.srtt + rtt) / 8;
        }
        self.backoff = 0;
    }

    /// Something arrived: the doubling ends.
    pub fn arrived(&mut self) {
        self.backoff = 0;
    }

    /// Doubles the timeout, until the next sample.
    pub fn back_off(&mut self) {
        self.backoff = (self.backoff + 1).min(6);
    }

    /// Nanoseconds.
    pub fn nanos(&self) -> u64 {
        let rto = if self.srtt == 0 { 10 * self.least } else { 2 * self.srtt + 4 * self.rttvar };
        rto.max(self.least) << self.backoff
    }
}
