//! The store's engine: takes offers, has the caller find memory, pulls the chunk, has the caller check it.
//!
//! It keeps a bit per segment; the bytes stay with the caller. All tables are of fixed size; an offer that finds none free
//! is answered *busy*.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use crate::pull::{bits, tag};
use crate::frame::Peer;
use crate::key::Key;
use crate::reason::DropReason;
use crate::time::{Instant, nanos_of};
use crate::wire::message::{
    self, DATA_HEADER_BYTES, Data, ErrorCode, Message, PullRange, Refusal, SEGMENT_ALIGN,
};
use crate::wire::offer::{self, Offer, OfferReply, OfferStatus};

use super::intake::{IntakeSlot, IntakeState};
use super::rtt::Rtt;

/// Most segments of one PULL.
const MAX_PULL_SEGMENTS: u32 = 64;

/// Budgets of one queue of a store. Everything is allocated from them in [`AcceptEngine::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcceptConfig {
    /// The store's epoch, as in [`crate::ServeConfig`].
    pub epoch: u64,
    /// Chunks being pulled or checked at once; zero takes none.
    pub max_intakes: u16,
    /// Bytes of a chunk; larger ones are refused.
    pub max_chunk_bytes: u32,
    /// Largest segment that fits a packet here, a multiple of 32: see [`crate::frame::max_segment_bytes`].
    pub segment_bytes: u16,
    /// Segments in flight at once over all chunks: asked for, not arrived, not given up.
    pub window_segments: u32,
    /// Least time without an arrival after which what was asked for counts as lost.
    pub rto_min: Duration,
    /// Most of the same, after doubling.
    pub rto_max: Duration,
    /// Time without an arrival after which a chunk is given up and its memory freed.
    pub silence: Duration,
    /// How often what was corrupt is pulled again before the chunk is refused.
    pub corrupt_retries: u8,
    /// What a data plane is told to wait when the store is busy, milliseconds.
    pub retry_ms: u16,
    /// Differs from run to run, so that segments asked for by an earlier run are not taken for this one's.
    pub seed: u32,
}

impl Default for AcceptConfig {
    /// Sixteen chunks of up to 64 MiB, 512 segments of an MTU of 1,500 over IPv4 in flight, given up after 3 s of silence.
    fn default() -> Self {
        AcceptConfig {
            epoch: 1,
            max_intakes: 16,
            max_chunk_bytes: 64 << 20,
            segment_bytes: 1440,
            window_segments: 512,
            rto_min: Duration::from_millis(2),
            rto_max: Duration::from_millis(200),
            silence: Duration::from_secs(3),
            corrupt_retries: 3,
            retry_ms: 20,
            seed: 0,
        }
    }
}

/// A chunk that is being taken in, from [`AcceptEvent::Reserve`] to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Intake(u32);

impl Intake {
    /// Below `AcceptConfig::max_intakes`, and different for all that are under way: the caller's array index.
    #[inline]
    pub fn slot(self) -> usize {
        usize::from(tag::slot_of(self.0))
    }
}

/// What became of a received datagram that was not dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The engine has taken what it needs.
    Control,
    /// A segment: the caller copies it into the chunk's memory now.
    Segment {
        /// Which chunk.
        intake: Intake,
        /// Where in the chunk it belongs, bytes.
        offset: u64,
        /// Where in the datagram's payload its bytes lie.
        data: Range<usize>,
    },
}

/// Something for the caller to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcceptEvent {
    /// Find memory for a chunk and answer with [`AcceptEngine::reserved`], now or later.
    Reserve {
        /// Which.
        intake: Intake,
        /// Its name.
        key: Key,
        /// Bytes needed.
        bytes: u32,
    },
    /// All bytes have arrived: check them and answer with [`AcceptEngine::verdict`], now or later.
    Arrived {
        /// Which.
        intake: Intake,
        /// Its name, which its header must hold.
        key: Key,
        /// Bytes of the chunk.
        bytes: u32,
        /// Bytes of its header, as offered.
        header_bytes: u32,
    },
    /// It will not arrive: free its memory. Needs no answer.
    Dropped {
        /// Which.
        intake: Intake,
    },
}

/// Why there is no memory for a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Declined {
    /// It is stored already.
    AlreadyStored,
    /// Memory is in use by chunks that are going or coming, or another data plane is putting the same chunk.
    Busy,
    /// Everything that fills the store is pinned.
    Full,
    /// It exceeds the store's whole budget.
    TooLarge,
}

/// What the caller says of a chunk that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PutVerdict {
    /// Right, and visible to lookups from now on.
    Stored,
    /// Right, but another was stored under its name meanwhile.
    AlreadyStored,
    /// Wrong in the places given to [`AcceptEngine::mark_corrupt`].
    Corrupt,
    /// Its header contradicts the format, its size or its name: it would be no better the next time.
    BadChunk,
}

