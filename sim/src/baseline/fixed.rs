//! A fixed window: so many segments asked of each store at once, whatever the network does.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use crate::content::Catalogue;
use crate::host::{Deed, Host, Order};
use crate::net::{Net, Way};
use crate::record::{End, Records};

use super::{Arrivals, Header, Kind, Timeout};

/// Most segments of a request.
const REQUEST_SEGMENTS: u32 = 64;

/// Settings of a receiver.
#[derive(Clone, Copy, Debug)]
pub struct FixedConfig {
    /// Segments asked for at once, per fetch.
    pub window_segments: u32,
    /// Bytes of a segment.
    pub segment_bytes: u32,
    /// Least timeout, nanoseconds.
    pub rto_min_nanos: u64,
}

#[derive(Debug)]
struct Flow {
    store: u32,
    deadline: u64,
    bytes: u64,
    arrivals: Arrivals,
    next: u32,
    lost: VecDeque<u32>,
    /// Asked for, when, in the order of asking; what has arrived since is skipped.
    asked: VecDeque<(u64, u32)>,
    /// The segment whose round trip is being measured (Karn: asked for once), and since when.
    timed: Option<(u32, u64)>,
    in_flight: u32,
    timeout: Timeout,
}

/// A data plane with a fixed window.
#[derive(Debug)]
pub struct FixedReceiver {
    id: u32,
    config: FixedConfig,
    catalogue: Rc<Catalogue>,
    flows: BTreeMap<u64, Flow>,
}

impl FixedReceiver {
    /// A receiver with nothing to do.
    pub fn new(id: u32, config: FixedConfig, catalogue: Rc<Catalogue>) -> FixedReceiver {
        FixedReceiver { id, config, catalogue, flows: BTreeMap::new() }
    }

    fn take_in(&mut self, net: &Net, records: &mut Records, id: u32) {
        let packet = net.packets.get(id);
        let Some(header) = Header::read(packet).filter(|header| header.kind == Kind::Segment) else { return };
        let Some(flow) = self.flows.get_mut(&u64::from(header.flow)) else { return };
        if packet.damaged || !flow.arrivals.note(header.segment) {
            return;
        }
        flow.in_flight = flow.in_flight.saturating_sub(1);
        flow.timeout.arrived();
        if let Some((_, at)) = flow.timed.filter(|timed| timed.0 == header.segment) {
            flow.timed = None;
            flow.timeout.sample(net.now - at);
        }
        while flow.asked.front().is_some_and(|asked| flow.arrivals.has(asked.1)) {
            flow.asked.pop_front();
        }
        records.delivered(u64::from(header.flow), u64::from(packet.payload_bytes));
        records.took_in(self.id, u64::from(packet.payload_bytes));
        if flow.arrivals.arrived == flow.arrivals.segments {
            self.flows.remove(&u64::from(header.flow));
            records.ended(u64::from(header.flow), net.now, End::Done);
        }
    }

    fn time_out(flow: &mut Flow, now: u64) {
        let mut any = false;
        while let Some((at, segment)) = flow.asked.front().copied() {
            let is_here = flow.arrivals.has(segment);
            if !is_here && at + flow.timeout.nanos() > now {
                break;
            }
            flow.asked.pop_front();
            if !is_here {
                flow.timed = flow.timed.filter(|timed| timed.0 != segment);
                any = true;
                flow.in_flight = flow.in_flight.saturating_sub(1);
                flow.lost.push_back(segment);
            }
        }
        if any {
            flow.timeout.back_off();
        }
    }

    fn ask(&mut self, net: &mut Net, id: u64) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        while flow.in_flight < self.config.window_segments {
            let room = (self.config.window_segments - flow.in_flight).min(REQUEST_SEGMENTS);
            let (first, count) = if let Some(first) = flow.lost.pop_front() {
                let mut count = 1;
                while count < room && flow.lost.front() == Some(&(first + count)) {
                    flow.lost.pop_front();
                    count += 1;
                }
                (first, count)
            } else {
                let left = flow.arrivals.segments - flow.next;
                // Credit comes back a segment at a time: wait until it is worth a packet.
                let worth = REQUEST_SEGMENTS.min(self.config.window_segments.div_ceil(4)).min(left);
                if left == 0 || room < worth {
                    return;
                }
                let first = flow.next;
                flow.next += room.min(left);
                flow.timed.get_or_insert((first, net.now));
                (first, room.min(left))
            };
            flow.in_flight += count;
            flow.asked.extend((first..first + count).map(|segment| (net.now, segment)));
            let (bytes, store) = (flow.bytes, flow.store);
            let number = u32::try_from(id).expect("fetches are numbered in 32 bits");
            net.send(self.id, store, |packet| {
                Header { kind: Kind::Request, flow: number, segment: first, count, more: bytes }.emit(packet);
            });
        }
    }
}

