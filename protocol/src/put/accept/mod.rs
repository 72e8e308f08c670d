//! The store's engine: takes offers, has the caller find memory, pulls the chunk, has the caller check it.
//!
//! What may be asked for, and what is lost, is the affair of `crate::pull`, as in a fetch: each chunk on its way in is a span of the
//! puller, each port of a data plane that offers some a path. The bytes stay with the caller. All tables are of fixed size; an
//! offer that finds none free is answered *busy*.
mod config;
mod event;
mod intake;
mod pulls;

pub use config::{AcceptConfig, AcceptCounters};
pub use event::{AcceptEvent, Declined, Intake, PutVerdict, Taken};

use std::collections::VecDeque;
use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use crate::frame::Peer;
use crate::key::Key;
use crate::pull::{Arrival, Budgets, Index, PathIndex, Puller, SpanIndex, tag};
use crate::reason::DropReason;
use crate::time::Instant;
use crate::wire::message::{self, DATA_HEADER_BYTES, Data, ErrorCode, Message, Refusal, SEGMENT_ALIGN};
use crate::wire::offer::{self, Offer, OfferReply, OfferStatus};

use intake::{IntakeSlot, IntakeState};

/// The store's side of PUT, for one queue; queues share nothing.
///
/// # Call order
///
/// [`handle_datagram`](Self::handle_datagram) for each received payload, copying accepted segments; [`reserved`](Self::reserved)
/// and [`verdict`](Self::verdict) for what was answered; [`handle_timeout`](Self::handle_timeout) once
/// [`poll_timeout`](Self::poll_timeout) is reached; [`poll_event`](Self::poll_event) until `None`;
/// [`poll_transmit`](Self::poll_transmit) until `None` or the transmit queue is full.
///
/// # What is promised
///
/// Memory granted to an intake by `reserved` goes back to the caller exactly once: by a verdict that `verdict` answers with
/// false, or by [`AcceptEvent::Dropped`]. An intake's slot is not used again before.
#[derive(Debug)]
pub struct AcceptEngine {
    config: AcceptConfig,
    intakes: Box<[IntakeSlot]>,
    /// A span for each intake, a path for each of the ports below.
    puller: Puller,
    /// Ports of data planes, the latest known: those with intakes, and others.
    ports: Box<[Option<(IpAddr, u16)>]>,
    /// The next port to be forgotten, if it has none.
    oldest_port: usize,
    /// Rings of fixed capacity that never grow: events by slot, answers to be sent.
    events: VecDeque<AcceptEvent>,
    replies: VecDeque<(Peer, OfferReply)>,
    /// Whose turn it is to be pulled.
    turn: usize,
    counters: AcceptCounters,
}

impl AcceptEngine {
    /// An engine with nothing under way. All memory is allocated here: 18 bits per segment of `max_chunk_bytes` in
    /// segments of 256 bytes and more, per intake, and 60 bytes for each of up to 8,192 PULLs.
    ///
    /// # Panics
    /// When a size is zero, or `segment_bytes` is no multiple of 32.
    pub fn new(config: AcceptConfig) -> AcceptEngine {
        assert!(config.max_chunk_bytes > 0 && config.window_segments > 0, "budgets are not zero");
        assert!(
            config.segment_bytes > 0 && config.segment_bytes.is_multiple_of(SEGMENT_ALIGN),
            "segments are a positive multiple of 32 bytes"
        );
        let intakes = usize::from(config.max_intakes);
        let smallest = least_segment_bytes(config.segment_bytes);
        let span_segments = message::segments(config.max_chunk_bytes, smallest);
        let budgets = Budgets {
            paths: intakes,
            spans: intakes,
            span_segments,
            segment_bytes: config.segment_bytes,
            window_segments: config.window_segments,
            memory_segments: span_segments.saturating_mul(config.max_intakes.into()),
            link_mbps: config.link_mbps,
            queue_tolerance: config.queue_tolerance,
            rto_min: config.rto_min,
            rto_max: config.rto_max,
            seed: config.seed,
        };
        AcceptEngine {
            intakes: (0..config.max_intakes)
                .map(|slot| IntakeSlot::free(tag::first(slot, config.seed)))
                .collect(),
            puller: Puller::new(&budgets),
            ports: vec![None; intakes].into(),
            oldest_port: 0,
            events: VecDeque::with_capacity(2 * intakes),
            replies: VecDeque::with_capacity(2 * intakes + 64),
            turn: 0,
            counters: AcceptCounters::new(),
            config,
        }
    }

    /// Whether a payload is this engine's to take, of those that a store receives.
    #[inline]
    pub fn takes(payload: &[u8]) -> bool {
        const DATA: u8 = message::MessageType::Data as u8;
        const ERROR: u8 = message::MessageType::Error as u8;
        matches!(offer::message_type(payload), Some(DATA | ERROR | offer::OFFER))
    }

