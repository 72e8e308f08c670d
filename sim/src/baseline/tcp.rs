//! A TCP-like design: the sender's congestion window grows by a segment a round trip and is halved by a loss.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use crate::content::Catalogue;
use crate::host::{Deed, Host};
use crate::net::{Net, Way};
use crate::record::{End, Records};

use super::fixed::send_segment;
use super::{Arrivals, Header, Kind, Timeout};

/// Segments above a missing one that prove it lost (RFC 5681).
const DUPLICATE_ACKS: u32 = 3;
/// First window (RFC 6928).
const INITIAL_WINDOW: u64 = 10;
/// Timeouts in a row after which a flow is given up.
const MOST_TIMEOUTS: u32 = 15;
/// What an acknowledgement says of a flow that the receiver no longer wants.
const OVER: u32 = u32::MAX;

/// Settings of both ends.
#[derive(Clone, Copy, Debug)]
pub struct TcpConfig {
    /// Bytes of a segment.
    pub segment_bytes: u32,
    /// Least timeout, nanoseconds.
    pub rto_min_nanos: u64,
    /// Segments that a receiver has room for: bounds the sender's window.
    pub window_segments: u32,
}

#[derive(Debug)]
struct Receiving {
    store: u32,
    deadline: u64,
    bytes: u64,
    arrivals: Arrivals,
    /// When the request is sent again if nothing has come.
    ask_at: u64,
}

/// A data plane that takes what comes and acknowledges each segment.
#[derive(Debug)]
pub struct TcpReceiver {
    id: u32,
    config: TcpConfig,
    catalogue: Rc<Catalogue>,
    flows: BTreeMap<u64, Receiving>,
}

impl TcpReceiver {
    /// A receiver with nothing to do.
    pub fn new(id: u32, config: TcpConfig, catalogue: Rc<Catalogue>) -> TcpReceiver {
        TcpReceiver { id, config, catalogue, flows: BTreeMap::new() }
    }

    fn take_in(&mut self, net: &mut Net, records: &mut Records, id: u32) {
        let packet = net.packets.get(id);
        let Some(header) = Header::read(packet).filter(|header| header.kind == Kind::Segment) else { return };
        let (from, payload, is_damaged) = (packet.from, u64::from(packet.payload_bytes), packet.damaged);
        let key = u64::from(header.flow);
        let mut ack = Header { kind: Kind::Ack, count: OVER, more: 0, ..header };
        if let Some(flow) = self.flows.get_mut(&key) {
            if is_damaged {
                return;
            }
            flow.ask_at = net.now + 100 * self.config.rto_min_nanos;
            if flow.arrivals.note(header.segment) {
                records.delivered(key, payload);
                records.took_in(self.id, payload);
            }
            ack.count = flow.arrivals.first_missing;
            ack.more = flow.arrivals.before(header.segment);
            if flow.arrivals.arrived == flow.arrivals.segments {
                ack.count = OVER;
                self.flows.remove(&key);
                records.ended(key, net.now, End::Done);
            }
        }
        net.send(self.id, from, |packet| ack.emit(packet));
    }
}

impl Host for TcpReceiver {
    fn turn(&mut self, net: &mut Net, records: &mut Records, rx: &[u32]) -> Option<u64> {
        for id in rx {
            self.take_in(net, records, *id);
        }
        let mut wake = None;
        let over: Vec<u64> =
            self.flows.iter().filter(|(_, flow)| flow.deadline <= net.now).map(|(id, _)| *id).collect();
        for id in over {
            self.flows.remove(&id);
            records.ended(id, net.now, End::Failed);
        }
        for (id, flow) in &mut self.flows {
            if flow.ask_at <= net.now {
                let number = u32::try_from(*id).expect("fetches are numbered in 32 bits");
                let (count, more) = (flow.arrivals.segments, flow.bytes);
                let request = Header { kind: Kind::Request, flow: number, segment: 0, count, more };
                net.send(self.id, flow.store, |packet| request.emit(packet));
                flow.ask_at = net.now + 10 * self.config.rto_min_nanos;
            }
            wake = Some(wake.unwrap_or(u64::MAX).min(flow.ask_at).min(flow.deadline));
        }
        wake
    }

