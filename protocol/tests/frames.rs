//! Frames and messages against slow twins, arbitrary bytes and single-bit flips.
#![allow(clippy::cast_possible_truncation, reason = "numbers of the tests are small")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use protocol::frame::{self, EmitError, Outgoing};
use protocol::wire::Ecn;
use protocol::wire::arp::{Arp, Operation};
use protocol::wire::message::{self, Data, ErrorCode, Message, Probe, PullRange, Refusal, Run, Subject};
use protocol::{ChunkInfo, DropReason, HardwareChecks, Incoming, Key, Local, Peer, TxChecksum};

const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x10];
const THEIR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x20];
const PORT: u16 = 4791;

fn address(v6: bool, last: u8) -> IpAddr {
    if v6 {
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)))
    } else {
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, last))
    }
}

fn local(v6: bool) -> Local {
    Local { mac: OUR_MAC, ip: address(v6, 1), first_port: PORT, ports: 4, vlan: None }
}

fn remote(v6: bool) -> Local {
    Local { mac: THEIR_MAC, ip: address(v6, 2), first_port: 9000, ports: 1, vlan: None }
}

/// A frame from `remote` to `local`.
fn frame_with(v6: bool, port: u16, payload: &[u8], checksum: TxChecksum) -> Vec<u8> {
    let to = Peer { mac: OUR_MAC, ip: address(v6, 1), port };
    let headers = frame::header_bytes(&to.ip);
    let mut buf = vec![0xee; headers];
    buf.extend_from_slice(payload);
    let len = frame::emit_udp(&mut buf, &remote(v6), &outgoing(to, payload.len(), checksum)).unwrap();
    assert_eq!(len, buf.len());
    buf
}

fn outgoing(to: Peer, payload_bytes: usize, checksum: TxChecksum) -> Outgoing<'static> {
    Outgoing { source_port: 9000, to, payload_bytes, attached: &[], checksum, ecn: Ecn::NotCapable }
}

