//! The receive stage: one queue's packets, its protocol engine, and the planes that it has under way.

use std::net::IpAddr;
use std::sync::Arc;

use compress::ChunkView;
use control::MissingReason;
use dpdk::{Mbuf, Ring, RingReceiver, RingSender};
use iface::steer::PortMap;
use iface::{Counter, Link, Outgoing, Stage};
use protocol::frame::Peer;
use protocol::paths::Paths;
use protocol::put::OfferTo;
use protocol::reason::DropReason;
use protocol::time::Instant;
use protocol::wire::icmp::{Cause, PathError};
use protocol::wire::message;
use protocol::{
    Accepted, Event, FetchEngine, FetchId, FetchOutcome, LookupId, Sources, StoreIndex, TransferId, Verdict,
};

use crate::chunk_layout::EncodedChunks;
use crate::direct::DirectQueue;
use crate::fetch_counts::FetchCounts;
use crate::job::{
    FetchPart, LookupAnswer, LookupPart, PartId, PlaneJob, PlaneOutcome, QueueMessage, REJECTED_BY_SINK,
    REJECTED_SHAPE, REJECTED_UNDECODABLE, missing_reason,
};
use crate::latency::Latencies;
use crate::save::offers::Offers;

/// Where a store is reached.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoreAddress {
    /// Its address and port; the MAC address is that of the next hop.
    pub(crate) ip: IpAddr,
    /// Its UDP port.
    pub(crate) port: u16,
    /// Whom packets for it go to: itself or a gateway.
    pub(crate) next_hop: IpAddr,
}

/// Exact counts of the planes of one queue:
/// `planes_arrived = planes_delivered + planes_corrupt + planes_undecodable + planes under way`. With the link's counts,
/// over all queues: `rx_packets = rx_neighbour + rx_icmp + segments_accepted + control_accepted + sum(dropped)`.
#[derive(Debug, Default)]
pub(crate) struct PlaneCounters {
    pub(crate) planes_arrived: Counter,
    pub(crate) planes_delivered: Counter,
    pub(crate) planes_corrupt: Counter,
    pub(crate) planes_undecodable: Counter,
    pub(crate) planes_undelivered: Counter,
    pub(crate) planes_reset: Counter,
    pub(crate) segments_accepted: Counter,
    pub(crate) control_accepted: Counter,
    pub(crate) misdirected: Counter,
    pub(crate) encoded_bytes: Counter,
    pub(crate) delivered_bytes: Counter,
}

