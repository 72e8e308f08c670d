//! What must become of every packet: a slow model of the data plane's receive path, which sees the packets that the
//! lab sends, in their order, and the requests that the data plane sends.
//!
//! A prediction is a set of fates. It has one member, except where the moment at which a decoder finishes decides: a
//! segment of a plane that is complete is a duplicate until the plane is delivered, and stale afterwards.

use std::collections::{HashMap, HashSet};

use protocol::frame::{self, HardwareChecks, Incoming, Local, Peer};
use protocol::reason::DropReason;
use protocol::wire::message::{ErrorCode, Message, PullRange, segments};

use super::chunks::Library;
use super::frames::Frame;

/// A set of what can become of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Fates(u64);

impl Fates {
    pub(crate) const NEIGHBOUR: Self = Self(1 << DropReason::COUNT);
    pub(crate) const ICMP: Self = Self(1 << (DropReason::COUNT + 3));
    pub(crate) const SEGMENT: Self = Self(1 << (DropReason::COUNT + 1));
    pub(crate) const CONTROL: Self = Self(1 << (DropReason::COUNT + 2));

    pub(crate) const fn dropped(reason: DropReason) -> Self {
        Self(1 << reason.index())
    }

    pub(crate) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether there is one.
    pub(crate) const fn is_exact(self) -> bool {
        self.0.count_ones() == 1
    }

    pub(crate) const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Receiving,
    /// All of a plane has arrived; it is being decoded or has been.
    Whole,
    /// The data plane knows the tag no more.
    Gone,
}

struct Tag {
    range: PullRange,
    phase: Phase,
    arrived: HashSet<u32>,
    /// Something that differs from what the store holds was accepted.
    poisoned: bool,
}

impl Tag {
    fn is_header(&self) -> bool {
        self.range.offset == 0
    }

    fn segments(&self) -> u32 {
        segments(self.range.bytes, self.range.segment_bytes)
    }

    /// Bytes of a segment.
    fn segment_bytes(&self, segment: u32) -> usize {
        let begin = segment * u32::from(self.range.segment_bytes);
        usize::try_from((self.range.bytes - begin).min(u32::from(self.range.segment_bytes))).unwrap()
    }
}

/// A LOOKUP that the data plane has sent.
struct Request {
    keys: usize,
    answered: bool,
}

/// What was sent in one round, and what must be counted for it.
#[derive(Default, Clone)]
pub(crate) struct Sums {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    /// Packets in two buffers.
    pub(crate) split: u64,
    /// Packets that carry a datagram for one of the ports.
    pub(crate) datagrams: u64,
    pub(crate) fates: HashMap<Fates, u64>,
    /// Planes of which every segment was accepted, and those of them that hold a wrong byte.
    pub(crate) planes: u64,
    pub(crate) poisoned_planes: u64,
    /// Whether a chunk may have been given up at a moment that is not known here.
    pub(crate) is_shaky: bool,
}

pub(crate) struct Ledger {
    plane: Local,
    store: (std::net::IpAddr, u16),
    tags: HashMap<u32, Tag>,
    requests: HashMap<u32, Request>,
    /// Chunks that an ERROR or a new epoch has stopped and whose header was not pulled again yet.
    stopped: HashSet<u32>,
    /// Chunks that the data plane may give up because of what it decodes.
    shaky: HashSet<u32>,
    is_fetching: bool,
    /// The store's, as its last LOOKUP_REPLY said; 0 before the first.
    epoch: u64,
    pub(crate) sums: Sums,
}

impl Ledger {
    pub(crate) fn new(plane: Local, store: Peer) -> Self {
        Self {
            plane,
            store: (store.ip, store.port),
            tags: HashMap::new(),
            requests: HashMap::new(),
            stopped: HashSet::new(),
            shaky: HashSet::new(),
            is_fetching: false,
            epoch: 0,
            sums: Sums::default(),
        }
    }

    /// A round begins; from now on chunks in `shaky` can be given up at any time.
    pub(crate) fn begin(&mut self, shaky: &[u32]) {
        self.is_fetching = true;
        self.shaky = shaky.iter().copied().collect();
        self.sums = Sums { is_shaky: !shaky.is_empty(), ..Sums::default() };
    }

