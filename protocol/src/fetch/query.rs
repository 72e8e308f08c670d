//! Looking keys up: which store is asked for which key, in which LOOKUP, and what becomes of the answers.
//!
//! A *query* is one key that somebody wants to know about: a chunk slot of a fetch, or a place in a lookup's window.
//! Queries wait in a list per store; a LOOKUP takes up to 40 of them, whoever they are for. A query that a store does not
//! answer in time, or answers with "not held", goes to the next of the stores that should hold its key.

use crate::chunk::{ChunkInfo, ChunkLayout};
use crate::key::Key;
use crate::placement::Candidates;
use crate::reason::DropReason;
use crate::time::Instant;
use crate::wire::message::{self, LookupReply, MAX_LOOKUP_KEYS};

use super::config::REQUESTS_PER_STORE;
use super::event::{ChunkFailure, LookupOutcome, Sources, StoreIndex, Transmit};
use super::index::{ChunkIndex, Index, LookupIndex, QueryIndex, RequestIndex};
use super::tables::LookupState;
use super::{FetchEngine, Queued, tag};

/// Times that a key goes from one store that does not answer to the next as soon as one has not; then each is asked once more often before
/// it goes on, and so forth. A LOOKUP keeps its id while it is repeated, so that an answer to any of its transmissions counts, however far the
/// store is.
const HASTY_TRIES: u8 = 4;
/// How often a silent store is asked whether it is back.
const KNOCK_NS: u64 = 100_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueryState {
    Idle,
    /// In its store's list.
    Waiting,
    /// In a LOOKUP under way, at this place.
    Asked(RequestIndex, u8),
}

/// One key that is looked up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Query {
    pub(super) state: QueryState,
    /// The store asked, and its place among the candidates.
    pub(super) store: StoreIndex,
    rank: u8,
    /// Candidates, a bit each, that do not hold the key, or that cannot be reached.
    missing: u8,
    unreachable: u8,
    /// Candidates that are asked only if there is no other.
    avoided: u8,
    /// Times that a store did not answer in time.
    tries: u8,
}

impl Query {
    pub(super) const IDLE: Query = Query {
        state: QueryState::Idle,
        store: StoreIndex(0),
        rank: 0,
        missing: 0,
        unreachable: 0,
        avoided: 0,
        tries: 0,
    };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestState {
    Idle,
    /// To be sent again.
    Due,
    Sent,
}

/// A LOOKUP.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) id: u32,
    pub(super) state: RequestState,
    pub(super) rto_at: Instant,
    first_sent_at: Instant,
    sent_at: Instant,
    /// Times sent; 0 again once it was answered, if only to say that the store is busy.
    sent: u8,
    /// Earlier transmissions may be answered yet, of which `first_sent_at` and `sent` know nothing.
    is_unclear: bool,
    /// Keys it asks for, and queries of them that still want to know.
    keys: u8,
    live: u8,
    queries: [Option<QueryIndex>; MAX_LOOKUP_KEYS],
    /// As it was sent last.
    first_key: Key,
}

impl Request {
    pub(super) fn idle(id: u32) -> Request {
        Request {
            id,
            state: RequestState::Idle,
            rto_at: Instant::FAR,
            first_sent_at: Instant::ZERO,
            sent_at: Instant::ZERO,
            sent: 0,
            is_unclear: false,
            keys: 0,
            live: 0,
            queries: [None; MAX_LOOKUP_KEYS],
            first_key: Key([0; 32]),
        }
    }
}

/// How a LOOKUP was sent that is answered now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) first_at: Instant,
    /// How often; 0 if that is not known.
    pub(super) times: u8,
    /// How long the last transmission was to be waited for, nanoseconds.
    pub(super) wait: u64,
}

impl Request {
    /// How it was sent, once.
    fn take_sent(&mut self) -> Sent {
        let times = std::mem::take(&mut self.sent);
        Sent {
            first_at: self.first_sent_at,
            times: if self.is_unclear { 0 } else { times },
            wait: self.rto_at.nanos().saturating_sub(self.sent_at.nanos()),
        }
    }
}

/// What is known of a key in a lookup's window.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    Waiting,
    Missing,
    Found(ChunkInfo),
}

