//! The entry points of libcuda, looked up when the driver is opened.
//!
//! They return plain numbers: a newer driver may return an error that the bindings' enumeration does not have.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use cudarc::driver::sys::{
    self, CUDA_MEMCPY2D, CUcontext, CUdevice, CUdeviceptr, CUevent, CUipcMemHandle, CUmemcpyAttributes,
    CUstream, CUuuid,
};

use super::CudaError;

/// `cuMemcpyBatchAsync` as it was from 12.8 on.
type Batch12 = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    CUstream,
) -> u32;
/// The same from 13.0 on, without the index of what failed.
type Batch13 = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    CUstream,
) -> u32;

/// Batched copies, where the driver has them.
#[derive(Clone, Copy)]
pub(super) enum BatchCopy {
    From12(Batch12),
    From13(Batch13),
}

macro_rules! symbols {
    ($($field:ident = $name:literal: fn($($argument:ty),*);)*) => {
        /// Every entry point that is used, under the name of its newest version.
        pub(super) struct Symbols {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> u32,)*
            pub(super) batch: Option<BatchCopy>,
            pub(super) dma_buf: Option<DmaBuf>,
            pub(super) version: i32,
        }

        impl Symbols {
            /// The names of all that this crate calls, besides those that are looked up by hand: [`BATCH`] and [`DMA_BUF`].
            #[cfg(test)]
            const NAMES: &[&str] = &[$($name),*];

            fn load_all() -> Result<Self, CudaError> {
                let missing = |name: &str| CudaError::Driver(format!("its library has no {name}"));
                // SAFETY: the library is libcuda, whose functions of these names have these types in every version that
                // has them; it stays loaded for as long as the process lives.
                unsafe {
                    let library = sys::culib();
                    Ok(Self {
                        $($field: *library
                            .get::<unsafe extern "C" fn($($argument),*) -> u32>($name.as_bytes())
                            .map_err(|_| missing($name))?,)*
                        batch: None,
                        dma_buf: library.get::<DmaBuf>(DMA_BUF.as_bytes()).ok().map(|found| *found),
                        version: 0,
                    })
                }
            }
        }
    };
}

/// From 12.8 on; found by its name and version.
const BATCH: &CStr = c"cuMemcpyBatchAsync";
/// From 11.7 on.
const DMA_BUF: &str = "cuMemGetHandleForAddressRange";

/// `cuMemGetHandleForAddressRange`.
type DmaBuf = unsafe extern "C" fn(*mut c_void, CUdeviceptr, usize, c_uint, u64) -> u32;

symbols! {
    init = "cuInit": fn(c_uint);
    driver_version = "cuDriverGetVersion": fn(*mut c_int);
    error_name = "cuGetErrorName": fn(u32, *mut *const c_char);
    device_count = "cuDeviceGetCount": fn(*mut c_int);
    device = "cuDeviceGet": fn(*mut CUdevice, c_int);
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, CUdevice);
    device_bytes = "cuDeviceTotalMem_v2": fn(*mut usize, CUdevice);
    device_uuid = "cuDeviceGetUuid_v2": fn(*mut CUuuid, CUdevice);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_uint, CUdevice);
    retain = "cuDevicePrimaryCtxRetain": fn(*mut CUcontext, CUdevice);
    release = "cuDevicePrimaryCtxRelease_v2": fn(CUdevice);
    set_current = "cuCtxSetCurrent": fn(CUcontext);
    priorities = "cuCtxGetStreamPriorityRange": fn(*mut c_int, *mut c_int);
    host_register = "cuMemHostRegister_v2": fn(*mut c_void, usize, c_uint);
    host_unregister = "cuMemHostUnregister": fn(*mut c_void);
    ipc_open = "cuIpcOpenMemHandle_v2": fn(*mut CUdeviceptr, CUipcMemHandle, c_uint);
    ipc_close = "cuIpcCloseMemHandle": fn(CUdeviceptr);
    address_range = "cuMemGetAddressRange_v2": fn(*mut CUdeviceptr, *mut usize, CUdeviceptr);
    pointer_attribute = "cuPointerGetAttribute": fn(*mut c_void, c_uint, CUdeviceptr);
    stream_create = "cuStreamCreateWithPriority": fn(*mut CUstream, c_uint, c_int);
    stream_destroy = "cuStreamDestroy_v2": fn(CUstream);
    stream_synchronize = "cuStreamSynchronize": fn(CUstream);
    event_create = "cuEventCreate": fn(*mut CUevent, c_uint);
    event_destroy = "cuEventDestroy_v2": fn(CUevent);
    event_record = "cuEventRecord": fn(CUevent, CUstream);
    event_query = "cuEventQuery": fn(CUevent);
    copy = "cuMemcpyHtoDAsync_v2": fn(CUdeviceptr, *const c_void, usize, CUstream);
    copy_2d = "cuMemcpy2DAsync_v2": fn(*const CUDA_MEMCPY2D, CUstream);
    allocate = "cuMemAlloc_v2": fn(*mut CUdeviceptr, usize);
    free = "cuMemFree_v2": fn(CUdeviceptr);
    copy_back = "cuMemcpyDtoH_v2": fn(*mut c_void, CUdeviceptr, usize);
    ipc_export = "cuIpcGetMemHandle": fn(*mut CUipcMemHandle, CUdeviceptr);
    proc_address = "cuGetProcAddress_v2": fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_uint);
}

