//! Datagrams in: segments, lookup replies, errors.

use crate::chunk::ChunkLayout;
use crate::reason::DropReason;
use crate::time::Instant;
use crate::wire::message::{self, Data, ErrorCode, Message, Refusal, Subject};

use super::event::{Accepted, StoreIndex, TransferId};
use super::index::{AskIndex, Index, TransferIndex};
use super::store::Store;
use super::tables::{Transfer, TransferState};
use super::window::Path;
use super::{FetchEngine, Queued, segments, tag};

/// The tolerated delay is at least this share of the least round trip.
const TOLERANCE_SHARE: u64 = 4;
/// Least time that a busy store is left alone, in microseconds.
const LEAST_RETRY_US: u64 = 20;
/// Most of the same: a store that says more is asked again all the same.
const MOST_RETRY_NS: u64 = 50_000_000;

impl<L: ChunkLayout> FetchEngine<L> {
    /// Takes in a UDP payload that came from `store`. An error is counted already.
    ///
    /// `marked` says that the IP header's ECN field reads "congestion experienced". Of an accepted segment the engine
    /// keeps one bit; its bytes stay with the caller.
    #[inline]
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        store: StoreIndex,
        marked: bool,
        payload: &[u8],
    ) -> Result<Accepted, DropReason> {
        self.count_datagram(now, marked, |engine| match message::data(payload) {
            Some(data) => engine.handle_data(now, store, marked, (&data, data.payload.len())),
            None => engine.handle_control(now, store, payload),
        })
    }

    /// The same of a DATA message of which only the header is at hand, while its segment of `segment_bytes` lies in memory that nobody
    /// here reads. Only segments of planes can be taken in so.
    #[inline]
    pub fn handle_data_header(
        &mut self,
        now: Instant,
        store: StoreIndex,
        marked: bool,
        header: &[u8],
        segment_bytes: usize,
    ) -> Result<Accepted, DropReason> {
        self.count_datagram(now, marked, |engine| match message::data_header(header) {
            Some(data) if !engine.is_header(TransferIndex(tag::slot_of(data.tag))) => {
                engine.handle_data(now, store, marked, (&data, segment_bytes))
            }
            Some(_) | None => Err(DropReason::BadLength),
        })
    }

    /// Counts a datagram, and why it is dropped if it is.
    #[inline]
    fn count_datagram(
        &mut self,
        now: Instant,
        marked: bool,
        take: impl FnOnce(&mut Self) -> Result<Accepted, DropReason>,
    ) -> Result<Accepted, DropReason> {
        self.counters.datagrams += 1;
        self.counters.marked += u64::from(marked);
        self.now = self.now.max(now);
        let result = take(self);
        if let Err(reason) = result {
            self.counters.drops[reason.index()] += 1;
        }
        result
    }

    #[inline]
    fn handle_data(
        &mut self,
        now: Instant,
        store_index: StoreIndex,
        marked: bool,
        (data, data_bytes): (&Data<'_>, usize),
    ) -> Result<Accepted, DropReason> {
        let index = TransferIndex(tag::slot_of(data.tag));
        let transfer = self.transfers.get_mut(index.at()).ok_or(DropReason::Stale)?;
        if transfer.tag != data.tag {
            return Err(DropReason::Stale);
        }
        match transfer.state {
            TransferState::Receiving => {}
            TransferState::Arrived | TransferState::Announced => return Err(DropReason::Duplicate),
            TransferState::Free | TransferState::Reset => return Err(DropReason::Stale),
        }
        if transfer.store != store_index {
            return Err(DropReason::WrongStore);
        }
        if transfer.epoch != data.epoch {
            return Err(DropReason::StaleEpoch);
        }
        if data.segment >= transfer.segments {
            return Err(DropReason::BadSegment);
        }
        let is_last = data.segment + 1 == transfer.segments;
        let bytes = if is_last { transfer.last_bytes } else { u32::from(transfer.segment_bytes) };
        if data_bytes != bytes as usize {
            return Err(DropReason::BadLength);
        }
        let first_word = index.at() * self.segment_words;
        let (word, bit) = segments::place(data.segment);
        let word = &mut self.segments[first_word + word];
        if word.arrived & bit != 0 {
            return Err(DropReason::Duplicate);
        }
        word.arrived |= bit;
        transfer.arrived += 1;
        let store = &mut self.stores[usize::from(store_index.0)];
        let mut asked_by = None;
        if word.asked & bit != 0 {
            word.asked &= !bit;
            let ask = self.asked_by[first_word * 64 + data.segment as usize];
            asked_by = Some(ask);
            transfer.in_flight -= 1;
            store.in_flight -= 1;
            self.in_flight -= 1;
            let base = self.asks.get(ask).base;
            self.asks.arrived(&mut store.asks, ask, 1 << (data.segment - base));
        }
        store.heard(now);
        store.window.arrived(marked);
        self.link.arrived(bytes);
        self.ready_blocked = false;
        let is_whole = transfer.arrived == transfer.segments;
        self.note_answer(now, store_index, index, data, asked_by);
        if self.is_header(index) {
            self.place_header(index, data, is_whole);
            return Ok(Accepted::Control);
        }
        self.counters.segments_placed += 1;
        self.counters.segment_bytes_placed += u64::from(bytes);
        if is_whole {
            self.plane_arrived(index);
        }
        let first = message::DATA_HEADER_BYTES;
        Ok(Accepted::Segment {
            transfer: TransferId(data.tag),
            segment: data.segment,
            data: first..first + data_bytes,
        })
    }

    /// Learns from the PULL that a segment answers: the round trip, what must be lost, whether it was lost at all. What
    /// the store says of the PULL is believed only if that PULL was for this segment.
    #[inline]
    fn note_answer(
        &mut self,
        now: Instant,
        store_index: StoreIndex,
        index: TransferIndex,
        data: &Data<'_>,
        asked_by: Option<AskIndex>,
    ) {
        let Some(ask) = self.asks.find(data.sequence) else { return };
        let place = data.segment.wrapping_sub(ask.base);
        if ask.store != store_index || ask.transfer != index || place >= 64 {
            return;
        }
        let (order, rtt) = (ask.order, now.nanos().saturating_sub(ask.sent_at.nanos()));
        let is_first = place == 0;
        let store = &mut self.stores[usize::from(store_index.0)];
        if asked_by.is_none_or(|by| self.asks.get(by).sequence != data.sequence) {
            self.counters.segments_late += 1;
            store.rack.was_late(order, self.asks.last_order());
        }
        if is_first {
            self.take_round_trip(now, store_index, rtt, u64::from(data.waited_ns));
        }
        let store = &mut self.stores[usize::from(store_index.0)];
        if store.rack.arrived(order, rtt)
            && let Some(smoothed) = store.rtt.smoothed()
            && let Some(oldest) = store.asks.oldest()
        {
            let oldest = self.asks.get(oldest);
            if let Some(at) = store.rack.lost_at(oldest.order, oldest.sent_at.nanos(), smoothed) {
                self.arm(Instant::from_nanos(at));
            }
        }
        if self.stores[usize::from(store_index.0)].window.is_over(order) {
            self.end_store_round(store_index);
        }
        if self.link.is_over(order) {
            self.end_link_round(now);
        }
    }

    /// Takes in a round trip of something that was asked for once, or whose answer says by which PULL.
    fn take_round_trip(&mut self, now: Instant, store: StoreIndex, rtt: u64, waited: u64) {
        let entry = &mut self.stores[usize::from(store.0)];
        let was_unknown = entry.rtt.least().is_none();
        entry.rtt.sample(now.nanos(), rtt, waited);
        entry.window.sample(rtt);
        entry.latency.sample(rtt);
        if was_unknown {
            self.measure_base();
        }
    }

    #[cold]
    fn end_store_round(&mut self, store: StoreIndex) {
        let entry = &mut self.stores[usize::from(store.0)];
        let Some(base) = entry.rtt.least() else { return };
        let tolerance = self.tolerance_ns.max(base / TOLERANCE_SHARE);
        let path = Path { base, tolerance, most: self.link.cap() };
        self.congested |= entry.window.end_round(self.asks.last_order(), &path);
    }

    #[cold]
    fn end_link_round(&mut self, now: Instant) {
        let full = self.in_flight >= self.link.cap() / 4 * 3;
        self.link.end_round(now, self.asks.last_order(), self.congested, full);
        self.congested = false;
        self.measure_base();
    }

    /// Tells the link how far its farthest store is, of those that are asked for something.
    fn measure_base(&mut self) {
        let asked = self.stores.iter().filter(|store| store.chunks > 0 || store.in_flight > 0);
        // Jitter keeps segments under way for longer without filling a queue.
        let usual = |store: &Store| store.rtt.least().map(|least| least + store.window.spread().min(least));
        if let Some(base) = asked.filter_map(usual).max() {
            self.link.set_base(base);
        }
        let (rate, wire_bytes) = self.link.pace();
        self.pacer.set_rate(rate, wire_bytes, self.link.burst());
    }

    fn plane_arrived(&mut self, index: TransferIndex) {
        self.unlist_transfer(index);
        let transfer = &mut self.transfers[index.at()];
        assert_eq!(transfer.in_flight, 0, "a transfer that is whole has nothing in flight");
        transfer.state = TransferState::Arrived;
        let Transfer { chunk, plane, store, bytes, segment_bytes, .. } = *transfer;
        if bytes.min(segment_bytes.into()) > u32::from(self.config.segment_bytes) {
            self.stores[usize::from(store.0)].untouched = 0;
        }
        let slot = &self.chunks[chunk.at()];
        let (job, other) = (slot.job, slot.other);
        self.jobs[job.at()].left = self.jobs[job.at()].left.saturating_sub(1);
        self.counters.planes_arrived += 1;
        self.push_event(Queued::PlaneArrived(index));
        if let Some(other) = other {
            self.arrived_elsewhere(other, plane);
        }
    }

    fn place_header(&mut self, index: TransferIndex, data: &Data<'_>, is_whole: bool) {
        let Transfer { chunk, segment_bytes, .. } = self.transfers[index.at()];
        let offset = data.segment as usize * usize::from(segment_bytes);
        let header = self.header_range(chunk);
        self.chunk_headers[header][offset..offset + data.payload.len()].copy_from_slice(data.payload);
        self.counters.header_segments += 1;
        if is_whole {
            self.header_arrived(chunk);
        }
    }

    #[cold]
    fn handle_control(
        &mut self,
        now: Instant,
        store: StoreIndex,
        payload: &[u8],
    ) -> Result<Accepted, DropReason> {
        match Message::new_checked(payload)? {
            Message::Data(data) => return self.handle_data(now, store, false, (&data, data.payload.len())),
            Message::LookupReply(reply) => self.handle_reply(now, store, &reply)?,
            Message::Error(refusal) => self.handle_refusal(store, &refusal)?,
            Message::Lookup(_) | Message::Pull(_) | Message::Probe(_) | Message::ProbeReply(_) => {
                return Err(DropReason::BadType);
            }
        }
        self.counters.control += 1;
        Ok(Accepted::Control)
    }

    /// Takes in that a store answered a LOOKUP, with the round trip if that is known.
    pub(super) fn heard_reply(&mut self, now: Instant, store: StoreIndex, rtt: Option<u64>) {
        self.store(store).heard(now);
        self.ready_blocked = false;
        if let Some(rtt) = rtt {
            self.take_round_trip(now, store, rtt, 0);
        }
    }

    fn handle_refusal(&mut self, store: StoreIndex, refusal: &Refusal) -> Result<(), DropReason> {
        let retry_ns = u64::from(refusal.retry_us).max(LEAST_RETRY_US) * 1000;
        if refusal.subject == Subject::Lookup {
            self.put_off(store, refusal.tag)?;
            self.rest(store, retry_ns, None);
            return Ok(());
        }
        let index = TransferIndex(tag::slot_of(refusal.tag));
        let transfer = self.transfers.get(index.at()).ok_or(DropReason::Stale)?;
        if transfer.tag != refusal.tag || transfer.state != TransferState::Receiving {
            return Err(DropReason::Stale);
        }
        if transfer.store != store {
            return Err(DropReason::WrongStore);
        }
        if refusal.code == ErrorCode::Busy && refusal.epoch != transfer.epoch {
            // A restarted store would have said so: this is a late one, or made up.
            return Err(DropReason::StaleEpoch);
        }
        let chunk = transfer.chunk;
        let now = self.now;
        self.store(store).heard(now);
        if refusal.code == ErrorCode::Busy {
            self.rest(store, retry_ns, Some(refusal.sequence));
        } else {
            self.refused(chunk, refusal.code);
        }
        Ok(())
    }

    /// A store is busy: asks it for nothing for a while and then for less. What the PULL it could not take would have
    /// brought is wanted again; chunks go to replicas.
    fn rest(&mut self, store: StoreIndex, nanos: u64, refused: Option<u32>) {
        self.counters.busy += 1;
        if let Some(ask) = refused.and_then(|sequence| self.asks.under_way(sequence, store)) {
            self.give_up(ask);
        }
        let until = self.now.plus_nanos(nanos.min(MOST_RETRY_NS));
        let entry = self.store(store);
        if entry.busy_until <= until {
            if entry.busy_until == Instant::ZERO {
                let in_flight = entry.in_flight;
                entry.window.busy(in_flight);
            }
            entry.busy_until = until;
            self.arm(until);
        }
        self.leave_store(store);
    }
}
