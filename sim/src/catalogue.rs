//! The named scenarios, and what is measured in each.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::put::AcceptConfig;
use protocol::wire::message::DATA_HEADER_BYTES;
use protocol::{FetchConfig, ServeConfig};
use serde::Serialize;

use crate::host::{Deed, Order};
use crate::intakes::PutConfig;
use crate::link::{Faults, LinkConfig, Loss};
use crate::net::{SwitchConfig, Way};
use crate::packet::WIRE_OVERHEAD_BYTES;
use crate::plane::PlaneConfig;
use crate::record::End;
use crate::scenario::{ChunkSpec, Design, PlaneSpec, Scenario, StoreSpec};
use crate::store::StoreConfig;
use crate::world::{Action, Bounds, Lcore, World};

/// Bytes of a segment: what an MTU of 1,500 leaves.
const SEGMENT_BYTES: u16 = 1440;
/// Bytes on the wire around a segment.
const OVERHEAD_BYTES: u32 = WIRE_OVERHEAD_BYTES + 32;
const _: () = assert!(DATA_HEADER_BYTES == 32);
/// The planes of a chunk of Llama-8B: 32 layers, 80 segments each.
const LAYERS: u16 = 32;
const PLANE_BYTES: u32 = 80 * SEGMENT_BYTES as u32;
const MICROS: u64 = 1000;
const MILLIS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

/// The part of a link's rate that segments can have.
pub fn ideal_share() -> f64 {
    f64::from(SEGMENT_BYTES) / f64::from(u32::from(SEGMENT_BYTES) + OVERHEAD_BYTES)
}

/// What was measured; what a scenario does not measure is absent.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// Delivered payload over the time from the first start to the last end.
    pub goodput_gbps: f64,
    /// The same over what the bottleneck link could carry after headers.
    pub of_ideal: f64,
    /// Payload sent more than once over payload lost.
    pub resent_per_lost: Option<f64>,
    /// Payload sent more than once over payload delivered, percent.
    pub resent_percent: f64,
    /// Payload lost over payload sent, percent.
    pub lost_percent: f64,
    /// Largest queue in front of a data plane's link, microseconds.
    pub queue_peak_us: f64,
    /// Jain's index of the data planes' goodputs while all fetch.
    pub jain: Option<f64>,
    /// 99th percentile of the short fetches' times, microseconds.
    pub p99_us: Option<f64>,
    /// The same over that without the bulk fetch.
    pub p99_of_alone: Option<f64>,
    /// Fetches that did not end with everything delivered, and chunks that were not saved.
    pub not_done: u64,
    /// Simulated time, milliseconds.
    pub simulated_ms: f64,
    /// Packets sent.
    pub packets: u64,
    /// Counters of the engines, summed over hosts.
    pub counters: BTreeMap<String, u64>,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The scenario.
    pub scenario: &'static str,
    /// Which engines.
    pub design: Design,
    /// Of the run.
    pub seed: u64,
    /// What was measured.
    #[serde(flatten)]
    pub figures: Figures,
}

/// A named scenario.
pub struct Entry {
    /// On the command line and in the table.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    /// The baselines can do it too: they have no decoders and no replicas.
    for_all: bool,
    /// Makes and runs it; `scale` shortens it: bytes are divided by it.
    measure: fn(Design, u64, u32) -> Figures,
}

/// A scenario for all designs.
const fn all(name: &'static str, about: &'static str, measure: fn(Design, u64, u32) -> Figures) -> Entry {
    Entry { name, about, for_all: true, measure }
}

/// A scenario that only ours can do.
const fn ours(name: &'static str, about: &'static str, measure: fn(Design, u64, u32) -> Figures) -> Entry {
    Entry { name, about, for_all: false, measure }
}

impl Entry {
    /// Whether a design can do it.
    pub fn is_for(&self, design: Design) -> bool {
        design == Design::Ours || self.for_all
    }

    /// Runs it with one design.
    pub fn run(&self, design: Design, seed: u64, scale: u32) -> Row {
        Row { scenario: self.name, design, seed, figures: (self.measure)(design, seed, scale.max(1)) }
    }
}

