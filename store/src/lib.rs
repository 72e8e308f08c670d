//! The storage node: keeps encoded chunks in hugepage memory, serves them over DPDK, and takes in what data planes put.
//!
//! [`kv_file`] reads KV caches from `.safetensors` files, and [`load`] encodes them. One stage per queue ([`serve`]) answers what
//! data planes ask for out of [`chunks`], an index that is read without a lock, and pulls what they put (`intakes.rs`). One
//! thread, the [`keeper`]'s, changes the index: it finds memory, evicts by `policy.rs`, and checks what was put (`check.rs`)
//! before it shows it. Lcores and keeper talk through rings (`exchange.rs`).
#![forbid(unsafe_code)]

mod check;
pub mod chunks;
mod exchange;
pub mod intakes;
pub mod keeper;
pub mod kv_file;
pub mod load;
mod policy;
pub mod serve;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dpdk::{Attacher, Eal, ExternalError, ExternalMemory, LaunchError, PoolError, Port};
use iface::{
    Clock, IfaceConfig, LcoreControl, LcoreCounters, LinkCounters, OpenError, Stage, StopOnDrop, lcore,
};
use protocol::frame::max_segment_bytes;
use protocol::put::AcceptConfig;
use protocol::serve::{ServeConfig, ServeEngine};
use serde_json::{Value, json};
use tracing::info;

use crate::chunks::Chunk;
use crate::exchange::{Desk, Exchange};
use crate::intakes::{Intakes, PutCounts};
use crate::keeper::Keeper;
use crate::serve::{ServeCounts, ServeStage};

/// What a store is started with, apart from its chunks.
#[derive(Debug, Clone)]
pub struct Config {
    /// The port, its addresses and packet buffers. Its `queues` is the number of `cpus`.
    pub iface: IfaceConfig,
    /// First of the EAL's workers to serve on: one per queue, in order.
    pub first_worker: usize,
    /// How long an idle lcore naps; zero never.
    pub idle_sleep: Duration,
    /// Limits on what is taken in by one queue, if the keeper takes anything; `epoch`, `segment_bytes` and `seed` are set by
    /// [`run`].
    pub accept: AcceptConfig,
    /// Whether segments are sent from where they lie.
    pub zero_copy: ZeroCopy,
}

/// Whether segments are sent from where they lie, in packets of two buffers, or copied into one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroCopy {
    /// From where they lie, if the port can and its device reads memory by itself; else copied.
    Auto,
    /// From where they lie.
    On,
    /// Copied.
    Off,
}

/// Drivers for which a second buffer per packet is no gain. All but `net_ring` copy what they send into memory of their own in
/// any case (`docs/BENCHMARKS.md` has memif's figures); `net_ring` hands the buffers themselves to the receiver, and a data
/// plane copies packets of several into one.
const DRIVERS_WITHOUT_DMA: [&str; 7] =
    ["net_memif", "net_af_packet", "net_af_xdp", "net_tap", "net_pcap", "net_vhost", "net_ring"];

/// Chunks that a queue's device may be sending from at once; more are copied.
const ATTACHED_CHUNKS: usize = 64;

/// How long the keeper's thread sleeps while chunks are on their way in, and else.
const BUSY_SLEEP: Duration = Duration::from_micros(50);
const IDLE_SLEEP: Duration = Duration::from_millis(1);
/// Looks without work after which it is idle.
const LOOKS_UNTIL_IDLE: u32 = 200;

/// Why the store ended other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The port could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The device does not send what lies in two buffers.
    #[error("--zero-copy on: {0} sends no packets of several buffers; leave it `auto`")]
    NoChains(String),
    /// The device cannot read the chunks.
    #[error("--zero-copy on: {0}; leave it `auto`")]
    External(#[from] ExternalError),
    /// The mbufs for it could not be had.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// An lcore could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// An lcore ended before it was told to.
    #[error("an lcore ended by a panic (see above); the store stopped: please report it")]
    Lcore,
}

/// What other threads see of one queue.
struct QueueView {
    link: Arc<LinkCounters>,
    counts: Arc<ServeCounts>,
    put: Arc<PutCounts>,
    lcore: Arc<LcoreCounters>,
}

