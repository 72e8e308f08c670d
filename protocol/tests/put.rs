//! What both engines of PUT do in named situations: restarts, memory that runs out, paths that carry less. Every invariant of the engines is
//! checked at every step. Bad networks are `sim`'s.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "numbers of the tests are small, and each test uses a part of what it shares with others"
)]

#[path = "network/chunks.rs"]
mod chunks;
#[path = "network/random.rs"]
mod random;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use chunks::{Chunk, PLANE_ENTRY_BYTES, checksum};
use proptest::prelude::*;
use protocol::put::{
    AcceptConfig, AcceptEngine, AcceptEvent, Declined, Intake, OfferConfig, OfferEnd, OfferEngine,
    OfferFailure, OfferId, OfferTo, PutVerdict, Taken,
};
use protocol::wire::message::{self, ErrorCode, MAX_CONTROL_BYTES, Message, Refusal};
use protocol::wire::offer::OfferStatus;
use protocol::{ChunkInfo, ChunkShape, ChunkSource, Instant, Key, Peer, ServeConfig, StoreIndex};
use random::Random;

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;
const SHAPE: ChunkShape = ChunkShape { layers: 3, kv_heads: 2, head_dim: 8, dtype: 1 };

/// What a data plane offers, by handle.
#[derive(Default)]
struct Shelf(HashMap<u32, (Key, Vec<u8>)>);

impl Shelf {
    pub fn bytes(&self, handle: u32) -> Option<&[u8]> {
        self.0.get(&handle).map(|(_, bytes)| &bytes[..])
    }
}

impl ChunkSource for Shelf {
    fn find(&self, _key: &Key) -> Option<ChunkInfo> {
        None
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        self.bytes(handle).map(|bytes| bytes.len() as u64)
    }
}

struct DataPlane {
    engine: OfferEngine,
    shelf: Shelf,
    ends: BTreeMap<u32, (u64, OfferEnd, Key)>,
    epoch: u64,
}

struct Store {
    engine: AcceptEngine,
    config: AcceptConfig,
    alive: bool,
    /// Memory granted, by intake slot, with what has been copied there.
    granted: BTreeMap<usize, (Intake, Vec<u8>)>,
    stored: HashMap<Key, Vec<u8>>,
    /// All that was ever found right, whatever became of it.
    ever: HashMap<Key, Vec<u8>>,
    budget: usize,
    pinned: bool,
    /// Answers that the caller still thinks about.
    asked: Vec<(u64, Asked)>,
}

#[derive(Clone, Copy)]
enum Asked {
    Memory { intake: Intake, key: Key, bytes: u32 },
    Check { intake: Intake, key: Key, header_bytes: u32 },
}

enum To {
    Store(usize),
    DataPlane(usize),
}

struct World {
    random: Random,
    now: u64,
    latency_nanos: u64,
    /// Larger messages do not arrive, and neither do these segments, once each.
    carries_bytes: usize,
    loses_segments: BTreeSet<u32>,
    /// So many PULLs are answered as busy.
    refuses_pulls: u32,
    store: Store,
    planes: Vec<DataPlane>,
    wire: BinaryHeap<Reverse<(u64, u64)>>,
    in_transit: BTreeMap<u64, (To, Vec<u8>)>,
    sequence: u64,
    busy_until: u64,
}

fn peer(plane: usize) -> Peer {
    Peer { mac: [2, 0, 0, 0, 0, 1], ip: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 4791 + plane as u16 }
}

const STORE: Peer = Peer { mac: [2, 0, 0, 0, 0, 2], ip: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 1 };

fn accept_config() -> AcceptConfig {
    AcceptConfig {
        epoch: 7,
        max_intakes: 3,
        max_chunk_bytes: 1 << 20,
        segment_bytes: 256,
        window_segments: 48,
        rto_min: Duration::from_micros(300),
        rto_max: Duration::from_millis(20),
        silence: Duration::from_millis(400),
        ..AcceptConfig::default()
    }
}

fn offer_engine(epoch: u64) -> OfferEngine {
    OfferEngine::new(offer_config(epoch))
}

fn offer_config(epoch: u64) -> OfferConfig {
    OfferConfig {
        max_offers: 4,
        stores: 1,
        segment_bytes: 512,
        rto_min: Duration::from_micros(300),
        rto_max: Duration::from_millis(20),
        serve: ServeConfig { epoch, max_segment_bytes: 512, max_pending_pulls: 16, ..ServeConfig::default() },
        seed: epoch as u32,
    }
}

