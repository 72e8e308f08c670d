//! Planes that are asked of a replica too, because their store is slow (Dean and Barroso, "The Tail at Scale", CACM 2013: hedged requests).
//!
//! When nothing has come from a store for longer than nearly all of its responses took, a chunk that it is being asked for gets a *twin*:
//! another chunk slot, in which a replica is looked up, its header pulled, and planes pulled by what that header says. Planes that
//! were not asked for yet go over to the twin, which costs nothing; the others are asked for twice, as far as there is credit for it, which is a
//! few percent of what was asked for before. Whichever comes first is delivered, and the other transfer is stopped.
//!
//! The slot for which a twin works, its *main*, stays until every plane is delivered: it counts what is missing, bears the failures, and
//! takes the planes back from a twin that is given up, for whatever reason. A store that stays silent loses its chunks altogether
//! (`timers.rs`); a twin then keeps what it has.

use crate::chunk::ChunkLayout;
use crate::pull::Span;
use crate::time::Instant;

use super::event::StoreIndex;
use super::index::{ChunkIndex, Index, TransferIndex};
use super::tables::{ChunkSlot, ChunkState, Transfer, TransferState};
use super::{FetchEngine, bits};

impl<L: ChunkLayout> FetchEngine<L> {
    /// Has replicas asked for what is under way at a store from which nothing has come for longer than usual, once in each silence.
    pub(super) fn hedge_if_slow(&mut self, now: Instant, store: StoreIndex) {
        if self.config.hedge_percent == 0 || self.placement.replicas() == 1 {
            return;
        }
        let path = self.path(store);
        let since = path.quiet_since();
        if self.stores[usize::from(store.0)].hedged_since == since || path.is_silent() {
            return;
        }
        let hedge_at = since.plus_nanos(self.hedge_after(store));
        if hedge_at > now {
            self.arm(hedge_at);
            return;
        }
        self.store(store).hedged_since = since;
        self.hedge(store);
    }

    /// How long a store's response may take, nanoseconds, before a replica is asked: the 99th percentile of those seen, but no less than
    /// a usual one.
    pub(super) fn hedge_after(&self, store: StoreIndex) -> u64 {
        let rtt = &self.path(store).rtt;
        let usual = rtt.smoothed().map_or(0, |rtt| rtt + rtt / 2);
        self.stores[usize::from(store.0)].latency.p99().unwrap_or(rtt.pto()).max(usual)
    }

    #[cold]
    fn hedge(&mut self, store: StoreIndex) {
        self.earn_hedge_credit();
        for index in ChunkIndex::all(self.chunks.len()) {
            let slot = &self.chunks[index.at()];
            let is_open = slot.state == ChunkState::Planes && slot.missing > 0 && !slot.is_twin;
            if slot.store != store || !is_open || slot.is_hedged {
                continue;
            }
            if self.free_chunks.is_empty() || !self.has_alternative(self.chunk_query(index)) {
                continue;
            }
            self.open_twin(index);
        }
    }

    /// Counts what was asked for since the last time; never more than the link holds, or a plane, is saved up.
    fn earn_hedge_credit(&mut self) {
        let asked = self.counters.segments_asked - self.hedge_counted;
        self.hedge_counted = self.counters.segments_asked;
        let earned = u32::try_from(asked * u64::from(self.config.hedge_percent) / 100).unwrap_or(u32::MAX);
        let most = self.puller.link().cap().max(self.plane_segments);
        self.hedge_credit = self.hedge_credit.saturating_add(earned).min(most);
    }

    /// Gives a chunk a twin, if there is something for it to do.
    fn open_twin(&mut self, main: ChunkIndex) {
        let twin = self.free_chunks.pop().expect("the caller has seen a free slot");
        let (from, to) = (self.todo_range(main), self.todo_range(twin));
        self.chunk_begun[to.clone()].fill(0);
        self.chunk_todo.copy_within(from.clone(), to.start);
        let before = self.hedge_credit;
        for index in TransferIndex::all(usize::from(self.config.active_planes)) {
            let Transfer { chunk, state, plane, .. } = self.transfers[index.at()];
            let Span { segments, asked, .. } = *self.puller.span(index);
            if chunk != main || state != TransferState::Receiving {
                continue;
            }
            if asked == 0 {
                self.abandon(index);
            } else if segments <= self.hedge_credit {
                self.hedge_credit -= segments;
            } else {
                continue;
            }
            bits::set(&mut self.chunk_todo[to.clone()], u32::from(plane));
        }
        if !self.has_todo(twin) {
            self.free_chunks.push(twin);
            return;
        }
        self.chunk_todo[from].fill(0);
        self.unlist_chunk(main);
        self.counters.chunks_hedged += 1;
        self.counters.segments_hedged += u64::from(before - self.hedge_credit);
        let slot = &mut self.chunks[main.at()];
        (slot.is_hedged, slot.other) = (true, Some(twin));
        let ChunkSlot { job, store, chunk, .. } = *slot;
        self.chunks[twin.at()] = ChunkSlot {
            state: ChunkState::Lookup,
            job,
            store,
            chunk,
            other: Some(main),
            is_twin: true,
            ..ChunkSlot::FREE
        };
        self.count_chunk(store);
        self.jobs[job.at()].chunks += 1;
        self.avoid_store_of(self.chunk_query(twin), self.chunk_query(main));
        self.ask_first(self.chunk_query(twin));
    }

