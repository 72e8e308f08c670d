//! Random runs: budgets, shapes, links, faults and events, all from one seed.

use std::time::Duration;

use protocol::put::AcceptConfig;
use protocol::{FetchConfig, Schedule, ServeConfig};
use serde::Serialize;

use crate::host::{Deed, Order};
use crate::intakes::PutConfig;
use crate::link::{DROPS, Faults, LinkConfig, Loss};
use crate::net::{SwitchConfig, Way};
use crate::plane::PlaneConfig;
use crate::random::{Random, mix};
use crate::record::End;
use crate::scenario::{ChunkSpec, Design, PlaneSpec, Scenario, StoreSpec};
use crate::store::StoreConfig;
use crate::world::{Action, Bounds, Lcore, World};

/// What came of one run or of many.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Runs.
    pub runs: u64,
    /// Fetches that ended with everything delivered, with something missing, on request.
    pub done: u64,
    /// See above.
    pub failed: u64,
    /// See above.
    pub cancelled: u64,
    /// Chunks that a store took, or had, of those offered to it, and that none did.
    pub saved: u64,
    /// See above.
    pub not_saved: u64,
    /// Packets sent.
    pub packets: u64,
    /// Packets dropped: by the loss model, by a full buffer, by a cut, corrupt, host down, ring full, larger than the path carries.
    pub dropped: [u64; DROPS],
    /// Packets damaged unnoticed, packets duplicated, packets marked.
    pub damaged: u64,
    /// See above.
    pub duplicated: u64,
    /// See above.
    pub marked: u64,
    /// A number that depends on every run's result: two soaks of the same seeds and code have the same.
    pub digest: u64,
}

impl Outcome {
    /// Adds the outcome of other runs.
    pub fn add(&mut self, other: &Outcome) {
        self.runs += other.runs;
        self.done += other.done;
        self.failed += other.failed;
        self.cancelled += other.cancelled;
        self.saved += other.saved;
        self.not_saved += other.not_saved;
        self.packets += other.packets;
        self.dropped.iter_mut().zip(other.dropped).for_each(|(sum, more)| *sum += more);
        self.damaged += other.damaged;
        self.duplicated += other.duplicated;
        self.marked += other.marked;
        // A sum, so that the order in which threads finish does not matter.
        self.digest = self.digest.wrapping_add(other.digest);
    }
}

fn number<T: TryFrom<u64>>(value: u64) -> T {
    T::try_from(value).unwrap_or_else(|_| unreachable!("the ranges fit"))
}

/// Runs a seed; panics where an invariant does not hold.
pub fn run(seed: u64, trace: bool) -> Outcome {
    let scenario = scenario(seed);
    let mut world = scenario.build();
    world.trace = trace;
    if trace {
        println!("{scenario:#?}");
    }
    world.run();
    let counters = world.net.counters;
    let mut outcome = Outcome {
        runs: 1,
        packets: counters.sent,
        dropped: counters.dropped,
        damaged: counters.damaged,
        duplicated: counters.copies,
        marked: counters.marked,
        ..Outcome::default()
    };
    check_lookups(&scenario, &world);
    let mut digest = mix(seed ^ counters.sent.rotate_left(32) ^ counters.payload_sent);
    for (id, record) in &world.records.fetches {
        let Some((at, end)) = record.ended else { continue };
        match end {
            End::Done => outcome.done += 1,
            End::Failed => outcome.failed += 1,
            End::Cancelled => outcome.cancelled += 1,
        }
        digest = mix(digest ^ id.rotate_left(48) ^ at ^ record.delivered.rotate_left(24) ^ end as u64);
    }
    for (id, save) in &world.records.saves {
        outcome.saved += u64::from(save.stored);
        outcome.not_saved += u64::from(save.refused);
        digest = mix(digest ^ id.rotate_left(48) ^ save.ended.unwrap_or(0) ^ save.bytes.rotate_left(24));
    }
    outcome.digest = digest;
    outcome
}

/// A lookup that was answered is right, if nothing was forgotten and nothing damaged on the way.
fn check_lookups(scenario: &Scenario, world: &World) {
    let forgets = |action: &(u64, Action)| matches!(action.1, Action::Host(_, Deed::Forget(_)));
    let is_whole = scenario.stores.iter().all(|store| store.lacks.is_empty());
    if !is_whole || scenario.actions.iter().any(forgets) || world.net.counters.damaged > 0 {
        return;
    }
    for (id, answer) in &world.records.lookups {
        if let Some((End::Done, found)) = answer.ended {
            assert_eq!(found, answer.asked, "lookup {id} finds all that is stored");
        }
    }
}