impl World {
    fn new(seed: u64, planes: usize, config: AcceptConfig) -> World {
        let plane = |at: usize| {
            let epoch = 100 + at as u64;
            DataPlane { engine: offer_engine(epoch), shelf: Shelf::default(), ends: BTreeMap::new(), epoch }
        };
        World {
            random: Random::new(seed),
            now: 1,
            latency_nanos: 20_000,
            carries_bytes: usize::MAX,
            loses_segments: BTreeSet::new(),
            refuses_pulls: 0,
            store: Store {
                engine: AcceptEngine::new(config),
                config,
                alive: true,
                granted: BTreeMap::new(),
                stored: HashMap::new(),
                ever: HashMap::new(),
                budget: usize::MAX,
                pinned: false,
                asked: Vec::new(),
            },
            planes: (0..planes).map(plane).collect(),
            wire: BinaryHeap::new(),
            in_transit: BTreeMap::new(),
            sequence: 0,
            busy_until: 0,
        }
    }

    fn at(&self) -> Instant {
        Instant::from_nanos(self.now)
    }

    fn key(number: u64) -> Key {
        let mut key = Key([0xcd; 32]);
        key.0[..8].copy_from_slice(&number.to_le_bytes());
        key
    }

    /// Offers a fresh chunk under the key `number`; the same number is the same bytes.
    fn offer(&mut self, plane: usize, number: u64, deadline: u64) -> OfferId {
        let key = World::key(number);
        let chunk = Chunk::new(&key, &SHAPE, 4096, &mut Random::new(number));
        let now = self.at();
        let node = &mut self.planes[plane];
        let (header, bytes) = (chunk.info.header_bytes, chunk.info.chunk_bytes);
        let at = Instant::from_nanos(deadline);
        let id = node.engine.start(now, at, StoreIndex(0), &key, header, bytes).expect("a free place");
        node.shelf.0.insert(id.handle(), (key, chunk.bytes));
        self.drain();
        id
    }

    /// The store loses everything and begins anew.
    fn restart_store(&mut self) {
        let store = &mut self.store;
        store.config.epoch += 1;
        store.config.seed += 1;
        store.engine = AcceptEngine::new(store.config);
        store.granted.clear();
        store.asked.clear();
        store.stored.clear();
    }

    fn send(&mut self, to: To, payload: &[u8]) {
        // One packet a microsecond, whoever sends.
        self.busy_until = self.busy_until.max(self.now) + 1000;
        let is_lost = message::data(payload).is_some_and(|data| self.loses_segments.remove(&data.segment));
        if payload.len() <= self.carries_bytes && !is_lost {
            self.sequence += 1;
            self.in_transit.insert(self.sequence, (to, payload.to_vec()));
            self.wire.push(Reverse((self.busy_until + self.latency_nanos, self.sequence)));
        }
    }

    fn next_time(&self) -> Option<u64> {
        let wire = self.wire.peek().map(|Reverse((at, _))| *at);
        let accept = self.store.engine.poll_timeout().map(Instant::nanos);
        let offers =
            self.planes.iter().filter_map(|plane| plane.engine.poll_timeout()).map(Instant::nanos).min();
        let asked = self.store.asked.iter().map(|(at, _)| *at).min();
        [wire, accept, offers, asked].into_iter().flatten().min().map(|at| at.max(self.now))
    }

    fn run_until(&mut self, end: u64) {
        let mut steps = 0_u64;
        while let Some(at) = self.next_time().filter(|at| *at <= end) {
            steps += 1;
            assert!(steps < 2_000_000, "the run does not end");
            self.now = at;
            while let Some(Reverse((due, sequence))) = self.wire.peek().copied() {
                if due > self.now {
                    break;
                }
                self.wire.pop();
                match self.in_transit.remove(&sequence).unwrap() {
                    (To::Store(plane), payload) => self.at_store(plane, &payload),
                    (To::DataPlane(plane), payload) => self.at_data_plane(plane, &payload),
                }
            }
            self.answer_asked();
            let now = self.at();
            self.store.engine.handle_timeout(now);
            self.planes.iter_mut().for_each(|plane| plane.engine.handle_timeout(now));
            self.drain();
            let mut timeouts = self.planes.iter().map(|plane| plane.engine.poll_timeout());
            assert!(timeouts.all(|at| at.is_none_or(|at| at > now)), "what fired is armed again");
            assert!(self.store.engine.poll_timeout().is_none_or(|at| at > now), "what fired is armed again");
        }
        if end != u64::MAX {
            self.now = self.now.max(end);
        }
    }

