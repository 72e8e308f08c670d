//! The data plane's engine: offers encoded chunks to stores and sends what they pull.
//!
//! Sending is [`ServeEngine`]'s work, as in a store; this adds the offers themselves, their repetition and their deadlines.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use crate::fetch::StoreIndex;
use crate::frame::Peer;
use crate::key::Key;
use crate::pull::{Rtt, tag};
use crate::reason::DropReason;
use crate::serve::{ChunkSource, ServeConfig, ServeCounters, ServeEngine};
use crate::time::{Instant, nanos_of};
use crate::wire::message::{Message, MessageType, SEGMENT_ALIGN};
use crate::wire::offer::{self, Offer, OfferReply, OfferStatus};

/// PULLs that begin with the same segment, while none begins further than any before, after which segments are thought to stay away.
const SUSPECT_PULLS: u8 = 4;
/// While a store pulls, this many timeouts pass without a word from it before the offer is repeated.
const QUIET_TIMEOUTS: u64 = 2;

/// Budgets of one queue of a data plane. Everything is allocated from them in [`OfferEngine::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfferConfig {
    /// Chunks offered at once.
    pub max_offers: u16,
    /// Stores that may be offered some: [`StoreIndex`] is below it.
    pub stores: u16,
    /// Largest segments that every path carries, a positive multiple of 32; larger ones by [`OfferEngine::set_segment_bytes`], up to
    /// `serve.max_segment_bytes`.
    pub segment_bytes: u16,
    /// Least time after which an offer without an answer is repeated.
    pub rto_min: Duration,
    /// Most of the same, after doubling.
    pub rto_max: Duration,
    /// Limits on what stores may have pulled and not been sent; its `epoch` is the data plane's.
    pub serve: ServeConfig,
    /// Differs from run to run, as the epoch.
    pub seed: u32,
}

/// A chunk under offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OfferId(u32);

impl OfferId {
    /// Below `OfferConfig::max_offers`, and different for all under way: the caller's array index.
    #[inline]
    pub fn slot(self) -> usize {
        usize::from(tag::slot_of(self.0))
    }

    /// What stores call it: the handle given to [`ChunkSource::chunk_bytes`].
    #[inline]
    pub fn handle(self) -> u32 {
        self.0
    }
}

/// Why an offer was not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferStartError {
    /// As many are under way as the configuration allows.
    #[error("all {0} places for offers are taken; wait for one to end")]
    Full(u16),
    /// No such store.
    #[error("store {0} does not exist; it must be below the configured number of stores")]
    UnknownStore(u16),
    /// The deadline has passed already.
    #[error("the deadline has passed already")]
    DeadlinePassed,
}

/// Why a chunk is not known to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OfferFailure {
    /// The deadline came first, and no store had answered.
    Silent,
    /// The store cannot be reached, an ICMP error said.
    Unreachable,
    /// The deadline came first, while the store was busy.
    Busy,
    /// The deadline came first, while the store was pulling: it may have it.
    Deadline,
    /// The store refused it.
    Refused(OfferStatus),
    /// By [`OfferEngine::cancel`].
    Cancelled,
}

/// How an offer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OfferEnd {
    /// The store has it, whole and checked.
    Stored,
    /// The store had it before, or so it seems: the answer to the first offer may have been lost.
    AlreadyStored,
    /// It is not known to be stored.
    Failed(OfferFailure),
}

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfferEvent {
    /// Which offer ended. From here on nothing of the chunk is sent.
    pub offer: OfferId,
    /// How.
    pub end: OfferEnd,
}

/// Whom a message goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfferTo {
    /// An offer goes to where the store is known to be.
    Store(StoreIndex),
    /// What was pulled goes to where the PULL came from.
    Peer(Peer),
}

/// A message to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferTransmit {
    /// To whom.
    pub to: OfferTo,
    /// Bytes written to `out`.
    pub header_bytes: usize,
    /// The chunk's handle and the bytes of it that follow. If the chunk is gone by then, the caller sends nothing.
    pub payload: Option<(u32, Range<usize>)>,
}

