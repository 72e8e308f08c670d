//! How large a message the path to a store carries, found out by sending some (after RFC 8899): no router is believed.
//!
//! A PROBE of a size is answered by a PROBE_REPLY of that size, so one that comes back has shown both directions. The largest size that
//! the own port allows is tried first, then sizes between what is known to arrive and what did not, and the size in use is tried again
//! from time to time: a path may change. A size counts as not carried after three probes without an answer, but only on a path that
//! answers at all: else the least size is tried until it does (RFC 8899's base state), and then all the others. What an ICMP message says,
//! and that large segments stay away, can only make that be looked at sooner.
//!
//! Call order: [`PathMtu::poll_transmit`] when [`PathMtu::poll_timeout`] is reached, [`PathMtu::handle_reply`] for each PROBE_REPLY;
//! [`PathMtu::bytes`] is what may be used.

use std::time::Duration;

use crate::time::{Instant, nanos_of};
use crate::wire::message::{self, PROBE_HEADER_BYTES, Probe};

/// Unanswered probes after which a size counts as not carried.
const TRIES: u8 = 3;
/// Time that a probe has to be answered.
const PATIENCE_NANOS: u64 = 200_000_000;
/// The same where large segments stay away, at least: a round trip is known then, and a few of them are enough.
const LEAST_PATIENCE_NANOS: u64 = 5_000_000;
const PATIENCE_ROUND_TRIPS: u32 = 8;
/// Sizes nearer to each other than this are not told apart.
const GRAIN_BYTES: u16 = 64;
/// Time after which the size in use is tried again.
const CONFIRM_NANOS: u64 = 10_000_000_000;
/// Time after which larger sizes are tried again.
const RAISE_NANOS: u64 = 60_000_000_000;

/// What is being asked of the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// Whether it carries more: sizes from `bytes` on, but not `fails_from`.
    Searching { fails_from: u16 },
    /// Whether it still carries what is in use.
    Confirming,
    /// Whether it carries anything: the least size, until there is an answer. If that is all that is to be known, the answer ends the
    /// search, else it begins one.
    Reviving { then_search: bool },
    /// Nothing, until `next_at`.
    Resting,
}

/// The search of one path.
#[derive(Clone, Debug)]
pub struct PathMtu {
    /// Always carried: the protocol asks it of every path.
    least: u16,
    /// What the own port allows.
    most: u16,
    bytes: u16,
    doing: Doing,
    /// The probe under way, if one is.
    probe: Option<Probe>,
    tries: u8,
    /// Whether anything was answered since the search began.
    is_answered: bool,
    /// Time that each probe has.
    patience_nanos: u64,
    next_id: u32,
    next_at: Instant,
    raise_at: Instant,
}

impl PathMtu {
    /// For messages of `least` to `most` bytes, of which `least` are carried without question. `seed` differs from run to run and path
    /// to path.
    pub fn new(least: u16, most: u16, seed: u32) -> PathMtu {
        let least = least.max(u16::try_from(PROBE_HEADER_BYTES).unwrap_or(u16::MAX));
        let most = most.max(least);
        PathMtu {
            least,
            most,
            bytes: least,
            doing: if most > least { Doing::Searching { fails_from: u16::MAX } } else { Doing::Resting },
            probe: None,
            tries: 0,
            is_answered: false,
            patience_nanos: PATIENCE_NANOS,
            next_id: seed,
            next_at: if most > least { Instant::ZERO } else { Instant::FAR },
            raise_at: Instant::FAR,
        }
    }

    /// Bytes of the largest message that the path is known to carry.
    pub fn bytes(&self) -> u16 {
        self.bytes
    }

    /// The size to be tried: first the most, then the middle between what is carried and what is not.
    fn candidate(&self) -> u16 {
        match self.doing {
            Doing::Searching { fails_from } if fails_from > self.most => self.most,
            Doing::Searching { fails_from } => self.bytes + (fails_from - self.bytes) / 2,
            Doing::Reviving { .. } => self.least,
            Doing::Confirming | Doing::Resting => self.bytes,
        }
    }

    /// Begins a search with the most.
    fn search(&mut self) {
        self.doing = Doing::Searching { fails_from: u16::MAX };
        self.is_answered = false;
    }

    /// When [`PathMtu::poll_transmit`] has something to do, if ever.
    pub fn poll_timeout(&self) -> Option<Instant> {
        (self.next_at != Instant::FAR).then_some(self.next_at)
    }