/// Serves what `keeper` holds, and takes in more, until `stop` is set. Returns what was counted.
///
/// # Errors
/// When the port or an lcore cannot be had, or an lcore panics.
pub fn run(eal: &Eal, config: &Config, keeper: &mut Keeper, stop: &AtomicBool) -> Result<Value, RunError> {
    let opened = iface::open(eal, &config.iface, &[], &[])?;
    let lcores_stop = Arc::new(AtomicBool::new(false));
    let _stop_on_drop = StopOnDrop(Arc::clone(&lcores_stop));
    let control =
        LcoreControl { stop: Arc::clone(&lcores_stop), clock: Clock::start(), idle_sleep: config.idle_sleep };
    let (epoch, segment_bytes) = (epoch(), max_segment_bytes(config.iface.mtu, &config.iface.address.ip));
    let serve_config = ServeConfig { epoch, max_segment_bytes: segment_bytes, ..ServeConfig::default() };
    let max_intakes = if keeper.takes_more() { config.accept.max_intakes } else { 0 };
    // The low half of the time differs from run to run.
    let seed = u32::try_from(epoch & u64::from(u32::MAX)).unwrap_or(0);
    let accept_config = AcceptConfig { epoch, segment_bytes, seed, max_intakes, ..config.accept };
    let external = external_memory(eal, config, keeper, &opened.port)?;
    let (mut queues, mut exchanges) = (Vec::new(), Vec::new());
    let workers = config.first_worker..config.first_worker + opened.links.len();
    for (worker, link) in workers.clone().zip(opened.links) {
        let (counts, put) = (Arc::<ServeCounts>::default(), Arc::<PutCounts>::default());
        let exchange = Arc::new(Exchange::new(max_intakes));
        queues.push(QueueView {
            link: Arc::clone(link.counters()),
            counts: Arc::clone(&counts),
            put: Arc::clone(&put),
            lcore: Arc::default(),
        });
        exchanges.push(Arc::clone(&exchange));
        let stage = ServeStage {
            chunks: Arc::clone(keeper.chunks()),
            link,
            engine: ServeEngine::new(serve_config),
            intakes: Intakes::new(accept_config, exchange, put),
            attacher: attacher(eal, config, external.as_ref(), worker)?,
            counts,
            udp_port: config.iface.udp_port,
        };
        let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(stage)];
        let control = control.clone();
        let counters = queues.last().map(|queue| Arc::clone(&queue.lcore)).unwrap_or_default();
        eal.launch(worker, move || lcore::run(&mut stages, &control, &counters))?;
    }
    info!(
        "ready: {} chunks, {} bytes encoded from {} in {} bytes of {}, {} queues on {} at {} UDP {}, segments {}",
        keeper.len(),
        keeper.encoded_bytes(),
        keeper.raw_bytes(),
        keeper.memory_bytes(),
        keeper.page_size(),
        queues.len(),
        opened.port.driver(),
        config.iface.address,
        config.iface.udp_port,
        if external.is_some() { "sent from where they lie" } else { "copied" },
    );
    let mut desk = Desk::new(keeper, exchanges);
    let mut looks_without_work = 0_u32;
    while !stop.load(Ordering::Relaxed) && workers.clone().all(|worker| eal.is_running(worker)) {
        looks_without_work = if desk.poll() > 0 { 0 } else { looks_without_work.saturating_add(1) };
        std::thread::sleep(if looks_without_work < LOOKS_UNTIL_IDLE { BUSY_SLEEP } else { IDLE_SLEEP });
    }
    lcores_stop.store(true, Ordering::Relaxed);
    let in_order = workers.map(|worker| eal.wait(worker).is_ok()).fold(true, |all, ended| all & ended);
    if in_order { Ok(report(&queues, keeper)) } else { Err(RunError::Lcore) }
}

/// The chunks' memory as the device may read it, unless segments are to be copied.
fn external_memory(
    eal: &Eal,
    config: &Config,
    keeper: &Keeper,
    port: &Port,
) -> Result<Option<ExternalMemory>, RunError> {
    let no_gain = DRIVERS_WITHOUT_DMA.contains(&port.driver());
    if config.zero_copy == ZeroCopy::Off || (config.zero_copy == ZeroCopy::Auto && no_gain) {
        return Ok(None);
    }
    let page_bytes = keeper.page_size().bytes();
    // The last page may be larger than what is used of it.
    let bytes = keeper.memory_bytes().next_multiple_of(page_bytes);
    let mapped = if port.capabilities().tx_multi_segment {
        ExternalMemory::new(eal, keeper.memory_addr(), bytes, page_bytes)
            .and_then(|memory| memory.map(port).map(|()| memory))
            .map_err(RunError::External)
    } else {
        Err(RunError::NoChains(port.driver().to_owned()))
    };
    match mapped {
        Ok(memory) => Ok(Some(memory)),
        Err(error) if config.zero_copy == ZeroCopy::On => Err(error),
        Err(error) => {
            info!("segments are copied: {error}");
            Ok(None)
        }
    }
}

fn attacher(
    eal: &Eal,
    config: &Config,
    memory: Option<&ExternalMemory>,
    worker: usize,
) -> Result<Option<Attacher<Chunk>>, RunError> {
    let Some(memory) = memory else { return Ok(None) };
    // What the device's ring holds, a burst, and what caches keep aside.
    let mbufs = u32::from(config.iface.tx_descriptors) + 1024;
    Ok(Some(Attacher::new(eal, &format!("attached{worker}"), memory, mbufs, ATTACHED_CHUNKS)?))
}

fn report(queues: &[QueueView], keeper: &Keeper) -> Value {
    let queues = queues.iter().map(|queue| {
        json!({
            "datagrams": queue.counts.datagrams.get(),
            "segments": queue.counts.segments.get(),
            "payload_bytes": queue.counts.payload_bytes.get(),
            "segments_not_copied": queue.counts.attached.get(),
            "busy_ns": queue.lcore.busy_ns.get(),
            "put": queue.put.to_json(),
            "link": queue.link.to_json(),
        })
    });
    json!({ "queues": queues.collect::<Vec<_>>(), "chunks": keeper.to_json() })
}

/// Differs between any two runs.
fn epoch() -> u64 {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}
