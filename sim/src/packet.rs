//! Packets under way. The headers are real bytes; a segment's payload is only named, unless a scenario wants it.

/// Bytes on the wire around a UDP payload over IPv4: preamble and gap 20, Ethernet 14 and 4, IP 20, UDP 8.
pub const WIRE_OVERHEAD_BYTES: u32 = 66;

/// Where a segment's bytes come from: enough to know every byte of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The chunk's number in the run.
    pub chunk: u32,
    /// Offset of the first byte from the chunk's start.
    pub offset: u64,
}

/// A datagram.
#[derive(Clone, Debug, Default)]
pub struct Packet {
    /// Sending host.
    pub from: u32,
    /// Receiving host.
    pub to: u32,
    /// Queue of the data plane that sent it or is to receive it.
    pub queue: u16,
    /// Marked by a switch whose queue was long (ECN: congestion experienced).
    pub marked: bool,
    /// A bit of the payload that is not in `bytes` was flipped, and the UDP checksum did not tell.
    pub damaged: bool,
    /// The first bytes of the UDP payload; all of it, if `tail_bytes` is 0.
    pub bytes: Vec<u8>,
    /// Bytes of the UDP payload that follow and are not materialized.
    pub tail_bytes: u32,
    /// Payload of the stored chunk that this packet carries: 0 for everything but DATA.
    pub payload_bytes: u32,
    /// Where the payload comes from.
    pub source: Source,
}

impl Packet {
    /// The UDP payload, of which what is not materialized has only a length: it is laid out in `scratch`.
    #[inline]
    pub fn payload<'p>(&'p self, scratch: &'p mut Vec<u8>) -> &'p [u8] {
        if self.tail_bytes == 0 {
            return &self.bytes;
        }
        let (head, all) = (self.bytes.len(), self.bytes.len() + self.tail_bytes as usize);
        if scratch.len() < all {
            scratch.resize(all, 0);
        }
        scratch[..head].copy_from_slice(&self.bytes);
        &scratch[..all]
    }

    /// Bytes that the packet occupies on a wire.
    #[inline]
    pub fn wire_bytes(&self) -> u32 {
        let head = u32::try_from(self.bytes.len()).expect("a datagram is short");
        // Ethernet pads to 64 bytes: 18 of payload behind the 46 of headers and checksum.
        (head + self.tail_bytes).max(18) + WIRE_OVERHEAD_BYTES
    }
}

/// All packets under way; slots are used again, with the memory of their bytes.
#[derive(Debug, Default)]
pub struct Packets {
    slots: Vec<Packet>,
    free: Vec<u32>,
}

impl Packets {
    /// An empty packet.
    #[inline]
    pub fn take(&mut self) -> u32 {
        if let Some(slot) = self.free.pop() {
            let packet = &mut self.slots[slot as usize];
            let mut bytes = std::mem::take(&mut packet.bytes);
            bytes.clear();
            *packet = Packet { bytes, ..Packet::default() };
            return slot;
        }
        self.slots.push(Packet::default());
        u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 packets under way")
    }

    /// A copy of a packet.
    pub fn copy(&mut self, of: u32) -> u32 {
        let copy = self.take();
        let mut bytes = std::mem::take(&mut self.slots[copy as usize].bytes);
        bytes.extend_from_slice(&self.get(of).bytes);
        self.slots[copy as usize] = Packet { bytes, ..self.get(of).shallow() };
        copy
    }

    /// Gives a packet's slot back.
    #[inline]
    pub fn give_back(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// The packet in a slot.
    #[inline]
    pub fn get(&self, slot: u32) -> &Packet {
        &self.slots[slot as usize]
    }

    /// The packet in a slot.
    #[inline]
    pub fn get_mut(&mut self, slot: u32) -> &mut Packet {
        &mut self.slots[slot as usize]
    }

    /// Packets under way.
    pub fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Packet {
    fn shallow(&self) -> Packet {
        Packet { bytes: Vec::new(), ..*self }
    }
}