/// Whom a query is for.
enum Owner {
    Chunk(ChunkIndex),
    Lookup(LookupIndex, usize),
}

impl<L: ChunkLayout> FetchEngine<L> {
    pub(super) fn chunk_query(&self, chunk: ChunkIndex) -> QueryIndex {
        QueryIndex(chunk.0)
    }

    fn lookup_query(&self, lookup: LookupIndex, place: u16) -> QueryIndex {
        let window = u16::try_from(MAX_LOOKUP_KEYS).expect("40");
        QueryIndex(self.config.active_chunks + lookup.0 * window + place)
    }

    fn owner(&self, query: QueryIndex) -> Owner {
        match query.at().checked_sub(self.chunks.len()) {
            None => Owner::Chunk(ChunkIndex(query.0)),
            Some(rest) => {
                let lookup = u16::try_from(rest / MAX_LOOKUP_KEYS).expect("an index of a lookup");
                Owner::Lookup(LookupIndex(lookup), rest % MAX_LOOKUP_KEYS)
            }
        }
    }

    /// The key of a query in use, and the stores that should hold it.
    fn wanted(&self, query: QueryIndex) -> (&Key, Candidates) {
        let per_fetch = self.config.max_chunks_per_fetch as usize;
        let (key, sources) = match self.owner(query) {
            Owner::Chunk(chunk) => {
                let slot = &self.chunks[chunk.at()];
                let key = &self.job_keys[slot.job.at() * per_fetch + slot.chunk as usize];
                (key, self.jobs[slot.job.at()].sources)
            }
            Owner::Lookup(lookup, place) => {
                let job = &self.lookups[lookup.at()];
                (&self.lookup_keys[lookup.at() * per_fetch + job.asked_from as usize + place], job.sources)
            }
        };
        (key, self.candidates(sources, key))
    }

    /// The stores that should hold `key`.
    pub(super) fn candidates(&self, sources: Sources, key: &Key) -> Candidates {
        match sources {
            Sources::One(store) => Candidates::one(store),
            Sources::Placed => self.placement.candidates(key),
        }
    }

    /// The best of `candidates` that is not known to be without the key: the first that answers, else the first.
    fn choose(&self, candidates: &Candidates, missing: u8) -> Option<(u8, StoreIndex)> {
        let held = || {
            (0_u8..)
                .zip(candidates.as_slice().iter().copied())
                .filter(move |(rank, _)| missing >> rank & 1 == 0)
        };
        held().find(|(_, store)| self.path(*store).is_usable(self.now)).or_else(|| held().next())
    }

    /// The store that a chunk not yet opened would be asked of.
    pub(super) fn store_for(&self, sources: Sources, key: &Key) -> StoreIndex {
        let (_, store) = self.choose(&self.candidates(sources, key), 0).expect("a key has a candidate");
        store
    }

    /// Whether another store than the present one may have what `query` wants, and answers.
    pub(super) fn has_alternative(&self, query: QueryIndex) -> bool {
        let Query { rank, missing, unreachable, .. } = self.queries[query.at()];
        let (_, candidates) = self.wanted(query);
        self.choose(&candidates, missing | unreachable | 1 << rank)
            .is_some_and(|(_, other)| self.path(other).is_usable(self.now))
    }

    /// Begins to look a key up anew; gives it up if no store can be reached.
    pub(super) fn ask_first(&mut self, query: QueryIndex) {
        assert_eq!(self.queries[query.at()].state, QueryState::Idle, "a query is under way once");
        let avoided = self.queries[query.at()].avoided;
        self.queries[query.at()] = Query { avoided, ..Query::IDLE };
        if self.ask(query) {
            self.queries[query.at()].avoided = 0;
        } else {
            self.give_up_query(query);
        }
    }

    /// Has the next [`ask_first`](Self::ask_first) of a query prefer another store than the present one.
    pub(super) fn avoid_present(&mut self, query: QueryIndex) {
        let entry = &mut self.queries[query.at()];
        entry.avoided = 1 << entry.rank;
    }

    /// Has the first [`ask_first`](Self::ask_first) of a query prefer another store than the one that `present` asks for the same key.
    pub(super) fn avoid_store_of(&mut self, query: QueryIndex, present: QueryIndex) {
        self.queries[query.at()].avoided = 1 << self.queries[present.at()].rank;
    }