/// The scenario of a seed.
pub fn scenario(seed: u64) -> Scenario {
    let mut random = Random::new(mix(seed) ^ 0x51d);
    let r = &mut random;
    // Now and then many stores at once.
    let stores: u16 = if r.chance(20_000) { number(r.between(16, 64)) } else { number(r.between(1, 4)) };
    let planes = r.pick(&[1, 1, 1, 2, 3]);
    let layers: u16 = number(r.between(1, 5));
    let most: u32 = number(r.pick(&[300, 3000, 3000, 20_000, 60_000]));
    let chunks = ChunkSpec { count: 20, layers, plane_bytes: (1, number(r.between(1, u64::from(most)))) };
    let fetch = budgets(r, &chunks, stores, seed);
    let replicas = number(r.between(1, u64::from(stores.min(3))));
    let mut scenario = Scenario {
        seed,
        design: Design::Ours,
        planes: (0..planes).map(|_| plane(r, fetch, replicas)).collect(),
        stores: (0..stores).map(|_| store(r)).collect(),
        switch: SwitchConfig {
            shared_bytes: r.chance(300_000).then(|| r.between(10_000, 500_000)),
            alpha_percent: number(r.between(25, 400)),
        },
        chunks,
        baseline_window: 64,
        faults: Vec::new(),
        actions: Vec::new(),
        bounds: Bounds { events: 20_000_000, progress_nanos: 2_000_000_000 },
    };
    let materialize = r.chance(125_000);
    scenario.stores.iter_mut().for_each(|store| store.config.materialize = materialize);
    scenario.planes.iter_mut().for_each(|plane| plane.config.materialize = materialize);
    let hosts = planes + u32::from(stores);
    for host in 0..hosts {
        for way in [Way::Up, Way::Down] {
            if r.chance(400_000) {
                let faults = faults(r);
                scenario.faults.push((host, way, faults));
            }
        }
    }
    let end = fetches(r, &mut scenario);
    for _ in 0..r.below(8) {
        mishap(r, &mut scenario, end);
    }
    if r.chance(400_000) {
        saves(r, &mut scenario);
    }
    if fetch.segment_bytes >= 256 && r.chance(400_000) {
        narrow_paths(r, &mut scenario);
    }
    scenario
}

fn budgets(r: &mut Random, chunks: &ChunkSpec, stores: u16, seed: u64) -> FetchConfig {
    let segment_bytes: u16 = number(32 * r.pick(&[1, 2, 4, 8, 16, 45, 45]));
    let plane_segments = chunks.plane_bytes.1.div_ceil(u32::from(segment_bytes));
    let mut fetch = FetchConfig {
        queue: 0,
        queues: number(r.pick(&[1, 1, 2, 3])),
        max_fetches: 24,
        max_lookups: 4,
        max_chunks_per_fetch: 32,
        active_chunks: number(r.between(1, 16)),
        active_planes: number(r.between(1, 24)),
        max_planes_per_chunk: 10,
        max_plane_bytes: chunks.plane_bytes.1,
        max_header_bytes: 400,
        segment_bytes,
        window_segments: number(r.pick(&[1, 8, 64, 200, 2000])),
        memory_segments: plane_segments + number::<u32>(r.pick(&[0, 20, 200, 2000])),
        rto_min: Duration::from_micros(r.between(50, 2000)),
        rto_max: Duration::from_millis(r.between(2, 20)),
        stores,
        link_mbps: r.pick(&[0, 1000, 100_000]),
        queue_tolerance: Duration::from_micros(r.pick(&[1, 20, 20, 200])),
        schedule: r.pick(&[Schedule::ShortestRemaining, Schedule::EarliestDeadline, Schedule::RoundRobin]),
        ..FetchConfig::default()
    };
    fetch.seed = number(seed & 0xffff_ffff);
    fetch
}

fn link(r: &mut Random) -> LinkConfig {
    let buffer_bytes = r.pick(&[u64::MAX, 20_000, 100_000, 1_000_000]);
    LinkConfig {
        buffer_bytes,
        mark_bytes: if r.chance(500_000) { u64::MAX } else { buffer_bytes.min(1_000_000) / 4 },
        ..LinkConfig::new(r.pick(&[1, 10, 25, 100, 400]), r.pick(&[500, 5000, 50_000, 500_000]))
    }
}

fn lcore(r: &mut Random) -> Lcore {
    Lcore { turn_nanos: r.pick(&[100, 1000, 1000, 10_000]), ring: number(r.pick(&[64, 512, 4096])) }
}