impl Host for FixedReceiver {
    fn turn(&mut self, net: &mut Net, records: &mut Records, rx: &[u32]) -> Option<u64> {
        for id in rx {
            self.take_in(net, records, *id);
        }
        let ids: Vec<u64> = self.flows.keys().copied().collect();
        let mut wake = None;
        for id in ids {
            let flow = self.flows.get_mut(&id)?;
            if flow.deadline <= net.now {
                self.flows.remove(&id);
                records.ended(id, net.now, End::Failed);
                continue;
            }
            FixedReceiver::time_out(flow, net.now);
            self.ask(net, id);
            let flow = &self.flows[&id];
            let rto = flow.asked.front().map_or(u64::MAX, |asked| asked.0 + flow.timeout.nanos());
            wake = Some(wake.unwrap_or(u64::MAX).min(rto).min(flow.deadline));
        }
        wake
    }

    fn befall(&mut self, net: &mut Net, records: &mut Records, deed: Deed) {
        match deed {
            Deed::Fetch(order) => {
                let flow = self.flow(net, &order);
                records.started(order.id, self.id, net.now, flow.bytes);
                self.flows.insert(order.id, flow);
            }
            Deed::Cancel(id) if self.flows.remove(&id).is_some() => {
                records.ended(id, net.now, End::Cancelled)
            }
            _ => {}
        }
    }
}

impl FixedReceiver {
    fn flow(&self, net: &Net, order: &Order) -> Flow {
        let bytes = self.catalogue.payload_bytes(order.chunks.clone());
        let segments = bytes.div_ceil(u64::from(self.config.segment_bytes));
        Flow {
            store: order.stores[0],
            deadline: net.now + order.deadline_nanos,
            bytes,
            arrivals: Arrivals::new(u32::try_from(segments).expect("a flow of fewer than 2^32 segments")),
            next: 0,
            lost: VecDeque::new(),
            asked: VecDeque::new(),
            timed: None,
            in_flight: 0,
            timeout: Timeout::new(self.config.rto_min_nanos),
        }
    }
}

/// A store that sends what it is asked for, in the order of asking.
#[derive(Debug)]
pub struct FixedSender {
    id: u32,
    segment_bytes: u32,
    ring_bytes: u64,
    is_up: bool,
    /// To whom, the request, and how much of it is sent.
    pending: VecDeque<(u32, Header, u32)>,
}

impl FixedSender {
    /// A sender with nothing to send.
    pub fn new(id: u32, segment_bytes: u32, ring_bytes: u64) -> FixedSender {
        FixedSender { id, segment_bytes, ring_bytes, is_up: true, pending: VecDeque::new() }
    }
}

/// Sends one segment of a flow of `bytes`.
pub(super) fn send_segment(
    net: &mut Net,
    from: u32,
    to: u32,
    header: Header,
    bytes: u64,
    segment_bytes: u32,
) {
    let begin = u64::from(header.segment) * u64::from(segment_bytes);
    let payload =
        u32::try_from(bytes.saturating_sub(begin).min(u64::from(segment_bytes))).unwrap_or(segment_bytes);
    net.send(from, to, |packet| {
        header.emit(packet);
        packet.payload_bytes = payload;
        packet.tail_bytes = payload;
    });
}

impl Host for FixedSender {
    fn turn(&mut self, net: &mut Net, _records: &mut Records, rx: &[u32]) -> Option<u64> {
        for id in rx {
            let packet = net.packets.get(*id);
            if let Some(header) = Header::read(packet).filter(|header| header.kind == Kind::Request) {
                self.pending.push_back((packet.from, header, 0));
            }
        }
        while let Some((to, request, sent)) = self.pending.front_mut() {
            let link = net.link(self.id, Way::Up);
            if link.backlog_bytes(net.now) >= self.ring_bytes {
                return Some(net.now + link.backlog_nanos(net.now) / 2 + 1);
            }
            let segment = request.segment + *sent;
            let header = Header { kind: Kind::Segment, segment, count: 0, more: 0, ..*request };
            let (to, bytes) = (*to, request.more);
            *sent += 1;
            if *sent >= request.count {
                self.pending.pop_front();
            }
            send_segment(net, self.id, to, header, bytes, self.segment_bytes);
        }
        None
    }

    fn befall(&mut self, _net: &mut Net, _records: &mut Records, deed: Deed) {
        match deed {
            Deed::Crash => {
                self.is_up = false;
                self.pending.clear();
            }
            Deed::Restart => {
                self.is_up = true;
                self.pending.clear();
            }
            _ => {}
        }
    }

    fn is_up(&self) -> bool {
        self.is_up
    }
}
