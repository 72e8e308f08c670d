//! One queue of a port: receives frames and hands over the datagrams for us, sends datagrams, answers who asks for our
//! MAC address.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use dpdk::{
    BURST, Burst, Checksum, Eal, Mbuf, OpenPort, Pool, PoolConfig, PoolError, PoolOrder, Port, PortConfig,
    PortError, RxQueue, SplitRxQueue, TxQueue,
};
use protocol::frame::{self, HardwareChecks, Incoming, Local, Peer, TxChecksum};
use protocol::neighbour::{self, NeighbourConfig, NeighbourError, Neighbours};
use protocol::reason::DropReason;
use protocol::time::Instant;
use protocol::wire::icmp::PathError;
use protocol::wire::{Ecn, ethernet, icmpv6};
use serde_json::{Map, Value, json};

use crate::config::IfaceConfig;
use crate::counter::Counter;
use crate::direct::Direct;
use crate::steer::PortMap;

/// Bytes of an mbuf beyond the IP packet: headroom, Ethernet and VLAN headers, and what drivers round up to.
const MBUF_OVERHEAD_BYTES: u16 = 128 + 64;

/// Smallest data room that every driver accepts.
const MIN_DATA_ROOM_BYTES: u16 = 2048 + 128;

/// A datagram for us, its mbuf trimmed to the payload.
#[derive(Debug)]
pub struct Datagram {
    /// Who sent it.
    pub from: Peer,
    /// Which of our UDP ports it came to.
    pub to_port: u16,
    /// Whether a router marked it as having met congestion (ECN).
    pub marked: bool,
    /// The payload.
    pub mbuf: Mbuf,
}

/// A datagram whose payload was just written.
#[derive(Debug)]
pub struct Outgoing {
    /// Which of our UDP ports it comes from.
    pub from_port: u16,
    /// Whom it goes to.
    pub to: Peer,
    /// Bytes of payload that were written.
    pub payload_bytes: usize,
    /// What follows them, in buffers of its own; only on a port that sends such chains ([`Link::sends_chains`]).
    pub tail: Option<Mbuf>,
    /// Whether whoever receives it answers congestion marks (ECN), so that routers may mark instead of dropping.
    pub marks_answered: bool,
    /// Whether what carries it is checked end to end, so that a UDP checksum that no NIC computes is left out (over IPv4,
    /// RFC 768).
    pub covered: bool,
}

/// Exact counts of one queue. Every frame is a neighbour's, an error about a packet of ours, dropped by the link, or handed
/// over as a datagram. Of the datagrams the owner takes some and counts those that it drops in `dropped` too, so that over all
/// queues `rx_packets = rx_neighbour + rx_icmp + sum(dropped) + datagrams that the owners took`.
#[derive(Debug, Default)]
pub struct LinkCounters {
    /// Frames received.
    pub rx_packets: Counter,
    /// Bytes of those frames.
    pub rx_bytes: Counter,
    /// Datagrams handed over.
    pub rx_datagrams: Counter,
    /// Datagrams that a router marked as having met congestion.
    pub rx_marked: Counter,
    /// Requests and replies of ARP and neighbour discovery taken.
    pub rx_neighbour: Counter,
    /// ICMP errors about packets of ours.
    pub rx_icmp: Counter,
    /// Frames received in several buffers, and copied into one.
    pub rx_gathered: Counter,
    /// Frames sent.
    pub tx_packets: Counter,
    /// Bytes of those frames.
    pub tx_bytes: Counter,
    /// Times that sending waited because no mbuf was free.
    pub tx_nombuf: Counter,
    /// Frames dropped, by reason; the owner of the link counts its own reasons here too.
    pub dropped: DropCounters,
}

/// One counter per [`DropReason`].
#[derive(Debug)]
pub struct DropCounters([Counter; DropReason::COUNT]);

impl Default for DropCounters {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl DropCounters {
    /// Counts one packet dropped for `reason`.
    #[inline]
    pub fn add(&self, reason: DropReason) {
        self.0[reason.index()].add(1);
    }