    fn run(&mut self) {
        self.run_until(u64::MAX);
    }

    fn at_store(&mut self, plane: usize, payload: &[u8]) {
        let now = self.at();
        let store = &mut self.store;
        if !store.alive || !AcceptEngine::takes(payload) {
            return;
        }
        let stored = &store.stored;
        let taken =
            store.engine.handle_datagram(now, peer(plane), false, payload, |key| stored.contains_key(key));
        if let Ok(Taken::Segment { intake, offset, data }) = taken {
            let (granted, memory) = store.granted.get_mut(&intake.slot()).expect("memory was granted");
            assert_eq!(*granted, intake);
            memory[offset as usize..offset as usize + data.len()].copy_from_slice(&payload[data]);
        }
    }

    fn at_data_plane(&mut self, plane: usize, payload: &[u8]) {
        let now = self.at();
        if self.refuses_pulls > 0
            && let Ok(Message::Pull(pull)) = Message::new_checked(payload)
        {
            self.refuses_pulls -= 1;
            let busy = Refusal::of_pull(pull.range.tag, pull.sequence, ErrorCode::Busy, pull.range.epoch);
            let mut out = [0; MAX_CONTROL_BYTES];
            let len = message::emit_error(&mut out, &Refusal { retry_us: 100, ..busy }).unwrap();
            return self.send(To::Store(plane), &out[..len]);
        }
        let DataPlane { engine, shelf, .. } = &mut self.planes[plane];
        if OfferEngine::takes(payload) {
            let _ = engine.handle_datagram(now, StoreIndex(0), STORE, payload, shelf);
        }
    }

    /// Events and messages of both ends, until there are none.
    fn drain(&mut self) {
        let now = self.at();
        let mut out = [0_u8; MAX_CONTROL_BYTES];
        while let Some(event) = self.store.engine.poll_event() {
            let think = self.now + 50_000;
            match event {
                AcceptEvent::Reserve { intake, key, bytes } => {
                    self.store.asked.push((think, Asked::Memory { intake, key, bytes }));
                }
                AcceptEvent::Arrived { intake, key, bytes, header_bytes } => {
                    assert_eq!(self.store.granted[&intake.slot()].1.len(), bytes as usize);
                    self.store.asked.push((think, Asked::Check { intake, key, header_bytes }));
                }
                AcceptEvent::Dropped { intake } => {
                    let (granted, _) = self.store.granted.remove(&intake.slot()).expect("memory was granted");
                    assert_eq!(granted, intake);
                }
            }
        }
        while let Some((to, len)) = self.store.engine.poll_transmit(now, &mut out) {
            let plane = usize::from(to.port - 4791);
            self.send(To::DataPlane(plane), &out[..len]);
        }
        assert!(self.store.engine.in_flight_segments() <= self.store.config.window_segments);
        for at in 0..self.planes.len() {
            let plane = &mut self.planes[at];
            while let Some(event) = plane.engine.poll_event() {
                let (key, _) = plane.shelf.0.remove(&event.offer.handle()).expect("each offer ends once");
                plane.ends.insert(event.offer.handle(), (self.now, event.end, key));
            }
            while let Some(sent) = self.planes[at].engine.poll_transmit(now, &mut out) {
                let mut message = out[..sent.header_bytes].to_vec();
                if let Some((handle, range)) = sent.payload {
                    let Some(bytes) = self.planes[at].shelf.bytes(handle) else { continue };
                    message.extend_from_slice(&bytes[range]);
                }
                assert!(matches!(sent.to, OfferTo::Store(StoreIndex(0)) | OfferTo::Peer(STORE)));
                self.send(To::Store(at), &message);
            }
        }
        self.check();
    }

