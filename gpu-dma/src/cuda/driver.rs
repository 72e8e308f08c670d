//! [`Driver`] by CUDA's driver interface: primary contexts, copy engines, no kernels.

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::fmt;
use std::ops::Range;
use std::ptr::{null, null_mut};

use cudarc::driver::sys::{
    CUDA_MEMCPY2D, CUcontext, CUdevice, CUdeviceptr, CUevent, CUipcMemHandle, CUmemLocation,
    CUmemLocationType, CUmemcpyAttributes, CUmemcpySrcAccessOrder, CUmemorytype, CUstream, CUuuid,
};

use super::CudaError;
use super::symbols::{BatchCopy, Symbols};
use crate::copies::{CopyList, Run};
use crate::driver::{Device, DeviceIndex, Driver, DriverError, EventId, ForNic, Mapping, NicUnfit, StreamId};

const CU_STREAM_NON_BLOCKING: u32 = 1;
const CU_EVENT_DISABLE_TIMING: u32 = 2;
const CU_MEMHOSTREGISTER_PORTABLE: u32 = 1;
const CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: u32 = 1;
const CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: u32 = 9;
const CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED: u32 = 116;
const CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING: u32 = 118;
const CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED: u32 = 124;
/// A GPU consumes what a NIC has written to its memory in order, without a flush.
const CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER: c_int = 100;
/// By a copy engine where that can be: multiprocessors are the model's.
const CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE: u32 = 1;
const CUDA_ERROR_NOT_SUPPORTED: u32 = 801;
const CUDA_ERROR_INVALID_DEVICE: u32 = 101;
const CUDA_ERROR_NOT_READY: u32 = 600;

/// Errors of one call, after which the next may succeed. Everything else counts as the loss of the GPU: to stop in order
/// is better than to go on with a device in an unknown state.
const OF_ONE_CALL: [u32; 20] =
    [1, 2, 34, 100, 101, 200, 205, 206, 208, 217, 304, 400, 500, 600, 704, 705, 712, 713, 800, 801];

/// CUDA's driver, with the primary contexts of some GPUs.
pub struct Cuda {
    symbols: Symbols,
    devices: Vec<Device>,
    contexts: Vec<Context>,
}

struct Context {
    device: CUdevice,
    context: CUcontext,
    priority: c_int,
}

// SAFETY: contexts may be made current in any thread, any number of them; nothing else of it is shared.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuda").field("devices", &self.devices).finish_non_exhaustive()
    }
}

thread_local! {
    /// The context that this thread made current last.
    static CURRENT: Cell<CUcontext> = const { Cell::new(null_mut()) };
}

impl Drop for Cuda {
    fn drop(&mut self) {
        for context in &self.contexts {
            // SAFETY: retained once in `open`.
            unsafe { (self.symbols.release)(context.device) };
        }
    }
}

impl Cuda {
    /// Opens the driver and the primary context of each GPU that `wanted` picks by its number. A context takes some
    /// hundred megabytes of the GPU's memory.
    ///
    /// # Errors
    /// When there is no driver, or it does not work.
    pub fn open(wanted: impl Fn(usize) -> bool) -> Result<Self, CudaError> {
        let symbols = Symbols::load()?;
        let mut cuda = Self { symbols, devices: Vec::new(), contexts: Vec::new() };
        for ordinal in 0..cuda.count()? {
            if wanted(usize::try_from(ordinal).unwrap_or(usize::MAX)) {
                let (device, handle) = cuda.describe(ordinal)?;
                let context = cuda.context(handle)?;
                cuda.devices.push(device);
                cuda.contexts.push(context);
            }
        }
        Ok(cuda)
    }

    /// The driver's version, major and minor.
    #[must_use]
    pub fn version(&self) -> (i32, i32) {
        (self.symbols.version / 1000, self.symbols.version % 1000 / 10)
    }