    /// Packets dropped for `reason`.
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason.index()].get()
    }

    /// `{"truncated": 0, ..}`
    #[must_use]
    pub fn to_json(&self) -> Value {
        let counts =
            DropReason::ALL.iter().map(|&reason| (reason.name().to_owned(), json!(self.get(reason))));
        Value::Object(counts.collect::<Map<_, _>>())
    }
}

impl LinkCounters {
    /// All counts by name.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "rx_packets": self.rx_packets.get(),
            "rx_bytes": self.rx_bytes.get(),
            "rx_datagrams": self.rx_datagrams.get(),
            "rx_marked": self.rx_marked.get(),
            "rx_neighbour": self.rx_neighbour.get(),
            "rx_icmp": self.rx_icmp.get(),
            "rx_gathered": self.rx_gathered.get(),
            "tx_packets": self.tx_packets.get(),
            "tx_bytes": self.tx_bytes.get(),
            "tx_nombuf": self.tx_nombuf.get(),
            "dropped": self.dropped.to_json(),
        })
    }
}

/// MAC addresses of the next hops, shared by the queues of a port: whichever queue an answer comes to, all know it.
#[derive(Debug)]
pub struct MacTable {
    entries: Vec<(IpAddr, AtomicU64)>,
}

/// Marks a word of [`MacTable`] as holding an address.
const KNOWN: u64 = 1 << 48;

impl MacTable {
    /// A table of the next hops `ips`, none of them known.
    #[must_use]
    pub fn new(ips: impl IntoIterator<Item = IpAddr>) -> Self {
        Self { entries: ips.into_iter().map(|ip| (ip, AtomicU64::new(0))).collect() }
    }

    /// The MAC address of `ip`, once it is known.
    #[must_use]
    pub fn get(&self, ip: IpAddr) -> Option<[u8; 6]> {
        let word = self.entries.iter().find(|entry| entry.0 == ip)?.1.load(Relaxed);
        let [_, _, mac @ ..] = word.to_be_bytes();
        (word & KNOWN != 0).then_some(mac)
    }

    /// Notes the MAC address of `ip`; ignored if `ip` is no next hop of ours.
    pub fn learn(&self, ip: IpAddr, mac: [u8; 6]) {
        if let Some(entry) = self.entries.iter().find(|entry| entry.0 == ip) {
            let [a, b, c, d, e, f] = mac;
            entry.1.store(u64::from_be_bytes([0, 0, a, b, c, d, e, f]) | KNOWN, Relaxed);
        }
    }
}

/// One queue of a port. Belongs to one lcore.
pub struct Link {
    rx: RxQueue,
    /// The queue's second half, which receives into device memory.
    pub(crate) direct: Option<SplitRxQueue>,
    tx: TxQueue,
    pool: Pool,
    pub(crate) local: Local,
    tx_checksum: TxChecksum,
    covered_checksum: TxChecksum,
    max_payload_bytes: usize,
    sends_chains: bool,
    received: Burst,
    sending: Burst,
    /// Taken from the pool for datagrams that are not written yet.
    fresh: Burst,
    /// How many are taken at once: a whole burst after a whole burst was sent, so that who sends little holds little.
    refill: usize,
    neighbours: Neighbours,
    macs: Arc<MacTable>,
    /// Errors that nobody has asked for yet, with their frames; more are forgotten, they are hints.
    path_errors: [Option<(PathError, Mbuf)>; 8],
    pub(crate) counters: Arc<LinkCounters>,
}

/// A host on our network that packets are sent to: a store or a gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextHop {
    /// Its address.
    pub ip: IpAddr,
    /// Its MAC address, if it is given; otherwise ARP or neighbour discovery finds it.
    pub mac: Option<[u8; 6]>,
}

/// An open port.
pub struct Opened {
    /// The port; dropping it stops the device.
    pub port: Port,
    /// One link per queue.
    pub links: Vec<Link>,
    /// Each queue's packet buffers.
    pub pools: Vec<Pool>,
    /// Each queue's UDP ports.
    pub ports: PortMap,
    /// What is known of the next hops.
    pub macs: Arc<MacTable>,
    /// Why no queue receives into device memory, although one was to.
    pub direct_refused: Option<String>,
}