fn plane(r: &mut Random, fetch: FetchConfig, replicas: u8) -> PlaneSpec {
    let rare = |r: &mut Random, most| if r.chance(200_000) { number(r.below(most)) } else { 0 };
    let config = PlaneConfig {
        replicas,
        decoders: number(r.between(1, 4)),
        decode_nanos: r.pick(&[0, 1000, 50_000, 500_000]),
        false_corrupt: rare(r, 100_000),
        rejected: rare(r, 20_000),
        ..PlaneConfig::new(fetch)
    };
    PlaneSpec { up: link(r), down: link(r), config, lcore: lcore(r) }
}

fn store(r: &mut Random) -> StoreSpec {
    let serve = ServeConfig {
        max_pending_pulls: number(r.pick(&[1, 4, 20, 100])),
        max_pending_bytes: r.pick(&[100_000, 64 << 20]),
        max_pending_replies: number(r.between(1, 8)),
        max_requesters: number(r.between(1, 8)),
        turn_bytes: number(r.pick(&[1, 2000, 32 << 10])),
        ..ServeConfig::default()
    };
    let config = StoreConfig { serve, ring_bytes: r.pick(&[3000, 100_000]), ..StoreConfig::default() };
    let lacks = if r.chance(200_000) { vec![number(r.below(20))] } else { Vec::new() };
    StoreSpec { up: link(r), down: link(r), config, lcore: lcore(r), lacks }
}

/// Each kind of fault is absent more often than not, so that every subset of them occurs.
fn faults(r: &mut Random) -> Faults {
    let sometimes = |r: &mut Random, most: u64| if r.chance(300_000) { number(r.below(most)) } else { 0 };
    let loss = match r.below(4) {
        0 => Loss::Random(number(r.pick(&[1000, 10_000, 50_000, 300_000]))),
        1 => Loss::bursts(number(r.between(1000, 200_000)), number(r.between(2, 100))),
        _ => Loss::None,
    };
    Faults {
        loss,
        duplicated: sometimes(r, 300_000),
        reordered: sometimes(r, 300_000),
        reorder_nanos: r.between(1, 300_000),
        corrupted: sometimes(r, 50_000),
        damaged: sometimes(r, 20_000),
        jitter_nanos: u64::from(sometimes(r, 300_000)),
        cut: false,
    }
}

/// Adds fetches; says by when the last of them has ended.
fn fetches(r: &mut Random, scenario: &mut Scenario) -> u64 {
    let (planes, stores) = (scenario.planes.len() as u64, scenario.stores.len() as u64);
    let count = r.between(1, 6).max(stores.min(16 * u64::from(stores > 4)));
    let placed = r.chance(400_000);
    let (mut at, mut end) = (0, 0);
    for id in 0..count {
        let first: u32 = number(r.below(20));
        let chunks = first..first + number::<u32>(r.between(1, u64::from(20 - first)));
        let deadline_nanos =
            r.pick(&[100_000, 3_000_000, 60_000_000, 400_000_000, 400_000_000, 6_000_000_000]);
        let store = scenario.store(number(r.below(stores)));
        let plane = number(r.below(planes));
        let stores = if placed { Vec::new() } else { vec![store] };
        let order = Order { id, stores, chunks, deadline_nanos };
        if r.chance(500_000) {
            scenario.actions.push((at, Action::Host(plane, Deed::Lookup(order.clone()))));
        }
        scenario.fetch(at, plane, order);
        if r.chance(100_000) {
            let cancel_at = at + r.below(deadline_nanos);
            scenario.actions.push((cancel_at, Action::Host(plane, Deed::Cancel(id))));
        }
        end = end.max(at + deadline_nanos);
        at += r.below(2_000_000);
    }
    end
}

