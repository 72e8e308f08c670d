//! What the sinks need of a GPU's driver, as a trait: CUDA implements it ([`crate::cuda::Cuda`]), and so does a fake for
//! machines without a GPU ([`crate::testing::FakeDriver`]).

use std::fmt;
use std::os::fd::OwnedFd;

use crate::copies::{CopyList, Run};

/// A GPU of this driver, by its place in [`Driver::devices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceIndex(pub usize);

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The driver's number for it.
    pub ordinal: i32,
    /// Its identity, the same in every process.
    pub uuid: [u8; 16],
    /// What it calls itself.
    pub name: String,
    /// Its memory, bytes.
    pub bytes: u64,
}

/// An order of copies, carried out one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId(pub u64);

/// A mark in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventId(pub u64);

/// Memory of another process, mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The GPU's address of its first byte.
    pub address: u64,
    /// Bytes of the whole allocation, as the driver has it.
    pub bytes: u64,
}

/// What the driver said no to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {name} ({code})")]
pub struct DriverError {
    /// The call.
    pub call: &'static str,
    /// The driver's number for the error.
    pub code: u32,
    /// The driver's name for it.
    pub name: &'static str,
    /// Whether every later call on this device will fail too: nothing but a new process helps.
    pub sticky: bool,
}

/// GPU memory of this process that a NIC may be let write to.
#[derive(Debug)]
pub struct ForNic {
    /// Its address: a multiple of 64 KiB.
    pub address: u64,
    /// The same as a dma-buf, where the driver exports it.
    pub dma_buf: Option<OwnedFd>,
    /// Whether the CPU can read and write it too: a stand-in.
    pub is_cpu_memory: bool,
}

/// Why no NIC can be let write to a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NicUnfit {
    /// The GPU has no such thing.
    #[error("the GPU or its driver has no GPUDirect RDMA")]
    NoRdma,
    /// A copy that is started when a packet has arrived could read what was there before it.
    #[error(
        "the GPU does not order a NIC's writes before later copies (GPU_DIRECT_RDMA_WRITES_ORDERING is {0}, 100 is needed)"
    )]
    Unordered(i32),
    /// Without them one packet's piece is one call.
    #[error("the driver has no batched copies: it must be of CUDA 12.8 or later")]
    NoBatches,
    /// The driver refused a call.
    #[error(transparent)]
    Refused(#[from] DriverError),
}

/// A GPU's driver. Calls are made from any thread.
///
/// No method waits for the GPU, except [`synchronize`](Driver::synchronize). No method starts a kernel.
pub trait Driver: Send + Sync + fmt::Debug {
    /// The GPUs that may be used; always the same ones.
    fn devices(&self) -> &[Device];

    /// Pins host memory and makes it known to every GPU, so that copies from it need no staging.
    ///
    /// # Safety
    /// `address..address + bytes` is mapped, and stays so until [`unregister_host`](Driver::unregister_host).
    ///
    /// # Errors
    /// When the driver refuses.
    unsafe fn register_host(&self, address: usize, bytes: usize) -> Result<(), DriverError>;

    /// Ends a registration. Copies from the memory have ended.
    ///
    /// # Errors
    /// When it was not registered, or the driver is broken.
    fn unregister_host(&self, address: usize) -> Result<(), DriverError>;

    /// Maps an allocation that another process exported.
    ///
    /// # Errors
    /// When the handle is none, its memory is gone or on another GPU, or its process is this one.
    fn open_ipc(&self, device: DeviceIndex, handle: &[u8; 64]) -> Result<Mapping, DriverError>;

    /// Unmaps it. Copies into it have ended.
    ///
    /// # Errors
    /// When it is not mapped, or the driver is broken.
    fn close_ipc(&self, device: DeviceIndex, address: u64) -> Result<(), DriverError>;

    /// Makes a stream, of the highest priority there is.
    ///
    /// # Errors
    /// When the driver refuses.
    fn create_stream(&self, device: DeviceIndex) -> Result<StreamId, DriverError>;

    /// Ends a stream whose copies have ended.
    fn destroy_stream(&self, device: DeviceIndex, stream: StreamId);

    /// Makes an event.
    ///
    /// # Errors
    /// When the driver refuses.
    fn create_event(&self, device: DeviceIndex) -> Result<EventId, DriverError>;

    /// Ends an event.
    fn destroy_event(&self, device: DeviceIndex, event: EventId);

    /// Marks the point in `stream` behind all that it has been given.
    ///
    /// # Errors
    /// When the driver refuses.
    fn record(&self, device: DeviceIndex, event: EventId, stream: StreamId) -> Result<(), DriverError>;

    /// Whether all before the mark is done.
    ///
    /// # Errors
    /// What a copy before the mark met, or the driver's own fault.
    fn query(&self, device: DeviceIndex, event: EventId) -> Result<bool, DriverError>;

    /// Waits for all that `stream` has been given.
    ///
    /// # Errors
    /// What a copy met, or the driver's own fault.
    fn synchronize(&self, device: DeviceIndex, stream: StreamId) -> Result<(), DriverError>;

    /// Starts copies from host memory to the GPU, in any order among themselves: those of `pieces`, an excerpt of
    /// `list`. After an error some may have been started.
    ///
    /// # Safety
    /// The host memory is registered, and it stays so and is not written until the copies have ended. The GPU memory is
    /// mapped until then.
    ///
    /// # Errors
    /// When the driver refuses.
    unsafe fn copy_pieces(
        &self,
        device: DeviceIndex,
        stream: StreamId,
        list: &CopyList,
        pieces: std::ops::Range<usize>,
    ) -> Result<(), DriverError>;

    /// Starts one copy of several rows.
    ///
    /// # Safety
    /// As [`copy_pieces`](Driver::copy_pieces).
    ///
    /// # Errors
    /// When the driver refuses.
    unsafe fn copy_rows(&self, device: DeviceIndex, stream: StreamId, run: &Run) -> Result<(), DriverError>;

    /// Starts one copy of several rows the other way: `run.from` is an address of the GPU, `run.to` one of host memory.
    ///
    /// # Safety
    /// The host memory is registered, and it stays so and is neither read nor written until the copy has ended. The GPU memory
    /// is mapped until then.
    ///
    /// # Errors
    /// When the driver refuses.
    unsafe fn read_rows(&self, device: DeviceIndex, stream: StreamId, run: &Run) -> Result<(), DriverError>;

    /// Starts copies from one place in a GPU's memory to another, as [`copy_pieces`](Driver::copy_pieces) does from host memory.
    ///
    /// # Safety
    /// Both places are mapped until the copies have ended, and the source is not written until then.
    ///
    /// # Errors
    /// When the driver refuses.
    unsafe fn copy_within(
        &self,
        device: DeviceIndex,
        stream: StreamId,
        list: &CopyList,
        pieces: std::ops::Range<usize>,
    ) -> Result<(), DriverError>;

    /// Allocates GPU memory that a NIC is to write to.
    ///
    /// # Errors
    /// Why that cannot be: what the GPU, the driver or this machine lacks.
    fn allocate_for_nic(&self, device: DeviceIndex, bytes: usize) -> Result<ForNic, NicUnfit>;

    /// Frees such memory. Copies from it have ended, and no NIC knows it any more.
    fn free_for_nic(&self, device: DeviceIndex, memory: &ForNic);

    /// How pieces are copied, for the log: `batched`, `strided or single`.
    fn method(&self) -> &'static str;
}
