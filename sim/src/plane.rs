//! A data plane: the real `FetchEngine` of each queue, receive rings, decoders, and the checks of every step.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;

use protocol::paths::Paths;
use protocol::put::{OfferConfig, OfferEngine, OfferTo};
use protocol::{
    Accepted, Event, FetchConfig, FetchEngine, FetchId, FetchOutcome, Instant, Key, LookupId, LookupOutcome,
    Placement, ServeConfig, Sources, StartError, StoreIndex, TransferId, Verdict,
};

use crate::content::{Catalogue, Layout};
use crate::host::{Deed, Host, Order};
use crate::net::{Net, Way};
use crate::packet::{Packet, Source};
use crate::random::mix;
use crate::record::{Answer, End, Records};
use crate::saves::{Saves, Wanted};
use crate::store::{host_of, peer_of};

/// Bytes of the largest message that a data plane writes: a probe of the largest MTU.
const OUT_BYTES: usize = 9216;

/// A simulated data plane.
#[derive(Clone, Copy, Debug)]
pub struct PlaneConfig {
    /// Budgets of each queue's engine; `queues` says how many there are.
    pub fetch: FetchConfig,
    /// The host that is store 0; the others follow it.
    pub first_store: u32,
    /// Stores that hold each chunk of a fetch that names no single store.
    pub replicas: u8,
    /// Largest segment that the own port allows. Above `fetch.segment_bytes`, paths are probed for what they carry.
    pub most_segment_bytes: u16,
    /// Chunks that each queue offers at once; with 0 nothing can be saved.
    pub max_offers: u16,
    /// Bytes that the transmit ring of its device holds.
    pub ring_bytes: u64,
    /// Whether what is saved is written out, to be compared byte by byte on arrival.
    pub materialize: bool,
    /// Decoders, shared by all queues.
    pub decoders: u32,
    /// Time that a decoder takes for a plane.
    pub decode_nanos: u64,
    /// So many of a million intact planes get the verdict "corrupt", and "rejected".
    pub false_corrupt: u32,
    /// See above.
    pub rejected: u32,
}

impl PlaneConfig {
    /// A data plane with one instant decoder that makes no mistakes, saves nothing and probes nothing.
    pub fn new(fetch: FetchConfig) -> PlaneConfig {
        PlaneConfig {
            fetch,
            first_store: 0,
            replicas: 1,
            most_segment_bytes: fetch.segment_bytes,
            max_offers: 0,
            ring_bytes: 64 * 1600,
            materialize: false,
            decoders: 1,
            decode_nanos: 0,
            false_corrupt: 0,
            rejected: 0,
        }
    }

    /// What a queue's offers get.
    fn offers(&self, epoch: u64) -> OfferConfig {
        // Nothing is kept for what cannot happen.
        let some = |count: usize| if self.max_offers > 0 { count } else { 1 };
        let serve = ServeConfig {
            epoch,
            max_pending_pulls: some(256),
            max_pending_replies: some(64),
            max_requesters: 16,
            max_segment_bytes: self.most_segment_bytes,
            ..ServeConfig::default()
        };
        OfferConfig {
            max_offers: self.max_offers,
            stores: self.fetch.stores,
            segment_bytes: self.fetch.segment_bytes,
            rto_min: self.fetch.rto_min,
            rto_max: self.fetch.rto_max,
            serve,
            seed: self.fetch.seed,
        }
    }
}

/// What the caller of an engine keeps of a transfer.
#[derive(Debug, Default)]
struct Kept {
    transfer: Option<TransferId>,
    /// Where segment 0 comes from.
    source: Source,
    segments: u32,
    bytes: u64,
    arrived: Vec<u64>,
    is_damaged: bool,
    awaits_verdict: bool,
}

/// A plane that is being decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Decoding {
    transfer: TransferId,
    fetch: FetchId,
    chunk: u32,
    plane: u16,
}

/// A fetch, as seen by one queue.
#[derive(Debug)]
struct Part {
    order: Rc<Order>,
    deadline: u64,
    delivered: BTreeMap<u32, u32>,
    failed: BTreeMap<u32, ()>,
    /// Planes that await a verdict.
    owed: u32,
}

