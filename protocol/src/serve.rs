//! The store's engine: answers lookups and sends the segments it was asked for, oldest request first.
//!
//! It keeps no state per fetch: what is pending lives in rings of fixed size, and a request that finds its
//! ring full is dropped and counted, for the receiver asks again.
//!
//! Call order: [`ServeEngine::handle_datagram`] for each received payload, then [`ServeEngine::poll_transmit`] until it
//! returns `None` or the transmit queue is full.

use std::collections::VecDeque;
use std::ops::Range;

use crate::chunk::ChunkInfo;
use crate::frame::Peer;
use crate::key::Key;
use crate::reason::DropReason;
use crate::wire::message::{
    self, Data, ErrorCode, MAX_LOOKUP_KEYS, MAX_PULL_RUNS, Message, Pull, PullRange, Refusal, Run,
    SEGMENT_ALIGN,
};

/// The chunks that a store holds.
pub trait ChunkSource {
    /// What is known of the chunk with this key.
    fn find(&self, key: &Key) -> Option<ChunkInfo>;
    /// The encoded bytes of the chunk with this handle.
    fn bytes(&self, handle: u32) -> Option<&[u8]>;
}

/// Limits of a store's engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServeConfig {
    /// Differs between any two runs of the store that number chunks differently: the time of its start in nanoseconds
    /// serves. Not zero.
    pub epoch: u64,
    /// PULLs that may wait, each about 600 bytes of memory.
    pub max_pending_pulls: usize,
    /// Lookup replies that may wait, each about 2 kB of memory, and as many errors.
    pub max_pending_replies: usize,
    /// Largest segment that fits a packet here; a PULL that wants larger ones is refused.
    pub max_segment_bytes: u16,
    /// Most segments that one PULL may ask for.
    pub max_pull_segments: u32,
}

impl Default for ServeConfig {
    /// 1,024 PULLs of at most 4,096 segments, 256 replies, segments for an MTU of 1,500 over IPv4.
    fn default() -> Self {
        ServeConfig {
            epoch: 1,
            max_pending_pulls: 1024,
            max_pending_replies: 256,
            max_segment_bytes: 1440,
            max_pull_segments: 4096,
        }
    }
}

/// A message to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeTransmit {
    /// To whom: the address that the request came from.
    pub to: Peer,
    /// Bytes written to `out`.
    pub header_bytes: usize,
    /// The chunk's handle and the bytes of it that follow those in `out`. The caller copies or attaches them; if
    /// the chunk is gone by then, it sends nothing.
    pub payload: Option<(u32, Range<usize>)>,
}

/// What a store's engine has done; all counts start at zero and only grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServeCounters {
    /// Datagrams given to the engine: accepted and dropped.
    pub datagrams: u64,
    /// LOOKUPs accepted.
    pub lookups: u64,
    /// Keys of those, and how many were found.
    pub keys: u64,
    /// Keys that were found.
    pub keys_found: u64,
    /// PULLs accepted.
    pub pulls: u64,
    /// PULLs answered with an ERROR.
    pub refused: u64,
    /// DATA messages handed out.
    pub segments: u64,
    /// Their payload.
    pub payload_bytes: u64,
    /// Datagrams dropped, by [`DropReason::index`].
    pub drops: [u64; DropReason::COUNT],
}

#[derive(Clone, Copy, Debug)]
struct PendingPull {
    to: Peer,
    range: PullRange,
    sequence: u32,
    runs: [Run; MAX_PULL_RUNS],
    runs_len: usize,
    /// The run being sent, and how many of its segments are sent.
    run: usize,
    sent: u16,
}

#[derive(Clone, Copy, Debug)]
struct PendingReply {
    to: Peer,
    request: u32,
    len: usize,
    entries: [Option<ChunkInfo>; MAX_LOOKUP_KEYS],
}

/// The store's side of the protocol, for one queue; queues share nothing.
#[derive(Debug)]
pub struct ServeEngine {
    config: ServeConfig,
    /// These rings have their capacity from the start and never grow.
    pulls: VecDeque<PendingPull>,
    replies: VecDeque<PendingReply>,
    refusals: VecDeque<(Peer, Refusal)>,
    counters: ServeCounters,
}

impl ServeEngine {
    /// An engine with nothing pending. All memory is allocated here.
    pub fn new(config: ServeConfig) -> ServeEngine {
        let counters = ServeCounters {
            datagrams: 0,
            lookups: 0,
            keys: 0,
            keys_found: 0,
            pulls: 0,
            refused: 0,
            segments: 0,
            payload_bytes: 0,
            drops: [0; DropReason::COUNT],
        };
        ServeEngine {
            config,
            pulls: VecDeque::with_capacity(config.max_pending_pulls),
            replies: VecDeque::with_capacity(config.max_pending_replies),
            refusals: VecDeque::with_capacity(config.max_pending_replies),
            counters,
        }
    }

