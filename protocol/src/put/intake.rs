//! A chunk being pulled into a store: which segments have arrived, which are asked for.
//!
//! Invariants while pulling: `cursor` is the first segment not asked for, of those that have not arrived; `in_flight` is the
//! number of segments below `cursor` that have not arrived.

use std::ops::Range;

use crate::frame::Peer;
use crate::key::Key;
use crate::pull::bits;
use crate::reason::DropReason;
use crate::time::Instant;
use crate::wire::message::{Data, MAX_PULL_RUNS, Run};
use crate::wire::offer::Offer;

use super::rtt::Rtt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IntakeState {
    Free,
    /// Memory was asked for.
    Reserving,
    /// Segments are missing.
    Pulling,
    /// Whole; the caller checks it.
    Judged,
    /// Given up; the event waits to be polled.
    Dropped,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct IntakeSlot {
    pub(super) state: IntakeState,
    pub(super) tag: u32,
    pub(super) from: Peer,
    /// What the data plane calls it, and in which epoch.
    pub(super) offer: u32,
    pub(super) epoch: u64,
    pub(super) key: Key,
    pub(super) header_bytes: u32,
    pub(super) bytes: u32,
    pub(super) segment_bytes: u16,
    pub(super) segments: u32,
    pub(super) arrived: u32,
    pub(super) cursor: u32,
    pub(super) in_flight: u32,
    /// Segments below were asked for at least once.
    pub(super) asked: u32,
    /// The segment whose round trip is being measured, or `u32::MAX`.
    pub(super) timed_segment: u32,
    pub(super) timed_at: Instant,
    pub(super) rto_at: Instant,
    pub(super) rtt: Rtt,
    /// Timeouts since a segment arrived.
    pub(super) backoff: u8,
    /// When something of it arrived last, and after when nobody waits for it any more.
    pub(super) heard_at: Instant,
    pub(super) patience_until: Instant,
    /// Times found corrupt.
    pub(super) corrupt: u8,
}

/// Runs of a PULL, and the segments that they name: all, and those that were asked for before.
pub(super) struct Wanted {
    pub(super) runs: [Run; MAX_PULL_RUNS],
    pub(super) runs_len: usize,
    pub(super) asked: u32,
    pub(super) again: u32,
}

impl IntakeSlot {
    pub(super) fn free(tag: u32, rtt: Rtt) -> IntakeSlot {
        let nobody = Peer { mac: [0; 6], ip: std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), port: 0 };
        IntakeSlot {
            state: IntakeState::Free,
            tag,
            from: nobody,
            offer: 0,
            epoch: 0,
            key: Key([0; 32]),
            header_bytes: 0,
            bytes: 0,
            segment_bytes: 1,
            segments: 0,
            arrived: 0,
            cursor: 0,
            in_flight: 0,
            asked: 0,
            timed_segment: u32::MAX,
            timed_at: Instant::ZERO,
            rto_at: Instant::FAR,
            rtt,
            backoff: 0,
            heard_at: Instant::ZERO,
            patience_until: Instant::FAR,
            corrupt: 0,
        }
    }

    /// Whether this is what `offer` from `from` names.
    pub(super) fn is(&self, from: &Peer, offer: &Offer) -> bool {
        self.is_from(from) && (self.offer, self.epoch, &self.key) == (offer.offer, offer.epoch, &offer.key)
    }

    pub(super) fn is_from(&self, peer: &Peer) -> bool {
        (self.from.ip, self.from.port) == (peer.ip, peer.port)
    }

    /// Takes in a segment; says where in the chunk it belongs.
    #[inline]
    pub(super) fn place(
        &mut self,
        now: Instant,
        from: &Peer,
        data: &Data<'_>,
        arrived: &mut [u64],
    ) -> Result<u64, DropReason> {
        if self.tag != data.tag || self.state != IntakeState::Pulling {
            return Err(DropReason::Stale);
        }
        if !self.is_from(from) {
            return Err(DropReason::WrongStore);
        }
        if self.epoch != data.epoch {
            return Err(DropReason::StaleEpoch);
        }
        if data.segment >= self.segments {
            return Err(DropReason::BadSegment);
        }
        let offset = u64::from(data.segment) * u64::from(self.segment_bytes);
        let bytes = u64::from(self.segment_bytes).min(u64::from(self.bytes) - offset);
        if data.payload.len() as u64 != bytes {
            return Err(DropReason::BadLength);
        }
        if bits::next_clear(arrived, data.segment, data.segment + 1) != data.segment {
            return Err(DropReason::Duplicate);
        }
        bits::set(arrived, data.segment);
        self.arrived += 1;
        self.backoff = 0;
        self.heard_at = now;
        if data.segment < self.cursor {
            self.in_flight -= 1;
            if data.segment == self.timed_segment {
                self.timed_segment = u32::MAX;
                self.rtt.sample(now.nanos().saturating_sub(self.timed_at.nanos()));
            }
            self.rto_at = now.plus_nanos(self.rtt.timeout(0));
        }
        Ok(offset)
    }

    /// The next segments to ask for, at most `budget`; counts them as asked for.
    pub(super) fn want(&mut self, now: Instant, budget: u32, arrived: &[u64]) -> Wanted {
        let mut wanted = Wanted { runs: [Run::default(); MAX_PULL_RUNS], runs_len: 0, asked: 0, again: 0 };
        let before = self.asked;
        let mut cursor = bits::next_clear(arrived, self.cursor, self.segments);
        while cursor < self.segments && wanted.asked < budget && wanted.runs_len < MAX_PULL_RUNS {
            let most = (budget - wanted.asked).min(u32::from(u16::MAX));
            let stop = bits::next_set(arrived, cursor, self.segments.min(cursor + most));
            let count = stop - cursor;
            let count_16 = u16::try_from(count).expect("bounded by `most`");
            wanted.runs[wanted.runs_len] = Run { first: cursor, count: count_16 };
            wanted.runs_len += 1;
            // Karn: only what is asked for once is timed.
            if cursor >= before && self.timed_segment == u32::MAX {
                (self.timed_segment, self.timed_at) = (cursor, now);
            }
            wanted.again += stop.min(before).saturating_sub(cursor);
            wanted.asked += count;
            cursor = bits::next_clear(arrived, stop, self.segments);
        }
        self.cursor = cursor;
        self.asked = before.max(cursor);
        self.in_flight += wanted.asked;
        self.rto_at = now.plus_nanos(self.rtt.timeout(self.backoff));
        wanted
    }

    /// What is in flight is lost: it is to be asked for again.
    pub(super) fn give_up_flight(&mut self, arrived: &[u64]) {
        self.in_flight = 0;
        self.timed_segment = u32::MAX;
        self.backoff = self.backoff.saturating_add(1);
        self.cursor = bits::next_clear(arrived, 0, self.segments);
    }

    /// The segments that hold any of `bytes` are missing again.
    pub(super) fn lose(&mut self, bytes: Range<u64>, arrived: &mut [u64]) {
        let size = u64::from(self.segment_bytes);
        let end = bytes.end.min(u64::from(self.bytes)).div_ceil(size);
        for segment in bytes.start / size..end {
            let segment = u32::try_from(segment).expect("below the chunk's segments");
            if bits::next_set(arrived, segment, segment + 1) == segment {
                bits::clear(arrived, segment);
                self.arrived -= 1;
            }
        }
        self.cursor = bits::next_clear(arrived, 0, self.segments);
    }
}