/// Why a port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// the packet buffers could not be had
    #[error("packet buffers of {device}: {source}")]
    Pool {
        /// the device
        device: String,
        /// what DPDK said
        source: PoolError,
    },
    /// a next hop cannot be resolved
    #[error(transparent)]
    Neighbour(#[from] NeighbourError),
    /// the device could not be opened
    #[error(transparent)]
    Port(#[from] PortError),
}

/// A store that comes back may have another MAC address (a replaced host, a virtual device): a packet a second finds out
/// within a fetch's patience.
const NEIGHBOURS: NeighbourConfig =
    NeighbourConfig { capacity: 64, retry: Duration::from_millis(100), refresh: Duration::from_secs(1) };

/// Numbers the pools of the process: their names must differ, and DPDK's are too short for a device's.
static NEXT_POOL: AtomicU32 = AtomicU32::new(0);

/// Opens the port of `config` and starts it. `stores` are whom the queues will ask, if they will, and serve to
/// choose UDP ports that the device steers to the right queue; `next_hops` are the addresses to resolve by ARP
/// or neighbour discovery.
///
/// # Errors
/// When buffers or device cannot be had; the message says which and what to do.
pub fn open(
    eal: &Eal,
    config: &IfaceConfig,
    stores: &[(IpAddr, u16)],
    next_hops: &[NextHop],
) -> Result<Opened, OpenError> {
    open_direct(eal, config, stores, next_hops, None)
}

/// The same, and each queue has a second half that receives into device memory, if there is some.
///
/// # Errors
/// As [`open`]. A driver that refuses such queues is no error: [`Opened::direct_refused`] tells.
pub fn open_direct(
    eal: &Eal,
    config: &IfaceConfig,
    stores: &[(IpAddr, u16)],
    next_hops: &[NextHop],
    direct: Option<&Direct>,
) -> Result<Opened, OpenError> {
    let data_room_bytes = (config.mtu + MBUF_OVERHEAD_BYTES).max(MIN_DATA_ROOM_BYTES);
    // Out of a stack, nothing arrives over AF_XDP.
    let order = match config.device.starts_with("net_af_xdp") {
        true => PoolOrder::OldestFirst,
        false => PoolOrder::NewestFirst,
    };
    let pool_config =
        PoolConfig { mbufs: config.mbufs, cache: 256, data_room_bytes, order, ..PoolConfig::default() };
    let pool_name = || format!("mbufs{}", NEXT_POOL.fetch_add(1, Relaxed));
    let pools = (0..config.queues)
        .map(|_| Pool::new(eal, &pool_name(), pool_config))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| OpenError::Pool { device: config.device.clone(), source })?;
    let port_config = PortConfig {
        rx_queues: config.queues,
        tx_queues: config.queues,
        rx_descriptors: config.rx_descriptors,
        tx_descriptors: config.tx_descriptors,
        mtu: config.mtu,
        promiscuous: false,
    };
    let split = direct.map(|direct| direct.pools(eal, config, &pools)).transpose();
    let split = split.map_err(|source| OpenError::Pool { device: config.device.clone(), source })?;
    let split = split.unwrap_or_default();
    let OpenPort { port, rx, split_rx, tx } =
        Port::open_split(eal, &config.device, &port_config, &pools, &split)?;

    let ip = config.address.ip;
    let ports = match config.rss.clone().or_else(|| port.rss()) {
        Some(rss) if config.queues > 1 => PortMap::steered(config.udp_port, config.queues, &rss, stores, ip),
        _ => PortMap::consecutive(config.udp_port, config.queues),
    };
    let ports = if direct.is_some() { ports.with_direct_ports() } else { ports };
    let direct_refused = direct.and_then(|direct| direct.steer(&port, config, &ports).err());
    let mut split_rx = split_rx.into_iter().filter(|_| direct_refused.is_none());
    let (first_port, span) = (ports.first_port(), ports.span());
    let local = Local { mac: mac_of(&port, ip), ip, first_port, ports: span, vlan: config.vlan };
    if let IpAddr::V6(ip) = ip {
        let groups = [icmpv6::solicited_node(ip), icmpv6::ALL_NODES].map(ethernet::multicast_mac);
        port.listen_to_groups(&groups);
    }
    let (tx_checksum, covered_checksum) = match port.capabilities().tx_udp_checksum {
        true => (TxChecksum::Hardware, TxChecksum::Hardware),
        false if ip.is_ipv4() => (TxChecksum::Software, TxChecksum::Absent),
        false => (TxChecksum::Software, TxChecksum::Software),
    };
    let macs = Arc::new(MacTable::new(next_hops.iter().map(|hop| hop.ip)));
    let mut links = Vec::new();
    for ((rx, tx), pool) in rx.into_iter().zip(tx).zip(&pools) {
        let mut neighbours = Neighbours::new(local, &NEIGHBOURS);
        for hop in next_hops {
            if let Some(mac) = hop.mac {
                macs.learn(hop.ip, mac);
            } else if links.is_empty() {
                // One queue asks for all.
                neighbours.add(Instant::ZERO, hop.ip)?;
            }
        }
        links.push(Link {
            rx,
            direct: split_rx.next(),
            tx,
            pool: pool.clone(),
            local,
            tx_checksum,
            covered_checksum,
            max_payload_bytes: usize::from(config.mtu) + local.link_bytes() - local.header_bytes(),
            sends_chains: port.capabilities().tx_multi_segment,
            received: Burst::new(),
            sending: Burst::new(),
            fresh: Burst::new(),
            refill: 1,
            neighbours,
            macs: Arc::clone(&macs),
            path_errors: Default::default(),
            counters: Arc::default(),
        });
    }
    Ok(Opened { port, links, pools, ports, macs, direct_refused })
}