    /// The client was told of the fetch's end: nothing of it is under way.
    pub(crate) fn end(&mut self) {
        self.is_fetching = false;
        self.stopped.clear();
        self.shaky.clear();
        self.tags.values_mut().for_each(|tag| tag.phase = Phase::Gone);
        self.requests.values_mut().for_each(|request| request.answered = true);
    }

    /// Takes in what the data plane asks for.
    pub(crate) fn asked(&mut self, payload: &[u8]) {
        match Message::new_checked(payload).expect("the data plane sends well-formed messages") {
            Message::Lookup(lookup) => {
                let request = Request { keys: lookup.keys().len(), answered: !self.is_fetching };
                self.requests.entry(lookup.request).or_insert(request);
            }
            Message::Pull(pull) => self.pulled(pull.range),
            other => panic!("the data plane sent {other:?}"),
        }
    }

    fn pulled(&mut self, range: PullRange) {
        if let Some(tag) = self.tags.get(&range.tag) {
            assert_eq!(tag.range, range, "all PULLs of a tag name one range");
            return;
        }
        // One of another epoch was sent before the LOOKUP_REPLY that ended that epoch came: it is given up by now.
        let is_current = range.epoch == self.epoch;
        if is_current && range.offset == 0 {
            self.stopped.remove(&range.handle);
        }
        let is_live = self.is_fetching && is_current && !self.stopped.contains(&range.handle);
        let phase = if is_live { Phase::Receiving } else { Phase::Gone };
        self.tags.insert(range.tag, Tag { range, phase, arrived: HashSet::new(), poisoned: false });
    }

    /// The range that a tag stands for, while it is being received.
    pub(crate) fn receiving(&self, tag: u32) -> Option<PullRange> {
        self.tags.get(&tag).filter(|tag| tag.phase == Phase::Receiving).map(|tag| tag.range)
    }

    /// Whether a message of the store is one that the data plane waits for. On a busy machine it asks twice, and what comes the second time is
    /// not.
    pub(crate) fn awaits(&self, payload: &[u8]) -> bool {
        match Message::new_checked(payload) {
            Ok(Message::Data(data)) => self
                .tags
                .get(&data.tag)
                .is_some_and(|tag| tag.phase == Phase::Receiving && !tag.arrived.contains(&data.segment)),
            _ => true,
        }
    }

    pub(crate) fn knows(&self, tag: u32) -> bool {
        self.tags.contains_key(&tag)
    }

    /// Notes a packet that is sent next, and says what must become of it.
    pub(crate) fn sent(&mut self, frame: &Frame, library: &Library) -> Fates {
        self.sums.packets += 1;
        self.sums.bytes += frame.bytes.len() as u64;
        self.sums.split += u64::from(frame.split.is_some());
        let fates = self.predict(frame, library);
        *self.sums.fates.entry(fates).or_default() += 1;
        fates
    }

    fn predict(&mut self, frame: &Frame, library: &Library) -> Fates {
        // One that comes in two buffers is put together, and is then like any other.
        let (from, payload) = match frame::parse(&frame.bytes, &self.plane, HardwareChecks::default()) {
            Err(reason) => return Fates::dropped(reason),
            Ok(Incoming::Datagram { from, payload, .. }) => (from, payload),
            Ok(Incoming::NeighbourRequest { .. } | Incoming::NeighbourReply { .. }) => {
                return Fates::NEIGHBOUR;
            }
            Ok(Incoming::PathError(_)) => return Fates::ICMP,
        };
        self.sums.datagrams += 1;
        if (from.ip, from.port) != self.store {
            return Fates::dropped(DropReason::UnknownPeer);
        }
        match Message::new_checked(&frame.bytes[payload]) {
            Err(reason) => Fates::dropped(reason),
            Ok(Message::Lookup(_) | Message::Pull(_) | Message::Probe(_)) => {
                Fates::dropped(DropReason::BadType)
            }
            // On an MTU of 1,500 nothing is probed.
            Ok(Message::ProbeReply(_)) => Fates::dropped(DropReason::Stale),
            Ok(Message::Data(data)) => {
                self.predict_data(data.tag, data.segment, data.epoch, data.payload, library)
            }
            Ok(Message::Error(refusal)) => self.predict_error(refusal.tag, refusal.code, refusal.epoch),
            Ok(Message::LookupReply(reply)) => {
                let Some(request) = self.requests.get_mut(&reply.request).filter(|request| !request.answered)
                else {
                    return Fates::dropped(DropReason::Stale);
                };
                if reply.entries().len() != request.keys {
                    return Fates::dropped(DropReason::BadLength);
                }
                request.answered = true;
                self.learn_epoch(reply.epoch);
                Fates::CONTROL
            }
        }
    }