    /// Writes the probe that is due, if one is, and returns its length. `out` needs as many bytes as the most.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<usize> {
        if now < self.next_at {
            return None;
        }
        if self.probe.take().is_some() {
            self.tries += 1;
            if self.tries >= TRIES {
                self.lost(now);
            }
        }
        if self.doing == Doing::Resting {
            if now < self.next_at {
                return None;
            }
            if now >= self.raise_at && self.bytes < self.most {
                self.search();
            } else if self.bytes > self.least {
                self.doing = Doing::Confirming;
            } else {
                self.next_at = self.raise_at;
                return None;
            }
        }
        let probe = Probe { id: self.next_id, bytes: self.candidate(), epoch: 0 };
        self.next_id = self.next_id.wrapping_add(1);
        self.next_at = now.plus_nanos(self.patience_nanos);
        let written = message::emit_probe(out, &probe, false)?;
        self.probe = Some(probe);
        Some(written)
    }

    /// Takes in a PROBE_REPLY; false if it answers nothing that was asked.
    pub fn handle_reply(&mut self, now: Instant, reply: &Probe) -> bool {
        let Some(probe) = self.probe.filter(|probe| (probe.id, probe.bytes) == (reply.id, reply.bytes))
        else {
            return false;
        };
        (self.probe, self.tries, self.is_answered) = (None, 0, true);
        match self.doing {
            Doing::Searching { fails_from } => {
                self.bytes = probe.bytes;
                self.search_on(now, fails_from);
            }
            Doing::Reviving { then_search: true } => {
                self.search();
                self.next_at = now;
            }
            Doing::Reviving { then_search: false } => {
                self.raise_at = now.plus_nanos(RAISE_NANOS);
                self.rest(now);
            }
            Doing::Confirming | Doing::Resting => self.rest(now),
        }
        true
    }

    /// A hint that the path carries no more than `mtu_bytes` of message: what is in use is looked at now. Nothing else changes.
    pub fn handle_hint(&mut self, now: Instant, mtu_bytes: u32) {
        if self.doing == Doing::Resting && self.bytes > self.least && mtu_bytes < u32::from(self.bytes) {
            self.next_at = now;
            self.raise_at = self.raise_at.max(now.plus_nanos(RAISE_NANOS));
        }
    }

    /// Takes in that large segments stay away, on a path of such a round trip: what is in use is looked at now, and the probes are repeated
    /// soon (the black hole detection of RFC 8899 section 4.3).
    pub fn handle_silence(&mut self, now: Instant, round_trip: Option<Duration>) {
        let may_confirm = matches!(self.doing, Doing::Resting | Doing::Searching { .. });
        if may_confirm && self.bytes > self.least {
            if self.doing != Doing::Resting {
                // What is in use matters more than what could be.
                (self.doing, self.probe, self.tries) = (Doing::Confirming, None, 0);
                self.raise_at = now.plus_nanos(RAISE_NANOS);
            }
            self.next_at = now;
            let some = round_trip.map_or(PATIENCE_NANOS, |rtt| nanos_of(rtt * PATIENCE_ROUND_TRIPS));
            self.patience_nanos = some.clamp(LEAST_PATIENCE_NANOS, PATIENCE_NANOS);
        }
    }

    /// The size under way is not carried.
    fn lost(&mut self, now: Instant) {
        let candidate = self.candidate();
        self.tries = 0;
        match self.doing {
            Doing::Searching { .. } => self.search_on(now, candidate),
            Doing::Confirming | Doing::Resting | Doing::Reviving { .. } => {
                // Anything can have happened to the path: from the beginning, once it answers.
                self.bytes = self.least;
                self.doing = Doing::Reviving { then_search: true };
                self.patience_nanos = PATIENCE_NANOS;
                self.next_at = now;
            }
        }
    }

    fn search_on(&mut self, now: Instant, fails_from: u16) {
        if fails_from - self.bytes > GRAIN_BYTES && self.bytes < self.most {
            self.doing = Doing::Searching { fails_from };
            self.next_at = now;
        } else if !self.is_answered {
            self.doing = Doing::Reviving { then_search: false };
            self.next_at = now;
        } else {
            self.raise_at = now.plus_nanos(RAISE_NANOS);
            self.rest(now);
        }
    }

    fn rest(&mut self, now: Instant) {
        self.doing = Doing::Resting;
        self.patience_nanos = PATIENCE_NANOS;
        if self.bytes >= self.most {
            self.raise_at = Instant::FAR;
        }
        let confirm_at = if self.bytes > self.least { now.plus_nanos(CONFIRM_NANOS) } else { self.raise_at };
        self.next_at = confirm_at.min(self.raise_at);
    }
}