/// All named scenarios.
pub const ENTRIES: &[Entry] = &[
    all("loss-0", "100 Gbps, 50 us, no loss", |d, s, k| lossy(d, s, k, Loss::None)),
    all("loss-0.1", "100 Gbps, 50 us, 0.1 % of packets lost each way", |d, s, k| {
        lossy(d, s, k, Loss::Random(1000))
    }),
    all("loss-1", "100 Gbps, 50 us, 1 % of packets lost each way", |d, s, k| {
        lossy(d, s, k, Loss::Random(10_000))
    }),
    all("loss-5", "100 Gbps, 50 us, 5 % of packets lost each way", |d, s, k| {
        lossy(d, s, k, Loss::Random(50_000))
    }),
    all("burst-1", "100 Gbps, 50 us, 1 % lost in bursts of 20 packets, of which half are lost", |d, s, k| {
        lossy(d, s, k, Loss::bursts(10_000, 20))
    }),
    all("long-10g", "10 Gbps, 10 ms", long),
    all("fast-400g", "400 Gbps, 50 us", fast),
    all("reorder", "100 Gbps, 50 us, 1 % of packets late by up to 20 us", |d, s, k| {
        faulty(d, s, k, Faults { reordered: 10_000, reorder_nanos: 20_000, ..NONE })
    }),
    all("jitter", "100 Gbps, 50 us, every packet late by up to 20 us, in order", |d, s, k| {
        faulty(d, s, k, Faults { jitter_nanos: 20_000, ..NONE })
    }),
    all("duplicate", "100 Gbps, 50 us, 1 % of packets come twice", |d, s, k| {
        faulty(d, s, k, Faults { duplicated: 10_000, reorder_nanos: 5000, ..NONE })
    }),
    all(
        "corrupt",
        "100 Gbps, 50 us, 0.1 % of packets corrupt, a hundredth of these unnoticed by UDP",
        |d, s, k| faulty(d, s, k, Faults { corrupted: 1000, damaged: 10, ..NONE }),
    ),
    all(
        "incast-16",
        "16 stores to one data plane of 100 Gbps, 50 us, buffer of one bandwidth-delay product",
        |d, s, k| incast(d, s, k, 16, None),
    ),
    all(
        "incast-256",
        "256 stores to one data plane of 100 Gbps, 50 us, buffer of one bandwidth-delay product",
        |d, s, k| incast(d, s, k, 256, None),
    ),
    all("incast-64-shared", "64 stores, a switch whose ports share 2 MB", |d, s, k| {
        incast(d, s, k, 64, Some(SwitchConfig { shared_bytes: Some(2_000_000), alpha_percent: 100 }))
    }),
    all("share-2", "two data planes on one store's link of 100 Gbps", share),
    all(
        "short-beside-bulk",
        "8-chunk fetches one after the other beside a bulk fetch, 100 Gbps, 50 us",
        beside,
    ),
    ours("slow-decoder", "decoders at half of the link's rate: figures are of their rate", slow_decoder),
    all("restart", "the store is down for 2 ms and restarts", restart),
    all("partition", "the network is cut for 5 ms and heals", partition),
    ours("jitter-measured", "the same as jitter, the link's rate not given", |d, s, k| {
        measured(d, s, k, Faults { jitter_nanos: 20_000, ..NONE })
    }),
    ours("loss-0-measured", "the same as loss-0, the link's rate not given", |d, s, k| {
        measured(d, s, k, NONE)
    }),
    ours("loss-1-measured", "the same as loss-1, the link's rate not given", |d, s, k| {
        measured(d, s, k, Faults { loss: Loss::Random(10_000), ..NONE })
    }),
    ours("incast-16-measured", "the same as incast-16, the link's rate not given", incast_measured),
    ours(
        "incast-16-queues",
        "the same as incast-16 with four queues that share nothing, each a quarter of the link",
        queues,
    ),
    all("crowd", "1,000 data planes, each fetching from four of 1,000 stores, all of 100 Gbps", crowd),
    ours(
        "placed-4",
        "four stores of 50 Gbps each, two replicas, all to one data plane of 100 Gbps",
        |d, s, k| placed(d, s, k, Trouble::None),
    ),
    ours("placed-4-dead", "the same, and one store dies and stays dead", |d, s, k| {
        placed(d, s, k, Trouble::Death)
    }),
    ours("placed-4-slow", "the same, and one store's link loses 5 % of its packets", |d, s, k| {
        placed(d, s, k, Trouble::Loss)
    }),
    ours(
        "hedge",
        "8-chunk fetches from four stores with two replicas, of which one now and then stalls for 20 ms",
        hedge,
    ),
    ours(
        "hedge-planes",
        "the same, each stall in the midst of a fetch; p99/alone is over that without asking replicas for planes too",
        hedge_planes,
    ),
    ours("far-4", "two replicas 8 ms away, 4 times the longest timeout", |d, s, _| far(d, s, 4)),
    ours("far-50", "two replicas 100 ms away, 50 times the longest timeout", |d, s, _| far(d, s, 50)),
    ours("save", "the data plane saves, 100 Gbps, 50 us", |d, s, k| save(d, s, k, NONE, 100_000)),
    ours("save-loss-1", "the data plane saves, 1 % of packets lost each way", |d, s, k| {
        save(d, s, k, Faults { loss: Loss::Random(10_000), ..NONE }, 100_000)
    }),
    ours("save-loss-1-measured", "the same, the store finds its link's rate", |d, s, k| {
        save(d, s, k, Faults { loss: Loss::Random(10_000), ..NONE }, 0)
    }),
    ours("mtu-9000", "MTU 9000 all the way, found by a probe", |d, s, k| mtu(d, s, k, None)),
    ours("mtu-shrinks", "the same, and after 20 ms the path carries 1,500, without a word", |d, s, k| {
        mtu(d, s, k, Some(20 * MILLIS / u64::from(k)))
    }),
];