fn ones_sum(bytes: &[u8]) -> u32 {
    let mut sum = 0;
    for (at, byte) in bytes.iter().enumerate() {
        sum += if at % 2 == 0 { u32::from(*byte) << 8 } else { u32::from(*byte) };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// The RFCs, read slowly: the payload's place if the frame is an intact datagram for `local`, else `None`.
fn slow_datagram(frame: &[u8], local: &Local) -> Option<(usize, usize)> {
    let word = |at: usize| Some(u32::from(*frame.get(at)?) << 8 | u32::from(*frame.get(at + 1)?));
    if frame.get(0..6)? != local.mac {
        return None;
    }
    let is_tagged = word(12)? == 0x8100;
    let vlan = is_tagged.then_some((word(14)? & 0xfff) as u16).filter(|vlan| *vlan != 0);
    if vlan != local.vlan {
        return None;
    }
    let ip = if is_tagged { 18 } else { 14 };
    let (udp, end, pseudo) = match word(ip - 2)? {
        0x0800 => {
            let header = frame.get(ip..ip + 20)?;
            let IpAddr::V4(own) = local.ip else { return None };
            let end = ip + word(ip + 2)? as usize;
            let good = header[0] == 0x45
                && ones_sum(header) == 0xffff
                && end <= frame.len()
                && end >= ip + 20
                && word(ip + 6)? & 0x3fff == 0
                && header[9] == 17
                && header[16..20] == own.octets()
                && !(224..240).contains(&header[12])
                && header[12..16] != [255; 4]
                && header[12..16] != [0; 4];
            if !good {
                return None;
            }
            (ip + 20, end, [&header[12..20], &[0, 17]].concat())
        }
        0x86dd => {
            let header = frame.get(ip..ip + 40)?;
            let IpAddr::V6(own) = local.ip else { return None };
            let end = ip + 40 + word(ip + 4)? as usize;
            let good = header[0] >> 4 == 6
                && end <= frame.len()
                && header[6] == 17
                && header[24..40] == own.octets()
                && header[8] != 0xff
                && header[8..24] != [0; 16];
            if !good {
                return None;
            }
            (ip + 40, end, [&header[8..40], &[0, 17]].concat())
        }
        _ => return None,
    };
    let datagram = frame.get(udp..end)?;
    if datagram.len() < 8 || word(udp + 4)? as usize != datagram.len() {
        return None;
    }
    let port = word(udp + 2)? as u16;
    if port < local.first_port || port >= local.first_port + local.ports {
        return None;
    }
    if word(udp + 6)? == 0 {
        return (pseudo.len() == 10).then_some((udp + 8, end));
    }
    let mut summed = pseudo;
    summed.extend_from_slice(&(datagram.len() as u16).to_be_bytes());
    summed.extend_from_slice(datagram);
    (ones_sum(&summed) == 0xffff).then_some((udp + 8, end))
}

fn agrees(frame: &[u8], local: &Local) -> Result<(), TestCaseError> {
    let fast = frame::parse(frame, local, HardwareChecks::default());
    let slow = slow_datagram(frame, local);
    match fast {
        Ok(Incoming::Datagram { payload, .. }) => prop_assert_eq!(slow, Some((payload.start, payload.end))),
        Ok(_) | Err(_) => prop_assert_eq!(slow, None),
    }
    Ok(())
}

#[test]
fn an_empty_buffer_in_a_chain_is_not_the_end_of_its_frame() {
    let bytes = frame_with(false, PORT, &[1; 100], TxChecksum::Software);
    let (first, rest) = bytes.split_at(70);
    let rest = [&[], rest].into_iter();
    let (local, hardware) = (local(false), HardwareChecks::default());
    let whole = frame::parse(&bytes, &local, hardware);
    assert!(whole.is_ok());
    assert_eq!(frame::parse_chain(first, rest, bytes.len(), &local, hardware), whole);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), v6 in any::<bool>(), good in any::<bool>()) {
        let hardware = HardwareChecks { ip_good: good, udp_good: good };
        let _ = frame::parse(&bytes, &local(v6), hardware);
        let _ = Message::new_checked(&bytes);
        let _ = message::data(&bytes);
    }

    #[test]
    fn damaged_frames_parse_as_the_slow_twin_says(
        v6 in any::<bool>(),
        (tagged, vlan) in (any::<bool>(), prop_oneof![Just(None), Just(Some(7)), Just(Some(8))]),
        is_priority in any::<bool>(),
        payload in proptest::collection::vec(any::<u8>(), 0..100),
        checksum in prop_oneof![Just(TxChecksum::Software), Just(TxChecksum::Absent)],
        edits in proptest::collection::vec((0_usize..90, any::<u8>()), 0..3),
        fix in any::<bool>(),
        cut in proptest::option::of(0_usize..120),
        padding in 0_usize..20,
    ) {
        let checksum = if v6 { TxChecksum::Software } else { checksum };
        let mut bytes = frame_with(v6, PORT + 3, &payload, checksum);
        if tagged {
            bytes.splice(12..12, [0x81, 0x00, 0x20, if is_priority { 0 } else { 7 }]);
        }
        for (at, value) in edits {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        // Makes the IPv4 checksum right again, so that the checks behind it are reached.
        let ip = if tagged { 18 } else { 14 };
        if fix && !v6 && bytes.len() >= ip + 20 {
            bytes[ip + 10..ip + 12].fill(0);
            let sum = !(ones_sum(&bytes[ip..ip + 20]) as u16);
            bytes[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        }
        bytes.resize(bytes.len() + padding, 0xaa);
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        agrees(&bytes, &Local { vlan, ..local(v6) })?;
    }

    /// Cut into buffers of any sizes, a frame is what it is in one.
    #[test]
    fn chains_parse_as_whole_frames(
        v6 in any::<bool>(),
        payload in proptest::collection::vec(any::<u8>(), 0..3000),
        (edit, value) in (0_usize..3000, any::<u8>()),
        cuts in proptest::collection::vec(62_usize..3000, 0..5),
        padding in 0_usize..20,
    ) {
        let mut bytes = frame_with(v6, PORT, &payload, TxChecksum::Software);
        if let Some(byte) = bytes.get_mut(edit) {
            *byte = value;
        }
        bytes.resize(bytes.len() + padding, 0xaa);
        let mut ends: Vec<usize> = cuts.into_iter().filter(|cut| *cut < bytes.len()).chain([bytes.len()]).collect();
        ends.sort_unstable();
        let mut begin = 0;
        let parts: Vec<&[u8]> = ends.into_iter().map(|end| &bytes[std::mem::replace(&mut begin, end)..end]).collect();
        let local = local(v6);
        let hardware = HardwareChecks::default();
        let whole = frame::parse(&bytes, &local, hardware);
        let chain = frame::parse_chain(parts[0], parts[1..].iter().copied(), bytes.len(), &local, hardware);
        prop_assert_eq!(chain, whole);
    }

    /// What is attached is as if it stood in the buffer; tags and marks come back.
    #[test]
    fn attached_payloads_and_tags_come_back(
        v6 in any::<bool>(), vlan in proptest::option::of(1_u16..4095), cut in 0_usize..1000,
        payload in proptest::collection::vec(any::<u8>(), 1000),
        ecn in prop_oneof![Just(Ecn::NotCapable), Just(Ecn::Ect0), Just(Ecn::Ect1), Just(Ecn::CongestionExperienced)],
    ) {
        let to = Peer { mac: OUR_MAC, ip: address(v6, 1), port: PORT };
        let sender = Local { vlan, ..remote(v6) };
        let headers = sender.header_bytes();
        let mut whole = vec![0; headers];
        whole.extend_from_slice(&payload);
        let mut cut_off = whole[..headers + cut].to_vec();
        let datagram = Outgoing { ecn, ..outgoing(to, 1000, TxChecksum::Software) };
        prop_assert_eq!(frame::emit_udp(&mut whole, &sender, &datagram), Ok(headers + 1000));
        let attached = Outgoing { attached: &payload[cut..], ..datagram };
        prop_assert_eq!(frame::emit_udp(&mut cut_off, &sender, &attached), Ok(headers + 1000));
        prop_assert_eq!(&[&cut_off[..], &payload[cut..]].concat(), &whole);
        let ours = Local { vlan, ..local(v6) };
        match frame::parse(&whole, &ours, HardwareChecks::default()) {
            Ok(Incoming::Datagram { marked, payload: range, .. }) => {
                prop_assert_eq!(marked, ecn == Ecn::CongestionExperienced);
                prop_assert_eq!(range, headers..headers + 1000);
            }
            other => prop_assert!(false, "{other:?}"),
        }
        let elsewhere = Local { vlan: if vlan == Some(9) { None } else { Some(9) }, ..ours };
        prop_assert_eq!(frame::parse(&whole, &elsewhere, HardwareChecks::default()), Err(DropReason::ForeignVlan));
    }

    #[test]
    fn emitted_frames_come_back(v6 in any::<bool>(), port in 0_u16..4, payload in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let bytes = frame_with(v6, PORT + port, &payload, TxChecksum::Software);
        agrees(&bytes, &local(v6))?;
        let incoming = frame::parse(&bytes, &local(v6), HardwareChecks::default()).unwrap();
        let Incoming::Datagram { from, to_port, payload: range, .. } = incoming else { panic!("a datagram") };
        prop_assert_eq!(from, Peer { mac: THEIR_MAC, ip: address(v6, 2), port: 9000 });
        prop_assert_eq!(to_port, PORT + port);
        prop_assert_eq!(&bytes[range], &payload[..]);
    }

    #[test]
    fn lookups_round_trip(request in any::<u32>(), keys in proptest::collection::vec(any::<[u8; 32]>(), 1..=40)) {
        let keys: Vec<Key> = keys.into_iter().map(Key).collect();
        let mut out = [0xee; 1500];
        let len = message::emit_lookup(&mut out, request, keys.iter()).unwrap();
        let Ok(Message::Lookup(lookup)) = Message::new_checked(&out[..len]) else { panic!("a lookup") };
        prop_assert_eq!(lookup.request, request);
        prop_assert!(lookup.keys().eq(keys.iter().copied()));
        prop_assert_eq!(message::emit_lookup(&mut out[..len - 1], request, keys.iter()), None);
    }

    #[test]
    fn replies_round_trip(
        request in any::<u32>(),
        epoch in any::<u64>(),
        entries in proptest::collection::vec(proptest::option::of((any::<[u32; 2]>(), any::<u64>(), 1_u16..=256, any::<[u16; 3]>(), any::<[u8; 2]>())), 1..=40),
    ) {
        let entries: Vec<Option<ChunkInfo>> = entries.into_iter().map(|entry| entry.map(|(a, b, tokens, c, d)| ChunkInfo {
            handle: a[0], header_bytes: a[1], chunk_bytes: b, tokens,
            layers: c[0], kv_heads: c[1], head_dim: c[2], dtype: d[0], codec: d[1],
        })).collect();
        let mut out = [0xee; 1500];
        let len = message::emit_lookup_reply(&mut out, request, epoch, entries.iter().copied()).unwrap();
        let Ok(Message::LookupReply(reply)) = Message::new_checked(&out[..len]) else { panic!("a reply") };
        prop_assert_eq!((reply.request, reply.epoch), (request, epoch));
        prop_assert!(reply.entries().eq(entries.iter().copied()));
    }

    #[test]
    fn pulls_round_trip(
        words in any::<[u32; 3]>(), longs in any::<[u64; 2]>(), segment_bytes in any::<u16>(), sequence in any::<u32>(),
        runs in proptest::collection::vec((any::<u32>(), any::<u16>()), 1..=64),
    ) {
        let range = PullRange { tag: words[0], handle: words[1], bytes: words[2], epoch: longs[0], offset: longs[1], segment_bytes };
        let runs: Vec<Run> = runs.into_iter().map(|(first, count)| Run { first, count }).collect();
        let mut out = [0xee; 1500];
        let len = message::emit_pull(&mut out, &range, 7, sequence, &runs).unwrap();
        let Ok(Message::Pull(pull)) = Message::new_checked(&out[..len]) else { panic!("a pull") };
        prop_assert_eq!((pull.range, pull.pace_mbps, pull.sequence), (range, 7, sequence));
        prop_assert!(pull.runs().eq(runs.iter().copied()));
    }

    #[test]
    fn data_round_trips(tag in any::<u32>(), segment in any::<u32>(), epoch in any::<u64>(), sequence in any::<u32>(), waited_ns in any::<u32>(), payload in proptest::collection::vec(any::<u8>(), 1..1448)) {
        let mut out = vec![0xee; message::DATA_HEADER_BYTES];
        message::emit_data_header(&mut out, &Data { tag, segment, epoch, sequence, waited_ns, payload: &[] }).unwrap();
        out.extend_from_slice(&payload);
        let data = message::data(&out).unwrap();
        prop_assert_eq!(data, Data { tag, segment, epoch, sequence, waited_ns, payload: &payload });
        prop_assert_eq!(Message::new_checked(&out), Ok(Message::Data(data)));
    }

    /// Of a header alone the same is read as of the whole message, and nothing of what is none.
    #[test]
    fn a_data_header_reads_as_the_whole_message(
        tag in any::<u32>(),
        segment in any::<u32>(),
        epoch in any::<u64>(),
        flip in 0_usize..message::DATA_HEADER_BYTES * 8,
        length in 0_usize..64,
    ) {
        let mut out = vec![0xee; 64];
        let head = Data { tag, segment, epoch, sequence: 7, waited_ns: 9, payload: &[] };
        message::emit_data_header(&mut out, &head).unwrap();
        for flipped in [false, true] {
            if flipped {
                out[flip / 8] ^= 1 << (flip % 8);
            }
            let whole = message::data(&out).map(|data| Data { payload: &[], ..data });
            prop_assert_eq!(message::data_header(&out[..message::DATA_HEADER_BYTES]), whole);
            let other = message::data_header(&out[..length]);
            prop_assert!(other.is_none() || length == message::DATA_HEADER_BYTES);
        }
    }
}

/// Every single-bit flip of a frame is dropped under a reason, or did not touch what we rely on: the source MAC address,
/// which nothing protects, or a UDP checksum of one bit that became "no checksum".
#[test]
fn every_bit_flip_is_dropped_or_harmless() {
    let payloads: [&[u8]; 3] = [b"", b"a message of some length", &[0xff; 33]];
    for (v6, payload) in [false, true].into_iter().flat_map(|v6| payloads.map(|payload| (v6, payload))) {
        let good = frame_with(v6, PORT, payload, TxChecksum::Software);
        let intact = frame::parse(&good, &local(v6), HardwareChecks::default()).unwrap();
        let Incoming::Datagram { from, to_port, payload: range, .. } = intact else { panic!("a datagram") };
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // IPv6 protects neither traffic class, flow label nor hop limit, which we do not read.
            let unprotected_v6 = v6 && (matches!(bit / 8, 15..=17 | 21) || (bit / 8 == 14 && bit % 8 < 4));
            match frame::parse(&bad, &local(v6), HardwareChecks::default()) {
                Err(_) => assert!(!(6..12).contains(&(bit / 8)), "the source MAC address is not checked"),
                Ok(Incoming::Datagram { from: flipped, to_port: port, payload: place, .. }) => {
                    assert_eq!((port, &bad[place]), (to_port, payload), "bit {bit}");
                    assert_eq!((flipped.ip, flipped.port), (from.ip, from.port), "bit {bit}");
                    let checksum = range.start - 2..range.start;
                    let absent = bad[checksum.clone()] == [0, 0] && checksum.contains(&(bit / 8));
                    assert!(
                        (6..12).contains(&(bit / 8)) || absent || unprotected_v6,
                        "bit {bit} of {good:x?}"
                    );
                }
                Ok(other) => panic!("bit {bit} made a datagram into {other:?}"),
            }
        }
    }
}

#[test]
fn each_defect_has_its_reason() {
    use DropReason as R;
    let good = frame_with(false, PORT, b"hello, world", TxChecksum::Software);
    let good6 = frame_with(true, PORT, b"hello, world", TxChecksum::Software);
    let fixed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes[24..26].fill(0);
        let sum = !(ones_sum(&bytes[14..34]) as u16);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        bytes
    };
    let edited = |frame: &[u8], at: usize, value: u8| {
        let mut bytes = frame.to_vec();
        bytes[at] = value;
        bytes
    };
    let cases: Vec<(Vec<u8>, DropReason)> = vec![
        (good[..13].to_vec(), R::Truncated),
        (good[..33].to_vec(), R::Truncated),
        (good[..50].to_vec(), R::BadIpLength),
        (edited(&good, 12, 0x88), R::ForeignEthertype),
        (edited(&good, 5, 0x11), R::ForeignMac),
        (edited(&good, 14, 0x55), R::BadIpVersion),
        (edited(&good, 14, 0x46), R::IpOptions),
        (edited(&good, 22, 63), R::BadIpChecksum),
        (fixed(17, 19), R::BadIpLength),
        (fixed(20, 0x20), R::Fragment),
        (fixed(21, 1), R::Fragment),
        (fixed(23, 6), R::ForeignProtocol),
        (fixed(26, 0xe0), R::ForeignIp),
        (fixed(33, 9), R::ForeignIp),
        (fixed(17, 39), R::BadUdpLength),
        (edited(&good, 39, 21), R::BadUdpLength),
        (edited(&good, 45, 0), R::BadUdpChecksum),
        (frame_with(false, PORT + 4, b"x", TxChecksum::Software), R::ForeignPort),
        (frame_with(false, PORT - 1, b"x", TxChecksum::Software), R::ForeignPort),
        (good6[..53].to_vec(), R::Truncated),
        (good6[..60].to_vec(), R::BadIpLength),
        (edited(&good6, 20, 44), R::Fragment),
        (edited(&good6, 20, 0), R::ForeignProtocol),
        (edited(&good6, 20, 58), R::BadIcmp),
        (fixed(23, 1), R::BadIcmp),
        ([&good[..12], &[0x81, 0, 0, 5], &good[12..]].concat(), R::ForeignVlan),
        ([&good[..12], &[0x81, 0], &good[12..13]].concat(), R::Truncated),
        (edited(&good6, 14, 0x40), R::BadIpVersion),
        (edited(&good6, 53, 9), R::ForeignIp),
        (edited(&good6, 22, 0xff), R::ForeignIp),
    ];
    for (at, (bytes, reason)) in cases.iter().enumerate() {
        let v6 = bytes.get(12) == Some(&0x86);
        assert_eq!(frame::parse(bytes, &local(v6), HardwareChecks::default()), Err(*reason), "case {at}");
    }
    // No checksum is fine over IPv4 only, whatever the hardware says.
    let trusting = HardwareChecks { ip_good: true, udp_good: true };
    let mut absent = good6.clone();
    absent[60..62].fill(0);
    for hardware in [HardwareChecks::default(), trusting] {
        assert_eq!(frame::parse(&absent, &local(true), hardware), Err(R::BadUdpChecksum));
        let frame = frame_with(false, PORT, b"x", TxChecksum::Absent);
        assert!(frame::parse(&frame, &local(false), hardware).is_ok());
    }
    // What the hardware has verified is not verified again.
    assert!(frame::parse(&edited(&edited(&good, 22, 63), 45, 0), &local(false), trusting).is_ok());
}

