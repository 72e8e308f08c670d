//! How large the segments may be that a queue asks each store for: what the path was found to carry.

use protocol::path_mtu::PathMtu;
use protocol::reason::DropReason;
use protocol::time::Instant;
use protocol::wire::message::{DATA_HEADER_BYTES, Message, MessageType};
use protocol::{FetchEngine, StoreIndex};

use crate::chunk_layout::EncodedChunks;

/// The searches of one queue: by its UDP port, packets may take another way than those of others.
pub(crate) struct Paths {
    searches: Vec<PathMtu>,
    /// No probe is due before.
    next_at: Instant,
    /// IP and UDP header before a message.
    header_bytes: u32,
}

impl Paths {
    /// For segments of `least` to `most` bytes.
    pub(crate) fn new(stores: usize, least: u16, most: u16, is_ipv6: bool, seed: u32) -> Self {
        let message = |segment_bytes: u16| {
            segment_bytes.saturating_add(u16::try_from(DATA_HEADER_BYTES).unwrap_or(u16::MAX))
        };
        let search = |store: usize| {
            let seed = seed.wrapping_add(u32::try_from(store).unwrap_or(0) << 16);
            PathMtu::new(message(least), message(most), seed)
        };
        let header_bytes = if is_ipv6 { 48 } else { 28 };
        let mut paths =
            Self { searches: (0..stores).map(search).collect(), next_at: Instant::FAR, header_bytes };
        paths.look_ahead();
        paths
    }

    fn look_ahead(&mut self) {
        let due = self.searches.iter().filter_map(PathMtu::poll_timeout).min();
        self.next_at = due.unwrap_or(Instant::FAR);
    }

    /// Whether a probe is due.
    #[inline]
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.next_at <= now
    }

    /// Writes the next probe that is due; gives its store and length. When there is none, what is due next is known again.
    #[cold]
    pub(crate) fn poll_transmit(
        &mut self,
        now: Instant,
        engine: &mut FetchEngine<EncodedChunks>,
        out: &mut [u8],
    ) -> Option<(StoreIndex, usize)> {
        for (store, search) in (0..).zip(&mut self.searches) {
            let before = search.bytes();
            let written = search.poll_transmit(now, out);
            if search.bytes() != before {
                engine.set_segment_bytes(StoreIndex(store), segment_bytes(search));
            }
            if let Some(bytes) = written {
                return Some((StoreIndex(store), bytes));
            }
        }
        self.look_ahead();
        None
    }

    /// Whether a payload says that it is a PROBE_REPLY.
    #[inline]
    pub(crate) fn is_reply(payload: &[u8]) -> bool {
        payload.get(5) == Some(&(MessageType::ProbeReply as u8))
    }

    /// Takes in a payload that does.
    #[cold]
    pub(crate) fn handle(
        &mut self,
        now: Instant,
        engine: &mut FetchEngine<EncodedChunks>,
        store: StoreIndex,
        payload: &[u8],
    ) -> Result<(), DropReason> {
        let Message::ProbeReply(reply) = Message::new_checked(payload)? else {
            return Err(DropReason::BadType);
        };
        let search = self.searches.get_mut(usize::from(store.0)).ok_or(DropReason::Stale)?;
        if !search.handle_reply(now, &reply) {
            return Err(DropReason::Stale);
        }
        engine.set_segment_bytes(store, segment_bytes(search));
        self.look_ahead();
        Ok(())
    }

    /// Takes in that a packet to a store was larger than a link of `mtu_bytes` carries, as a router says; it is a hint.
    #[cold]
    pub(crate) fn handle_too_big(&mut self, now: Instant, store: StoreIndex, mtu_bytes: u32) {
        if let Some(search) = self.searches.get_mut(usize::from(store.0)) {
            search.handle_hint(now, mtu_bytes.saturating_sub(self.header_bytes));
        }
        self.look_ahead();
    }
}

fn segment_bytes(search: &PathMtu) -> u16 {
    search.bytes() - u16::try_from(DATA_HEADER_BYTES).unwrap_or(0)
}
