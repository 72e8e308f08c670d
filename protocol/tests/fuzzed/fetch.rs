//! The data plane's engine between stores that answer and somebody who lies in their name.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::OnceLock;
use std::time::Duration;

use protocol::wire::icmp::QUOTE_BYTES;
use protocol::wire::message::MAX_CONTROL_BYTES;
use protocol::{
    Accepted, ChunkShape, Event, FetchConfig, FetchEngine, FetchId, FetchOutcome, Instant, Key, LookupId,
    Placement, Schedule, ServeEngine, Sources, StoreIndex, TransferId, Verdict,
};

use super::chunks::{Chunk, Layout, Library, PLANE_ENTRY_BYTES, checksum};
use super::input::Input;
use super::random::Random;
use super::{message, peer, small};

const SHAPE: ChunkShape = ChunkShape { layers: 3, kv_heads: 2, head_dim: 8, dtype: 1 };
const STORES: u16 = 2;
/// Chunks that the stores hold; keys beyond name nothing.
const CHUNKS: usize = 6;
const MAX_PLANE_BYTES: u32 = 512;
/// Answers under way; more are lost.
const MOST_ANSWERS: usize = 256;
/// Longest time that a fetch has.
const PATIENCE_MS: u64 = 64;
const MILLISECOND: u64 = 1_000_000;

fn key(number: usize) -> Key {
    Key([number as u8; 32])
}

fn library() -> Library {
    static CHUNKS_OF_ALL: OnceLock<Vec<Chunk>> = OnceLock::new();
    let chunk = |number| Chunk::new(&key(number), &SHAPE, MAX_PLANE_BYTES, &mut Random::new(number as u64));
    let mut library = Library::default();
    for (number, chunk) in CHUNKS_OF_ALL.get_or_init(|| (0..CHUNKS).map(chunk).collect()).iter().enumerate() {
        library.insert(key(number), chunk.clone());
    }
    library
}

struct Store {
    engine: ServeEngine,
    library: Library,
    epoch: u64,
}

impl Store {
    fn new(epoch: u64, library: Library) -> Store {
        Store { engine: ServeEngine::new(small(epoch)), library, epoch }
    }
}

/// What the caller keeps of a transfer.
struct Kept {
    transfer: TransferId,
    segments: BTreeMap<u32, usize>,
    arrived: bool,
}

/// What a fetch did.
struct Record {
    keys: usize,
    delivered: BTreeSet<(u32, u16)>,
    failed: BTreeSet<u32>,
    ended: bool,
}

struct World {
    engine: FetchEngine<Layout>,
    stores: Vec<Store>,
    now: u64,
    answers: VecDeque<(u16, Vec<u8>)>,
    /// What was said lately, to be said again.
    said: VecDeque<(u16, Vec<u8>)>,
    /// What was asked for lately.
    asked: VecDeque<Vec<u8>>,
    kept: BTreeMap<usize, Kept>,
    /// Planes that wait for their verdict.
    arrived: Vec<(TransferId, FetchId, u32, u16)>,
    fetches: BTreeMap<u64, Record>,
    lookups: BTreeSet<u64>,
    next_id: u64,
    /// Whether what is sent reaches the stores.
    cut_off: bool,
}

/// A script: fetches begun and cancelled, answers handed over, lost, damaged, repeated or made up, ICMP errors, time, verdicts. Whatever it says, memory stays within
/// the budgets, counters add up, every fetch ends once and names what it did not bring, and with the last nothing is left.
pub(crate) fn fetch(data: &[u8]) {
    let mut input = Input(data);
    let mut world = World::new(input.byte());
    // Every step takes a byte at least.
    while !input.is_empty() {
        world.step(&mut input);
        world.pump();
    }
    world.finish();
}