const NONE: Faults = Faults {
    loss: Loss::None,
    duplicated: 0,
    reordered: 0,
    reorder_nanos: 0,
    corrupted: 0,
    damaged: 0,
    jitter_nanos: 0,
    cut: false,
};

/// A path: the bottleneck's rate and its round-trip time without queues.
#[derive(Clone, Copy)]
struct Path {
    gbps: u32,
    rtt_nanos: u64,
}

const USUAL: Path = Path { gbps: 100, rtt_nanos: 50 * MICROS };

impl Path {
    fn link(self) -> LinkConfig {
        // Four one-way links make a round trip.
        LinkConfig::new(u64::from(self.gbps), self.rtt_nanos / 4)
    }

    /// Bytes that fill the path.
    fn bdp_bytes(self) -> u64 {
        u64::from(self.gbps) * self.rtt_nanos / 8
    }

    /// Segments that fill the path and a little more.
    fn window(self) -> u32 {
        let segments = self.bdp_bytes() * 5 / 4 / u64::from(u32::from(SEGMENT_BYTES) + OVERHEAD_BYTES);
        u32::try_from(segments).expect("a window") + 64
    }

    /// The link in front of a data plane: a buffer of one bandwidth-delay product, but at least 64 packets.
    fn bottleneck(self) -> LinkConfig {
        let buffer_bytes = self.bdp_bytes().max(64 * 1600);
        LinkConfig { buffer_bytes, mark_bytes: buffer_bytes / 4, ..self.link() }
    }
}

/// The budgets that `shadowserve dataplane` would be given for such a path.
fn fetch_config(path: Path, stores: u16) -> FetchConfig {
    let window = path.window();
    FetchConfig {
        max_fetches: 300,
        max_lookups: 8,
        max_chunks_per_fetch: 1024,
        active_chunks: 512,
        active_planes: 2048,
        max_planes_per_chunk: 64,
        max_plane_bytes: PLANE_BYTES,
        max_header_bytes: 2048,
        segment_bytes: SEGMENT_BYTES,
        window_segments: 1 << 16,
        link_mbps: path.gbps * 1000,
        memory_segments: 4 * window + 64 * 80,
        rto_min: Duration::from_millis(2),
        rto_max: Duration::from_millis(200),
        stores,
        ..FetchConfig::default()
    }
}