/// One queue.
#[derive(Debug)]
struct Lane {
    engine: FetchEngine<Layout>,
    paths: Paths,
    saves: Saves,
    kept: Vec<Kept>,
    kept_segments: u32,
    parts: BTreeMap<u64, Part>,
    verdicts: BinaryHeap<Reverse<(u64, u64, Decoding)>>,
}

impl Lane {
    /// Passes on what a path carries.
    fn set_segment_bytes(&mut self, changes: &[(StoreIndex, u16)]) {
        for (store, bytes) in changes {
            self.engine.set_segment_bytes(*store, *bytes);
            self.saves.engine().set_segment_bytes(*store, *bytes);
        }
    }

    /// Whether there is anything that paths matter to.
    fn is_busy(&self) -> bool {
        !(self.engine.idle() && self.saves.is_idle())
    }
}

/// A fetch over all queues.
#[derive(Debug)]
struct Whole {
    parts: u16,
    end: End,
}

/// A data plane.
#[derive(Debug)]
pub struct PlaneHost {
    id: u32,
    config: PlaneConfig,
    catalogue: Rc<Catalogue>,
    lanes: Vec<Lane>,
    wholes: BTreeMap<u64, Whole>,
    /// Lookups under way, on queue 0: the deadline of each.
    lookups: BTreeMap<u64, u64>,
    /// When each decoder is free.
    decoders: Vec<u64>,
    sequence: u64,
    /// What its clock shows more than the simulator's.
    ahead_nanos: u64,
    placement: Placement,
    scratch: Vec<u8>,
}

fn decoding_end(end: FetchOutcome) -> End {
    match end {
        FetchOutcome::Done => End::Done,
        FetchOutcome::Failed => End::Failed,
        FetchOutcome::Cancelled => End::Cancelled,
    }
}

impl PlaneHost {
    /// A data plane with nothing to do.
    pub fn new(id: u32, config: PlaneConfig, catalogue: Rc<Catalogue>) -> PlaneHost {
        let ids: Vec<u64> = (0..u64::from(config.fetch.stores)).map(|store| mix(store + 1)).collect();
        let placement = Placement::new(&ids, usize::from(config.replicas))
            .unwrap_or_else(|error| panic!("the scenario's stores cannot be placed: {error}"));
        let engine = |queue| {
            let config = FetchConfig { queue, ..config.fetch };
            FetchEngine::with_placement(config, placement.clone(), Layout)
                .unwrap_or_else(|error| panic!("the scenario's budgets cannot work: {error}"))
        };
        let fetch = config.fetch;
        let lanes = (0..config.fetch.queues)
            .map(|queue| Lane {
                engine: engine(queue),
                paths: Paths::new(fetch.stores, fetch.segment_bytes, config.most_segment_bytes, fetch.seed),
                saves: Saves::new(
                    config.offers(1 + u64::from(id) * 1000 + u64::from(queue)),
                    Rc::clone(&catalogue),
                ),
                kept: (0..config.fetch.active_planes).map(|_| Kept::default()).collect(),
                kept_segments: 0,
                parts: BTreeMap::new(),
                verdicts: BinaryHeap::new(),
            })
            .collect();
        let decoders = vec![0; config.decoders.max(1) as usize];
        PlaneHost {
            id,
            config,
            catalogue,
            lanes,
            wholes: BTreeMap::new(),
            lookups: BTreeMap::new(),
            decoders,
            sequence: 0,
            ahead_nanos: 0,
            placement,
            scratch: Vec::new(),
        }
    }

    fn clock(&self, net: &Net) -> Instant {
        Instant::from_nanos(net.now + self.ahead_nanos)
    }

    fn sources(&self, order: &Order) -> Sources {
        match order.stores.as_slice() {
            [store] => {
                let store = store - self.config.first_store;
                Sources::One(StoreIndex(u16::try_from(store).expect("stores are numbered in 16 bits")))
            }
            _ => Sources::Placed,
        }
    }