    fn befall(&mut self, net: &mut Net, records: &mut Records, deed: Deed) {
        match deed {
            Deed::Fetch(order) => {
                let bytes = self.catalogue.payload_bytes(order.chunks.clone());
                let segments = bytes.div_ceil(u64::from(self.config.segment_bytes));
                let segments = u32::try_from(segments).expect("a flow of fewer than 2^32 segments");
                records.started(order.id, self.id, net.now, bytes);
                let flow = Receiving {
                    store: order.stores[0],
                    deadline: net.now + order.deadline_nanos,
                    bytes,
                    arrivals: Arrivals::new(segments),
                    ask_at: net.now,
                };
                self.flows.insert(order.id, flow);
            }
            Deed::Cancel(id) if self.flows.remove(&id).is_some() => {
                records.ended(id, net.now, End::Cancelled)
            }
            _ => {}
        }
    }
}

/// Window arithmetic is in thousandths of a segment.
const MILLI: u64 = 1000;

#[derive(Debug)]
struct Sending {
    bytes: u64,
    acked: Arrivals,
    next: u32,
    /// One past the highest segment acknowledged.
    highest: u32,
    /// Segments below have been looked at for losses.
    looked_at: u32,
    lost: VecDeque<u32>,
    in_flight: u32,
    /// Losses of segments below belong to the same event.
    recover: u32,
    window: u64,
    threshold: u64,
    timeout: Timeout,
    rto_at: u64,
    timed: Option<(u32, u64)>,
    /// Timeouts since something was acknowledged; the flow is given up after [`MOST_TIMEOUTS`].
    timeouts: u32,
}

impl Sending {
    fn new(request: &Header, config: &TcpConfig) -> Sending {
        Sending {
            bytes: request.more,
            acked: Arrivals::new(request.count),
            next: 0,
            highest: 0,
            looked_at: 0,
            lost: VecDeque::new(),
            in_flight: 0,
            recover: 0,
            window: INITIAL_WINDOW * MILLI,
            threshold: u64::from(config.window_segments) * MILLI,
            timeout: Timeout::new(config.rto_min_nanos),
            rto_at: u64::MAX,
            timed: None,
            timeouts: 0,
        }
    }

    fn note(&mut self, segment: u32, most: u64) {
        if !self.acked.note(segment) {
            return;
        }
        if segment < self.next {
            self.in_flight = self.in_flight.saturating_sub(1);
        }
        self.highest = self.highest.max(segment + 1);
        let grown = if self.window < self.threshold { MILLI } else { MILLI * MILLI / self.window };
        self.window = (self.window + grown).min(most * MILLI);
    }

    fn take_in(&mut self, now: u64, ack: &Header, most: u64) {
        if let Some((segment, at)) = self.timed
            && (segment == ack.segment || segment < ack.count)
        {
            self.timed = None;
            self.timeout.sample(now - at);
        }
        let before = self.acked.arrived;
        while self.acked.first_missing < ack.count.min(self.acked.segments) {
            self.note(self.acked.first_missing, most);
        }
        for back in 0..64 {
            if ack.more >> back & 1 == 1 && back <= ack.segment {
                self.note(ack.segment - back, most);
            }
        }
        if self.acked.arrived > before {
            self.rto_at = now + self.timeout.nanos();
            self.timeouts = 0;
        }
        while self.looked_at + DUPLICATE_ACKS < self.highest {
            let segment = self.looked_at;
            self.looked_at += 1;
            if self.acked.has(segment) {
                continue;
            }
            self.in_flight = self.in_flight.saturating_sub(1);
            self.lost.push_back(segment);
            if segment >= self.recover {
                self.recover = self.next;
                self.threshold = (self.window / 2).max(2 * MILLI);
                self.window = self.threshold;
            }
        }
    }

    fn time_out(&mut self, now: u64) {
        self.timeouts += 1;
        self.timeout.back_off();
        self.threshold = (self.window / 2).max(2 * MILLI);
        self.window = MILLI;
        self.in_flight = 0;
        self.timed = None;
        self.recover = self.next;
        self.looked_at = self.next;
        self.lost.clear();
        self.lost.extend((self.acked.first_missing..self.next).filter(|segment| !self.acked.has(*segment)));
        self.rto_at = now + self.timeout.nanos();
    }