impl PlaneCounters {
    /// Every counter with its name.
    pub(crate) fn named(&self) -> [(&'static str, &Counter); 11] {
        [
            ("planes_arrived", &self.planes_arrived),
            ("planes_delivered", &self.planes_delivered),
            ("planes_corrupt", &self.planes_corrupt),
            ("planes_undecodable", &self.planes_undecodable),
            ("planes_undelivered", &self.planes_undelivered),
            ("planes_reset", &self.planes_reset),
            ("segments_accepted", &self.segments_accepted),
            ("control_accepted", &self.control_accepted),
            ("misdirected", &self.misdirected),
            ("encoded_bytes", &self.encoded_bytes),
            ("delivered_bytes", &self.delivered_bytes),
        ]
    }
}

/// The rings that join a receive stage to the rest.
pub(crate) struct RxRings {
    /// Planes to decode.
    pub(crate) decode: Ring<Box<PlaneJob>>,
    /// Planes that need no decoding.
    pub(crate) decoded: Ring<Box<PlaneJob>>,
    /// Planes that come back, delivered or not.
    pub(crate) returned: Ring<Box<PlaneJob>>,
    /// From the control thread.
    pub(crate) messages: RingReceiver<Box<QueueMessage>>,
    /// To the control thread.
    pub(crate) answers: RingSender<Box<QueueMessage>>,
    /// Packets that another queue received for us.
    pub(crate) strays: Ring<Mbuf>,
    /// The same of every queue, to pass such packets on.
    pub(crate) strays_of: Vec<Ring<Mbuf>>,
}

/// The receive stage of one queue.
pub(crate) struct RxStage {
    pub(crate) queue: u16,
    pub(crate) ports: PortMap,
    pub(crate) stores: Vec<StoreAddress>,
    /// The MAC address of each store's next hop, once it is known.
    pub(crate) macs: Vec<Option<[u8; 6]>>,
    pub(crate) link: Link,
    pub(crate) engine: FetchEngine<EncodedChunks>,
    pub(crate) paths: Paths,
    pub(crate) rings: RxRings,
    pub(crate) planes: Planes,
    pub(crate) parts: Parts,
    pub(crate) latencies: Latencies,
    pub(crate) counters: Arc<PlaneCounters>,
    pub(crate) fetch_counts: Arc<FetchCounts>,
    pub(crate) offers: Offers,
    /// Receiving into GPU memory, if that is done.
    pub(crate) direct: Option<DirectQueue>,
}

/// The jobs of a queue, by transfer slot; a job is away while later stages have it.
pub(crate) struct Planes(pub(crate) Vec<Option<Box<PlaneJob>>>);

/// The fetches and lookups of a queue, by slot of their id.
pub(crate) struct Parts(pub(crate) Vec<Option<Box<QueueMessage>>>);

/// Messages from the control thread and returned planes taken per poll.
const BURST: usize = 32;

impl Stage for RxStage {
    fn poll(&mut self, now_ns: u64) -> usize {
        let now = Instant::from_nanos(now_ns);
        self.link.fetch();
        let mut work = self.take_returned(now);
        work += self.take_messages(now);
        work += self.receive(now_ns);
        if self.direct.is_some() {
            work += self.receive_direct(now_ns);
        }
        work += self.take_strays(now);
        let is_due = self.engine.poll_timeout().is_some_and(|due| due <= now);
        if is_due {
            self.engine.handle_timeout(now);
        }
        work += self.take_events(now_ns);
        work += self.offers.poll(now);
        self.link.poll_neighbours(now_ns);
        self.take_path_errors(now);
        while let Some(store) = self.engine.poll_suspect().or_else(|| self.offers.poll_suspect()) {
            self.paths.handle_silence(now, store, self.engine.round_trip(store));
        }
        work += self.transmit(now);
        if work > 0 || is_due {
            self.fetch_counts.mirror(self.engine.counters());
        }
        work
    }
}

impl RxStage {
    fn receive(&mut self, now_ns: u64) -> usize {
        let Self { queue, ports, stores, link, engine, paths, rings, planes, counters, offers, .. } = self;
        let now = Instant::from_nanos(now_ns);
        let mut takers = Takers { engine, paths, planes, offers, counters };
        link.receive(now_ns, |datagram| {
            let from = (datagram.from.ip, datagram.from.port);
            let store = store_of(stores, from).ok_or(DropReason::UnknownPeer)?;
            let owner = ports.queue(usize::from(store.0), datagram.to_port).ok_or(DropReason::ForeignPort)?;
            if owner != *queue {
                takers.counters.misdirected.add(1);
                let what = Stray::From(store, datagram.marked);
                return pass_on(&rings.strays_of[usize::from(owner)], what, datagram.mbuf)
                    .map_err(|()| DropReason::QueueFull);
            }
            let from = || Some(datagram.from);
            takers.take(now, (store, datagram.marked), from, datagram.mbuf)
        })
    }

    fn receive_direct(&mut self, now_ns: u64) -> usize {
        let Self { queue, ports, stores, link, engine, planes, counters, direct, .. } = self;
        let Some(direct) = direct else { return 0 };
        link.receive_direct(now_ns, |datagram| {
            let from = (datagram.from.ip, datagram.from.port);
            let store = store_of(stores, from).ok_or(DropReason::UnknownPeer)?;
            if ports.queue(usize::from(store.0), datagram.to_port) != Some(*queue) {
                counters.misdirected.add(1);
                return Err(DropReason::ForeignPort);
            }
            if datagram.segment.is_none() {
                let from = (store, datagram.marked);
                return planes.take_datagram(engine, counters, now_ns, from, datagram.mbuf);
            }
            direct.take(engine, planes, counters, now_ns, store, datagram)
        })
    }

    /// Errors about packets of ours; one about a packet of another queue goes there.
    fn take_path_errors(&mut self, now: Instant) {
        while let Some((error, frame)) = self.link.take_path_error() {
            let Some(store) = store_of(&self.stores, error.to) else { continue };
            match self.ports.queue(usize::from(store.0), error.from.1) {
                Some(owner) if owner == self.queue => self.take_path_error(now, store, &error),
                // A hint that finds no room is not missed.
                Some(owner) => drop(pass_on(&self.rings.strays_of[usize::from(owner)], Stray::Error, frame)),
                None => {}
            }
        }
    }