    /// The GPUs of this machine, without making a context on any.
    pub(super) fn list() -> Result<(Vec<Device>, (i32, i32)), CudaError> {
        let cuda = Self { symbols: Symbols::load()?, devices: Vec::new(), contexts: Vec::new() };
        let devices = (0..cuda.count()?).map(|ordinal| Ok(cuda.describe(ordinal)?.0));
        Ok((devices.collect::<Result<_, CudaError>>()?, cuda.version()))
    }

    fn check(&self, call: &'static str, code: u32) -> Result<(), DriverError> {
        if code == 0 {
            return Ok(());
        }
        let sticky = !OF_ONE_CALL.contains(&code);
        Err(DriverError { call, code, name: self.symbols.name(code), sticky })
    }

    fn count(&self) -> Result<c_int, DriverError> {
        let mut count = 0;
        // SAFETY: writes one integer.
        self.check("cuDeviceGetCount", unsafe { (self.symbols.device_count)(&raw mut count) })?;
        Ok(count)
    }

    fn describe(&self, ordinal: c_int) -> Result<(Device, CUdevice), DriverError> {
        let symbols = &self.symbols;
        let (mut device, mut bytes, mut uuid) = (0, 0_usize, CUuuid { bytes: [0; 16] });
        let mut name = [0 as c_char; 256];
        // SAFETY: each writes one value of the type given, the name at most 256 bytes with a zero at their end.
        unsafe {
            self.check("cuDeviceGet", (symbols.device)(&raw mut device, ordinal))?;
            self.check("cuDeviceTotalMem", (symbols.device_bytes)(&raw mut bytes, device))?;
            self.check("cuDeviceGetUuid", (symbols.device_uuid)(&raw mut uuid, device))?;
            self.check("cuDeviceGetName", (symbols.device_name)(name.as_mut_ptr(), 256, device))?;
        }
        let name = name.map(|byte| byte.to_ne_bytes()[0]);
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).into_owned();
        let uuid = uuid.bytes.map(|byte| byte.to_ne_bytes()[0]);
        Ok((Device { ordinal, uuid, name, bytes: bytes as u64 }, device))
    }

    fn context(&self, device: CUdevice) -> Result<Context, DriverError> {
        let mut context = null_mut();
        // SAFETY: writes one pointer; released in `drop`.
        self.check("cuDevicePrimaryCtxRetain", unsafe { (self.symbols.retain)(&raw mut context, device) })?;
        self.make_current(context)?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: writes two integers, of the context that is current.
        let code = unsafe { (self.symbols.priorities)(&raw mut least, &raw mut greatest) };
        self.check("cuCtxGetStreamPriorityRange", code)?;
        Ok(Context { device, context, priority: greatest })
    }

    fn make_current(&self, context: CUcontext) -> Result<(), DriverError> {
        if CURRENT.get() == context {
            return Ok(());
        }
        // SAFETY: a context that this process retained.
        self.check("cuCtxSetCurrent", unsafe { (self.symbols.set_current)(context) })?;
        CURRENT.set(context);
        Ok(())
    }

    fn enter(&self, device: DeviceIndex) -> Result<&Context, DriverError> {
        let context = &self.contexts[device.0];
        self.make_current(context.context)?;
        Ok(context)
    }

    /// The entry point for batched copies gets them all at once; without it, evenly spaced pieces go as one strided copy,
    /// the others one by one.
    fn copy_without_batch(
        &self,
        stream: CUstream,
        list: &CopyList,
        pieces: Range<usize>,
    ) -> Result<(), DriverError> {
        for run in list.evenly_spaced(pieces) {
            if run.rows > 1 {
                self.copy_2d(stream, &run)?;
            } else {
                let from = std::ptr::with_exposed_provenance::<c_void>(as_usize(run.from));
                // SAFETY: by the contract of `copy_pieces`.
                let code = unsafe { (self.symbols.copy)(run.to, from, as_usize(run.bytes), stream) };
                self.check("cuMemcpyHtoDAsync", code)?;
            }
        }
        Ok(())
    }

    /// A copy of which neither end is given yet.
    fn rows(run: &Run) -> CUDA_MEMCPY2D {
        CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: null(),
            srcDevice: 0,
            srcArray: null_mut(),
            srcPitch: as_usize(run.from_pitch),
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_HOST,
            dstHost: null_mut(),
            dstDevice: 0,
            dstArray: null_mut(),
            dstPitch: as_usize(run.to_pitch),
            WidthInBytes: as_usize(run.bytes),
            Height: as_usize(run.rows),
        }
    }

    /// One attribute of a GPU.
    fn attribute(&self, device: DeviceIndex, which: u32) -> Result<c_int, DriverError> {
        let context = self.enter(device)?;
        let mut value = 0;
        // SAFETY: writes one integer.
        let code = unsafe { (self.symbols.device_attribute)(&raw mut value, which, context.device) };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// Starts pieces in one call.
    ///
    /// # Safety
    /// As [`Driver::copy_pieces`], whatever memory the pieces are in.
    unsafe fn copy_batch(
        &self,
        batch: BatchCopy,
        stream: CUstream,
        mut attributes: CUmemcpyAttributes,
        list: &CopyList,
        pieces: Range<usize>,
    ) -> Result<(), DriverError> {
        let count = pieces.len();
        let (to, from, bytes) = (&list.to[pieces.clone()], &list.from[pieces.clone()], &list.bytes[pieces]);
        let (mut first, mut failed) = (0_usize, 0_usize);
        let (to, from, bytes) = (to.as_ptr().cast_mut(), from.as_ptr().cast_mut(), bytes.as_ptr().cast_mut());
        // SAFETY: by this function's contract; the three lists have `count` entries, and the driver, for all that they are
        // not const, only reads them. One attribute for all from index 0 on.
        let code = unsafe {
            match batch {
                BatchCopy::From12(batch) => batch(
                    to,
                    from,
                    bytes,
                    count,
                    &raw mut attributes,
                    &raw mut first,
                    1,
                    &raw mut failed,
                    stream,
                ),
                BatchCopy::From13(batch) => {
                    batch(to, from, bytes, count, &raw mut attributes, &raw mut first, 1, stream)
                }
            }
        };
        self.check("cuMemcpyBatchAsync", code)
    }

    fn copy_2d(&self, stream: CUstream, run: &Run) -> Result<(), DriverError> {
        let copy = CUDA_MEMCPY2D {
            srcHost: std::ptr::with_exposed_provenance(as_usize(run.from)),
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: run.to,
            ..Self::rows(run)
        };
        // SAFETY: by the contract of `copy_rows`; the description is read before the call returns.
        self.check("cuMemcpy2DAsync", unsafe { (self.symbols.copy_2d)(&raw const copy, stream) })
    }

    fn read_2d(&self, stream: CUstream, run: &Run) -> Result<(), DriverError> {
        let copy = CUDA_MEMCPY2D {
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: run.from,
            dstHost: std::ptr::with_exposed_provenance_mut(as_usize(run.to)),
            ..Self::rows(run)
        };
        // SAFETY: by the contract of `read_rows`; the description is read before the call returns.
        self.check("cuMemcpy2DAsync", unsafe { (self.symbols.copy_2d)(&raw const copy, stream) })
    }
}

