//! Planes that are received into GPU memory, for which memory of the process stands in, as the CPU does for the NIC: where they land, what is
//! received so and what is not, and what happens when that fails.

#[allow(dead_code, unused_imports, reason = "each test binary uses its part")]
mod lab;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use client::{ChunkPlace, Client, ClientConfig, Fetch, FetchRequest, Layout, MissingReason, Outcome};
use compress::Codec;
use dataplane::{GpuConfig, GpuDirect, RunError};
use dpdk::{Burst, Eal, EalConfig, Pool, PoolConfig, Port, PortConfig, RxQueue, TxQueue};
use gpu_dma::testing::{Call, FakeDriver, Pace};
use gpu_dma::{Driver, GpuSinkConfig};
use iface::StopOnDrop;
use protocol::frame::{self, HardwareChecks, Incoming, Local, Peer};
use protocol::wire::arp;
use protocol::{Namespace, ServeConfig, ServeEngine};
use serde_json::Value;

use lab::chunks::{CHUNK_TOKENS, Library, SHAPE};
use lab::frames;
use lab::gpu_memory::{SmallRing, cache, contents, expected, request};
use lab::random::Random;

const STORE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const STORE_PORT: u16 = 4791;
/// The data plane's UDP ports where it has one queue: the ordinary one, and the one behind it whose packets a NIC would put into GPU memory. With
/// more queues their ordinary ports come first, then the others, and so do the receive queues.
const PORTS: [u16; 2] = [4800, 4801];

/// A packet of the store's, and the queue that it is to arrive on.
struct Packet {
    bytes: Vec<u8>,
    queue: usize,
}

/// Changes what the store sends in one turn.
type Mischief<'a> = &'a mut dyn FnMut(&mut Vec<Packet>);

struct Store {
    rx: Vec<RxQueue>,
    tx: Vec<TxQueue>,
    pool: Pool,
    _port: Port,
    local: Local,
    serve: ServeEngine,
    plane_mac: [u8; 6],
}

impl Store {
    fn open(eal: &Eal, device: &str, name: &str, queues: u16) -> Self {
        let pool = Pool::new(eal, name, PoolConfig { mbufs: 2047, ..PoolConfig::default() }).unwrap();
        let config = PortConfig { rx_queues: queues, tx_queues: queues, ..PortConfig::default() };
        let pools = vec![pool.clone(); usize::from(queues)];
        let (port, rx, tx) = Port::open(eal, device, &config, &pools).unwrap();
        let ip = "10.98.0.1".parse().unwrap();
        let local = Local { mac: STORE_MAC, ip, first_port: STORE_PORT, ports: 1, vlan: None };
        let serve = ServeEngine::new(ServeConfig::default());
        Self { rx, tx, pool, _port: port, local, serve, plane_mac: [0; 6] }
    }

    fn send(&mut self, packet: &Packet) {
        let mut mbuf = self.pool.alloc().expect("the store's buffers come back");
        mbuf.append(packet.bytes.len()).expect("room").copy_from_slice(&packet.bytes);
        let mut burst = Burst::new();
        burst.push(mbuf).unwrap();
        let limit = Instant::now() + Duration::from_secs(10);
        while self.tx[packet.queue].send(&mut burst) == 0 {
            assert!(Instant::now() < limit, "the data plane takes no packets");
            std::thread::yield_now();
        }
    }

    /// Answers what the data plane has sent; returns by which of its ports it asked for planes or headers.
    fn step(&mut self, library: &Library, mischief: Mischief<'_>) -> Vec<u16> {
        let mut pulls = Vec::new();
        let mut burst = Burst::new();
        // In turns: a burst has not room for what all queues have.
        self.rx.rotate_left(1);
        self.rx[0].receive(&mut burst);
        for mbuf in burst.drain() {
            let bytes = mbuf.data();
            if bytes[12..14] == [0x08, 0x06] {
                self.plane_mac = bytes[6..12].try_into().unwrap();
                self.answer_arp();
                continue;
            }
            match frame::parse(bytes, &self.local, HardwareChecks::default()) {
                Ok(Incoming::Datagram { from, payload, .. }) => {
                    pulls.extend((bytes[payload.start + 5] == 3).then_some(from.port));
                    let payload = &bytes[payload];
                    self.serve.handle_datagram(protocol::Instant::ZERO, from, payload, library).unwrap();
                }
                other => panic!("the data plane sent {other:?}"),
            }
        }
        let mut sending = Vec::new();
        let mut message = vec![0; 2048];
        while let Some(transmit) = self.serve.poll_transmit(protocol::Instant::ZERO, &mut message) {
            let mut payload = message[..transmit.header_bytes].to_vec();
            if let Some((handle, range)) = transmit.payload {
                payload.extend_from_slice(&library.chunks[usize::try_from(handle).unwrap()][range]);
            }
            let bytes = frames::datagram(&self.local, &transmit.to, &payload);
            let queue = usize::from(transmit.to.port - PORTS[0]);
            sending.push(Packet { bytes, queue });
        }
        mischief(&mut sending);
        sending.iter().for_each(|packet| self.send(packet));
        pulls
    }

