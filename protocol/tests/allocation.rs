//! Nothing is allocated after an engine was made, whatever the network does.
#![allow(clippy::cast_possible_truncation, reason = "numbers of the test are small")]

mod network;

use std::collections::VecDeque;
use std::time::Duration;

use network::chunks::{Chunk, Layout, Library};
use network::random::Random;
use protocol::put::{AcceptConfig, AcceptEngine, AcceptEvent, OfferConfig, OfferEngine, PutVerdict};
use protocol::wire::message::MAX_CONTROL_BYTES;
use protocol::{
    ChunkInfo, ChunkShape, ChunkSource, Event, FetchConfig, FetchEngine, FetchId, Instant, Key, LookupId,
    Peer, Placement, ServeConfig, ServeEngine, Sources, StoreIndex, Verdict,
};

const SHAPE: ChunkShape = ChunkShape { layers: 4, kv_heads: 2, head_dim: 8, dtype: 1 };
const STORES: u16 = 3;

/// Counts what the calls of an engine allocate.
#[derive(Default)]
struct Meter {
    allocations: u64,
}

impl Meter {
    fn run<T>(&mut self, call: impl FnOnce() -> T) -> T {
        let mut result = None;
        let info = allocation_counter::measure(|| result = Some(call()));
        self.allocations += info.count_total;
        result.expect("the call was made")
    }
}

/// Messages on their way: when they arrive, to or from which store.
type Wire = VecDeque<(u64, u16, Vec<u8>)>;

fn send(wire: &mut Wire, random: &mut Random, now: u64, store: u16, bytes: &[u8]) {
    if random.chance(0.03) {
        return;
    }
    for _ in 0..=u32::from(random.chance(0.02)) {
        wire.push_back((now + 20_000, store, bytes.to_vec()));
    }
}

#[test]
fn nothing_is_allocated_after_start() {
    let config = FetchConfig {
        max_fetches: 6,
        max_lookups: 3,
        max_chunks_per_fetch: 64,
        active_chunks: 16,
        active_planes: 24,
        max_planes_per_chunk: 8,
        max_plane_bytes: 4096,
        max_header_bytes: 1024,
        segment_bytes: 256,
        memory_segments: 400,
        rto_min: Duration::from_micros(300),
        stores: STORES,
        ..FetchConfig::default()
    };
    let placement = Placement::new(&[1, 2, 3], 2).unwrap();
    let mut random = Random::new(1);
    let mut libraries: Vec<Library> = (0..STORES).map(|_| Library::default()).collect();
    let keys: Vec<Key> =
        (0..64_u64).map(|number| Key(std::array::from_fn(|at| (number >> (at % 8)) as u8))).collect();
    for key in &keys {
        let chunk = Chunk::new(key, &SHAPE, 4096, &mut random);
        for store in placement.candidates(key).as_slice() {
            libraries[usize::from(store.0)].insert(*key, chunk.clone());
        }
    }
    let mut stores: Vec<ServeEngine> =
        (0..STORES).map(|_| ServeEngine::new(ServeConfig { epoch: 5, ..ServeConfig::default() })).collect();
    let mut engine = FetchEngine::with_placement(config, placement, Layout).unwrap();
    let mut meter = Meter::default();
    let (mut up, mut down, mut out) = (Wire::new(), Wire::new(), [0; MAX_CONTROL_BYTES]);
    let (mut ended, mut fetches, mut delivered) = (0, 0, 0);
    let peer = Peer { mac: [2; 6], ip: [10, 0, 0, 1].into(), port: 1 };
    for step in 0..40_000_u64 {
        let now = step * 2000;
        let at = Instant::from_nanos(now);
        if step % 100 == 0 && engine.fetches() < 6 {
            fetches += 1;
            let count = random.between(1, 64) as usize;
            let deadline = at + Duration::from_millis(random.between(1, 40));
            meter
                .run(|| engine.start(at, FetchId(fetches), deadline, Sources::Placed, &keys[..count], &SHAPE))
                .unwrap();
            let _ = meter.run(|| engine.lookup(at, LookupId(fetches), deadline, Sources::Placed, &keys));
        }
        if step % 3000 == 0 {
            meter.run(|| engine.cancel(at, FetchId(fetches)));
        }
        // Now and then a store says nothing for 4 ms.
        let silent = (step / 2000 % 4) as u16;
        while up.front().is_some_and(|message| message.0 <= now) {
            let (_, store, bytes) = up.pop_front().unwrap();
            if store != silent {
                let _ = stores[usize::from(store)].handle_datagram(
                    at,
                    peer,
                    &bytes,
                    &libraries[usize::from(store)],
                );
            }
        }
        for store in 0..STORES {
            for _ in 0..4 {
                let Some(sent) = stores[usize::from(store)].poll_transmit(at, &mut out) else { break };
                let mut message = out[..sent.header_bytes].to_vec();
                if let Some((handle, range)) = sent.payload {
                    message.extend_from_slice(&libraries[usize::from(store)].bytes(handle).unwrap()[range]);
                }
                send(&mut down, &mut random, now, store, &message);
            }
        }
        while down.front().is_some_and(|message| message.0 <= now) {
            let (_, store, bytes) = down.pop_front().unwrap();
            let marked = random.chance(0.01);
            let _ = meter.run(|| engine.handle_datagram(at, StoreIndex(store), marked, &bytes));
        }
        meter.run(|| engine.handle_timeout(at));
        while let Some(event) = meter.run(|| engine.poll_event()) {
            match event {
                Event::PlaneArrived { transfer, .. } => {
                    let verdict = if random.chance(0.02) { Verdict::Corrupt } else { Verdict::Delivered };
                    delivered += u64::from(verdict == Verdict::Delivered);
                    meter.run(|| engine.verdict(at, transfer, verdict));
                }
                Event::FetchEnded { .. } => ended += 1,
                _ => {}
            }
        }
        while let Some(sent) = meter.run(|| engine.poll_transmit(at, &mut out)) {
            send(&mut up, &mut random, now, sent.store.0, &out[..sent.len]);
        }
    }
    let counters = engine.counters();
    assert!(ended > 20 && delivered > 1000, "{ended} fetches, {delivered} planes: {counters:?}");
    assert!(counters.segments_lost > 100 && counters.timeouts > 0 && counters.failovers > 0, "{counters:?}");
    assert_eq!(meter.allocations, 0);
    // The meter counts.
    assert_eq!(meter.run(|| std::hint::black_box(vec![1_u8; 100])).len(), 100);
    assert_eq!(meter.allocations, 1);
}