/// Data planes and stores on one path, and nothing that happens.
fn on_path(design: Design, seed: u64, path: Path, planes: u32, stores: u16) -> Scenario {
    let config =
        PlaneConfig { first_store: planes, decoders: 4, ..PlaneConfig::new(fetch_config(path, stores)) };
    let lcore = Lcore::default();
    let plane = PlaneSpec { up: path.link(), down: path.bottleneck(), config, lcore };
    let serve = ServeConfig { max_pending_pulls: 4096, ..ServeConfig::default() };
    let config = StoreConfig { serve, ..StoreConfig::default() };
    let store = StoreSpec { up: path.link(), down: path.link(), config, lcore, lacks: Vec::new() };
    Scenario {
        seed,
        design,
        planes: vec![plane; planes as usize],
        stores: vec![store; usize::from(stores)],
        switch: SwitchConfig::default(),
        chunks: ChunkSpec { count: 1024, layers: LAYERS, plane_bytes: (PLANE_BYTES, PLANE_BYTES) },
        baseline_window: path.window(),
        faults: Vec::new(),
        actions: Vec::new(),
        bounds: Bounds::default(),
    }
}

/// Chunks that fill a path for so long, at least one.
fn chunks_for(path: Path, nanos: u64, scale: u32) -> u32 {
    let chunk_bytes = u64::from(LAYERS) * 2 * u64::from(PLANE_BYTES);
    let bytes = u64::from(path.gbps) * nanos / 8 / u64::from(scale);
    u32::try_from((bytes / chunk_bytes).clamp(1, 1024)).unwrap_or(1)
}