    fn answer_arp(&mut self) {
        let (IpAddr::V4(sender_ip), mac) = (self.local.ip, self.plane_mac) else { unreachable!() };
        let reply = arp::Arp {
            operation: arp::Operation::Reply,
            sender_mac: STORE_MAC,
            sender_ip,
            target_mac: mac,
            target_ip: "10.98.0.2".parse().unwrap(),
        };
        let mut bytes = vec![0; arp::FRAME_BYTES];
        reply.emit_frame(&mut bytes, mac, None).unwrap();
        self.send(&Packet { bytes, queue: 0 });
    }
}

/// At most two.
fn cpus() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None).unwrap();
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).take(2).collect()
}

fn config(device: String, socket: PathBuf, gpu: GpuConfig, queues: u16) -> dataplane::Config {
    let cpus = cpus();
    let rx: Vec<String> = cpus[..usize::from(queues)].iter().map(|cpu| format!("rx@{cpu}")).collect();
    let cpu = cpus[0];
    let base = lab::config(device, socket, gpu);
    dataplane::Config {
        iface: iface::IfaceConfig { queues, rx_descriptors: 512, tx_descriptors: 512, ..base.iface },
        placement: format!("{},decode@{cpu},dma@{cpu}", rx.join(",")).parse().unwrap(),
        compress_dev: None,
        ..base
    }
}

struct Bench {
    store: Store,
    client: Client,
    fake: Arc<FakeDriver>,
    queues: u16,
    /// The data plane has ended.
    ended: Arc<AtomicBool>,
}

