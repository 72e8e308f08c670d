//! Which MAC address a next hop has: ARP and IPv6's neighbour discovery without I/O, for a handful of stores or a gateway.
//!
//! Of neighbour discovery (RFC 4861) this is address resolution only, as ARP does it: an entry is asked for again when it is old, by
//! the same message, and what it was stays in use until there is an answer. Routers are not discovered.
//!
//! Call order: [`Neighbours::add`] each next hop, then give every [`Incoming`] of a neighbour to
//! [`Neighbours::handle`], send what [`Neighbours::poll_transmit`] writes, and poll again no later than
//! [`Neighbours::poll_timeout`].

use std::net::IpAddr;
use std::time::Duration;

use crate::frame::{Incoming, Local};
use crate::time::{Instant, nanos_of};
use crate::wire::arp::{Arp, Operation};
use crate::wire::ethernet::{self, BROADCAST};
use crate::wire::icmpv6;

/// Most bytes of a frame that [`Neighbours::poll_transmit`] writes.
pub const FRAME_BYTES: usize = icmpv6::FRAME_BYTES + ethernet::TAG_BYTES;

/// How many answers to other hosts' requests may wait for transmission; more are dropped, and asked for again.
const PENDING_ANSWERS: usize = 8;
/// Unanswered requests after which the interval no longer doubles.
const MAX_BACKOFF: u32 = 5;

/// Sizes and intervals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighbourConfig {
    /// Most next hops.
    pub capacity: usize,
    /// Time between the first two requests for an unknown next hop; doubles up to 32 times this.
    pub retry: Duration,
    /// Age at which a known next hop is asked for again; its last MAC address stays in use meanwhile.
    pub refresh: Duration,
}

impl Default for NeighbourConfig {
    /// 64 next hops, first retry after 100 ms, refresh every 30 s.
    fn default() -> Self {
        NeighbourConfig { capacity: 64, retry: Duration::from_millis(100), refresh: Duration::from_secs(30) }
    }
}

/// A next hop, in the order in which they were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NeighbourIndex(pub u16);

/// Why a next hop was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NeighbourError {
    /// The table is full.
    #[error("no room for another next hop; raise the neighbour table's capacity")]
    Full,
    /// Our own address is of the other IP version.
    #[error("next hop {0} and our own address are of different IP versions; use one version on a port")]
    OtherVersion(IpAddr),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    ip: IpAddr,
    mac: Option<[u8; 6]>,
    /// When to ask (again); `FAR` for a static entry.
    ask_at: Instant,
    /// Requests sent since the last answer.
    unanswered: u32,
}

/// The next hops of one port.
#[derive(Debug)]
pub struct Neighbours {
    local: Local,
    retry_nanos: u64,
    refresh_nanos: u64,
    entries: Vec<Entry>,
    capacity: usize,
    answers: [([u8; 6], IpAddr); PENDING_ANSWERS],
    answers_len: usize,
    next_ask: Instant,
}

impl Neighbours {
    /// An empty table for this host.
    pub fn new(local: Local, config: &NeighbourConfig) -> Neighbours {
        Neighbours {
            local,
            retry_nanos: nanos_of(config.retry).max(1),
            refresh_nanos: nanos_of(config.refresh).max(1),
            entries: Vec::with_capacity(config.capacity),
            capacity: config.capacity.min(usize::from(u16::MAX)),
            answers: [([0; 6], local.ip); PENDING_ANSWERS],
            answers_len: 0,
            next_ask: Instant::FAR,
        }
    }

    /// Adds a next hop whose MAC address is to be resolved, or finds the one added before.
    pub fn add(&mut self, now: Instant, ip: IpAddr) -> Result<NeighbourIndex, NeighbourError> {
        if let Some(index) = self.position(ip) {
            return Ok(index);
        }
        if ip.is_ipv4() != self.local.ip.is_ipv4() {
            return Err(NeighbourError::OtherVersion(ip));
        }
        let index = self.push(Entry { ip, mac: None, ask_at: now, unanswered: 0 })?;
        self.next_ask = self.next_ask.min(now);
        Ok(index)
    }

    /// Adds a next hop whose MAC address is known and never asked for; replaces what was known of it.
    pub fn add_static(&mut self, ip: IpAddr, mac: [u8; 6]) -> Result<NeighbourIndex, NeighbourError> {
        let entry = Entry { ip, mac: Some(mac), ask_at: Instant::FAR, unanswered: 0 };
        if let Some(index) = self.position(ip) {
            self.entries[usize::from(index.0)] = entry;
            return Ok(index);
        }
        self.push(entry)
    }

    fn push(&mut self, entry: Entry) -> Result<NeighbourIndex, NeighbourError> {
        if self.entries.len() >= self.capacity {
            return Err(NeighbourError::Full);
        }
        let index = u16::try_from(self.entries.len()).map_err(|_| NeighbourError::Full)?;
        self.entries.push(entry);
        Ok(NeighbourIndex(index))
    }

