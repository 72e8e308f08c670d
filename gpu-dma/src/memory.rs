//! GPU memory of serving processes, open: what the sinks copy to.

use std::sync::Arc;

use control::{DeviceUuid, GpuAllocation, GpuRingError, PagedKv, RingKv, RingProducer};
use hugepages::Arena;

use crate::driver::{DeviceIndex, Driver, DriverError, Mapping};
use crate::paged::{self, SlotOrder};

/// Why GPU memory that a client lends was not opened. The text goes to the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The data plane has no driver.
    #[error(
        "this data plane uses no GPU: start it with --gpu on a machine that has one (`shadowserve doctor`)"
    )]
    NoGpu,
    /// It has one, and the client's GPU is none of its own.
    #[error(
        "this data plane does not use the GPU {uuid}: name it in --gpu, and see that both processes may use it"
    )]
    NoSuchDevice {
        /// As given.
        uuid: DeviceUuid,
    },
    /// The driver does not take the handle.
    #[error(
        "the handle of allocation {allocation} cannot be opened: {source}; the memory must be alive, allocated by \
         cudaMalloc (not by stream-ordered or virtual memory calls), and of another process"
    )]
    Handle {
        /// Its index.
        allocation: usize,
        /// What the driver said.
        source: DriverError,
    },
    /// The allocation is smaller than described.
    #[error("allocation {allocation} was described as {described} bytes and has {actual}")]
    TooSmall {
        /// Its index.
        allocation: usize,
        /// As described.
        described: u64,
        /// As the driver has it.
        actual: u64,
    },
    /// The host memory of a ring is not that.
    #[error(transparent)]
    Ring(#[from] GpuRingError),
}

/// Finds the GPU that a client means.
///
/// # Errors
/// When the driver does not have it.
pub fn find_device(driver: &dyn Driver, uuid: DeviceUuid) -> Result<DeviceIndex, OpenError> {
    let found = driver.devices().iter().position(|device| device.uuid == uuid.0);
    found.map(DeviceIndex).ok_or(OpenError::NoSuchDevice { uuid })
}

/// An allocation of another process, mapped for as long as this lives.
#[derive(Debug)]
struct Lent {
    driver: Arc<dyn Driver>,
    device: DeviceIndex,
    mapping: Mapping,
}

impl Lent {
    fn open(
        driver: &Arc<dyn Driver>,
        device: DeviceIndex,
        allocation: usize,
        described: &GpuAllocation,
    ) -> Result<Self, OpenError> {
        let mapping = driver
            .open_ipc(device, &described.handle.bytes())
            .map_err(|source| OpenError::Handle { allocation, source })?;
        let lent = Self { driver: Arc::clone(driver), device, mapping };
        if mapping.bytes < described.bytes {
            let (described, actual) = (described.bytes, mapping.bytes);
            return Err(OpenError::TooSmall { allocation, described, actual });
        }
        Ok(lent)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // A driver that refuses has lost its device: nothing is mapped there any more.
        let _ = self.driver.close_ipc(self.device, self.mapping.address);
    }
}

/// A client's paged KV cache.
#[derive(Debug)]
pub struct PagedMemory {
    kv: PagedKv,
    order: SlotOrder,
    lent: Vec<Lent>,
    device: DeviceIndex,
}

impl PagedMemory {
    /// Opens every allocation of `kv`, which [`PagedKv::check`] found sound, and compares its size with the description:
    /// whatever page table is checked against `kv` stays within them.
    ///
    /// # Errors
    /// See [`OpenError`]; nothing stays open then.
    pub fn open(driver: &Arc<dyn Driver>, kv: PagedKv) -> Result<Self, OpenError> {
        let device = find_device(&**driver, kv.device)?;
        let open = |(index, described)| Lent::open(driver, device, index, described);
        let lent = kv.allocations.iter().enumerate().map(open).collect::<Result<_, _>>()?;
        Ok(Self { order: paged::slot_order(&kv), kv, lent, device })
    }

    /// The description.
    #[must_use]
    pub fn kv(&self) -> &PagedKv {
        &self.kv
    }

    /// How slots for it are to be ordered.
    #[must_use]
    pub fn order(&self) -> SlotOrder {
        self.order
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> DeviceIndex {
        self.device
    }

    /// The GPU's address of what the offsets of plane `plane` count from; `None` if there is no such plane.
    #[must_use]
    pub fn base(&self, plane: u32) -> Option<u64> {
        let layer = self.kv.layers.get(usize::try_from(plane / 2).ok()?)?;
        let base = if plane.is_multiple_of(2) { layer.k } else { layer.v };
        Some(self.lent.get(usize::from(base.allocation))?.mapping.address)
    }
}

/// A client's ring.
#[derive(Debug)]
pub struct RingMemory {
    ring: RingKv,
    producer: RingProducer,
    lent: Lent,
    device: DeviceIndex,
}

impl RingMemory {
    /// Opens the ring's allocation; `words` is its host memory.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(driver: &Arc<dyn Driver>, ring: RingKv, words: Arc<Arena>) -> Result<Self, OpenError> {
        let device = find_device(&**driver, ring.device)?;
        let producer = RingProducer::new(words, ring.entries, ring.generation)?;
        let lent = Lent::open(driver, device, 0, &ring.allocation)?;
        Ok(Self { ring, producer, lent, device })
    }

    /// The description.
    #[must_use]
    pub fn ring(&self) -> &RingKv {
        &self.ring
    }

    /// The host side.
    #[must_use]
    pub fn producer(&self) -> &RingProducer {
        &self.producer
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> DeviceIndex {
        self.device
    }

    /// The GPU's address of the entry that a number lies in.
    #[must_use]
    pub fn entry_address(&self, sequence: u64) -> u64 {
        let entry = u64::from(self.producer.entry(sequence));
        self.lent.mapping.address + self.ring.offset + entry * self.ring.entry_bytes
    }
}