/// Runs a data plane with a GPU whose memory is this process's, on the calling thread, which is DPDK's main lcore, and meanwhile `script` on another.
fn with_plane(
    eal: &Eal,
    name: &'static str,
    fake: &Arc<FakeDriver>,
    (direct, queues): (GpuDirect, u16),
    script: impl FnOnce(&mut Bench) + Send,
) -> Result<(), RunError> {
    let driver: Arc<dyn Driver> = fake.clone();
    let gpu = GpuConfig { driver: Some(driver), sink: GpuSinkConfig::default(), direct };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control.sock");
    let (ours, theirs) = Port::ring_pair_with(eal, name, 2 * queues, 2048).unwrap();
    let config = config(theirs, socket.clone(), gpu, queues);
    let (stop, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let result = std::thread::scope(|scope| {
        let (stops, ended_too) = (StopOnDrop(Arc::clone(&stop)), Arc::clone(&ended));
        scope.spawn(move || {
            let _stops = stops;
            let store = Store::open(eal, &ours, &format!("store-{name}"), 2 * queues);
            while !socket.exists() {
                if ended_too.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            let client = Client::connect(&socket, &ClientConfig::new(Namespace::default())).unwrap();
            let fake = Arc::clone(fake);
            let mut bench = Bench { store, client, fake, queues, ended: ended_too };
            script(&mut bench);
        });
        let _ended = StopOnDrop(ended);
        dataplane::run(eal, &config, &stop)
    });
    assert_eq!((fake.for_nic(), fake.registered()), (0, 0), "all memory was let go");
    result
}

impl Bench {
    /// Serves the store until the fetch has ended. Returns the ports that it was asked by, and how the fetch ended.
    fn follow(
        &mut self,
        library: &Library,
        mut fetch: Fetch,
        mischief: Mischief<'_>,
        mut between: impl FnMut(&FakeDriver, &Client),
    ) -> (Vec<u16>, client::FetchReport) {
        let limit = Instant::now() + Duration::from_secs(30);
        let mut pulls = Vec::new();
        loop {
            pulls.extend(self.store.step(library, mischief));
            between(&self.fake, &self.client);
            if let Some(report) = fetch.poll().unwrap() {
                return (pulls, report);
            }
            assert!(!self.ended.load(Ordering::Relaxed), "the data plane ended");
            assert!(Instant::now() < limit, "the fetch does not end");
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    fn stats(&self) -> Value {
        serde_json::from_str(&self.client.stats().unwrap()).unwrap()
    }

    fn count(&self, name: &str) -> u64 {
        self.stats()["gpudirect"]["counters"][name].as_u64().unwrap()
    }

    /// Every buffer is back, every packet is accounted for.
    fn settle(&mut self, library: &Library) {
        let limit = Instant::now() + Duration::from_secs(10);
        loop {
            self.store.step(library, &mut |_| ());
            let stats = self.stats();
            let counters = &stats["counters"];
            let count = |name: &str| counters[name].as_u64().unwrap();
            let drops: u64 =
                counters["dropped"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
            let taken = ["rx_neighbour", "rx_icmp", "segments_accepted", "control_accepted"].map(count);
            let is_settled = stats["gpudirect"]["buffers_in_use"].as_u64().unwrap() == 0
                && stats["memory"]["mbufs_in_use"].as_u64().unwrap() <= u64::from(self.queues)
                && count("rx_packets") == drops + taken.iter().sum::<u64>();
            if is_settled {
                assert_eq!(stats["memory"]["slots_free"], stats["memory"]["slots"]);
                return;
            }
            assert!(Instant::now() < limit, "{stats:#}");
        }
    }
}

/// How planes are expected to be received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Host,
    /// Some so, some so.
    Either,
}

/// Fetches all of `library` into pages, and compares every bit of them.
fn fetch_pages(
    bench: &mut Bench,
    library: &Library,
    (device, page_tokens, hnd): (u8, u16, bool),
    way: Way,
    mischief: Mischief<'_>,
) {
    let what = format!("GPU {device}, pages of {page_tokens}, HND: {hnd}, {way:?}");
    let kv = cache(&bench.fake, device, page_tokens, hnd);
    let cache = bench.client.register_pages(kv.clone()).unwrap();
    let (direct, planes) = (bench.count("planes_direct"), delivered(bench));
    let fetch = bench.client.fetch_pages(&request(&cache, library)).unwrap();
    let (pulls, report) = bench.follow(library, fetch, mischief, |_, _| ());
    assert_eq!(report.outcome, Outcome::Done, "{what}: {report:?} {:#}", bench.stats());
    let contents = contents(&bench.fake, &kv);
    assert!(contents == expected(&kv, library), "{what}: a wrong byte");
    bench.settle(library);
    let (direct, planes) = (bench.count("planes_direct") - direct, delivered(bench) - planes);
    assert_eq!(planes, u64::from(SHAPE.planes()) * 3, "{what}");
    let is_direct = |port: &u16| port - PORTS[0] >= bench.queues;
    assert!(pulls.iter().any(|port| !is_direct(port)), "headers are always pulled to host memory");
    match way {
        Way::Direct => {
            assert!(direct == planes && pulls.iter().any(is_direct), "{what}: {direct} were direct");
        }
        Way::Host => assert!(direct == 0 && !pulls.iter().any(is_direct), "{what}: {direct} were direct"),
        Way::Either => {}
    }
}

fn delivered(bench: &Bench) -> u64 {
    bench.stats()["counters"]["planes_delivered"].as_u64().unwrap()
}

/// Without mischief.
fn fetch(bench: &mut Bench, library: &Library, cache: (u8, u16, bool), way: Way) {
    fetch_pages(bench, library, cache, way, &mut |_| ());
}

fn eal() -> Eal {
    let config = EalConfig {
        lcores: cpus(),
        file_prefix: format!("gpudirect-{}", std::process::id()),
        huge: false,
        memory_mib: Some(256),
        ..EalConfig::default()
    };
    Eal::start(&config).unwrap()
}

/// One test, because a process starts one EAL.
#[test]
fn raw_planes_go_straight_into_gpu_memory() {
    let eal = eal();
    let (raw, int4) = (Library::new(Codec::Raw.into(), 3), Library::new(Codec::Int4.into(), 4));
    let fake = Arc::new(FakeDriver::new(2, Pace::Random(7)));
    with_plane(&eal, "direct", &fake, (GpuDirect::On, 1), |bench| {
        assert_eq!(bench.fake.for_nic(), 1, "there is memory for packets from the start");
        assert!(bench.stats()["gpudirect"]["refused"].is_null());
        for page_tokens in [16, 48, 256] {
            fetch(bench, &raw, (0, page_tokens, false), Way::Direct);
        }
        // What the CPU has to look at, or another GPU is to hold, or would take a copy for each head's vector.
        fetch(bench, &int4, (0, 16, false), Way::Host);
        fetch(bench, &raw, (1, 16, false), Way::Host);
        fetch(bench, &raw, (0, 16, true), Way::Host);
        to_host_memory(bench, &raw);
        ring(bench, &raw);
        bad_network(bench, &raw);
        buffers_stay_until_the_copies_have_ended(bench, &raw);
        refused_copies(bench, &raw);
        what_is_no_segment_is_dropped(bench, &raw);
        nobody_else_chooses_the_way(bench, &Library::new(Codec::Lossless.into(), 6));
    })
    .unwrap();
    two_queues(&eal, &fake, &raw, &int4);
    packets_on_the_wrong_queue(&eal, &fake, &raw);
    a_store_without_checksums(&eal, &fake, &raw);
    falls_back(&eal, &fake, &raw);
}

fn to_host_memory(bench: &mut Bench, library: &Library) {
    let region = bench.client.register(Library::decoded_bytes()).unwrap();
    let places = library.keys.iter().zip(CHUNK_TOKENS).enumerate().map(|(chunk, (key, tokens))| ChunkPlace {
        key: key.0,
        tokens,
        offset: Library::chunk_offset(chunk) as u64,
    });
    let request = FetchRequest {
        region: &region,
        shape: SHAPE,
        layout: Layout::sequence(&SHAPE, u32::try_from(Library::tokens()).unwrap()),
        out_dtype: SHAPE.dtype,
        chunks: places.collect(),
        timeout: Duration::from_secs(20),
        progress: false,
    };
    let fetch = bench.client.fetch(&request).unwrap();
    let (pulls, report) = bench.follow(library, fetch, &mut |_| (), |_, _| ());
    assert_eq!(report.outcome, Outcome::Done, "{report:?}");
    assert!(!pulls.contains(&PORTS[1]));
}

fn ring(bench: &mut Bench, library: &Library) {
    let mut ring = SmallRing::register(&bench.client, &bench.fake);
    let before = bench.count("planes_direct");
    let fetch = bench.client.fetch_ring(&ring.request(library)).unwrap();
    let id = fetch.id();
    let take = |fake: &FakeDriver, _: &Client| ring.take(fake, library, id);
    let (_, report) = bench.follow(library, fetch, &mut |_| (), take);
    ring.take(&bench.fake, library, id);
    assert_eq!(report.outcome, Outcome::Done, "{report:?}");
    ring.assert_all();
    bench.settle(library);
    assert_eq!(bench.count("planes_direct") - before, u64::from(SHAPE.planes()) * 3);
}

/// Packets are lost, come twice, in another order, or damaged behind their headers.
fn bad_network(bench: &mut Bench, library: &Library) {
    let dropped =
        |bench: &Bench, reason: &str| bench.stats()["counters"]["dropped"][reason].as_u64().unwrap();
    let (bad, twice) = (dropped(bench, "bad_udp_checksum"), dropped(bench, "duplicate"));
    let queues = usize::from(bench.queues);
    for seed in 0..6 {
        let mut random = Random::new(100 + seed);
        fetch_pages(bench, library, (0, 16, false), Way::Direct, &mut |packets| {
            random.shuffle(packets);
            packets.retain(|_| !random.chance(50));
            let again: Vec<Packet> = packets
                .iter()
                .filter(|_| random.chance(50))
                .map(|packet| Packet { bytes: packet.bytes.clone(), queue: packet.queue })
                .collect();
            packets.extend(again);
            for packet in packets.iter_mut().filter(|packet| packet.queue >= queues) {
                if random.chance(50) {
                    let last = packet.bytes.len() - 1;
                    packet.bytes[last] ^= 1 << random.below(8);
                }
            }
        });
    }
    assert!(dropped(bench, "bad_udp_checksum") > bad, "damage was seen, by the NIC");
    assert!(dropped(bench, "duplicate") > twice);
    assert_eq!((bench.count("planes_mixed"), bench.count("packets_unverified")), (0, 0));
}

/// A NIC may write to a buffer again as soon as it is free: not before its plane is where it is to be.
fn buffers_stay_until_the_copies_have_ended(bench: &mut Bench, library: &Library) {
    let kv = cache(&bench.fake, 0, 16, false);
    let cache = bench.client.register_pages(kv.clone()).unwrap();
    bench.fake.set_pace(Pace::ByHand);
    let (starts, before) = (bench.fake.starts(), bench.count("planes_direct"));
    let fetch = bench.client.fetch_pages(&request(&cache, library)).unwrap();
    let mut held = None;
    let all = u64::from(SHAPE.planes()) * 3;
    let (_, report) = bench.follow(library, fetch, &mut |_| (), |fake, client| {
        if held.is_some() || fake.starts() == starts {
            return;
        }
        let stats: Value = serde_json::from_str(&client.stats().unwrap()).unwrap();
        let direct = &stats["gpudirect"];
        if direct["counters"]["planes_direct"].as_u64().unwrap() - before == all {
            held = direct["buffers_in_use"].as_u64();
            assert_eq!(stats["counters"]["planes_delivered"].as_u64().unwrap() % all, 0, "none yet");
            fake.set_pace(Pace::Random(9));
        }
    });
    assert_eq!(report.outcome, Outcome::Done, "{report:?}");
    let segment = u64::from(protocol::frame::max_segment_bytes(1500, &"10.98.0.2".parse().unwrap()));
    let segments = |tokens: &u16| (u64::from(*tokens) * 128).div_ceil(segment) * u64::from(SHAPE.planes());
    assert_eq!(held, Some(CHUNK_TOKENS.iter().map(segments).sum()), "every segment was kept");
    assert!(contents(&bench.fake, &kv) == expected(&kv, library));
    bench.settle(library);
}

/// The driver refuses a batch: each plane is tried alone. It refuses more: those planes' chunks are reported, and nothing stays behind.
fn refused_copies(bench: &mut Bench, library: &Library) {
    bench.fake.fail(Call::CopyWithin, 1);
    fetch(bench, library, (0, 16, false), Way::Direct);
    let kv = cache(&bench.fake, 0, 16, false);
    let cache = bench.client.register_pages(kv.clone()).unwrap();
    bench.fake.fail(Call::CopyWithin, 1 << 20);
    let fetch = bench.client.fetch_pages(&request(&cache, library)).unwrap();
    let (_, report) = bench.follow(library, fetch, &mut |_| (), |_, _| ());
    bench.fake.fail(Call::CopyWithin, 0);
    assert_eq!(report.outcome, Outcome::Failed, "{report:?}");
    assert!(report.missing.iter().all(|missing| missing.reason == MissingReason::NotDelivered), "{report:?}");
    bench.settle(library);
}

/// What comes to the second queue and is none of a plane's segments does no harm: the CPU cannot read it.
fn what_is_no_segment_is_dropped(bench: &mut Bench, library: &Library) {
    let mut random = Random::new(77);
    let (local, mac) = (bench.store.local, bench.store.plane_mac);
    fetch_pages(bench, library, (0, 48, false), Way::Direct, &mut |packets| {
        let mut forged = Vec::new();
        for packet in packets.iter() {
            let to = |port| Peer { mac, ip: "10.98.0.2".parse().unwrap(), port };
            // To the second queue by mistake: answers, headers, segments of a tag that nobody has, noise.
            if packet.queue == 0 && random.chance(500) {
                forged.push(Packet { bytes: packet.bytes.clone(), queue: 1 });
            }
            if random.chance(100) {
                let mut payload = packet.bytes[frames::HEADERS..].to_vec();
                let at = random.below(payload.len().min(32));
                payload[at] ^= 0x55;
                forged.push(Packet { bytes: frames::datagram(&local, &to(PORTS[1]), &payload), queue: 1 });
            }
            if random.chance(50) {
                let mut bytes = packet.bytes.clone();
                bytes.truncate(random.below(bytes.len()));
                forged.push(Packet { bytes, queue: 1 });
            }
        }
        packets.splice(0..0, forged);
    });
}

/// Each queue has a second half of its own, and its part of the memory.
fn two_queues(eal: &Eal, fake: &Arc<FakeDriver>, raw: &Library, int4: &Library) {
    if cpus().len() < 2 {
        return eprintln!("skipped with two queues: there is one CPU");
    }
    with_plane(eal, "two", fake, (GpuDirect::On, 2), |bench| {
        for page_tokens in [16, 256] {
            fetch(bench, raw, (0, page_tokens, false), Way::Direct);
        }
        fetch(bench, int4, (0, 16, false), Way::Host);
        bad_network(bench, raw);
    })
    .unwrap();
}

/// Planes that have to be decoded are sent to GPU memory too, and first: none of it is taken for what the pages are to hold.
fn nobody_else_chooses_the_way(bench: &mut Bench, library: &Library) {
    let (local, mac) = (bench.store.local, bench.store.plane_mac);
    let foreign = |bench: &Bench| bench.stats()["counters"]["dropped"]["foreign_port"].as_u64().unwrap();
    let before = foreign(bench);
    fetch_pages(bench, library, (0, 16, false), Way::Host, &mut |packets| {
        let to = Peer { mac, ip: "10.98.0.2".parse().unwrap(), port: PORTS[1] };
        let mut both = Vec::new();
        for packet in packets.drain(..) {
            let payload = &packet.bytes[frames::HEADERS..];
            both.push(Packet { bytes: frames::datagram(&local, &to, payload), queue: 1 });
            both.push(packet);
        }
        packets.extend(both);
    });
    assert!(foreign(bench) > before);
    assert_eq!((bench.count("planes_mixed"), bench.count("packets_unverified")), (0, 0));
}

/// Packets of one plane come to both queues: it is pulled again, and from then on to host memory.
fn packets_on_the_wrong_queue(eal: &Eal, fake: &Arc<FakeDriver>, library: &Library) {
    with_plane(eal, "wrong", fake, (GpuDirect::On, 1), |bench| {
        let mut number = 0;
        fetch_pages(bench, library, (0, 16, false), Way::Either, &mut |packets| {
            for packet in packets.iter_mut().filter(|packet| packet.queue == 1) {
                number += 1;
                packet.queue = usize::from(number % 40 != 7);
            }
        });
        assert!(bench.count("planes_mixed") > 0);
        fetch(bench, library, (0, 16, false), Way::Host);
    })
    .unwrap();
}

/// A store whose packets nobody vouches for is asked for host memory, where the CRC is checked.
fn a_store_without_checksums(eal: &Eal, fake: &Arc<FakeDriver>, library: &Library) {
    with_plane(eal, "absent", fake, (GpuDirect::Auto, 1), |bench| {
        let mut without = |packets: &mut Vec<Packet>| {
            for packet in packets.iter_mut().filter(|packet| packet.bytes[frames::HEADERS + 5] == 4) {
                packet.bytes[40..42].fill(0);
            }
        };
        fetch_pages(bench, library, (0, 16, false), Way::Either, &mut without);
        assert_eq!(bench.count("planes_direct"), 0, "nothing unverified reached a page");
        assert!(bench.count("packets_unverified") > 0);
        fetch_pages(bench, library, (0, 256, false), Way::Host, &mut without);
    })
    .unwrap();
}

/// Where it cannot be had, `auto` does without and says why, and `on` does not start.
fn falls_back(eal: &Eal, fake: &Arc<FakeDriver>, library: &Library) {
    fake.fail(Call::AllocateForNic, 1);
    with_plane(eal, "auto", fake, (GpuDirect::Auto, 1), |bench| {
        let stats = bench.stats();
        let why = stats["gpudirect"]["refused"].as_str().expect("a reason");
        assert!(why.contains("cuMemAlloc"), "{why}");
        let kv = cache(&bench.fake, 0, 16, false);
        let cache = bench.client.register_pages(kv.clone()).unwrap();
        let fetch = bench.client.fetch_pages(&request(&cache, library)).unwrap();
        let (pulls, report) = bench.follow(library, fetch, &mut |_| (), |_, _| ());
        assert_eq!(report.outcome, Outcome::Done, "{report:?}");
        assert!(!pulls.contains(&PORTS[1]));
        assert!(contents(&bench.fake, &kv) == expected(&kv, library));
    })
    .unwrap();
    fake.fail(Call::AllocateForNic, 1);
    let refused = with_plane(eal, "on", fake, (GpuDirect::On, 1), |_| panic!("it must not start"));
    let refused = refused.expect_err("it does not start").to_string();
    assert!(refused.contains("--gpudirect on: ") && refused.contains("cuMemAlloc"), "{refused}");
}