    fn start(&mut self, net: &Net, records: &mut Records, order: Order) {
        let (id, now) = (order.id, self.clock(net));
        let keys: Vec<Key> =
            order.chunks.clone().map(|chunk| self.catalogue.chunks[chunk as usize].key).collect();
        let bytes = self.catalogue.payload_bytes(order.chunks.clone());
        let deadline = now.nanos() + order.deadline_nanos;
        let sources = self.sources(&order);
        let order = Rc::new(order);
        records.started(id, self.id, net.now, bytes);
        for lane in &mut self.lanes {
            lane.engine
                .start(now, FetchId(id), Instant::from_nanos(deadline), sources, &keys, &self.catalogue.shape)
                .unwrap_or_else(|error| panic!("fetch {id} was refused: {error}"));
            let part = Part {
                order: Rc::clone(&order),
                deadline,
                delivered: BTreeMap::new(),
                failed: BTreeMap::new(),
                owed: 0,
            };
            lane.parts.insert(id, part);
        }
        self.wholes.insert(id, Whole { parts: self.config.fetch.queues, end: End::Done });
    }

    fn save(&mut self, net: &Net, records: &mut Records, order: &Order) {
        let deadline = self.clock(net).nanos() + order.deadline_nanos;
        let mut offers = 0;
        for chunk in order.chunks.clone() {
            let first = || {
                let candidates = self.placement.candidates(&self.catalogue.chunks[chunk as usize].key);
                vec![self.config.first_store + u32::from(candidates.as_slice()[0].0)]
            };
            let hosts = if order.stores.is_empty() { first() } else { order.stores.clone() };
            for host in hosts {
                let store = u16::try_from(host - self.config.first_store).expect("numbered in 16 bits");
                let wanted = Wanted { save: order.id, chunk, store: StoreIndex(store), host, deadline };
                let queue = chunk as usize % self.lanes.len();
                self.lanes[queue].saves.want(wanted);
                offers += 1;
            }
        }
        records.save_started(order.id, self.id, net.now, offers);
    }

    fn lookup(&mut self, net: &Net, records: &mut Records, order: &Order) {
        let now = self.clock(net);
        let keys: Vec<Key> =
            order.chunks.clone().map(|chunk| self.catalogue.chunks[chunk as usize].key).collect();
        let deadline = now.nanos() + order.deadline_nanos;
        let sources = self.sources(order);
        let at = Instant::from_nanos(deadline);
        match self.lanes[0].engine.lookup(now, LookupId(order.id), at, sources, &keys) {
            Ok(()) => {
                let asked = u32::try_from(keys.len()).expect("few keys");
                assert!(records.lookups.insert(order.id, Answer { asked, ended: None }).is_none());
                self.lookups.insert(order.id, deadline);
            }
            Err(StartError::Full(_)) => {}
            Err(error) => panic!("lookup {} was refused: {error}", order.id),
        }
    }

    fn looked_up(&mut self, records: &mut Records, id: u64, outcome: LookupOutcome, found: u32, tokens: u64) {
        assert!(self.lookups.remove(&id).is_some(), "a lookup ends once");
        let answer = records.lookups.get_mut(&id).expect("only lookups that were started end");
        assert!(
            found <= answer.asked && tokens == u64::from(found) * 256,
            "no more is found than is asked for"
        );
        let end = match outcome {
            LookupOutcome::Done => End::Done,
            LookupOutcome::Deadline | LookupOutcome::Unreachable => End::Failed,
            LookupOutcome::Cancelled => End::Cancelled,
        };
        answer.ended = Some((end, found));
    }

