//! ARP and neighbour discovery without a network.
#![allow(missing_docs, reason = "a test")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use protocol::frame::{self, Local};
use protocol::neighbour::{FRAME_BYTES, NeighbourConfig, NeighbourError, Neighbours};
use protocol::wire::arp::{Arp, Operation};
use protocol::wire::ethernet::{BROADCAST, EtherType, Ethernet};
use protocol::{DropReason, HardwareChecks, Incoming, Instant};

const OURS: ([u8; 6], Ipv4Addr) = ([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 1));
const STORE: ([u8; 6], Ipv4Addr) = ([2, 0, 0, 0, 0, 2], Ipv4Addr::new(10, 0, 0, 2));

fn at(millis: u64) -> Instant {
    Instant::ZERO + Duration::from_millis(millis)
}

fn table(capacity: usize) -> Neighbours {
    let config = NeighbourConfig { capacity, ..NeighbourConfig::default() };
    Neighbours::new(local(IpAddr::V4(OURS.1)), &config)
}

fn local(ip: IpAddr) -> Local {
    Local { mac: OURS.0, ip, first_port: 4800, ports: 1, vlan: None }
}

/// The next frame that is due: its destination and ARP packet.
fn poll(table: &mut Neighbours, now: Instant) -> Option<([u8; 6], Arp)> {
    let mut out = [0xee; FRAME_BYTES];
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
    table.handle(at(800), &told(STORE.0, STORE.1.into(), true));
    assert_eq!(table.mac(store), Some(STORE.0));
    assert_eq!(poll(&mut table, at(29_000)), None);
    assert!(poll(&mut table, at(30_800)).is_some());
    assert_eq!(table.mac(store), Some(STORE.0), "in use while it is asked for again");
    table.handle(at(30_900), &told([2; 6], STORE.1.into(), true));
    assert_eq!(table.mac(store), Some([2; 6]), "a store may move");
}

#[test]
fn answers_requests_and_learns_from_known_askers_only() {
    let mut table = table(1);
    let store = table.add_static(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 9)), [9; 6]).unwrap();
    assert_eq!(table.add(at(0), IpAddr::V4(STORE.1)), Err(NeighbourError::Full));
    for _ in 0..20 {
        table.handle(at(1), &Incoming::NeighbourRequest { sender_mac: STORE.0, sender_ip: STORE.1.into() });
    }
    let mut answers = 0;
    while let Some((to, arp)) = poll(&mut table, at(1)) {
        assert_eq!(to, STORE.0);
        assert_eq!((arp.operation, arp.sender_mac, arp.target_ip), (Operation::Reply, OURS.0, STORE.1));
        answers += 1;
    }
    assert_eq!(answers, 8, "what waits is bounded");
    // A static address is not overridden by what somebody says.
    let liar = told([4; 6], IpAddr::V4(Ipv4Addr::new(10, 0, 0, 9)), true);
    table.handle(at(2), &liar);
    assert_eq!(table.mac(store), Some([9; 6]));
    assert_eq!(table.poll_timeout(), None);
}

const OURS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const STORE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0x12, 0x3456);

fn told(mac: [u8; 6], ip: IpAddr, overrides: bool) -> Incoming {
    Incoming::NeighbourReply { mac, ip, overrides }
}

/// Two hosts that speak neighbour discovery to each other, in a VLAN and in none.
#[test]
fn neighbours_discover_each_other_over_ipv6() {
    for vlan in [None, Some(77)] {
        let ours = Local { vlan, ..local(OURS_V6.into()) };
        let theirs = Local { mac: STORE.0, ip: STORE_V6.into(), vlan, ..ours };
        let config = NeighbourConfig::default();
        let (mut us, mut them) = (Neighbours::new(ours, &config), Neighbours::new(theirs, &config));
        assert_eq!(us.add(at(0), STORE.1.into()), Err(NeighbourError::OtherVersion(STORE.1.into())));
        let store = us.add(at(0), STORE_V6.into()).unwrap();
        let back = them.add(at(50_000), OURS_V6.into()).unwrap();
        let mut out = [0xee; FRAME_BYTES];
        assert_eq!(us.poll_transmit(at(0), &mut out[..FRAME_BYTES - 1]), None);
        let len = us.poll_transmit(at(0), &mut out).unwrap();
        assert_eq!(len, if vlan.is_some() { 90 } else { 86 });
        assert_eq!(out[..6], [0x33, 0x33, 0xff, 0x12, 0x34, 0x56], "the group of the store's address");
        let parse = |frame: &[u8], at: &Local| frame::parse(frame, at, HardwareChecks::default());
        let asked = parse(&out[..len], &theirs).unwrap();
        assert_eq!(asked, Incoming::NeighbourRequest { sender_mac: OURS.0, sender_ip: OURS_V6.into() });
        let other = Local { ip: "fd00::1:12:3456".parse().unwrap(), ..theirs };
        assert_eq!(parse(&out[..len], &other), Err(DropReason::ForeignIp), "the same group, another address");
        them.handle(at(1), &asked);
        assert_eq!(them.mac(back), Some(OURS.0), "who asks is known by it");
        let len = them.poll_transmit(at(1), &mut out).unwrap();
        let answer = parse(&out[..len], &ours).unwrap();
        assert_eq!(answer, told(STORE.0, STORE_V6.into(), true));
        us.handle(at(2), &answer);
        assert_eq!(us.mac(store), Some(STORE.0));
        us.handle(at(3), &told([9; 6], STORE_V6.into(), false));
        assert_eq!(us.mac(store), Some(STORE.0), "without the override flag nothing is replaced");
    }
}

#[test]
fn a_host_without_address_is_answered_to_all() {
    let ours = local(OURS_V6.into());
    let mut us = Neighbours::new(ours, &NeighbourConfig::default());
    let nobody = Incoming::NeighbourRequest { sender_mac: [4; 6], sender_ip: Ipv6Addr::UNSPECIFIED.into() };
    us.handle(at(0), &nobody);
    let mut out = [0; FRAME_BYTES];
    let len = us.poll_transmit(at(0), &mut out).unwrap();
    assert_eq!(out[..6], [0x33, 0x33, 0, 0, 0, 1]);
    let theirs = Local { mac: [4; 6], ip: STORE_V6.into(), ..ours };
    let heard = frame::parse(&out[..len], &theirs, HardwareChecks::default());
    assert_eq!(heard, Ok(told(OURS.0, OURS_V6.into(), true)));
}
