//! Real engines of both ends, virtual time, latency, stores that restart, fall silent or are slow; nothing is lost. Every invariant of the
//! engines is checked at every step. (Bad networks are `sim`'s, which these tests cannot use: it depends on this crate.)

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "each test uses a part of this; its numbers are small"
)]

pub mod chunks;
pub mod random;
pub mod situations;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{IpAddr, Ipv4Addr};

use protocol::wire::icmp::Quote;
use protocol::wire::message::{
    ERROR_BYTES, ErrorCode, MAX_CONTROL_BYTES, Message, Refusal, Subject, emit_error,
};
use protocol::{
    Accepted, ChunkFailure, ChunkShape, Event, FetchConfig, FetchEngine, FetchId, FetchOutcome, Instant, Key,
    LookupId, LookupOutcome, Peer, Placement, ServeConfig, ServeEngine, Sources, StoreIndex, TransferId,
    Verdict,
};

use chunks::{Layout, Library};
use random::Random;

pub struct StoreNode {
    pub engine: ServeEngine,
    pub library: Library,
    pub alive: bool,
    /// While it is not: packets to it are answered with ICMP errors, no closer together than this.
    pub errors_every_nanos: Option<u64>,
    next_error: u64,
    /// Packets from it take so much longer.
    pub delay_nanos: u64,
    /// Until then it answers that it is busy.
    pub busy_for_nanos: u64,
    pub epoch: u64,
    busy_until: u64,
    config: ServeConfig,
}

/// What the caller keeps of a transfer.
struct Kept {
    transfer: TransferId,
    segments: BTreeMap<u32, Vec<u8>>,
    awaits_verdict: bool,
}

/// What a fetch on one queue should and did do.
#[derive(Debug)]
pub struct Record {
    pub sources: Sources,
    pub keys: Vec<Key>,
    pub planes: u32,
    pub deadline: u64,
    pub delivered: BTreeSet<(u32, u16)>,
    pub failed: BTreeMap<u32, ChunkFailure>,
    pub ended: Option<(u64, FetchOutcome)>,
}

struct Node {
    engine: FetchEngine<Layout>,
    kept: BTreeMap<usize, Kept>,
    /// When, transfer, fetch, chunk, plane.
    verdicts: Vec<(u64, TransferId, FetchId, u32, u16)>,
}

enum To {
    Store {
        store: usize,
        queue: usize,
    },
    Queue {
        queue: usize,
        store: usize,
    },
    /// An ICMP error about a packet of the queue to the store.
    Error {
        queue: usize,
        store: usize,
    },
}

pub struct World {
    pub random: Random,
    pub now: u64,
    pub latency_nanos: u64,
    /// Longest time from a plane's arrival to its verdict.
    pub decode_nanos: u64,
    /// Chance that a plane is found corrupt, or rejected, though it is not.
    pub false_corrupt: f64,
    pub rejected: f64,
    pub stores: Vec<StoreNode>,
    pub records: BTreeMap<(usize, u64), Record>,
    pub lookups: BTreeMap<u64, (LookupOutcome, u32, u64)>,
    pub packets: u64,
    nodes: Vec<Node>,
    wire: BinaryHeap<Reverse<(u64, u64)>>,
    in_transit: BTreeMap<u64, (To, Vec<u8>)>,
    sequence: u64,
}

pub const PORT: u16 = 4791;

fn peer(queue: usize) -> Peer {
    Peer { mac: [2, 0, 0, 0, 0, 1], ip: IpAddr::V4(Ipv4Addr::LOCALHOST), port: PORT + queue as u16 }
}

impl World {
    pub fn new(seed: u64, config: &FetchConfig, serve: ServeConfig) -> World {
        World::with_replicas(seed, config, serve, 1)
    }