    fn take_in(&mut self, net: &mut Net, records: &mut Records, id: u32) {
        let now = self.clock(net);
        let packet = net.packets.get(id);
        let marked = packet.marked;
        let Some(lane) = self.lanes.get_mut(usize::from(packet.queue)) else { return };
        let store = packet.from.wrapping_sub(self.config.first_store);
        let Some(store) = u16::try_from(store).ok().filter(|store| *store < self.config.fetch.stores) else {
            return;
        };
        let payload = packet.payload(&mut self.scratch);
        if Paths::takes(payload) {
            let mut changes = Vec::new();
            // What answers nothing is dropped.
            let _ = lane.paths.handle_datagram(now, StoreIndex(store), payload, |store, bytes| {
                changes.push((store, bytes));
            });
            return lane.set_segment_bytes(&changes);
        }
        if OfferEngine::takes(payload) {
            return lane.saves.take_in(now, StoreIndex(store), peer_of(packet.from, 0), payload);
        }
        let accepted = lane.engine.handle_datagram(now, StoreIndex(store), marked, payload);
        match accepted {
            Ok(Accepted::Segment { transfer, segment, data }) => {
                let is_damaged = self.catalogue.is_damaged(packet, &payload[data.clone()]);
                let offset = lane.engine.segment_offset(transfer, segment).expect("it was accepted");
                keep(lane, packet, transfer, segment, data.len(), offset, is_damaged);
                records.took_in(self.id, u64::from(packet.payload_bytes));
            }
            Ok(Accepted::Control) if packet.payload_bytes > 0 => {
                records.took_in(self.id, u64::from(packet.payload_bytes));
            }
            Ok(Accepted::Control) | Err(_) => {}
        }
    }

    fn decoded(&mut self, net: &mut Net, records: &mut Records) {
        let (now, clock) = (net.now, self.clock(net));
        for queue in 0..self.lanes.len() {
            while self.lanes[queue].verdicts.peek().is_some_and(|Reverse((at, ..))| *at <= now) {
                let Some(Reverse((_, _, decoding))) = self.lanes[queue].verdicts.pop() else { break };
                self.give_verdict(queue, net, records, clock, decoding);
            }
        }
    }

    fn give_verdict(
        &mut self,
        queue: usize,
        net: &mut Net,
        records: &mut Records,
        clock: Instant,
        decoding: Decoding,
    ) {
        let Decoding { transfer, fetch, chunk, plane } = decoding;
        let lane = &mut self.lanes[queue];
        let kept = &mut lane.kept[transfer.slot()];
        assert_eq!(kept.transfer, Some(transfer), "a transfer is kept until its verdict");
        let part = lane.parts.get_mut(&fetch.0).expect("no verdict is due after the end");
        let number = part.order.chunks.start + chunk;
        let stored = self.catalogue.chunks[number as usize].planes[usize::from(plane)];
        // Every segment came from where segment 0 did plus its own offset, checked on arrival.
        let is_stored = kept.source == Source { chunk: number, offset: stored.offset }
            && kept.bytes == u64::from(stored.bytes);
        let is_damaged = kept.is_damaged || !is_stored;
        assert!(
            !is_damaged || net.counters.damaged > 0,
            "plane {plane} of chunk {number} is not what was stored, and nothing damaged it"
        );
        let verdict = if is_damaged || net.random.chance(self.config.false_corrupt) {
            Verdict::Corrupt
        } else if net.random.chance(self.config.rejected) {
            Verdict::Rejected(7)
        } else {
            records.delivered(fetch.0, u64::from(stored.bytes));
            *part.delivered.entry(chunk).or_default() += 1;
            Verdict::Delivered
        };
        part.owed -= 1;
        lane.kept_segments -= kept.segments;
        kept.transfer = None;
        assert!(lane.engine.header(transfer).is_some(), "a header until the verdict");
        assert!(lane.engine.verdict(clock, transfer, verdict), "an announced plane takes a verdict");
    }