fn order(id: u64, store: u32, chunks: std::ops::Range<u32>) -> Order {
    Order { id, stores: vec![store], chunks, deadline_nanos: 100 * SECOND }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn float(value: u64) -> f64 {
    value as f64
}

/// What is measured of every run.
fn figures(world: &World, gbps: f64, planes: u32) -> Figures {
    let ended: Vec<_> =
        world.records.fetches.values().filter_map(|record| Some((record, record.ended?))).collect();
    let saves = world.records.saves.values();
    let begins =
        ended.iter().map(|(record, _)| record.started_at).chain(saves.clone().map(|save| save.started_at));
    let ends = ended.iter().map(|(_, (at, _))| *at).chain(saves.clone().filter_map(|save| save.ended));
    let (begin, end) = (begins.min().unwrap_or(0), ends.max().unwrap_or(0));
    let delivered = ended.iter().map(|(record, _)| record.delivered).sum::<u64>()
        + saves.clone().map(|save| save.bytes).sum::<u64>();
    let nanos = float(end - begin).max(1.0);
    let goodput_gbps = float(delivered) * 8.0 / nanos;
    let counters = &world.net.counters;
    let taken_in: u64 = world.records.taken_in.values().sum();
    let (sent, lost) = (counters.payload_sent, counters.payload_dropped);
    let peak = (0..planes).map(|plane| world.net.link(plane, Way::Down).peak_nanos()).max().unwrap_or(0);
    Figures {
        goodput_gbps,
        of_ideal: goodput_gbps / (gbps * ideal_share()),
        resent_per_lost: (lost > 0).then(|| float(sent.saturating_sub(taken_in)) / float(lost)),
        resent_percent: 100.0 * float(sent.saturating_sub(taken_in)) / float(taken_in.max(1)),
        lost_percent: 100.0 * float(lost) / float(sent.max(1)),
        queue_peak_us: float(peak) / 1000.0,
        not_done: ended.iter().filter(|(_, (_, end))| *end != End::Done).count() as u64
            + saves.map(|save| u64::from(save.refused)).sum::<u64>(),
        simulated_ms: nanos / 1e6,
        packets: counters.sent,
        counters: world.host_counters(),
        ..Figures::default()
    }
}

/// Runs a scenario to its end.
fn run(scenario: &Scenario) -> World {
    let mut world = scenario.build();
    world.run();
    world
}

/// One bulk fetch over a path that is wrong in some way.
fn bulk(design: Design, seed: u64, path: Path, chunks: u32, faults: Faults) -> Scenario {
    let mut scenario = on_path(design, seed, path, 1, 1);
    scenario.faults_both(1, faults);
    scenario.fetch(0, 0, order(1, 1, 0..chunks));
    scenario
}

/// Losses and buffers of [`grid`]: of a million packets, and of one bandwidth-delay product.
pub const GRID: ([u32; 4], [f64; 3]) = ([0, 1000, 10_000, 50_000], [0.25, 1.0, 4.0]);

/// Four stores to one data plane, 58 MB over 100 Gbps and 50 us: a figure for each loss and buffer of [`GRID`].
pub fn grid(design: Design, seed: u64, loss: u32, buffer: f64) -> Figures {
    let mut scenario = on_path(design, seed, USUAL, 1, 4);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few MB")]
    let buffer_bytes = (float(USUAL.bdp_bytes()) * buffer) as u64;
    let down = LinkConfig { buffer_bytes, mark_bytes: buffer_bytes / 4, ..USUAL.link() };
    scenario.planes[0].down = down;
    for store in 1..=4 {
        scenario.faults_both(store, Faults { loss: Loss::Random(loss), ..NONE });
        scenario.fetch(0, 0, order(u64::from(store), store, 2 * store..2 * store + 2));
    }
    figures(&run(&scenario), 100.0, 1)
}

fn faulty(design: Design, seed: u64, scale: u32, faults: Faults) -> Figures {
    let chunks = chunks_for(USUAL, 80 * MILLIS, scale);
    figures(&run(&bulk(design, seed, USUAL, chunks, faults)), 100.0, 1)
}

fn lossy(design: Design, seed: u64, scale: u32, loss: Loss) -> Figures {
    faulty(design, seed, scale, Faults { loss, ..NONE })
}

fn long(design: Design, seed: u64, scale: u32) -> Figures {
    let path = Path { gbps: 10, rtt_nanos: 10 * MILLIS };
    let chunks = chunks_for(path, 3 * SECOND, scale);
    figures(&run(&bulk(design, seed, path, chunks, NONE)), 10.0, 1)
}

fn fast(design: Design, seed: u64, scale: u32) -> Figures {
    let path = Path { gbps: 400, rtt_nanos: 50 * MICROS };
    let chunks = chunks_for(path, 40 * MILLIS, scale);
    figures(&run(&bulk(design, seed, path, chunks, NONE)), 400.0, 1)
}

fn incast(design: Design, seed: u64, scale: u32, stores: u16, switch: Option<SwitchConfig>) -> Figures {
    figures(&run(&incast_of(design, seed, scale, stores, switch)), 100.0, 1)
}

fn incast_measured(design: Design, seed: u64, scale: u32) -> Figures {
    let mut scenario = incast_of(design, seed, scale, 16, None);
    scenario.planes[0].config.fetch.link_mbps = 0;
    figures(&run(&scenario), 100.0, 1)
}

fn queues(design: Design, seed: u64, scale: u32) -> Figures {
    let mut scenario = incast_of(design, seed, scale, 16, None);
    let fetch = &mut scenario.planes[0].config.fetch;
    fetch.queues = 4;
    fetch.link_mbps /= 4;
    figures(&run(&scenario), 100.0, 1)
}

/// Every data plane and every store has four partners, so that all links could be full all the time.
fn crowd(design: Design, seed: u64, scale: u32) -> Figures {
    let nodes: u16 = 1000 / u16::try_from(scale.min(20)).unwrap_or(20);
    let count = u32::from(nodes);
    let mut scenario = on_path(design, seed, USUAL, count, nodes);
    let plane_bytes = 20 * u32::from(SEGMENT_BYTES);
    scenario.chunks = ChunkSpec { count: 64, plane_bytes: (plane_bytes, plane_bytes), ..scenario.chunks };
    scenario.baseline_window = (USUAL.window() / 4).max(64);
    // A gigabyte less.
    scenario.stores.iter_mut().for_each(|store| store.config.serve.max_pending_pulls = 256);
    for plane in 0..count {
        let fetch = &mut scenario.planes[plane as usize].config.fetch;
        (fetch.max_fetches, fetch.max_chunks_per_fetch, fetch.active_chunks, fetch.active_planes) =
            (4, 4, 16, 256);
        for (number, step) in (0_u32..).zip([0, 1, 17, 33]) {
            let store = count + (plane + step) % count;
            let first = (plane + number) % 60;
            scenario.fetch(0, plane, order(u64::from(4 * plane + number) + 1, store, first..first + 2));
        }
    }
    figures(&run(&scenario), 100.0 * f64::from(count), count)
}

fn incast_of(design: Design, seed: u64, scale: u32, stores: u16, switch: Option<SwitchConfig>) -> Scenario {
    let mut scenario = on_path(design, seed, USUAL, 1, stores);
    let each = (chunks_for(USUAL, 150 * MILLIS, scale) / u32::from(stores)).max(1);
    if let Some(switch) = switch {
        scenario.switch = switch;
    }
    for store in 0..u32::from(stores) {
        let first = store * each % 512;
        scenario.fetch(0, 0, order(u64::from(store) + 1, 1 + store, first..first + each));
    }
    scenario
}

/// Two data planes fetch from one store; the second begins when the first has been at it for a while.
fn share(design: Design, seed: u64, scale: u32) -> Figures {
    let mut scenario = on_path(design, seed, USUAL, 2, 1);
    // The store's link is the bottleneck: its queue is the store's own, and requests wait there.
    let chunks = chunks_for(USUAL, 60 * MILLIS, scale);
    let later = 5 * MILLIS / u64::from(scale);
    scenario.fetch(0, 0, order(1, 2, 0..chunks));
    scenario.fetch(later, 1, order(2, 2, 0..chunks));
    let mut world = scenario.build();
    let taken = |world: &World, plane| world.records.taken_in.get(&plane).copied().unwrap_or(0);
    world.run_while(|world| world.net.now < later);
    let before = [taken(&world, 0), taken(&world, 1)];
    world.run_while(|world| world.records.under_way == 2 || world.net.now <= later);
    let shares = [float(taken(&world, 0) - before[0]), float(taken(&world, 1) - before[1])];
    world.run();
    let (sum, squares) = (shares[0] + shares[1], shares[0].powi(2) + shares[1].powi(2));
    Figures { jain: Some(sum * sum / (2.0 * squares.max(1.0))), ..figures(&world, 100.0, 2) }
}

/// Short fetches one after the other, with or without a bulk fetch beside them: times of the short ones.
fn short_fetches(design: Design, seed: u64, scale: u32, with_bulk: bool) -> (Vec<u64>, Figures) {
    let mut scenario = on_path(design, seed, USUAL, 1, 1);
    // 20 segments a plane: 1.8 MB a chunk, 1.2 ms of link for 8.
    let plane_bytes = 20 * u32::from(SEGMENT_BYTES);
    scenario.chunks = ChunkSpec { plane_bytes: (plane_bytes, plane_bytes), ..scenario.chunks };
    let count = u64::from(100 / scale.min(10));
    let period = 4 * MILLIS;
    if with_bulk {
        // Ends long after the last short one; it is cut off then.
        scenario.fetch(0, 0, order(1, 1, 0..1024));
        scenario.fetch(0, 0, order(2, 1, 0..1024));
        scenario.fetch(0, 0, order(3, 1, 0..1024));
    }
    for number in 0..count {
        let first = u32::try_from(number * 8 % 1000).unwrap_or(0);
        let at = 2 * MILLIS + number * period + number * 7919 % 997 * MICROS;
        scenario.fetch(at, 0, order(100 + number, 1, first..first + 8));
    }
    let cut_at = 4 * MILLIS + count * period;
    for bulk in 1..=3 {
        scenario.actions.push((cut_at, Action::Host(0, Deed::Cancel(bulk))));
    }
    let world = run(&scenario);
    let mut times: Vec<u64> = world
        .records
        .fetches
        .range(100..)
        .filter_map(|(_, record)| Some(record.ended?.0 - record.started_at))
        .collect();
    times.sort_unstable();
    let not_done = world
        .records
        .fetches
        .range(100..)
        .filter(|(_, record)| !matches!(record.ended, Some((_, End::Done))));
    let not_done = not_done.count() as u64;
    (times, Figures { not_done, ..figures(&world, 100.0, 1) })
}

/// 99th percentile of sorted nanoseconds, in microseconds.
fn p99_us(times: &[u64]) -> f64 {
    float(times[(times.len() * 99).div_ceil(100) - 1]) / 1000.0
}

fn beside(design: Design, seed: u64, scale: u32) -> Figures {
    let (alone, _) = short_fetches(design, seed, scale, false);
    let (times, figures) = short_fetches(design, seed, scale, true);
    let (alone, beside) = (p99_us(&alone), p99_us(&times));
    Figures { p99_us: Some(beside), p99_of_alone: Some(beside / alone), ..figures }
}

fn slow_decoder(design: Design, seed: u64, scale: u32) -> Figures {
    let chunks = chunks_for(USUAL, 40 * MILLIS, scale);
    let mut scenario = bulk(design, seed, USUAL, chunks, NONE);
    // Four decoders, together 50 Gbps of payload.
    scenario.planes[0].config.decode_nanos = u64::from(PLANE_BYTES) * 8 * 4 / 50;
    figures(&run(&scenario), 50.0 / ideal_share(), 1)
}

fn measured(design: Design, seed: u64, scale: u32, faults: Faults) -> Figures {
    let chunks = chunks_for(USUAL, 80 * MILLIS, scale);
    let mut scenario = bulk(design, seed, USUAL, chunks, faults);
    scenario.planes[0].config.fetch.link_mbps = 0;
    figures(&run(&scenario), 100.0, 1)
}

/// What befalls the first of several stores.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    Death,
    Loss,
}

