//! The paths from one queue to all stores: how large the segments may be that are asked for and sent on each.
//!
//! By its UDP port a queue's packets may take another way than those of others, so every queue has its own searches.
//!
//! Call order: [`Paths::poll_transmit`] while [`Paths::is_due`]; [`Paths::handle_datagram`] for payloads that [`Paths::takes`] says are its
//! own. Both say what has changed through `tell`, which passes it on to [`FetchEngine::set_segment_bytes`] and
//! [`OfferEngine::set_segment_bytes`].
//!
//! [`FetchEngine::set_segment_bytes`]: crate::FetchEngine::set_segment_bytes
//! [`OfferEngine::set_segment_bytes`]: crate::put::OfferEngine::set_segment_bytes

use std::time::Duration;

use crate::fetch::StoreIndex;
use crate::path_mtu::PathMtu;
use crate::reason::DropReason;
use crate::time::Instant;
use crate::wire::message::{DATA_HEADER_BYTES, Message, MessageType};
use crate::wire::offer::message_type;

/// The searches of one queue.
#[derive(Clone, Debug)]
pub struct Paths {
    searches: Box<[PathMtu]>,
    /// No probe is due before.
    next_at: Instant,
}

impl Paths {
    /// To `stores` stores, for segments of `least` to `most` bytes, of which `least` are carried without question. `seed` differs from run
    /// to run and queue to queue.
    pub fn new(stores: u16, least: u16, most: u16, seed: u32) -> Paths {
        let search = |store| {
            PathMtu::new(message_bytes(least), message_bytes(most), seed.wrapping_add(u32::from(store) << 16))
        };
        let mut paths = Paths { searches: (0..stores).map(search).collect(), next_at: Instant::FAR };
        paths.look_ahead();
        paths
    }

    fn look_ahead(&mut self) {
        let due = self.searches.iter().filter_map(PathMtu::poll_timeout).min();
        self.next_at = due.unwrap_or(Instant::FAR);
    }

    /// Whether a probe is due.
    #[inline]
    pub fn is_due(&self, now: Instant) -> bool {
        self.next_at <= now
    }

    /// When a probe is due, if ever.
    pub fn poll_timeout(&self) -> Option<Instant> {
        (self.next_at != Instant::FAR).then_some(self.next_at)
    }

    /// Bytes of the largest segment that the path to a store is known to carry.
    pub fn segment_bytes(&self, store: StoreIndex) -> Option<u16> {
        self.searches.get(usize::from(store.0)).map(segment_bytes)
    }

    /// Writes the next probe that is due to `out`, which needs room for the largest; gives its store and length. When there is none, what is
    /// due next is known again.
    #[cold]
    pub fn poll_transmit(
        &mut self,
        now: Instant,
        out: &mut [u8],
        mut tell: impl FnMut(StoreIndex, u16),
    ) -> Option<(StoreIndex, usize)> {
        for (store, search) in (0..).map(StoreIndex).zip(&mut self.searches) {
            let before = search.bytes();
            let written = search.poll_transmit(now, out);
            if search.bytes() != before {
                tell(store, segment_bytes(search));
            }
            if let Some(bytes) = written {
                return Some((store, bytes));
            }
        }
        self.look_ahead();
        None
    }

    /// Whether a payload says that it is a PROBE_REPLY.
    #[inline]
    pub fn takes(payload: &[u8]) -> bool {
        const REPLY: u8 = MessageType::ProbeReply as u8;
        message_type(payload) == Some(REPLY)
    }

    /// Takes in a payload that does, which came from `store`.
    #[cold]
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        store: StoreIndex,
        payload: &[u8],
        mut tell: impl FnMut(StoreIndex, u16),
    ) -> Result<(), DropReason> {
        let Message::ProbeReply(reply) = Message::new_checked(payload)? else {
            return Err(DropReason::BadType);
        };
        let search = self.searches.get_mut(usize::from(store.0)).ok_or(DropReason::Stale)?;
        if !search.handle_reply(now, &reply) {
            return Err(DropReason::Stale);
        }
        tell(store, segment_bytes(search));
        self.look_ahead();
        Ok(())
    }

    /// A hint that the path to a store carries messages of at most so many bytes: see [`PathMtu::handle_hint`].
    #[cold]
    pub fn handle_hint(&mut self, now: Instant, store: StoreIndex, message_bytes: u32) {
        if let Some(search) = self.searches.get_mut(usize::from(store.0)) {
            search.handle_hint(now, message_bytes);
            self.look_ahead();
        }
    }

    /// A hint that large segments to or from a store stay away: see [`PathMtu::handle_silence`].
    #[cold]
    pub fn handle_silence(&mut self, now: Instant, store: StoreIndex, round_trip: Option<Duration>) {
        if let Some(search) = self.searches.get_mut(usize::from(store.0)) {
            search.handle_silence(now, round_trip);
            self.look_ahead();
        }
    }
}

fn message_bytes(segment_bytes: u16) -> u16 {
    segment_bytes.saturating_add(u16::try_from(DATA_HEADER_BYTES).unwrap_or(u16::MAX))
}

fn segment_bytes(search: &PathMtu) -> u16 {
    search.bytes() - u16::try_from(DATA_HEADER_BYTES).unwrap_or(0)
}
