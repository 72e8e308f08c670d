//! Several queues and several stores behind a device that spreads packets by a hash of addresses and ports: answers reach the queue that asked, and
//! where they do not, the queue passes them on.

#[allow(dead_code, unused_imports, reason = "each test binary uses its part")]
mod lab;

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use client::{ChunkPlace, Client, ClientConfig, FetchReport, FetchRequest, Layout, MissingReason, Outcome};
use compress::Codec;
use dpdk::{Burst, Eal, EalConfig, Pool, PoolConfig, Port, PortConfig, Rss, RxQueue, TxQueue};
use protocol::frame::{self, HardwareChecks, Incoming, Local, Peer};
use protocol::placement::{Placement, store_id};
use protocol::wire::arp;
use protocol::{Namespace, ServeConfig, ServeEngine};
use serde_json::Value;

use lab::chunks::{CHUNK_TOKENS, Library, SHAPE};
use lab::frames;

const STORES: u8 = 4;
const STORE_PORT: u16 = 4791;
const PLANE_IP: [u8; 4] = [10, 98, 0, 2];

/// A store that holds whatever it is asked for.
struct Store {
    local: Local,
    serve: ServeEngine,
    /// Ports of the data plane that it was asked from.
    asked_from: BTreeSet<u16>,
}

/// The other end of the data plane's wire.
struct Net {
    rx: Vec<RxQueue>,
    tx: Vec<TxQueue>,
    pool: Pool,
    _port: Port,
    rss: Rss,
    stores: Vec<Store>,
    /// A store that is not there: what is asked of it is answered with an ICMP error, which comes to a queue that did not ask.
    gone: Option<usize>,
    errors: u64,
}

impl Net {
    fn open(eal: &Eal, device: &str, queues: u16, rss: Rss) -> Self {
        let pool_config = PoolConfig { mbufs: 8191, ..PoolConfig::default() };
        let pool = Pool::new(eal, "wire", pool_config).unwrap();
        let pools = vec![pool.clone(); usize::from(queues)];
        let config = PortConfig { rx_queues: queues, tx_queues: queues, ..PortConfig::default() };
        let (port, rx, tx) = Port::open(eal, device, &config, &pools).unwrap();
        let store = |number: u8| Store {
            local: Local {
                mac: [2, 0, 0, 0, 1, number],
                ip: IpAddr::from([10, 98, 0, 10 + number]),
                first_port: STORE_PORT,
                ports: 1,
                vlan: None,
            },
            serve: ServeEngine::new(ServeConfig { epoch: 1 + u64::from(number), ..ServeConfig::default() }),
            asked_from: BTreeSet::new(),
        };
        let stores = (0..STORES).map(store).collect();
        Self { rx, tx, pool, _port: port, rss, stores, gone: None, errors: 0 }
    }

    fn send(&mut self, queue: u16, frame: &[u8]) {
        let mut mbuf = self.pool.alloc().expect("the wire's buffers come back");
        mbuf.append(frame.len()).expect("a buffer holds any packet").copy_from_slice(frame);
        let mut burst = Burst::new();
        burst.push(mbuf).unwrap();
        while !burst.is_empty() {
            if self.tx[usize::from(queue)].send(&mut burst) == 0 {
                std::thread::yield_now();
            }
        }
    }