fn as_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn stream_of(stream: StreamId) -> CUstream {
    std::ptr::with_exposed_provenance_mut(as_usize(stream.0))
}

fn event_of(event: EventId) -> CUevent {
    std::ptr::with_exposed_provenance_mut(as_usize(event.0))
}

/// Host memory is read when its turn in the stream comes; where memory lies the driver sees from its address.
fn attributes() -> CUmemcpyAttributes {
    let anywhere = CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    CUmemcpyAttributes {
        srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: anywhere,
        dstLocHint: anywhere,
        flags: 0,
    }
}

impl Driver for Cuda {
    fn devices(&self) -> &[Device] {
        &self.devices
    }

    unsafe fn register_host(&self, address: usize, bytes: usize) -> Result<(), DriverError> {
        if self.contexts.is_empty() {
            return Ok(());
        }
        self.enter(DeviceIndex(0))?;
        let first = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: by this function's contract. Portable: for every context, those to come included.
        let code = unsafe { (self.symbols.host_register)(first, bytes, CU_MEMHOSTREGISTER_PORTABLE) };
        self.check("cuMemHostRegister", code)
    }

    fn unregister_host(&self, address: usize) -> Result<(), DriverError> {
        if self.contexts.is_empty() {
            return Ok(());
        }
        self.enter(DeviceIndex(0))?;
        // SAFETY: the driver refuses what is not registered.
        let code = unsafe { (self.symbols.host_unregister)(std::ptr::with_exposed_provenance_mut(address)) };
        self.check("cuMemHostUnregister", code)
    }