/// What this engine has done. `datagrams` are the sum of `replies`, the PULLs that `serve` counts, and all drops of both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OfferCounters {
    /// Chunks that were begun to be offered; the sum of those that ended and those under way.
    pub begun: u64,
    /// OFFERs sent.
    pub offers_sent: u64,
    /// OFFER_REPLYs accepted.
    pub replies: u64,
    /// Ended as stored.
    pub stored: u64,
    /// Ended as stored before.
    pub already_stored: u64,
    /// Ended otherwise.
    pub failed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// No store has answered.
    Offering,
    /// The store pulls or checks it.
    UnderWay,
    /// The store wants to be asked later.
    Busy,
    /// Its end waits to be reported.
    Ended(OfferEnd),
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    id: u32,
    store: StoreIndex,
    key: Key,
    header_bytes: u32,
    chunk_bytes: u64,
    deadline: Instant,
    /// When the offer is to be sent, and when it was sent last; how often since the store was heard.
    due_at: Instant,
    sent_at: Instant,
    backoff: u8,
    sent: u32,
    /// By which tag it is pulled, and the furthest segment with which a PULL began; of the PULLs since then, the nearest with which one
    /// began, and how many did.
    pulled_by: u32,
    pulled_to: Option<u32>,
    pulled_back_to: u32,
    pulled_again: u8,
}

/// The data plane's side of PUT, for one queue; queues share nothing.
///
/// # Call order
///
/// [`start`](Self::start) and [`cancel`](Self::cancel) as asked; [`handle_datagram`](Self::handle_datagram) for received payloads
/// that [`takes`](Self::takes) says are its own; [`handle_timeout`](Self::handle_timeout) once
/// [`poll_timeout`](Self::poll_timeout) is reached; [`poll_event`](Self::poll_event) and
/// [`poll_transmit`](Self::poll_transmit) until `None`.
///
/// Every offer that was begun ends with exactly one event, by its deadline at the latest. The caller keeps the chunk's bytes
/// as they are until then, and gives them by handle; afterwards its [`ChunkSource`] must not.
#[derive(Debug)]
pub struct OfferEngine {
    config: OfferConfig,
    slots: Box<[Slot]>,
    /// By store, the largest segments that the path carries.
    segment_bytes: Box<[u16]>,
    /// A store to which large segments seem not to come through.
    suspect: Option<StoreIndex>,
    rtt: Rtt,
    events: VecDeque<OfferEvent>,
    serve: ServeEngine,
    counters: OfferCounters,
    next_timeout: Instant,
}

impl OfferEngine {
    /// An engine with nothing under way. All memory is allocated here.
    pub fn new(config: OfferConfig) -> OfferEngine {
        let slot = |slot| Slot {
            state: State::Free,
            id: tag::first(slot, config.seed),
            store: StoreIndex(0),
            key: Key([0; 32]),
            header_bytes: 0,
            chunk_bytes: 0,
            deadline: Instant::FAR,
            due_at: Instant::FAR,
            sent_at: Instant::ZERO,
            backoff: 0,
            sent: 0,
            pulled_by: 0,
            pulled_to: None,
            pulled_back_to: 0,
            pulled_again: 0,
        };
        OfferEngine {
            slots: (0..config.max_offers).map(slot).collect(),
            segment_bytes: vec![config.segment_bytes; usize::from(config.stores)].into(),
            suspect: None,
            rtt: Rtt::new(nanos_of(config.rto_min), nanos_of(config.rto_max)),
            events: VecDeque::with_capacity(usize::from(config.max_offers)),
            serve: ServeEngine::new(config.serve),
            counters: OfferCounters::default(),
            next_timeout: Instant::FAR,
            config,
        }
    }

    /// Whether a payload is this engine's to take, of those that a data plane receives.
    #[inline]
    pub fn takes(payload: &[u8]) -> bool {
        const PULL: u8 = MessageType::Pull as u8;
        matches!(offer::message_type(payload), Some(PULL | offer::OFFER_REPLY))
    }