    /// Takes in a UDP payload that came from `from`; `marked` says that the IP header's ECN field reads "congestion experienced",
    /// `stored` whether a chunk is stored. An error is counted already.
    #[inline]
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        from: Peer,
        marked: bool,
        payload: &[u8],
        stored: impl FnOnce(&Key) -> bool,
    ) -> Result<Taken, DropReason> {
        self.counters.datagrams += 1;
        self.counters.marked += u64::from(marked);
        let result = match message::data(payload) {
            Some(data) => self.handle_data(now, &from, marked, &data),
            None => self.handle_control(now, from, payload, stored).map(|()| Taken::Control),
        };
        if let Err(reason) = result {
            self.counters.drops[reason.index()] += 1;
        }
        result
    }

    #[inline]
    fn handle_data(
        &mut self,
        now: Instant,
        from: &Peer,
        marked: bool,
        data: &Data<'_>,
    ) -> Result<Taken, DropReason> {
        let span = SpanIndex(tag::slot_of(data.tag));
        let intake = self.intakes.get_mut(span.at()).ok_or(DropReason::Stale)?;
        intake.check(from, data)?;
        let arrival = Arrival {
            segment: data.segment,
            bytes: data.payload.len(),
            sequence: data.sequence,
            waited_ns: data.waited_ns,
            is_marked: marked,
        };
        let taken = self.puller.take_in(now, span, &arrival)?;
        intake.heard_at = now;
        self.counters.segments += 1;
        self.counters.segment_bytes += data.payload.len() as u64;
        self.counters.segments_late += u64::from(taken.is_late);
        let name = Intake(intake.tag);
        let offset = u64::from(data.segment) * u64::from(intake.segment_bytes);
        if taken.is_whole {
            intake.state = IntakeState::Judged;
            let IntakeSlot { key, bytes, header_bytes, .. } = *intake;
            self.push_event(AcceptEvent::Arrived { intake: name, key, bytes, header_bytes });
        }
        Ok(Taken::Segment {
            intake: name,
            offset,
            data: DATA_HEADER_BYTES..DATA_HEADER_BYTES + data.payload.len(),
        })
    }

    #[cold]
    fn handle_control(
        &mut self,
        now: Instant,
        from: Peer,
        payload: &[u8],
        stored: impl FnOnce(&Key) -> bool,
    ) -> Result<(), DropReason> {
        if offer::message_type(payload) == Some(offer::OFFER) {
            let offer = offer::read_offer(payload)?;
            self.counters.offers += 1;
            self.handle_offer(now, from, &offer, stored);
            return Ok(());
        }
        match Message::new_checked(payload)? {
            Message::Error(refusal) => self.handle_error(now, &from, &refusal),
            _ => Err(DropReason::BadType),
        }
    }

    fn handle_offer(&mut self, now: Instant, from: Peer, offer: &Offer, stored: impl FnOnce(&Key) -> bool) {
        let patience_until = now + Duration::from_millis(u64::from(offer.patience_ms));
        if let Some(slot) = self.intakes.iter().position(|slot| slot.in_use() && slot.key == offer.key) {
            let known = &mut self.intakes[slot];
            if known.is(&from, offer) {
                known.from = from;
                known.patience_until = patience_until;
                self.puller.arm(patience_until);
                if offer.segment_bytes >= known.segment_bytes || known.state != IntakeState::Pulling {
                    return self.reply(from, offer, OfferStatus::UnderWay);
                }
                // The path no longer carries what was asked for: from the beginning, in smaller segments.
                self.drop_intake(slot);
                return self.reply(from, offer, OfferStatus::Busy);
            }
            if known.is_from(&from) && known.state == IntakeState::Pulling {
                // The same port offers it anew: nobody answers for the earlier offer any more.
                self.drop_intake(slot);
            }
            return self.reply(from, offer, OfferStatus::Busy);
        }
        if stored(&offer.key) {
            self.counters.already_stored += 1;
            return self.reply(from, offer, OfferStatus::AlreadyStored);
        }
        match self.begin(now, from, offer, patience_until) {
            Ok(()) => {}
            Err(status) => self.reply(from, offer, status),
        }
    }

    /// Begins an intake, or says why not.
    fn begin(
        &mut self,
        now: Instant,
        from: Peer,
        offer: &Offer,
        patience_until: Instant,
    ) -> Result<(), OfferStatus> {
        if self.config.max_intakes == 0 {
            return Err(OfferStatus::Closed);
        }
        let bytes =
            u32::try_from(offer.chunk_bytes).ok().filter(|bytes| *bytes <= self.config.max_chunk_bytes);
        let bytes = bytes.ok_or(OfferStatus::TooLarge)?;
        let segment_bytes = offer.segment_bytes.min(self.config.segment_bytes);
        if offer.header_bytes == 0 || offer.header_bytes > bytes || segment_bytes < self.least_segment_bytes()
        {
            return Err(OfferStatus::BadChunk);
        }
        let free = self.intakes.iter().position(|slot| slot.state == IntakeState::Free);
        let slot = free.ok_or(OfferStatus::Busy)?;
        let path = self.path_to(&from);
        self.puller.path_mut(path).users += 1;
        self.puller.heard(now, path);
        let intake = &mut self.intakes[slot];
        *intake = IntakeSlot {
            state: IntakeState::Reserving,
            from,
            path,
            offer: offer.offer,
            epoch: offer.epoch,
            key: offer.key,
            header_bytes: offer.header_bytes,
            bytes,
            segment_bytes,
            heard_at: now,
            patience_until,
            ..IntakeSlot::free(tag::next(intake.tag))
        };
        let name = Intake(intake.tag);
        self.counters.begun += 1;
        self.push_event(AcceptEvent::Reserve { intake: name, key: offer.key, bytes });
        Ok(())
    }

    /// The path to a data plane's port, which may have been forgotten.
    fn path_to(&mut self, peer: &Peer) -> PathIndex {
        let port = Some((peer.ip, peer.port));
        let all = || PathIndex::all(self.ports.len());
        if let Some(known) = all().find(|path| self.ports[path.at()] == port) {
            return known;
        }
        let free = all().filter(|path| self.puller.path(*path).users == 0);
        let oldest = self.oldest_port;
        let last = self.ports.len();
        let path = free.min_by_key(|path| (path.at() + last - oldest) % last).expect("one for each intake");
        self.oldest_port = (path.at() + 1) % last;
        self.ports[path.at()] = port;
        self.puller.forget(path);
        path
    }

    /// The data plane cannot send what was pulled.
    fn handle_error(&mut self, now: Instant, from: &Peer, refusal: &Refusal) -> Result<(), DropReason> {
        let slot = usize::from(tag::slot_of(refusal.tag));
        let intake = self.intakes.get(slot).ok_or(DropReason::Stale)?;
        if intake.tag != refusal.tag || intake.state != IntakeState::Pulling {
            return Err(DropReason::Stale);
        }
        if !intake.is_from(from) {
            return Err(DropReason::WrongStore);
        }
        if refusal.code == ErrorCode::Busy && refusal.epoch != intake.epoch {
            // A restarted data plane would have said so: this is a late one, or made up.
            return Err(DropReason::StaleEpoch);
        }
        self.counters.errors += 1;
        let path = intake.path;
        self.puller.heard(now, path);
        match refusal.code {
            ErrorCode::Busy => {
                self.puller.rest(now, path, u64::from(refusal.retry_us) * 1000, Some(refusal.sequence));
                self.take_given_up();
            }
            // Withdrawn, or the data plane has restarted; or we understand each other so little that trying is no use.
            _ => self.drop_intake(slot),
        }
        Ok(())
    }

    /// Says whether there is memory for an intake. False if the intake is not waiting for it: then memory that was found is
    /// the caller's to free.
    pub fn reserved(&mut self, now: Instant, intake: Intake, memory: Result<(), Declined>) -> bool {
        let Some(slot) = self.find(intake, IntakeState::Reserving) else { return false };
        let found = &self.intakes[slot];
        let status = match memory {
            Ok(()) => {
                let (path, bytes, segment_bytes) = (found.path, found.bytes, found.segment_bytes);
                self.puller.begin(span_of(slot), path, (0, bytes), segment_bytes);
                self.begin_to_pull(now, slot);
                return true;
            }
            Err(Declined::AlreadyStored) => {
                self.counters.already_stored += 1;
                OfferStatus::AlreadyStored
            }
            Err(Declined::Busy) => OfferStatus::Busy,
            Err(Declined::Full) => OfferStatus::Full,
            Err(Declined::TooLarge) => OfferStatus::TooLarge,
        };
        self.counters.declined += 1;
        self.end(slot, status);
        true
    }

    /// Notes that `bytes` of a chunk that is being checked are wrong, before the verdict [`PutVerdict::Corrupt`].
    pub fn mark_corrupt(&mut self, intake: Intake, bytes: Range<u64>) {
        let Some(slot) = self.find(intake, IntakeState::Judged) else { return };
        self.puller.lose(span_of(slot), bytes);
    }

    /// Takes in what was found about a chunk that arrived. True if what was corrupt is pulled again into the same memory;
    /// false if the engine is done with it.
    pub fn verdict(&mut self, now: Instant, intake: Intake, verdict: PutVerdict) -> bool {
        let Some(slot) = self.find(intake, IntakeState::Judged) else { return false };
        let status = match verdict {
            PutVerdict::Stored => {
                self.counters.stored += 1;
                OfferStatus::Stored
            }
            PutVerdict::AlreadyStored => {
                self.counters.already_stored += 1;
                self.counters.declined += 1;
                OfferStatus::AlreadyStored
            }
            PutVerdict::BadChunk => {
                self.counters.refused += 1;
                OfferStatus::BadChunk
            }
            PutVerdict::Corrupt => {
                self.counters.corrupt += 1;
                let found = &mut self.intakes[slot];
                found.corrupt = found.corrupt.saturating_add(1);
                if found.corrupt <= self.config.corrupt_retries && !self.puller.span(span_of(slot)).is_whole()
                {
                    self.begin_to_pull(now, slot);
                    return true;
                }
                self.counters.refused += 1;
                OfferStatus::Corrupt
            }
        };
        self.end(slot, status);
        false
    }

    fn begin_to_pull(&mut self, now: Instant, slot: usize) {
        let intake = &mut self.intakes[slot];
        (intake.state, intake.heard_at) = (IntakeState::Pulling, now);
        self.puller.arm((now + self.config.silence).min(intake.patience_until));
    }

    fn free(&mut self, slot: usize) {
        let intake = &mut self.intakes[slot];
        intake.state = IntakeState::Free;
        self.puller.path_mut(intake.path).users -= 1;
    }

    /// Answers for an intake and frees its slot.
    fn end(&mut self, slot: usize, status: OfferStatus) {
        self.free(slot);
        let intake = &self.intakes[slot];
        let (to, offer, epoch) = (intake.from, intake.offer, intake.epoch);
        self.push_reply(to, offer, epoch, status);
    }

    /// Gives up an intake that is being pulled.
    fn drop_intake(&mut self, slot: usize) {
        let intake = &mut self.intakes[slot];
        assert_eq!(intake.state, IntakeState::Pulling, "only what is being pulled is given up");
        intake.state = IntakeState::Dropped;
        self.counters.dropped += 1;
        let intake = Intake(intake.tag);
        self.puller.leave(span_of(slot));
        self.push_event(AcceptEvent::Dropped { intake });
    }

    /// The next thing for the caller to do.
    pub fn poll_event(&mut self) -> Option<AcceptEvent> {
        let event = self.events.pop_front()?;
        if let AcceptEvent::Dropped { intake } = event {
            self.free(intake.slot());
        }
        Some(event)
    }

    /// Whether nothing is under way and no event or answer waits.
    pub fn idle(&self) -> bool {
        self.intakes_under_way() == 0 && self.events.is_empty() && self.replies.is_empty()
    }

    /// Intakes that are not free.
    pub fn intakes_under_way(&self) -> usize {
        self.intakes.iter().filter(|slot| slot.in_use()).count()
    }

    /// Segments asked for and neither arrived nor given up; never above `window_segments`.
    pub fn in_flight_segments(&self) -> u32 {
        self.puller.in_flight()
    }

    /// What this engine has done.
    pub fn counters(&self) -> &AcceptCounters {
        &self.counters
    }

    fn find(&self, intake: Intake, state: IntakeState) -> Option<usize> {
        let found = self.intakes.get(intake.slot())?;
        (found.tag == intake.0 && found.state == state).then_some(intake.slot())
    }

    fn least_segment_bytes(&self) -> u16 {
        least_segment_bytes(self.config.segment_bytes)
    }

    fn push_event(&mut self, event: AcceptEvent) {
        // An intake has at most one event of asking or arrival waiting, and one of being dropped.
        assert!(self.events.len() < self.events.capacity(), "the event queue has room for every event");
        self.events.push_back(event);
    }

    fn reply(&mut self, to: Peer, offer: &Offer, status: OfferStatus) {
        self.push_reply(to, offer.offer, offer.epoch, status);
    }

    /// An answer that finds no room is not sent: the offer will be repeated.
    fn push_reply(&mut self, to: Peer, offer: u32, epoch: u64, status: OfferStatus) {
        if self.replies.len() == self.replies.capacity() {
            return;
        }
        let retry_ms = if status == OfferStatus::Busy { self.config.retry_ms } else { 0 };
        let store_epoch = self.config.epoch;
        self.replies.push_back((to, OfferReply { offer, status, retry_ms, epoch, store_epoch }));
    }
}

/// The span of an intake.
fn span_of(slot: usize) -> SpanIndex {
    SpanIndex(u16::try_from(slot).expect("below max_intakes"))
}

/// Segments below this are refused, since the bitmap has a bit for each: a data plane has no reason to send smaller ones.
fn least_segment_bytes(segment_bytes: u16) -> u16 {
    segment_bytes.min(256)
}