    /// A world whose stores keep each placed chunk `replicas` times.
    pub fn with_replicas(seed: u64, config: &FetchConfig, serve: ServeConfig, replicas: usize) -> World {
        let ids: Vec<u64> = (0..u64::from(config.stores)).collect();
        let placement = Placement::new(&ids, replicas).expect("a valid placement");
        let engine = |queue| {
            FetchEngine::with_placement(FetchConfig { queue, ..*config }, placement.clone(), Layout)
                .expect("valid budgets")
        };
        let nodes = (0..config.queues)
            .map(|queue| Node { engine: engine(queue), kept: BTreeMap::new(), verdicts: Vec::new() })
            .collect();
        let stores = (0..config.stores)
            .map(|store| {
                let epoch = 1000 + u64::from(store);
                let config = ServeConfig { epoch, ..serve };
                let engine = ServeEngine::new(config);
                StoreNode {
                    engine,
                    library: Library::default(),
                    alive: true,
                    errors_every_nanos: None,
                    next_error: 0,
                    delay_nanos: 0,
                    busy_for_nanos: 0,
                    epoch,
                    busy_until: 0,
                    config,
                }
            })
            .collect();
        World {
            random: Random::new(seed),
            now: 0,
            latency_nanos: 20_000,
            decode_nanos: 50_000,
            false_corrupt: 0.0,
            rejected: 0.0,
            stores,
            records: BTreeMap::new(),
            lookups: BTreeMap::new(),
            packets: 0,
            nodes,
            wire: BinaryHeap::new(),
            in_transit: BTreeMap::new(),
            sequence: 0,
        }
    }

    pub fn engine(&self, queue: usize) -> &FetchEngine<Layout> {
        &self.nodes[queue].engine
    }

    pub fn engine_mut(&mut self, queue: usize) -> &mut FetchEngine<Layout> {
        &mut self.nodes[queue].engine
    }

    pub fn now(&self) -> Instant {
        Instant::from_nanos(self.now)
    }

    /// Starts a fetch on every queue.
    pub fn start(&mut self, id: u64, store: usize, keys: &[Key], shape: &ChunkShape, deadline: u64) {
        self.start_from(id, StoreIndex(store as u16), keys, shape, deadline);
    }

    /// The same of chunks that lie on `sources`.
    pub fn start_from(
        &mut self,
        id: u64,
        sources: impl Into<Sources>,
        keys: &[Key],
        shape: &ChunkShape,
        deadline: u64,
    ) {
        let sources = sources.into();
        for queue in 0..self.nodes.len() {
            let now = self.now();
            let at = Instant::from_nanos(deadline);
            let engine = &mut self.nodes[queue].engine;
            engine.start(now, FetchId(id), at, sources, keys, shape).expect("a free fetch slot");
            let record = Record {
                sources,
                keys: keys.to_vec(),
                planes: shape.planes(),
                deadline,
                delivered: BTreeSet::new(),
                failed: BTreeMap::new(),
                ended: None,
            };
            assert!(self.records.insert((queue, id), record).is_none());
        }
        self.drain();
    }

    pub fn cancel(&mut self, id: u64) {
        let now = self.now();
        for node in &mut self.nodes {
            node.engine.cancel(now, FetchId(id));
        }
        self.drain();
    }

    /// Restarts a store: what waited is gone, handles and epoch are new.
    pub fn restart(&mut self, store: usize) {
        let node = &mut self.stores[store];
        node.epoch += 1000;
        node.library.shuffle(&mut self.random);
        node.engine = ServeEngine::new(ServeConfig { epoch: node.epoch, ..node.config });
    }

    fn send(&mut self, at: u64, to: To, payload: &[u8]) {
        self.packets += 1;
        self.sequence += 1;
        self.in_transit.insert(self.sequence, (to, payload.to_vec()));
        self.wire.push(Reverse((at + self.latency_nanos, self.sequence)));
    }

    /// When something happens next, if ever.
    fn next_time(&self) -> Option<u64> {
        let wire = self.wire.peek().map(|Reverse((at, _))| *at);
        let timers =
            self.nodes.iter().filter_map(|node| node.engine.poll_timeout()).map(Instant::nanos).min();
        let verdicts = self.nodes.iter().flat_map(|node| &node.verdicts).map(|verdict| verdict.0).min();
        [wire, timers, verdicts].into_iter().flatten().min().map(|at| at.max(self.now))
    }