    fn open_ipc(&self, device: DeviceIndex, handle: &[u8; 64]) -> Result<Mapping, DriverError> {
        self.enter(device)?;
        let handle = CUipcMemHandle { reserved: handle.map(|byte| c_char::from_ne_bytes([byte])) };
        let mut address: CUdeviceptr = 0;
        // SAFETY: the driver judges the handle, and writes one address.
        let code =
            unsafe { (self.symbols.ipc_open)(&raw mut address, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) };
        self.check("cuIpcOpenMemHandle", code)?;
        let found = self.look_at(device, address);
        if found.is_err() {
            // What is not used is closed again; the first error is the one to tell.
            let _ = self.close_ipc(device, address);
        }
        found
    }

    fn close_ipc(&self, device: DeviceIndex, address: u64) -> Result<(), DriverError> {
        self.enter(device)?;
        // SAFETY: the driver refuses what was not opened.
        self.check("cuIpcCloseMemHandle", unsafe { (self.symbols.ipc_close)(address) })
    }

    fn create_stream(&self, device: DeviceIndex) -> Result<StreamId, DriverError> {
        let priority = self.enter(device)?.priority;
        let mut stream = null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { (self.symbols.stream_create)(&raw mut stream, CU_STREAM_NON_BLOCKING, priority) };
        self.check("cuStreamCreateWithPriority", code)?;
        Ok(StreamId(stream.expose_provenance() as u64))
    }

    fn destroy_stream(&self, device: DeviceIndex, stream: StreamId) {
        if self.enter(device).is_ok() {
            // SAFETY: made by `create_stream`, and ended once.
            unsafe { (self.symbols.stream_destroy)(stream_of(stream)) };
        }
    }

    fn create_event(&self, device: DeviceIndex) -> Result<EventId, DriverError> {
        self.enter(device)?;
        let mut event = null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { (self.symbols.event_create)(&raw mut event, CU_EVENT_DISABLE_TIMING) };
        self.check("cuEventCreate", code)?;
        Ok(EventId(event.expose_provenance() as u64))
    }

    fn destroy_event(&self, device: DeviceIndex, event: EventId) {
        if self.enter(device).is_ok() {
            // SAFETY: made by `create_event`, and ended once.
            unsafe { (self.symbols.event_destroy)(event_of(event)) };
        }
    }

    fn record(&self, device: DeviceIndex, event: EventId, stream: StreamId) -> Result<(), DriverError> {
        self.enter(device)?;
        // SAFETY: both were made on this device.
        let code = unsafe { (self.symbols.event_record)(event_of(event), stream_of(stream)) };
        self.check("cuEventRecord", code)
    }

    fn query(&self, device: DeviceIndex, event: EventId) -> Result<bool, DriverError> {
        self.enter(device)?;
        // SAFETY: made by `create_event`.
        match unsafe { (self.symbols.event_query)(event_of(event)) } {
            CUDA_ERROR_NOT_READY => Ok(false),
            code => self.check("cuEventQuery", code).map(|()| true),
        }
    }