    /// Begins to offer a chunk to a store, until `deadline`.
    ///
    /// # Errors
    /// When there is no place for it, the store does not exist, or the deadline has passed.
    pub fn start(
        &mut self,
        now: Instant,
        deadline: Instant,
        store: StoreIndex,
        key: &Key,
        header_bytes: u32,
        chunk_bytes: u64,
    ) -> Result<OfferId, OfferStartError> {
        if deadline <= now {
            return Err(OfferStartError::DeadlinePassed);
        }
        if store.0 >= self.config.stores {
            return Err(OfferStartError::UnknownStore(store.0));
        }
        let free = self.slots.iter_mut().find(|slot| slot.state == State::Free);
        let slot = free.ok_or(OfferStartError::Full(self.config.max_offers))?;
        *slot = Slot {
            state: State::Offering,
            id: tag::next(slot.id),
            store,
            key: *key,
            header_bytes,
            chunk_bytes,
            deadline,
            due_at: now,
            sent_at: Instant::ZERO,
            backoff: 0,
            sent: 0,
            pulled_by: 0,
            pulled_to: None,
            pulled_back_to: 0,
            pulled_again: 0,
        };
        let id = OfferId(slot.id);
        self.counters.begun += 1;
        self.arm(now);
        Ok(id)
    }

    /// Ends an offer early; nothing if it has ended.
    pub fn cancel(&mut self, offer: OfferId) {
        if let Some(slot) = self.find(offer.0) {
            self.end(slot, OfferEnd::Failed(OfferFailure::Cancelled));
        }
    }

    /// Ends an offer now as its deadline would; nothing if it has ended.
    pub fn give_up(&mut self, offer: OfferId) {
        if let Some(slot) = self.find(offer.0)
            && let Some(failure) = self.slots[slot].late()
        {
            self.end(slot, OfferEnd::Failed(failure));
        }
    }

    /// How often a chunk was offered since its store was heard of it; 0 if it has ended.
    pub fn unanswered(&self, offer: OfferId) -> u8 {
        self.find(offer.0).map_or(0, |slot| self.slots[slot].backoff)
    }

    /// Has `store` pull segments of up to `bytes` from now on, rounded down to a multiple of 32 and never less than the configuration's. What
    /// it pulls in larger ones is offered to it anew.
    pub fn set_segment_bytes(&mut self, store: StoreIndex, bytes: u16) {
        let bytes = (bytes / SEGMENT_ALIGN * SEGMENT_ALIGN).max(self.config.segment_bytes);
        let Some(size) = self.segment_bytes.get_mut(usize::from(store.0)) else { return };
        let before = std::mem::replace(size, bytes);
        if bytes < before {
            for slot in self.slots.iter_mut().filter(|slot| slot.is_open() && slot.store == store) {
                slot.due_at = Instant::ZERO;
            }
        }
    }

    /// A store that pulls the same again and again: perhaps the path carries no segments of that size. Reported once each time.
    pub fn poll_suspect(&mut self) -> Option<StoreIndex> {
        self.suspect.take()
    }

    /// Notes that a store pulls, by `tag`, from `segment` on.
    fn note_pull(&mut self, slot: usize, tag: u32, segment: u32) {
        let slot = &mut self.slots[slot];
        if slot.pulled_by != tag {
            (slot.pulled_by, slot.pulled_to, slot.pulled_again) = (tag, None, 0);
        }
        if slot.pulled_to.is_none_or(|furthest| segment > furthest) {
            (slot.pulled_to, slot.pulled_again) = (Some(segment), 0);
            return;
        }
        // Single losses are asked for again too, but seldom the same one so often.
        if slot.pulled_again == 0 || segment < slot.pulled_back_to {
            (slot.pulled_back_to, slot.pulled_again) = (segment, 1);
        } else if segment == slot.pulled_back_to {
            slot.pulled_again += 1;
        }
        if slot.pulled_again >= SUSPECT_PULLS {
            slot.pulled_again = 0;
            self.suspect = Some(slot.store);
        }
    }