    #[cold]
    fn take_path_error(&mut self, now: Instant, store: StoreIndex, error: &PathError) {
        match error.cause {
            Cause::TooBig { mtu_bytes } => {
                // IP and UDP header before a message.
                let header_bytes = if error.to.0.is_ipv6() { 48 } else { 28 };
                self.paths.handle_hint(now, store, mtu_bytes.saturating_sub(header_bytes));
            }
            Cause::PortUnreachable | Cause::Unreachable => {
                let quote = error.quote.bytes();
                if !self.offers.handle_unreachable(store, quote) {
                    self.engine.handle_unreachable(now, store, quote);
                }
            }
        }
    }

    fn take_strays(&mut self, now: Instant) -> usize {
        let mut taken = 0;
        while taken < BURST
            && let Some(mut mbuf) = self.rings.strays.dequeue()
        {
            taken += 1;
            let Some(front) = mbuf.data().first_chunk().copied() else { continue };
            mbuf.trim_front(front.len());
            let (store, marked) = match Stray::of(front) {
                Stray::From(store, marked) => (store, marked),
                Stray::Error => {
                    if let Some(error) = self.link.read_path_error(mbuf.data())
                        && let Some(store) = store_of(&self.stores, error.to)
                    {
                        self.take_path_error(now, store, &error);
                    }
                    continue;
                }
            };
            let Self { stores, link, engine, paths, planes, offers, counters, .. } = &mut *self;
            let from = || {
                let store = stores.get(usize::from(store.0))?;
                Some(Peer { mac: link.neighbour(store.next_hop)?, ip: store.ip, port: store.port })
            };
            let mut takers = Takers { engine, paths, planes, offers, counters };
            let result = takers.take(now, (store, marked), from, mbuf);
            if let Err(reason) = result {
                self.link.counters().dropped.add(reason);
            }
        }
        taken
    }

    /// Planes that later stages are done with: tells the engine, records the way, keeps the job for the next.
    fn take_returned(&mut self, now: Instant) -> usize {
        let mut taken = 0;
        while taken < BURST
            && let Some(mut job) = self.rings.returned.dequeue()
        {
            taken += 1;
            let (Some(transfer), Some(fetch)) = (job.transfer.take(), job.fetch.take()) else {
                unreachable!("a job that was sent out has a transfer and a fetch");
            };
            let entry_bytes = job.entry.take().map_or(0, |entry| u64::from(entry.bytes));
            let verdict = match job.outcome {
                PlaneOutcome::Delivered => {
                    fetch.progress.add_plane(entry_bytes, job.decoded_bytes as u64);
                    self.counters.planes_delivered.add(1);
                    self.counters.encoded_bytes.add(entry_bytes);
                    self.counters.delivered_bytes.add(job.decoded_bytes as u64);
                    self.latencies.record(&job.times);
                    Verdict::Delivered
                }
                PlaneOutcome::Corrupt => {
                    self.counters.planes_corrupt.add(1);
                    Verdict::Corrupt
                }
                PlaneOutcome::OtherShape => {
                    self.counters.planes_undecodable.add(1);
                    Verdict::Rejected(REJECTED_SHAPE)
                }
                PlaneOutcome::NotDelivered => {
                    self.counters.planes_undelivered.add(1);
                    Verdict::Rejected(REJECTED_BY_SINK)
                }
                PlaneOutcome::Pending | PlaneOutcome::Undecodable => {
                    self.counters.planes_undecodable.add(1);
                    Verdict::Rejected(REJECTED_UNDECODABLE)
                }
            };
            self.planes.0[transfer.slot()] = Some(job);
            self.engine.verdict(now, transfer, verdict);
        }
        taken
    }

    fn take_messages(&mut self, now: Instant) -> usize {
        let mut taken = 0;
        while taken < BURST
            && let Some(message) = self.rings.messages.dequeue()
        {
            taken += 1;
            self.take_message(now, message);
        }
        taken
    }

