//! The store's engine by itself: what it answers, what it refuses, what it drops.
#![allow(clippy::cast_possible_truncation, reason = "numbers of the tests are small")]

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;
use protocol::wire::message::{self, Data, ErrorCode, Message, Probe, PullRange, Run, Subject};
use protocol::{ChunkInfo, ChunkSource, DropReason, Instant, Key, Peer, ServeConfig, ServeEngine};

struct Shelf(Vec<u8>);

const KEY: Key = Key([9; 32]);
const EPOCH: u64 = 77;

impl Shelf {
    fn bytes(&self, handle: u32) -> Option<&[u8]> {
        (handle == 3).then_some(&self.0)
    }
}

impl ChunkSource for Shelf {
    fn find(&self, key: &Key) -> Option<ChunkInfo> {
        (*key == KEY).then(|| ChunkInfo {
            handle: 3,
            chunk_bytes: self.0.len() as u64,
            tokens: 256,
            ..Default::default()
        })
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        self.bytes(handle).map(|bytes| bytes.len() as u64)
    }
}

fn peer() -> Peer {
    Peer { mac: [2; 6], ip: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 9 }
}

fn config() -> ServeConfig {
    ServeConfig {
        epoch: EPOCH,
        max_pending_pulls: 4,
        max_pending_bytes: 4000,
        max_pending_replies: 2,
        max_requesters: 8,
        turn_bytes: 2048,
        max_segment_bytes: 128,
        max_pull_segments: 16,
    }
}

fn engine() -> ServeEngine {
    ServeEngine::new(config())
}

fn pull(range: &PullRange, runs: &[Run]) -> Vec<u8> {
    let mut out = [0; 1400];
    let len = message::emit_pull(&mut out, range, 0, 77, runs).unwrap();
    out[..len].to_vec()
}

const RANGE: PullRange =
    PullRange { tag: 5, handle: 3, epoch: EPOCH, offset: 10, bytes: 300, segment_bytes: 64 };
const ONE: Run = Run { first: 0, count: 1 };
/// Three times this is more than half of what may wait.
const ALL_OF_960: Run = Run { first: 0, count: 8 };

