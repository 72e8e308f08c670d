//! Datagrams in: segments, lookup replies, errors.

use crate::chunk::ChunkLayout;
use crate::reason::DropReason;
use crate::time::Instant;
use crate::wire::message::{self, Data, ErrorCode, LookupReply, Message, Refusal, Subject};

use super::event::{Accepted, LookupOutcome, StoreIndex, TransferId};
use super::index::{Index, JobIndex, LookupIndex, TransferIndex};
use super::tables::{JobState, Request, RequestState, TransferState};
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
        self.counters.datagrams += 1;
        self.counters.marked += u64::from(marked);
        let result = match message::data(payload) {
            Some(data) => self.handle_data(now, store, &data),
            None => self.handle_control(now, store, payload),
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
        store: StoreIndex,
        data: &Data<'_>,
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
        if transfer.store != store {
            return Err(DropReason::WrongStore);
        }
        if transfer.epoch != data.epoch {
            return Err(DropReason::StaleEpoch);
        }
        if data.segment >= transfer.segments {
            return Err(DropReason::BadSegment);
        }
        let is_last = data.segment + 1 == transfer.segments;
        let bytes = if is_last { transfer.last_bytes } else { u32::from(self.config.segment_bytes) };
        if data.payload.len() != bytes as usize {
            return Err(DropReason::BadLength);
        }
        let word = &mut self.arrived[index.at() * self.segment_words + (data.segment / 64) as usize];
        let bit = 1_u64 << (data.segment % 64);
        if *word & bit != 0 {
            return Err(DropReason::Duplicate);
        }
        *word |= bit;
        transfer.arrived += 1;
        transfer.backoff = 0;
        let store = &mut self.stores[usize::from(store.0)];
        if data.segment < transfer.cursor {
            transfer.in_flight -= 1;
            store.in_flight -= 1;
            self.in_flight -= 1;
            if data.segment == transfer.timed_segment {
                transfer.timed_segment = u32::MAX;
                store.sample(now.nanos().saturating_sub(transfer.timed_at.nanos()));
            }
            transfer.rto_at = now.plus_nanos(store.rto(0));
        }
        if store.silent_timeouts != 0 {
            store.silent_timeouts = 0;
            self.ready_blocked = false;
        }
        let is_whole = transfer.arrived == transfer.segments;
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
            data: first..first + data.payload.len(),
        })
    }

    fn plane_arrived(&mut self, index: TransferIndex) {
        self.unlist_transfer(index);
        let transfer = &mut self.transfers[index.at()];
        assert_eq!(transfer.in_flight, 0, "a transfer that is whole has nothing in flight");
        transfer.state = TransferState::Arrived;
        self.counters.planes_arrived += 1;
        self.push_event(Queued::PlaneArrived(index));
    }

    fn place_header(&mut self, index: TransferIndex, data: &Data<'_>, is_whole: bool) {
        let chunk = self.transfers[index.at()].chunk;
        let offset = data.segment as usize * usize::from(self.config.segment_bytes);
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
            Message::Data(data) => return self.handle_data(now, store, &data),
            Message::LookupReply(reply) => self.handle_reply(now, store, &reply)?,
            Message::Error(refusal) => self.handle_refusal(store, &refusal)?,
            Message::Lookup(_) | Message::Pull(_) | Message::Probe(_) | Message::ProbeReply(_) => {
                return Err(DropReason::BadType);
            }
        }
        self.counters.control += 1;
        Ok(Accepted::Control)
    }

    fn handle_reply(
        &mut self,
        now: Instant,
        store: StoreIndex,
        reply: &LookupReply<'_>,
    ) -> Result<(), DropReason> {
        let slot = tag::slot_of(reply.request);
        let Some(lookup) = slot.checked_sub(self.config.max_fetches) else {
            let index = JobIndex(slot);
            let job = &mut self.jobs[index.at()];
            let rtt = check_reply(&mut job.request, now, reply, job.store == store)?;
            self.sample(store, rtt);
            self.handle_job_reply(index, reply);
            return Ok(());
        };
        let index = LookupIndex(lookup);
        let job = self.lookups.get_mut(index.at()).ok_or(DropReason::Stale)?;
        let rtt = check_reply(&mut job.request, now, reply, job.store == store)?;
        self.sample(store, rtt);
        self.handle_lookup_reply(index, reply);
        Ok(())
    }

    fn sample(&mut self, store: StoreIndex, rtt: Option<u64>) {
        let store = self.store(store);
        store.silent_timeouts = 0;
        if let Some(rtt) = rtt {
            store.sample(rtt);
        }
        self.ready_blocked = false;
    }

    fn handle_job_reply(&mut self, index: JobIndex, reply: &LookupReply<'_>) {
        let asked = self.job_requests[index.at()];
        for (chunk, info) in asked.into_iter().zip(reply.entries()) {
            self.looked_up(chunk, reply.epoch, info);
        }
        if self.jobs[index.at()].state == JobState::Running {
            self.admit_blocked = false;
            self.request_chunks(index);
        }
    }

    fn handle_lookup_reply(&mut self, index: LookupIndex, reply: &LookupReply<'_>) {
        let job = &mut self.lookups[index.at()];
        for info in reply.entries() {
            let Some(info) = info else {
                return self.finish_lookup(index, LookupOutcome::Done);
            };
            job.found += 1;
            job.tokens += u64::from(info.tokens);
            job.encoded_bytes = job.encoded_bytes.saturating_add(info.chunk_bytes);
            job.last = Some(info);
        }
        if job.found == job.keys {
            self.finish_lookup(index, LookupOutcome::Done);
        } else {
            self.request_prefix(index);
        }
    }

    fn handle_refusal(&mut self, store: StoreIndex, refusal: &Refusal) -> Result<(), DropReason> {
        if refusal.subject == Subject::Lookup {
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
        if refusal.code != ErrorCode::Busy {
            self.refused(transfer.chunk, refusal.code);
        }
        Ok(())
    }
}

/// Checks a reply against the LOOKUP it should answer, and closes that; gives the round-trip time if the LOOKUP was
/// sent once.
fn check_reply(
    request: &mut Request,
    now: Instant,
    reply: &LookupReply<'_>,
    from_its_store: bool,
) -> Result<Option<u64>, DropReason> {
    if request.id != reply.request || request.state == RequestState::Idle || request.sent == 0 {
        return Err(DropReason::Stale);
    }
    if !from_its_store {
        return Err(DropReason::WrongStore);
    }
    if reply.entries().len() != usize::from(request.keys) {
        return Err(DropReason::BadLength);
    }
    request.state = RequestState::Idle;
    Ok((request.sent == 1).then(|| now.nanos().saturating_sub(request.sent_at.nanos())))
}
