//! ICMP errors by which a store cannot be reached. Whoever sees our packets can forge one, and nobody else: only an error that quotes
//! something under way at the store is acted on.
//!
//! The store is silent at once. What is pulled from it is looked up again, at a replica if there is one. An error about a LOOKUP makes
//! the store *gone*: for a while nothing is asked of it, and what no other store should hold is given up without waiting for deadlines. So an
//! error about a PULL alone fails nothing. Somebody who wants something of a store that is gone has it asked, ten times a second, whether it is
//! back.

use crate::chunk::ChunkLayout;
use crate::pull::PathIndex;
use crate::time::Instant;
use crate::wire::message::{self, Quoted};

use super::FetchEngine;
use super::event::{ChunkFailure, StoreIndex};
use super::index::{ChunkIndex, Index};
use super::tables::ChunkState;

/// For how long a store counts as gone. Hosts send few such errors (Linux one a second to one destination, after a few), so that what is
/// asked more often would not be told.
const GONE_NS: u64 = 1_000_000_000;

impl<L: ChunkLayout> FetchEngine<L> {
    /// Takes in that `store` cannot be reached, as an ICMP error says which quotes `quote` of a datagram's payload. Returns whether that
    /// is something under way at the store; nothing is done if it is not.
    pub fn handle_unreachable(&mut self, now: Instant, store: StoreIndex, quote: &[u8]) -> bool {
        self.now = self.now.max(now);
        let quoted = message::quoted(quote)
            .filter(|quoted| store.0 < self.config.stores && self.is_under_way(store, quoted));
        let Some(quoted) = quoted else {
            self.counters.unreachable_unproven += 1;
            return false;
        };
        self.counters.unreachable += 1;
        self.puller.path_mut(PathIndex(store.0)).fall_silent();
        match quoted {
            Quoted::Lookup { .. } => {
                let until = self.now.plus_nanos(GONE_NS);
                self.store(store).gone_until = until;
                self.refuse_queries(store);
            }
            Quoted::Pull { .. } => self.move_waiting(store),
        }
        for index in ChunkIndex::all(self.chunks.len()) {
            if self.chunks[index.at()].store == store {
                self.leave_unreachable(index);
            }
        }
        true
    }

    fn is_under_way(&self, store: StoreIndex, quoted: &Quoted) -> bool {
        match quoted {
            Quoted::Lookup { request, key } => self.is_asked(store, *request, key),
            Quoted::Pull { tag, epoch, sequence } => {
                self.puller.under_way(*sequence, PathIndex(store.0)).is_some_and(|span| {
                    let transfer = &self.transfers[span.at()];
                    (transfer.tag, transfer.epoch) == (*tag, *epoch)
                })
            }
        }
    }

    /// Has a chunk that is pulled looked up again, at a replica if there is one.
    fn leave_unreachable(&mut self, index: ChunkIndex) {
        if self.chunks[index.at()].is_twin {
            return self.drop_twin(index);
        }
        let slot = &self.chunks[index.at()];
        if !matches!(slot.state, ChunkState::Header | ChunkState::Planes) || slot.missing == 0 {
            return;
        }
        if slot.lookups >= self.config.lookup_retries {
            return self.fail_chunk(index, ChunkFailure::Unreachable);
        }
        self.chunks[index.at()].lookups += 1;
        self.counters.lookups_again += 1;
        if self.has_alternative(self.chunk_query(index)) {
            self.counters.failovers += 1;
        }
        self.avoid_present(self.chunk_query(index));
        self.restart_chunk(index);
    }
}
