//! A data plane on one end of a pair of ring ports, and on the other end a store whose packets come with others that no
//! store would send.

mod checks;
pub(crate) mod chunks;
pub(crate) mod forgery;
pub(crate) mod frames;
pub(crate) mod gpu_memory;
pub(crate) mod ledger;
mod mischief;
pub(crate) mod random;
mod round;
mod wire;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use client::{ChunkPlace, Client, ClientConfig, FetchReport, FetchRequest, Layout, Region};
use dpdk::{Eal, EalConfig, Port};
use protocol::frame::{self, HardwareChecks, Incoming, Local, Peer};
use protocol::wire::arp;
use protocol::{Namespace, ServeConfig, ServeEngine};
use serde_json::Value;

use checks::{accounted, check_counters, check_region, check_report, count, shaky};
use chunks::{CHUNK_TOKENS, Library, SHAPE};
use frames::Frame;
use ledger::{Fates, Ledger};
use random::Random;
use wire::Wire;

pub(crate) use round::{Rates, Round, Twist};

const STORE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const STORE_PORT: u16 = 4791;
const PLANE_PORT: u16 = 4800;
const SLOTS: usize = 4;

/// How long anything may take on a busy machine before a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// What the region holds where nothing was delivered.
const UNTOUCHED: u8 = 0xa5;
/// Bytes behind what is fetched that nobody may touch.
const GUARD_BYTES: usize = 4096;

pub(crate) struct Lab {
    wire: Wire,
    local: Local,
    plane: Peer,
    pub(crate) ledger: Ledger,
    serve: ServeEngine,
    epoch: u64,
    client: Client,
    region: Region,
    /// The store's packets that have not been sent yet.
    held: Vec<Frame>,
    late: Vec<Frame>,
    /// Wrong payloads sent, by chunk and offset of the range.
    poisons: HashMap<(u32, u64), u32>,
    /// ERRORs sent, by chunk.
    errors: HashMap<u32, u32>,
    /// ARP replies of the data plane that are still to come.
    pub(crate) arp_replies: u64,
    pub(crate) arp_requests: u64,
    sent: u64,
    /// Of those, before the round's fetch.
    begun_at: u64,
    received: u64,
    /// Over all rounds.
    pub(crate) totals: HashMap<Fates, u64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), dataplane::RunError>>,
    _folder: tempfile::TempDir,
    eal: Arc<Eal>,
}

fn first_cpu() -> usize {
    let set = rustix::thread::sched_getaffinity(None).unwrap();
    (0..rustix::thread::CpuSet::MAX_CPU).find(|&cpu| set.is_set(cpu)).unwrap()
}

pub(crate) fn config(device: String, socket: PathBuf, gpu: dataplane::GpuConfig) -> dataplane::Config {
    let cpu = first_cpu();
    dataplane::Config {
        iface: iface::IfaceConfig {
            device,
            address: "10.98.0.2/24".parse().unwrap(),
            vlan: None,
            udp_port: PLANE_PORT,
            mtu: 1500,
            queues: 1,
            rx_descriptors: 1024,
            tx_descriptors: 1024,
            mbufs: 4096,
            rss: None,
        },
        placement: format!("rx@{cpu},decode@{cpu},dma@{cpu}").parse().unwrap(),
        stores: vec![format!("10.98.0.1:{STORE_PORT}").parse().unwrap()],
        replicas: 1,
        store_mac: None,
        gateway: None,
        socket,
        group: None,
        slots: SLOTS,
        slot_bytes: 64 << 10,
        pages: hugepages::PageChoice::Base,
        // Takes the planes that are compressed with Deflate; the core has the others.
        compress_dev: Some("compress_zlib".into()),
        window_segments: Some(96),
        link_mbps: 0,
        queue_tolerance: Duration::from_micros(100),
        schedule: protocol::Schedule::default(),
        max_fetches: 4,
        max_chunks: 64,
        max_layers: 16,
        rto_min: Duration::from_millis(4),
        hedge_percent: 5,
        idle_sleep: Duration::from_micros(20),
        gpu,
        save: dataplane::SaveConfig::NONE,
    }
}