#[test]
fn hardware_checksums_get_the_pseudo_header() {
    let payload = b"payload of odd length";
    let software = frame_with(false, PORT, payload, TxChecksum::Software);
    let mut hardware = frame_with(false, PORT, payload, TxChecksum::Hardware);
    assert_eq!(hardware[24..26], [0, 0], "the device fills the IPv4 checksum");
    // What a device does: sum the datagram, the field included, and put the complement there.
    let sum = !(ones_sum(&hardware[34..]) as u16);
    hardware[40..42].copy_from_slice(&sum.to_be_bytes());
    let sum = !(ones_sum(&hardware[14..34]) as u16);
    hardware[24..26].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(hardware, software);
}

#[test]
fn frames_that_cannot_be_are_refused() {
    let to = Peer { mac: OUR_MAC, ip: address(false, 1), port: PORT };
    let to6 = Peer { ip: address(true, 1), ..to };
    let mut buf = [0; 2000];
    let mut emit = |len: usize, v6, to: &Peer, bytes, checksum| {
        frame::emit_udp(&mut buf[..len], &remote(v6), &outgoing(*to, bytes, checksum))
    };
    assert_eq!(emit(100, false, &to, 59, TxChecksum::Software), Err(EmitError::ShortBuffer));
    assert_eq!(emit(101, false, &to, 59, TxChecksum::Software), Ok(101));
    assert_eq!(emit(42, false, &to, 59, TxChecksum::Hardware), Ok(101));
    assert_eq!(emit(41, false, &to, 0, TxChecksum::Hardware), Err(EmitError::ShortBuffer));
    assert_eq!(emit(2000, false, &to, 65_508, TxChecksum::Hardware), Err(EmitError::TooLong(65_508)));
    assert_eq!(emit(2000, false, &to, usize::MAX, TxChecksum::Hardware), Err(EmitError::TooLong(usize::MAX)));
    assert_eq!(emit(2000, true, &to, 1, TxChecksum::Hardware), Err(EmitError::MixedIpVersions));
    assert_eq!(emit(2000, true, &to6, 1, TxChecksum::Absent), Err(EmitError::ChecksumNeeded));
    assert_eq!(frame::max_segment_bytes(1500, &to.ip), 1440);
    assert_eq!(frame::max_segment_bytes(1500, &to6.ip), 1408);
    assert_eq!(frame::max_segment_bytes(60, &to.ip), 0);
}

