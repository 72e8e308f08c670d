//! What the fuzz targets `wire` and `serve` run, and what their corpora are replayed with: frames and messages that anybody can send.
#![allow(clippy::cast_possible_truncation, reason = "sizes of the tests are small")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use protocol::wire::message::{COMMON_BYTES, MAGIC, MAX_CONTROL_BYTES, Message, VERSION};
use protocol::wire::offer;
use protocol::{
    ChunkInfo, ChunkSource, HardwareChecks, Incoming, Instant, Key, Local, Peer, ServeConfig, ServeEngine,
    frame,
};

const V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

fn peer(port: u8) -> Peer {
    Peer { mac: [2; 6], ip: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 1000 + u16::from(port & 3) }
}

/// A message of type `kind & 7` around `rest`, or `rest` as it is where bit 3 is set.
fn message(kind: u8, rest: &[u8]) -> Vec<u8> {
    if kind & 8 != 0 {
        return rest.to_vec();
    }
    [&MAGIC[..], &[VERSION, kind & 7, 0, 0], rest].concat()
}

fn read(payload: &[u8]) {
    let Ok(read) = Message::new_checked(payload) else { return };
    assert!(payload.len() >= COMMON_BYTES);
    match read {
        Message::Lookup(lookup) => assert_eq!(lookup.keys().count(), lookup.keys().len()),
        Message::LookupReply(reply) => assert_eq!(reply.entries().count(), reply.entries().len()),
        Message::Pull(pull) => assert_eq!(pull.runs().count(), pull.runs().len()),
        Message::Data(data) => assert!(data.payload.len() < payload.len()),
        Message::Error(_) | Message::Probe(_) | Message::ProbeReply(_) => {}
    }
}

/// A frame, or a message in none. The first byte: bits 0 and 1 which checksums the hardware has found right, bit 2 whether we have an IPv6 address, bit 7
/// whether it is a message.
pub(crate) fn wire(data: &[u8]) {
    let Some((&how, bytes)) = data.split_first() else { return };
    if how & 0x80 != 0 {
        let payload = message(how, bytes);
        read(&payload);
        // What is read is written again as it was.
        let mut out = [0; 256];
        if let Ok(read) = offer::read_offer(&payload) {
            let length = offer::emit_offer(&mut out, &read).expect("room");
            assert_eq!(&out[..length], payload);
        }
        if let Ok(read) = offer::read_offer_reply(&payload) {
            let length = offer::emit_offer_reply(&mut out, &read).expect("room");
            assert_eq!(&out[..length], payload);
        }
        return;
    }
    let ip = if how & 4 == 0 { IpAddr::V4(V4) } else { IpAddr::V6(Ipv6Addr::LOCALHOST) };
    let local = Local { mac: [2, 0, 0, 0, 0, 1], ip, first_port: 4800, ports: 2, vlan: None };
    let mut bytes = bytes.to_vec();
    if how & 8 != 0
        && let Some(front) = bytes.get_mut(..6)
    {
        front.copy_from_slice(&local.mac);
    }
    let hardware = HardwareChecks { ip_good: how & 1 != 0, udp_good: how & 2 != 0 };
    if let Ok(Incoming::Datagram { to_port, payload, .. }) = frame::parse(&bytes, &local, hardware) {
        assert!(local.owns_port(to_port));
        read(&bytes[payload]);
    }
}

/// One chunk of this many bytes.
struct Shelf(u64);

const HANDLE: u32 = 3;

impl ChunkSource for Shelf {
    fn find(&self, key: &Key) -> Option<ChunkInfo> {
        (key.0[0] == 9).then(|| ChunkInfo { handle: HANDLE, chunk_bytes: self.0, ..Default::default() })
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        (handle == HANDLE).then_some(self.0)
    }
}

/// Datagrams for a store's engine, one after the other: a byte that says from whom and of which type, a byte of length, and so many bytes. What the
/// engine then sends lies within the chunk and ends.
pub(crate) fn serve(data: &[u8]) {
    let shelf = Shelf(100_000);
    let config = ServeConfig { epoch: 0, ..ServeConfig::default() };
    let most_bytes = config.max_pending_bytes;
    let mut engine = ServeEngine::new(config);
    let mut rest = data;
    let mut now = Instant::ZERO;
    let mut out = vec![0; 9000];
    while let [kind, length, tail @ ..] = rest {
        let (bytes, after) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = after;
        let _ = engine.handle_datagram(now, peer(kind >> 4), &message(*kind, bytes), &shelf);
        assert!(engine.pending_bytes() <= most_bytes);
        if kind & 0x40 == 0 {
            continue;
        }
        now = Instant::from_nanos(now.nanos() + 1_000_000);
        // Some of what there is to send; a segment has at least a byte.
        for _ in 0..64 {
            let Some(transmit) = engine.poll_transmit(now, &mut out) else { break };
            assert!(transmit.header_bytes <= out.len().max(MAX_CONTROL_BYTES));
            if let Some((handle, range)) = transmit.payload {
                assert!(handle == HANDLE && range.start < range.end && range.end as u64 <= shelf.0);
            }
        }
    }
}