impl World {
    fn new(mode: u8) -> World {
        let config = FetchConfig {
            queues: 1 + u16::from(mode >> 3 & 1),
            max_fetches: 3,
            max_lookups: 2,
            max_chunks_per_fetch: CHUNKS as u32,
            active_chunks: 3,
            active_planes: 4,
            max_planes_per_chunk: 6,
            max_plane_bytes: MAX_PLANE_BYTES,
            max_header_bytes: 256,
            segment_bytes: 64,
            window_segments: [24, 1 << 16][usize::from(mode & 1)],
            link_mbps: [0, 1000][usize::from(mode >> 1 & 1)],
            queue_tolerance: Duration::from_micros(20),
            schedule: [Schedule::ShortestRemaining, Schedule::RoundRobin][usize::from(mode >> 4 & 1)],
            memory_segments: [8, 40][usize::from(mode >> 5 & 1)],
            rto_min: Duration::from_millis(1),
            rto_max: Duration::from_millis(16),
            corrupt_retries: 1,
            lookup_retries: 1,
            stores: STORES,
            ..FetchConfig::default()
        };
        let placement = Placement::new(&[0, 1], 1 + usize::from(mode >> 2 & 1)).expect("two stores");
        World {
            engine: FetchEngine::with_placement(config, placement, Layout).expect("budgets that work"),
            stores: (0..STORES).map(|store| Store::new(100 + u64::from(store), library())).collect(),
            now: 1,
            answers: VecDeque::new(),
            said: VecDeque::new(),
            asked: VecDeque::new(),
            kept: BTreeMap::new(),
            arrived: Vec::new(),
            fetches: BTreeMap::new(),
            lookups: BTreeSet::new(),
            next_id: 0,
            cut_off: false,
        }
    }

    fn now(&self) -> Instant {
        Instant::from_nanos(self.now)
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() & 15 {
            0 => self.start(input, false),
            1 => self.start(input, true),
            2 => self.cancel(input),
            3 | 4 => (0..=input.below(16)).for_each(|_| self.answer()),
            5 => drop(self.answers.drain(..(1 + input.below(8)).min(self.answers.len()))),
            6 => {
                if let Some((store, mut message)) = self.answers.pop_front() {
                    input.damage(&mut message);
                    self.receive(store, false, &message);
                }
            }
            7 => {
                if let Some((store, mut message)) = self.said.get(input.below(self.said.len())).cloned() {
                    input.damage(&mut message);
                    self.receive(store ^ u16::from(input.byte() & 1), true, &message);
                }
            }
            8 => {
                let (kind, length) = (input.byte(), usize::from(input.byte()));
                let made_up = message(kind, input.take(length));
                self.receive(u16::from(kind >> 4) % STORES, kind & 0x80 != 0, &made_up);
            }
            9 => self.pass(1 << (input.byte() % 27)),
            10 => self.give_verdict(input.byte()),
            11 => {
                let store = &mut self.stores[input.below(usize::from(STORES))];
                let mut library = std::mem::take(&mut store.library);
                library.shuffle(&mut Random::new(store.epoch));
                *store = Store::new(store.epoch + 10, library);
            }
            12 => self.forge(input),
            13 => {
                let choice = input.byte();
                let store = StoreIndex(u16::from(choice & 1) % STORES);
                if choice & 2 == 0 {
                    self.engine.set_segment_bytes(store, input.u16());
                } else if let Some(mut quote) = self.asked.get(input.below(self.asked.len())).cloned() {
                    // An ICMP error says that a store cannot be reached, and quotes what was sent to it.
                    quote.truncate(QUOTE_BYTES);
                    input.damage(&mut quote);
                    let now = self.now();
                    self.engine.handle_unreachable(now, store, &quote);
                }
            }
            14 => {
                let at = self.engine.poll_timeout().map_or(self.now, Instant::nanos);
                self.pass(at.saturating_sub(self.now));
            }
            _ => self.answers.rotate_left(usize::from(!self.answers.is_empty())),
        }
    }

    fn start(&mut self, input: &mut Input<'_>, is_lookup: bool) {
        let (count, first) = (1 + input.below(CHUNKS), input.below(CHUNKS + 2));
        let keys: Vec<Key> = (first..first + count).map(key).collect();
        let sources = match input.byte() {
            0..=127 => Sources::Placed,
            store => Sources::One(StoreIndex(u16::from(store & 3))),
        };
        let deadline =
            Instant::from_nanos(self.now + (1 + u64::from(input.byte()) % PATIENCE_MS) * MILLISECOND);
        let (now, id) = (self.now(), self.next_id);
        if is_lookup {
            if self.engine.lookup(now, LookupId(id), deadline, sources, &keys).is_ok() {
                self.lookups.insert(id);
            }
        } else if self.engine.start(now, FetchId(id), deadline, sources, &keys, &SHAPE).is_ok() {
            let record =
                Record { keys: count, delivered: BTreeSet::new(), failed: BTreeSet::new(), ended: false };
            self.fetches.insert(id, record);
        }
        self.next_id += 1;
    }

    fn cancel(&mut self, input: &mut Input<'_>) {
        let (now, id) = (self.now(), self.next_id.saturating_sub(1 + u64::from(input.byte() & 3)));
        self.engine.cancel(now, FetchId(id));
        self.engine.cancel_lookup(now, LookupId(id));
    }