    /// The segment to send next, if the window allows one.
    fn next_segment(&mut self, now: u64) -> Option<u32> {
        if u64::from(self.in_flight) * MILLI >= self.window {
            return None;
        }
        while let Some(segment) = self.lost.pop_front() {
            if !self.acked.has(segment) {
                self.in_flight += 1;
                return Some(segment);
            }
        }
        // After a restart the receiver has more than this sender has sent.
        self.next = self.next.max(self.acked.first_missing);
        if self.next >= self.acked.segments {
            return None;
        }
        let segment = self.next;
        self.next += 1;
        self.in_flight += 1;
        self.timed.get_or_insert((segment, now));
        Some(segment)
    }
}

/// A store that sends flows, each with its own congestion window.
#[derive(Debug)]
pub struct TcpSender {
    id: u32,
    config: TcpConfig,
    ring_bytes: u64,
    is_up: bool,
    flows: BTreeMap<(u32, u32), Sending>,
    /// The flow whose turn it is next.
    turn: (u32, u32),
}

impl TcpSender {
    /// A sender with nothing to send.
    pub fn new(id: u32, config: TcpConfig, ring_bytes: u64) -> TcpSender {
        TcpSender { id, config, ring_bytes, is_up: true, flows: BTreeMap::new(), turn: (0, 0) }
    }

    fn take_in(&mut self, net: &Net, id: u32) {
        let packet = net.packets.get(id);
        let Some(header) = Header::read(packet) else { return };
        let key = (packet.from, header.flow);
        match header.kind {
            Kind::Request => {
                self.flows.entry(key).or_insert_with(|| Sending::new(&header, &self.config));
            }
            Kind::Ack if header.count == OVER => {
                self.flows.remove(&key);
            }
            Kind::Ack => {
                if let Some(flow) = self.flows.get_mut(&key) {
                    flow.take_in(net.now, &header, u64::from(self.config.window_segments));
                }
            }
            Kind::Segment => {}
        }
    }

    /// Sends a segment of each flow in turn until none may send or the transmit ring is full.
    fn transmit(&mut self, net: &mut Net) -> Option<u64> {
        loop {
            let mut any = false;
            let keys: Vec<(u32, u32)> = self
                .flows
                .range(self.turn..)
                .chain(self.flows.range(..self.turn))
                .map(|(key, _)| *key)
                .collect();
            for key in keys {
                let link = net.link(self.id, Way::Up);
                if link.backlog_bytes(net.now) >= self.ring_bytes {
                    self.turn = key;
                    return Some(net.now + link.backlog_nanos(net.now) / 2 + 1);
                }
                let Some(flow) = self.flows.get_mut(&key) else { continue };
                let Some(segment) = flow.next_segment(net.now) else { continue };
                if flow.rto_at == u64::MAX {
                    flow.rto_at = net.now + flow.timeout.nanos();
                }
                any = true;
                let bytes = flow.bytes;
                let header = Header { kind: Kind::Segment, flow: key.1, segment, count: 0, more: 0 };
                send_segment(net, self.id, key.0, header, bytes, self.config.segment_bytes);
            }
            if !any {
                return None;
            }
        }
    }
}

impl Host for TcpSender {
    fn turn(&mut self, net: &mut Net, _records: &mut Records, rx: &[u32]) -> Option<u64> {
        for id in rx {
            self.take_in(net, *id);
        }
        for flow in self.flows.values_mut().filter(|flow| flow.rto_at <= net.now) {
            flow.time_out(net.now);
        }
        self.flows.retain(|_, flow| flow.timeouts < MOST_TIMEOUTS);
        let ring_at = self.transmit(net);
        let rto_at = self.flows.values().map(|flow| flow.rto_at).min();
        ring_at.into_iter().chain(rto_at).min().filter(|at| *at != u64::MAX)
    }

    fn befall(&mut self, _net: &mut Net, _records: &mut Records, deed: Deed) {
        match deed {
            Deed::Crash => {
                self.is_up = false;
                self.flows.clear();
            }
            Deed::Restart => {
                self.is_up = true;
                self.flows.clear();
            }
            _ => {}
        }
    }

    fn is_up(&self) -> bool {
        self.is_up
    }
}