/// One data plane, four stores with half of its link's rate each, each chunk on two of them.
fn on_replicas(design: Design, seed: u64) -> Scenario {
    let mut scenario = on_path(design, seed, USUAL, 1, 4);
    let link = Path { gbps: 50, ..USUAL }.link();
    for store in &mut scenario.stores {
        (store.up, store.down) = (link, link);
    }
    scenario.planes[0].config.replicas = 2;
    scenario
}

fn placed(design: Design, seed: u64, scale: u32, trouble: Trouble) -> Figures {
    let mut scenario = on_replicas(design, seed);
    let chunks = chunks_for(USUAL, 80 * MILLIS, scale);
    scenario.fetch(0, 0, Order { stores: Vec::new(), ..order(1, 0, 0..chunks) });
    match trouble {
        Trouble::None => {}
        Trouble::Death => {
            let at = 20 * MILLIS / u64::from(scale);
            scenario.actions.push((at, Action::Host(1, Deed::Crash)));
        }
        Trouble::Loss => scenario.faults_both(1, Faults { loss: Loss::Random(50_000), ..NONE }),
    }
    figures(&run(&scenario), 100.0, 1)
}

/// A fetch of 32 chunks from two stores that are so many times the longest timeout away, each of which has all.
fn far(design: Design, seed: u64, timeouts: u64) -> Figures {
    let path = Path { gbps: 10, rtt_nanos: timeouts * 2 * MILLIS };
    let mut scenario = on_path(design, seed, path, 1, 2);
    scenario.planes[0].config.replicas = 2;
    scenario.planes[0].config.fetch.rto_min = Duration::from_millis(1);
    scenario.planes[0].config.fetch.rto_max = Duration::from_millis(2);
    scenario.fetch(0, 0, Order { stores: Vec::new(), deadline_nanos: 5 * SECOND, ..order(1, 0, 0..32) });
    figures(&run(&scenario), 10.0, 1)
}