    fn answer(&mut self) {
        if let Some((store, message)) = self.answers.pop_front() {
            self.receive(store, false, &message);
        }
    }

    fn pass(&mut self, nanos: u64) {
        self.now += nanos;
        self.engine.handle_timeout(self.now());
    }

    /// Changes a plane's entry in a header of which the checksum is right.
    fn forge(&mut self, input: &mut Input<'_>) {
        let store = &mut self.stores[input.below(usize::from(STORES))];
        let forged = key(input.below(CHUNKS));
        let Some(mut chunk) = store.library.get(&forged).cloned() else { return };
        let entry = 36 + input.below(6) * PLANE_ENTRY_BYTES;
        let (offset, bytes) = (input.number(), input.number() as u32);
        chunk.bytes[entry..entry + 8].copy_from_slice(&offset.to_le_bytes());
        chunk.bytes[entry + 8..entry + 12].copy_from_slice(&bytes.to_le_bytes());
        let header = chunk.info.header_bytes as usize;
        let sum = checksum(&chunk.bytes[..header - 8]);
        chunk.bytes[header - 8..header].copy_from_slice(&sum.to_le_bytes());
        if input.byte() & 1 != 0 {
            chunk.info.chunk_bytes = input.number();
        }
        store.library.insert(forged, chunk);
    }

    fn receive(&mut self, store: u16, marked: bool, payload: &[u8]) {
        self.said.push_back((store, payload.to_vec()));
        if self.said.len() > 32 {
            self.said.pop_front();
        }
        let now = self.now();
        if let Ok(Accepted::Segment { transfer, segment, data }) =
            self.engine.handle_datagram(now, StoreIndex(store), marked, payload)
        {
            let kept = self.kept.entry(transfer.slot()).or_insert_with(|| Kept {
                transfer,
                segments: BTreeMap::new(),
                arrived: false,
            });
            assert_eq!(kept.transfer, transfer, "the slot's earlier transfer has ended");
            assert!(!kept.arrived, "no segment after the last");
            assert!(!payload[data.clone()].is_empty());
            assert!(kept.segments.insert(segment, data.len()).is_none(), "a segment is accepted once");
        }
        self.check();
    }

    fn give_verdict(&mut self, choice: u8) {
        if self.arrived.is_empty() {
            return;
        }
        let (transfer, fetch, chunk, plane) =
            self.arrived.swap_remove(usize::from(choice >> 2) % self.arrived.len());
        assert!(self.engine.header(transfer).is_some() && self.engine.chunk_info(transfer).is_some());
        let verdict = [Verdict::Delivered, Verdict::Delivered, Verdict::Corrupt, Verdict::Rejected(7)]
            [usize::from(choice & 3)];
        let kept = self.kept.remove(&transfer.slot()).expect("kept until its verdict");
        assert_eq!(kept.transfer, transfer);
        let record = self.fetches.get_mut(&fetch.0).expect("a fetch that was begun");
        assert!(!record.ended, "no verdict is owed after the end");
        if verdict == Verdict::Delivered {
            assert!(record.delivered.insert((chunk, plane)), "a plane is delivered once");
        }
        let now = self.now();
        assert!(self.engine.verdict(now, transfer, verdict));
        assert!(!self.engine.verdict(now, transfer, verdict), "a second verdict is refused");
        self.check();
    }

    /// All events, then all that may be sent, then the events that this brought.
    fn pump(&mut self) {
        self.take_events();
        let mut out = [0; MAX_CONTROL_BYTES];
        let now = self.now();
        // Credit and tables are finite.
        let mut sent = 0;
        while let Some(transmit) = self.engine.poll_transmit(now, &mut out) {
            sent += 1;
            assert!(sent < 10_000, "sending does not end");
            self.check();
            if !self.cut_off {
                self.at_store(transmit.store.0, &out[..transmit.len]);
            }
        }
        self.take_events();
    }

