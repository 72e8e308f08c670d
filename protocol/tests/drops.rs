//! Every datagram that the fetch engine must not take in, and the reason under which it is counted.
#![allow(clippy::cast_possible_truncation, reason = "numbers of the tests are small")]

mod network;

use network::chunks::{Chunk, Layout};
use network::random::Random;
use protocol::wire::message::{self, Data, ErrorCode, MAX_CONTROL_BYTES, Message, PullRange, Refusal};
use protocol::{
    Accepted, ChunkShape, DropReason, Event, FetchConfig, FetchEngine, FetchId, FetchOutcome, Instant, Key,
    LookupId, StoreIndex, TransferId, Verdict,
};

const SHAPE: ChunkShape = ChunkShape { layers: 1, kv_heads: 2, head_dim: 8, dtype: 1 };
const KEY: Key = Key([5; 32]);
const STORE: StoreIndex = StoreIndex(1);
const EPOCH: u64 = 9;

fn now() -> Instant {
    Instant::from_nanos(1000)
}

fn engine() -> FetchEngine<Layout> {
    let config = FetchConfig {
        stores: 2,
        segment_bytes: 64,
        max_plane_bytes: 4096,
        seed: 3,
        ..FetchConfig::default()
    };
    FetchEngine::new(config, Layout).unwrap()
}

fn sent(engine: &mut FetchEngine<Layout>) -> Option<Vec<u8>> {
    let mut out = [0; MAX_CONTROL_BYTES];
    let transmit = engine.poll_transmit(now(), &mut out)?;
    assert_eq!(transmit.store, STORE);
    Some(out[..transmit.len].to_vec())
}

fn reply(request: u32, infos: &[Option<protocol::ChunkInfo>]) -> Vec<u8> {
    let mut out = [0; MAX_CONTROL_BYTES];
    let len = message::emit_lookup_reply(&mut out, request, EPOCH, infos.iter().copied()).unwrap();
    out[..len].to_vec()
}

fn data(tag: u32, segment: u32, epoch: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0; message::DATA_HEADER_BYTES];
    let head = Data { tag, segment, epoch, sequence: 1, waited_ns: 0, payload: &[] };
    message::emit_data_header(&mut out, &head).unwrap();
    out.extend_from_slice(payload);
    out
}

/// The range of the next PULL that the engine sends.
fn pulled(engine: &mut FetchEngine<Layout>) -> PullRange {
    let message = sent(engine).expect("a PULL");
    let Ok(Message::Pull(pull)) = Message::new_checked(&message) else { panic!("a PULL") };
    pull.range
}

fn segments<'c>(chunk: &'c Chunk, range: &PullRange) -> Vec<&'c [u8]> {
    chunk.bytes[range.offset as usize..][..range.bytes as usize].chunks(64).collect()
}

