//! The store's engine by itself: what it answers, what it refuses, what it drops.
#![allow(clippy::cast_possible_truncation, reason = "numbers of the tests are small")]

use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;
use protocol::wire::message::{self, Data, ErrorCode, Message, PullRange, Run};
use protocol::{ChunkInfo, ChunkSource, DropReason, Key, Peer, ServeConfig, ServeEngine};

struct Shelf(Vec<u8>);

const KEY: Key = Key([9; 32]);
const EPOCH: u64 = 77;

impl ChunkSource for Shelf {
    fn find(&self, key: &Key) -> Option<ChunkInfo> {
        (*key == KEY).then(|| ChunkInfo {
            handle: 3,
            chunk_bytes: self.0.len() as u64,
            tokens: 256,
            ..Default::default()
        })
    }

    fn bytes(&self, handle: u32) -> Option<&[u8]> {
        (handle == 3).then_some(&self.0)
    }
}

fn peer() -> Peer {
    Peer { mac: [2; 6], ip: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 9 }
}

fn engine() -> ServeEngine {
    ServeEngine::new(ServeConfig {
        epoch: EPOCH,
        max_pending_pulls: 2,
        max_pending_replies: 2,
        max_segment_bytes: 128,
        max_pull_segments: 16,
    })
}

fn pull(range: &PullRange, runs: &[Run]) -> Vec<u8> {
    let mut out = [0; 1400];
    let len = message::emit_pull(&mut out, range, 0, 77, runs).unwrap();
    out[..len].to_vec()
}

const RANGE: PullRange =
    PullRange { tag: 5, handle: 3, epoch: EPOCH, offset: 10, bytes: 300, segment_bytes: 64 };
const ONE: Run = Run { first: 0, count: 1 };

/// All that the engine has to say: segments as (number, bytes), and error codes.
fn drain(engine: &mut ServeEngine, shelf: &Shelf) -> (Vec<(u32, Vec<u8>)>, Vec<ErrorCode>) {
    let (mut segments, mut errors) = (Vec::new(), Vec::new());
    let mut out = [0; 1400];
    while let Some(transmit) = engine.poll_transmit(&mut out) {
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
    engine.handle_datagram(peer(), &pull(&RANGE, &runs), &shelf).unwrap();
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
    let cases: [(PullRange, &[Run], ErrorCode); 13] = [
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
    ];
    for (at, (range, runs, code)) in cases.iter().enumerate() {
        let mut engine = engine();
        engine.handle_datagram(peer(), &pull(range, runs), &shelf).unwrap();
        assert_eq!(drain(&mut engine, &shelf), (vec![], vec![*code]), "case {at}");
        assert_eq!(engine.counters().refused, 1);
    }
}

#[test]
fn full_rings_drop_and_count() {
    let shelf = Shelf(vec![0; 1000]);
    let mut engine = engine();
    let good = pull(&RANGE, &[ONE]);
    let bad = pull(&PullRange { epoch: 1, ..RANGE }, &[ONE]);
    let mut lookup = [0; 100];
    let len = message::emit_lookup(&mut lookup, 1, [KEY].iter()).unwrap();
    for message in [&good[..], &bad, &lookup[..len]] {
        for _ in 0..2 {
            assert_eq!(engine.handle_datagram(peer(), message, &shelf), Ok(()));
        }
        assert_eq!(engine.handle_datagram(peer(), message, &shelf), Err(DropReason::QueueFull));
    }
    assert_eq!(engine.counters().drops[DropReason::QueueFull.index()], 3);
    assert_eq!(engine.counters().datagrams, 9);
    assert_eq!((engine.counters().keys, engine.counters().keys_found), (2, 2));
}

#[test]
fn messages_of_the_other_direction_are_dropped() {
    let shelf = Shelf(vec![0; 1000]);
    let mut engine = engine();
    let mut data = [1; 60];
    let head = Data { tag: 1, segment: 2, epoch: 3, sequence: 4, waited_ns: 5, payload: &[] };
    message::emit_data_header(&mut data, &head).unwrap();
    assert_eq!(engine.handle_datagram(peer(), &data, &shelf), Err(DropReason::BadType));
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
        engine.handle_datagram(peer(), &pull(&range, &runs), &shelf).unwrap();
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

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let shelf = Shelf(vec![0; 1000]);
        let mut engine = engine();
        let _ = engine.handle_datagram(peer(), &bytes, &shelf);
        drain(&mut engine, &shelf);
    }
}