/// The port's address. A virtual device may have none: then one that is locally administered, made of the IP
/// address, so that both ends of a link differ.
fn mac_of(port: &Port, ip: IpAddr) -> [u8; 6] {
    match (port.mac(), ip) {
        ([0, 0, 0, 0, 0, 0], IpAddr::V4(ip)) => {
            let [a, b, c, d] = ip.octets();
            [0x02, 0, a, b, c, d]
        }
        ([0, 0, 0, 0, 0, 0], IpAddr::V6(ip)) => {
            let [.., a, b, c, d, e] = ip.octets();
            [0x02, a, b, c, d, e]
        }
        (mac, _) => mac,
    }
}

impl Link {
    /// This queue's counters, for reading from any thread.
    #[must_use]
    pub fn counters(&self) -> &Arc<LinkCounters> {
        &self.counters
    }

    /// Takes a burst from the device, and has the CPU fetch the headers, which the device has just written, while something else is done. What
    /// was taken is handed on by the next [`Link::receive`].
    #[inline]
    pub fn fetch(&mut self) {
        if self.received.is_empty() && self.rx.receive(&mut self.received) > 0 {
            self.received.iter().for_each(Mbuf::prefetch);
        }
    }

    /// Receives one burst and hands each datagram for us to `deliver`, which says why it drops those that it does not take;
    /// neighbours' packets go to their table, errors to [`Link::take_path_error`]. Returns the number of frames received.
    #[inline]
    pub fn receive(
        &mut self,
        now_ns: u64,
        mut deliver: impl FnMut(Datagram) -> Result<(), DropReason>,
    ) -> usize {
        self.fetch();
        let received = self.received.len();
        if received == 0 {
            return 0;
        }
        let now = Instant::from_nanos(now_ns);
        let (mut bytes, mut datagrams) = (0, 0);
        while let Some(mbuf) = self.received.pop_front() {
            bytes += mbuf.total_bytes() as u64;
            let taken = match self.accept(now, mbuf) {
                Ok(Some(datagram)) => {
                    datagrams += 1;
                    deliver(datagram)
                }
                Ok(None) => Ok(()),
                Err(reason) => Err(reason),
            };
            if let Err(reason) = taken {
                self.counters.dropped.add(reason);
            }
        }
        self.counters.rx_packets.add(received as u64);
        self.counters.rx_bytes.add(bytes);
        self.counters.rx_datagrams.add(datagrams);
        received
    }