    /// What the store's caller does with the answers that are due.
    fn answer_asked(&mut self) {
        let due: Vec<Asked> = {
            let now = self.now;
            let (due, later) =
                std::mem::take(&mut self.store.asked).into_iter().partition(|(at, _)| *at <= now);
            self.store.asked = later;
            let due: Vec<(u64, Asked)> = due;
            due.into_iter().map(|(_, asked)| asked).collect()
        };
        let now = self.at();
        for asked in due {
            match asked {
                Asked::Memory { intake, key, bytes } => {
                    let memory = self.find_memory(&key, bytes as usize);
                    let wanted = self.store.engine.reserved(now, intake, memory);
                    if memory.is_ok() && wanted {
                        let before =
                            self.store.granted.insert(intake.slot(), (intake, vec![0; bytes as usize]));
                        assert!(before.is_none(), "a slot is not used again before its memory is back");
                    }
                }
                Asked::Check { intake, key, header_bytes } => self.judge(intake, &key, header_bytes),
            }
        }
    }

    fn find_memory(&self, key: &Key, bytes: usize) -> Result<(), Declined> {
        let store = &self.store;
        let used: usize = store.stored.values().map(Vec::len).sum();
        let granted: usize = store.granted.values().map(|(_, memory)| memory.len()).sum();
        if store.stored.contains_key(key) {
            Err(Declined::AlreadyStored)
        } else if bytes > store.budget {
            Err(Declined::TooLarge)
        } else if used + granted + bytes <= store.budget {
            Ok(())
        } else if store.pinned && used + bytes > store.budget {
            Err(Declined::Full)
        } else {
            Err(Declined::Busy)
        }
    }

    fn judge(&mut self, intake: Intake, key: &Key, header_bytes: u32) {
        let now = self.at();
        let store = &mut self.store;
        let memory = &store.granted[&intake.slot()].1;
        let header = header_bytes as usize;
        let (fields, sum) = memory[..header].split_at(header - 8);
        let verdict = if sum != checksum(fields).to_le_bytes() {
            store.engine.mark_corrupt(intake, 0..u64::from(header_bytes));
            PutVerdict::Corrupt
        } else if fields[..32] != key.0 {
            PutVerdict::BadChunk
        } else {
            let mut verdict = PutVerdict::Stored;
            for entry in fields[36..].chunks_exact(PLANE_ENTRY_BYTES) {
                let offset = u64::from_le_bytes(entry[0..8].try_into().unwrap());
                let end = offset + u64::from(u32::from_le_bytes(entry[8..12].try_into().unwrap()));
                if checksum(&memory[offset as usize..end as usize]).to_le_bytes() != entry[12..20] {
                    store.engine.mark_corrupt(intake, offset..end);
                    verdict = PutVerdict::Corrupt;
                }
            }
            verdict
        };
        if store.engine.verdict(now, intake, verdict) {
            assert_eq!(verdict, PutVerdict::Corrupt);
            return;
        }
        let (_, memory) = store.granted.remove(&intake.slot()).unwrap();
        if verdict == PutVerdict::Stored {
            store.ever.insert(*key, memory.clone());
            store.stored.insert(*key, memory);
        }
    }

    fn check(&self) {
        let counters = self.store.engine.counters();
        let dropped: u64 = counters.drops.iter().sum();
        assert_eq!(counters.datagrams, counters.offers + counters.segments + counters.errors + dropped);
        let ended = counters.stored + counters.declined + counters.refused + counters.dropped;
        assert!(counters.begun >= ended && counters.begun - ended <= 6, "{counters:?}");
        for plane in &self.planes {
            let counters = plane.engine.counters();
            let ended = counters.stored + counters.already_stored + counters.failed;
            assert_eq!(counters.begun, ended + plane.shelf.0.len() as u64);
        }
    }

