//! A data plane's saves on one queue: the real `OfferEngine`, the chunks under offer, and those that wait for a place.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;

use protocol::put::{OfferConfig, OfferEnd, OfferEngine, OfferId, OfferStartError, OfferTo};
use protocol::{ChunkInfo, ChunkSource, Instant, Key, Peer, StoreIndex};

use crate::content::Catalogue;
use crate::record::Records;

/// A chunk that is to be offered to a store.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The save.
    pub save: u64,
    /// The chunk's number.
    pub chunk: u32,
    /// The store, and the host that it is.
    pub store: StoreIndex,
    /// See above.
    pub host: u32,
    /// By the data plane's clock.
    pub deadline: u64,
}

/// Chunks under offer, by handle.
#[derive(Debug)]
struct Offered {
    catalogue: Rc<Catalogue>,
    under_way: BTreeMap<u32, (OfferId, Wanted)>,
}

impl ChunkSource for Offered {
    fn find(&self, _key: &Key) -> Option<ChunkInfo> {
        None
    }

    fn chunk_bytes(&self, handle: u32) -> Option<u64> {
        let chunk = self.under_way.get(&handle)?.1.chunk;
        Some(self.catalogue.chunks[chunk as usize].info.chunk_bytes)
    }
}

/// A message to send; what follows it is of a chunk.
#[derive(Debug)]
pub struct Sent {
    /// To whom.
    pub to: OfferTo,
    /// Bytes written.
    pub len: usize,
    /// The chunk and the range of it that follows.
    pub payload: Option<(u32, Range<usize>)>,
}

/// The saves of a queue.
#[derive(Debug)]
pub struct Saves {
    engine: OfferEngine,
    offered: Offered,
    waiting: VecDeque<Wanted>,
}

impl Saves {
    /// Nothing to save yet.
    pub fn new(config: OfferConfig, catalogue: Rc<Catalogue>) -> Saves {
        let offered = Offered { catalogue, under_way: BTreeMap::new() };
        Saves { engine: OfferEngine::new(config), offered, waiting: VecDeque::new() }
    }

    /// The engine.
    pub fn engine(&mut self) -> &mut OfferEngine {
        &mut self.engine
    }

    /// Whether nothing is to be saved.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.engine.idle()
    }

    /// Has a chunk offered as soon as there is a place.
    pub fn want(&mut self, wanted: Wanted) {
        self.waiting.push_back(wanted);
    }

    /// Takes in a message of a store.
    pub fn take_in(&mut self, now: Instant, store: StoreIndex, from: Peer, payload: &[u8]) {
        // What it drops it counts.
        let _ = self.engine.handle_datagram(now, store, from, payload, &self.offered);
    }

    /// Ends the offers of a save.
    pub fn cancel(&mut self, save: u64, now: u64, records: &mut Records) {
        self.waiting.retain(|wanted| {
            if wanted.save == save {
                records.offer_ended(save, now, None);
            }
            wanted.save != save
        });
        for (offer, _) in self.offered.under_way.values().filter(|(_, wanted)| wanted.save == save) {
            self.engine.cancel(*offer);
        }
    }

    /// Lets time pass: offers end and others begin. `clock` is the data plane's.
    pub fn turn(&mut self, clock: Instant, now: u64, was_damaged: bool, records: &mut Records) {
        self.engine.handle_timeout(clock);
        while let Some(event) = self.engine.poll_event() {
            let handle = event.offer.handle();
            let (_, wanted) = self.offered.under_way.remove(&handle).expect("an offer ends once");
            let is_stored = matches!(event.end, OfferEnd::Stored | OfferEnd::AlreadyStored);
            let has_it = records.held.contains(&(wanted.host, wanted.chunk));
            // A flipped bit that no checksum finds can make any answer this one.
            assert!(!is_stored || has_it || was_damaged, "{wanted:?} is said to be stored and never was");
            let bytes = self.offered.catalogue.chunks[wanted.chunk as usize].info.chunk_bytes;
            records.offer_ended(wanted.save, now, is_stored.then_some(bytes));
        }
        self.waiting.retain(|wanted| {
            let has_time = clock.nanos() < wanted.deadline;
            if !has_time {
                records.offer_ended(wanted.save, now, None);
            }
            has_time
        });
        while let Some(wanted) = self.waiting.front().copied() {
            let chunk = &self.offered.catalogue.chunks[wanted.chunk as usize];
            let deadline = Instant::from_nanos(wanted.deadline);
            let (header_bytes, bytes) = (chunk.info.header_bytes, chunk.info.chunk_bytes);
            match self.engine.start(clock, deadline, wanted.store, &chunk.key, header_bytes, bytes) {
                Ok(offer) => {
                    self.offered.under_way.insert(offer.handle(), (offer, wanted));
                }
                Err(OfferStartError::Full(_)) => break,
                Err(error) => panic!("{wanted:?} was refused: {error}"),
            }
            self.waiting.pop_front();
        }
        self.check(clock);
    }

    fn check(&self, clock: Instant) {
        for (_, wanted) in self.offered.under_way.values() {
            assert!(clock.nanos() < wanted.deadline, "{wanted:?} is past its deadline and has not ended");
        }
        let counters = self.engine.counters();
        let ended = counters.stored + counters.already_stored + counters.failed;
        assert_eq!(counters.begun, ended + self.offered.under_way.len() as u64, "each offer ends once");
    }

    /// Writes the next message.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<Sent> {
        loop {
            let sent = self.engine.poll_transmit(now, out)?;
            let payload = match sent.payload {
                None => None,
                // Ended since it was pulled.
                Some((handle, _)) if !self.offered.under_way.contains_key(&handle) => continue,
                Some((handle, range)) => Some((self.offered.under_way[&handle].1.chunk, range)),
            };
            return Some(Sent { to: sent.to, len: sent.header_bytes, payload });
        }
    }

    /// When there is something to do, if ever.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let places = self.waiting.iter().map(|wanted| Instant::from_nanos(wanted.deadline)).min();
        [self.engine.poll_timeout(), places].into_iter().flatten().min()
    }

    /// Panics if anything is left over.
    pub fn assert_quiet(&self) {
        assert!(self.is_idle() && self.offered.under_way.is_empty(), "offers left");
    }
}
