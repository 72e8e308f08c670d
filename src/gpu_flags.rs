//! Flags for GPU memory.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use dataplane::{GpuConfig, GpuDirect, parse_cpus};
use gpu_dma::cuda::{Cuda, CudaError};
use gpu_dma::{Driver, GpuSinkConfig};

/// Which GPUs to deliver to, and how.
#[derive(Debug, Clone, Args)]
pub(crate) struct GpuFlags {
    /// GPUs whose memory may be delivered to: `all`, `none`, or their numbers, as 0 or 0+2-3. Each takes some hundred MiB
    /// of its memory
    #[arg(long, value_name = "GPUS", default_value = "all")]
    gpu: String,
    /// Streams per GPU and dma lcore
    #[arg(long, value_name = "COUNT", default_value_t = GpuSinkConfig::default().streams)]
    copy_streams: usize,
    /// Copies that are started together at most
    #[arg(long, value_name = "COUNT", default_value_t = GpuSinkConfig::default().batch_pieces)]
    gpu_batch: usize,
    /// How long a copy waits for others to be started with, in microseconds, while earlier ones are under way
    #[arg(long, value_name = "US", default_value_t = 50)]
    gpu_batch_us: u64,
    /// How long a plane waits for a free entry of a GPU ring before its chunk fails, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 200)]
    ring_patience_ms: u64,
    /// Receive planes of codec raw into the memory of the first GPU, which takes a NIC and a driver that can (see `shadowserve doctor --port`):
    /// off, auto (host memory where it cannot be) or on. The CRC of such planes is not checked, UDP's checksums are, by the NIC
    #[arg(long, value_name = "WHEN", default_value = "off")]
    gpudirect: GpuDirectFlag,
}

/// `--gpudirect`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GpuDirectFlag {
    Off,
    Auto,
    On,
}

impl GpuFlags {
    /// Opens the driver, unless there is none and none was asked for by number.
    pub(crate) fn config(&self) -> anyhow::Result<GpuConfig> {
        let sink = GpuSinkConfig {
            streams: self.copy_streams.max(1),
            batch_pieces: self.gpu_batch.max(1),
            batch_age: Duration::from_micros(self.gpu_batch_us),
            ring_patience: Duration::from_millis(self.ring_patience_ms),
            ..GpuSinkConfig::default()
        };
        let direct = match self.gpudirect {
            GpuDirectFlag::Off => GpuDirect::Off,
            GpuDirectFlag::Auto => GpuDirect::Auto,
            GpuDirectFlag::On => GpuDirect::On,
        };
        Ok(GpuConfig { driver: self.driver()?, sink, direct })
    }

    fn driver(&self) -> anyhow::Result<Option<Arc<dyn Driver>>> {
        let cuda = match self.gpu.as_str() {
            "none" => return Ok(None),
            "all" => match Cuda::open(|_| true) {
                Ok(cuda) if cuda.devices().is_empty() => return Ok(None),
                Err(CudaError::NoDriver) => return Ok(None),
                opened => opened.context("--gpu all: use --gpu none to do without")?,
            },
            list => {
                let numbers = parse_cpus(list)
                    .ok()
                    .with_context(|| format!("--gpu {list}: write all, none, or numbers as 0 or 0+2-3"))?;
                let cuda = Cuda::open(|number| numbers.contains(&number))
                    .with_context(|| format!("--gpu {list}"))?;
                anyhow::ensure!(
                    cuda.devices().len() == numbers.len(),
                    "--gpu {list}: this machine has not all of these GPUs: `shadowserve doctor` lists them"
                );
                cuda
            }
        };
        Ok(Some(Arc::new(cuda)))
    }
}
