//! Whether there is a GPU to deliver to. CUDA's library is loaded when asked for, so that the same binary runs on
//! machines without it.

use cudarc::driver::{result, sys};

/// Why no GPU can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// The driver's library is not there.
    #[error("no CUDA driver (libcuda.so.1 is not to be found)")]
    NoDriver,
    /// The driver said no.
    #[error("the CUDA driver does not work: {0}")]
    Driver(String),
}

/// The GPUs of this machine, one line each: number, name, memory and driver.
///
/// # Errors
/// When there is no driver or it does not work.
pub fn probe() -> Result<Vec<String>, CudaError> {
    // SAFETY: loads libcuda.so.1 and looks at its symbols; its initializers are NVIDIA's own.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let driver = |error: result::DriverError| CudaError::Driver(error.to_string());
    result::init().map_err(driver)?;
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(driver)?;
    let count = result::device::get_count().map_err(driver)?;
    let describe = |ordinal| {
        let device = result::device::get(ordinal).map_err(driver)?;
        let name = result::device::get_name(device).map_err(driver)?;
        // SAFETY: the device was just obtained from the driver.
        let bytes = unsafe { result::device::total_mem(device) }.map_err(driver)?;
        let (major, minor) = (version / 1000, version % 1000 / 10);
        Ok(format!("{ordinal}: {name}, {} MiB, CUDA {major}.{minor}", bytes >> 20))
    };
    (0..count).map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_cuda_is_told_apart_from_one_with() {
        let present = ["/usr/lib/x86_64-linux-gnu/libcuda.so.1", "/usr/lib/aarch64-linux-gnu/libcuda.so.1"]
            .iter()
            .any(|path| std::path::Path::new(path).exists());
        if !present && std::env::var_os("LD_LIBRARY_PATH").is_none() {
            assert_eq!(probe(), Err(CudaError::NoDriver));
        }
    }
}