fn hedge(design: Design, seed: u64, scale: u32) -> Figures {
    let count = 100 / scale.min(10);
    let (alone, _) = p99_of_short_fetches(on_replicas(design, seed), count, |_| None);
    let (stalled, figures) = p99_of_short_fetches(on_replicas(design, seed), count, |_| Some(0));
    Figures { p99_us: Some(stalled), p99_of_alone: Some(stalled / alone), ..figures }
}

/// 8-chunk fetches from four stores with two replicas, of which one now and then stalls for 20 ms in the midst of one.
fn hedge_planes(design: Design, seed: u64, scale: u32) -> Figures {
    let times = |hedge_percent: u8| {
        let mut scenario = on_replicas(design, seed);
        scenario.planes[0].config.fetch.hedge_percent = hedge_percent;
        let into = |number: u32| 300 * MICROS + u64::from(number / 10) * 83 % 800 * MICROS;
        p99_of_short_fetches(scenario, 400 / scale.min(10), |number| Some(into(number)))
    };
    let (without, _) = times(0);
    let (with, figures) = times(5);
    Figures { p99_us: Some(with), p99_of_alone: Some(with / without), ..figures }
}

/// One 8-chunk fetch after the other; in one of ten a store stalls for 20 ms, so many nanoseconds after its begin as `stall_into` says of its number, if it
/// does. The 99th percentile of their times, in microseconds, and the other figures.
fn p99_of_short_fetches(
    mut scenario: Scenario,
    count: u32,
    stall_into: impl Fn(u32) -> Option<u64>,
) -> (f64, Figures) {
    let plane_bytes = 20 * u32::from(SEGMENT_BYTES);
    scenario.chunks = ChunkSpec { plane_bytes: (plane_bytes, plane_bytes), ..scenario.chunks };
    for number in 0..count {
        let at = 2 * MILLIS + u64::from(number) * 5 * MILLIS;
        let first = number * 8 % 1000;
        let order = Order { stores: Vec::new(), ..order(100 + u64::from(number), 0, first..first + 8) };
        scenario.fetch(at, 0, order);
        if number % 10 == 5
            && let Some(into) = stall_into(number)
        {
            scenario.actions.push((at + into, Action::Stall(1 + number / 10 % 4, 20 * MILLIS)));
        }
    }
    let world = run(&scenario);
    let fetches = world.records.fetches.values();
    let mut times: Vec<u64> =
        fetches.filter_map(|record| Some(record.ended?.0 - record.started_at)).collect();
    times.sort_unstable();
    (p99_us(&times), figures(&world, 100.0, 1))
}