    /// Checks that nothing is left over, that every offer ended in time, and that what ended as stored is.
    fn assert_quiet(&self) {
        assert!(self.store.engine.idle());
        assert_eq!(self.store.engine.in_flight_segments(), 0);
        assert!(self.store.granted.is_empty() && self.store.asked.is_empty());
        let counters = self.store.engine.counters();
        let ended = counters.stored + counters.declined + counters.refused + counters.dropped;
        assert_eq!(counters.begun, ended);
        for plane in &self.planes {
            assert!(plane.engine.idle() && plane.shelf.0.is_empty());
            assert_eq!(plane.engine.poll_timeout(), None);
            for (_, end, key) in plane.ends.values() {
                if matches!(end, OfferEnd::Stored | OfferEnd::AlreadyStored) {
                    assert!(self.store.ever.contains_key(key), "what is reported stored was stored");
                }
            }
        }
        for (key, bytes) in &self.store.ever {
            let number = u64::from_le_bytes(key.0[..8].try_into().unwrap());
            let chunk = Chunk::new(key, &SHAPE, 4096, &mut Random::new(number));
            for plane in 0..SHAPE.planes() as usize {
                let stored = Chunk { info: chunk.info, bytes: bytes.clone() };
                assert!(stored.plane(plane) == chunk.plane(plane), "what is stored is what was offered");
            }
        }
    }

    fn end(&self, plane: usize, id: OfferId) -> OfferEnd {
        self.planes[plane].ends[&id.handle()].1
    }
}

#[test]
fn a_chunk_over_a_good_network_is_stored_and_asks_nothing_twice() {
    let mut world = World::new(1, 1, accept_config());
    let id = world.offer(0, 5, SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.end(0, id), OfferEnd::Stored);
    assert!(world.planes[0].ends[&id.handle()].0 < 20 * MILLISECOND, "not only at the deadline");
    let counters = *world.store.engine.counters();
    assert_eq!((counters.segments_asked_again, counters.timeouts), (0, 0));
    assert_eq!(counters.drops.iter().sum::<u64>(), 0);
    assert_eq!(world.planes[0].engine.counters().offers_sent, 1);
    assert_eq!(world.planes[0].engine.serve_counters().segments, counters.segments);
    // Once more: nothing moves but the offer and its answer.
    let again = world.offer(0, 5, 2 * SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.end(0, again), OfferEnd::AlreadyStored);
    assert_eq!(world.store.engine.counters().segments, counters.segments);
}

#[test]
fn lost_segments_are_asked_for_again_after_a_round_trip_and_nothing_else_is() {
    let mut world = World::new(13, 1, accept_config());
    world.loses_segments = [3, 20, 21, 40].into();
    let id = world.offer(0, 5, SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.end(0, id), OfferEnd::Stored);
    let counters = world.store.engine.counters();
    assert_eq!((counters.segments_lost, counters.segments_asked_again), (4, 4), "{counters:?}");
    assert_eq!((counters.segments_late, counters.tail_probes, counters.timeouts), (0, 0, 0), "{counters:?}");
    // Some round trips of 40 us and more than 100 packets of 1 us.
    assert!(world.planes[0].ends[&id.handle()].0 < MILLISECOND, "no timeout was waited for");
}

#[test]
fn a_lost_last_segment_is_probed_for() {
    let mut world = World::new(14, 1, accept_config());
    let bytes = Chunk::new(&World::key(5), &SHAPE, 4096, &mut Random::new(5)).info.chunk_bytes;
    world.loses_segments = [bytes.div_ceil(256) as u32 - 1].into();
    let id = world.offer(0, 5, SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.end(0, id), OfferEnd::Stored);
    let counters = world.store.engine.counters();
    assert_eq!((counters.tail_probes, counters.timeouts, counters.segments_asked_again), (1, 0, 1));
}

#[test]
fn a_data_plane_without_room_for_pulls_is_left_alone_for_a_while() {
    let mut world = World::new(15, 1, accept_config());
    world.refuses_pulls = 3;
    let id = world.offer(0, 5, SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.end(0, id), OfferEnd::Stored);
    let counters = world.store.engine.counters();
    assert_eq!((counters.errors, counters.timeouts, counters.tail_probes), (3, 0, 0), "{counters:?}");
    assert_eq!(counters.segments_asked_again, 3 * 8, "what was refused, PULLs of 8 segments");
    assert!(world.planes[0].ends[&id.handle()].0 < MILLISECOND, "no timeout was waited for");
}

#[test]
fn more_ports_than_intakes_are_pulled_from_by_and_by() {
    let mut world = World::new(16, 7, accept_config());
    let ids: Vec<OfferId> = (0..7).map(|plane| world.offer(plane, plane as u64, SECOND)).collect();
    world.run();
    world.assert_quiet();
    assert!(ids.iter().enumerate().all(|(plane, id)| world.end(plane, *id) == OfferEnd::Stored));
    assert_eq!(world.store.engine.counters().segments_asked_again, 0);
}