    /// Has the best candidate asked of those that may hold the key and may be reached; false if none is left.
    pub(super) fn ask(&mut self, query: QueryIndex) -> bool {
        let (key, candidates) = self.wanted(query);
        let key = *key;
        self.knock_at_silent(&candidates, &key);
        for (rank, store) in candidates.as_slice().iter().enumerate() {
            let is_gone = self.stores[usize::from(store.0)].is_gone(self.now);
            self.queries[query.at()].unreachable |= u8::from(is_gone) << rank;
        }
        let Query { missing, unreachable, avoided, .. } = self.queries[query.at()];
        let excluded = missing | unreachable;
        let chosen =
            self.choose(&candidates, excluded | avoided).or_else(|| self.choose(&candidates, excluded));
        let Some((rank, store)) = chosen else { return false };
        let entry = &mut self.queries[query.at()];
        (entry.rank, entry.store, entry.state) = (rank, store, QueryState::Waiting);
        if let Owner::Chunk(chunk) = self.owner(query) {
            self.move_chunk(chunk, store);
        }
        self.stores[usize::from(store.0)].waiting.push_back(&mut self.query_links, query);
        self.make_due(store);
        true
    }

    /// Has silent candidates asked now and then whether they are back.
    fn knock_at_silent(&mut self, candidates: &Candidates, key: &Key) {
        let is_alone = candidates.as_slice().len() < 2;
        for store in candidates.as_slice() {
            let is_silent = self.path(*store).is_silent();
            let entry = &mut self.stores[usize::from(store.0)];
            // One that is alone is asked anyway, unless it is gone.
            let knocks = is_silent && (!is_alone || entry.is_gone(self.now));
            if knocks && entry.knock_at <= self.now {
                entry.knock_at = self.now.plus_nanos(KNOCK_NS);
                entry.knock = Some(*key);
                self.make_due(*store);
            }
        }
    }

    pub(super) fn make_due(&mut self, store: StoreIndex) {
        let entry = &mut self.stores[usize::from(store.0)];
        if !entry.is_due {
            entry.is_due = true;
            self.due_stores.push_back(store);
        }
    }

    /// Takes a query back, wherever it is.
    pub(super) fn drop_query(&mut self, query: QueryIndex) {
        let Query { state, store, .. } = self.queries[query.at()];
        self.queries[query.at()].state = QueryState::Idle;
        match state {
            QueryState::Idle => {}
            QueryState::Waiting => {
                self.stores[usize::from(store.0)].waiting.remove(&mut self.query_links, query);
            }
            QueryState::Asked(request, place) => {
                let request = &mut self.requests[request.at()];
                request.queries[usize::from(place)] = None;
                request.live -= 1;
                if request.live == 0 && request.state == RequestState::Due {
                    request.state = RequestState::Idle;
                }
            }
        }
    }

    fn requests_of(store: StoreIndex) -> impl Iterator<Item = RequestIndex> {
        (store.0 * REQUESTS_PER_STORE..(store.0 + 1) * REQUESTS_PER_STORE).map(RequestIndex)
    }

    /// Writes the next LOOKUP, if one is to be sent.
    pub(super) fn send_request(&mut self, now: Instant, out: &mut [u8]) -> Option<Transmit> {
        for _ in 0..self.due_stores.len() {
            let store = self.due_stores.pop_front()?;
            self.stores[usize::from(store.0)].is_due = false;
            if self.path(store).is_busy(self.now) {
                // Made due again when that is over.
                continue;
            }
            // Of those that are idle the one used longest ago: a late answer to it may still tell how far the store is.
            let with = |state| {
                let requests = Self::requests_of(store).filter(|at| self.requests[at.at()].state == state);
                requests.min_by_key(|at| self.requests[at.at()].sent_at)
            };
            let (due, idle) = (with(RequestState::Due), with(RequestState::Idle));
            let request = due.or_else(|| idle.filter(|idle| self.fill_request(store, *idle)));
            let Some(request) = request else { continue };
            self.make_due(store);
            let Some(len) = self.emit_request(store, request, out) else { continue };
            let entry = &mut self.requests[request.at()];
            entry.state = RequestState::Sent;
            if entry.sent == 0 {
                entry.first_sent_at = now;
            }
            entry.sent = entry.sent.saturating_add(1);
            entry.sent_at = now;
            let sent = entry.sent;
            // The first time a replica may be quicker, or the LOOKUP is probed for as the tail of a PULL is; after that it is a matter of a
            // round trip that may be longer than was thought: replicas that are each asked too impatiently are never heard.
            let wait = match (sent - 1).saturating_add(self.tries_of(request)) {
                0 if self.placement.replicas() > 1 => self.hedge_after(store),
                0 => self.path(store).rtt.first_wait(),
                again => self.path(store).rtt.rto(again - 1),
            };
            let rto_at = now.plus_nanos(wait.max(1));
            self.requests[request.at()].rto_at = rto_at;
            self.arm(rto_at);
            self.counters.lookups_sent += 1;
            return Some(Transmit { store, len });
        }
        None
    }