#[test]
fn arp_round_trips_and_foreign_arp_is_dropped() {
    let ours = Ipv4Addr::new(10, 0, 0, 1);
    let theirs = Ipv4Addr::new(10, 0, 0, 2);
    for operation in [Operation::Request, Operation::Reply] {
        let arp =
            Arp { operation, sender_mac: THEIR_MAC, sender_ip: theirs, target_mac: OUR_MAC, target_ip: ours };
        let mut out = [0xee; 60];
        assert_eq!(arp.emit_frame(&mut out, OUR_MAC, None), Some(60));
        assert_eq!(arp.emit_frame(&mut out[..59], OUR_MAC, None), None);
        let incoming = frame::parse(&out, &local(false), HardwareChecks::default()).unwrap();
        let expected = match operation {
            Operation::Request => {
                Incoming::NeighbourRequest { sender_mac: THEIR_MAC, sender_ip: theirs.into() }
            }
            Operation::Reply => {
                Incoming::NeighbourReply { mac: THEIR_MAC, ip: theirs.into(), overrides: true }
            }
        };
        assert_eq!(incoming, expected);
        let parse = |bytes: &[u8]| frame::parse(bytes, &local(false), HardwareChecks::default());
        let edited = |at: usize, value: u8| {
            let mut bytes = out;
            bytes[at] = value;
            bytes
        };
        assert_eq!(parse(&edited(41, 9)), Err(DropReason::ForeignIp));
        assert_eq!(parse(&edited(5, 9)), Err(DropReason::ForeignMac));
        assert_eq!(parse(&edited(21, 9)), Err(DropReason::BadArp));
        assert_eq!(parse(&edited(22, 3)), Err(DropReason::BadArp), "a multicast sender");
        assert_eq!(parse(&out[..41]), Err(DropReason::Truncated));
    }
}

