//! The GPUs that a data plane delivers to: their driver, and what clients lend of their memory.

use std::sync::Arc;

use control::GpuMemory;
use gpu_dma::{
    Driver, DriverError, GpuHealth, GpuSink, GpuSinkConfig, GpuSource, OpenError, PagedMemory, RingMemory,
    Sources,
};
use hugepages::Arena;

use crate::direct::GpuDirect;
use crate::fetches::RegionMemory;

/// The GPUs to deliver to, if any, and how.
#[derive(Debug, Clone, Default)]
pub struct GpuConfig {
    /// Their driver; without one, only host memory is delivered to.
    pub driver: Option<Arc<dyn Driver>>,
    /// Streams and batches.
    pub sink: GpuSinkConfig,
    /// Whether planes are received into the first GPU's memory.
    pub direct: GpuDirect,
}

/// What control thread and dma stages share of the GPUs.
#[derive(Debug)]
pub(crate) struct Gpus {
    pub(crate) config: GpuConfig,
    pub(crate) health: Arc<GpuHealth>,
}

impl Gpus {
    pub(crate) fn new(config: GpuConfig) -> Self {
        Self { config, health: Arc::default() }
    }

    /// Makes memory known to every GPU; without one, there is nothing to do.
    pub(crate) fn pin(&self, arena: Arena) -> Result<Arena, DriverError> {
        match &self.config.driver {
            Some(driver) => gpu_dma::pin(driver, arena),
            None => Ok(arena),
        }
    }

    /// The GPU half of a dma stage.
    pub(crate) fn sink<T>(&self) -> Result<Option<GpuSink<T>>, DriverError> {
        let driver = self.config.driver.clone();
        driver.map(|driver| GpuSink::new(driver, self.config.sink, Arc::clone(&self.health))).transpose()
    }

    /// Where an encode stage reads planes.
    pub(crate) fn source<T>(&self) -> Result<Sources<T>, DriverError> {
        let driver = self.config.driver.clone();
        let gpu = driver.map(|driver| GpuSource::new(driver, Arc::clone(&self.health))).transpose()?;
        Ok(Sources::new(gpu))
    }

    /// Opens what a client lends, as described and found sound; `words` is the host memory of a ring.
    pub(crate) fn open(
        &self,
        memory: &GpuMemory,
        words: Option<Arc<Arena>>,
    ) -> Result<RegionMemory, OpenError> {
        let driver = self.config.driver.as_ref().ok_or(OpenError::NoGpu)?;
        Ok(match (memory, words) {
            (GpuMemory::Pages(kv), _) => {
                RegionMemory::Pages(Arc::new(PagedMemory::open(driver, kv.clone())?))
            }
            (GpuMemory::Ring(ring), Some(words)) => {
                RegionMemory::Ring(Arc::new(RingMemory::open(driver, ring.clone(), words)?))
            }
            (GpuMemory::Ring(ring), None) => {
                return Err(control::GpuRingError::Foreign { entries: ring.entries }.into());
            }
        })
    }
}
