//! Packets that somebody hostile, broken or lost would send: each made from one of the store's, each with the reason
//! for which it must be dropped where that follows from its bytes alone.

use protocol::reason::DropReason::{self, *};
use protocol::wire::message::{self, MessageType};

use super::frames::{self, HEADERS, seal, seal_ip, tagged, with_payload};
use super::random::Random;

/// A forged packet, and why it must be dropped; `None` if that depends on what is under way.
pub(crate) type Forged = (Vec<u8>, Option<DropReason>);

type Forge = fn(&mut Random, &[u8]) -> Forged;

/// A right packet with `bytes` written over it at `at`, and checksums made right again.
fn patched(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    seal(&mut frame);
    frame
}

fn raw(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

fn ip(frame: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = raw(frame, at, bytes);
    seal_ip(&mut frame);
    frame
}

fn message(frame: &[u8], kind: MessageType, rest: &[u8]) -> Vec<u8> {
    let start = [&message::MAGIC[..], &[message::VERSION, kind as u8, 0, 0], rest].concat();
    with_payload(frame, &start)
}

/// A number that is no tag and no request of the data plane: its slot is beyond every table.
fn nobody(random: &mut Random) -> [u8; 4] {
    let [a, b, ..] = random.next().to_le_bytes();
    [a, 0xff, b, 0x55]
}

/// A message of `kind` that names nothing under way.
fn stray(random: &mut Random, frame: &[u8], kind: MessageType, rest: &[u8]) -> Vec<u8> {
    let number = nobody(random);
    message(frame, kind, &[&number, rest].concat())
}

fn ipv6(random: &mut Random, frame: &[u8], next_header: u8) -> Vec<u8> {
    let payload = &frame[HEADERS - 8..];
    let mut bytes = [&frame[..12], &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    bytes.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(&[next_header, 64, 0xfd]);
    bytes.extend((0..31).map(|_| random.byte()));
    bytes.extend_from_slice(payload);
    bytes
}

/// An ICMP message of this type and code from the network of `frame`.
fn icmp(frame: &[u8], kind: [u8; 2], rest: &[u8]) -> Vec<u8> {
    let mut message = [&kind[..], &[0, 0], &[0; 4], rest].concat();
    let sum = frames::checksum(&[&message]);
    message[2..4].copy_from_slice(&sum);
    let mut bytes = [&frame[..HEADERS - 8], &message].concat();
    let total = u16::try_from(bytes.len() - 14).unwrap().to_be_bytes();
    bytes[16..18].copy_from_slice(&total);
    bytes[23] = 1;
    seal_ip(&mut bytes);
    bytes
}

/// The beginning of a packet of the data plane, as an error about it would quote it: that to which `frame` is the answer.
fn quote_of(frame: &[u8]) -> Vec<u8> {
    let mut quote = frame[14..HEADERS].to_vec();
    quote[12..16].copy_from_slice(&frame[30..34]);
    quote[16..20].copy_from_slice(&frame[26..30]);
    quote[20..22].copy_from_slice(&frame[36..38]);
    quote[22..24].copy_from_slice(&frame[34..36]);
    quote
}

fn arp(frame: &[u8], operation: u8, sender_mac: [u8; 6], target_ip: [u8; 4]) -> Vec<u8> {
    let mut bytes = frame[..12].to_vec();
    bytes.extend_from_slice(&[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, operation]);
    bytes.extend_from_slice(&sender_mac);
    bytes.extend_from_slice(&[10, 98, 0, 77]);
    bytes.extend_from_slice(&frame[..6]);
    bytes.extend_from_slice(&target_ip);
    bytes.resize(60, 0);
    bytes
}

fn reply(frame: &[u8], number: [u8; 4], at: usize, byte: u8) -> Vec<u8> {
    let mut rest = [&number[..], &[1, 0, 0, 0], &7_u64.to_le_bytes(), &[0; 32]].concat();
    rest[16] = 9;
    rest[32] = 1;
    rest[42] = 1;
    rest[at] = byte;
    message(frame, MessageType::LookupReply, &rest)
}

const OTHER_MAC: [u8; 6] = [2, 0xee, 1, 2, 3, 4];

/// One of each kind.
pub(crate) const FORGERIES: &[(&str, Forge)] = &[
    ("cut anywhere", |random, frame| (frame[..random.below(frame.len())].to_vec(), None)),
    ("one bit flipped", |random, frame| {
        let mut bytes = frame.to_vec();
        let bit = random.below(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        // All but a flip in the sender's MAC address breaks a check.
        (bytes, None)
    }),
    ("noise", |random, frame| ((0..frame.len()).map(|_| random.byte()).collect(), None)),
    ("noise behind right headers", |random, frame| {
        let noise: Vec<u8> = (0..random.below(200) + 8).map(|_| random.byte()).collect();
        (with_payload(frame, &noise), Some(BadMagic))
    }),
    ("payload flipped under the old checksum", |random, frame| {
        let mut bytes = frame.to_vec();
        bytes[HEADERS + random.below(frame.len() - HEADERS)] ^= 1 << random.below(8);
        (bytes, Some(BadUdpChecksum))
    }),
    ("other MAC", |_, frame| (raw(frame, 0, &OTHER_MAC), Some(ForeignMac))),
    ("broadcast MAC", |_, frame| (raw(frame, 0, &[0xff; 6]), Some(ForeignMac))),
    ("other IP", |random, frame| (patched(frame, 30, &[10, 98, 0, random.byte() | 0x80]), Some(ForeignIp))),
    ("from multicast", |_, frame| (patched(frame, 26, &[224, 0, 0, 1]), Some(ForeignIp))),
    ("from nowhere", |_, frame| (patched(frame, 26, &[0; 4]), Some(ForeignIp))),
    ("other port", |random, frame| (patched(frame, 36, &[0x11, random.byte()]), Some(ForeignPort))),
    ("unknown address", |random, frame| {
        (patched(frame, 26, &[10, 98, 0, random.byte() | 0x80]), Some(UnknownPeer))
    }),
    ("unknown source port", |random, frame| (patched(frame, 34, &[0x11, random.byte()]), Some(UnknownPeer))),
    ("other ethertype", |random, frame| (raw(frame, 12, &[0x88, random.byte()]), Some(ForeignEthertype))),
    ("two VLAN tags", |_, frame| (tagged(&tagged(frame, 0), 0), Some(ForeignEthertype))),
    ("cut in its VLAN tag", |_, frame| (tagged(frame, 0)[..16].to_vec(), Some(Truncated))),
    ("another VLAN", |random, frame| {
        let vlan = u8::try_from(random.below(255) + 1).unwrap();
        (tagged(frame, vlan), Some(ForeignVlan))
    }),
    ("ICMP that is none", |_, frame| (ip(frame, 23, &[1]), Some(BadIcmp))),
    ("ping", |_, frame| (icmp(frame, [8, 0], b"are you there?"), Some(ForeignIcmp))),
    ("error about nothing", |_, frame| (icmp(frame, [3, 3], &[]), Some(BadIcmp))),
    ("error about a packet of somebody else", |random, frame| {
        let mut quote = quote_of(frame);
        quote[12 + random.below(4)] ^= random.change();
        (icmp(frame, [3, 3], &quote), Some(ForeignIcmp))
    }),
    ("error about a port that is not ours", |random, frame| {
        let mut quote = quote_of(frame);
        quote[20] ^= random.change();
        (icmp(frame, [3, 3], &quote), Some(ForeignIcmp))
    }),
    ("error about TCP", |_, frame| {
        let mut quote = quote_of(frame);
        quote[9] = 6;
        (icmp(frame, [3, 1], &quote), Some(ForeignIcmp))
    }),
    ("error with a short quote", |random, frame| {
        (icmp(frame, [3, 4], &quote_of(frame)[..random.below(24)]), Some(BadIcmp))
    }),
    ("error about a packet to another store", |random, frame| {
        let mut quote = quote_of(frame);
        quote[19] = random.byte() | 0x80;
        (icmp(frame, [3, *random.pick(&[0, 1, 3, 4, 13])], &quote), None)
    }),
    ("error about a request that nobody sent", |random, frame| {
        let rest: Vec<u8> = (0..64).map(|_| random.byte()).collect();
        let kind = *random.pick(&[MessageType::Lookup, MessageType::Pull]);
        let made_up = message(frame, kind, &rest);
        let quote = [&quote_of(frame)[..], &made_up[HEADERS..]].concat();
        (icmp(frame, [3, *random.pick(&[0, 1, 3, 13])], &quote), None)
    }),
    ("a tiny MTU", |_, frame| (icmp(frame, [3, 4], &quote_of(frame)), None)),
    ("neighbour discovery", |random, frame| {
        let mut bytes = ipv6(random, frame, 58);
        bytes[..6].copy_from_slice(&[0x33, 0x33, 0xff, 98, 0, 2]);
        (bytes, Some(ForeignMac))
    }),
    ("TCP", |_, frame| (ip(frame, 23, &[6]), Some(ForeignProtocol))),
    ("IPv6", |random, frame| (ipv6(random, frame, 17), Some(ForeignIp))),
    ("IPv6 with options", |random, frame| (ipv6(random, frame, 0), Some(ForeignProtocol))),
    ("IPv6 fragment", |random, frame| (ipv6(random, frame, 44), Some(Fragment))),
    ("IPv6 by its ethertype only", |_, frame| (raw(frame, 12, &[0x86, 0xdd]), Some(BadIpVersion))),
    ("more fragments", |_, frame| (ip(frame, 20, &[0x20, 0]), Some(Fragment))),
    ("later fragment", |random, frame| (ip(frame, 20, &[0, random.change()]), Some(Fragment))),
    ("IP version", |_, frame| (ip(frame, 14, &[0x65]), Some(BadIpVersion))),
    ("IP options", |_, frame| (ip(frame, 14, &[0x46]), Some(IpOptions))),
    ("short IP header", |_, frame| (ip(frame, 14, &[0x43]), Some(IpOptions))),
    ("IP checksum", |random, frame| (raw(frame, 24, &[frame[24] ^ random.change()]), Some(BadIpChecksum))),
    ("IP longer than the frame", |_, frame| (ip(frame, 16, &[0xff, 0xff]), Some(BadIpLength))),
    ("IP shorter than its header", |random, frame| {
        (ip(frame, 16, &[0, u8::try_from(random.below(20)).unwrap()]), Some(BadIpLength))
    }),
    ("IP without UDP header", |_, frame| (ip(frame, 16, &[0, 27]), Some(Truncated))),
    ("UDP length", |random, frame| (raw(frame, 38, &[frame[38] ^ random.change()]), Some(BadUdpLength))),
    ("UDP checksum", |random, frame| {
        let mut bytes = raw(frame, 40, &[frame[40] ^ random.change()]);
        // Zero would mean that there is none, and ones are another zero.
        if matches!(bytes[40..42], [0, 0] | [0xff, 0xff]) {
            bytes[41] ^= 0x10;
        }
        (bytes, Some(BadUdpChecksum))
    }),
    ("short message", |random, frame| {
        let message = &frame[HEADERS..];
        (with_payload(frame, &message[..random.below(message.len().min(24))]), Some(Truncated))
    }),
    ("no message", |_, frame| (with_payload(frame, &[]), Some(Truncated))),
    ("magic", |random, frame| {
        (patched(frame, HEADERS + 1, &[frame[HEADERS + 1] ^ random.change()]), Some(BadMagic))
    }),
    ("version", |random, frame| (patched(frame, HEADERS + 4, &[1 ^ random.change()]), Some(BadVersion))),
    ("type", |random, frame| (patched(frame, HEADERS + 5, &[random.byte() & 0xf8]), Some(BadType))),
    ("flags", |random, frame| {
        (patched(frame, HEADERS + 6 + random.below(2), &[random.change()]), Some(BadFlags))
    }),
    ("a LOOKUP", |random, frame| {
        let rest = [&[1, 0, 0, 0][..], &[7; 32]].concat();
        (stray(random, frame, MessageType::Lookup, &rest), Some(BadType))
    }),
    ("a PULL", |random, frame| {
        let rest = [&[0; 26][..], &[1, 0], &[0; 8], &[0, 0, 0, 0, 1, 0, 0, 0]].concat();
        (stray(random, frame, MessageType::Pull, &rest), Some(BadType))
    }),
    ("DATA of an unknown tag", |random, frame| {
        let rest = [&[0; 20][..], &[5; 64]].concat();
        (stray(random, frame, MessageType::Data, &rest), Some(Stale))
    }),
    ("DATA without data", |random, frame| {
        (stray(random, frame, MessageType::Data, &[0; 20]), Some(BadLength))
    }),
    ("ERROR of an unknown tag", |random, frame| {
        let code = u8::try_from(random.below(5) + 1).unwrap();
        let rest = [&[code, 0, 0, 0][..], &[0; 16]].concat();
        (stray(random, frame, MessageType::Error, &rest), Some(Stale))
    }),
    ("ERROR with an unknown code", |random, frame| {
        let rest = [&[*random.pick(&[0, 6, 77, 255]), 0, 0, 0][..], &[0; 16]].concat();
        (stray(random, frame, MessageType::Error, &rest), Some(BadField))
    }),
    ("ERROR with reserved bytes", |random, frame| {
        let rest = [&[1, 0, 1, 0][..], &[0; 16]].concat();
        (stray(random, frame, MessageType::Error, &rest), Some(BadFlags))
    }),
    ("ERROR for a LOOKUP that is not busy", |random, frame| {
        (stray(random, frame, MessageType::Error, &[&[1, 1][..], &[0; 18]].concat()), Some(BadField))
    }),
    ("a PROBE", |random, frame| {
        let rest = [&[52, 0, 0, 0][..], &[0; 36]].concat();
        (stray(random, frame, MessageType::Probe, &rest), Some(BadType))
    }),
    ("a PROBE_REPLY that nobody waits for", |random, frame| {
        let rest = [&[52, 0, 0, 0][..], &[0; 36]].concat();
        (stray(random, frame, MessageType::ProbeReply, &rest), Some(Stale))
    }),
    ("ERROR with a tail", |random, frame| {
        (stray(random, frame, MessageType::Error, &[1; 21]), Some(BadLength))
    }),
    ("reply to an unknown request", |random, frame| {
        let number = nobody(random);
        (reply(frame, number, 42, 1), Some(Stale))
    }),
    ("reply with a count that is not its own", |random, frame| {
        let number = nobody(random);
        (reply(frame, number, 4, *random.pick(&[0, 2, 41, 255])), Some(BadLength))
    }),
    ("reply with reserved bytes", |random, frame| {
        let number = nobody(random);
        (reply(frame, number, *random.pick(&[6, 43, 47]), 1), Some(BadFlags))
    }),
    ("reply with impossible tokens", |random, frame| {
        let number = nobody(random);
        (reply(frame, number, 33, 2), Some(BadField))
    }),
    ("reply with another found", |random, frame| {
        let number = nobody(random);
        (reply(frame, number, 42, 2), Some(BadField))
    }),
    ("ARP for another", |_, frame| (arp(frame, 1, OTHER_MAC, [10, 98, 0, 200]), Some(ForeignIp))),
    ("ARP to another", |_, frame| {
        let mut bytes = arp(frame, 1, OTHER_MAC, [frame[30], frame[31], frame[32], frame[33]]);
        bytes[..6].copy_from_slice(&OTHER_MAC);
        (bytes, Some(ForeignMac))
    }),
    ("ARP from a group", |_, frame| (arp(frame, 1, [1, 0, 0, 0, 0, 1], [10, 98, 0, 2]), Some(BadArp))),
    ("ARP of another kind", |_, frame| (arp(frame, 3, OTHER_MAC, [10, 98, 0, 2]), Some(BadArp))),
    ("cut ARP", |_, frame| (arp(frame, 1, OTHER_MAC, [10, 98, 0, 2])[..30].to_vec(), Some(Truncated))),
    ("ARP reply of a stranger", |_, frame| {
        (arp(frame, 2, OTHER_MAC, [frame[30], frame[31], frame[32], frame[33]]), None)
    }),
    ("ARP request of a stranger", |_, frame| {
        (arp(frame, 1, OTHER_MAC, [frame[30], frame[31], frame[32], frame[33]]), None)
    }),
];

/// From a DATA message of something under way: what is wrong with each is seen only by who knows what was asked for.
pub(crate) const DATA_FORGERIES: &[(&str, Forge)] = &[
    ("old epoch", |random, frame| {
        (patched(frame, HEADERS + 16, &[frame[HEADERS + 16] ^ random.change()]), None)
    }),
    ("segment beyond the range", |random, frame| (patched(frame, HEADERS + 13, &[random.change()]), None)),
    ("last segment there can be", |_, frame| (patched(frame, HEADERS + 12, &[0xff; 4]), None)),
    ("tag of a later generation", |_, frame| {
        (patched(frame, HEADERS + 11, &[frame[HEADERS + 11] ^ 0x80]), None)
    }),
    ("longer than its segment", |random, frame| {
        let tail = vec![0; random.below(64) + 1];
        (with_payload(frame, &[&frame[HEADERS..], &tail].concat()), None)
    }),
    ("shorter than its segment", |random, frame| {
        let message = &frame[HEADERS..];
        (with_payload(frame, &message[..33 + random.below(message.len() - 33)]), None)
    }),
    ("ERROR: busy", |_, frame| {
        let rest = [&frame[HEADERS + 8..HEADERS + 12], &[5, 0, 0, 0], &[1; 8], &[0; 4], &[7; 4]].concat();
        (message(frame, MessageType::Error, &rest), None)
    }),
];

/// An ERROR for the tag `number`.
pub(crate) fn error_message(number: &[u8], code: u8) -> Vec<u8> {
    let start = [&message::MAGIC[..], &[message::VERSION, MessageType::Error as u8, 0, 0]].concat();
    [&start, number, &[code, 0, 0, 0], &[1; 8], &[0; 8]].concat()
}

/// An ERROR for the range that a DATA message belongs to.
pub(crate) fn error_for(frame: &[u8], code: u8) -> Vec<u8> {
    with_payload(frame, &error_message(&frame[HEADERS + 8..HEADERS + 12], code))
}