#[test]
fn each_is_counted_under_its_reason_and_changes_nothing() {
    use DropReason as R;
    let mut engine = engine();
    let chunk = Chunk::new(&KEY, &SHAPE, 1000, &mut Random::new(4));
    engine.start(now(), FetchId(1), Instant::from_nanos(1 << 40), STORE, &[KEY], &SHAPE).unwrap();
    let lookup = sent(&mut engine).unwrap();
    let Ok(Message::Lookup(lookup)) = Message::new_checked(&lookup) else { panic!("a LOOKUP") };
    let request = lookup.request;
    let good = reply(request, &[Some(chunk.info)]);
    let drops = |engine: &mut FetchEngine<Layout>, store, payload: &[u8], reason: DropReason| {
        let before = engine.counters().drops[reason.index()];
        assert_eq!(engine.handle_datagram(now(), store, false, payload), Err(reason));
        assert_eq!(engine.counters().drops[reason.index()], before + 1);
    };
    drops(&mut engine, STORE, &reply(request ^ 1, &[None]), R::Stale);
    drops(&mut engine, STORE, &reply(request | 0xffff, &[None]), R::Stale);
    drops(&mut engine, STORE, &reply(request ^ 1 << 16, &[None]), R::Stale);
    drops(&mut engine, StoreIndex(0), &good, R::WrongStore);
    drops(&mut engine, STORE, &reply(request, &[Some(chunk.info), None]), R::BadLength);
    assert_eq!(engine.handle_datagram(now(), STORE, false, &good), Ok(Accepted::Control));
    drops(&mut engine, STORE, &good, R::Stale);

    let header = pulled(&mut engine);
    for (segment, bytes) in segments(&chunk, &header).into_iter().enumerate() {
        let message = data(header.tag, segment as u32, EPOCH, bytes);
        assert_eq!(engine.handle_datagram(now(), STORE, false, &message), Ok(Accepted::Control));
    }
    drops(&mut engine, STORE, &data(header.tag, 0, EPOCH, &[0; 64]), R::Stale);

    let plane = pulled(&mut engine);
    let parts = segments(&chunk, &plane);
    let (last, rest) = (parts.len() as u32 - 1, parts[parts.len() - 1].len());
    assert!(last > 1 && rest < 64, "the seed gives a plane of several segments");
    let tag = plane.tag;
    drops(&mut engine, STORE, &data(tag ^ 1 << 16, 0, EPOCH, parts[0]), R::Stale);
    drops(&mut engine, STORE, &data(tag ^ 1 << 31, 0, EPOCH, parts[0]), R::Stale);
    drops(&mut engine, STORE, &data(tag | 0xffff, 0, EPOCH, parts[0]), R::Stale);
    drops(&mut engine, StoreIndex(0), &data(tag, 0, EPOCH, parts[0]), R::WrongStore);
    drops(&mut engine, StoreIndex(9), &data(tag, 0, EPOCH, parts[0]), R::WrongStore);
    drops(&mut engine, STORE, &data(tag, 0, EPOCH + 1, parts[0]), R::StaleEpoch);
    drops(&mut engine, STORE, &data(tag, last + 1, EPOCH, parts[0]), R::BadSegment);
    drops(&mut engine, STORE, &data(tag, u32::MAX, EPOCH, parts[0]), R::BadSegment);
    drops(&mut engine, STORE, &data(tag, 0, EPOCH, &parts[0][..63]), R::BadLength);
    drops(&mut engine, STORE, &data(tag, 0, EPOCH, &[0; 65]), R::BadLength);
    drops(&mut engine, STORE, &data(tag, last, EPOCH, &[0; 64]), R::BadLength);
    drops(&mut engine, STORE, &data(tag, 0, EPOCH, &[]), R::BadLength);
    drops(&mut engine, STORE, &data(tag, 0, EPOCH, parts[0])[..31], R::Truncated);
    let mut error = [0; message::ERROR_BYTES];
    message::emit_error(&mut error, &Refusal::of_pull(tag, 1, ErrorCode::BadRequest, EPOCH)).unwrap();
    drops(&mut engine, StoreIndex(0), &error, R::WrongStore);
    message::emit_error(&mut error, &Refusal::of_pull(tag ^ 1 << 16, 1, ErrorCode::BadRequest, EPOCH))
        .unwrap();
    drops(&mut engine, STORE, &error, R::Stale);
    let mut lookup = [0; 48];
    message::emit_lookup(&mut lookup, 1, [KEY].iter()).unwrap();
    drops(&mut engine, STORE, &lookup, R::BadType);
    drops(&mut engine, STORE, b"another protocol altogether", R::BadMagic);
    // The rest of the first plane, and the second.
    let other =
        std::iter::repeat_with(|| pulled(&mut engine)).take(4).find(|range| range.tag != tag).unwrap();
    // Busy: without effect on what arrives; nothing is asked for until the store says that it is worth it.
    let busy = Refusal { retry_us: 50, ..Refusal::of_pull(tag, 1, ErrorCode::Busy, EPOCH) };
    message::emit_error(&mut error, &busy).unwrap();
    assert_eq!(engine.handle_datagram(now(), STORE, false, &error), Ok(Accepted::Control));
    assert_eq!(engine.counters().segments_placed, 0);
    assert_eq!(sent(&mut engine), None);

    // The fetch is none the worse for it: both planes arrive, each segment once.
    for (range, parts) in [(plane, parts), (other, segments(&chunk, &other))] {
        for (segment, bytes) in parts.iter().enumerate() {
            let message = data(range.tag, segment as u32, EPOCH, bytes);
            let accepted = engine.handle_datagram(now(), STORE, false, &message).unwrap();
            let Accepted::Segment { transfer, segment: number, data: place } = accepted else {
                panic!("a segment")
            };
            assert_eq!((transfer.tag(), number as usize, &message[place]), (range.tag, segment, *bytes));
            drops(&mut engine, STORE, &message, R::Duplicate);
        }
    }
    let mut arrived: Vec<TransferId> = Vec::new();
    while let Some(event) = engine.poll_event() {
        let Event::PlaneArrived { transfer, .. } = event else { panic!("unexpected {event:?}") };
        assert_eq!(engine.chunk_info(transfer), Some(&chunk.info));
        arrived.push(transfer);
    }
    for transfer in &arrived {
        assert!(engine.verdict(now(), *transfer, Verdict::Delivered));
    }
    let end = Event::FetchEnded {
        fetch: FetchId(1),
        outcome: FetchOutcome::Done,
        planes_delivered: 2,
        chunks_failed: 0,
    };
    assert_eq!((arrived.len(), engine.poll_event()), (2, Some(end)));
    drops(&mut engine, STORE, &data(tag, 0, EPOCH, &[0; 64]), R::Stale);
    assert!(engine.idle());
    let counters = engine.counters();
    assert_eq!(
        counters.datagrams,
        counters.segments_placed + counters.header_segments + counters.control + counters.dropped()
    );
}