    /// Runs until nothing is left to happen, or until `end`.
    pub fn run_until(&mut self, end: u64) {
        let mut steps = 0_u64;
        while let Some(at) = self.next_time().filter(|at| *at <= end) {
            steps += 1;
            assert!(steps < 3_000_000, "the run does not end");
            self.now = at;
            while let Some(Reverse((due, sequence))) = self.wire.peek().copied() {
                if due > self.now {
                    break;
                }
                self.wire.pop();
                let (to, payload) = self.in_transit.remove(&sequence).unwrap();
                match to {
                    To::Store { store, queue } => self.at_store(store, queue, &payload),
                    To::Queue { queue, store } => self.at_queue(queue, store, &payload),
                    To::Error { queue, store } => drop(self.take_error(queue, store, &payload)),
                }
            }
            self.give_verdicts();
            for queue in 0..self.nodes.len() {
                let now = self.now();
                let engine = &mut self.nodes[queue].engine;
                engine.handle_timeout(now);
                assert!(engine.poll_timeout().is_none_or(|at| at > now), "a timer that fired is armed again");
            }
            self.drain();
        }
        if end != u64::MAX {
            self.now = self.now.max(end);
        }
    }

    /// Runs until nothing is left to happen.
    pub fn run(&mut self) {
        self.run_until(u64::MAX);
    }

    fn at_store(&mut self, store: usize, queue: usize, payload: &[u8]) {
        let now = self.now();
        let node = &mut self.stores[store];
        if !node.alive {
            if node.errors_every_nanos.is_some() && node.next_error <= self.now {
                node.next_error = self.now + node.errors_every_nanos.unwrap_or_default();
                let quote = Quote::new(payload);
                self.send(now.nanos(), To::Error { queue, store }, quote.bytes());
            }
            return;
        }
        if self.now < node.busy_for_nanos {
            let (tag, sequence, subject) = match Message::new_checked(payload) {
                Ok(Message::Pull(pull)) => (pull.range.tag, pull.sequence, Subject::Pull),
                Ok(Message::Lookup(lookup)) => (lookup.request, 0, Subject::Lookup),
                _ => return,
            };
            let busy =
                Refusal { tag, sequence, subject, code: ErrorCode::Busy, epoch: node.epoch, retry_us: 100 };
            let mut out = [0; ERROR_BYTES];
            emit_error(&mut out, &busy).expect("it fits");
            self.send(now.nanos(), To::Queue { queue, store }, &out);
            return;
        }
        let _ = node.engine.handle_datagram(now, peer(queue), payload, &node.library);
        let mut out = [0_u8; MAX_CONTROL_BYTES];
        loop {
            let node = &mut self.stores[store];
            let Some(transmit) = node.engine.poll_transmit(now, &mut out) else { break };
            let mut message = out[..transmit.header_bytes].to_vec();
            if let Some((handle, range)) = transmit.payload {
                let Some(bytes) = node.library.bytes(handle) else { continue };
                message.extend_from_slice(&bytes[range]);
            }
            // One packet a microsecond.
            node.busy_until = node.busy_until.max(self.now) + 1000;
            let at = node.busy_until + node.delay_nanos;
            let queue = usize::from(transmit.to.port - PORT);
            self.send(at, To::Queue { queue, store }, &message);
        }
    }

    /// An ICMP error by which `store` cannot be reached comes to a queue. Returns whether it was acted on.
    pub fn take_error(&mut self, queue: usize, store: usize, quote: &[u8]) -> bool {
        let now = self.now();
        let taken = self.nodes[queue].engine.handle_unreachable(now, StoreIndex(store as u16), quote);
        self.check(queue);
        taken
    }

    /// What is on its way to `store` now.
    pub fn on_the_way_to(&self, store: usize) -> Vec<Vec<u8>> {
        let to_store = |to: &To| matches!(to, To::Store { store: at, .. } if *at == store);
        self.in_transit.values().filter(|(to, _)| to_store(to)).map(|(_, bytes)| bytes.clone()).collect()
    }

