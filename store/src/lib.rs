//! The storage node: keeps encoded chunks in hugepage memory and serves them over DPDK.
//!
//! [`kv_file`] reads KV caches from `.safetensors` files, [`chunks`] encodes and keeps them, and one stage per queue
//! ([`serve`]) answers what data planes ask for.
#![forbid(unsafe_code)]

pub mod chunks;
pub mod kv_file;
pub mod serve;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dpdk::{Eal, LaunchError};
use iface::{Clock, IfaceConfig, LcoreControl, LcoreCounters, LinkCounters, OpenError, Stage, lcore};
use protocol::frame::max_segment_bytes;
use protocol::serve::{ServeConfig, ServeEngine};
use serde_json::{Value, json};
use tracing::info;

use crate::chunks::ChunkStore;
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
}

/// Why the store ended other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The port could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
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
}

/// Serves `chunks` until `stop` is set. Returns what was counted.
///
/// # Errors
/// When the port or an lcore cannot be had, or an lcore panics.
pub fn run(
    eal: &Eal,
    config: &Config,
    chunks: Arc<ChunkStore>,
    stop: &AtomicBool,
) -> Result<Value, RunError> {
    let opened = iface::open(eal, &config.iface, None, &[])?;
    let lcores_stop = Arc::new(AtomicBool::new(false));
    let control =
        LcoreControl { stop: Arc::clone(&lcores_stop), clock: Clock::start(), idle_sleep: config.idle_sleep };
    let serve_config = ServeConfig {
        epoch: epoch(),
        max_segment_bytes: max_segment_bytes(config.iface.mtu, &config.iface.address.ip),
        ..ServeConfig::default()
    };
    let mut queues = Vec::new();
    let workers = config.first_worker..config.first_worker + opened.links.len();
    for (worker, link) in workers.clone().zip(opened.links) {
        let counts = Arc::<ServeCounts>::default();
        queues.push(QueueView { link: Arc::clone(link.counters()), counts: Arc::clone(&counts) });
        let engine = ServeEngine::new(serve_config);
        let stage =
            ServeStage { chunks: Arc::clone(&chunks), link, engine, counts, udp_port: config.iface.udp_port };
        let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(stage)];
        let (control, counters) = (control.clone(), LcoreCounters::default());
        eal.launch(worker, move || lcore::run(&mut stages, &control, &counters))?;
    }
    info!(
        "ready: {} chunks, {} bytes encoded from {} in {}, {} queues on {} at {} UDP {}",
        chunks.len(),
        chunks.encoded_bytes(),
        chunks.raw_bytes(),
        chunks.page_size(),
        queues.len(),
        opened.port.driver(),
        config.iface.address,
        config.iface.udp_port,
    );
    while !stop.load(Ordering::Relaxed) && workers.clone().all(|worker| eal.is_running(worker)) {
        std::thread::sleep(Duration::from_millis(20));
    }
    lcores_stop.store(true, Ordering::Relaxed);
    let in_order = workers.map(|worker| eal.wait(worker).is_ok()).fold(true, |all, ended| all & ended);
    if in_order { Ok(report(&queues)) } else { Err(RunError::Lcore) }
}

fn report(queues: &[QueueView]) -> Value {
    let queues = queues.iter().map(|queue| {
        json!({
            "datagrams": queue.counts.datagrams.get(),
            "segments": queue.counts.segments.get(),
            "payload_bytes": queue.counts.payload_bytes.get(),
            "link": queue.link.to_json(),
        })
    });
    json!({ "queues": queues.collect::<Vec<_>>() })
}

/// Differs between any two runs.
fn epoch() -> u64 {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}