    /// Takes what the data plane has sent, and answers.
    fn poll(&mut self, library: &Library) {
        let mut frames = Vec::new();
        for rx in &mut self.rx {
            let mut burst = Burst::new();
            rx.receive(&mut burst);
            frames.extend(burst.iter().map(|mbuf| mbuf.data().to_vec()));
        }
        for bytes in &frames {
            for store in 0..self.stores.len() {
                match frame::parse(bytes, &self.stores[store].local, HardwareChecks::default()) {
                    Ok(Incoming::NeighbourRequest { sender_mac, .. }) => self.answer_arp(store, sender_mac),
                    Ok(Incoming::Datagram { from, .. }) if self.gone == Some(store) => {
                        let asked = self.queue_of(store, &from);
                        let other = (asked + 1) % u16::try_from(self.tx.len()).unwrap();
                        self.errors += 1;
                        self.send(other, &frames::unreachable(bytes, 3));
                    }
                    Ok(Incoming::Datagram { from, payload, .. }) => {
                        self.serve(store, from, &bytes[payload], library);
                    }
                    _ => {}
                }
            }
        }
        if frames.is_empty() {
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Where the device brings what a store sends to a port of the data plane.
    fn queue_of(&self, store: usize, to: &Peer) -> u16 {
        self.rss.queue_for(self.stores[store].local.ip, to.ip, STORE_PORT, to.port).unwrap()
    }

    fn serve(&mut self, store: usize, from: Peer, payload: &[u8], library: &Library) {
        let Store { serve, asked_from, .. } = &mut self.stores[store];
        asked_from.insert(from.port);
        let now = protocol::Instant::ZERO;
        serve.handle_datagram(now, from, payload, library).unwrap();
        let (mut header, mut answers) = (vec![0; 2048], Vec::new());
        while let Some(transmit) = serve.poll_transmit(now, &mut header) {
            let mut message = header[..transmit.header_bytes].to_vec();
            if let Some((handle, range)) = transmit.payload {
                message.extend_from_slice(&library.chunks[usize::try_from(handle).unwrap()][range]);
            }
            answers.push((transmit.to, message));
        }
        for (to, message) in answers {
            let frame = frames::datagram(&self.stores[store].local, &to, &message);
            self.send(self.queue_of(store, &to), &frame);
        }
    }

    fn answer_arp(&mut self, store: usize, target_mac: [u8; 6]) {
        let Local { mac: sender_mac, ip: IpAddr::V4(sender_ip), .. } = self.stores[store].local else {
            unreachable!("the stores have IPv4 addresses")
        };
        let operation = arp::Operation::Reply;
        let reply = arp::Arp { operation, sender_mac, sender_ip, target_mac, target_ip: PLANE_IP.into() };
        let mut bytes = vec![0; arp::FRAME_BYTES];
        reply.emit_frame(&mut bytes, target_mac, None).unwrap();
        self.send(0, &bytes);
    }

    /// Fetches what a library holds, and compares what is said to have arrived.
    fn fetch(&mut self, client: &Client, library: &Library) -> FetchReport {
        let region = client.register(Library::decoded_bytes()).unwrap();
        let chunks = library.keys.iter().zip(CHUNK_TOKENS).enumerate().map(|(chunk, (key, tokens))| {
            ChunkPlace { key: key.0, tokens, offset: Library::chunk_offset(chunk) as u64 }
        });
        let request = FetchRequest {
            region: &region,
            shape: SHAPE,
            layout: Layout::sequence(&SHAPE, u32::try_from(Library::tokens()).unwrap()),
            out_dtype: SHAPE.dtype,
            chunks: chunks.collect(),
            timeout: lab::PATIENCE,
            progress: false,
        };
        let mut fetch = client.fetch(&request).unwrap();
        let report = loop {
            self.poll(library);
            if let Some(report) = fetch.poll().unwrap() {
                break report;
            }
        };
        let mut bytes = vec![0; region.bytes()];
        region.copy_out(0, &mut bytes).unwrap();
        for (chunk, planes) in (0..).zip(&library.planes) {
            if report.missing.iter().any(|missing| missing.chunk == chunk) {
                continue;
            }
            for (plane, expected) in planes.iter().enumerate() {
                let at = Library::plane_offset(usize::try_from(chunk).unwrap(), plane);
                assert!(&bytes[at..at + expected.len()] == expected, "chunk {chunk}, plane {plane}");
            }
        }
        report
    }
}

/// What a data plane made of several fetches.
struct Seen {
    counters: Value,
    /// Ports that each store was asked from.
    ports: Vec<BTreeSet<u16>>,
}

/// Runs a data plane whose device spreads by `rss`, of which it is `told`.
fn run(eal: &Arc<Eal>, name: &str, cpus: &[usize], rss: &Rss, told: bool, libraries: &[Library]) -> Seen {
    let queues = u16::try_from(cpus.len()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control.sock");
    let (ours, theirs) = Port::ring_pair_with(eal, name, queues, 2048).unwrap();
    let mut config = lab::config(theirs, socket.clone(), dataplane::GpuConfig::default());
    config.iface.queues = queues;
    config.iface.rss = told.then(|| rss.clone());
    let rx: Vec<String> = cpus.iter().map(|cpu| format!("rx@{cpu}")).collect();
    config.placement = format!("{},decode@{},dma@{}", rx.join(","), cpus[0], cpus[0]).parse().unwrap();
    config.compress_dev = None;
    config.stores = (0..STORES).map(|number| ([10, 98, 0, 10 + number], STORE_PORT).into()).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let thread = {
        let (eal, stop) = (Arc::clone(eal), Arc::clone(&stop));
        std::thread::spawn(move || dataplane::run(&eal, &config, &stop))
    };
    let mut net = Net::open(eal, &ours, queues, rss.clone());
    while !socket.exists() {
        assert!(!thread.is_finished(), "the data plane did not start: {:?}", thread.join());
        std::thread::sleep(Duration::from_millis(5));
    }
    let client = Client::connect(&socket, &ClientConfig::new(Namespace::default())).unwrap();
    for library in libraries {
        let report = net.fetch(&client, library);
        assert_eq!(report.outcome, Outcome::Done, "{report:?}");
    }
    let counters: Value = serde_json::from_str(&client.stats().unwrap()).unwrap();
    let ports = net.stores.iter().map(|store| store.asked_from.clone()).collect();
    one_store_is_gone(&mut net, &client, libraries);
    drop(client);
    stop.store(true, Ordering::Relaxed);
    thread.join().expect("the data plane does not panic").expect("the data plane ends in order");
    Seen { counters: counters["counters"].clone(), ports }
}

/// Errors come to the wrong queues, and reach the right ones: the fetches miss what that store should hold, for that reason.
fn one_store_is_gone(net: &mut Net, client: &Client, libraries: &[Library]) {
    let ids: Vec<u64> = net
        .stores
        .iter()
        .map(|store| store_id(&std::net::SocketAddr::new(store.local.ip, STORE_PORT).to_string()))
        .collect();
    let placement = Placement::new(&ids, 1).unwrap();
    net.gone = Some(0);
    for library in libraries {
        let report = net.fetch(client, library);
        let missing: HashMap<u32, MissingReason> =
            report.missing.iter().map(|missing| (missing.chunk, missing.reason)).collect();
        for (chunk, key) in (0..).zip(&library.keys) {
            let is_gone = placement.candidates(key).as_slice()[0].0 == 0;
            let expected = is_gone.then_some(&MissingReason::StoreUnreachable);
            assert_eq!(missing.get(&chunk), expected, "chunk {chunk}: {report:?}");
        }
    }
    assert!(net.errors > 0, "some chunk is placed on it");
}

#[test]
fn answers_of_every_store_reach_the_queue_that_asked() {
    let set = rustix::thread::sched_getaffinity(None).unwrap();
    let cpus: Vec<usize> =
        (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).take(4).collect();
    if cpus.len() < 2 {
        return println!("skipped: a queue needs a CPU of its own, and there is one");
    }
    let eal = Arc::new(
        Eal::start(&EalConfig {
            lcores: cpus.clone(),
            file_prefix: format!("steering-{}", std::process::id()),
            huge: false,
            memory_mib: Some(256),
            ..EalConfig::default()
        })
        .unwrap(),
    );
    let libraries: Vec<Library> = (0..12).map(|seed| Library::new(Codec::Int8.into(), seed)).collect();
    let queues = u16::try_from(cpus.len()).unwrap();
    let rss = Rss {
        key: (0..40_u8).map(|byte| byte.wrapping_mul(37) ^ 0x5a).collect(),
        reta: (0..128).map(|entry| entry % queues).collect(),
    };

    let told = run(&eal, "told", &cpus, &rss, true, &libraries);
    assert_eq!(told.counters["misdirected"], 0, "{:#}", told.counters);
    for ports in &told.ports {
        assert_eq!(ports.len(), cpus.len(), "each queue asks each store from its own port: {ports:?}");
    }

    let untold = run(&eal, "untold", &cpus, &rss, false, &libraries);
    assert!(untold.counters["misdirected"].as_u64() > Some(0), "{:#}", untold.counters);
    assert_eq!(untold.counters["dropped"]["queue_full"], 0, "{:#}", untold.counters);
}