#[test]
fn a_lookup_that_finds_nothing_leaves_nothing() {
    let mut engine = engine();
    engine.lookup(now(), LookupId(1), Instant::from_nanos(1 << 40), STORE, &[KEY]).unwrap();
    let message = sent(&mut engine).unwrap();
    let Ok(Message::Lookup(lookup)) = Message::new_checked(&message) else { panic!("a LOOKUP") };
    engine.handle_datagram(now(), STORE, false, &reply(lookup.request, &[None])).unwrap();
    assert!(matches!(engine.poll_event(), Some(Event::LookupDone { found: 0, .. })));
    assert!(engine.idle() && sent(&mut engine).is_none());
    engine.handle_timeout(Instant::FAR);
    assert_eq!(engine.poll_timeout(), None);
}

#[test]
fn budgets_that_cannot_work_are_refused() {
    use protocol::ConfigError as E;
    let base = FetchConfig::default();
    let cases = [
        (FetchConfig { queues: 0, ..base }, E::Zero("queues")),
        (FetchConfig { active_planes: 0, ..base }, E::Zero("active_planes")),
        (FetchConfig { queue: 2, queues: 2, ..base }, E::Queue { queue: 2, queues: 2 }),
        (FetchConfig { segment_bytes: 1000, ..base }, E::Segment(1000)),
        (FetchConfig { segment_bytes: 0, ..base }, E::Segment(0)),
        (FetchConfig { memory_segments: 728, ..base }, E::Memory { memory: 728, plane: 729 }),
        (FetchConfig { active_planes: 65_500, ..base }, E::TooMany("active_planes + active_chunks")),
        (FetchConfig { rto_max: std::time::Duration::ZERO, ..base }, E::Rto),
    ];
    for (config, error) in cases {
        assert_eq!(FetchEngine::new(config, Layout).err(), Some(error));
    }
}