    fn at_queue(&mut self, queue: usize, store: usize, payload: &[u8]) {
        let now = self.now();
        let node = &mut self.nodes[queue];
        match node.engine.handle_datagram(now, StoreIndex(store as u16), false, payload) {
            Ok(Accepted::Segment { transfer, segment, data }) => {
                let kept = node.kept.entry(transfer.slot()).or_insert_with(|| Kept {
                    transfer,
                    segments: BTreeMap::new(),
                    awaits_verdict: false,
                });
                assert_eq!(kept.transfer, transfer, "the slot's earlier transfer has ended");
                assert!(!kept.awaits_verdict, "no segment after the last");
                let before = kept.segments.insert(segment, payload[data].to_vec());
                assert!(before.is_none(), "a segment is accepted once");
            }
            Ok(Accepted::Control) | Err(_) => {}
        }
        self.check(queue);
    }

    fn give_verdicts(&mut self) {
        for queue in 0..self.nodes.len() {
            let now = self.now();
            let due: Vec<_> =
                self.nodes[queue].verdicts.iter().filter(|verdict| verdict.0 <= self.now).copied().collect();
            self.nodes[queue].verdicts.retain(|verdict| verdict.0 > now.nanos());
            for (_, transfer, fetch, chunk, plane) in due {
                let node = &mut self.nodes[queue];
                let kept = node.kept.remove(&transfer.slot()).expect("kept until its verdict");
                assert_eq!(kept.transfer, transfer);
                let bytes: Vec<u8> = kept.segments.into_values().flatten().collect();
                let header = node.engine.header(transfer).expect("a header until the verdict").to_vec();
                let record = self.records.get_mut(&(queue, fetch.0)).unwrap();
                assert!(record.ended.is_none(), "no verdict is due after the end");
                let entry = &header[36 + usize::from(plane) * chunks::PLANE_ENTRY_BYTES..]
                    [..chunks::PLANE_ENTRY_BYTES];
                let intact = entry[12..20] == chunks::checksum(&bytes).to_le_bytes();
                let verdict = if !intact || self.random.chance(self.false_corrupt) {
                    Verdict::Corrupt
                } else if self.random.chance(self.rejected) {
                    Verdict::Rejected(7)
                } else {
                    let key = &record.keys[chunk as usize];
                    let stored = match record.sources {
                        Sources::One(store) => self.stores[usize::from(store.0)].library.get(key),
                        Sources::Placed => self.stores.iter().find_map(|store| store.library.get(key)),
                    };
                    if let Some(stored) = stored {
                        assert_eq!(bytes, stored.plane(usize::from(plane)), "delivered what was stored");
                    }
                    assert!(record.delivered.insert((chunk, plane)), "a plane is delivered once");
                    Verdict::Delivered
                };
                assert!(node.engine.verdict(now, transfer, verdict));
                assert!(!node.engine.verdict(now, transfer, verdict), "a second verdict is refused");
                self.check(queue);
            }
        }
    }

    /// Polls all events, then sends all that may be sent.
    pub fn drain(&mut self) {
        for queue in 0..self.nodes.len() {
            while let Some(event) = self.nodes[queue].engine.poll_event() {
                self.on_event(queue, event);
            }
            self.check(queue);
            let mut out = [0_u8; MAX_CONTROL_BYTES];
            let now = self.now();
            while let Some(transmit) = self.nodes[queue].engine.poll_transmit(now, &mut out) {
                let store = usize::from(transmit.store.0);
                self.send(now.nanos(), To::Store { store, queue }, &out[..transmit.len]);
                self.check(queue);
            }
            // Admitting a fetch without planes for this queue ends it.
            while let Some(event) = self.nodes[queue].engine.poll_event() {
                self.on_event(queue, event);
            }
        }
    }