impl Lab {
    pub(crate) fn start() -> Self {
        Self::start_with(dataplane::GpuConfig::default())
    }

    pub(crate) fn start_with(gpu: dataplane::GpuConfig) -> Self {
        let eal = Arc::new(
            Eal::start(&EalConfig {
                lcores: vec![first_cpu()],
                file_prefix: format!("packets-{}", std::process::id()),
                huge: false,
                memory_mib: Some(128),
                ..EalConfig::default()
            })
            .unwrap(),
        );
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("control.sock");
        let (ours, theirs) = Port::ring_pair_with(&eal, "lab", 1, 2048).unwrap();
        let config = config(theirs, socket.clone(), gpu);
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (eal, stop) = (Arc::clone(&eal), Arc::clone(&stop));
            std::thread::spawn(move || dataplane::run(&eal, &config, &stop))
        };
        let wire = Wire::open(&eal, &ours);
        while !socket.exists() {
            assert!(!thread.is_finished(), "the data plane did not start: {:?}", thread.join());
            std::thread::sleep(Duration::from_millis(5));
        }
        let client = Client::connect(&socket, &ClientConfig::new(Namespace::default())).unwrap();
        let region = client.register(Library::decoded_bytes() + GUARD_BYTES).unwrap();
        let ip: IpAddr = "10.98.0.1".parse().unwrap();
        let local = Local { mac: STORE_MAC, ip, first_port: STORE_PORT, ports: 1, vlan: None };
        let plane = Peer { mac: [0; 6], ip: "10.98.0.2".parse().unwrap(), port: PLANE_PORT };
        let plane_local = Local { mac: [0; 6], ip: plane.ip, first_port: PLANE_PORT, ports: 1, vlan: None };
        let mut lab = Self {
            wire,
            local,
            plane,
            ledger: Ledger::new(plane_local, Peer { mac: STORE_MAC, ip, port: STORE_PORT }),
            serve: ServeEngine::new(ServeConfig::default()),
            epoch: 1,
            client,
            region,
            held: Vec::new(),
            late: Vec::new(),
            poisons: HashMap::new(),
            errors: HashMap::new(),
            arp_replies: 0,
            arp_requests: 0,
            sent: 0,
            begun_at: 0,
            received: 0,
            totals: HashMap::new(),
            stop,
            thread,
            _folder: folder,
            eal,
        };
        lab.meet();
        lab
    }

    /// Learns the data plane's MAC address from its first ARP request, before anything is sent.
    fn meet(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let request = loop {
            assert!(Instant::now() < deadline, "the data plane does not ask for the store");
            // It may have asked several times by now; one answer is enough.
            let asked = self.wire.receive();
            self.received += asked.len() as u64;
            if let Some(frame) = asked.into_iter().next() {
                break frame;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let mac: [u8; 6] = request[6..12].try_into().unwrap();
        self.plane.mac = mac;
        let plane_local = Local { mac, ip: self.plane.ip, first_port: PLANE_PORT, ports: 1, vlan: None };
        let store = Peer { mac: STORE_MAC, ip: self.local.ip, port: STORE_PORT };
        self.ledger = Ledger::new(plane_local, store);
        self.ledger.begin(&[]);
        let library = Library { keys: vec![], chunks: vec![], index: HashMap::new(), planes: vec![] };
        self.answer_arp(&library);
        self.wire.flush();
    }

    fn answer_arp(&mut self, library: &Library) {
        let (IpAddr::V4(sender_ip), IpAddr::V4(target_ip)) = (self.local.ip, self.plane.ip) else {
            unreachable!()
        };
        let reply = arp::Arp {
            operation: arp::Operation::Reply,
            sender_mac: STORE_MAC,
            sender_ip,
            target_mac: self.plane.mac,
            target_ip,
        };
        let mut bytes = vec![0; arp::FRAME_BYTES];
        reply.emit_frame(&mut bytes, self.plane.mac, None).unwrap();
        self.put(&bytes.into(), library);
    }

    /// Sends one packet.
    fn put(&mut self, frame: &Frame, library: &Library) -> Fates {
        let fates = self.ledger.sent(frame, library);
        self.sent += 1;
        self.wire.push(frame);
        fates
    }

    /// Carries out one round and checks everything that can be told from outside.
    pub(crate) fn round(&mut self, mut round: Round<'_>) {
        let name = format!("{} (seed {})", round.name, round.seed);
        let mut random = Random::new(round.seed);
        let before = self.settle(round.library);
        let shaky = shaky(&round);
        self.ledger.begin(&shaky);
        self.poisons.clear();
        self.errors.clear();
        let (sent, received) = (self.sent, self.received);
        self.serve = ServeEngine::new(ServeConfig { epoch: self.epoch, ..ServeConfig::default() });
        self.region.arena().copy_in(0, &vec![UNTOUCHED; self.region.bytes()]).unwrap();
        let report = self.fetch(&mut round, &mut random);
        check_report(&name, &round, &report);
        check_region(&name, &round, &self.region);
        self.send_late(round.library);
        let after = self.settle(round.library);
        let sums = std::mem::take(&mut self.ledger.sums);
        assert_eq!(sums.packets, self.sent - sent);
        check_counters(&name, &before, &after, &sums, self.received - received);
        for (fates, count) in sums.fates {
            *self.totals.entry(fates).or_default() += count;
        }
    }

    /// Where clients connect.
    pub(crate) fn socket(&self) -> PathBuf {
        self._folder.path().join("control.sock")
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// A store without memory of earlier rounds, for fetches that a test starts itself.
    pub(crate) fn fresh_store(&mut self) {
        self.ledger.begin(&[]);
        self.serve = ServeEngine::new(ServeConfig { epoch: self.epoch, ..ServeConfig::default() });
    }

    /// Serves the store's side, once.
    pub(crate) fn serve(&mut self, round: &mut Round<'_>, random: &mut Random) {
        if !self.step(round, random) {
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Waits for the data plane, which is to end by itself.
    pub(crate) fn end(self) -> Result<(), dataplane::RunError> {
        let Self { wire, client, region, thread, eal, .. } = self;
        drop((region, client));
        let ended = thread.join().expect("the data plane does not panic");
        drop(wire);
        drop(eal);
        ended
    }

    fn fetch(&mut self, round: &mut Round<'_>, random: &mut Random) -> FetchReport {
        let chunks = round.library.keys.iter().zip(CHUNK_TOKENS).enumerate().map(|(chunk, (key, tokens))| {
            ChunkPlace { key: key.0, tokens, offset: Library::chunk_offset(chunk) as u64 }
        });
        let tokens = u32::try_from(Library::tokens()).unwrap();
        let region = self.region.clone();
        let request = FetchRequest {
            region: &region,
            shape: SHAPE,
            layout: Layout::sequence(&SHAPE, tokens),
            out_dtype: SHAPE.dtype,
            chunks: chunks.collect(),
            timeout: round.timeout,
            progress: false,
        };
        self.begun_at = self.sent;
        let (first, mut cancelled) = (self.sent, false);
        let mut fetch = self.client.fetch(&request).unwrap();
        loop {
            if round.restart_after.is_some_and(|after| self.sent - first > after) {
                round.restart_after = None;
                self.epoch += 1;
                self.serve = ServeEngine::new(ServeConfig { epoch: self.epoch, ..ServeConfig::default() });
            }
            if round.cancel_after.is_some_and(|after| self.sent - first > after) && !cancelled {
                fetch.cancel().unwrap();
                cancelled = true;
            }
            if !self.step(round, random) {
                assert!(!self.thread.is_finished(), "the data plane ended");
                std::thread::sleep(Duration::from_micros(20));
            }
            if let Some(report) = fetch.poll().unwrap() {
                self.late.append(&mut self.held);
                self.ledger.end();
                return report;
            }
        }
    }

    /// Takes requests, sends packets. Returns whether anything was done.
    fn step(&mut self, round: &mut Round<'_>, random: &mut Random) -> bool {
        let requests = self.take(round.library);
        let mut done = !requests.is_empty();
        let error = round.unreachable_after.filter(|(after, _)| self.sent - self.begun_at >= *after);
        for (from, payload) in requests {
            if random.chance(round.rates.lose_request) {
                continue;
            }
            if let Some((_, code)) = error {
                let store = Peer { mac: STORE_MAC, ip: self.local.ip, port: STORE_PORT };
                let plane = Local { mac: from.mac, ip: from.ip, first_port: from.port, ports: 1, vlan: None };
                let request = frames::datagram(&plane, &store, &payload);
                self.ledger.asked(&payload);
                self.put(&frames::unreachable(&request, code).into(), round.library);
                continue;
            }
            self.ledger.asked(&payload);
            self.serve.handle_datagram(protocol::Instant::ZERO, from, &payload, round.library).unwrap();
        }
        let mut message = vec![0; 2048];
        while let Some(transmit) = self.serve.poll_transmit(protocol::Instant::ZERO, &mut message) {
            let mut payload = message[..transmit.header_bytes].to_vec();
            if let Some((handle, range)) = transmit.payload {
                payload.extend_from_slice(&round.library.chunks[usize::try_from(handle).unwrap()][range]);
            }
            if let Some(twist) = &mut round.twist {
                twist(&mut payload, &self.ledger);
            }
            self.held.push(frames::datagram(&self.local, &self.plane, &payload).into());
        }
        let mut going = std::mem::take(&mut self.held);
        if round.rates.reorder > 0 {
            random.shuffle(&mut going);
            self.held = going.extract_if(.., |_| random.chance(round.rates.reorder)).collect();
        }
        done |= !going.is_empty();
        for frame in going {
            if round.cut > 0 && self.ledger.awaits(&frame.bytes[frames::HEADERS..]) {
                round.cut -= 1;
                self.cut(&frame.bytes, round.library);
            }
            self.send(frame, &round.rates, round.library, random);
        }
        self.wire.flush();
        done
    }

    /// What the data plane has sent: requests for the store; ARP is answered.
    fn take(&mut self, library: &Library) -> Vec<(Peer, Vec<u8>)> {
        let mut requests = Vec::new();
        for bytes in self.wire.receive() {
            self.received += 1;
            if bytes[12..14] == [0x08, 0x06] {
                if bytes[21] == 1 {
                    self.answer_arp(library);
                } else {
                    self.arp_replies += 1;
                }
                continue;
            }
            match frame::parse(&bytes, &self.local, HardwareChecks::default()) {
                Ok(Incoming::Datagram { from, payload, .. }) => {
                    requests.push((from, bytes[payload].to_vec()))
                }
                other => panic!("the data plane sent {other:?}"),
            }
        }
        requests
    }

    /// Waits until every packet sent was accounted for, every packet received was taken, and only the buffer for the data
    /// plane's next packet is in use; returns the statistics of that moment.
    fn settle(&mut self, library: &Library) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for (_, payload) in self.take(library) {
                self.ledger.asked(&payload);
            }
            self.wire.flush();
            // Counters are read one after another: those read before the last packet was accounted for may miss it, the second time
            // they cannot.
            let stats = self.stats();
            if self.is_settled(&stats) {
                let again = self.stats();
                if self.is_settled(&again) {
                    return again;
                }
            }
            let (sent, received) = (self.sent, self.received);
            assert!(Instant::now() < deadline, "sent {sent}, received {received}: {stats:#}");
        }
    }

    fn is_settled(&self, stats: &Value) -> bool {
        let counters = &stats["counters"];
        count(counters, "rx_packets") == self.sent
            && accounted(counters) == self.sent
            && count(counters, "tx_packets") == self.received
            && count(&stats["memory"], "mbufs_in_use") <= 1
    }

    pub(crate) fn stats(&self) -> Value {
        serde_json::from_str(&self.client.stats().unwrap()).unwrap()
    }

    /// Ends the data plane, which must not mind; every buffer must be back.
    pub(crate) fn stop(self) {
        let Self { wire, client, region, stop, thread, eal, .. } = self;
        drop((region, client));
        stop.store(true, Ordering::Relaxed);
        thread.join().expect("the data plane does not panic").expect("the data plane ends in order");
        assert_eq!(wire.pool.in_use(), 0, "every packet of the store was freed");
        drop(wire);
        drop(eal);
    }
}
