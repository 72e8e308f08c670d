//! The store's engine: answers lookups and sends the segments it was asked for, in turns between those who asked.
//!
//! It keeps no state per fetch: what is pending lives in tables of fixed size, and a request that finds no room is
//! answered *busy*, with the time after which there should be some.
//!
//! Call order: [`ServeEngine::handle_datagram`] for each received payload, then [`ServeEngine::poll_transmit`] until it
//! returns `None` or the transmit queue is full, and again no later than [`ServeEngine::poll_timeout`].

mod turns;

use std::collections::VecDeque;
use std::ops::Range;

use crate::chunk::ChunkInfo;
use crate::frame::Peer;
use crate::key::Key;
use crate::reason::DropReason;
use crate::time::Instant;
use crate::wire::message::{
    self, Data, ErrorCode, MAX_LOOKUP_KEYS, Message, Probe, Pull, PullRange, Refusal, SEGMENT_ALIGN, Subject,
};

use turns::{Full, PendingPull, Turns};

/// The chunks that a store holds.
pub trait ChunkSource {
    /// What is known of the chunk with this key.
    fn find(&self, key: &Key) -> Option<ChunkInfo>;
    /// How many encoded bytes the chunk with this handle has, as long as it is held.
    fn chunk_bytes(&self, handle: u32) -> Option<u64>;
}

/// Limits of a store's engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServeConfig {
    /// Differs between any two runs of the store that number chunks differently: the time of its start in nanoseconds
    /// serves. Not zero.
    pub epoch: u64,
    /// PULLs that may wait, each about 600 bytes of memory. One requester may hold as many as remain free: half at most.
    pub max_pending_pulls: usize,
    /// Bytes of chunks that may wait to be sent. One requester may hold as many as remain free; a PULL for more than half is
    /// refused.
    pub max_pending_bytes: u64,
    /// Lookup replies that may wait, each about 2 kB of memory, and as many errors.
    pub max_pending_replies: usize,
    /// Requesters (UDP ports of data planes) that may have PULLs waiting.
    pub max_requesters: u16,
    /// Bytes that a data plane is sent before it is the next one's turn.
    pub turn_bytes: u32,
    /// Largest segment that fits a packet here; a PULL that wants larger ones is refused.
    pub max_segment_bytes: u16,
    /// Most segments that one PULL may ask for.
    pub max_pull_segments: u32,
}

impl Default for ServeConfig {
    /// 1,024 PULLs of at most 4,096 segments and 64 MiB, of 256 requesters in turns of 32 KiB; 256 replies; segments for an MTU
    /// of 1,500 over IPv4.
    fn default() -> Self {
        ServeConfig {
            epoch: 1,
            max_pending_pulls: 1024,
            max_pending_bytes: 64 << 20,
            max_pending_replies: 256,
            max_requesters: 256,
            turn_bytes: 32 << 10,
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
    /// PULLs that cannot be served, answered with an ERROR.
    pub refused: u64,
    /// PULLs and LOOKUPs for which there was no room, answered with the ERROR that says so.
    pub busy: u64,
    /// PROBEs accepted.
    pub probes: u64,
    /// DATA messages handed out.
    pub segments: u64,
    /// Their payload.
    pub payload_bytes: u64,
    /// Datagrams dropped, by [`DropReason::index`].
    pub drops: [u64; DropReason::COUNT],
}

#[derive(Clone, Copy, Debug)]
struct PendingReply {
    to: Peer,
    request: u32,
    len: usize,
    entries: [Option<ChunkInfo>; MAX_LOOKUP_KEYS],
}

/// PROBEs that may wait for their reply; more are dropped, and sent again.
const PENDING_PROBES: usize = 16;
/// Assumed before anything was sent: 10 Gbit/s.
const FIRST_RATE_BYTES_PER_US: u64 = 1250;
/// A busy answer never sends anybody away for longer.
const MAX_RETRY_US: u32 = 100_000;
/// The rate is measured over spans of this length in which there was always something to send.
const RATE_SPAN_NANOS: u64 = 500_000;

/// How fast this queue gets rid of what it is asked for, for the hint of a busy answer.
#[derive(Clone, Copy, Debug)]
struct Rate {
    bytes_per_us: u64,
    since: Instant,
    bytes: u64,
}

impl Rate {
    fn sent(&mut self, now: Instant, bytes: u64) {
        self.bytes += bytes;
        let nanos = now.nanos().saturating_sub(self.since.nanos());
        if nanos >= RATE_SPAN_NANOS {
            let measured = self.bytes.saturating_mul(1000) / nanos;
            self.bytes_per_us = ((3 * self.bytes_per_us + measured) / 4).max(1);
            self.restart(now);
        }
    }

    fn restart(&mut self, now: Instant) {
        (self.since, self.bytes) = (now, 0);
    }

    fn micros(&self, bytes: u64) -> u32 {
        u32::try_from(bytes / self.bytes_per_us).unwrap_or(u32::MAX).clamp(20, MAX_RETRY_US)
    }
}

/// The store's side of the protocol, for one queue; queues share nothing.
#[derive(Debug)]
pub struct ServeEngine {
    config: ServeConfig,
    turns: Turns,
    /// These rings have their capacity from the start and never grow.
    replies: VecDeque<PendingReply>,
    refusals: VecDeque<(Peer, Refusal)>,
    probes: VecDeque<(Peer, Probe)>,
    rate: Rate,
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
            busy: 0,
            probes: 0,
            segments: 0,
            payload_bytes: 0,
            drops: [0; DropReason::COUNT],
        };
        let turns = Turns::new(
            config.max_pending_pulls,
            config.max_pending_bytes,
            config.max_requesters,
            config.turn_bytes,
        );
        ServeEngine {
            config,
            turns,
            replies: VecDeque::with_capacity(config.max_pending_replies),
            refusals: VecDeque::with_capacity(config.max_pending_replies),
            probes: VecDeque::with_capacity(PENDING_PROBES),
            rate: Rate { bytes_per_us: FIRST_RATE_BYTES_PER_US, since: Instant::ZERO, bytes: 0 },
            counters,
        }
    }