    /// Takes in a UDP payload that came from `from`, which is `store`. An error is counted already.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        store: StoreIndex,
        from: Peer,
        payload: &[u8],
        source: &impl ChunkSource,
    ) -> Result<(), DropReason> {
        if offer::message_type(payload) == Some(offer::OFFER_REPLY) {
            let reply = offer::read_offer_reply(payload)?;
            return self.handle_reply(now, store, &reply);
        }
        let Ok(Message::Pull(pull)) = Message::new_checked(payload) else {
            return Err(DropReason::BadType);
        };
        if pull.range.epoch == self.config.serve.epoch
            && let Some(slot) = self.find(pull.range.handle)
        {
            if self.slots[slot].store != store {
                return Err(DropReason::WrongStore);
            }
            self.heard(now, slot, State::UnderWay);
            let segment = pull.runs().next().map_or(0, |run| run.first);
            self.note_pull(slot, pull.range.tag, segment);
        }
        // The source holds nothing but what is offered, so what has ended is answered with an ERROR.
        self.serve.handle_datagram(now, from, payload, source)
    }

    fn handle_reply(
        &mut self,
        now: Instant,
        store: StoreIndex,
        reply: &OfferReply,
    ) -> Result<(), DropReason> {
        let slot = self.find(reply.offer).ok_or(DropReason::Stale)?;
        if reply.epoch != self.config.serve.epoch {
            return Err(DropReason::StaleEpoch);
        }
        if self.slots[slot].store != store {
            return Err(DropReason::WrongStore);
        }
        self.counters.replies += 1;
        match reply.status {
            OfferStatus::UnderWay => self.heard(now, slot, State::UnderWay),
            OfferStatus::Stored => self.end(slot, OfferEnd::Stored),
            OfferStatus::AlreadyStored => self.end(slot, OfferEnd::AlreadyStored),
            OfferStatus::Busy => {
                self.heard(now, slot, State::Busy);
                let retry = Duration::from_millis(u64::from(reply.retry_ms)).max(self.config.rto_min);
                let due_at = now + retry;
                self.slots[slot].due_at = due_at;
                self.arm(due_at);
            }
            status => self.end(slot, OfferEnd::Failed(OfferFailure::Refused(status))),
        }
        Ok(())
    }

    /// Takes in that `store` cannot be reached, as an ICMP error says which quotes `quote` of a datagram's payload: if that is
    /// an offer of ours under way, it ends. Returns whether it is.
    pub fn handle_unreachable(&mut self, store: StoreIndex, quote: &[u8]) -> bool {
        let Some((id, epoch)) = offer::quoted(quote) else { return false };
        let Some(slot) = self.find(id) else { return false };
        if epoch != self.config.serve.epoch || self.slots[slot].store != store {
            return false;
        }
        self.end(slot, OfferEnd::Failed(OfferFailure::Unreachable));
        true
    }

    /// The store works on it: the offer is repeated only once it falls silent.
    fn heard(&mut self, now: Instant, slot: usize, state: State) {
        let timeout = self.rtt.rto(0);
        let slot = &mut self.slots[slot];
        if slot.sent == 1 && slot.state == State::Offering {
            self.rtt.sample(now.nanos(), now.nanos().saturating_sub(slot.sent_at.nanos()), 0);
        }
        slot.state = state;
        slot.backoff = 0;
        slot.due_at = now.plus_nanos(timeout.saturating_mul(QUIET_TIMEOUTS));
        let due_at = slot.due_at;
        self.arm(due_at);
    }

    fn end(&mut self, slot: usize, end: OfferEnd) {
        let slot = &mut self.slots[slot];
        slot.state = State::Ended(end);
        match end {
            OfferEnd::Stored => self.counters.stored += 1,
            OfferEnd::AlreadyStored => self.counters.already_stored += 1,
            OfferEnd::Failed(_) => self.counters.failed += 1,
        }
        self.events.push_back(OfferEvent { offer: OfferId(slot.id), end });
    }

    /// The next end of an offer.
    pub fn poll_event(&mut self) -> Option<OfferEvent> {
        let event = self.events.pop_front()?;
        self.slots[event.offer.slot()].state = State::Free;
        Some(event)
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) and [`poll_transmit`](Self::poll_transmit) at the latest. It
    /// is not after `now` for as long as something can be sent.
    #[inline]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let own = (self.next_timeout != Instant::FAR).then_some(self.next_timeout);
        own.into_iter().chain(self.serve.poll_timeout()).min()
    }

    /// Ends offers whose deadline has come. Does nothing before [`poll_timeout`](Self::poll_timeout).
    pub fn handle_timeout(&mut self, now: Instant) {
        if now < self.next_timeout {
            return;
        }
        for slot in 0..self.slots.len() {
            if let Some(failure) = self.slots[slot].late()
                && self.slots[slot].deadline <= now
            {
                self.end(slot, OfferEnd::Failed(failure));
            }
        }
        self.rearm(now);
    }

    /// Works out the next timeout: that of the first deadline, or of the first offer that is due after `now`.
    fn rearm(&mut self, now: Instant) {
        let open = self.slots.iter().filter(|slot| slot.is_open());
        let times =
            open.map(|slot| if slot.due_at > now { slot.due_at.min(slot.deadline) } else { slot.deadline });
        self.next_timeout = times.min().unwrap_or(Instant::FAR);
    }

    /// Writes the next message, or the header of the next DATA message, to `out`, which must hold
    /// [`crate::wire::message::MAX_CONTROL_BYTES`].
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<OfferTransmit> {
        self.next_offer(now, out).or_else(|| {
            let sent = self.serve.poll_transmit(now, out)?;
            let to = OfferTo::Peer(sent.to);
            Some(OfferTransmit { to, header_bytes: sent.header_bytes, payload: sent.payload })
        })
    }

    fn next_offer(&mut self, now: Instant, out: &mut [u8]) -> Option<OfferTransmit> {
        let index = self.slots.iter().position(|slot| slot.is_open() && slot.due_at <= now)?;
        let slot = &mut self.slots[index];
        let left = slot.deadline.since(now).as_millis();
        let offer = Offer {
            offer: slot.id,
            header_bytes: slot.header_bytes,
            epoch: self.config.serve.epoch,
            chunk_bytes: slot.chunk_bytes,
            key: slot.key,
            patience_ms: u32::try_from(left).unwrap_or(u32::MAX),
            segment_bytes: self.segment_bytes[usize::from(slot.store.0)],
        };
        slot.sent_at = now;
        slot.sent = slot.sent.saturating_add(1);
        slot.due_at = now.plus_nanos(self.rtt.rto(slot.backoff));
        slot.backoff = slot.backoff.saturating_add(1);
        let (store, due_at) = (slot.store, slot.due_at);
        self.arm(due_at);
        self.counters.offers_sent += 1;
        let header_bytes = offer::emit_offer(out, &offer)?;
        Some(OfferTransmit { to: OfferTo::Store(store), header_bytes, payload: None })
    }

    /// Whether nothing is under way and nothing waits to be sent.
    pub fn idle(&self) -> bool {
        self.offers() == 0 && self.serve.idle()
    }

    /// Offers that have not ended, or whose end was not polled.
    pub fn offers(&self) -> usize {
        self.slots.iter().filter(|slot| slot.state != State::Free).count()
    }

    /// What this engine has done.
    pub fn counters(&self) -> &OfferCounters {
        &self.counters
    }

    /// What was sent for stores' PULLs.
    pub fn serve_counters(&self) -> &ServeCounters {
        self.serve.counters()
    }

    /// The slot of an offer that has not ended.
    fn find(&self, id: u32) -> Option<usize> {
        let slot = usize::from(tag::slot_of(id));
        self.slots.get(slot).filter(|found| found.id == id && found.is_open()).map(|_| slot)
    }

    fn arm(&mut self, at: Instant) {
        self.next_timeout = self.next_timeout.min(at);
    }
}

impl Slot {
    /// Why its time was not enough, if it has not ended.
    fn late(&self) -> Option<OfferFailure> {
        Some(match self.state {
            State::Free | State::Ended(_) => return None,
            State::Offering => OfferFailure::Silent,
            State::UnderWay => OfferFailure::Deadline,
            State::Busy => OfferFailure::Busy,
        })
    }

    fn is_open(&self) -> bool {
        matches!(self.state, State::Offering | State::UnderWay | State::Busy)
    }
}