/// What a store's engine has done; all counts start at zero and only grow. `datagrams` are the sum of `offers`, `segments`,
/// `errors` and all drops; intakes begun are the sum of those that ended and those under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcceptCounters {
    /// Datagrams given to the engine.
    pub datagrams: u64,
    /// OFFERs accepted, repeated ones too.
    pub offers: u64,
    /// Segments placed.
    pub segments: u64,
    /// Their payload.
    pub segment_bytes: u64,
    /// ERRORs accepted.
    pub errors: u64,
    /// Chunks for which memory was asked.
    pub begun: u64,
    /// Chunks stored.
    pub stored: u64,
    /// Chunks that were stored before, found on offer or at the end.
    pub already_stored: u64,
    /// Intakes that ended without memory: busy, full, too large, stored already.
    pub declined: u64,
    /// Intakes refused after checking: corrupt too often, or contradicting themselves.
    pub refused: u64,
    /// Intakes given up: the data plane fell silent or withdrew them.
    pub dropped: u64,
    /// Times that an intake was found corrupt.
    pub corrupt: u64,
    /// PULLs sent.
    pub pulls: u64,
    /// Segments asked for the first time.
    pub segments_asked: u64,
    /// Segments asked for again.
    pub segments_asked_again: u64,
    /// Timeouts.
    pub timeouts: u64,
    /// Datagrams dropped, by [`DropReason::index`].
    pub drops: [u64; DropReason::COUNT],
}

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
    arrived: Box<[u64]>,
    segment_words: usize,
    pull_segments: u32,
    /// Rings of fixed capacity that never grow: events by slot, answers to be sent.
    events: VecDeque<AcceptEvent>,
    replies: VecDeque<(Peer, OfferReply)>,
    /// Whose turn it is to be pulled.
    turn: usize,
    in_flight: u32,
    sequence: u32,
    next_timeout: Instant,
    counters: AcceptCounters,
}

impl AcceptEngine {
    /// An engine with nothing under way. All memory is allocated here: a bit per segment of `max_chunk_bytes` in segments
    /// of 256 bytes and more, and about 300 bytes, per intake.
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
        let segment_words = bits::words(message::segments(config.max_chunk_bytes, smallest));
        let rtt = Rtt::new(config.rto_min, config.rto_max);
        AcceptEngine {
            intakes: (0..config.max_intakes)
                .map(|slot| IntakeSlot::free(tag::first(slot, config.seed), rtt))
                .collect(),
            arrived: vec![0; intakes * segment_words].into(),
            segment_words,
            pull_segments: (config.window_segments / 4).clamp(1, MAX_PULL_SEGMENTS),
            events: VecDeque::with_capacity(2 * intakes),
            replies: VecDeque::with_capacity(2 * intakes + 64),
            turn: 0,
            in_flight: 0,
            sequence: 0,
            next_timeout: Instant::FAR,
            counters: AcceptCounters {
                datagrams: 0,
                offers: 0,
                segments: 0,
                segment_bytes: 0,
                errors: 0,
                begun: 0,
                stored: 0,
                already_stored: 0,
                declined: 0,
                refused: 0,
                dropped: 0,
                corrupt: 0,
                pulls: 0,
                segments_asked: 0,
                segments_asked_again: 0,
                timeouts: 0,
                drops: [0; DropReason::COUNT],
            },
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

    /// Takes in a UDP payload that came from `from`; `stored` says whether a chunk is stored. An error is counted already.
    #[inline]
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        from: Peer,
        payload: &[u8],
        stored: impl FnOnce(&Key) -> bool,
    ) -> Result<Taken, DropReason> {
        self.counters.datagrams += 1;
        let result = match message::data(payload) {
            Some(data) => self.handle_data(now, &from, &data),
            None => self.handle_control(now, from, payload, stored).map(|()| Taken::Control),
        };
        if let Err(reason) = result {
            self.counters.drops[reason.index()] += 1;
        }
        result
    }