    /// Times that stores have not answered what a LOOKUP asks for.
    fn tries_of(&self, request: RequestIndex) -> u8 {
        let queries = self.requests[request.at()].queries.iter().flatten();
        queries.map(|query| self.queries[query.at()].tries).max().unwrap_or(0)
    }

    /// Moves waiting queries of a store into a LOOKUP that is idle; false if none wait and nobody knocks.
    fn fill_request(&mut self, store: StoreIndex, index: RequestIndex) -> bool {
        let waits = &self.stores[usize::from(store.0)];
        if waits.waiting.is_empty() && waits.knock.is_none() {
            return false;
        }
        let request = &mut self.requests[index.at()];
        *request = Request::idle(tag::next(request.id));
        for place in 0..u8::try_from(MAX_LOOKUP_KEYS).expect("40") {
            let list = &mut self.stores[usize::from(store.0)].waiting;
            let Some(query) = list.pop_front(&mut self.query_links) else { break };
            self.queries[query.at()].state = QueryState::Asked(index, place);
            request.queries[usize::from(place)] = Some(query);
            request.keys += 1;
        }
        request.live = request.keys;
        true
    }

    fn emit_request(&mut self, store: StoreIndex, index: RequestIndex, out: &mut [u8]) -> Option<usize> {
        let mut keys = [Key::default(); MAX_LOOKUP_KEYS];
        let request = self.requests[index.at()];
        let knock = self.stores[usize::from(store.0)].knock.take();
        if request.keys == 0 {
            let key = knock?;
            (self.requests[index.at()].keys, self.requests[index.at()].first_key) = (1, key);
            return message::emit_lookup(out, request.id, [key].iter());
        }
        // Of a query that no longer wants to know, any key will do.
        let first = request.queries.iter().flatten().next().map(|query| *self.wanted(*query).0)?;
        for (key, query) in keys.iter_mut().zip(request.queries) {
            *key = query.map_or(first, |query| *self.wanted(query).0);
        }
        self.requests[index.at()].first_key = keys[0];
        message::emit_lookup(out, request.id, keys[..usize::from(request.keys)].iter())
    }

    /// A LOOKUP was not answered in time: what other stores may know is asked of them, the rest is asked again.
    pub(super) fn request_timed_out(&mut self, store: StoreIndex, index: RequestIndex) {
        let sent = self.requests[index.at()].sent;
        if sent >= 2 {
            self.note_timeout(store);
        }
        if sent > self.tries_of(index) / HASTY_TRIES {
            self.move_request(store, index);
        }
        self.ask_again(store, index);
    }

    /// A store is gone: what it is looked up at is asked of others, or is not to be had.
    pub(super) fn refuse_queries(&mut self, store: StoreIndex) {
        for query in QueryIndex::all(self.queries.len()) {
            let entry = &self.queries[query.at()];
            if entry.state == QueryState::Idle || entry.store != store {
                continue;
            }
            self.drop_query(query);
            if self.ask(query) {
                self.counters.failovers += 1;
            } else {
                self.give_up_query(query);
            }
        }
        for index in Self::requests_of(store) {
            self.requests[index.at()].state = RequestState::Idle;
        }
        self.make_due(store);
    }