    #[inline]
    fn accept(&mut self, now: Instant, mut mbuf: Mbuf) -> Result<Option<Datagram>, DropReason> {
        if mbuf.segment_count() > 1 {
            mbuf = self.gather(&mbuf)?;
        }
        let checks = HardwareChecks {
            ip_good: mbuf.ip_checksum() == Checksum::Good,
            udp_good: mbuf.l4_checksum() == Checksum::Good,
        };
        match frame::parse(mbuf.data(), &self.local, checks)? {
            Incoming::Datagram { from, to_port, marked, payload } => {
                let excess = mbuf.data().len() - payload.end;
                mbuf.trim_back(excess);
                mbuf.trim_front(payload.start);
                if marked {
                    self.counters.rx_marked.add(1);
                }
                Ok(Some(Datagram { from, to_port, marked, mbuf }))
            }
            other => {
                self.take_note(now, &other, mbuf);
                Ok(None)
            }
        }
    }

    /// A packet that came in several buffers, in one. Devices that fill a buffer before they begin the next do so only for packets that
    /// no buffer of ours holds, which nobody sends us; others hand on the buffers that the sender chained (`net_ring`).
    #[cold]
    fn gather(&self, chain: &Mbuf) -> Result<Mbuf, DropReason> {
        let mut whole = self.pool.alloc().ok_or(DropReason::NoBuffer)?;
        let mut room = whole.append(chain.total_bytes()).ok_or(DropReason::BadLength)?;
        for part in chain.segments() {
            let (begin, rest) = room.split_at_mut_checked(part.len()).ok_or(DropReason::BadLength)?;
            begin.copy_from_slice(part);
            room = rest;
        }
        whole.copy_checksum_flags(chain);
        self.counters.rx_gathered.add(1);
        Ok(whole)
    }

    /// Of a neighbour, or of an error about a packet of ours.
    #[cold]
    pub(crate) fn take_note(&mut self, now: Instant, incoming: &Incoming, frame: Mbuf) {
        self.neighbours.handle(now, incoming);
        match *incoming {
            Incoming::NeighbourRequest { sender_mac, sender_ip } => {
                self.counters.rx_neighbour.add(1);
                self.macs.learn(sender_ip, sender_mac);
            }
            Incoming::NeighbourReply { mac, ip, overrides } => {
                self.counters.rx_neighbour.add(1);
                if overrides || self.macs.get(ip).is_none() {
                    self.macs.learn(ip, mac);
                }
            }
            Incoming::PathError(error) => {
                self.counters.rx_icmp.add(1);
                if let Some(free) = self.path_errors.iter_mut().find(|error| error.is_none()) {
                    *free = Some((error, frame));
                }
            }
            Incoming::Datagram { .. } => {}
        }
    }

    /// An error about a packet of ours that came since the last call, and its frame. Whoever can see or guess our packets'
    /// addresses and ports can forge one: take it for a hint, or compare what it quotes. It may be about a packet of another queue, whose
    /// [`Link::read_path_error`] reads the frame again.
    #[inline]
    pub fn take_path_error(&mut self) -> Option<(PathError, Mbuf)> {
        self.path_errors.iter_mut().find_map(Option::take)
    }

    /// Reads an error in a frame that another queue of this port has received and checked.
    #[must_use]
    pub fn read_path_error(&self, frame: &[u8]) -> Option<PathError> {
        let checks = HardwareChecks { ip_good: true, udp_good: true };
        match frame::parse(frame, &self.local, checks) {
            Ok(Incoming::PathError(error)) => Some(error),
            _ => None,
        }
    }

    /// Whether the port sends packets that lie in several buffers.
    #[must_use]
    pub fn sends_chains(&self) -> bool {
        self.sends_chains
    }