#[test]
fn a_silent_store_ends_the_offer_at_its_deadline() {
    let mut world = World::new(2, 1, accept_config());
    world.store.alive = false;
    let id = world.offer(0, 5, SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(
        world.planes[0].ends[&id.handle()],
        (SECOND, OfferEnd::Failed(OfferFailure::Silent), World::key(5))
    );
}

#[test]
fn a_store_that_dies_midway_ends_the_offer_at_its_deadline() {
    let mut world = World::new(3, 1, accept_config());
    let id = world.offer(0, 5, SECOND);
    world.run_until(150_000);
    assert!(world.store.engine.counters().segments > 0);
    world.store.alive = false;
    world.run();
    let (at, end, _) = world.planes[0].ends[&id.handle()];
    assert_eq!((at, end), (SECOND, OfferEnd::Failed(OfferFailure::Deadline)));
    // What it had got it gives up by itself.
    world.assert_quiet();
    assert_eq!(world.store.engine.counters().dropped, 1);
}

#[test]
fn memory_is_free_again_when_the_patience_is_over() {
    let patience = 5 * MILLISECOND;
    // The first timeout of a path is later.
    let rto_min = Duration::from_millis(20);
    let mut world = World::new(17, 1, AcceptConfig { rto_min, ..accept_config() });
    world.offer(0, 5, patience);
    world.run_until(30_000);
    // The store has heard the offer, and nothing comes through any more.
    world.carries_bytes = 0;
    world.run_until(patience - MILLISECOND);
    assert_eq!(world.store.granted.len(), 1);
    // Patience is told in milliseconds.
    world.run_until(patience + MILLISECOND);
    assert!(world.store.granted.is_empty(), "not only when a timeout comes by");
}

#[test]
fn a_store_that_restarts_midway_gets_the_chunk() {
    let mut world = World::new(4, 1, accept_config());
    let id = world.offer(0, 5, SECOND);
    world.run_until(150_000);
    assert!(world.store.engine.counters().segments > 0);
    world.restart_store();
    world.run();
    world.assert_quiet();
    assert_eq!(world.end(0, id), OfferEnd::Stored);
}

#[test]
fn a_data_plane_that_withdraws_or_dies_leaves_no_memory_behind() {
    let mut world = World::new(5, 2, accept_config());
    let id = world.offer(0, 5, 60 * SECOND);
    world.offer(1, 6, 60 * SECOND);
    world.run_until(150_000);
    assert_eq!(world.store.granted.len(), 2);
    world.planes[0].engine.cancel(id);
    world.drain();
    // The other one loses all memory of what it did.
    world.planes[1].engine = offer_engine(300);
    world.planes[1].shelf.0.clear();
    world.run_until(300 * MILLISECOND);
    assert_eq!(world.end(0, id), OfferEnd::Failed(OfferFailure::Cancelled));
    assert!(world.store.granted.is_empty(), "both were told by an ERROR, long before the silence is noticed");
    world.run();
    assert_eq!(world.store.engine.counters().dropped, 2);
}

#[test]
fn two_data_planes_that_offer_the_same_chunk_store_it_once() {
    let mut world = World::new(6, 2, accept_config());
    let ids = [world.offer(0, 5, SECOND), world.offer(1, 5, SECOND)];
    world.run();
    world.assert_quiet();
    assert_eq!(world.store.engine.counters().stored, 1);
    assert_eq!(world.store.engine.counters().segments_asked_again, 0);
    assert_eq!([world.end(0, ids[0]), world.end(1, ids[1])], [OfferEnd::Stored, OfferEnd::AlreadyStored]);
}

#[test]
fn what_cannot_be_stored_is_refused_with_the_reason() {
    let refused =
        |world: &World, id| world.end(0, id) == OfferEnd::Failed(OfferFailure::Refused(OfferStatus::Full));
    let mut world = World::new(7, 1, accept_config());
    (world.store.budget, world.store.pinned) = (30_000, true);
    let ids: Vec<OfferId> = (0..4).map(|number| world.offer(0, number, SECOND)).collect();
    world.run();
    world.assert_quiet();
    assert!(ids.iter().any(|id| refused(&world, *id)));
    assert!(ids.iter().any(|id| world.end(0, *id) == OfferEnd::Stored));

    let cases = [
        (AcceptConfig { max_intakes: 0, ..accept_config() }, OfferStatus::Closed),
        (AcceptConfig { max_chunk_bytes: 500, ..accept_config() }, OfferStatus::TooLarge),
    ];
    for (config, status) in cases {
        let mut world = World::new(8, 1, config);
        let id = world.offer(0, 5, SECOND);
        world.run();
        world.assert_quiet();
        assert_eq!(world.end(0, id), OfferEnd::Failed(OfferFailure::Refused(status)));
    }
}

#[test]
fn a_path_that_carries_less_than_before_gets_smaller_segments() {
    let config = AcceptConfig { segment_bytes: 1024, silence: Duration::from_secs(3), ..accept_config() };
    let mut world = World::new(12, 1, config);
    world.planes[0].engine = OfferEngine::new(OfferConfig {
        segment_bytes: 256,
        serve: ServeConfig { epoch: 100, max_segment_bytes: 1024, ..ServeConfig::default() },
        ..offer_config(100)
    });
    world.planes[0].engine.set_segment_bytes(StoreIndex(0), 1024 + 31);
    // They were found to be carried; by now only smaller ones are.
    world.carries_bytes = 512;
    let id = world.offer(0, 1, 2 * SECOND);
    while world.planes[0].engine.poll_suspect().is_none() {
        let soon = world.now + MILLISECOND;
        assert!(soon < SECOND, "it is suspected in time");
        world.run_until(soon);
    }
    world.planes[0].engine.set_segment_bytes(StoreIndex(0), 0);
    world.run();
    world.assert_quiet();
    assert_eq!(world.end(0, id), OfferEnd::Stored);
    assert!(world.planes[0].ends[&id.handle()].0 < 2 * SECOND);
    assert_eq!(world.store.engine.counters().dropped, 1, "begun anew, once");
}

#[test]
fn a_chunk_that_is_damaged_at_its_source_is_refused_after_some_tries() {
    let mut world = World::new(9, 1, accept_config());
    let id = world.offer(0, 5, SECOND);
    let (_, bytes) = world.planes[0].shelf.0.get_mut(&id.handle()).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    world.run();
    world.assert_quiet();
    assert_eq!(world.end(0, id), OfferEnd::Failed(OfferFailure::Refused(OfferStatus::Corrupt)));
    let counters = world.store.engine.counters();
    assert_eq!((counters.corrupt, counters.refused), (4, 1));
    // Only the damaged plane was pulled again.
    assert!(counters.segments_asked_again <= 3 * 4096_u64.div_ceil(256) + 6, "{counters:?}");

    let mut world = World::new(10, 1, accept_config());
    let id = world.offer(0, 5, SECOND);
    let entry = world.planes[0].shelf.0.get_mut(&id.handle()).unwrap();
    // Another chunk, intact, under this name.
    entry.1 = {
        let chunk = Chunk::new(&World::key(6), &SHAPE, 4096, &mut Random::new(5));
        assert_eq!(chunk.bytes.len(), entry.1.len());
        chunk.bytes
    };
    world.run();
    world.assert_quiet();
    assert_eq!(world.end(0, id), OfferEnd::Failed(OfferFailure::Refused(OfferStatus::BadChunk)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn hostile_datagrams_never_panic(seed: u64, garbage in proptest::collection::vec((any::<bool>(), 0_u8..10, proptest::collection::vec(any::<u8>(), 0..80)), 1..40)) {
        let mut world = World::new(seed, 1, accept_config());
        world.offer(0, 5, SECOND);
        world.run_until(100_000);
        for (to_store, kind, rest) in garbage {
            let mut payload = vec![b'S', b'K', b'V', b'P', 1, kind, 0, 0];
            payload.extend_from_slice(&rest);
            // Names that exist, now and then, so that not all is stale.
            if world.random.chance(0.5) && payload.len() >= 16 {
                payload[8..12].copy_from_slice(&world.planes[0].shelf.0.keys().next().copied().unwrap_or(0).to_le_bytes());
            }
            if to_store { world.at_store(0, &payload) } else { world.at_data_plane(0, &payload) }
            world.drain();
        }
        world.run();
        prop_assert!(world.store.granted.is_empty());
        prop_assert!(world.planes[0].engine.offers() == 0);
    }
}
