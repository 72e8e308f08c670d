//! Both engines of a PUT, and somebody who lies in the name of either.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use protocol::put::{
    AcceptConfig, AcceptEngine, AcceptEvent, Declined, Intake, OfferConfig, OfferEngine, OfferTo, PutVerdict,
    Taken,
};
use protocol::wire::message::MAX_CONTROL_BYTES;
use protocol::{ChunkInfo, ChunkSource, Instant, Key, Peer, ServeConfig, StoreIndex};

use super::input::Input;
use super::{message, peer, small};

const MILLISECOND: u64 = 1_000_000;
const PATIENCE_MS: u64 = 64;
const MAX_CHUNK_BYTES: u32 = 20_000;
/// Messages under way in one direction; more are lost.
const MOST_MESSAGES: usize = 256;

/// What the data plane offers, by handle.
#[derive(Default)]
struct Shelf(HashMap<u32, Vec<u8>>);

impl ChunkSource for Shelf {
    fn find(&self, _key: &Key) -> Option<ChunkInfo> {
        None
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        self.0.get(&handle).map(|bytes| bytes.len() as u64)
    }
}

/// What the store's caller owes the engine.
#[derive(Clone, Copy)]
enum Owed {
    Memory { intake: Intake, bytes: u32 },
    Verdict { intake: Intake },
}

struct World {
    accept: AcceptEngine,
    config: AcceptConfig,
    offer: OfferEngine,
    shelf: Shelf,
    now: u64,
    to_store: VecDeque<(Peer, Vec<u8>)>,
    to_plane: VecDeque<Vec<u8>>,
    /// What was said lately, to be said again to either.
    said: VecDeque<Vec<u8>>,
    /// Memory that intakes have, by slot.
    granted: BTreeMap<usize, (Intake, u32)>,
    owed: Vec<Owed>,
    cut_off: bool,
}