    #[inline]
    fn handle_data(&mut self, now: Instant, from: &Peer, data: &Data<'_>) -> Result<Taken, DropReason> {
        let slot = usize::from(tag::slot_of(data.tag));
        let words = self.words(slot);
        let intake = self.intakes.get_mut(slot).ok_or(DropReason::Stale)?;
        let before = intake.in_flight;
        let offset = intake.place(now, from, data, &mut self.arrived[words])?;
        self.in_flight -= before - intake.in_flight;
        self.counters.segments += 1;
        self.counters.segment_bytes += data.payload.len() as u64;
        let name = Intake(intake.tag);
        if intake.arrived == intake.segments {
            assert_eq!(intake.in_flight, 0, "a chunk that is whole has nothing in flight");
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
                if offer.segment_bytes >= known.segment_bytes || known.state != IntakeState::Pulling {
                    return self.reply(from, offer, OfferStatus::UnderWay);
                }
                // The path no longer carries what was asked for: from the beginning, in smaller segments.
                self.drop_intake(now, slot);
                return self.reply(from, offer, OfferStatus::Busy);
            }
            if known.is_from(&from) && known.state == IntakeState::Pulling {
                // The same port offers it anew: nobody answers for the earlier offer any more.
                self.drop_intake(now, slot);
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
        let words = self.words(slot);
        self.arrived[words].fill(0);
        let intake = &mut self.intakes[slot];
        *intake = IntakeSlot {
            state: IntakeState::Reserving,
            from,
            offer: offer.offer,
            epoch: offer.epoch,
            key: offer.key,
            header_bytes: offer.header_bytes,
            bytes,
            segment_bytes,
            segments: message::segments(bytes, segment_bytes),
            heard_at: now,
            patience_until,
            ..IntakeSlot::free(tag::next(intake.tag), Rtt::new(self.config.rto_min, self.config.rto_max))
        };
        let name = Intake(intake.tag);
        self.counters.begun += 1;
        self.push_event(AcceptEvent::Reserve { intake: name, key: offer.key, bytes });
        Ok(())
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
        self.counters.errors += 1;
        match refusal.code {
            // It has room again by the time that this is asked for again.
            ErrorCode::Busy => {}
            // Withdrawn, or the data plane has restarted; or we understand each other so little that trying is no use.
            _ => self.drop_intake(now, slot),
        }
        Ok(())
    }

    /// Says whether there is memory for an intake. False if the intake is not waiting for it: then memory that was found is
    /// the caller's to free.
    pub fn reserved(&mut self, now: Instant, intake: Intake, memory: Result<(), Declined>) -> bool {
        let Some(slot) = self.find(intake, IntakeState::Reserving) else { return false };
        let found = &mut self.intakes[slot];
        let status = match memory {
            Ok(()) => {
                found.state = IntakeState::Pulling;
                found.heard_at = now;
                let look_at = now + self.config.silence;
                self.arm(look_at);
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
        let words = self.words(slot);
        self.intakes[slot].lose(bytes, &mut self.arrived[words]);
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
                if found.corrupt <= self.config.corrupt_retries && found.arrived < found.segments {
                    found.state = IntakeState::Pulling;
                    found.heard_at = now;
                    let look_at = now + self.config.silence;
                    self.arm(look_at);
                    return true;
                }
                self.counters.refused += 1;
                OfferStatus::Corrupt
            }
        };
        self.end(slot, status);
        false
    }

    /// Answers for an intake and frees its slot.
    fn end(&mut self, slot: usize, status: OfferStatus) {
        let intake = &mut self.intakes[slot];
        intake.state = IntakeState::Free;
        let (to, offer, epoch) = (intake.from, intake.offer, intake.epoch);
        self.push_reply(to, offer, epoch, status);
    }

    /// Gives up an intake that is being pulled.
    fn drop_intake(&mut self, _now: Instant, slot: usize) {
        let intake = &mut self.intakes[slot];
        assert_eq!(intake.state, IntakeState::Pulling, "only what is being pulled is given up");
        intake.state = IntakeState::Dropped;
        self.in_flight -= std::mem::take(&mut intake.in_flight);
        self.counters.dropped += 1;
        let intake = Intake(intake.tag);
        self.push_event(AcceptEvent::Dropped { intake });
    }

    /// The next thing for the caller to do.
    pub fn poll_event(&mut self) -> Option<AcceptEvent> {
        let event = self.events.pop_front()?;
        if let AcceptEvent::Dropped { intake } = event {
            self.intakes[intake.slot()].state = IntakeState::Free;
        }
        Some(event)
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) at the latest.
    #[inline]
    pub fn poll_timeout(&self) -> Option<Instant> {
        (self.next_timeout != Instant::FAR).then_some(self.next_timeout)
    }

    /// Asks again for what did not arrive in time, and gives up what nobody sends any more. Does nothing before
    /// [`poll_timeout`](Self::poll_timeout).
    #[inline]
    pub fn handle_timeout(&mut self, now: Instant) {
        if now >= self.next_timeout {
            self.scan(now);
        }
    }

    #[cold]
    fn scan(&mut self, now: Instant) {
        self.next_timeout = Instant::FAR;
        let silence = nanos_of(self.config.silence);
        for slot in 0..self.intakes.len() {
            let intake = &self.intakes[slot];
            if intake.state != IntakeState::Pulling {
                continue;
            }
            let give_up_at = intake.heard_at.plus_nanos(silence).min(intake.patience_until);
            if give_up_at <= now {
                self.drop_intake(now, slot);
                continue;
            }
            self.arm(give_up_at);
            let intake = &self.intakes[slot];
            if intake.in_flight == 0 {
                continue;
            }
            if intake.rto_at <= now {
                let words = self.words(slot);
                let intake = &mut self.intakes[slot];
                self.in_flight -= intake.in_flight;
                intake.give_up_flight(&self.arrived[words]);
                self.counters.timeouts += 1;
            } else {
                self.arm(self.intakes[slot].rto_at);
            }
        }
    }

    /// Writes the next message to `out`, which must hold [`message::MAX_CONTROL_BYTES`]; says to whom it goes and how long
    /// it is.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<(Peer, usize)> {
        if let Some((to, reply)) = self.replies.pop_front() {
            return Some((to, offer::emit_offer_reply(out, &reply)?));
        }
        for _ in 0..self.intakes.len() {
            let slot = self.turn % self.intakes.len();
            let intake = &self.intakes[slot];
            let missing = match intake.state {
                IntakeState::Pulling => intake.segments - intake.cursor,
                _ => 0,
            };
            let wanted = self.pull_segments.min(missing);
            let room = self.config.window_segments - self.in_flight;
            // Credit comes back a segment at a time: wait until it is worth a packet.
            if wanted > 0 && room < wanted && self.in_flight > 0 {
                return None;
            }
            self.turn = slot + 1;
            if let Some(sent) = self.pull(now, slot, wanted.min(room), out) {
                return Some(sent);
            }
        }
        None
    }