    fn synchronize(&self, device: DeviceIndex, stream: StreamId) -> Result<(), DriverError> {
        self.enter(device)?;
        // SAFETY: made by `create_stream`.
        self.check("cuStreamSynchronize", unsafe { (self.symbols.stream_synchronize)(stream_of(stream)) })
    }

    unsafe fn copy_pieces(
        &self,
        device: DeviceIndex,
        stream: StreamId,
        list: &CopyList,
        pieces: Range<usize>,
    ) -> Result<(), DriverError> {
        self.enter(device)?;
        let stream = stream_of(stream);
        let Some(batch) = self.symbols.batch else {
            return self.copy_without_batch(stream, list, pieces);
        };
        // SAFETY: by this function's contract.
        unsafe { self.copy_batch(batch, stream, attributes(), list, pieces) }
    }

    unsafe fn copy_within(
        &self,
        device: DeviceIndex,
        stream: StreamId,
        list: &CopyList,
        pieces: Range<usize>,
    ) -> Result<(), DriverError> {
        self.enter(device)?;
        // `allocate_for_nic` gives none without.
        let Some(batch) = self.symbols.batch else {
            return self.check("cuMemcpyBatchAsync", CUDA_ERROR_NOT_SUPPORTED);
        };
        let attributes =
            CUmemcpyAttributes { flags: CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE, ..attributes() };
        // SAFETY: by this function's contract.
        unsafe { self.copy_batch(batch, stream_of(stream), attributes, list, pieces) }
    }

    fn allocate_for_nic(&self, device: DeviceIndex, bytes: usize) -> Result<ForNic, NicUnfit> {
        if self.symbols.batch.is_none() {
            return Err(NicUnfit::NoBatches);
        }
        if self.attribute(device, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED)? == 0 {
            return Err(NicUnfit::NoRdma);
        }
        let ordering = self.attribute(device, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING)?;
        if ordering < CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER {
            return Err(NicUnfit::Unordered(ordering));
        }
        // What is smaller than a page of 2 MiB may share one with others, and begin anywhere in it.
        let memory = self.allocate(device, bytes.next_multiple_of(2 << 20))?;
        let exports = self.attribute(device, CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)? != 0;
        let dma_buf = if exports { Some(self.export_dma_buf(&memory)?) } else { None };
        let address = memory.address();
        // Freed by `free_for_nic`.
        std::mem::forget(memory);
        Ok(ForNic { address, dma_buf, is_cpu_memory: false })
    }

    fn free_for_nic(&self, device: DeviceIndex, memory: &ForNic) {
        if self.enter(device).is_ok() {
            // SAFETY: allocated by `allocate_for_nic`, and freed once: whoever has a `ForNic` cannot have two.
            unsafe { (self.symbols.free)(memory.address) };
        }
    }

    unsafe fn copy_rows(&self, device: DeviceIndex, stream: StreamId, run: &Run) -> Result<(), DriverError> {
        self.enter(device)?;
        self.copy_2d(stream_of(stream), run)
    }

    unsafe fn read_rows(&self, device: DeviceIndex, stream: StreamId, run: &Run) -> Result<(), DriverError> {
        self.enter(device)?;
        self.read_2d(stream_of(stream), run)
    }

    fn method(&self) -> &'static str {
        match self.symbols.batch {
            Some(_) => "batched copies",
            None => "strided or single copies (batched ones need a driver of CUDA 12.8 or later)",
        }
    }
}

