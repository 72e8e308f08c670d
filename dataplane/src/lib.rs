//! The data plane: fetches encoded planes from a store over DPDK, decodes them and delivers them into the memory of
//! serving processes.
//!
//! In the order of a plane's way: [`rx`] receives its packets, [`decode`] turns them into the decoded plane in a slot
//! (decompressing by a device, [`offload`], where there is one), [`dma`] copies the slot to its place, and [`rx`] tells the engine. [`pipeline`] makes and places these stages;
//! [`control_thread`] talks to the serving processes and keeps [`fetches`], everything under way.
#![forbid(unsafe_code)]

mod chunk_layout;
mod config;
mod control_thread;
mod decode;
mod direct;
mod dma;
mod fetch_counts;
mod fetches;
mod gpu;
mod job;
mod latency;
mod metrics;
mod offload;
mod pipeline;
mod placement;
pub mod receive_only;
mod rx;
mod save;

use std::sync::atomic::AtomicBool;

use control::{BindError, Listener};
use dpdk::Eal;
use tracing::info;

use crate::control_thread::ControlThread;
use crate::gpu::Gpus;
use crate::pipeline::{DirectState, Pipeline};
use crate::save::saves::Saves;

pub use crate::config::{Config, ConfigError, SaveConfig};
pub use crate::direct::{GpuDirect, NoGpuDirect};
pub use crate::gpu::GpuConfig;
pub use crate::pipeline::BuildError;
pub use crate::placement::{Placement, PlacementError, StageKind, parse_cpus};

/// Why the data plane ended other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It could not be set up.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The control socket could not be made.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// An lcore ended before it was told to.
    #[error("an lcore ended by a panic (see above); the data plane stopped: please report it")]
    Lcore,
    /// A GPU was lost.
    #[error("a GPU was lost ({0}), and every fetch ended; start the data plane again")]
    Gpu(gpu_dma::DriverError),
}

/// Runs the data plane until `stop` is set: opens the port, starts the lcores, serves clients on the calling thread.
/// When it returns, every fetch has ended, the lcores have stopped and the port is closed.
///
/// # Errors
/// When it cannot be set up, or an lcore panics.
pub fn run(eal: &Eal, config: &Config, stop: &AtomicBool) -> Result<(), RunError> {
    let gpus = Gpus::new(config.gpu.clone());
    let (pipeline, fetches, saves) = Pipeline::build(eal, config, &gpus)?;
    let served = serve(eal, config, &pipeline, (fetches, saves), &gpus, stop);
    let ended_in_order = pipeline.stop(eal);
    served?;
    match (ended_in_order, gpus.health.lost()) {
        (false, _) => Err(RunError::Lcore),
        (true, Some(error)) => Err(RunError::Gpu(error)),
        (true, None) => Ok(()),
    }
}

fn serve(
    eal: &Eal,
    config: &Config,
    pipeline: &Pipeline,
    under_way: (fetches::Fetches, Saves),
    gpus: &Gpus,
    stop: &AtomicBool,
) -> Result<(), RunError> {
    let listener = Listener::bind(&config.socket, 0o660, config.group.as_deref())?;
    let fallback = pipeline.slot_fallback.as_deref().map(|why| format!(" ({why})")).unwrap_or_default();
    if let Some(driver) = &config.gpu.driver {
        let names: Vec<String> =
            driver.devices().iter().map(|device| format!("{}: {}", device.ordinal, device.name)).collect();
        info!("GPU memory is delivered to on {} by {}", names.join(", "), driver.method());
    }
    match &pipeline.direct {
        DirectState::Off => {}
        DirectState::On => {
            info!("planes of codec raw are received into the memory of the first GPU (GPUDirect)")
        }
        DirectState::Refused(why) => info!("no GPUDirect, planes are received into host memory: {why}"),
    }
    info!(
        "ready: {} queues on {}, lcores {}, {} slots in {}{fallback}, clients at {}",
        pipeline.queues.len(),
        pipeline.port.driver(),
        config.placement,
        pipeline.slot_count,
        pipeline.slot_pages,
        config.socket.display(),
    );
    if let Some(device) = &pipeline.compress_dev {
        info!("compression device {}: {}", device.name(), device.capabilities());
    }
    ControlThread::new(listener, pipeline, under_way, gpus).run(eal, stop);
    Ok(())
}
