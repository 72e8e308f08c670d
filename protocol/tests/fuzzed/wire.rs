//! Frames and messages, to those who read them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use protocol::wire::message::{COMMON_BYTES, Message};
use protocol::wire::offer;
use protocol::{HardwareChecks, Incoming, Local, frame};

use super::message;

const V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

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