/// All that the engine has to say: segments as (number, bytes), and error codes.
fn drain(engine: &mut ServeEngine, shelf: &Shelf) -> (Vec<(u32, Vec<u8>)>, Vec<ErrorCode>) {
    let (mut segments, mut errors) = (Vec::new(), Vec::new());
    let mut out = [0; 1400];
    while let Some(transmit) = engine.poll_transmit(Instant::ZERO, &mut out) {
        assert_eq!(transmit.to, peer());
        let mut bytes = out[..transmit.header_bytes].to_vec();
        if let Some((handle, range)) = transmit.payload {
            bytes.extend_from_slice(&shelf.bytes(handle).unwrap()[range]);
        }
        match Message::new_checked(&bytes).unwrap() {
            Message::Data(data) => {
                assert_eq!((data.tag, data.epoch, data.sequence), (5, EPOCH, 77));
                segments.push((data.segment, data.payload.to_vec()));
            }
            Message::Error(refusal) => {
                assert_eq!((refusal.tag, refusal.epoch, refusal.sequence), (5, EPOCH, 77));
                errors.push(refusal.code);
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert!(engine.idle());
    (segments, errors)
}

#[test]
fn what_is_asked_is_what_is_sent() {
    let shelf = Shelf((0..=255).cycle().take(1000).collect());
    let mut engine = engine();
    let runs = [Run { first: 4, count: 1 }, Run { first: 1, count: 2 }];
    engine.handle_datagram(Instant::ZERO, peer(), &pull(&RANGE, &runs), &shelf).unwrap();
    let (segments, errors) = drain(&mut engine, &shelf);
    let expected = [(4, 266..310), (1, 74..138), (2, 138..202)];
    let expected: Vec<_> =
        expected.into_iter().map(|(segment, range)| (segment, shelf.0[range].to_vec())).collect();
    assert_eq!(segments, expected);
    assert_eq!(errors, []);
    assert_eq!(engine.counters().segments, 3);
    assert_eq!(engine.counters().payload_bytes, 44 + 128);
}

#[test]
fn requests_that_cannot_be_served_are_refused_with_the_reason() {
    let shelf = Shelf(vec![0; 1000]);
    let long = [Run { first: 0, count: 17 }];
    let cases: [(PullRange, &[Run], ErrorCode); 14] = [
        (PullRange { epoch: 78, ..RANGE }, &[ONE], ErrorCode::StaleEpoch),
        (PullRange { handle: 4, ..RANGE }, &[ONE], ErrorCode::UnknownHandle),
        (PullRange { offset: 701, ..RANGE }, &[ONE], ErrorCode::OutOfRange),
        (PullRange { offset: u64::MAX, ..RANGE }, &[ONE], ErrorCode::OutOfRange),
        (PullRange { bytes: u32::MAX, ..RANGE }, &[ONE], ErrorCode::OutOfRange),
        (PullRange { bytes: 0, ..RANGE }, &[ONE], ErrorCode::BadRequest),
        (PullRange { segment_bytes: 0, ..RANGE }, &[ONE], ErrorCode::BadRequest),
        (PullRange { segment_bytes: 65, ..RANGE }, &[ONE], ErrorCode::BadRequest),
        (PullRange { segment_bytes: 160, ..RANGE }, &[ONE], ErrorCode::BadRequest),
        (RANGE, &[ONE, Run { first: 1, count: 0 }], ErrorCode::BadRequest),
        (RANGE, &[ONE, Run { first: 4, count: 2 }], ErrorCode::BadRequest),
        (RANGE, &[Run { first: u32::MAX, count: u16::MAX }], ErrorCode::BadRequest),
        (PullRange { bytes: 960, ..RANGE }, &long, ErrorCode::BadRequest),
        (PullRange { bytes: 960, segment_bytes: 128, ..RANGE }, &[ALL_OF_960; 3], ErrorCode::BadRequest),
    ];
    for (at, (range, runs, code)) in cases.iter().enumerate() {
        let mut engine = engine();
        engine.handle_datagram(Instant::ZERO, peer(), &pull(range, runs), &shelf).unwrap();
        assert_eq!(drain(&mut engine, &shelf), (vec![], vec![*code]), "case {at}");
        assert_eq!(engine.counters().refused, 1);
    }
}

/// Everything that the engine has to say, as messages with their addressees.
fn said(engine: &mut ServeEngine, now: Instant, shelf: &Shelf) -> Vec<(Peer, Vec<u8>)> {
    let mut said = Vec::new();
    let mut out = [0; 2000];
    while let Some(transmit) = engine.poll_transmit(now, &mut out) {
        let mut bytes = out[..transmit.header_bytes].to_vec();
        if let Some((handle, range)) = transmit.payload {
            bytes.extend_from_slice(&shelf.bytes(handle).unwrap()[range]);
        }
        said.push((transmit.to, bytes));
    }
    said
}

#[test]
fn requests_without_room_are_answered_busy() {
    let shelf = Shelf(vec![0; 1000]);
    let mut engine = engine();
    let good = pull(&RANGE, &[ONE]);
    let mut lookup = [0; 100];
    let len = message::emit_lookup(&mut lookup, 1, [KEY].iter()).unwrap();
    // Half of the places are one requester's; then it is told so, twice, and then there is no room even for that.
    for _ in 0..4 {
        assert_eq!(engine.handle_datagram(Instant::ZERO, peer(), &good, &shelf), Ok(()));
    }
    assert_eq!((engine.counters().pulls, engine.counters().busy, engine.pending_pulls()), (2, 2, 2));
    let full = engine.handle_datagram(Instant::ZERO, peer(), &good, &shelf);
    assert_eq!(full, Err(DropReason::QueueFull));
    // Another one finds room all the same.
    let other = Peer { port: 10, ..peer() };
    engine.handle_datagram(Instant::ZERO, other, &good, &shelf).unwrap();
    assert_eq!(engine.counters().pulls, 3);
    let answers = said(&mut engine, Instant::ZERO, &shelf);
    for (_, bytes) in &answers[..2] {
        let Message::Error(refusal) = Message::new_checked(bytes).unwrap() else { panic!("an error first") };
        assert_eq!((refusal.code, refusal.subject, refusal.tag), (ErrorCode::Busy, Subject::Pull, 5));
        assert!(refusal.retry_us > 0);
    }
    assert_eq!(answers.len(), 5);

    for _ in 0..3 {
        engine.handle_datagram(Instant::ZERO, peer(), &lookup[..len], &shelf).unwrap();
    }
    assert_eq!((engine.counters().lookups, engine.counters().busy), (2, 3));
    let answers = said(&mut engine, Instant::ZERO, &shelf);
    let Message::Error(refusal) = Message::new_checked(&answers[0].1).unwrap() else {
        panic!("an error first")
    };
    assert_eq!((refusal.code, refusal.subject, refusal.tag), (ErrorCode::Busy, Subject::Lookup, 1));
    assert_eq!(answers.len(), 3);
    assert_eq!(engine.counters().drops[DropReason::QueueFull.index()], 1);
    assert_eq!((engine.counters().keys, engine.counters().keys_found), (2, 2));
    let counters = engine.counters();
    let sum = counters.lookups + counters.pulls + counters.busy + counters.drops.iter().sum::<u64>();
    assert_eq!(sum, counters.datagrams);
}

#[test]
fn the_hint_follows_the_backlog_and_the_rate() {
    let shelf = Shelf(vec![0; 600_000]);
    let config = ServeConfig { max_pending_bytes: 1 << 20, max_pending_pulls: 100, ..config() };
    let hint = |nanos_per_segment: u64| {
        let mut engine = ServeEngine::new(config);
        let range = PullRange { bytes: 128 * 16, segment_bytes: 128, ..RANGE };
        let full = pull(&range, &[Run { first: 0, count: 16 }]);
        let mut out = [0; 1400];
        for step in 0..50_000_u64 {
            let now = Instant::from_nanos(step * nanos_per_segment);
            while engine.pending_pulls() < 50 {
                engine.handle_datagram(now, peer(), &full, &shelf).unwrap();
            }
            engine.poll_transmit(now, &mut out).unwrap();
        }
        let now = Instant::from_nanos(50_000 * nanos_per_segment);
        while engine.counters().busy == 0 {
            engine.handle_datagram(now, peer(), &full, &shelf).unwrap();
        }
        engine.poll_transmit(now, &mut out).unwrap();
        let Ok(Message::Error(refusal)) = Message::new_checked(&out[..message::ERROR_BYTES]) else {
            panic!("busy")
        };
        (refusal.retry_us, engine.pending_bytes())
    };
    for nanos_per_segment in [100, 1000, 10_000] {
        let (retry_us, bytes) = hint(nanos_per_segment);
        let drain_us = bytes / 128 * nanos_per_segment / 1000;
        assert!((drain_us / 3..=drain_us).contains(&u64::from(retry_us)), "{retry_us} of {drain_us}");
    }
}

#[test]
fn probes_come_back_at_their_size() {
    let shelf = Shelf(vec![0; 1000]);
    let mut engine = engine();
    let mut out = [0; 2000];
    let probe = Probe { id: 8, bytes: 1900, epoch: 0 };
    let len = message::emit_probe(&mut out, &probe, false).unwrap();
    engine.handle_datagram(Instant::ZERO, peer(), &out[..len], &shelf).unwrap();
    assert_eq!(engine.poll_timeout(), Some(Instant::ZERO));
    let answers = said(&mut engine, Instant::ZERO, &shelf);
    let reply = Probe { epoch: EPOCH, ..probe };
    assert_eq!(answers.len(), 1);
    assert_eq!(Message::new_checked(&answers[0].1), Ok(Message::ProbeReply(reply)));
    for _ in 0..16 {
        engine.handle_datagram(Instant::ZERO, peer(), &out[..len], &shelf).unwrap();
    }
    let full = engine.handle_datagram(Instant::ZERO, peer(), &out[..len], &shelf);
    assert_eq!(full, Err(DropReason::QueueFull));
    assert_eq!(engine.poll_transmit(Instant::ZERO, &mut [0; 100]), None, "no room: given up");
    assert!(engine.idle());
}

/// One PULL for all `segments` of 128 bytes, at a pace.
fn paced(segments: u16, pace_mbps: u32) -> Vec<u8> {
    let range = PullRange { bytes: u32::from(segments) * 128, segment_bytes: 128, offset: 0, ..RANGE };
    let mut out = [0; 1400];
    let len =
        message::emit_pull(&mut out, &range, pace_mbps, 77, &[Run { first: 0, count: segments }]).unwrap();
    out[..len].to_vec()
}

fn large() -> (Shelf, ServeConfig) {
    let config = ServeConfig {
        max_pending_pulls: 4000,
        max_pending_bytes: 1 << 30,
        max_pull_segments: 4000,
        max_requesters: 64,
        turn_bytes: 16_384,
        ..config()
    };
    (Shelf(vec![0; 128 * 4000]), config)
}

#[test]
fn messages_of_the_other_direction_are_dropped() {
    let shelf = Shelf(vec![0; 1000]);
    let mut engine = engine();
    let mut data = [1; 60];
    let head = Data { tag: 1, segment: 2, epoch: 3, sequence: 4, waited_ns: 5, payload: &[] };
    message::emit_data_header(&mut data, &head).unwrap();
    assert_eq!(engine.handle_datagram(Instant::ZERO, peer(), &data, &shelf), Err(DropReason::BadType));
}

proptest! {
    #[test]
    fn arbitrary_pulls_never_read_outside_a_chunk(
        offset in 0_u64..1100, bytes in 0_u32..1100, segment_bytes in 0_u16..200, runs in proptest::collection::vec((0_u32..40, 0_u16..20), 1..10),
    ) {
        let shelf = Shelf((0..=255).cycle().take(1000).collect());
        let range = PullRange { offset, bytes, segment_bytes, ..RANGE };
        let runs: Vec<Run> = runs.into_iter().map(|(first, count)| Run { first, count }).collect();
        let mut engine = engine();
        engine.handle_datagram(Instant::ZERO, peer(), &pull(&range, &runs), &shelf).unwrap();
        let (segments, errors) = drain(&mut engine, &shelf);
        if errors.is_empty() {
            // The slow twin: cut the range, take what the runs name.
            let whole = &shelf.0[offset as usize..][..bytes as usize];
            let cut: Vec<&[u8]> = whole.chunks(usize::from(segment_bytes)).collect();
            let named = runs.iter().flat_map(|run| run.first..run.first + u32::from(run.count));
            let expected: Vec<_> = named.map(|segment| (segment, cut[segment as usize].to_vec())).collect();
            prop_assert_eq!(segments, expected);
        } else {
            prop_assert!(segments.is_empty());
        }
    }

    /// Whoever asks for what: what waits is bounded, in all and per requester; what was accepted is sent once, in the order in which
    /// its requester asked.
    #[test]
    fn work_is_bounded_and_sent_once(
        steps in proptest::collection::vec((0_u16..5, 1_u16..17, 0_usize..30), 1..100),
        max_pending_pulls in 1_usize..12,
        max_pending_bytes in 4096_u64..20_000,
        max_requesters in 1_u16..5,
        turn_bytes in 1_u32..5000,
    ) {
        let shelf = Shelf(vec![0; 128 * 16]);
        let config = ServeConfig { max_pending_pulls, max_pending_bytes, max_requesters, turn_bytes, ..config() };
        let mut engine = ServeEngine::new(config);
        let mut owed: BTreeMap<u16, VecDeque<(u32, u32)>> = BTreeMap::new();
        let mut out = [0; 1400];
        let mut send = |engine: &mut ServeEngine, owed: &mut BTreeMap<u16, VecDeque<(u32, u32)>>| {
            let Some(transmit) = engine.poll_transmit(Instant::ZERO, &mut out) else { return false };
            match Message::new_checked(&[&out[..transmit.header_bytes], &[0]].concat()) {
                Ok(Message::Data(data)) => {
                    let next = owed.get_mut(&transmit.to.port).and_then(VecDeque::pop_front);
                    assert_eq!(next, Some((data.tag, data.segment)));
                }
                Err(DropReason::BadLength) => assert_eq!(transmit.payload, None),
                other => panic!("{other:?}"),
            }
            true
        };
        for (tag, (port, count, sends)) in (0..).zip(steps) {
            let before = engine.counters().pulls;
            let range = PullRange { tag, bytes: u32::from(count) * 128, segment_bytes: 128, offset: 0, ..RANGE };
            let request = pull(&range, &[Run { first: 0, count }]);
            let _ = engine.handle_datagram(Instant::ZERO, Peer { port, ..peer() }, &request, &shelf);
            if engine.counters().pulls > before {
                owed.entry(port).or_default().extend((0..u32::from(count)).map(|segment| (tag, segment)));
            }
            let (pulls, bytes) = engine.largest_requester();
            prop_assert!(pulls <= max_pending_pulls.div_ceil(2) && engine.pending_pulls() <= max_pending_pulls);
            prop_assert!(bytes <= max_pending_bytes / 2 && engine.pending_bytes() <= max_pending_bytes);
            let waits: usize = owed.values().map(VecDeque::len).sum();
            prop_assert_eq!(engine.pending_bytes(), waits as u64 * 128);
            for _ in 0..sends {
                send(&mut engine, &mut owed);
            }
        }
        while send(&mut engine, &mut owed) {}
        prop_assert!(engine.idle() && owed.values().all(VecDeque::is_empty));
        prop_assert_eq!((engine.pending_pulls(), engine.pending_bytes()), (0, 0));
    }

    /// While all have work, data planes get the same, whatever the number of their ports.
    #[test]
    fn data_planes_take_fair_turns(ports in proptest::collection::vec(1_u16..9, 2..6), sent in 200_usize..3000) {
        let (shelf, config) = large();
        let mut engine = ServeEngine::new(config);
        let address = |host: usize| IpAddr::V4(Ipv4Addr::new(10, 0, 0, host as u8));
        for (host, &ports) in ports.iter().enumerate() {
            for port in 0..ports {
                let from = Peer { ip: address(host), port, ..peer() };
                engine.handle_datagram(Instant::ZERO, from, &paced(4000, 0), &shelf).unwrap();
            }
        }
        let mut bytes = vec![0_u64; ports.len()];
        let mut out = [0; 1400];
        for _ in 0..sent {
            let transmit = engine.poll_transmit(Instant::ZERO, &mut out).unwrap();
            let host = (0..ports.len()).find(|host| address(*host) == transmit.to.ip).unwrap();
            bytes[host] += 128;
        }
        // The ports come one after another, and the first have longer turns until the others are there; later a turn, and up to a
        // segment more for each port.
        let turn = 2 * 16_384 + 8 * 128;
        let (least, most) = (bytes.iter().min().unwrap(), bytes.iter().max().unwrap());
        prop_assert!(most - least <= 2 * turn, "{bytes:?}");
    }

    /// No faster than the pace and what may be caught up, no slower than a segment behind.
    #[test]
    fn the_pace_is_kept(pace_mbps in 10_u32..20_000, step_nanos in 10_u64..20_000) {
        let (shelf, config) = large();
        let mut engine = ServeEngine::new(config);
        engine.handle_datagram(Instant::from_nanos(1_000_000), peer(), &paced(4000, pace_mbps), &shelf).unwrap();
        let mut out = [0; 1400];
        let mut bytes = 0_u64;
        for step in 0..200 {
            let nanos = step * step_nanos;
            let now = Instant::from_nanos(1_000_000 + nanos);
            while let Some(transmit) = engine.poll_transmit(now, &mut out) {
                bytes += transmit.payload.unwrap().1.len() as u64;
            }
            let due = |nanos: u64| nanos * u64::from(pace_mbps) / 8000;
            prop_assert!(bytes <= due(nanos + 20_000) + 2 * 128, "{bytes} after {nanos} ns");
            if engine.pending_bytes() > 0 {
                prop_assert!(bytes + 128 >= due(nanos), "{bytes} after {nanos} ns");
                prop_assert!(engine.poll_timeout().unwrap() > now);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let shelf = Shelf(vec![0; 1000]);
        let mut engine = engine();
        let _ = engine.handle_datagram(Instant::ZERO, peer(), &bytes, &shelf);
        drain(&mut engine, &shelf);
    }
}