    /// The slot that a chunk's failures and missing planes are counted in.
    pub(super) fn main_of(&self, chunk: ChunkIndex) -> ChunkIndex {
        let slot = &self.chunks[chunk.at()];
        if slot.is_twin { slot.other.expect("a twin has its main until it is freed") } else { chunk }
    }

    /// Gives up a twin; its main pulls what it had to do.
    pub(super) fn drop_twin(&mut self, twin: ChunkIndex) {
        let main = self.main_of(twin);
        if self.chunks[twin.at()].state == ChunkState::Failed {
            return;
        }
        self.unlist_chunk(twin);
        self.drop_query(self.chunk_query(twin));
        self.chunks[twin.at()].state = ChunkState::Failed;
        for (from, to) in self.todo_range(twin).zip(self.todo_range(main)) {
            let back = std::mem::take(&mut self.chunk_todo[from]) & !self.chunk_begun[to];
            self.chunk_todo[to] |= back;
        }
        self.stop_chunk(twin);
        if self.chunks[main.at()].state == ChunkState::Planes {
            self.list_to_start(main);
        }
        self.settle_chunk(twin);
    }

    /// Gives up a chunk's twin, if it has one.
    pub(super) fn drop_twin_of(&mut self, main: ChunkIndex) {
        if let Some(twin) = self.chunks[main.at()].other {
            self.drop_twin(twin);
        }
    }

    /// Has a plane pulled that `chunk` was to pull, unless its twin, or main, is at it.
    pub(super) fn return_plane(&mut self, chunk: ChunkIndex, plane: u16) {
        let slot = &self.chunks[chunk.at()];
        let to = if slot.state == ChunkState::Failed { self.main_of(chunk) } else { chunk };
        let plane = u32::from(plane);
        let is_at_it = |index: ChunkIndex| {
            let words = self.todo_range(index);
            let (todo, begun) = (&self.chunk_todo[words.clone()], &self.chunk_begun[words]);
            bits::is_set(todo, plane) || bits::is_set(begun, plane)
        };
        if slot.other.is_some_and(is_at_it) {
            return;
        }
        let todo = self.todo_range(to);
        bits::set(&mut self.chunk_todo[todo], plane);
        if self.chunks[to.at()].state == ChunkState::Planes {
            self.list_to_start(to);
        }
    }

    /// The same of a plane of a twin that was given up because of it.
    pub(super) fn return_to_main(&mut self, chunk: ChunkIndex, plane: u16) {
        if self.chunks[chunk.at()].is_twin {
            self.return_plane(chunk, plane);
        }
    }

    /// A plane arrived in the twin, or main, of `chunk`, which need not pull it any more.
    #[cold]
    pub(super) fn arrived_elsewhere(&mut self, chunk: ChunkIndex, plane: u16) {
        self.counters.planes_hedged += u64::from(!self.chunks[chunk.at()].is_twin);
        let words = self.todo_range(chunk);
        bits::clear(&mut self.chunk_todo[words.clone()], u32::from(plane));
        if !self.has_todo(chunk) {
            self.unlist_chunk(chunk);
        }
        if bits::is_set(&self.chunk_begun[words], u32::from(plane)) {
            let is_its = |index: &TransferIndex| {
                let transfer = &self.transfers[index.at()];
                transfer.state == TransferState::Receiving
                    && (transfer.chunk, transfer.plane) == (chunk, plane)
            };
            let planes = usize::from(self.config.active_planes);
            let index = TransferIndex::all(planes).find(is_its).expect("what has begun is receiving");
            self.abandon(index);
        }
        self.settle_chunk(chunk);
    }

    /// Counts a plane of a chunk, or of a twin, as delivered; after the last nothing more is asked for.
    pub(super) fn delivered(&mut self, chunk: ChunkIndex) {
        let main = self.main_of(chunk);
        let slot = &mut self.chunks[main.at()];
        slot.missing -= 1;
        self.jobs[slot.job.at()].delivered += 1;
        let is_whole = slot.missing == 0;
        if is_whole
            && (slot.other.is_some() || !matches!(slot.state, ChunkState::Planes | ChunkState::Draining))
        {
            self.stop_asking(main);
        }
    }

    /// Everything of a chunk was delivered, some of it by its twin.
    fn stop_asking(&mut self, main: ChunkIndex) {
        if matches!(self.chunks[main.at()].state, ChunkState::Lookup | ChunkState::Header) {
            self.drop_query(self.chunk_query(main));
            self.chunks[main.at()].state = ChunkState::Draining;
            self.stop_chunk(main);
        }
        self.drop_twin_of(main);
        self.settle_chunk(main);
    }
}