    fn take_message(&mut self, now: Instant, mut message: Box<QueueMessage>) {
        match &mut *message {
            QueueMessage::Fetch(part) => {
                let started = self.engine.start(
                    now,
                    FetchId(part.id.0),
                    Instant::from_nanos(part.deadline_ns),
                    Sources::Placed,
                    &part.keys,
                    &part.expect,
                );
                match started {
                    Ok(()) => return self.parts.keep(part.id.slot(), message),
                    // The control thread keeps to the engine's limits, so only a deadline that has passed gets here.
                    Err(_) => part.miss_all(MissingReason::Deadline),
                }
            }
            QueueMessage::Lookup(part) => {
                let deadline = Instant::from_nanos(part.deadline_ns);
                let id = LookupId(part.id.0);
                if self.engine.lookup(now, id, deadline, Sources::Placed, &part.keys).is_ok() {
                    return self.parts.keep(part.id.slot(), message);
                }
            }
            QueueMessage::CancelFetch(id) => self.engine.cancel(now, FetchId(id.0)),
            QueueMessage::CancelLookup(id) => self.engine.cancel_lookup(now, LookupId(id.0)),
            QueueMessage::Latencies(latencies) => std::mem::swap(&mut self.latencies, latencies),
        }
        self.answer(message);
    }

    fn answer(&mut self, message: Box<QueueMessage>) {
        let answered = self.rings.answers.enqueue(message);
        assert!(answered.is_ok(), "the ring has room for every message that can be under way");
    }

    fn take_events(&mut self, now_ns: u64) -> usize {
        let mut taken = 0;
        while let Some(event) = self.engine.poll_event() {
            taken += 1;
            match event {
                Event::PlaneArrived { transfer, fetch, chunk, plane, segments, .. } => {
                    self.send_out(now_ns, transfer, fetch, chunk, plane, segments);
                }
                Event::TransferReset { transfer } => {
                    self.counters.planes_reset.add(1);
                    if let Some(job) = &mut self.planes.0[transfer.slot()] {
                        job.drop_segments();
                        job.transfer = None;
                    }
                }
                Event::ChunkFailed { fetch, chunk, reason } => {
                    if let Some(part) = self.parts.fetch(fetch) {
                        part.missing.push((chunk, missing_reason(reason)));
                    }
                }
                Event::FetchEnded { fetch, outcome, .. } => {
                    if let Some(part) = self.parts.fetch(fetch) {
                        part.cancelled = outcome == FetchOutcome::Cancelled;
                        let slot = part.id.slot();
                        self.end(slot);
                    }
                }
                Event::LookupDone { id, outcome, found, encoded_bytes, last, .. } => {
                    if let Some(part) = self.parts.lookup(id) {
                        part.answer = Some(LookupAnswer { outcome, found, encoded_bytes, last });
                        let slot = part.id.slot();
                        self.end(slot);
                    }
                }
            }
        }
        taken
    }

    fn end(&mut self, slot: usize) {
        if let Some(message) = self.parts.0[slot].take() {
            self.answer(message);
        }
    }

    /// A plane is complete: fills in its job and sends it to the decoders.
    fn send_out(
        &mut self,
        now_ns: u64,
        transfer: TransferId,
        fetch: FetchId,
        chunk: u32,
        plane: u16,
        segments: u32,
    ) {
        self.counters.planes_arrived.add(1);
        let Some(mut job) = self.planes.0[transfer.slot()].take() else {
            unreachable!("a transfer that is being received has its job here");
        };
        let shared = self.parts.fetch(fetch).map(|part| Arc::clone(&part.fetch));
        let header = self.engine.header(transfer).and_then(|header| ChunkView::parse(header).ok());
        job.fetch = shared;
        job.chunk = usize::try_from(chunk).unwrap_or(usize::MAX);
        job.plane = usize::from(plane);
        job.shape = header.as_ref().map(|header| *header.shape());
        job.entry = header.and_then(|header| header.plane(usize::from(plane)));
        job.segment_count = usize::try_from(segments).unwrap_or(usize::MAX);
        job.outcome = PlaneOutcome::Pending;
        job.times.arrived_ns = now_ns;
        let ring = if job.buffer_count > 0 { self.gather(&mut job) } else { &self.rings.decode };
        assert!(ring.enqueue(job).is_ok(), "the ring has room for every job");
    }

