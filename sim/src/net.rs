//! Hosts around one switch: what is between a host's `send` and another's receive ring.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use serde::Serialize;

use crate::link::{DROPS, Drop, Fate, Faults, Link, LinkConfig};
use crate::packet::{Packet, Packets};
use crate::queue::{Due, Queue};
use crate::random::Random;

/// Which way a host's link is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Way {
    /// From the host to the switch.
    Up,
    /// From the switch to the host; its queue is the switch's.
    Down,
}

/// The switch's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SwitchConfig {
    /// Bytes that all ports share, if they share any.
    pub shared_bytes: Option<u64>,
    /// A port may hold `alpha_percent` / 100 times what is free of it (Choudhury and Hahne, 1998).
    pub alpha_percent: u32,
}

/// Memory of a switch in use.
#[derive(Debug, Default)]
struct Switch {
    config: SwitchConfig,
    used: u64,
    /// When which bytes leave, nanoseconds.
    leaving: BinaryHeap<Reverse<(u64, u32)>>,
}

impl Switch {
    /// Whether a port with so many bytes waiting may take in another packet.
    fn admits(&mut self, now: u64, waiting: u64, bytes: u32) -> bool {
        let Some(shared) = self.config.shared_bytes else { return true };
        while let Some(Reverse((at, left))) = self.leaving.peek().copied() {
            if at > now {
                break;
            }
            self.leaving.pop();
            self.used -= u64::from(left);
        }
        let free = shared.saturating_sub(self.used);
        let limit = free * u64::from(self.config.alpha_percent) / 100;
        u64::from(bytes) <= free && waiting + u64::from(bytes) <= limit.max(u64::from(bytes))
    }

    fn takes(&mut self, leaves_at: u64, bytes: u32) {
        if self.config.shared_bytes.is_some() {
            self.used += u64::from(bytes);
            self.leaving.push(Reverse((leaves_at, bytes)));
        }
    }
}

/// What the network has done; counts only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NetCounters {
    /// Packets that hosts sent.
    pub sent: u64,
    /// Copies that links made.
    pub copies: u64,
    /// Packets that reached a host's ring.
    pub delivered: u64,
    /// Packets dropped, by [`Drop`].
    pub dropped: [u64; DROPS],
    /// Payload of stored chunks that was sent.
    pub payload_sent: u64,
    /// Payload of stored chunks in packets that were dropped.
    pub payload_dropped: u64,
    /// Packets marked.
    pub marked: u64,
    /// Packets with a bit flipped unnoticed.
    pub damaged: u64,
}

impl NetCounters {
    /// Packets dropped for any reason.
    pub fn all_dropped(&self) -> u64 {
        self.dropped.iter().sum()
    }
}

/// The network and its time.
#[derive(Debug)]
pub struct Net {
    /// Nanoseconds since the run began.
    pub now: u64,
    /// The run's generator.
    pub random: Random,
    /// Packets under way.
    pub packets: Packets,
    /// What has been done.
    pub counters: NetCounters,
    /// Pairs of hosts between which nothing passes, either way; the smaller number first.
    pub cut_pairs: BTreeSet<(u32, u32)>,
    pub(crate) queue: Queue,
    links: Vec<Link>,
    switch: Switch,
}

fn link_index(host: u32, way: Way) -> usize {
    2 * host as usize + way as usize
}

impl Net {
    /// A network of hosts with the given links, up and down.
    pub fn new(seed: u64, hosts: &[(LinkConfig, LinkConfig)], switch: SwitchConfig) -> Net {
        let links = hosts.iter().flat_map(|(up, down)| [Link::new(*up), Link::new(*down)]).collect();
        Net {
            now: 0,
            random: Random::new(seed),
            packets: Packets::default(),
            counters: NetCounters::default(),
            cut_pairs: BTreeSet::new(),
            queue: Queue::default(),
            links,
            switch: Switch { config: switch, ..Switch::default() },
        }
    }

    /// A host's link.
    pub fn link(&self, host: u32, way: Way) -> &Link {
        &self.links[link_index(host, way)]
    }

    /// Changes what goes wrong on a host's link.
    pub fn set_faults(&mut self, host: u32, way: Way, faults: Faults) {
        self.links[link_index(host, way)].faults = faults;
    }

    /// Changes the largest UDP payload that a host's link carries.
    pub fn set_carries(&mut self, host: u32, way: Way, bytes: u32) {
        self.links[link_index(host, way)].set_carries(bytes);
    }

