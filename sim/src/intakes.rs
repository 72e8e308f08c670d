//! Chunks on their way into a store: the real `AcceptEngine`, memory of bounded size, and somebody who takes his time to find it and to check
//! what arrived.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use protocol::put::{AcceptConfig, AcceptEngine, AcceptEvent, Declined, Intake, PutVerdict, Taken};
use protocol::{ChunkSource, Instant, Key, Peer};

use crate::content::{Shelf, number_of};
use crate::packet::{Packet, Source};
use crate::record::Records;

/// Limits of a store that takes chunks.
#[derive(Clone, Copy, Debug)]
pub struct PutConfig {
    /// The engine's limits; without intakes it takes none. The epoch is the store's own.
    pub accept: AcceptConfig,
    /// Bytes of chunks that were put and that are on their way.
    pub memory_bytes: u64,
    /// Time that finding memory, and checking, takes.
    pub think_nanos: u64,
    /// What was put is never evicted.
    pub is_pinned: bool,
}

impl Default for PutConfig {
    fn default() -> Self {
        let accept = AcceptConfig { max_intakes: 0, max_chunk_bytes: 1, ..AcceptConfig::default() };
        PutConfig { accept, memory_bytes: 0, think_nanos: 0, is_pinned: false }
    }
}

/// Memory for a chunk.
#[derive(Debug)]
struct Memory {
    intake: Intake,
    chunk: Option<u32>,
    bytes: u32,
    /// What arrived: where, how much, and whether it is what belongs there.
    segments: BTreeMap<u64, (u64, bool)>,
}

#[derive(Clone, Copy, Debug)]
enum Asked {
    Memory { intake: Intake, key: Key, bytes: u32 },
    Check { intake: Intake, header_bytes: u32 },
}

/// The intakes of a store.
#[derive(Debug)]
pub struct Intakes {
    host: u32,
    config: PutConfig,
    engine: AcceptEngine,
    granted: BTreeMap<usize, Memory>,
    /// Chunks that were put and are held, oldest first.
    stored: VecDeque<u32>,
    stored_bytes: u64,
    /// When the answer comes, and to what.
    asked: Vec<(u64, Asked)>,
}

impl Intakes {
    /// Nothing on its way.
    pub fn new(host: u32, config: PutConfig, epoch: u64) -> Intakes {
        let accept =
            AcceptConfig { epoch, seed: u32::try_from(epoch % 65_521).unwrap_or(0), ..config.accept };
        Intakes {
            host,
            config,
            engine: AcceptEngine::new(accept),
            granted: BTreeMap::new(),
            stored: VecDeque::new(),
            stored_bytes: 0,
            asked: Vec::new(),
        }
    }

    /// The store begins anew: what was put is gone.
    pub fn restart(&mut self, epoch: u64, shelf: &mut Shelf) {
        self.stored.drain(..).for_each(|chunk| shelf.forget(chunk));
        *self = Intakes::new(self.host, self.config, epoch);
    }

    /// A chunk was forgotten.
    pub fn forget(&mut self, chunk: u32, shelf: &Shelf) {
        let before = self.stored.len();
        self.stored.retain(|stored| *stored != chunk);
        if self.stored.len() < before {
            self.stored_bytes -= shelf.catalogue().chunks[chunk as usize].info.chunk_bytes;
        }
    }

    /// Takes in a datagram for which `AcceptEngine::takes` is true.
    pub fn take_in(
        &mut self,
        (now, from): (Instant, Peer),
        packet: &Packet,
        payload: &[u8],
        shelf: &Shelf,
        records: &mut Records,
    ) {
        let host = self.host;
        let stored = |key: &Key| {
            let found = number_of(key).filter(|_| shelf.find(key).is_some());
            records.held.extend(found.map(|chunk| (host, chunk)));
            found.is_some()
        };
        // What it drops it counts.
        let Ok(Taken::Segment { intake, offset, data }) =
            self.engine.handle_datagram(now, from, packet.marked, payload, stored)
        else {
            return;
        };
        let memory = self.granted.get_mut(&intake.slot()).expect("what is pulled has memory");
        assert_eq!(memory.intake, intake, "a slot is not used again before its memory is back");
        let length = data.len() as u64;
        let is_its = memory.chunk.is_some_and(|chunk| packet.source == Source { chunk, offset });
        let is_right = is_its && !shelf.catalogue().is_damaged(packet, &payload[data]);
        let before = memory.segments.insert(offset, (length, is_right));
        assert!(before.is_none(), "a segment is taken in once");
        records.took_in(host, length);
    }