    /// Of a plane in GPU memory; where it goes next.
    #[cold]
    fn gather(&mut self, job: &mut PlaneJob) -> &Ring<Box<PlaneJob>> {
        if let Some(direct) = &mut self.direct {
            direct.gather(job);
        }
        (job.times.decode_begin_ns, job.times.decode_end_ns) = (job.times.arrived_ns, job.times.arrived_ns);
        if job.outcome == PlaneOutcome::Pending { &self.rings.decoded } else { &self.rings.returned }
    }

    fn transmit(&mut self, now: Instant) -> usize {
        let Self { queue, ports, stores, macs, link, engine, paths, offers, direct, planes, parts, .. } =
            self;
        for (mac, store) in macs.iter_mut().zip(stores.iter()) {
            *mac = link.neighbour(store.next_hop).or(*mac);
        }
        let mut sent = 0;
        // Nothing is asked for before somebody can be reached; what is for others is as good as lost until then.
        if macs.iter().any(Option::is_some) {
            let from_port = |store: StoreIndex| ports.port(usize::from(store.0), *queue);
            let mut write = |buffer: &mut [u8]| {
                let mut tell = |store, bytes| set_segment_bytes(engine, offers, store, bytes);
                while paths.is_due(now)
                    && let Some((store, bytes)) = paths.poll_transmit(now, buffer, &mut tell)
                {
                    if let Some(to) = address(stores, macs, store) {
                        return Some(outgoing(from_port(store), to, bytes, false));
                    }
                }
                // Fetches go first; what is saved goes with what the link has left.
                while let Some(transmit) = engine.poll_transmit(now, buffer) {
                    if let Some(to) = address(stores, macs, transmit.store) {
                        let port = match direct {
                            Some(direct)
                                if direct.wants(
                                    engine,
                                    planes,
                                    parts,
                                    transmit.store,
                                    &buffer[..transmit.len],
                                ) =>
                            {
                                direct.port
                            }
                            _ => from_port(transmit.store),
                        };
                        return Some(outgoing(port, to, transmit.len, false));
                    }
                }
                loop {
                    let sent = offers.poll_transmit(now, buffer)?;
                    let (store, to) = match sent.to {
                        OfferTo::Store(store) => (Some(store), address(stores, macs, store)),
                        OfferTo::Peer(peer) => (store_of(stores, (peer.ip, peer.port)), Some(peer)),
                    };
                    if let (Some(store), Some(to)) = (store, to) {
                        return Some(outgoing(from_port(store), to, sent.bytes, sent.is_data));
                    }
                }
            };
            while link.send(&mut write) {
                sent += 1;
            }
        }
        link.flush();
        sent
    }
}

/// What takes in the datagrams of stores.
struct Takers<'a> {
    engine: &'a mut FetchEngine<EncodedChunks>,
    paths: &'a mut Paths,
    planes: &'a mut Planes,
    offers: &'a mut Offers,
    counters: &'a PlaneCounters,
}

impl Takers<'_> {
    /// Gives a datagram to the one that it is for. `from` tells who sent it, for whom answers may go to, if that is known.
    #[inline]
    fn take(
        &mut self,
        now: Instant,
        (store, marked): (StoreIndex, bool),
        from: impl FnOnce() -> Option<Peer>,
        mbuf: Mbuf,
    ) -> Result<(), DropReason> {
        let Self { engine, paths, planes, offers, counters } = self;
        let payload = mbuf.data();
        if !message::is_data(payload) {
            if Paths::takes(payload) {
                let tell = |store, bytes| set_segment_bytes(engine, offers, store, bytes);
                let answered = paths.handle_datagram(now, store, payload, tell);
                return answered.inspect(|()| counters.control_accepted.add(1));
            }
            if offers.takes(payload)
                && let Some(from) = from()
            {
                let taken = offers.take(now, store, from, payload);
                return taken.inspect(|()| counters.control_accepted.add(1));
            }
        }
        planes.take_datagram(engine, counters, now.nanos(), (store, marked), mbuf)
    }
}