    /// No store is left to be asked.
    fn give_up_query(&mut self, query: QueryIndex) {
        let is_unreachable = self.queries[query.at()].unreachable != 0;
        match self.owner(query) {
            Owner::Chunk(chunk) if is_unreachable => self.fail_chunk(chunk, ChunkFailure::Unreachable),
            Owner::Chunk(chunk) => self.fail_chunk(chunk, ChunkFailure::NotStored),
            Owner::Lookup(lookup, _) if is_unreachable => {
                self.finish_lookup(lookup, LookupOutcome::Unreachable);
            }
            Owner::Lookup(lookup, place) => {
                self.lookup_answers[lookup.at() * MAX_LOOKUP_KEYS + place] = Answer::Missing;
                self.advance_lookup(lookup);
            }
        }
    }

    /// Has a store's queries that were not sent asked of others, where they may know.
    pub(super) fn move_waiting(&mut self, store: StoreIndex) {
        for query in QueryIndex::all(self.queries.len()) {
            let entry = &self.queries[query.at()];
            if entry.state == QueryState::Waiting && entry.store == store && self.has_alternative(query) {
                self.drop_query(query);
                self.counters.failovers += 1;
                let asked = self.ask_elsewhere(query, store);
                assert!(asked, "an alternative was seen");
            }
        }
    }

    /// Whether a LOOKUP with this id that asks for `key` first is under way at `store`.
    pub(super) fn is_asked(&self, store: StoreIndex, id: u32, key: &Key) -> bool {
        let index = RequestIndex(tag::slot_of(id));
        self.requests.get(index.at()).is_some_and(|request| {
            request.id == id
                && request.state == RequestState::Sent
                && index.0 / REQUESTS_PER_STORE == store.0
                && request.first_key == *key
        })
    }

    /// Has what a LOOKUP asks for asked of other stores, where they may know.
    fn move_request(&mut self, store: StoreIndex, index: RequestIndex) {
        for query in self.requests[index.at()].queries.into_iter().flatten() {
            if self.has_alternative(query) {
                self.drop_query(query);
                self.counters.failovers += 1;
                let tries = &mut self.queries[query.at()].tries;
                *tries = tries.saturating_add(1);
                let asked = self.ask_elsewhere(query, store);
                assert!(asked, "an alternative was seen");
            }
        }
    }

    /// Sends a LOOKUP once more, if anybody still wants to know.
    fn ask_again(&mut self, store: StoreIndex, index: RequestIndex) {
        let request = &mut self.requests[index.at()];
        request.state = if request.live > 0 { RequestState::Due } else { RequestState::Idle };
        self.make_due(store);
    }

    /// A store has no room for a LOOKUP now: it is sent again when the store is to be asked again.
    pub(super) fn put_off(&mut self, store: StoreIndex, id: u32) -> Result<(), DropReason> {
        let index = RequestIndex(tag::slot_of(id));
        let request = self.requests.get_mut(index.at()).ok_or(DropReason::Stale)?;
        if request.id != id || request.state != RequestState::Sent {
            return Err(DropReason::Stale);
        }
        if index.0 / REQUESTS_PER_STORE != store.0 {
            return Err(DropReason::WrongStore);
        }
        // The store has heard it: waiting begins anew.
        request.is_unclear |= request.sent != 1;
        request.sent = 0;
        self.move_request(store, index);
        self.ask_again(store, index);
        Ok(())
    }

    /// Asks the best candidate other than `store`, which may still turn out to hold the key.
    fn ask_elsewhere(&mut self, query: QueryIndex, store: StoreIndex) -> bool {
        let (rank, missing) = (self.queries[query.at()].rank, self.queries[query.at()].missing);
        assert_eq!(self.queries[query.at()].store, store, "the query was with this store");
        self.queries[query.at()].missing = missing | 1 << rank;
        let asked = self.ask(query);
        self.queries[query.at()].missing = missing;
        asked
    }