    /// Lets time pass: answers that are due are given, and others wanted.
    pub fn turn(&mut self, now: u64, was_damaged: bool, shelf: &mut Shelf, records: &mut Records) {
        let due: Vec<(u64, Asked)> = self.asked.extract_if(.., |(at, _)| *at <= now).collect();
        for (_, asked) in due {
            match asked {
                Asked::Memory { intake, key, bytes } => self.answer(now, intake, &key, bytes, shelf, records),
                Asked::Check { intake, header_bytes } => {
                    self.judge((now, was_damaged), intake, header_bytes, shelf, records);
                }
            }
        }
        self.engine.handle_timeout(Instant::from_nanos(now));
        while let Some(event) = self.engine.poll_event() {
            let at = now + self.config.think_nanos;
            match event {
                AcceptEvent::Reserve { intake, key, bytes } => {
                    self.asked.push((at, Asked::Memory { intake, key, bytes }));
                }
                AcceptEvent::Arrived { intake, bytes, header_bytes, .. } => {
                    let tiled = self.granted[&intake.slot()]
                        .segments
                        .iter()
                        .try_fold(0, |end, (offset, (length, _))| (end == *offset).then(|| end + length));
                    assert_eq!(tiled, Some(u64::from(bytes)), "what has arrived is all of it, once");
                    self.asked.push((at, Asked::Check { intake, header_bytes }));
                }
                AcceptEvent::Dropped { intake } => {
                    let memory = self.granted.remove(&intake.slot()).expect("it was granted");
                    assert_eq!(memory.intake, intake, "memory goes back once");
                }
            }
        }
        self.check();
    }

    fn answer(
        &mut self,
        now: u64,
        intake: Intake,
        key: &Key,
        bytes: u32,
        shelf: &mut Shelf,
        records: &mut Records,
    ) {
        let chunk = number_of(key);
        let memory = if shelf.find(key).is_some() {
            records.held.extend(chunk.map(|chunk| (self.host, chunk)));
            Err(Declined::AlreadyStored)
        } else {
            self.find_memory(bytes.into(), shelf)
        };
        let is_wanted = self.engine.reserved(Instant::from_nanos(now), intake, memory);
        if memory.is_ok() && is_wanted {
            let memory = Memory { intake, chunk, bytes, segments: BTreeMap::new() };
            assert!(self.granted.insert(intake.slot(), memory).is_none(), "a slot has one memory");
        }
    }

    fn granted_bytes(&self) -> u64 {
        self.granted.values().map(|memory| u64::from(memory.bytes)).sum()
    }

    /// Whether there is memory for so many bytes, after eviction of the oldest that was put.
    fn find_memory(&mut self, bytes: u64, shelf: &mut Shelf) -> Result<(), Declined> {
        let limit = self.config.memory_bytes;
        if bytes > limit {
            return Err(Declined::TooLarge);
        }
        while self.granted_bytes() + self.stored_bytes + bytes > limit {
            if self.config.is_pinned && self.stored_bytes + bytes > limit {
                return Err(Declined::Full);
            }
            let oldest = if self.config.is_pinned { None } else { self.stored.front().copied() };
            let Some(oldest) = oldest else { return Err(Declined::Busy) };
            shelf.forget(oldest);
            self.forget(oldest, shelf);
        }
        Ok(())
    }