/// The store is told its link's rate, 0 if it is to find it.
fn save(design: Design, seed: u64, scale: u32, faults: Faults, link_mbps: u32) -> Figures {
    let mut scenario = on_path(design, seed, USUAL, 1, 1);
    let chunks = chunks_for(USUAL, 80 * MILLIS, scale);
    scenario.faults_both(1, faults);
    scenario.planes[0].config.max_offers = 16;
    let store = &mut scenario.stores[0];
    let accept = AcceptConfig { max_chunk_bytes: 8 << 20, link_mbps, ..AcceptConfig::default() };
    store.config.put = PutConfig { accept, memory_bytes: 1 << 40, ..PutConfig::default() };
    store.lacks = (0..chunks).collect();
    scenario.actions.push((0, Action::Host(0, Deed::Save(order(1, 1, 0..chunks)))));
    figures(&run(&scenario), 100.0, 1)
}

/// A bulk fetch between ports with an MTU of 9,000, on a path that carries less from some time on.
fn mtu(design: Design, seed: u64, scale: u32, shrinks_at: Option<u64>) -> Figures {
    const LARGE_BYTES: u16 = 8928;
    let chunks = chunks_for(USUAL, 80 * MILLIS, scale);
    let mut scenario = bulk(design, seed, USUAL, chunks, NONE);
    scenario.planes[0].config.most_segment_bytes = LARGE_BYTES;
    scenario.stores[0].config.serve.max_segment_bytes = LARGE_BYTES;
    if let Some(at) = shrinks_at {
        scenario.actions.push((at, Action::Carries(1, Way::Up, 1472)));
    }
    let large = f64::from(LARGE_BYTES) / f64::from(u32::from(LARGE_BYTES) + OVERHEAD_BYTES);
    figures(&run(&scenario), 100.0 * large / ideal_share(), 1)
}

fn restart(design: Design, seed: u64, scale: u32) -> Figures {
    let chunks = chunks_for(USUAL, 80 * MILLIS, scale);
    let mut scenario = bulk(design, seed, USUAL, chunks, NONE);
    let at = 20 * MILLIS / u64::from(scale);
    scenario.actions.push((at, Action::Host(1, Deed::Crash)));
    scenario.actions.push((at + 2 * MILLIS, Action::Host(1, Deed::Restart)));
    figures(&run(&scenario), 100.0, 1)
}

fn partition(design: Design, seed: u64, scale: u32) -> Figures {
    let chunks = chunks_for(USUAL, 80 * MILLIS, scale);
    let mut scenario = bulk(design, seed, USUAL, chunks, NONE);
    let at = 20 * MILLIS / u64::from(scale);
    scenario.actions.push((at, Action::Part(0, 1)));
    scenario.actions.push((at + 5 * MILLIS, Action::Heal(0, 1)));
    figures(&run(&scenario), 100.0, 1)
}
