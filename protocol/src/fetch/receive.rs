//! Datagrams in: segments, lookup replies, errors.

use crate::chunk::ChunkLayout;
use crate::pull::{Arrival, PathIndex, Span};
use crate::reason::DropReason;
use crate::time::Instant;
use crate::wire::message::{self, Data, ErrorCode, Message, Refusal, Subject};

use super::event::{Accepted, StoreIndex, TransferId};
use super::index::{Index, TransferIndex};
use super::query::Sent;
use super::tables::{Transfer, TransferState};
use super::{FetchEngine, Queued, tag};

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
        let arrival = Arrival {
            segment: data.segment,
            bytes: data_bytes,
            sequence: data.sequence,
            waited_ns: data.waited_ns,
            is_marked: marked,
        };
        let taken = self.puller.take_in(now, index, &arrival)?;
        self.ready_blocked = false;
        self.counters.segments_late += u64::from(taken.is_late);
        let store = &mut self.stores[usize::from(store_index.0)];
        store.gone_until = Instant::ZERO;
        if let Some(rtt) = taken.round_trip {
            store.latency.sample(rtt);
        }
        if self.is_header(index) {
            self.place_header(index, data, taken.is_whole);
            return Ok(Accepted::Control);
        }
        self.counters.segments_placed += 1;
        self.counters.segment_bytes_placed += data_bytes as u64;
        if taken.is_whole {
            self.plane_arrived(index);
        }
        let first = message::DATA_HEADER_BYTES;
        Ok(Accepted::Segment {
            transfer: TransferId(data.tag),
            segment: data.segment,
            data: first..first + data_bytes,
        })
    }

    fn plane_arrived(&mut self, index: TransferIndex) {
        self.unlist_transfer(index);
        let transfer = &mut self.transfers[index.at()];
        transfer.state = TransferState::Arrived;
        let Transfer { chunk, plane, store, .. } = *transfer;
        let Span { bytes, segment_bytes, .. } = *self.puller.span(index);
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
        let Transfer { chunk, .. } = self.transfers[index.at()];
        let segment_bytes = self.puller.span(index).segment_bytes;
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

    /// Takes in that a store answered a LOOKUP. Which transmission it answers is known of those that were sent once.
    pub(super) fn heard_reply(&mut self, now: Instant, store: StoreIndex, sent: Sent) {
        let rtt = now.nanos().saturating_sub(sent.first_at.nanos());
        match sent.times {
            0 => {}
            1 => {
                self.puller.take_round_trip(now, PathIndex(store.0), rtt, 0);
                self.store(store).latency.sample(rtt);
            }
            _ => self.puller.path_mut(PathIndex(store.0)).rtt.bound(rtt, sent.wait),
        }
        self.heard(now, store);
        self.ready_blocked = false;
    }

    /// Something other than a segment came from a store.
    fn heard(&mut self, now: Instant, store: StoreIndex) {
        self.puller.heard(now, PathIndex(store.0));
        self.store(store).gone_until = Instant::ZERO;
    }

    fn handle_refusal(&mut self, store: StoreIndex, refusal: &Refusal) -> Result<(), DropReason> {
        let retry_ns = u64::from(refusal.retry_us) * 1000;
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
        self.heard(now, store);
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
        self.puller.rest(self.now, PathIndex(store.0), nanos, refused);
        self.take_given_up(false);
        self.leave_store(store);
    }
}
