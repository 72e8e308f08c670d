//! NVIDIA GPUs. CUDA's library is loaded when asked for, so that the same binary runs on machines without it.

mod driver;
mod symbols;

pub use driver::{Cuda, DeviceMemory};

use crate::driver::DriverError;

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

impl From<DriverError> for CudaError {
    fn from(error: DriverError) -> Self {
        Self::Driver(error.to_string())
    }
}

/// The GPUs of this machine, one line each: number, name, memory and driver.
///
/// # Errors
/// When there is no driver or it does not work.
pub fn probe() -> Result<Vec<String>, CudaError> {
    let (devices, (major, minor)) = Cuda::list()?;
    let line = |device: &crate::Device| {
        format!("{}: {}, {} MiB, CUDA {major}.{minor}", device.ordinal, device.name, device.bytes >> 20)
    };
    Ok(devices.iter().map(line).collect())
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