/// Each message with each field out of range, and with one byte less or more.
#[test]
fn malformed_messages_are_dropped_under_their_reason() {
    use DropReason as R;
    let mut lookup = [0; 2000];
    let len = message::emit_lookup(&mut lookup, 1, [Key([7; 32]); 2].iter()).unwrap();
    let lookup = &lookup[..len];
    let mut reply = [0; 2000];
    let info = ChunkInfo { tokens: 256, ..ChunkInfo::default() };
    let len = message::emit_lookup_reply(&mut reply, 1, 2, [Some(info), None].into_iter()).unwrap();
    let reply = &reply[..len];
    let mut pull = [0; 2000];
    let range = PullRange { tag: 1, handle: 2, epoch: 3, offset: 4, bytes: 5, segment_bytes: 32 };
    let len = message::emit_pull(&mut pull, &range, 0, 1, &[Run { first: 0, count: 1 }]).unwrap();
    let pull = &pull[..len];
    let mut error = [0; message::ERROR_BYTES];
    let refusal = Refusal::of_pull(1, 3, ErrorCode::StaleEpoch, 2);
    assert_eq!(message::emit_error(&mut error, &refusal), Some(message::ERROR_BYTES));
    assert_eq!(Message::new_checked(&error), Ok(Message::Error(refusal)));
    let edited = |bytes: &[u8], at: usize, value: u8| {
        let mut bytes = bytes.to_vec();
        bytes[at] = value;
        bytes
    };
    for subject in [Subject::Pull, Subject::Lookup] {
        let busy = Refusal { subject, retry_us: 0x12_3456, ..Refusal::of_pull(9, 8, ErrorCode::Busy, 2) };
        let mut bytes = [0; message::ERROR_BYTES];
        message::emit_error(&mut bytes, &busy).unwrap();
        assert_eq!(Message::new_checked(&bytes), Ok(Message::Error(busy)));
    }
    let mut probe = [0xee; 100];
    let sent = Probe { id: 7, bytes: 100, epoch: 0 };
    assert_eq!(message::emit_probe(&mut probe[..99], &sent, false), None);
    assert_eq!(message::emit_probe(&mut probe, &Probe { bytes: 23, ..sent }, false), None);
    assert_eq!(message::emit_probe(&mut probe, &sent, true), Some(100));
    assert_eq!(Message::new_checked(&probe), Ok(Message::ProbeReply(sent)));
    assert_eq!(message::emit_probe(&mut probe, &sent, false), Some(100));
    assert_eq!(Message::new_checked(&probe), Ok(Message::Probe(sent)));
    for good in [lookup, reply, pull, &error[..], &probe[..]] {
        assert!(Message::new_checked(good).is_ok());
        let longer = [good, &[0]].concat();
        assert_eq!(Message::new_checked(&longer), Err(R::BadLength));
        for len in 0..good.len() {
            let why = Message::new_checked(&good[..len]).unwrap_err();
            assert!(matches!(why, R::Truncated | R::BadLength), "{why:?}");
        }
        assert_eq!(Message::new_checked(&edited(good, 0, 0)), Err(R::BadMagic));
        assert_eq!(Message::new_checked(&edited(good, 4, 2)), Err(R::BadVersion));
        assert_eq!(Message::new_checked(&edited(good, 5, 0)), Err(R::BadType));
        assert_eq!(Message::new_checked(&edited(good, 5, 8)), Err(R::BadType));
        assert_eq!(Message::new_checked(&edited(good, 7, 1)), Err(R::BadFlags));
    }
    let cases = [
        (edited(lookup, 12, 0), R::BadLength),
        (edited(lookup, 12, 3), R::BadLength),
        (edited(lookup, 15, 1), R::BadFlags),
        (edited(reply, 12, 1), R::BadLength),
        (edited(reply, 14, 1), R::BadFlags),
        (edited(reply, 24 + 26, 2), R::BadField),
        (edited(reply, 24 + 31, 1), R::BadFlags),
        (edited(reply, 24 + 16, 1), R::BadField),
        (edited(pull, 38, 0), R::BadLength),
        (edited(pull, 38, 2), R::BadLength),
        (edited(pull, 54, 1), R::BadFlags),
        (edited(&error, 12, 0), R::BadField),
        (edited(&error, 12, 6), R::BadField),
        (edited(&error, 13, 1), R::BadField),
        (edited(&error, 13, 2), R::BadField),
        (edited(&error, 15, 1), R::BadFlags),
        (edited(&error, 28, 1), R::BadFlags),
        (edited(&probe, 14, 1), R::BadFlags),
        (edited(&probe, 12, 99), R::BadLength),
    ];
    for (at, (bytes, reason)) in cases.iter().enumerate() {
        assert_eq!(Message::new_checked(bytes), Err(*reason), "case {at}");
    }
    let mut empty = [0; message::DATA_HEADER_BYTES];
    let head = Data { tag: 1, segment: 2, epoch: 3, sequence: 4, waited_ns: 5, payload: &[] };
    message::emit_data_header(&mut empty, &head).unwrap();
    assert_eq!(Message::new_checked(&empty), Err(R::BadLength));
    let mut out = [0; 4000];
    let many = [Key([0; 32]); 41];
    assert_eq!(message::emit_lookup(&mut out, 1, many.iter()), None);
    assert_eq!(message::emit_lookup(&mut out, 1, [].iter()), None);
    assert_eq!(message::emit_pull(&mut out, &range, 0, 1, &[]), None);
    assert_eq!(message::emit_pull(&mut out, &range, 0, 1, &[Run::default(); 65]), None);
}
