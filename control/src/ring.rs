//! A single-producer, single-consumer ring of framed messages in memory shared with another process.
//!
//! ```text
//! cursors: | producer's u64 ... 128 bytes | consumer's u64 ... 128 bytes |
//! data:    | length u64 | payload, padded to 8 | length u64 | payload ...        | wraps
//! ```
//!
//! Cursors count bytes ever written and ever read, so `producer - consumer` is what is in the ring and a cursor
//! modulo the capacity, a power of two, is a position. Frames are multiples of 8 bytes and so is the capacity:
//! a frame's length never wraps, its payload may. Each side owns one cursor and keeps the true value for
//! itself; what it writes to shared memory is only for the peer. The peer's cursor is cached and read again
//! only when the cached one says full (or empty), as s2n-quic does it, and unlike there it is checked: a cursor
//! that went backwards, is not a multiple of 8, or lies outside what this side can have written or read makes
//! the ring [`RingError::PeerCorrupt`] for good. A payload is copied out before anybody looks at it, so the
//! peer cannot change what has been checked.
//!
//! Ordering: a cursor is stored with Release after the bytes it covers, and loaded with Acquire before.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hugepages::Arena;

use crate::message::MAX_MESSAGE_BYTES;

/// Bytes between the two cursors: two cache lines, since x86 fetches lines in pairs.
const CURSOR_STRIDE: usize = 128;
/// Bytes of the shared memory that both cursors take.
pub const CURSORS_BYTES: usize = 2 * CURSOR_STRIDE;
/// Bytes of a frame's length.
const LENGTH_BYTES: usize = 8;
/// Smallest ring, bytes of data.
const LEAST_DATA_BYTES: usize = 64;

/// Why a ring is of no more use, or cannot take a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The peer wrote something that no correct peer writes. The ring stays in this state.
    #[error(
        "the peer corrupted the ring ({what} {value:#x} is impossible): end this session and connect anew"
    )]
    PeerCorrupt {
        /// Which value was impossible.
        what: &'static str,
        /// The value read.
        value: u64,
    },
    /// The message will never fit.
    #[error("a message of {bytes} bytes exceeds the limit of {limit}: split the request")]
    TooLong {
        /// Bytes of the message.
        bytes: usize,
        /// Most that this ring takes.
        limit: usize,
    },
    /// The span does not describe a ring inside the arena.
    #[error("{span:?} is no ring in an arena of {arena_bytes} bytes: the session's layout is wrong")]
    BadSpan {
        /// As given.
        span: RingSpan,
        /// Size of the arena, bytes.
        arena_bytes: usize,
    },
}

/// Where a ring lies in its arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSpan {
    /// Offset of the two cursors, [`CURSORS_BYTES`] long, a multiple of 8; bytes.
    pub cursors: usize,
    /// Offset of the data, a multiple of 8; bytes.
    pub data: usize,
    /// Size of the data, a power of two of at least 64; bytes.
    pub data_bytes: usize,
}

impl RingSpan {
    /// Longest message that the ring takes: half of it, so that any message fits whenever the ring is at most
    /// half full; never more than [`MAX_MESSAGE_BYTES`].
    #[must_use]
    pub fn max_message_bytes(&self) -> usize {
        (self.data_bytes / 2).saturating_sub(LENGTH_BYTES).min(MAX_MESSAGE_BYTES)
    }
}

/// What both ends need: the memory, this side's true cursor, and the last known value of the peer's.
#[derive(Debug)]
struct End {
    arena: Arc<Arena>,
    span: RingSpan,
    own_at: usize,
    peer_at: usize,
    own: u64,
    peer: u64,
    corrupt: Option<RingError>,
}

impl End {
    fn new(arena: Arc<Arena>, span: RingSpan, producer: bool) -> Result<Self, RingError> {
        let arena_bytes = arena.bytes();
        let inside = |offset: usize, bytes: usize| {
            offset.is_multiple_of(8) && offset.checked_add(bytes).is_some_and(|end| end <= arena_bytes)
        };
        if !inside(span.cursors, CURSORS_BYTES)
            || !inside(span.data, span.data_bytes)
            || !span.data_bytes.is_power_of_two()
            || span.data_bytes < LEAST_DATA_BYTES
        {
            return Err(RingError::BadSpan { span, arena_bytes });
        }
        let (first, second) = (span.cursors, span.cursors + CURSOR_STRIDE);
        let (own_at, peer_at) = if producer { (first, second) } else { (second, first) };
        Ok(Self { arena, span, own_at, peer_at, own: 0, peer: 0, corrupt: None })
    }

    fn bad_span(&self) -> RingError {
        RingError::BadSpan { span: self.span, arena_bytes: self.arena.bytes() }
    }

    fn word(&self, offset: usize) -> Result<&AtomicU64, RingError> {
        self.arena.atomic_u64(offset).ok_or_else(|| self.bad_span())
    }

    fn capacity(&self) -> u64 {
        self.span.data_bytes as u64
    }

    /// Offset in the arena of the byte that `cursor` points at.
    fn position(&self, cursor: u64) -> usize {
        self.span.data + as_usize(cursor & (self.capacity() - 1))
    }

    /// Splits `bytes` bytes from `cursor` on where they wrap: what lies before the end of the data.
    fn before_wrap(&self, cursor: u64, bytes: usize) -> usize {
        bytes.min(self.span.data + self.span.data_bytes - self.position(cursor))
    }

    fn publish(&mut self, own: u64) -> Result<(), RingError> {
        self.own = own;
        self.word(self.own_at)?.store(own, Ordering::Release);
        Ok(())
    }

