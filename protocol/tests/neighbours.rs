//! ARP without a network.
#![allow(missing_docs, reason = "a test")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use protocol::neighbour::{NeighbourConfig, NeighbourError, Neighbours};
use protocol::wire::arp::{Arp, Operation};
use protocol::wire::ethernet::{BROADCAST, EtherType, Ethernet};
use protocol::{Incoming, Instant};

const OURS: ([u8; 6], Ipv4Addr) = ([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 1));
const STORE: ([u8; 6], Ipv4Addr) = ([2, 0, 0, 0, 0, 2], Ipv4Addr::new(10, 0, 0, 2));

fn at(millis: u64) -> Instant {
    Instant::ZERO + Duration::from_millis(millis)
}

fn table(capacity: usize) -> Neighbours {
    let config = NeighbourConfig { capacity, ..NeighbourConfig::default() };
    Neighbours::new(OURS.0, IpAddr::V4(OURS.1), &config)
}

/// The next frame that is due: its destination and ARP packet.
fn poll(table: &mut Neighbours, now: Instant) -> Option<([u8; 6], Arp)> {
    let mut out = [0xee; 64];
    let len = table.poll_transmit(now, &mut out)?;
    let header = Ethernet::new_checked(&out[..len]).unwrap();
    assert_eq!(header.ethertype, EtherType::Arp);
    Some((header.destination, Arp::new_checked(&out[header.header_bytes..len]).unwrap()))
}

#[test]
fn asks_until_answered_and_again_later() {
    let mut table = table(2);
    assert_eq!(table.poll_timeout(), None);
    let store = table.add(at(0), IpAddr::V4(STORE.1)).unwrap();
    assert_eq!(table.add(at(0), IpAddr::V4(STORE.1)), Ok(store));
    assert_eq!(table.mac(store), None);
    // Asked at 0, 100, 300, 700, ... milliseconds.
    for millis in [0, 100, 300, 700] {
        assert_eq!(table.poll_timeout(), Some(at(millis)));
        let (to, arp) = poll(&mut table, at(millis)).expect("a request");
        assert_eq!(to, BROADCAST);
        assert_eq!((arp.operation, arp.target_ip, arp.sender_ip), (Operation::Request, STORE.1, OURS.1));
        assert_eq!(poll(&mut table, at(millis)), None, "one request at a time");
    }
    table.handle(at(800), &Incoming::ArpReply { sender_mac: STORE.0, sender_ip: STORE.1 });
    assert_eq!(table.mac(store), Some(STORE.0));
    assert_eq!(poll(&mut table, at(29_000)), None);
    assert!(poll(&mut table, at(30_800)).is_some());
    assert_eq!(table.mac(store), Some(STORE.0), "in use while it is asked for again");
    table.handle(at(30_900), &Incoming::ArpReply { sender_mac: [2; 6], sender_ip: STORE.1 });
    assert_eq!(table.mac(store), Some([2; 6]), "a store may move");
}

#[test]
fn answers_requests_and_learns_from_known_askers_only() {
    let mut table = table(1);
    let store = table.add_static(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 9)), [9; 6]).unwrap();
    assert_eq!(table.add(at(0), IpAddr::V4(STORE.1)), Err(NeighbourError::Full));
    for _ in 0..20 {
        table.handle(at(1), &Incoming::ArpRequest { sender_mac: STORE.0, sender_ip: STORE.1 });
    }
    let mut answers = 0;
    while let Some((to, arp)) = poll(&mut table, at(1)) {
        assert_eq!(to, STORE.0);
        assert_eq!((arp.operation, arp.sender_mac, arp.target_ip), (Operation::Reply, OURS.0, STORE.1));
        answers += 1;
    }
    assert_eq!(answers, 8, "what waits is bounded");
    // A static address is not overridden by what somebody says.
    let liar = Incoming::ArpReply { sender_mac: [4; 6], sender_ip: Ipv4Addr::new(10, 0, 0, 9) };
    table.handle(at(2), &liar);
    assert_eq!(table.mac(store), Some([9; 6]));
    assert_eq!(table.poll_timeout(), None);
}

#[test]
fn ipv6_needs_a_static_address() {
    let mut table = table(4);
    let ip = Ipv6Addr::LOCALHOST;
    assert_eq!(table.add(at(0), IpAddr::V6(ip)), Err(NeighbourError::NeedsStatic(ip)));
    let index = table.add_static(IpAddr::V6(ip), [7; 6]).unwrap();
    assert_eq!(table.mac(index), Some([7; 6]));
    assert_eq!(table.ip(index), Some(IpAddr::V6(ip)));
}
