//! A chunk on its way in.

use std::net::{IpAddr, Ipv4Addr};

use crate::frame::Peer;
use crate::key::Key;
use crate::pull::PathIndex;
use crate::reason::DropReason;
use crate::time::Instant;
use crate::wire::message::Data;
use crate::wire::offer::Offer;

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
    pub(super) path: PathIndex,
    /// What the data plane calls it, and in which epoch.
    pub(super) offer: u32,
    pub(super) epoch: u64,
    pub(super) key: Key,
    pub(super) header_bytes: u32,
    pub(super) bytes: u32,
    pub(super) segment_bytes: u16,
    /// When something of it arrived last, and after when nobody waits for it any more.
    pub(super) heard_at: Instant,
    pub(super) patience_until: Instant,
    /// Times found corrupt.
    pub(super) corrupt: u8,
}

impl IntakeSlot {
    pub(super) fn free(tag: u32) -> IntakeSlot {
        let nobody = Peer { mac: [0; 6], ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED), port: 0 };
        IntakeSlot {
            state: IntakeState::Free,
            tag,
            from: nobody,
            path: PathIndex(0),
            offer: 0,
            epoch: 0,
            key: Key([0; 32]),
            header_bytes: 0,
            bytes: 0,
            segment_bytes: 0,
            heard_at: Instant::ZERO,
            patience_until: Instant::FAR,
            corrupt: 0,
        }
    }

    pub(super) fn in_use(&self) -> bool {
        self.state != IntakeState::Free
    }

    /// Whether this is what `offer` from `from` names.
    pub(super) fn is(&self, from: &Peer, offer: &Offer) -> bool {
        self.is_from(from) && (self.offer, self.epoch, &self.key) == (offer.offer, offer.epoch, &offer.key)
    }

    pub(super) fn is_from(&self, peer: &Peer) -> bool {
        (self.from.ip, self.from.port) == (peer.ip, peer.port)
    }

    /// Whether a segment that came from `from` is of what is being pulled.
    #[inline]
    pub(super) fn check(&self, from: &Peer, data: &Data<'_>) -> Result<(), DropReason> {
        if self.tag != data.tag || self.state != IntakeState::Pulling {
            return Err(DropReason::Stale);
        }
        if !self.is_from(from) {
            return Err(DropReason::WrongStore);
        }
        if self.epoch != data.epoch { Err(DropReason::StaleEpoch) } else { Ok(()) }
    }
}
