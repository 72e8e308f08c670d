//! ICMP errors and neighbour discovery: what is understood, what is dropped, and that nothing made up gets through.
#![allow(missing_docs, clippy::cast_possible_truncation, reason = "a test; its numbers are small")]

use std::net::{IpAddr, Ipv6Addr};

use proptest::prelude::*;
use protocol::frame::{self, Outgoing};
use protocol::wire::icmp::{Cause, PathError, Quote};
use protocol::wire::{Ecn, icmpv6};
use protocol::{DropReason, HardwareChecks, Incoming, Local, Peer, TxChecksum};

const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn ip(v6: bool, last: u8) -> IpAddr {
    if v6 {
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into()))
    } else {
        [10, 0, 0, last].into()
    }
}

fn ours(v6: bool) -> Local {
    Local { mac: OUR_MAC, ip: ip(v6, 1), first_port: 4800, ports: 2, vlan: None }
}

fn parse(frame: &[u8], v6: bool) -> Result<Incoming, DropReason> {
    frame::parse(frame, &ours(v6), HardwareChecks::default())
}

fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let words = bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// A packet that we sent to the store, without its Ethernet header.
fn sent(v6: bool, from: &Local) -> Vec<u8> {
    let to = Peer { mac: ROUTER_MAC, ip: ip(v6, 2), port: 4791 };
    let mut frame = vec![7; from.header_bytes() + 100];
    let (checksum, ecn) = (TxChecksum::Software, Ecn::NotCapable);
    let source_port = from.first_port;
    let datagram = Outgoing { source_port, to, payload_bytes: 100, attached: &[], checksum, ecn };
    frame::emit_udp(&mut frame, from, &datagram).unwrap();
    frame[14..].to_vec()
}

/// A frame to us with this ICMP message; its checksum is made right.
fn icmp(v6: bool, hops: u8, source: IpAddr, mut message: Vec<u8>) -> Vec<u8> {
    message[2..4].fill(0);
    let mut frame = [&OUR_MAC[..], &ROUTER_MAC].concat();
    match (source, ours(v6).ip) {
        (IpAddr::V4(source), IpAddr::V4(own)) => {
            let sum = checksum(&[&message]);
            message[2..4].copy_from_slice(&sum);
            let total = (20 + message.len() as u16).to_be_bytes();
            let mut header = [0x45, 0, total[0], total[1], 1, 2, 0, 0, hops, 1, 0, 0].to_vec();
            header.extend([source.octets(), own.octets()].concat());
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum);
            frame.extend([&[8, 0][..], &header].concat());
        }
        (IpAddr::V6(source), IpAddr::V6(own)) => {
            let bytes = (message.len() as u16).to_be_bytes();
            let sum = checksum(&[&source.octets(), &own.octets(), &bytes, &[0, 58], &message]);
            message[2..4].copy_from_slice(&sum);
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, bytes[0], bytes[1], 58, hops]);
            frame.extend([source.octets(), own.octets()].concat());
        }
        _ => unreachable!(),
    }
    frame.extend(message);
    frame
}

/// An error of a router: type, code, the second word, and the packet quoted.
fn error(v6: bool, kind: u8, code: u8, word: u32, quote: &[u8]) -> Vec<u8> {
    let message = [&[kind, code, 0, 0][..], &word.to_be_bytes(), quote].concat();
    icmp(v6, 61, ip(v6, 99), message)
}

#[test]
fn errors_about_our_packets_are_understood() {
    let cases = [
        (false, 3, 3, 0, Cause::PortUnreachable),
        (false, 3, 1, 0, Cause::Unreachable),
        (false, 3, 13, 0, Cause::Unreachable),
        (false, 3, 4, 1400, Cause::TooBig { mtu_bytes: 1400 }),
        (false, 3, 4, 0, Cause::TooBig { mtu_bytes: 0 }),
        (true, 1, 4, 0, Cause::PortUnreachable),
        (true, 1, 0, 0, Cause::Unreachable),
        (true, 2, 0, 1280, Cause::TooBig { mtu_bytes: 1280 }),
    ];
    for (v6, kind, code, word, cause) in cases {
        let packet = sent(v6, &ours(v6));
        // Eight bytes of the datagram are enough.
        for quoted in [packet.len(), if v6 { 48 } else { 28 }] {
            let frame = error(v6, kind, code, word, &packet[..quoted]);
            let quote = Quote::new(&packet[(if v6 { 48 } else { 28 })..quoted]);
            let expected = PathError { cause, from: (ip(v6, 1), 4800), to: (ip(v6, 2), 4791), quote };
            assert_eq!(parse(&frame, v6), Ok(Incoming::PathError(expected)));
        }
    }
}

