//! A store: the real `ServeEngine`, a receive ring, a transmit ring, and what it holds.

use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;

use protocol::put::AcceptEngine;
use protocol::{Instant, Peer, ServeConfig, ServeEngine};

use crate::content::{Catalogue, Shelf};
use crate::host::{Deed, Host};
use crate::intakes::{Intakes, PutConfig};
use crate::net::{Net, Way};
use crate::record::Records;

/// Room for the largest message but DATA: a reply to a PROBE of a large MTU.
const OUT_BYTES: usize = 9216;
/// First UDP port of a data plane.
pub const PORT: u16 = 4791;

/// A host and queue as a store sees it.
pub fn peer_of(host: u32, queue: u16) -> Peer {
    let [_, a, b, c] = host.to_be_bytes();
    let ip = IpAddr::V4(Ipv4Addr::new(10, a, b, c));
    Peer { mac: [2, 0, 0, a, b, c], ip, port: PORT + queue }
}

/// The host and queue that a peer is.
pub fn host_of(peer: &Peer) -> (u32, u16) {
    let [_, _, _, a, b, c] = peer.mac;
    (u32::from_be_bytes([0, a, b, c]), peer.port - PORT)
}

/// Limits of a simulated store.
#[derive(Clone, Copy, Debug)]
pub struct StoreConfig {
    /// The engine's limits. The epoch is the store's own.
    pub serve: ServeConfig,
    /// Bytes that the transmit ring of its device holds.
    pub ring_bytes: u64,
    /// Whether payloads are written out, to be compared byte by byte on arrival.
    pub materialize: bool,
    /// What it takes from data planes.
    pub put: PutConfig,
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            serve: ServeConfig::default(),
            ring_bytes: 64 * 1600,
            materialize: false,
            put: PutConfig::default(),
        }
    }
}

/// A store.
#[derive(Debug)]
pub struct StoreHost {
    id: u32,
    config: StoreConfig,
    engine: ServeEngine,
    epoch: u64,
    shelf: Shelf,
    intakes: Intakes,
    is_up: bool,
    scratch: Vec<u8>,
}

impl StoreHost {
    /// A store that holds the chunks for which `held` is true.
    pub fn new(id: u32, config: StoreConfig, catalogue: Rc<Catalogue>, held: Vec<bool>) -> StoreHost {
        let epoch = 1_000_000 + u64::from(id);
        let engine = ServeEngine::new(ServeConfig { epoch, ..config.serve });
        StoreHost {
            id,
            config,
            engine,
            epoch,
            shelf: Shelf::new(catalogue, held),
            intakes: Intakes::new(id, config.put, epoch),
            is_up: true,
            scratch: Vec::new(),
        }
    }

    /// Sends what the engines have to send, until they have no more or the transmit ring is full.
    fn transmit(&mut self, net: &mut Net) -> Option<u64> {
        let now = Instant::from_nanos(net.now);
        let mut out = [0; OUT_BYTES];
        loop {
            let link = net.link(self.id, Way::Up);
            if link.backlog_bytes(net.now) >= self.config.ring_bytes {
                // Filled up again when half of it has left.
                return Some(net.now + link.backlog_nanos(net.now) / 2 + 1);
            }
            if let Some((to, len)) = self.intakes.poll_transmit(net.now, &mut out) {
                let (to, queue) = host_of(&to);
                net.send(self.id, to, |packet| {
                    packet.queue = queue;
                    packet.bytes.extend_from_slice(&out[..len]);
                });
                continue;
            }
            let Some(transmit) = self.engine.poll_transmit(now, &mut out) else {
                let due = self.engine.poll_timeout().map(Instant::nanos);
                return due.into_iter().chain(self.intakes.poll_timeout()).min();
            };
            let (to, queue) = host_of(&transmit.to);
            let head = &out[..transmit.header_bytes];
            let Some((handle, range)) = transmit.payload else {
                net.send(self.id, to, |packet| {
                    packet.queue = queue;
                    packet.bytes.extend_from_slice(head);
                });
                continue;
            };
            let Some(chunk) = self.shelf.number_at(handle) else { continue };
            let (catalogue, materialize) = (self.shelf.catalogue(), self.config.materialize);
            net.send(self.id, to, |packet| {
                packet.queue = queue;
                packet.bytes.extend_from_slice(head);
                catalogue.fill(packet, chunk, range, materialize);
            });
        }
    }
}

impl Host for StoreHost {
    fn turn(&mut self, net: &mut Net, records: &mut Records, rx: &[u32]) -> Option<u64> {
        if !self.is_up {
            return None;
        }
        for id in rx {
            let packet = net.packets.get(*id);
            let now = Instant::from_nanos(net.now);
            let from = peer_of(packet.from, packet.queue);
            if AcceptEngine::takes(&packet.bytes) {
                let payload = packet.payload(&mut self.scratch);
                self.intakes.take_in((now, from), packet, payload, &self.shelf, records);
            } else {
                // What it drops it counts.
                let _ = self.engine.handle_datagram(now, from, &packet.bytes, &self.shelf);
            }
        }
        let was_damaged = net.counters.damaged > 0;
        self.intakes.turn(net.now, was_damaged, &mut self.shelf, records);
        let wake = self.transmit(net);
        let counters = self.engine.counters();
        let drops: u64 = counters.drops.iter().sum();
        let answered = counters.lookups + counters.pulls + counters.refused + counters.busy + counters.probes;
        assert_eq!(counters.datagrams, answered + drops, "store {}: its counters add up", self.id);
        assert!(
            self.engine.pending_pulls() <= self.config.serve.max_pending_pulls,
            "PULLs within their bound"
        );
        assert!(
            self.engine.pending_bytes() <= self.config.serve.max_pending_bytes,
            "bytes within their bound"
        );
        wake
    }

    fn befall(&mut self, net: &mut Net, _records: &mut Records, deed: Deed) {
        match deed {
            Deed::Crash => self.is_up = false,
            Deed::Restart => {
                self.is_up = true;
                self.epoch += 1000;
                self.shelf.renumber(&mut net.random);
                self.intakes.restart(self.epoch, &mut self.shelf);
                self.engine = ServeEngine::new(ServeConfig { epoch: self.epoch, ..self.config.serve });
            }
            Deed::Forget(chunk) => {
                self.shelf.forget(chunk);
                self.intakes.forget(chunk, &self.shelf);
            }
            Deed::ClockJump(_) => {}
            Deed::Fetch(_) | Deed::Lookup(_) | Deed::Save(_) | Deed::Cancel(_) | Deed::DecodeNanos(_) => {
                unreachable!("a store does not fetch")
            }
        }
    }

    fn is_up(&self) -> bool {
        self.is_up
    }

    fn assert_quiet(&self) {
        if self.is_up {
            assert!(self.engine.idle(), "store {} has something left to send", self.id);
            self.intakes.assert_quiet();
        }
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let counters = self.engine.counters();
        let mut all = vec![
            ("store_pulls".into(), counters.pulls),
            ("store_segments".into(), counters.segments),
            ("store_refused".into(), counters.refused),
            ("store_busy".into(), counters.busy),
            ("store_dropped".into(), counters.drops.iter().sum()),
        ];
        all.extend(self.intakes.counters());
        all
    }
}
