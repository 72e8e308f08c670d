//! What the sinks need of a GPU's driver, as a trait: CUDA implements it ([`crate::cuda::Cuda`]), and so does a fake for
//! machines without a GPU ([`crate::testing::FakeDriver`]).

use std::fmt;

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

    /// How pieces are copied, for the log: `batched`, `strided or single`.
    fn method(&self) -> &'static str;
}