    /// In a new epoch the data plane looks up again whatever it was pulling.
    fn learn_epoch(&mut self, epoch: u64) {
        let before = std::mem::replace(&mut self.epoch, epoch);
        if before == epoch || before == 0 {
            return;
        }
        for tag in self.tags.values_mut() {
            self.stopped.insert(tag.range.handle);
            if tag.phase == Phase::Receiving {
                tag.phase = Phase::Gone;
            }
        }
    }

    fn predict_data(
        &mut self,
        number: u32,
        segment: u32,
        epoch: u64,
        data: &[u8],
        library: &Library,
    ) -> Fates {
        let stale = Fates::dropped(DropReason::Stale);
        let Some(tag) = self.tags.get_mut(&number) else { return stale };
        let shaky = self.shaky.contains(&tag.range.handle);
        let or_stale = |fates: Fates| if shaky { fates.or(stale) } else { fates };
        match tag.phase {
            Phase::Gone => return stale,
            Phase::Whole => return Fates::dropped(DropReason::Duplicate).or(stale),
            Phase::Receiving => {}
        }
        let reason = if epoch != tag.range.epoch {
            Some(DropReason::StaleEpoch)
        } else if segment >= tag.segments() {
            Some(DropReason::BadSegment)
        } else if data.len() != tag.segment_bytes(segment) {
            Some(DropReason::BadLength)
        } else if tag.arrived.contains(&segment) {
            Some(DropReason::Duplicate)
        } else {
            None
        };
        if let Some(reason) = reason {
            return or_stale(Fates::dropped(reason));
        }
        tag.arrived.insert(segment);
        let begin = tag.range.offset + u64::from(segment) * u64::from(tag.range.segment_bytes);
        tag.poisoned |= library.range(tag.range.handle, begin, data.len()) != Some(data);
        let is_whole = tag.arrived.len() == usize::try_from(tag.segments()).unwrap();
        if tag.is_header() {
            if is_whole {
                tag.phase = Phase::Gone;
            }
            return or_stale(Fates::CONTROL);
        }
        if is_whole {
            tag.phase = Phase::Whole;
            self.sums.planes += 1;
            self.sums.poisoned_planes += u64::from(tag.poisoned);
        }
        or_stale(Fates::SEGMENT)
    }

    fn predict_error(&mut self, number: u32, code: ErrorCode, epoch: u64) -> Fates {
        let stale = Fates::dropped(DropReason::Stale);
        let Some(range) = self.receiving(number) else { return stale };
        let taken = match code == ErrorCode::Busy && epoch != range.epoch {
            true => Fates::dropped(DropReason::StaleEpoch),
            false => Fates::CONTROL,
        };
        if code != ErrorCode::Busy {
            self.stopped.insert(range.handle);
            for tag in self.tags.values_mut() {
                if tag.range.handle == range.handle && tag.phase == Phase::Receiving {
                    tag.phase = Phase::Gone;
                }
            }
        }
        if self.shaky.contains(&range.handle) { taken.or(stale) } else { taken }
    }
}

impl Sums {
    /// Packets that can have had this fate: at least, at most.
    pub(crate) fn bounds(&self, fate: Fates) -> (u64, u64) {
        let count = |keep: &dyn Fn(Fates) -> bool| {
            self.fates.iter().filter(|(fates, _)| keep(**fates)).map(|(_, count)| count).sum()
        };
        (count(&|fates| fates == fate), count(&|fates| fates.has(fate)))
    }
}