    /// Sends a packet that `fill` writes from `from` to `to`.
    pub fn send(&mut self, from: u32, to: u32, fill: impl FnOnce(&mut Packet)) {
        let id = self.packets.take();
        let packet = self.packets.get_mut(id);
        (packet.from, packet.to) = (from, to);
        fill(packet);
        self.counters.sent += 1;
        self.counters.payload_sent += u64::from(packet.payload_bytes);
        self.transmit(link_index(from, Way::Up), id);
    }

    /// Gives a packet to a link.
    fn transmit(&mut self, link: usize, id: u32) {
        let bytes = self.packets.get(id).wire_bytes();
        let now = self.now;
        match self.links[link].transmit(now, bytes, &mut self.random) {
            Fate::Dropped(why) => self.drop_packet(id, why),
            Fate::Arrives { at, overtaken, marked, damaged, copy_at } => {
                if let Some(copy_at) = copy_at {
                    self.counters.copies += 1;
                    let copy = self.packets.copy(id);
                    self.arrive_later(link, copy, copy_at, true);
                }
                if marked {
                    self.packets.get_mut(id).marked = true;
                    self.counters.marked += 1;
                }
                if damaged {
                    self.damage(id);
                }
                self.arrive_later(link, id, at, overtaken);
            }
        }
    }

    fn arrive_later(&mut self, link: usize, id: u32, at: u64, overtaken: bool) {
        let number = u32::try_from(link).expect("links are counted in 32 bits");
        if overtaken {
            self.queue.push(at, Due::Packet { link: number, packet: id });
            return;
        }
        let in_order = &mut self.links[link].in_order;
        if in_order.is_empty() {
            self.queue.push(at, Due::Link(number));
        }
        in_order.push_back((at, id));
    }

    /// Flips one bit of a packet.
    fn damage(&mut self, id: u32) {
        self.counters.damaged += 1;
        let packet = self.packets.get_mut(id);
        let head_bits = packet.bytes.len() as u64 * 8;
        let bit = self.random.below(head_bits + u64::from(packet.tail_bytes) * 8);
        if bit >= head_bits {
            packet.damaged = true;
        } else if let Some(byte) = usize::try_from(bit / 8).ok().and_then(|at| packet.bytes.get_mut(at)) {
            *byte ^= 1 << (bit % 8);
        }
    }

    /// Counts a packet as dropped and forgets it.
    pub(crate) fn drop_packet(&mut self, id: u32, why: Drop) {
        self.counters.dropped[why as usize] += 1;
        self.counters.payload_dropped += u64::from(self.packets.get(id).payload_bytes);
        self.packets.give_back(id);
    }

    /// The packets that have arrived at the end of a link, in order: passes them on to the switch's next link, or
    /// hands those for a host to `deliver`.
    pub(crate) fn link_due(&mut self, link: u32, mut deliver: impl FnMut(&mut Net, u32)) {
        loop {
            let in_order = &mut self.links[link as usize].in_order;
            let Some((_, id)) = in_order.pop_front() else { return };
            let next = in_order.front().map(|next| next.0);
            self.arrived(link, id, &mut deliver);
            let Some(next) = next else { return };
            if next > self.now {
                return self.queue.push(next, Due::Link(link));
            }
        }
    }

    /// A packet has arrived at the end of a link.
    pub(crate) fn arrived(&mut self, link: u32, id: u32, deliver: &mut impl FnMut(&mut Net, u32)) {
        let to_host = link % 2 == Way::Down as u32;
        if to_host {
            self.counters.delivered += 1;
            return deliver(self, id);
        }
        let packet = self.packets.get(id);
        let (from, to, bytes) = (packet.from, packet.to, packet.wire_bytes());
        if !self.cut_pairs.is_empty() && self.cut_pairs.contains(&(from.min(to), from.max(to))) {
            return self.drop_packet(id, Drop::Cut);
        }
        let down = link_index(to, Way::Down);
        let now = self.now;
        let waiting =
            if self.switch.config.shared_bytes.is_some() { self.links[down].backlog_bytes(now) } else { 0 };
        if !self.switch.admits(now, waiting, bytes) {
            return self.drop_packet(id, Drop::Buffer);
        }
        let before = self.links[down].free_at();
        self.transmit(down, id);
        let leaves_at = self.links[down].free_at();
        if leaves_at > before.max(now) {
            self.switch.takes(leaves_at, bytes);
        }
    }
}