    fn pull(&mut self, now: Instant, slot: usize, budget: u32, out: &mut [u8]) -> Option<(Peer, usize)> {
        if budget == 0 {
            return None;
        }
        let words = self.words(slot);
        let intake = &mut self.intakes[slot];
        let wanted = intake.want(now, budget, &self.arrived[words]);
        if wanted.asked == 0 {
            return None;
        }
        self.in_flight += wanted.asked;
        let range = PullRange {
            tag: intake.tag,
            handle: intake.offer,
            epoch: intake.epoch,
            offset: 0,
            bytes: intake.bytes,
            segment_bytes: intake.segment_bytes,
        };
        let (to, rto_at) = (intake.from, intake.rto_at);
        self.arm(rto_at);
        self.sequence = self.sequence.wrapping_add(1);
        self.counters.pulls += 1;
        self.counters.segments_asked += u64::from(wanted.asked - wanted.again);
        self.counters.segments_asked_again += u64::from(wanted.again);
        let len = message::emit_pull(out, &range, 0, self.sequence, &wanted.runs[..wanted.runs_len])?;
        Some((to, len))
    }

    /// Whether nothing is under way and no event or answer waits.
    pub fn idle(&self) -> bool {
        self.intakes_under_way() == 0 && self.events.is_empty() && self.replies.is_empty()
    }

    /// Whether there is something to send that the window allows.
    pub fn wants_to_send(&self) -> bool {
        let pulls = self.in_flight < self.config.window_segments
            && self
                .intakes
                .iter()
                .any(|slot| slot.state == IntakeState::Pulling && slot.cursor < slot.segments);
        pulls || !self.replies.is_empty()
    }

    /// Intakes that are not free.
    pub fn intakes_under_way(&self) -> usize {
        self.intakes.iter().filter(|slot| slot.in_use()).count()
    }

    /// Segments asked for and neither arrived nor given up; never above `window_segments`.
    pub fn in_flight_segments(&self) -> u32 {
        self.in_flight
    }

    /// What this engine has done.
    pub fn counters(&self) -> &AcceptCounters {
        &self.counters
    }

    fn find(&self, intake: Intake, state: IntakeState) -> Option<usize> {
        let found = self.intakes.get(intake.slot())?;
        (found.tag == intake.0 && found.state == state).then_some(intake.slot())
    }

    fn words(&self, slot: usize) -> Range<usize> {
        slot * self.segment_words..(slot + 1) * self.segment_words
    }

    fn least_segment_bytes(&self) -> u16 {
        least_segment_bytes(self.config.segment_bytes)
    }

    fn arm(&mut self, at: Instant) {
        self.next_timeout = self.next_timeout.min(at);
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

impl IntakeSlot {
    fn in_use(&self) -> bool {
        self.state != IntakeState::Free
    }
}

/// Segments below this are refused, since the bitmap has a bit for each: a data plane has no reason to send smaller ones.
fn least_segment_bytes(segment_bytes: u16) -> u16 {
    segment_bytes.min(256)
}