    /// Whether [`Link::send`] has room in its burst.
    #[must_use]
    pub fn can_send(&self) -> bool {
        !self.sending.is_full()
    }

    /// Queues one datagram. `write` puts the payload into the bytes that it is given, at most as many as the MTU
    /// allows, and says to whom it goes, or `None` if there is nothing to send. Returns whether a datagram was queued;
    /// when the burst is full or no buffer is free, `write` is not called.
    #[inline]
    pub fn send(&mut self, write: impl FnOnce(&mut [u8]) -> Option<Outgoing>) -> bool {
        if self.sending.is_full() {
            return false;
        }
        if self.fresh.is_empty() {
            let refilled = self.pool.alloc_burst(&mut self.fresh, self.refill)
                || self.pool.alloc_burst(&mut self.fresh, 1);
            if !refilled {
                self.counters.tx_nombuf.add(1);
            }
        }
        let Some(mut mbuf) = self.fresh.pop() else { return false };
        let header = self.local.header_bytes();
        let room = header + self.max_payload_bytes;
        let Some(buffer) = mbuf.append(room) else { return false };
        let queued = write(&mut buffer[header..]).and_then(|outgoing| {
            let Outgoing { from_port, to, payload_bytes, tail, marks_answered, covered } = outgoing;
            let attached = tail.as_ref().map_or(&[][..], Mbuf::data);
            let datagram = frame::Outgoing {
                source_port: from_port,
                to,
                payload_bytes: payload_bytes + attached.len(),
                attached,
                checksum: if covered { self.covered_checksum } else { self.tx_checksum },
                ecn: if marks_answered { Ecn::Ect0 } else { Ecn::NotCapable },
            };
            frame::emit_udp(buffer, &self.local, &datagram).ok()?;
            Some((header + payload_bytes, tail))
        });
        let Some((here, tail)) = queued else {
            mbuf.trim_back(room);
            // It came from there.
            let _ = self.fresh.push(mbuf);
            return false;
        };
        mbuf.trim_back(room - here);
        if let Some(tail) = tail {
            let chained = mbuf.chain(tail);
            debug_assert!(chained.is_ok(), "two buffers make a chain");
        }
        if self.tx_checksum == TxChecksum::Hardware {
            let ipv6 = self.local.ip.is_ipv6();
            let link = u8::try_from(self.local.link_bytes()).unwrap_or(u8::MAX);
            mbuf.request_tx_checksum(link, if ipv6 { 40 } else { 20 }, ipv6);
        }
        self.push(mbuf);
        true
    }

    fn push(&mut self, mbuf: Mbuf) {
        self.counters.tx_bytes.add(mbuf.total_bytes() as u64);
        // Room was checked before the mbuf was filled.
        let pushed = self.sending.push(mbuf);
        debug_assert!(pushed.is_ok(), "the burst had room");
    }

    /// Gives queued datagrams to the device; what it does not take stays queued. Returns how many it took.
    #[inline]
    pub fn flush(&mut self) -> usize {
        if self.sending.is_empty() {
            return 0;
        }
        self.refill = if self.sending.is_full() { BURST } else { 1 };
        let sent = self.tx.send(&mut self.sending);
        self.counters.tx_packets.add(sent as u64);
        sent
    }

    /// Sends what is due to neighbours.
    #[inline]
    pub fn poll_neighbours(&mut self, now_ns: u64) {
        let now = Instant::from_nanos(now_ns);
        while self.neighbours.poll_timeout().is_some_and(|due| due <= now) && self.can_send() {
            let Some(mut mbuf) = self.pool.alloc() else { return };
            let Some(buffer) = mbuf.append(neighbour::FRAME_BYTES) else { return };
            let Some(bytes) = self.neighbours.poll_transmit(now, buffer) else { return };
            mbuf.trim_back(neighbour::FRAME_BYTES - bytes);
            self.push(mbuf);
        }
    }

    /// The MAC address of a next hop, once known.
    #[must_use]
    pub fn neighbour(&self, ip: IpAddr) -> Option<[u8; 6]> {
        self.macs.get(ip)
    }
}