    fn position(&self, ip: IpAddr) -> Option<NeighbourIndex> {
        let index = self.entries.iter().position(|entry| entry.ip == ip)?;
        u16::try_from(index).ok().map(NeighbourIndex)
    }

    /// The MAC address of a next hop, once known.
    pub fn mac(&self, index: NeighbourIndex) -> Option<[u8; 6]> {
        self.entries.get(usize::from(index.0))?.mac
    }

    /// The IP address of a next hop.
    pub fn ip(&self, index: NeighbourIndex) -> Option<IpAddr> {
        Some(self.entries.get(usize::from(index.0))?.ip)
    }

    /// Learns from a neighbour's packet, and remembers to answer a request. Everything else teaches nothing.
    ///
    /// Only the addresses of next hops that were added are learnt.
    pub fn handle(&mut self, now: Instant, incoming: &Incoming) {
        match *incoming {
            Incoming::NeighbourRequest { sender_mac, sender_ip } => {
                self.learn(now, sender_ip, sender_mac, true);
                if let Some(slot) = self.answers.get_mut(self.answers_len) {
                    *slot = (sender_mac, sender_ip);
                    self.answers_len += 1;
                }
            }
            Incoming::NeighbourReply { mac, ip, overrides } => self.learn(now, ip, mac, overrides),
            Incoming::Datagram { .. } | Incoming::PathError(_) => {}
        }
    }

    fn learn(&mut self, now: Instant, ip: IpAddr, mac: [u8; 6], overrides: bool) {
        let Some(index) = self.position(ip) else { return };
        let entry = &mut self.entries[usize::from(index.0)];
        if entry.ask_at == Instant::FAR || (!overrides && entry.mac.is_some_and(|known| known != mac)) {
            return;
        }
        entry.mac = Some(mac);
        entry.unanswered = 0;
        entry.ask_at = now.plus_nanos(self.refresh_nanos);
        self.next_ask = self.next_ask.min(entry.ask_at);
    }

    /// Writes the next frame that is due, if any, and returns its length. `out` needs [`FRAME_BYTES`]; with less, nothing
    /// is sent.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut [u8]) -> Option<usize> {
        if out.len() < FRAME_BYTES {
            return None;
        }
        if self.answers_len > 0 {
            self.answers_len -= 1;
            let (mac, ip) = self.answers[self.answers_len];
            return emit_answer(&self.local, mac, ip, out);
        }
        if now < self.next_ask {
            return None;
        }
        let (local, retry_nanos) = (self.local, self.retry_nanos);
        let due = self.entries.iter_mut().find(|entry| entry.ask_at <= now);
        let sent = due.and_then(|entry| {
            entry.ask_at = now.plus_nanos(retry_nanos << entry.unanswered.min(MAX_BACKOFF));
            entry.unanswered += 1;
            emit_request(&local, entry.ip, out)
        });
        self.next_ask = self.entries.iter().map(|entry| entry.ask_at).min().unwrap_or(Instant::FAR);
        sent
    }

    /// When [`Neighbours::poll_transmit`] has something to send next, if ever.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.answers_len > 0 {
            return Some(Instant::ZERO);
        }
        (self.next_ask != Instant::FAR).then_some(self.next_ask)
    }
}

fn emit_request(local: &Local, target: IpAddr, out: &mut [u8]) -> Option<usize> {
    let (sender_mac, vlan) = (local.mac, local.vlan);
    match (local.ip, target) {
        (IpAddr::V4(sender_ip), IpAddr::V4(target_ip)) => {
            let (operation, target_mac) = (Operation::Request, [0; 6]);
            Arp { operation, sender_mac, sender_ip, target_mac, target_ip }.emit_frame(out, BROADCAST, vlan)
        }
        (IpAddr::V6(ip), IpAddr::V6(target)) => {
            icmpv6::emit_solicitation(out, &icmpv6::Sender { mac: sender_mac, ip, vlan }, target)
        }
        _ => None,
    }
}

fn emit_answer(local: &Local, target_mac: [u8; 6], target: IpAddr, out: &mut [u8]) -> Option<usize> {
    let (sender_mac, vlan) = (local.mac, local.vlan);
    match (local.ip, target) {
        (IpAddr::V4(sender_ip), IpAddr::V4(target_ip)) => {
            let operation = Operation::Reply;
            Arp { operation, sender_mac, sender_ip, target_mac, target_ip }.emit_frame(out, target_mac, vlan)
        }
        (IpAddr::V6(ip), IpAddr::V6(target)) => {
            let sender = icmpv6::Sender { mac: sender_mac, ip, vlan };
            icmpv6::emit_advertisement(out, &sender, (target_mac, target))
        }
        _ => None,
    }
}