/// Has stores take chunks that they lack, within bounded memory, and data planes offer some and fetch them then.
fn saves(r: &mut Random, scenario: &mut Scenario) {
    let fetch = scenario.planes[0].config.fetch;
    scenario.planes.iter_mut().for_each(|plane| plane.config.max_offers = number(r.between(1, 4)));
    for store in &mut scenario.stores {
        let accept = AcceptConfig {
            max_intakes: number(r.between(1, 4)),
            max_chunk_bytes: number(r.pick(&[5000, 1 << 20, 1 << 20, 1 << 20])),
            segment_bytes: fetch.segment_bytes,
            window_segments: number(r.pick(&[1, 8, 64, 500])),
            link_mbps: fetch.link_mbps,
            rto_min: fetch.rto_min,
            rto_max: fetch.rto_max,
            silence: Duration::from_millis(r.between(5, 400)),
            corrupt_retries: number(r.below(4)),
            retry_ms: number(r.between(1, 20)),
            ..AcceptConfig::default()
        };
        let memory_bytes = r.pick(&[20_000, 300_000, 2_000_000, 1 << 40]);
        let is_pinned = r.chance(300_000);
        store.config.put = PutConfig { accept, memory_bytes, think_nanos: r.below(1_000_000), is_pinned };
        store.lacks.extend((0..r.below(10)).map(|_| number::<u32>(r.below(20))));
    }
    let (planes, stores) = (scenario.planes.len() as u64, scenario.stores.len() as u64);
    for id in 0..r.between(1, 4) {
        let first: u32 = number(r.below(20));
        let chunks = first..first + number::<u32>(r.between(1, u64::from(20 - first)));
        let deadline_nanos = r.pick(&[1_000_000, 60_000_000, 400_000_000, 3_000_000_000]);
        let store = scenario.store(number(r.below(stores)));
        let stores = if r.chance(300_000) { Vec::new() } else { vec![store] };
        let (at, plane) = (r.below(5_000_000), number(r.below(planes)));
        let order = Order { id: 1000 + id, stores, chunks, deadline_nanos };
        scenario.actions.push((at, Action::Host(plane, Deed::Save(order.clone()))));
        let later = at + r.below(100_000_000);
        if r.chance(200_000) {
            scenario.actions.push((later, Action::Host(plane, Deed::Cancel(order.id))));
        }
        scenario.fetch(later, number(r.below(planes)), Order { id: 2000 + id, ..order });
    }
}

/// UDP payloads that paths carry: everything that is no probe, no segment larger than of an MTU of 1,500, and more.
const CARRIES: [u32; 5] = [1472, 2000, 4000, 8992, u32::MAX];

/// Lets ports have large MTUs, and paths carry less, or soon less, than that.
fn narrow_paths(r: &mut Random, scenario: &mut Scenario) {
    const MOST: u16 = 8960;
    scenario.planes.iter_mut().for_each(|plane| plane.config.most_segment_bytes = MOST);
    for store in &mut scenario.stores {
        store.config.serve.max_segment_bytes = MOST;
        store.config.put.accept.segment_bytes = MOST;
    }
    let hosts = (scenario.planes.len() + scenario.stores.len()) as u64;
    for plane in &mut scenario.planes {
        (plane.up.carries_bytes, plane.down.carries_bytes) = (r.pick(&CARRIES), r.pick(&CARRIES));
    }
    for store in &mut scenario.stores {
        (store.up.carries_bytes, store.down.carries_bytes) = (r.pick(&CARRIES), r.pick(&CARRIES));
    }
    for _ in 0..r.below(4) {
        let (host, way) = (number(r.below(hosts)), r.pick(&[Way::Up, Way::Down]));
        let at = r.pick(&[3_000_000, 300_000_000]);
        scenario.actions.push((r.below(at), Action::Carries(host, way, r.pick(&CARRIES))));
    }
}

/// Adds something that goes wrong for a while.
fn mishap(r: &mut Random, scenario: &mut Scenario, end: u64) {
    // Most of what happens happens early.
    let before = if r.chance(700_000) { end.min(3_000_000) } else { end };
    let at = r.below(before);
    let lasts = r.between(1000, 5_000_000);
    let (planes, stores) = (scenario.planes.len() as u64, scenario.stores.len() as u64);
    let plane: u32 = number(r.below(planes));
    let store = scenario.store(number(r.below(stores)));
    let host: u32 = number(r.below(planes + stores));
    let way = r.pick(&[Way::Up, Way::Down]);
    let actions = &mut scenario.actions;
    match r.below(9) {
        0 => {
            actions.push((at, Action::Host(store, Deed::Crash)));
            // One in ten never comes back.
            if !r.chance(100_000) {
                actions.push((at + lasts, Action::Host(store, Deed::Restart)));
            }
        }
        1 => actions.push((at, Action::Host(store, Deed::Restart))),
        2 => actions.push((at, Action::Host(store, Deed::Forget(number(r.below(20)))))),
        3 => {
            actions.push((at, Action::Part(plane, store)));
            actions.push((at + lasts, Action::Heal(plane, store)));
        }
        4 => {
            actions.push((at, Action::Link(host, way, Faults { cut: true, ..Faults::default() })));
            actions.push((at + lasts, Action::Link(host, way, faults(r))));
        }
        5 => actions.push((at, Action::Stall(host, lasts))),
        6 => actions.push((at, Action::Host(plane, Deed::ClockJump(r.between(1000, 50_000_000))))),
        7 => actions.push((at, Action::Host(plane, Deed::DecodeNanos(r.below(2_000_000))))),
        _ => actions.push((at, Action::Link(host, way, faults(r)))),
    }
}