    fn on_event(&mut self, queue: usize, net: &Net, records: &mut Records, event: Event) {
        let queues = u64::from(self.config.fetch.queues);
        let shape_planes = u64::from(self.catalogue.shape.planes());
        let lane = &mut self.lanes[queue];
        match event {
            Event::LookupDone { id, outcome, found, tokens, .. } => {
                self.looked_up(records, id.0, outcome, found, tokens);
            }
            Event::PlaneArrived { transfer, fetch, chunk, plane, bytes, segments } => {
                let kept = &mut lane.kept[transfer.slot()];
                assert_eq!(kept.transfer, Some(transfer), "segments of what arrives were accepted");
                assert!(!kept.awaits_verdict, "a plane arrives once");
                kept.awaits_verdict = true;
                assert_eq!((kept.segments, kept.bytes), (segments, u64::from(bytes)), "all of it is here");
                let number = u64::from(chunk) * shape_planes + u64::from(plane);
                assert_eq!(number % queues, queue as u64, "each queue takes its own planes");
                lane.parts.get_mut(&fetch.0).expect("the fetch is under way").owed += 1;
                let free = self.decoders.iter_mut().min().expect("at least one decoder");
                *free = (*free).max(net.now) + self.config.decode_nanos;
                self.sequence += 1;
                let decoding = Decoding { transfer, fetch, chunk, plane };
                lane.verdicts.push(Reverse((*free, self.sequence, decoding)));
            }
            Event::TransferReset { transfer } => {
                let kept = &mut lane.kept[transfer.slot()];
                assert_eq!(kept.transfer, Some(transfer), "something of what is reset was accepted");
                assert!(!kept.awaits_verdict, "a plane that arrived ends by its verdict");
                kept.transfer = None;
                lane.kept_segments -= kept.segments;
            }
            Event::ChunkFailed { fetch, chunk, .. } => {
                let part = lane.parts.get_mut(&fetch.0).expect("the fetch is under way");
                assert!(part.failed.insert(chunk, ()).is_none(), "a chunk fails once");
                records.progress += 1;
            }
            Event::FetchEnded { fetch, outcome, planes_delivered, chunks_failed } => {
                let part = lane.parts.remove(&fetch.0).expect("a fetch ends once");
                assert_eq!(part.owed, 0, "no verdict is owed at the end");
                assert_eq!(planes_delivered, part.delivered.values().sum::<u32>());
                assert_eq!(chunks_failed as usize, part.failed.len());
                check_part(&part, queue as u64, queues, shape_planes, outcome);
                let whole = self.wholes.get_mut(&fetch.0).expect("a fetch ends once");
                whole.end = whole.end.max(decoding_end(outcome));
                whole.parts -= 1;
                if whole.parts == 0 {
                    let end = whole.end;
                    self.wholes.remove(&fetch.0);
                    records.ended(fetch.0, net.now, end);
                }
            }
        }
    }

    fn events(&mut self, queue: usize, net: &Net, records: &mut Records) {
        while let Some(event) = self.lanes[queue].engine.poll_event() {
            self.on_event(queue, net, records, event);
        }
    }

    fn transmit(&mut self, queue: usize, net: &mut Net) -> Option<u64> {
        let mut out = [0; OUT_BYTES];
        let clock = self.clock(net);
        let number = u16::try_from(queue).expect("queues are numbered in 16 bits");
        self.probe(queue, net, &mut out);
        while let Some(transmit) = self.lanes[queue].engine.poll_transmit(clock, &mut out) {
            let store = self.config.first_store + u32::from(transmit.store.0);
            net.send(self.id, store, |packet| {
                packet.queue = number;
                packet.bytes.extend_from_slice(&out[..transmit.len]);
            });
        }
        // Fetches go first; what is saved goes with what the link has left.
        loop {
            let link = net.link(self.id, Way::Up);
            if link.backlog_bytes(net.now) >= self.config.ring_bytes && self.config.max_offers > 0 {
                return Some(net.now + link.backlog_nanos(net.now) / 2 + 1);
            }
            let sent = self.lanes[queue].saves.poll_transmit(clock, &mut out)?;
            let to = match sent.to {
                OfferTo::Store(store) => self.config.first_store + u32::from(store.0),
                OfferTo::Peer(peer) => host_of(&peer).0,
            };
            let (catalogue, materialize) = (&self.catalogue, self.config.materialize);
            net.send(self.id, to, |packet| {
                packet.queue = number;
                packet.bytes.extend_from_slice(&out[..sent.len]);
                if let Some((chunk, range)) = sent.payload {
                    catalogue.fill(packet, chunk, range, materialize);
                }
            });
        }
    }