    fn on_event(&mut self, queue: usize, event: Event) {
        let queues = self.nodes.len() as u64;
        let node = &mut self.nodes[queue];
        match event {
            Event::LookupDone { id: LookupId(id), outcome, found, tokens, .. } => {
                assert!(self.lookups.insert(id, (outcome, found, tokens)).is_none(), "a lookup ends once");
            }
            Event::PlaneArrived { transfer, fetch, chunk, plane, bytes, segments } => {
                let kept = node.kept.get_mut(&transfer.slot()).expect("its segments were accepted");
                assert_eq!(kept.transfer, transfer);
                assert!(!kept.awaits_verdict, "a plane arrives once");
                kept.awaits_verdict = true;
                assert_eq!(kept.segments.len(), segments as usize);
                assert_eq!(kept.segments.values().map(Vec::len).sum::<usize>(), bytes as usize);
                let record = &self.records[&(queue, fetch.0)];
                let number = u64::from(chunk) * u64::from(record.planes) + u64::from(plane);
                assert_eq!(number % queues, queue as u64, "each queue takes its own planes");
                let at = self.now + self.random.below(self.decode_nanos + 1);
                node.verdicts.push((at, transfer, fetch, chunk, plane));
            }
            Event::TransferReset { transfer } => {
                let kept = node.kept.remove(&transfer.slot()).expect("something of it was accepted");
                assert_eq!(kept.transfer, transfer);
                assert!(!kept.awaits_verdict, "an arrived plane ends by its verdict");
            }
            Event::ChunkFailed { fetch, chunk, reason } => {
                let record = self.records.get_mut(&(queue, fetch.0)).unwrap();
                assert!(record.ended.is_none());
                assert!(record.failed.insert(chunk, reason).is_none(), "a chunk fails once");
            }
            Event::FetchEnded { fetch, outcome, planes_delivered, chunks_failed } => {
                assert!(node.verdicts.iter().all(|verdict| verdict.2 != fetch), "no verdict is owed");
                let now = self.now;
                let record = self.records.get_mut(&(queue, fetch.0)).unwrap();
                assert!(record.ended.is_none(), "a fetch ends once");
                record.ended = Some((now, outcome));
                assert!(now <= record.deadline + self.decode_nanos, "by its deadline");
                assert_eq!(planes_delivered as usize, record.delivered.len());
                assert_eq!(chunks_failed as usize, record.failed.len());
                check_record(record, queue as u64, queues, outcome);
            }
        }
    }

    fn check(&self, queue: usize) {
        let node = &self.nodes[queue];
        let (config, counters) = (node.engine.config(), node.engine.counters());
        assert!(node.engine.in_flight_segments() <= config.window_segments);
        assert!(node.engine.memory_segments() <= config.memory_segments);
        let kept: usize = node.kept.values().map(|kept| kept.segments.len()).sum();
        assert!(kept <= node.engine.memory_segments() as usize, "the caller keeps no more than was reserved");
        assert_eq!(
            counters.datagrams,
            counters.segments_placed + counters.header_segments + counters.control + counters.dropped()
        );
    }

    /// Checks that nothing is left over.
    pub fn assert_quiet(&self) {
        for (queue, node) in self.nodes.iter().enumerate() {
            assert!(node.engine.idle());
            assert_eq!(node.engine.fetches(), 0);
            assert_eq!(node.engine.chunks_under_way(), 0);
            assert_eq!(node.engine.planes_under_way(), 0);
            assert_eq!(node.engine.in_flight_segments(), 0);
            assert_eq!(node.engine.memory_segments(), 0);
            assert!(node.kept.is_empty() && node.verdicts.is_empty());
            assert_eq!(node.engine.poll_timeout(), None);
            self.check(queue);
        }
        for ((queue, id), record) in &self.records {
            assert!(record.ended.is_some(), "fetch {id} of queue {queue} has not ended");
        }
    }
}

/// Every chunk is delivered whole or named.
fn check_record(record: &Record, queue: u64, queues: u64, outcome: FetchOutcome) {
    for chunk in 0..record.keys.len() as u32 {
        let mine =
            |plane: &u32| (u64::from(chunk) * u64::from(record.planes) + u64::from(*plane)) % queues == queue;
        let whole =
            (0..record.planes).filter(mine).all(|plane| record.delivered.contains(&(chunk, plane as u16)));
        let named = record.failed.contains_key(&chunk);
        assert!(whole || named, "chunk {chunk} is neither delivered nor named");
    }
    match outcome {
        FetchOutcome::Done => assert!(record.failed.is_empty()),
        FetchOutcome::Failed => assert!(!record.failed.is_empty()),
        FetchOutcome::Cancelled => {}
    }
}