impl Planes {
    /// Gives a datagram to the engine; a segment of a plane is kept in the plane's job.
    #[inline]
    fn take_datagram(
        &mut self,
        engine: &mut FetchEngine<EncodedChunks>,
        counters: &PlaneCounters,
        now_ns: u64,
        (store, marked): (StoreIndex, bool),
        mut mbuf: Mbuf,
    ) -> Result<(), DropReason> {
        let now = Instant::from_nanos(now_ns);
        let Accepted::Segment { transfer, segment, data } =
            engine.handle_datagram(now, store, marked, mbuf.data())?
        else {
            counters.control_accepted.add(1);
            return Ok(());
        };
        counters.segments_accepted.add(1);
        let excess = mbuf.data().len() - data.end;
        mbuf.trim_back(excess);
        mbuf.trim_front(data.start);
        let job = self.receiving(transfer, now_ns);
        let segment = usize::try_from(segment).unwrap_or(usize::MAX);
        job.segments[segment] = Some(mbuf);
        Ok(())
    }
}

impl Planes {
    /// The job of a plane of which a segment was accepted.
    #[inline]
    pub(crate) fn receiving(&mut self, transfer: TransferId, now_ns: u64) -> &mut PlaneJob {
        let Some(job) = &mut self.0[transfer.slot()] else {
            unreachable!("the engine accepts no segment of a plane that has arrived");
        };
        if job.transfer != Some(transfer) {
            job.transfer = Some(transfer);
            job.times.first_packet_ns = now_ns;
        }
        job
    }
}

impl Parts {
    fn keep(&mut self, slot: usize, message: Box<QueueMessage>) {
        self.0[slot] = Some(message);
    }

    pub(crate) fn fetch(&mut self, fetch: FetchId) -> Option<&mut FetchPart> {
        match self.0.get_mut(PartId(fetch.0).slot())?.as_deref_mut()? {
            QueueMessage::Fetch(part) if part.id.0 == fetch.0 => Some(part),
            _ => None,
        }
    }

    fn lookup(&mut self, lookup: LookupId) -> Option<&mut LookupPart> {
        match self.0.get_mut(PartId(lookup.0).slot())?.as_deref_mut()? {
            QueueMessage::Lookup(part) if part.id.0 == lookup.0 => Some(part),
            _ => None,
        }
    }
}

/// Where a store is reached, once its next hop's MAC address is known.
fn address(stores: &[StoreAddress], macs: &[Option<[u8; 6]>], store: StoreIndex) -> Option<Peer> {
    let index = usize::from(store.0);
    let (store, mac) = (stores.get(index)?, (*macs.get(index)?)?);
    Some(Peer { mac, ip: store.ip, port: store.port })
}

fn outgoing(from_port: u16, to: Peer, payload_bytes: usize, covered: bool) -> Outgoing {
    // What is covered by checksums of its own is DATA of a save, of which a store asks for less when it arrives marked.
    Outgoing { from_port, to, payload_bytes, tail: None, marks_answered: covered, covered }
}

/// What a path carries has changed.
fn set_segment_bytes(
    engine: &mut FetchEngine<EncodedChunks>,
    offers: &mut Offers,
    store: StoreIndex,
    bytes: u16,
) {
    engine.set_segment_bytes(store, bytes);
    offers.set_segment_bytes(store, bytes);
}

fn store_of(stores: &[StoreAddress], from: (IpAddr, u16)) -> Option<StoreIndex> {
    let index = stores.iter().position(|store| (store.ip, store.port) == from)?;
    u16::try_from(index).ok().map(StoreIndex)
}

/// What a packet is that another queue has received.
enum Stray {
    /// A payload from a store, and whether it was marked.
    From(StoreIndex, bool),
    /// The frame of an ICMP error.
    Error,
}

impl Stray {
    const ERROR: u8 = 2;

    fn front(self) -> [u8; 3] {
        let (store, kind) = match self {
            Self::From(store, marked) => (store.0, u8::from(marked)),
            Self::Error => (0, Self::ERROR),
        };
        let [low, high] = store.to_le_bytes();
        [low, high, kind]
    }

    fn of([low, high, kind]: [u8; 3]) -> Self {
        match kind {
            Self::ERROR => Self::Error,
            marked => Self::From(StoreIndex(u16::from_le_bytes([low, high])), marked != 0),
        }
    }
}

/// Passes a packet on to the queue it is for, with what it is in front of it.
fn pass_on(strays: &Ring<Mbuf>, what: Stray, mut mbuf: Mbuf) -> Result<(), ()> {
    mbuf.prepend(3).ok_or(())?.copy_from_slice(&what.front());
    strays.enqueue(mbuf).map_err(|_| ())
}