#[test]
fn errors_about_anything_else_are_dropped() {
    for v6 in [false, true] {
        let port_unreachable = |quote: &[u8]| match v6 {
            false => parse(&error(false, 3, 3, 0, quote), false),
            true => parse(&error(true, 1, 4, 0, quote), true),
        };
        let packet = sent(v6, &ours(v6));
        assert!(port_unreachable(&packet).is_ok());
        let others = [
            Local { ip: ip(v6, 5), ..ours(v6) },
            Local { first_port: 4802, ..ours(v6) },
            Local { first_port: 4799, ..ours(v6) },
        ];
        for other in others {
            assert_eq!(port_unreachable(&sent(v6, &other)), Err(DropReason::ForeignIcmp), "{other:?}");
        }
        let protocol = if v6 { 6 } else { 9 };
        let mut tcp = packet.clone();
        tcp[protocol] = 6;
        assert_eq!(port_unreachable(&tcp), Err(DropReason::ForeignIcmp));
        let needed = if v6 { 44 } else { 24 };
        for quoted in 0..needed {
            assert_eq!(port_unreachable(&packet[..quoted]), Err(DropReason::BadIcmp), "{quoted}");
        }
        let mut damaged = error(v6, if v6 { 1 } else { 3 }, 3, 0, &packet);
        *damaged.last_mut().unwrap() ^= 1;
        assert_eq!(parse(&damaged, v6), Err(DropReason::BadIcmp));
        // An echo request.
        let ping = error(v6, if v6 { 128 } else { 8 }, 0, 1, b"ping");
        assert_eq!(parse(&ping, v6), Err(DropReason::ForeignIcmp));
    }
}

/// A solicitation for `target`, with its option.
fn solicitation(target: u8, option: &[u8]) -> Vec<u8> {
    let IpAddr::V6(target) = ip(true, target) else { unreachable!() };
    [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), option].concat()
}

#[test]
fn neighbour_discovery_that_rfc_4861_discards_is_dropped() {
    let option = [1, 1, 2, 0, 0, 0, 0, 9];
    let good = solicitation(1, &option);
    let asker = ip(true, 2);
    let asked = Incoming::NeighbourRequest { sender_mac: ROUTER_MAC, sender_ip: asker };
    assert_eq!(parse(&icmp(true, 255, asker, good.clone()), true), Ok(asked.clone()));
    assert_eq!(parse(&icmp(true, 255, asker, solicitation(1, &[])), true), Ok(asked));
    let edited = |at: usize, value: u8| {
        let mut message = good.clone();
        message[at] = value;
        icmp(true, 255, asker, message)
    };
    let advertised = |source: IpAddr, flags: u8, hops: u8| {
        let mut message = solicitation(2, &[2, 1, 2, 0, 0, 0, 0, 9]);
        (message[0], message[4]) = (136, flags);
        icmp(true, hops, source, message)
    };
    let told = |overrides| Incoming::NeighbourReply { mac: ROUTER_MAC, ip: asker, overrides };
    assert_eq!(parse(&advertised(asker, 0x60, 255), true), Ok(told(true)));
    assert_eq!(parse(&advertised(asker, 0x40, 255), true), Ok(told(false)));
    let unspecified = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let bad = [
        icmp(true, 254, asker, good.clone()),
        edited(1, 1),
        edited(8, 0xff),
        edited(25, 0),
        edited(25, 2),
        edited(26, 3),
        icmp(true, 255, asker, good[..23].to_vec()),
        icmp(true, 255, asker, good[..25].to_vec()),
        // A host without address asks the group, and does not say its MAC address.
        icmp(true, 255, unspecified, good.clone()),
        icmp(true, 255, unspecified, solicitation(1, &[])),
        advertised(asker, 0x60, 64),
        advertised(unspecified, 0x60, 255),
    ];
    for (at, frame) in bad.iter().enumerate() {
        assert_eq!(parse(frame, true), Err(DropReason::BadIcmp), "case {at}");
    }
    let elsewhere = icmp(true, 255, asker, solicitation(3, &option));
    assert_eq!(parse(&elsewhere, true), Err(DropReason::ForeignIp));
    // UDP does not come to groups, nor do errors.
    let mut group = icmp(true, 64, asker, vec![1, 4, 0, 0, 0, 0, 0, 0]);
    group[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 1]);
    assert_eq!(parse(&group, true), Err(DropReason::ForeignIp));
    group[38..54].copy_from_slice(&icmpv6::ALL_NODES.octets());
    assert_eq!(parse(&group, true), Err(DropReason::BadIcmp));
    group[20] = 17;
    assert_eq!(parse(&group, true), Err(DropReason::ForeignProtocol));
    group[5] = 2;
    assert_eq!(parse(&group, true), Err(DropReason::ForeignMac));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Any message under a right checksum: no panic, and an error only about what we can have sent.
    #[test]
    fn arbitrary_messages_change_nothing(
        v6 in any::<bool>(),
        hops in prop_oneof![Just(255_u8), Just(64)],
        kind in prop_oneof![Just(3_u8), Just(1), Just(2), Just(135), Just(136), any::<u8>()],
        code in 0_u8..6,
        rest in proptest::collection::vec(any::<u8>(), 2..120),
        quote in any::<bool>(),
        edits in proptest::collection::vec((0_usize..120, any::<u8>()), 0..3),
        cut in 0_usize..200,
    ) {
        let mut message = [&[kind, code][..], &rest].concat();
        if quote {
            message.resize(8, 0);
            message.extend(sent(v6, &ours(v6)));
        }
        for (at, value) in edits {
            if let Some(byte) = message.get_mut(at) {
                *byte = value;
            }
        }
        message.truncate(cut.max(4));
        let frame = icmp(v6, hops, ip(v6, 2), message);
        match parse(&frame, v6) {
            Ok(Incoming::PathError(error)) => {
                prop_assert_eq!(error.from.0, ip(v6, 1));
                prop_assert!((4800..4802).contains(&error.from.1) && quote);
            }
            Ok(Incoming::Datagram { .. }) => prop_assert!(false, "ICMP is no datagram"),
            Ok(_) => prop_assert!(v6 && hops == 255),
            Err(_) => {}
        }
    }
}