    /// Takes in what a store says of the keys of a LOOKUP.
    pub(super) fn handle_reply(
        &mut self,
        now: Instant,
        store: StoreIndex,
        reply: &LookupReply<'_>,
    ) -> Result<(), DropReason> {
        let index = RequestIndex(tag::slot_of(reply.request));
        let request = self.requests.get_mut(index.at()).ok_or(DropReason::Stale)?;
        let is_over = request.sent == 0 && request.state == RequestState::Idle;
        if request.id != reply.request || is_over {
            return Err(DropReason::Stale);
        }
        if index.0 / REQUESTS_PER_STORE != store.0 {
            return Err(DropReason::WrongStore);
        }
        if request.state == RequestState::Idle {
            // Nobody waits for it any more, but the store lives, only farther away than was thought.
            let sent = request.take_sent();
            self.heard_reply(now, store, sent);
            return Err(DropReason::Stale);
        }
        if reply.entries().len() != usize::from(request.keys) {
            return Err(DropReason::BadLength);
        }
        request.state = RequestState::Idle;
        // A copy of the reply says nothing of the round trip.
        let (queries, sent) = (request.queries, request.take_sent());
        self.heard_reply(now, store, sent);
        self.learn_epoch(store, reply.epoch);
        for (query, info) in queries.into_iter().zip(reply.entries()) {
            if let Some(query) = query.filter(
                |query| matches!(self.queries[query.at()].state, QueryState::Asked(by, _) if by == index),
            ) {
                self.queries[query.at()].state = QueryState::Idle;
                self.answer(query, reply.epoch, info);
            }
        }
        self.make_due(store);
        Ok(())
    }

    fn answer(&mut self, query: QueryIndex, epoch: u64, info: Option<ChunkInfo>) {
        let Some(info) = info else {
            let entry = &mut self.queries[query.at()];
            entry.missing |= 1 << entry.rank;
            if self.ask(query) {
                self.counters.failovers += 1;
            } else {
                self.give_up_query(query);
            }
            return;
        };
        match self.owner(query) {
            Owner::Chunk(chunk) => self.looked_up(chunk, epoch, info),
            Owner::Lookup(lookup, place) => {
                self.lookup_answers[lookup.at() * MAX_LOOKUP_KEYS + place] = Answer::Found(info);
                self.advance_lookup(lookup);
            }
        }
    }

    /// Counts the answers that a lookup has from its first key on, and goes on or ends.
    fn advance_lookup(&mut self, index: LookupIndex) {
        let job = &mut self.lookups[index.at()];
        let answers = &self.lookup_answers[index.at() * MAX_LOOKUP_KEYS..][..usize::from(job.asked)];
        while let Some(answer) = answers.get((job.found - job.asked_from) as usize) {
            match answer {
                Answer::Waiting => return,
                Answer::Missing => return self.finish_lookup(index, LookupOutcome::Done),
                Answer::Found(info) => {
                    job.found += 1;
                    job.tokens += u64::from(info.tokens);
                    job.encoded_bytes = job.encoded_bytes.saturating_add(info.chunk_bytes);
                    job.last = Some(*info);
                }
            }
        }
        if job.found == job.keys {
            self.finish_lookup(index, LookupOutcome::Done);
        } else {
            self.look_further(index);
        }
    }

    /// Has a lookup's next keys asked for.
    pub(super) fn look_further(&mut self, index: LookupIndex) {
        let job = &mut self.lookups[index.at()];
        let window = u32::try_from(MAX_LOOKUP_KEYS).expect("40");
        job.asked_from = job.found;
        job.asked = u8::try_from((job.keys - job.found).min(window)).expect("at most 40");
        let asked = job.asked;
        self.lookup_answers[index.at() * MAX_LOOKUP_KEYS..][..usize::from(asked)].fill(Answer::Waiting);
        for place in 0..asked {
            if self.lookups[index.at()].state == LookupState::Running {
                self.ask_first(self.lookup_query(index, u16::from(place)));
            }
        }
    }

    /// Ends a lookup, and whatever it still asks for.
    pub(super) fn finish_lookup(&mut self, index: LookupIndex, outcome: LookupOutcome) {
        let job = &mut self.lookups[index.at()];
        assert_eq!(job.state, LookupState::Running, "a lookup ends once");
        job.state = LookupState::Ended;
        job.outcome = outcome;
        for place in 0..job.asked {
            self.drop_query(self.lookup_query(index, u16::from(place)));
        }
        self.push_event(Queued::LookupDone(index));
    }
}
