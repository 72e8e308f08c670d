//! What is to happen in one round.

use std::time::Duration;

use client::MissingReason;

use super::chunks::Library;
use super::ledger::Ledger;

/// How often, of 1,000 of the store's packets, something happens to one.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rates {
    /// It is lost.
    pub(crate) lose: usize,
    /// A request is lost before the store sees it.
    pub(crate) lose_request: usize,
    /// It comes twice.
    pub(crate) duplicate: usize,
    /// It comes once more when the fetch is over.
    pub(crate) late: usize,
    /// It waits while others overtake it.
    pub(crate) reorder: usize,
    /// A forged one comes with it.
    pub(crate) forge: usize,
    /// One with a wrong payload and right checksums comes before it.
    pub(crate) poison: usize,
    /// One of its bits flips.
    pub(crate) flip: usize,
    /// It comes in two buffers.
    pub(crate) split: usize,
    /// It comes with a VLAN tag.
    pub(crate) vlan: usize,
    /// It comes with padding.
    pub(crate) pad: usize,
    /// It comes without a UDP checksum.
    pub(crate) no_checksum: usize,
    /// An ERROR that can be recovered from comes before it.
    pub(crate) error: usize,
}

/// Changes a message of the store before it is sent.
pub(crate) type Twist<'a> = &'a mut dyn FnMut(&mut Vec<u8>, &Ledger);

/// One round: what happens to the packets, and what must become of the fetch.
pub(crate) struct Round<'a> {
    pub(crate) name: &'a str,
    pub(crate) seed: u64,
    pub(crate) library: &'a Library,
    pub(crate) rates: Rates,
    pub(crate) twist: Option<Twist<'a>>,
    /// Chunks that must be missing, each with the reasons there may be; all others must arrive.
    pub(crate) missing: &'a [(u32, &'a [MissingReason])],
    /// Cut so many packets at every length, before they come whole.
    pub(crate) cut: usize,
    /// The client's timeout.
    pub(crate) timeout: Duration,
    /// The client cancels after so many packets.
    pub(crate) cancel_after: Option<u64>,
    /// The store restarts after so many packets.
    pub(crate) restart_after: Option<u64>,
    /// After so many packets there is no store: requests are answered with ICMP errors of this code.
    pub(crate) unreachable_after: Option<(u64, u8)>,
}