    /// Sends the probes that are due, while there is something that the paths matter to.
    fn probe(&mut self, queue: usize, net: &mut Net, out: &mut [u8]) {
        let clock = self.clock(net);
        let number = u16::try_from(queue).expect("queues are numbered in 16 bits");
        let lane = &mut self.lanes[queue];
        while let Some(store) = lane.engine.poll_suspect().or_else(|| lane.saves.engine().poll_suspect()) {
            lane.paths.handle_silence(clock, store, lane.engine.round_trip(store));
        }
        while lane.is_busy() && lane.paths.is_due(clock) {
            let mut changes = Vec::new();
            let sent = lane.paths.poll_transmit(clock, out, |store, bytes| changes.push((store, bytes)));
            lane.set_segment_bytes(&changes);
            let Some((store, len)) = sent else { break };
            net.send(self.id, self.config.first_store + u32::from(store.0), |packet| {
                packet.queue = number;
                packet.bytes.extend_from_slice(&out[..len]);
            });
        }
    }

    /// What must hold after every turn.
    fn check(&self, queue: usize, now: u64) {
        let lane = &self.lanes[queue];
        let engine = &lane.engine;
        let (config, counters) = (engine.config(), engine.counters());
        assert!(engine.in_flight_segments() <= config.window_segments, "in flight within the window");
        assert!(engine.memory_segments() <= config.memory_segments, "memory within its budget");
        assert!(lane.kept_segments <= engine.memory_segments(), "no more is kept than was reserved");
        let placed = counters.segments_placed + counters.header_segments + counters.control;
        assert_eq!(counters.datagrams, placed + counters.dropped(), "the counters add up");
        for (id, deadline) in &self.lookups {
            assert!(queue > 0 || now < *deadline, "lookup {id} is past its deadline and has not ended");
        }
        for (id, part) in &lane.parts {
            let is_late = now >= part.deadline && part.owed == 0;
            assert!(!is_late, "fetch {id} is past its deadline, nothing is owed, and it has not ended");
        }
    }
}

/// Keeps an accepted segment, which must come from where the transfer's others do.
fn keep(
    lane: &mut Lane,
    packet: &Packet,
    transfer: TransferId,
    segment: u32,
    bytes: usize,
    offset: u64,
    is_damaged: bool,
) {
    let kept = &mut lane.kept[transfer.slot()];
    if kept.transfer != Some(transfer) {
        assert_eq!(kept.transfer, None, "the slot's earlier transfer has ended");
        let mut arrived = std::mem::take(&mut kept.arrived);
        arrived.clear();
        *kept = Kept { transfer: Some(transfer), arrived, ..Kept::default() };
    }
    assert!(!kept.awaits_verdict, "no segment after the last");
    let (word, bit) = ((segment / 64) as usize, 1_u64 << (segment % 64));
    if kept.arrived.len() <= word {
        kept.arrived.resize(word + 1, 0);
    }
    assert_eq!(kept.arrived[word] & bit, 0, "a segment is accepted once");
    kept.arrived[word] |= bit;
    let begin = packet.source.offset.wrapping_sub(offset);
    let source = Source { chunk: packet.source.chunk, offset: begin };
    if kept.segments == 0 {
        kept.source = source;
    }
    // A flipped bit in the header may make a segment of another: the plane's checksum tells.
    kept.is_damaged |= is_damaged || source != kept.source;
    kept.segments += 1;
    kept.bytes += bytes as u64;
    lane.kept_segments += 1;
}

/// Every chunk is delivered whole or named.
fn check_part(part: &Part, queue: u64, queues: u64, planes: u64, outcome: FetchOutcome) {
    let count = part.order.chunks.len();
    for chunk in 0..u32::try_from(count).expect("few chunks") {
        let mine = (0..planes).filter(|plane| (u64::from(chunk) * planes + plane) % queues == queue).count();
        let is_whole = part.delivered.get(&chunk).is_some_and(|delivered| *delivered as usize == mine);
        let is_named = part.failed.contains_key(&chunk);
        assert!(mine == 0 || is_whole || is_named, "chunk {chunk} is neither delivered nor named");
    }
    match outcome {
        FetchOutcome::Done => assert!(part.failed.is_empty(), "done without failures"),
        FetchOutcome::Failed => assert!(!part.failed.is_empty(), "failed with a reason"),
        FetchOutcome::Cancelled => {}
    }
}