    /// Checks a chunk as a store does: header and planes; what lies between these is nobody's.
    fn judge(
        &mut self,
        (now, was_damaged): (u64, bool),
        intake: Intake,
        header_bytes: u32,
        shelf: &mut Shelf,
        records: &mut Records,
    ) {
        let memory = self.granted.get_mut(&intake.slot()).expect("what is checked has memory");
        let catalogue = std::rc::Rc::clone(shelf.catalogue());
        let right =
            memory.chunk.map(|number| (number, &catalogue.chunks[number as usize])).filter(|(_, chunk)| {
                (u64::from(memory.bytes), header_bytes) == (chunk.info.chunk_bytes, chunk.info.header_bytes)
            });
        let verdict = match right {
            None => PutVerdict::BadChunk,
            Some((number, chunk)) => {
                let planes =
                    chunk.planes.iter().map(|plane| plane.offset..plane.offset + u64::from(plane.bytes));
                let mut verdict = PutVerdict::Stored;
                for part in std::iter::once(0..u64::from(header_bytes)).chain(planes) {
                    if memory.take_wrong(&part) {
                        self.engine.mark_corrupt(intake, part);
                        verdict = PutVerdict::Corrupt;
                    }
                }
                let is_held = verdict == PutVerdict::Stored && shelf.find(&chunk.key).is_some();
                records.held.extend((verdict == PutVerdict::Stored).then_some((self.host, number)));
                if is_held { PutVerdict::AlreadyStored } else { verdict }
            }
        };
        let is_fine = matches!(verdict, PutVerdict::Stored | PutVerdict::AlreadyStored);
        assert!(is_fine || was_damaged, "{verdict:?} of what nothing has damaged");
        if self.engine.verdict(Instant::from_nanos(now), intake, verdict) {
            return;
        }
        let memory = self.granted.remove(&intake.slot()).expect("it was granted");
        if let (PutVerdict::Stored, Some(number)) = (verdict, memory.chunk) {
            shelf.put(number);
            self.stored.push_back(number);
            self.stored_bytes += u64::from(memory.bytes);
        }
    }

    /// What must hold after every turn.
    fn check(&self) {
        assert!(
            self.granted_bytes() + self.stored_bytes <= self.config.memory_bytes,
            "store {}: memory within its budget",
            self.host
        );
        let (engine, counters) = (&self.engine, self.engine.counters());
        assert!(
            engine.in_flight_segments() <= self.config.accept.window_segments,
            "in flight within the window"
        );
        let drops: u64 = counters.drops.iter().sum();
        let taken = counters.offers + counters.segments + counters.errors;
        assert_eq!(counters.datagrams, taken + drops, "store {}: its counters add up", self.host);
        let ended = counters.stored + counters.declined + counters.refused + counters.dropped;
        let under_way = counters.begun - ended;
        assert!(under_way <= 2 * u64::from(self.config.accept.max_intakes), "intakes end once");
    }

    /// Writes the next message.
    pub fn poll_transmit(&mut self, now: u64, out: &mut [u8]) -> Option<(Peer, usize)> {
        self.engine.poll_transmit(Instant::from_nanos(now), out)
    }

    /// When there is something to do, if ever.
    pub fn poll_timeout(&self) -> Option<u64> {
        let asked = self.asked.iter().map(|(at, _)| *at);
        asked.chain(self.engine.poll_timeout().map(Instant::nanos)).min()
    }

    /// Panics if anything is left over.
    pub fn assert_quiet(&self) {
        assert!(self.engine.idle() && self.granted.is_empty() && self.asked.is_empty(), "intakes left");
        assert_eq!(self.engine.in_flight_segments(), 0, "segments left in flight");
    }

    /// Names and values to show after a run.
    pub fn counters(&self) -> [(String, u64); 6] {
        let counters = self.engine.counters();
        [
            ("put_stored".into(), counters.stored),
            ("put_pulls".into(), counters.pulls),
            ("put_asked_again".into(), counters.segments_asked_again),
            ("put_late".into(), counters.segments_late),
            ("put_probes".into(), counters.tail_probes),
            ("put_timeouts".into(), counters.timeouts),
        ]
    }
}

impl Memory {
    /// Whether something within `part` is wrong; then all that holds any of it is to be pulled again.
    fn take_wrong(&mut self, part: &Range<u64>) -> bool {
        let touches = |offset: &u64, length: u64| *offset < part.end && offset + length > part.start;
        let is_wrong =
            self.segments.iter().any(|(offset, (length, is_right))| touches(offset, *length) && !is_right);
        if is_wrong {
            self.segments.retain(|offset, (length, _)| !touches(offset, *length));
        }
        is_wrong
    }
}