    /// Takes in a UDP payload that came from `from`. An error is counted already.
    pub fn handle_datagram(
        &mut self,
        from: Peer,
        payload: &[u8],
        source: &impl ChunkSource,
    ) -> Result<(), DropReason> {
        self.counters.datagrams += 1;
        let result = match Message::new_checked(payload) {
            Ok(Message::Lookup(lookup)) => self.handle_lookup(from, &lookup, source),
            Ok(Message::Pull(pull)) => self.handle_pull(from, &pull, source),
            Ok(Message::LookupReply(_) | Message::Data(_) | Message::Error(_)) => Err(DropReason::BadType),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = result {
            self.counters.drops[reason.index()] += 1;
        }
        result
    }

    fn handle_lookup(
        &mut self,
        from: Peer,
        lookup: &message::Lookup<'_>,
        source: &impl ChunkSource,
    ) -> Result<(), DropReason> {
        if self.replies.len() >= self.config.max_pending_replies {
            return Err(DropReason::QueueFull);
        }
        let mut entries = [None; MAX_LOOKUP_KEYS];
        let len = lookup.keys().len();
        for (slot, key) in entries.iter_mut().zip(lookup.keys()) {
            *slot = source.find(&key);
            self.counters.keys_found += u64::from(slot.is_some());
            self.counters.keys += 1;
        }
        self.counters.lookups += 1;
        self.replies.push_back(PendingReply { to: from, request: lookup.request, len, entries });
        Ok(())
    }

    fn handle_pull(
        &mut self,
        from: Peer,
        pull: &Pull<'_>,
        source: &impl ChunkSource,
    ) -> Result<(), DropReason> {
        if let Err(code) = self.check_pull(pull, source) {
            if self.refusals.len() >= self.config.max_pending_replies {
                return Err(DropReason::QueueFull);
            }
            self.counters.refused += 1;
            let (tag, sequence) = (pull.range.tag, pull.sequence);
            let refusal = Refusal { tag, code, epoch: self.config.epoch, sequence };
            self.refusals.push_back((from, refusal));
            return Ok(());
        }
        if self.pulls.len() >= self.config.max_pending_pulls {
            return Err(DropReason::QueueFull);
        }
        let mut runs = [Run::default(); MAX_PULL_RUNS];
        let runs_len = pull.runs().len();
        for (slot, run) in runs.iter_mut().zip(pull.runs()) {
            *slot = run;
        }
        self.counters.pulls += 1;
        let (range, sequence) = (pull.range, pull.sequence);
        self.pulls.push_back(PendingPull { to: from, range, sequence, runs, runs_len, run: 0, sent: 0 });
        Ok(())
    }

    fn check_pull(&self, pull: &Pull<'_>, source: &impl ChunkSource) -> Result<(), ErrorCode> {
        let range = &pull.range;
        if range.epoch != self.config.epoch {
            return Err(ErrorCode::StaleEpoch);
        }
        let held = source.bytes(range.handle).ok_or(ErrorCode::UnknownHandle)?.len() as u64;
        let size = range.segment_bytes;
        if size == 0
            || !size.is_multiple_of(SEGMENT_ALIGN)
            || size > self.config.max_segment_bytes
            || range.bytes == 0
        {
            return Err(ErrorCode::BadRequest);
        }
        if range.offset.checked_add(u64::from(range.bytes)).is_none_or(|end| end > held) {
            return Err(ErrorCode::OutOfRange);
        }
        let segments = u64::from(message::segments(range.bytes, size));
        let mut asked = 0_u64;
        for run in pull.runs() {
            asked += u64::from(run.count);
            if run.count == 0 || u64::from(run.first) + u64::from(run.count) > segments {
                return Err(ErrorCode::BadRequest);
            }
        }
        if asked > u64::from(self.config.max_pull_segments) {
            return Err(ErrorCode::BadRequest);
        }
        Ok(())
    }

    /// Writes the next message, or the header of the next DATA message, to `out`, which must hold
    /// [`message::MAX_CONTROL_BYTES`]; with less room than the message needs, it is given up, as if lost.
    pub fn poll_transmit(&mut self, out: &mut [u8]) -> Option<ServeTransmit> {
        while let Some((to, refusal)) = self.refusals.pop_front() {
            if let Some(header_bytes) = message::emit_error(out, &refusal) {
                return Some(ServeTransmit { to, header_bytes, payload: None });
            }
        }
        while let Some(reply) = self.replies.pop_front() {
            let entries = reply.entries[..reply.len].iter().copied();
            let written = message::emit_lookup_reply(out, reply.request, self.config.epoch, entries);
            if let Some(header_bytes) = written {
                return Some(ServeTransmit { to: reply.to, header_bytes, payload: None });
            }
        }
        self.next_segment(out)
    }

    fn next_segment(&mut self, out: &mut [u8]) -> Option<ServeTransmit> {
        let pull = self.pulls.front_mut()?;
        let (to, range, sequence) = (pull.to, pull.range, pull.sequence);
        let run = pull.runs[pull.run];
        let segment = run.first + u32::from(pull.sent);
        pull.sent += 1;
        if pull.sent == run.count {
            pull.sent = 0;
            pull.run += 1;
            if pull.run == pull.runs_len {
                self.pulls.pop_front();
            }
        }
        let (tag, epoch) = (range.tag, range.epoch);
        let data = Data { tag, segment, epoch, sequence, waited_ns: 0, payload: &[] };
        let header_bytes = message::emit_data_header(out, &data)?;
        let begin = u64::from(segment) * u64::from(range.segment_bytes);
        let end = (begin + u64::from(range.segment_bytes)).min(u64::from(range.bytes));
        // Both lie within a slice of the source, as checked on arrival.
        let first = usize::try_from(range.offset + begin).ok()?;
        let last = usize::try_from(range.offset + end).ok()?;
        self.counters.segments += 1;
        self.counters.payload_bytes += end - begin;
        Some(ServeTransmit { to, header_bytes, payload: Some((range.handle, first..last)) })
    }

    /// Whether nothing waits to be sent.
    pub fn idle(&self) -> bool {
        self.pulls.is_empty() && self.replies.is_empty() && self.refusals.is_empty()
    }

    /// PULLs that wait or are being served.
    pub fn pending_pulls(&self) -> usize {
        self.pulls.len()
    }

    /// What this engine has done.
    pub fn counters(&self) -> &ServeCounters {
        &self.counters
    }
}