    fn at_store(&mut self, store: u16, request: &[u8]) {
        self.asked.push_back(request.to_vec());
        if self.asked.len() > 8 {
            self.asked.pop_front();
        }
        let now = self.now();
        let Store { engine, library, .. } = &mut self.stores[usize::from(store)];
        let _ = engine.handle_datagram(now, peer(0), request, library);
        let mut out = [0; MAX_CONTROL_BYTES];
        while let Some(transmit) = engine.poll_transmit(now, &mut out) {
            let mut message = out[..transmit.header_bytes].to_vec();
            if let Some((handle, range)) = transmit.payload {
                let Some(bytes) = library.bytes(handle) else { continue };
                message.extend_from_slice(&bytes[range]);
            }
            if self.answers.len() < MOST_ANSWERS {
                self.answers.push_back((store, message));
            }
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.engine.poll_event() {
            match event {
                Event::LookupDone { id, found, .. } => {
                    assert!(self.lookups.remove(&id.0), "a lookup ends once");
                    assert!(found as usize <= CHUNKS);
                }
                Event::PlaneArrived { transfer, fetch, chunk, plane, bytes, segments } => {
                    let kept = self.kept.get_mut(&transfer.slot()).expect("its segments were accepted");
                    assert!(kept.transfer == transfer && !kept.arrived, "a plane arrives once");
                    kept.arrived = true;
                    assert_eq!(kept.segments.len(), segments as usize);
                    assert_eq!(kept.segments.values().sum::<usize>(), bytes as usize);
                    self.arrived.push((transfer, fetch, chunk, plane));
                }
                Event::TransferReset { transfer } => {
                    let kept = self.kept.remove(&transfer.slot()).expect("something of it was accepted");
                    assert!(kept.transfer == transfer && !kept.arrived);
                }
                Event::ChunkFailed { fetch, chunk, .. } => {
                    let record = self.fetches.get_mut(&fetch.0).expect("a fetch that was begun");
                    assert!(!record.ended && record.failed.insert(chunk), "a chunk fails once");
                }
                Event::FetchEnded { fetch, outcome, planes_delivered, chunks_failed } => {
                    self.end(fetch, outcome, planes_delivered, chunks_failed);
                }
            }
        }
        self.check();
    }

    fn end(&mut self, fetch: FetchId, outcome: FetchOutcome, planes_delivered: u32, chunks_failed: u32) {
        assert!(self.arrived.iter().all(|plane| plane.1 != fetch), "no verdict is owed");
        let record = self.fetches.get_mut(&fetch.0).expect("a fetch that was begun");
        assert!(!std::mem::replace(&mut record.ended, true), "a fetch ends once");
        assert_eq!(
            (planes_delivered as usize, chunks_failed as usize),
            (record.delivered.len(), record.failed.len())
        );
        let (queues, planes) = (u32::from(self.engine.config().queues), SHAPE.planes());
        for chunk in 0..record.keys as u32 {
            let mut own = (0..planes).filter(|plane| (chunk * planes + plane).is_multiple_of(queues));
            let whole = own.all(|plane| record.delivered.contains(&(chunk, plane as u16)));
            assert!(whole || record.failed.contains(&chunk), "chunk {chunk} is neither delivered nor named");
        }
        match outcome {
            FetchOutcome::Done => assert!(record.failed.is_empty()),
            FetchOutcome::Failed => assert!(!record.failed.is_empty()),
            FetchOutcome::Cancelled => {}
        }
    }

    fn check(&self) {
        let (engine, config, counters) = (&self.engine, self.engine.config(), self.engine.counters());
        assert!(engine.in_flight_segments() <= config.window_segments);
        assert!(engine.memory_segments() <= config.memory_segments);
        let kept: usize = self.kept.values().map(|kept| kept.segments.len()).sum();
        assert!(kept <= engine.memory_segments() as usize, "the caller keeps no more than was reserved");
        assert!(engine.planes_under_way() <= usize::from(config.active_planes));
        assert!(engine.chunks_under_way() <= usize::from(config.active_chunks));
        assert_eq!(
            counters.datagrams,
            counters.segments_placed + counters.header_segments + counters.control + counters.dropped()
        );
    }

    /// Nobody answers any more: by its deadline everything has ended.
    fn finish(&mut self) {
        self.cut_off = true;
        self.pump();
        let end = self.now + PATIENCE_MS * MILLISECOND;
        for _ in 0..100_000 {
            while !self.arrived.is_empty() {
                self.give_verdict(0);
            }
            self.pump();
            // A timer may outlive what it was for.
            let Some(at) = self.engine.poll_timeout() else { break };
            assert!(self.engine.idle() || at.nanos() <= end, "the last deadline has passed");
            self.pass(at.nanos().saturating_sub(self.now));
            assert!(
                self.engine.poll_timeout().is_none_or(|at| at > self.now()),
                "a timer that fired is armed again"
            );
        }
        let engine = &self.engine;
        assert!(engine.idle() && self.lookups.is_empty(), "something does not end");
        assert!(self.fetches.values().all(|record| record.ended));
        let left = (engine.chunks_under_way(), engine.planes_under_way(), engine.in_flight_segments());
        assert_eq!((left, engine.memory_segments(), self.kept.len()), ((0, 0, 0), 0, 0));
        assert_eq!(engine.poll_timeout(), None);
    }
}