impl Host for PlaneHost {
    fn turn(&mut self, net: &mut Net, records: &mut Records, rx: &[u32]) -> Option<u64> {
        for id in rx {
            self.take_in(net, records, *id);
        }
        self.decoded(net, records);
        let clock = self.clock(net);
        let mut wake = u64::MAX;
        for queue in 0..self.lanes.len() {
            self.lanes[queue].engine.handle_timeout(clock);
            self.events(queue, net, records);
            let was_damaged = net.counters.damaged > 0;
            self.lanes[queue].saves.turn(clock, net.now, was_damaged, records);
            let room_at = self.transmit(queue, net);
            // Admitting a fetch without planes for this queue ends it.
            self.events(queue, net, records);
            self.check(queue, clock.nanos());
            let lane = &self.lanes[queue];
            let probes = lane.paths.poll_timeout().filter(|_| lane.is_busy());
            for at in [lane.engine.poll_timeout(), lane.saves.poll_timeout(), probes].into_iter().flatten() {
                wake = wake.min(at.nanos().saturating_sub(self.ahead_nanos));
            }
            wake = wake.min(room_at.unwrap_or(u64::MAX));
            if let Some(Reverse((at, ..))) = lane.verdicts.peek() {
                wake = wake.min(*at);
            }
        }
        (wake != u64::MAX).then_some(wake)
    }

    fn befall(&mut self, net: &mut Net, records: &mut Records, deed: Deed) {
        match deed {
            Deed::Fetch(order) => self.start(net, records, order),
            Deed::Lookup(order) => self.lookup(net, records, &order),
            Deed::Save(order) => self.save(net, records, &order),
            Deed::Cancel(id) => {
                let clock = self.clock(net);
                for lane in &mut self.lanes {
                    lane.engine.cancel(clock, FetchId(id));
                    lane.engine.cancel_lookup(clock, LookupId(id));
                    lane.saves.cancel(id, net.now, records);
                }
            }
            Deed::ClockJump(nanos) => self.ahead_nanos += nanos,
            Deed::DecodeNanos(nanos) => self.config.decode_nanos = nanos,
            Deed::Crash | Deed::Restart | Deed::Forget(_) => unreachable!("a data plane is no store"),
        }
    }

    fn assert_quiet(&self) {
        for lane in &self.lanes {
            let engine = &lane.engine;
            assert!(engine.idle(), "nothing is under way");
            assert_eq!(engine.fetches(), 0, "fetches left");
            assert_eq!(engine.chunks_under_way(), 0, "chunks left");
            assert_eq!(engine.planes_under_way(), 0, "planes left");
            assert_eq!(engine.in_flight_segments(), 0, "segments left in flight");
            assert_eq!(engine.memory_segments(), 0, "memory left");
            assert_eq!(lane.kept_segments, 0, "packets left");
            lane.saves.assert_quiet();
            assert!(lane.parts.is_empty() && lane.verdicts.is_empty(), "ends or verdicts left");
        }
        assert!(self.wholes.is_empty() && self.lookups.is_empty(), "fetches or lookups left");
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let mut sums = vec![("pulls", 0), ("asked", 0), ("asked_again", 0), ("timeouts", 0), ("corrupt", 0)];
        sums.extend([("failovers", 0), ("chunks_hedged", 0), ("segments_hedged", 0), ("planes_hedged", 0)]);
        sums.extend([("lookups", 0), ("lookups_again", 0)]);
        for lane in &self.lanes {
            let counters = lane.engine.counters();
            let values = [
                counters.pulls_sent,
                counters.segments_asked,
                counters.segments_asked_again,
                counters.timeouts,
                counters.planes_corrupt,
                counters.failovers,
                counters.chunks_hedged,
                counters.segments_hedged,
                counters.planes_hedged,
                counters.lookups_sent,
                counters.lookups_again,
            ];
            sums.iter_mut().zip(values).for_each(|(sum, value)| sum.1 += value);
        }
        sums.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
    }
}