/// A script: offers begun and cancelled, messages handed over, lost, damaged, repeated or made up, time, and what the store's caller answers. Whatever it
/// says, what is written lies in memory that was granted, which comes back once; counters add up, and with the last deadline nothing is left.
pub(crate) fn put(data: &[u8]) {
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
        let config = AcceptConfig {
            epoch: 7,
            max_intakes: u16::from(mode & 3),
            max_chunk_bytes: MAX_CHUNK_BYTES,
            segment_bytes: [256, 1440][usize::from(mode >> 2 & 1)],
            window_segments: [1, 48][usize::from(mode >> 3 & 1)],
            rto_min: Duration::from_millis(1),
            rto_max: Duration::from_millis(8),
            silence: Duration::from_millis(30),
            corrupt_retries: 1,
            ..AcceptConfig::default()
        };
        let serve = ServeConfig { max_segment_bytes: 512, ..small(9) };
        let (rto_min, rto_max) = (Duration::from_millis(1), Duration::from_millis(8));
        World {
            accept: AcceptEngine::new(config),
            config,
            offer: OfferEngine::new(OfferConfig {
                max_offers: 3,
                stores: 1,
                segment_bytes: 256,
                rto_min,
                rto_max,
                serve,
                seed: 1,
            }),
            shelf: Shelf::default(),
            now: 1,
            to_store: VecDeque::new(),
            to_plane: VecDeque::new(),
            said: VecDeque::new(),
            granted: BTreeMap::new(),
            owed: Vec::new(),
            cut_off: false,
        }
    }

    fn now(&self) -> Instant {
        Instant::from_nanos(self.now)
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() & 15 {
            0 => self.begin(input),
            1 => {
                // An id comes from an offer, so those on the shelf are all that can be cancelled.
                let at = self.now() + Duration::from_millis(1);
                let _ = self.offer.start(self.now(), at, StoreIndex(0), &Key([0; 32]), 1, 1).map(|id| {
                    self.offer.cancel(id);
                    self.shelf.0.insert(id.handle(), vec![0]);
                });
            }
            2 | 3 => (0..=input.below(16)).for_each(|_| {
                if let Some((from, message)) = self.to_store.pop_front() {
                    self.at_store(from, &message);
                }
            }),
            4 => (0..=input.below(16)).for_each(|_| {
                if let Some(message) = self.to_plane.pop_front() {
                    self.at_plane(&message);
                }
            }),
            5 => drop((self.to_store.pop_front(), self.to_plane.pop_front())),
            6 => {
                if let Some((from, mut message)) = self.to_store.pop_front() {
                    input.damage(&mut message);
                    self.at_store(from, &message);
                }
            }
            7 => {
                if let Some(mut message) = self.to_plane.pop_front() {
                    input.damage(&mut message);
                    self.at_plane(&message);
                }
            }
            8 => {
                if let Some(mut message) = self.said.get(input.below(self.said.len())).cloned() {
                    input.damage(&mut message);
                    self.at_store(peer(input.byte()), &message);
                    self.at_plane(&message);
                }
            }
            9 => {
                let (kind, length) = (input.byte(), usize::from(input.byte()));
                let made_up = message(kind, input.take(length));
                self.at_store(peer(kind >> 4), &made_up);
                self.at_plane(&made_up);
            }
            10 => self.pass(1 << (input.byte() % 27)),
            11 | 12 => self.answer(input),
            13 => {
                let at = [self.accept.poll_timeout(), self.offer.poll_timeout()].into_iter().flatten().min();
                self.pass(at.map_or(0, |at| at.nanos().saturating_sub(self.now)));
            }
            14 => self.to_store.rotate_left(usize::from(!self.to_store.is_empty())),
            _ => self.to_plane.rotate_left(usize::from(!self.to_plane.is_empty())),
        }
    }

    fn begin(&mut self, input: &mut Input<'_>) {
        let bytes = vec![1; 1 + usize::from(input.u16()) % (MAX_CHUNK_BYTES as usize + 1000)];
        let (number, header_bytes) = (input.byte() & 3, 1 + u32::from(input.byte()));
        let deadline =
            Instant::from_nanos(self.now + (1 + u64::from(input.byte()) % PATIENCE_MS) * MILLISECOND);
        let (now, key) = (self.now(), Key([number; 32]));
        let begun = self.offer.start(now, deadline, StoreIndex(0), &key, header_bytes, bytes.len() as u64);
        if let Ok(id) = begun {
            self.shelf.0.insert(id.handle(), bytes);
        }
    }

    fn pass(&mut self, nanos: u64) {
        self.now += nanos;
        let now = self.now();
        self.accept.handle_timeout(now);
        self.offer.handle_timeout(now);
    }

    fn note(&mut self, message: &[u8]) {
        self.said.push_back(message.to_vec());
        if self.said.len() > 32 {
            self.said.pop_front();
        }
    }

    fn at_store(&mut self, from: Peer, payload: &[u8]) {
        self.note(payload);
        if !AcceptEngine::takes(payload) {
            return;
        }
        let now = self.now();
        // Of the keys, one is stored already.
        let taken = self.accept.handle_datagram(now, from, false, payload, |key| key.0[0] == 3);
        if let Ok(Taken::Segment { intake, offset, data }) = taken {
            let (granted, bytes) = self.granted[&intake.slot()];
            assert_eq!(granted, intake, "memory was granted");
            assert!(offset + data.len() as u64 <= u64::from(bytes) && data.end <= payload.len());
        }
        self.check();
    }

    fn at_plane(&mut self, payload: &[u8]) {
        self.note(payload);
        if OfferEngine::takes(payload) {
            let now = self.now();
            let _ = self.offer.handle_datagram(now, StoreIndex(0), peer(0), payload, &self.shelf);
        }
        self.check();
    }

    /// What the store's caller says, as the input wants.
    fn answer(&mut self, input: &mut Input<'_>) {
        if self.owed.is_empty() {
            return;
        }
        let (now, choice) = (self.now(), input.byte());
        match self.owed.swap_remove(input.below(self.owed.len())) {
            Owed::Memory { intake, bytes } => {
                let declined = [Declined::AlreadyStored, Declined::Busy, Declined::Full, Declined::TooLarge];
                let memory =
                    if choice & 3 == 3 { Err(declined[usize::from(choice >> 2 & 3)]) } else { Ok(()) };
                if self.accept.reserved(now, intake, memory) && memory.is_ok() {
                    let before = self.granted.insert(intake.slot(), (intake, bytes));
                    assert!(before.is_none(), "a slot is not used again before its memory is back");
                }
            }
            Owed::Verdict { intake } => {
                if choice & 4 != 0 {
                    let start = input.number() % (1 << 40);
                    self.accept.mark_corrupt(intake, start..start.saturating_add(input.number()));
                }
                let verdict = [
                    PutVerdict::Stored,
                    PutVerdict::AlreadyStored,
                    PutVerdict::Corrupt,
                    PutVerdict::BadChunk,
                ][usize::from(choice & 3)];
                if self.accept.verdict(now, intake, verdict) {
                    assert_eq!(verdict, PutVerdict::Corrupt, "only what is corrupt is pulled again");
                } else {
                    let (granted, _) = self.granted.remove(&intake.slot()).expect("memory was granted");
                    assert_eq!(granted, intake);
                }
            }
        }
        self.check();
    }

    /// Events and messages of both ends, until there are none.
    fn pump(&mut self) {
        let (now, mut out) = (self.now(), [0; MAX_CONTROL_BYTES]);
        while let Some(event) = self.accept.poll_event() {
            match event {
                AcceptEvent::Reserve { intake, bytes, .. } => {
                    assert!(bytes <= MAX_CHUNK_BYTES);
                    self.owed.push(Owed::Memory { intake, bytes });
                }
                AcceptEvent::Arrived { intake, bytes, header_bytes, .. } => {
                    assert_eq!(self.granted[&intake.slot()], (intake, bytes));
                    assert!((1..=bytes).contains(&header_bytes));
                    self.owed.push(Owed::Verdict { intake });
                }
                AcceptEvent::Dropped { intake } => {
                    let (granted, _) = self.granted.remove(&intake.slot()).expect("memory was granted");
                    assert_eq!(granted, intake);
                }
            }
        }
        let mut sent = 0;
        while let Some((_, length)) = self.accept.poll_transmit(now, &mut out) {
            sent += 1;
            assert!(sent < 10_000, "sending does not end");
            if self.to_plane.len() < MOST_MESSAGES && !self.cut_off {
                self.to_plane.push_back(out[..length].to_vec());
            }
        }
        while let Some(event) = self.offer.poll_event() {
            assert!(self.shelf.0.remove(&event.offer.handle()).is_some(), "each offer ends once");
        }
        while let Some(transmit) = self.offer.poll_transmit(now, &mut out) {
            sent += 1;
            assert!(sent < 10_000, "sending does not end");
            let mut message = out[..transmit.header_bytes].to_vec();
            if let Some((handle, range)) = transmit.payload {
                let Some(bytes) = self.shelf.0.get(&handle) else { continue };
                message.extend_from_slice(&bytes[range]);
            }
            let from = match transmit.to {
                OfferTo::Store(_) => peer(0),
                OfferTo::Peer(to) => to,
            };
            if self.to_store.len() < MOST_MESSAGES && !self.cut_off {
                self.to_store.push_back((from, message));
            }
        }
        self.check();
    }

    fn check(&self) {
        let counters = self.accept.counters();
        assert!(self.accept.in_flight_segments() <= self.config.window_segments);
        let dropped: u64 = counters.drops.iter().sum();
        assert_eq!(counters.datagrams, counters.offers + counters.segments + counters.errors + dropped);
        let ended = counters.stored + counters.declined + counters.refused + counters.dropped;
        let most = 2 * u64::from(self.config.max_intakes);
        assert!(ended <= counters.begun && counters.begun - ended <= most, "{counters:?}");
        assert!(self.granted.len() <= usize::from(self.config.max_intakes));
    }

    /// Nobody says anything any more, and the store's caller owes nothing: by the last deadline nothing is left.
    fn finish(&mut self) {
        self.cut_off = true;
        for _ in 0..10_000 {
            self.pump();
            while !self.owed.is_empty() {
                self.answer(&mut Input(&[3]));
            }
            self.pump();
            if self.accept.idle() && self.offer.idle() {
                break;
            }
            // What was pulled slowly is sent slowly.
            let at = [self.accept.poll_timeout(), self.offer.poll_timeout()].into_iter().flatten().min();
            self.pass(at.map_or(MILLISECOND, |at| at.nanos().saturating_sub(self.now).max(1)));
        }
        assert!(self.accept.idle() && self.granted.is_empty(), "memory is not given back");
        assert!(self.offer.idle() && self.shelf.0.is_empty(), "an offer does not end");
        let counters = self.accept.counters();
        assert_eq!(counters.begun, counters.stored + counters.declined + counters.refused + counters.dropped);
    }
}
