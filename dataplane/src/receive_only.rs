//! The receive stage as it is, without what follows it, to be measured beside other programs that only receive.
//!
//! Link, protocol engine, jobs, rings, PULLs, counters and histograms are those of the data plane. Only the decode and
//! dma stages are replaced, by one that frees a plane's packets and reports it as delivered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use compress::Dtype;
use dpdk::{Eal, Ring};
use hugepages::{Arena, ArenaConfig, PageChoice};
use iface::{Clock, LcoreControl, LcoreCounters, LinkCounters, Stage, lcore};
use protocol::{ChunkShape, Key};
use serde_json::{Value, json};

use crate::config::Config;
use crate::fetches::{FetchLimits, QueueEnds};
use crate::gpu::{GpuConfig, Gpus};
use crate::job::{
    FetchPart, FetchShared, FetchTarget, PartId, PlaneJob, PlaneOutcome, Progress, QueueMessage,
};
use crate::pipeline::{Budget, BuildError, MAX_LOOKUPS, Rings, StageBuilder, stores_of};

/// What to fetch, again and again.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The keys of one fetch; the same key may be there many times.
    pub keys: Vec<Key>,
    /// The shape of every chunk.
    pub expect: ChunkShape,
    /// Fetches under way at once, at most `max_fetches` of the configuration.
    pub fetches: u16,
}

/// In place of decoding and delivery: frees the packets of whole planes and says that they were delivered.
struct Discard {
    planes: Ring<Box<PlaneJob>>,
    returned: Vec<Ring<Box<PlaneJob>>>,
}

impl Stage for Discard {
    fn poll(&mut self, now_ns: u64) -> usize {
        let mut work = 0;
        while work < 32
            && let Some(mut job) = self.planes.dequeue()
        {
            work += 1;
            job.drop_segments();
            job.outcome = PlaneOutcome::Delivered;
            let times = &mut job.times;
            (times.decode_begin_ns, times.decode_end_ns) = (now_ns, now_ns);
            (times.dma_begin_ns, times.dma_end_ns) = (now_ns, now_ns);
            assert!(self.returned[job.queue].enqueue(job).is_ok(), "the rings have room for every job");
        }
        work
    }
}

/// Receives what it asks the store of `config` for, on one queue and the first lcore, until `stop` is set. Returns what
/// was counted after the first `warm_up`.
///
/// # Errors
/// When the port or the lcore cannot be had.
pub fn receive_only(
    eal: &Eal,
    config: &Config,
    wanted: &Wanted,
    warm_up: Duration,
    stop: &AtomicBool,
) -> Result<Value, BuildError> {
    let budget = Budget::new(config)?;
    let (stores, hops) = stores_of(config)?;
    let mut opened = iface::open(eal, &config.iface, &[], &hops)?;
    let rings = Rings::new(eal, &budget, config, u32::from(budget.active_planes))?;
    let limits = FetchLimits {
        fetches: usize::from(config.max_fetches),
        lookups: usize::from(MAX_LOOKUPS),
        chunks_per_fetch: config.max_chunks as usize,
        plane_bytes: config.slot_bytes,
        planes_per_chunk: usize::from(config.max_layers) * 2,
    };
    let clock = Clock::start();
    let gpus = Gpus::new(GpuConfig::default());
    let builder = StageBuilder { eal, config, budget, limits, stores, rings: &rings, clock, gpus: &gpus };
    let link = opened.links.swap_remove(0);
    let link_counters = Arc::clone(link.counters());
    let (rx, mut ends) = builder.rx(0, link, opened.ports.clone(), None)?;
    let plane_counters = Arc::clone(&rx.counters);
    let discard = Discard { planes: rings.decode.clone(), returned: rings.returned.clone() };
    let lcore_stop = Arc::new(AtomicBool::new(false));
    let control = LcoreControl { stop: Arc::clone(&lcore_stop), clock, idle_sleep: config.idle_sleep };
    let counters = Arc::<LcoreCounters>::default();
    let of_lcore = Arc::clone(&counters);
    let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(rx), Box::new(discard)];
    eal.launch(0, move || lcore::run(&mut stages, &control, &of_lcore))?;
    let counted = || Counted {
        at_ns: clock.now_ns(),
        packets: link_counters.rx_packets.get(),
        bytes: link_counters.rx_bytes.get(),
        segments: plane_counters.segments_accepted.get(),
        encoded_bytes: plane_counters.encoded_bytes.get(),
        busy_ns: counters.busy_ns.get(),
    };
    let from = keep_fetching(&mut ends, wanted, stop, warm_up, &counted)?;
    let until = counted();
    lcore_stop.store(true, Ordering::Relaxed);
    let in_order = eal.wait(0).is_ok();
    Ok(from.report(&until, in_order, &link_counters))
}

/// What had been counted at some time.
struct Counted {
    at_ns: u64,
    packets: u64,
    bytes: u64,
    segments: u64,
    encoded_bytes: u64,
    busy_ns: u64,
}

impl Counted {
    /// What was counted from here until `until`.
    fn report(&self, until: &Self, in_order: bool, link: &LinkCounters) -> Value {
        json!({
            "ended_in_order": in_order,
            "ns": until.at_ns - self.at_ns,
            "packets": until.packets - self.packets,
            "bytes": until.bytes - self.bytes,
            "segments": until.segments - self.segments,
            "encoded_bytes": until.encoded_bytes - self.encoded_bytes,
            "busy_ns": until.busy_ns - self.busy_ns,
            "dropped": link.dropped.to_json(),
        })
    }
}

/// Starts `wanted.fetches` fetches, and each again when it has ended. Returns what was counted after `warm_up`.
fn keep_fetching(
    ends: &mut QueueEnds,
    wanted: &Wanted,
    stop: &AtomicBool,
    warm_up: Duration,
    counted: &impl Fn() -> Counted,
) -> Result<Counted, BuildError> {
    let page = ArenaConfig { name: "unused", bytes: 4096, page: PageChoice::Base, numa_node: None };
    let fetch = Arc::new(FetchShared {
        target: FetchTarget::Host { region: Arc::new(Arena::new(page)?), dtype: Dtype::Bf16 },
        command: 0,
        chunks: Vec::new(),
        progress: Progress::default(),
    });
    for slot in 0..usize::from(wanted.fetches) {
        let part = FetchPart {
            id: PartId::new(slot, 1),
            deadline_ns: u64::MAX / 2,
            fetch: Arc::clone(&fetch),
            missing: Vec::with_capacity(wanted.keys.len()),
            keys: wanted.keys.clone(),
            expect: wanted.expect,
            cancelled: false,
        };
        assert!(ends.messages.enqueue(Box::new(QueueMessage::Fetch(part))).is_ok(), "the ring has room");
    }
    let mut serial = 1;
    let begin = counted();
    let mut from = None;
    while !stop.load(Ordering::Relaxed) {
        if from.is_none() && u128::from(counted().at_ns - begin.at_ns) >= warm_up.as_nanos() {
            from = Some(counted());
        }
        let Some(mut message) = ends.answers.dequeue() else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        if let QueueMessage::Fetch(part) = &mut *message {
            serial += 1;
            part.id = PartId::new(part.id.slot(), serial);
            part.missing.clear();
        }
        assert!(ends.messages.enqueue(message).is_ok(), "the ring has room");
    }
    Ok(from.unwrap_or(begin))
}