impl Cuda {
    /// What an address that was opened on `device` is.
    fn look_at(&self, device: DeviceIndex, address: CUdeviceptr) -> Result<Mapping, DriverError> {
        let (mut base, mut bytes, mut ordinal): (CUdeviceptr, usize, c_int) = (0, 0, -1);
        let out = (&raw mut ordinal).cast::<c_void>();
        // SAFETY: writes an address and a size, and one integer.
        unsafe {
            let code = (self.symbols.address_range)(&raw mut base, &raw mut bytes, address);
            self.check("cuMemGetAddressRange", code)?;
            let code = (self.symbols.pointer_attribute)(out, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address);
            self.check("cuPointerGetAttribute", code)?;
        }
        if ordinal != self.devices[device.0].ordinal {
            return self
                .check("cuIpcOpenMemHandle (the memory is on another GPU)", CUDA_ERROR_INVALID_DEVICE)
                .map(|()| Mapping { address, bytes: 0 });
        }
        let before = address.saturating_sub(base);
        Ok(Mapping { address, bytes: (bytes as u64).saturating_sub(before) })
    }

    /// Allocates GPU memory and exports it: for benchmarks and tests, which play the serving process.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn allocate(&self, device: DeviceIndex, bytes: usize) -> Result<DeviceMemory<'_>, DriverError> {
        self.enter(device)?;
        let mut address = 0;
        // SAFETY: writes one address; freed when the result is dropped.
        self.check("cuMemAlloc", unsafe { (self.symbols.allocate)(&raw mut address, bytes) })?;
        Ok(DeviceMemory { cuda: self, device, address, bytes })
    }
}

/// GPU memory of this process.
#[derive(Debug)]
pub struct DeviceMemory<'a> {
    cuda: &'a Cuda,
    device: DeviceIndex,
    address: u64,
    bytes: usize,
}

impl DeviceMemory<'_> {
    /// The GPU's address of its first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its handle, for other processes.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn export(&self) -> Result<[u8; 64], DriverError> {
        self.cuda.enter(self.device)?;
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: writes one handle, of memory that is allocated.
        let code = unsafe { (self.cuda.symbols.ipc_export)(&raw mut handle, self.address) };
        self.cuda.check("cuIpcGetMemHandle", code)?;
        Ok(handle.reserved.map(|byte| byte.to_ne_bytes()[0]))
    }

    /// Copies `out.len()` bytes from `offset` on to `out`, and waits for it.
    ///
    /// # Errors
    /// When the range is not within the memory, or the driver refuses.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), DriverError> {
        if offset.checked_add(out.len()).is_none_or(|end| end > self.bytes) {
            return self.cuda.check("cuMemcpyDtoH", 1);
        }
        self.cuda.enter(self.device)?;
        let from = self.address + offset as u64;
        // SAFETY: the range was checked, and `out` is that large.
        let code = unsafe { (self.cuda.symbols.copy_back)(out.as_mut_ptr().cast(), from, out.len()) };
        self.cuda.check("cuMemcpyDtoH", code)
    }
}

impl Drop for DeviceMemory<'_> {
    fn drop(&mut self) {
        if self.cuda.enter(self.device).is_ok() {
            // SAFETY: allocated by `allocate`, and freed once.
            unsafe { (self.cuda.symbols.free)(self.address) };
        }
    }
}

impl Cuda {
    /// Exports GPU memory as a dma-buf, which an RDMA-capable NIC can be given.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn export_dma_buf(&self, memory: &DeviceMemory<'_>) -> Result<std::os::fd::OwnedFd, DriverError> {
        use std::os::fd::FromRawFd;
        const CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD: u32 = 1;
        const CALL: &str = "cuMemGetHandleForAddressRange";
        self.enter(memory.device)?;
        let Some(export) = self.symbols.dma_buf else {
            return Err(DriverError {
                call: CALL,
                code: CUDA_ERROR_NOT_SUPPORTED,
                name: "CUDA_ERROR_NOT_SUPPORTED",
                sticky: false,
            });
        };
        let mut fd: c_int = -1;
        let out = (&raw mut fd).cast::<c_void>();
        // SAFETY: writes one descriptor, of memory that is allocated; address and size are multiples of the host's page.
        let code =
            unsafe { export(out, memory.address, memory.bytes, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0) };
        self.check(CALL, code)?;
        // SAFETY: the driver has just made it for us.
        Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
    }
}