/// Everything that is offered has so many bytes.
const PUT_BYTES: u64 = 20_000;

struct Anything;

impl ChunkSource for Anything {
    fn find(&self, _key: &Key) -> Option<ChunkInfo> {
        None
    }

    fn chunk_bytes(&self, _handle: u32) -> Option<u64> {
        Some(PUT_BYTES)
    }
}

#[test]
fn nothing_is_allocated_in_a_put_after_start() {
    let accept = AcceptConfig {
        max_intakes: 3,
        max_chunk_bytes: 32 << 10,
        segment_bytes: 256,
        rto_min: Duration::from_micros(300),
        silence: Duration::from_millis(5),
        ..AcceptConfig::default()
    };
    let offer = OfferConfig {
        max_offers: 4,
        stores: 1,
        segment_bytes: 256,
        rto_min: Duration::from_micros(300),
        rto_max: Duration::from_millis(20),
        serve: ServeConfig { epoch: 5, max_pending_pulls: 16, ..ServeConfig::default() },
        seed: 1,
    };
    let (mut store, mut plane) = (AcceptEngine::new(accept), OfferEngine::new(offer));
    let (mut meter, mut random) = (Meter::default(), Random::new(2));
    let (mut up, mut down, mut out) = (Wire::new(), Wire::new(), [0; MAX_CONTROL_BYTES]);
    let peer = Peer { mac: [2; 6], ip: [10, 0, 0, 1].into(), port: 1 };
    let mut ended = 0;
    for step in 0..40_000_u64 {
        let now = step * 2000;
        let at = Instant::from_nanos(now);
        if step % 50 == 0 {
            let key = Key(std::array::from_fn(|byte| (step >> (byte % 8)) as u8));
            let deadline = at + Duration::from_millis(random.between(1, 40));
            let _ = meter.run(|| plane.start(at, deadline, StoreIndex(0), &key, 100, PUT_BYTES));
        }
        // Now and then nothing comes through for 4 ms.
        let is_cut = step / 2000 % 4 == 0;
        while let Some((_, _, bytes)) = up.pop_front_if(|message| message.0 <= now) {
            if !is_cut {
                let marked = random.chance(0.1);
                let _ = meter.run(|| store.handle_datagram(at, peer, marked, &bytes, |_| false).map(drop));
            }
        }
        while let Some((_, _, bytes)) = down.pop_front_if(|message| message.0 <= now) {
            let _ = meter.run(|| plane.handle_datagram(at, StoreIndex(0), peer, &bytes, &Anything));
        }
        meter.run(|| store.handle_timeout(at));
        meter.run(|| plane.handle_timeout(at));
        while let Some(event) = meter.run(|| store.poll_event()) {
            match event {
                AcceptEvent::Reserve { intake, .. } => {
                    meter.run(|| store.reserved(at, intake, Ok(())));
                }
                AcceptEvent::Arrived { intake, .. } => {
                    let verdict = if random.chance(0.1) { PutVerdict::Corrupt } else { PutVerdict::Stored };
                    meter.run(|| store.mark_corrupt(intake, 1000..2000));
                    meter.run(|| store.verdict(at, intake, verdict));
                }
                AcceptEvent::Dropped { .. } => {}
            }
        }
        while meter.run(|| plane.poll_event()).is_some() {
            ended += 1;
        }
        while let Some((_, len)) = meter.run(|| store.poll_transmit(at, &mut out)) {
            send(&mut down, &mut random, now, 0, &out[..len]);
        }
        for _ in 0..4 {
            let Some(sent) = meter.run(|| plane.poll_transmit(at, &mut out)) else { break };
            let mut message = out[..sent.header_bytes].to_vec();
            message.resize(sent.header_bytes + sent.payload.map_or(0, |(_, range)| range.len()), 0);
            send(&mut up, &mut random, now, 0, &message);
        }
    }
    let counters = store.counters();
    assert!(ended > 100 && counters.stored > 50, "{ended} offers: {counters:?}");
    assert!(counters.segments_lost > 100 && counters.timeouts > 0 && counters.corrupt > 0, "{counters:?}");
    assert_eq!(meter.allocations, 0);
}