impl Symbols {
    /// Loads the library and initializes the driver.
    pub(super) fn load() -> Result<Self, CudaError> {
        // SAFETY: loads libcuda.so.1 and looks at its symbols; its initializers are NVIDIA's own.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let mut symbols = Self::load_all()?;
        let mut version = 0;
        // SAFETY: `cuInit` takes a flag that must be 0; `cuDriverGetVersion` writes one integer.
        let code = unsafe {
            match (symbols.init)(0) {
                0 => (symbols.driver_version)(&raw mut version),
                code => code,
            }
        };
        if code != 0 {
            return Err(CudaError::Driver(format!("cuInit: {} ({code})", symbols.name(code))));
        }
        symbols.version = version;
        symbols.batch = symbols.find_batch(version);
        Ok(symbols)
    }

    /// The driver's name for an error.
    pub(super) fn name(&self, code: u32) -> &'static str {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: writes a pointer to a string that lives as long as the library, or null.
        let found = unsafe { (self.error_name)(code, &raw mut name) };
        if found != 0 || name.is_null() {
            return "an error without a name";
        }
        // SAFETY: as above.
        unsafe { std::ffi::CStr::from_ptr(name) }.to_str().unwrap_or("an error without a name")
    }

    /// The version asked for decides which signature the function has.
    fn find_batch(&self, driver_version: i32) -> Option<BatchCopy> {
        let version = match driver_version {
            13_000.. => 13_000,
            12_080.. => 12_080,
            _ => return None,
        };
        let (mut function, mut status) = (std::ptr::null_mut::<c_void>(), 0);
        // SAFETY: writes a function's address, or null, and a status.
        let code =
            unsafe { (self.proc_address)(BATCH.as_ptr(), &raw mut function, version, 0, &raw mut status) };
        if code != 0 || function.is_null() {
            return None;
        }
        // SAFETY: the driver gives the function as it was in the version asked for, and these are its types then.
        Some(unsafe {
            if version == 13_000 {
                BatchCopy::From13(std::mem::transmute::<*mut c_void, Batch13>(function))
            } else {
                BatchCopy::From12(std::mem::transmute::<*mut c_void, Batch12>(function))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{BATCH, DMA_BUF, Symbols};

    /// What the driver has that can only be there to run code on a GPU, or that it may carry out by a kernel of its own.
    const RUNS_CODE: [&str; 12] = [
        "cuLaunch",
        "cuGraph",
        "cuModule",
        "cuLibrary",
        "cuLink",
        "cuFunc",
        "cuKernel",
        "cuOccupancy",
        "cuMemset",
        "cuMemcpyDtoD",
        "cuMemcpyPeer",
        "cuMemcpy3D",
    ];

    /// Everything goes through this table, so there is no kernel on the path: no function that could start one is ever
    /// loaded. `perf/gpu/kernels.py` counts the same on a GPU.
    #[test]
    fn nothing_that_could_launch_a_kernel_is_loaded() {
        let batch = BATCH.to_str().unwrap();
        for name in Symbols::NAMES.iter().chain([&batch, &DMA_BUF]) {
            assert!(name.starts_with("cu"), "{name}");
            assert!(!RUNS_CODE.iter().any(|code| name.starts_with(code)), "{name}");
        }
        assert!(
            Symbols::NAMES.contains(&"cuMemcpy2DAsync_v2"),
            "the table is not the one that copies go through"
        );
    }
}