    /// Reads the peer's cursor, which `allowed` must contain, and remembers it.
    fn refresh(&mut self, allowed: std::ops::RangeInclusive<u64>) -> Result<(), RingError> {
        let value = self.word(self.peer_at)?.load(Ordering::Acquire);
        if !allowed.contains(&value) || value % 8 != 0 {
            return Err(self.condemn("cursor", value));
        }
        self.peer = value;
        Ok(())
    }

    fn condemn(&mut self, what: &'static str, value: u64) -> RingError {
        let error = RingError::PeerCorrupt { what, value };
        self.corrupt = Some(error);
        error
    }

    fn check(&self) -> Result<(), RingError> {
        self.corrupt.map_or(Ok(()), Err)
    }
}

/// A frame's bytes in the ring: the length and the padded payload.
const fn frame_bytes(payload: usize) -> u64 {
    (LENGTH_BYTES + payload.next_multiple_of(8)) as u64
}

const _: () = assert!(usize::BITS == 64, "cursors and sizes are 64 bits wide");

#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits: asserted above")]
const fn as_usize(value: u64) -> usize {
    value as usize
}

/// The producing end.
#[derive(Debug)]
pub struct Sender(End);

/// The consuming end.
#[derive(Debug)]
pub struct Receiver(End);

impl Sender {
    /// The producing end of the ring at `span`, whose memory is still all zero.
    ///
    /// # Errors
    /// [`RingError::BadSpan`] when the ring does not lie inside the arena.
    pub fn new(arena: Arc<Arena>, span: RingSpan) -> Result<Self, RingError> {
        End::new(arena, span, true).map(Self)
    }

    /// Puts one message into the ring; `false` if there is no room for it now.
    ///
    /// # Errors
    /// [`RingError::TooLong`] if it will never fit, [`RingError::PeerCorrupt`] when the peer misbehaved.
    pub fn try_send(&mut self, message: &[u8]) -> Result<bool, RingError> {
        self.0.check()?;
        let limit = self.0.span.max_message_bytes();
        if message.len() > limit {
            return Err(RingError::TooLong { bytes: message.len(), limit });
        }
        let frame = frame_bytes(message.len());
        if !self.has_room(frame)? {
            return Ok(false);
        }
        let end = &mut self.0;
        end.word(end.position(end.own))?.store((message.len() as u64).to_le(), Ordering::Relaxed);
        let payload = end.own + LENGTH_BYTES as u64;
        let split = end.before_wrap(payload, message.len());
        let (head, tail) = message.split_at(split);
        let bad_span = end.bad_span();
        end.arena.copy_in(end.position(payload), head).map_err(|_| bad_span)?;
        end.arena.copy_in(end.span.data, tail).map_err(|_| bad_span)?;
        end.publish(end.own + frame)?;
        Ok(true)
    }

    fn has_room(&mut self, frame: u64) -> Result<bool, RingError> {
        let end = &mut self.0;
        // Cannot wrap: 2^64 bytes never pass through, and `peer <= own` always.
        if end.own - end.peer + frame <= end.capacity() {
            return Ok(true);
        }
        end.refresh(end.peer..=end.own)?;
        Ok(end.own - end.peer + frame <= end.capacity())
    }
}

impl Receiver {
    /// The consuming end of the ring at `span`, whose memory is still all zero.
    ///
    /// # Errors
    /// [`RingError::BadSpan`] when the ring does not lie inside the arena.
    pub fn new(arena: Arc<Arena>, span: RingSpan) -> Result<Self, RingError> {
        End::new(arena, span, false).map(Self)
    }

    /// Takes one message into `out`, replacing what was there; `false`, with `out` empty, if there is none now.
    ///
    /// # Errors
    /// [`RingError::PeerCorrupt`] when the peer misbehaved; `out` is empty then.
    pub fn try_receive(&mut self, out: &mut Vec<u8>) -> Result<bool, RingError> {
        out.clear();
        if self.is_empty()? {
            return Ok(false);
        }
        let end = &mut self.0;
        // Read once: what is checked is what is used.
        let length = u64::from_le(end.word(end.position(end.own))?.load(Ordering::Relaxed));
        if length > end.span.max_message_bytes() as u64 {
            return Err(end.condemn("frame length", length));
        }
        let bytes = as_usize(length);
        let frame = frame_bytes(bytes);
        if frame > end.peer - end.own {
            return Err(end.condemn("frame length", length));
        }
        out.resize(bytes, 0);
        let payload = end.own + LENGTH_BYTES as u64;
        let split = end.before_wrap(payload, bytes);
        let (head, tail) = out.split_at_mut(split);
        let bad_span = end.bad_span();
        end.arena.copy_out(end.position(payload), head).map_err(|_| bad_span)?;
        end.arena.copy_out(end.span.data, tail).map_err(|_| bad_span)?;
        end.publish(end.own + frame)?;
        Ok(true)
    }

    /// Whether there is nothing to receive now.
    ///
    /// # Errors
    /// [`RingError::PeerCorrupt`] when the peer misbehaved.
    pub fn is_empty(&mut self) -> Result<bool, RingError> {
        let end = &mut self.0;
        end.check()?;
        if end.peer == end.own {
            // At least what was known, at most one whole ring ahead.
            end.refresh(end.own..=end.own.saturating_add(end.capacity()))?;
        }
        Ok(end.peer == end.own)
    }

    /// Whether at most half of the ring is in use, as far as this side knows: then any message fits.
    #[must_use]
    pub fn is_half_empty(&self) -> bool {
        self.0.peer - self.0.own <= self.0.capacity() / 2
    }
}