    /// Takes in a UDP payload that came from `from`. An error is counted already.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        from: Peer,
        payload: &[u8],
        source: &impl ChunkSource,
    ) -> Result<(), DropReason> {
        self.counters.datagrams += 1;
        let result = match Message::new_checked(payload) {
            Ok(Message::Lookup(lookup)) => self.handle_lookup(from, &lookup, source),
            Ok(Message::Pull(pull)) => self.handle_pull(now, from, &pull, source),
            Ok(Message::Probe(probe)) => self.handle_probe(from, probe),
            Ok(Message::LookupReply(_) | Message::Data(_) | Message::Error(_) | Message::ProbeReply(_)) => {
                Err(DropReason::BadType)
            }
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
            // Replies go first, so this many are gone as soon as the device takes them.
            let full = Full { drain_bytes: (self.replies.len() * message::MAX_REPLY_BYTES) as u64 };
            return self.answer_busy(from, Subject::Lookup, (lookup.request, 0), full);
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
        now: Instant,
        from: Peer,
        pull: &Pull<'_>,
        source: &impl ChunkSource,
    ) -> Result<(), DropReason> {
        let bytes = match self.check_pull(pull, source) {
            Ok(bytes) => bytes,
            Err(code) => {
                let refusal = Refusal::of_pull(pull.range.tag, pull.sequence, code, self.config.epoch);
                self.refuse(from, refusal)?;
                self.counters.refused += 1;
                return Ok(());
            }
        };
        if let Err(full) = self.turns.admit(&from, bytes) {
            return self.answer_busy(from, Subject::Pull, (pull.range.tag, pull.sequence), full);
        }
        if self.turns.is_empty() {
            self.rate.restart(now);
        }
        self.counters.pulls += 1;
        self.turns.push(from, PendingPull::new(now, pull, bytes), |pending| {
            for (slot, run) in pending.runs.iter_mut().zip(pull.runs()) {
                *slot = run;
                pending.runs_len += 1;
            }
        });
        Ok(())
    }

    fn handle_probe(&mut self, from: Peer, probe: Probe) -> Result<(), DropReason> {
        if self.probes.len() >= PENDING_PROBES {
            return Err(DropReason::QueueFull);
        }
        self.counters.probes += 1;
        self.probes.push_back((from, Probe { epoch: self.config.epoch, ..probe }));
        Ok(())
    }

    fn answer_busy(
        &mut self,
        to: Peer,
        subject: Subject,
        (tag, sequence): (u32, u32),
        full: Full,
    ) -> Result<(), DropReason> {
        let (epoch, retry_us) = (self.config.epoch, self.rate.micros(full.drain_bytes));
        self.refuse(to, Refusal { tag, subject, code: ErrorCode::Busy, epoch, sequence, retry_us })?;
        self.counters.busy += 1;
        Ok(())
    }

    fn refuse(&mut self, to: Peer, refusal: Refusal) -> Result<(), DropReason> {
        if self.refusals.len() >= self.config.max_pending_replies {
            return Err(DropReason::QueueFull);
        }
        self.refusals.push_back((to, refusal));
        Ok(())
    }

    /// The bytes that the PULL asks for, if it can be served.
    fn check_pull(&self, pull: &Pull<'_>, source: &impl ChunkSource) -> Result<u64, ErrorCode> {
        let range = &pull.range;
        if range.epoch != self.config.epoch {
            return Err(ErrorCode::StaleEpoch);
        }
        let held = source.chunk_bytes(range.handle).ok_or(ErrorCode::UnknownHandle)?;
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
        let (mut asked, mut bytes) = (0_u64, 0_u64);
        for run in pull.runs() {
            let end = u64::from(run.first) + u64::from(run.count);
            if run.count == 0 || end > segments {
                return Err(ErrorCode::BadRequest);
            }
            asked += u64::from(run.count);
            let begin = u64::from(run.first) * u64::from(size);
            bytes += (end * u64::from(size)).min(u64::from(range.bytes)) - begin;
        }
        if asked > u64::from(self.config.max_pull_segments) || bytes > self.config.max_pending_bytes / 2 {
            return Err(ErrorCode::BadRequest);
        }
        Ok(bytes)
    }

    /// Writes the next message, or the header of the next DATA message, to `out`, which must hold
    /// [`message::MAX_CONTROL_BYTES`], and the largest payload of the MTU if PROBEs are to be answered; with less room than
    /// the message needs, it is given up, as if lost.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<ServeTransmit> {
        self.next_answer(out).or_else(|| self.next_segment(now, out))
    }

    /// Errors, replies to LOOKUPs and to PROBEs go before DATA.
    #[inline]
    fn next_answer(&mut self, out: &mut [u8]) -> Option<ServeTransmit> {
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
        while let Some((to, probe)) = self.probes.pop_front() {
            if let Some(header_bytes) = message::emit_probe(out, &probe, true) {
                return Some(ServeTransmit { to, header_bytes, payload: None });
            }
        }
        None
    }

    #[inline]
    fn next_segment(&mut self, now: Instant, out: &mut [u8]) -> Option<ServeTransmit> {
        let next = self.turns.next(now).ok()?;
        let PullRange { tag, handle, epoch, offset, segment_bytes, .. } = next.range;
        let turns::Segment { segment, sequence, waited_ns, .. } = next;
        let data = Data { tag, segment, epoch, sequence, waited_ns, payload: &[] };
        let header_bytes = message::emit_data_header(out, &data)?;
        // Both lie within a slice of the source, as checked on arrival.
        let first = usize::try_from(offset + u64::from(next.segment) * u64::from(segment_bytes)).ok()?;
        let last = first + next.bytes as usize;
        self.rate.sent(now, next.bytes.into());
        self.counters.segments += 1;
        self.counters.payload_bytes += u64::from(next.bytes);
        Some(ServeTransmit { to: next.to, header_bytes, payload: Some((handle, first..last)) })
    }

    /// When [`ServeEngine::poll_transmit`] has something to send, if ever: in the past unless every requester with PULLs asked
    /// for a pace.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let answers = !(self.refusals.is_empty() && self.replies.is_empty() && self.probes.is_empty());
        if answers { Some(Instant::ZERO) } else { self.turns.poll_timeout() }
    }

    /// Whether nothing waits to be sent.
    pub fn idle(&self) -> bool {
        self.turns.is_empty() && self.refusals.is_empty() && self.replies.is_empty() && self.probes.is_empty()
    }

    /// PULLs that wait or are being served.
    pub fn pending_pulls(&self) -> usize {
        self.turns.pulls()
    }

    /// Bytes of chunks that are still to be sent.
    pub fn pending_bytes(&self) -> u64 {
        self.turns.bytes()
    }

    /// Most PULLs, and most bytes, that one requester has waiting.
    pub fn largest_requester(&self) -> (usize, u64) {
        self.turns.largest()
    }

    /// What this engine has done.
    pub fn counters(&self) -> &ServeCounters {
        &self.counters
    }
}
