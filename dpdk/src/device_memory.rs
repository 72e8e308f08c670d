//! Packet buffers in memory that is not the CPU's: a GPU's.
//!
//! The mbufs themselves lie in host memory, as those of any pool; what each points to, for good, is a piece of the device's memory (DPDK's
//! mbuf guide, "external pinned buffers"; gpudev guide). No code here reads or writes such a piece, and no slice of one is handed out: a [`DeviceBuffer`] tells its
//! address and its length.

use std::ffi::{CString, c_void};
use std::fmt;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use hugepages::DeviceWritable;

use crate::eal::{Eal, EalInner};
use crate::external::ExternalError;
use crate::mbuf::field;
use crate::pool::{Pool, PoolConfig, PoolError};
use crate::port_probe::PortProbe;

/// What memory of a GPU must be a multiple of, and lie at a multiple of: pages of 64 KiB are what NVIDIA's driver pins for other devices.
pub const DEVICE_PAGE_BYTES: usize = 64 << 10;

/// Memory that was registered with DPDK, and that ports may be let write to. Clones share it.
#[derive(Clone)]
pub struct DeviceMemory {
    inner: Arc<Inner>,
}

struct Inner {
    memory: Arc<dyn DeviceWritable>,
    mapped: Mutex<Vec<Device>>,
    _eal: Arc<EalInner>,
}

/// A device of a bus that outlives its ports.
struct Device(NonNull<dpdk_sys::rte_device>);

// SAFETY: only passed to DPDK, which locks what it does with devices.
unsafe impl Send for Device {}

impl DeviceMemory {
    /// Makes `memory` known to DPDK (`rte_extmem_register`). It stays until this, and every pool in it, is gone.
    ///
    /// # Errors
    /// When it is not whole pages of [`DEVICE_PAGE_BYTES`], or DPDK refuses.
    pub fn register(eal: &Eal, memory: Arc<dyn DeviceWritable>) -> Result<Self, ExternalError> {
        let (address, bytes) = (memory.address(), memory.bytes());
        if bytes == 0
            || !address.is_multiple_of(DEVICE_PAGE_BYTES)
            || !bytes.is_multiple_of(DEVICE_PAGE_BYTES)
        {
            return Err(ExternalError::Unaligned { address, bytes, page_bytes: DEVICE_PAGE_BYTES });
        }
        // Devices that take such memory at all address it as the process does.
        let pages: Vec<u64> =
            (0..bytes / DEVICE_PAGE_BYTES).map(|page| (address + page * DEVICE_PAGE_BYTES) as u64).collect();
        let count = u32::try_from(pages.len()).unwrap_or(u32::MAX);
        let start = std::ptr::with_exposed_provenance_mut::<c_void>(address);
        // SAFETY: DPDK notes the addresses, of which there are as many as pages, and does not touch the memory.
        let code = unsafe {
            dpdk_sys::rte_extmem_register(start, bytes, pages.as_ptr().cast_mut(), count, DEVICE_PAGE_BYTES)
        };
        if code != 0 {
            return Err(failed("registering the memory with DPDK"));
        }
        if let Some(dma_buf) = memory.dma_buf() {
            // SAFETY: only notes them; forgotten when this is dropped, before the memory and its descriptor. Without a free place drivers go by the address.
            unsafe { dpdk_sys::shim_dma_buf_note(start, bytes, dma_buf.as_raw_fd()) };
        }
        let inner = Inner { memory, mapped: Mutex::default(), _eal: Arc::clone(eal.inner()) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Lets a port's device write to it (`rte_dev_dma_map`). Virtual devices accept anything, and do nothing.
    ///
    /// # Errors
    /// When the driver cannot, or refuses.
    pub fn map(&self, port: &PortProbe) -> Result<(), ExternalError> {
        let (start, bytes) = self.range();
        // SAFETY: the device exists; the memory stays until it is unmapped, when this is dropped.
        let code = unsafe { dpdk_sys::rte_dev_dma_map(port.device(), start, start as u64, bytes) };
        if code != 0 {
            return Err(failed("letting the device write to the memory"));
        }
        if let Some(device) = NonNull::new(port.device()).filter(|_| !port.is_virtual()) {
            self.inner.mapped.lock().unwrap_or_else(PoisonError::into_inner).push(Device(device));
        }
        Ok(())
    }

    /// Whether the CPU can write to it too.
    #[must_use]
    pub fn is_cpu_memory(&self) -> bool {
        self.inner.memory.is_cpu_memory()
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.inner.memory.bytes()
    }

    fn range(&self) -> (*mut c_void, usize) {
        (std::ptr::with_exposed_provenance_mut(self.inner.memory.address()), self.inner.memory.bytes())
    }
}

fn failed(step: &'static str) -> ExternalError {
    // SAFETY: reads a thread-local variable.
    let reason = crate::error_text(unsafe { dpdk_sys::shim_errno() });
    ExternalError::Failed { step, reason }
}

impl Drop for Inner {
    /// By now no port is open that could write to the memory: a port holds its pools, and they hold this.
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut::<c_void>(self.memory.address());
        let bytes = self.memory.bytes();
        for Device(device) in self.mapped.get_mut().unwrap_or_else(PoisonError::into_inner) {
            // SAFETY: mapped by us. The device is one of a bus, which stays after its ports are closed.
            unsafe { dpdk_sys::rte_dev_dma_unmap(device.as_ptr(), start, start as u64, bytes) };
        }
        // SAFETY: registered by us, and noted if it is a dma-buf.
        unsafe {
            dpdk_sys::shim_dma_buf_forget(start);
            dpdk_sys::rte_extmem_unregister(start, bytes);
        }
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory").field("memory", &self.inner.memory).finish_non_exhaustive()
    }
}

/// A pool of mbufs whose buffers are pieces of device memory.
#[derive(Clone, Debug)]
pub struct DevicePool {
    pool: Pool,
    room_bytes: u16,
    is_cpu_memory: bool,
}

impl DevicePool {
    /// A pool of `mbufs` buffers of `room_bytes` each, one behind the other from byte `first` of `memory` on.
    ///
    /// # Errors
    /// As for pools, and when the memory is too small.
    pub fn new(
        eal: &Eal,
        name: &str,
        memory: &DeviceMemory,
        first: usize,
        mbufs: u32,
        room_bytes: u16,
    ) -> Result<Self, PoolError> {
        let cache = (mbufs / 2).min(256);
        let config = PoolConfig { mbufs, cache, data_room_bytes: room_bytes, ..PoolConfig::default() };
        crate::pool::check(name, &config)?;
        let (start, bytes) = memory.range();
        let pool_bytes = usize::try_from(mbufs).unwrap_or(usize::MAX).saturating_mul(room_bytes.into());
        if first.checked_add(pool_bytes).is_none_or(|end| end > bytes) {
            let what =
                format!("{mbufs} buffers of {room_bytes} bytes from byte {first} on exceed {bytes} bytes");
            return Err(PoolError::BadConfig { name: name.to_owned(), what });
        }
        let c_name = CString::new(name).map_err(|_| PoolError::BadName(name.to_owned()))?;
        let start = start.wrapping_byte_add(first);
        let piece = dpdk_sys::rte_pktmbuf_extmem {
            buf_ptr: start,
            buf_iova: start as u64,
            buf_len: pool_bytes,
            elt_size: room_bytes,
        };
        // SAFETY: the environment is up, and the strings and the description are copied. DPDK computes addresses within the piece, which the
        // pool keeps alive, and does not touch it.
        let raw = unsafe {
            dpdk_sys::rte_pktmbuf_pool_create_extbuf(
                c_name.as_ptr(),
                mbufs,
                cache,
                0,
                room_bytes,
                dpdk_sys::SOCKET_ID_ANY,
                &raw const piece,
                1,
            )
        };
        let pool = Pool::adopt(eal, name, config, raw, Some(memory.clone()))?;
        Ok(Self { pool, room_bytes, is_cpu_memory: memory.is_cpu_memory() })
    }

    /// Takes a buffer, or `None` when all are out. What it holds is whatever was there before.
    #[inline]
    #[must_use]
    pub fn alloc(&self) -> Option<DeviceBuffer> {
        // SAFETY: the pool lives; what it returns is a fresh mbuf that nobody else has, of a pool of device memory.
        unsafe {
            NonNull::new(dpdk_sys::shim_mbuf_alloc(self.pool.raw())).map(|raw| DeviceBuffer::from_raw(raw))
        }
    }

    /// Buffers that are out. Exact only while no thread takes or returns any.
    #[must_use]
    pub fn in_use(&self) -> u32 {
        self.pool.in_use()
    }

    /// Buffers in all.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.pool.capacity()
    }

    /// Bytes of a buffer.
    #[must_use]
    pub fn room_bytes(&self) -> u16 {
        self.room_bytes
    }

    pub(crate) fn is_cpu_memory(&self) -> bool {
        self.is_cpu_memory
    }

    /// The pool as any other: for ports, which only ever hand its mbufs to their devices.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }
}

/// A piece of device memory that holds, or is to hold, a part of a packet. Owned: dropping it returns it to its pool, after which a port may
/// write to it again.
pub struct DeviceBuffer {
    raw: NonNull<dpdk_sys::rte_mbuf>,
}

// SAFETY: an mbuf may be freed by another thread than the one that took it; its pool is shared by threads.
unsafe impl Send for DeviceBuffer {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for DeviceBuffer {}

impl DeviceBuffer {
    /// Takes over an mbuf.
    ///
    /// # Safety
    /// `raw` is a single mbuf of a [`DevicePool`], with a reference count of 1, that nobody else uses.
    #[inline]
    pub(crate) unsafe fn from_raw(raw: NonNull<dpdk_sys::rte_mbuf>) -> Self {
        Self { raw }
    }

    #[inline]
    pub(crate) fn as_raw(&self) -> NonNull<dpdk_sys::rte_mbuf> {
        self.raw
    }

    /// The device's address of its first byte.
    #[inline]
    #[must_use]
    pub fn address(&self) -> u64 {
        let start = field!(self.raw, SHIM_MBUF_BUF_ADDR as *const u8);
        start.expose_provenance() as u64 + u64::from(field!(self.raw, SHIM_MBUF_DATA_OFF as u16))
    }

    /// Bytes in it.
    #[inline]
    #[must_use]
    pub fn bytes(&self) -> usize {
        usize::from(field!(self.raw, SHIM_MBUF_DATA_LEN as u16))
    }
}

impl fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBuffer")
            .field("address", &self.address())
            .field("bytes", &self.bytes())
            .finish()
    }
}

impl Drop for DeviceBuffer {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: this is its only owner.
        unsafe { dpdk_sys::shim_mbuf_free(self.raw.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::without_provenance;

    /// What a driver finds that asks for the dma-buf of an address.
    #[test]
    fn a_range_is_found_in_its_dma_buf_and_nowhere_else() {
        let at = |address: usize| without_provenance::<std::ffi::c_void>(address);
        let find = |address: usize, bytes: usize| {
            let mut offset = u64::MAX;
            // SAFETY: only compares addresses; writes one number.
            let fd = unsafe { dpdk_sys::shim_dma_buf_of(at(address), bytes, &raw mut offset) };
            (fd >= 0).then_some((fd, offset))
        };
        let (first, second) = (1 << 40, 1 << 41);
        // SAFETY: only notes numbers.
        unsafe {
            assert_eq!(dpdk_sys::shim_dma_buf_note(at(first), 0x2_0000, 1001), 0);
            assert_eq!(dpdk_sys::shim_dma_buf_note(at(second), 0x1_0000, 1002), 0);
        }
        assert_eq!(find(first, 0x2_0000), Some((1001, 0)));
        assert_eq!(find(first + 0x1_0000, 0x1_0000), Some((1001, 0x1_0000)));
        assert_eq!(find(second + 4096, 4096), Some((1002, 4096)));
        assert_eq!(find(first - 1, 4096), None);
        assert_eq!(find(first + 0x1_0000, 0x1_0001), None);
        assert_eq!(find(first + 0x2_0001, usize::MAX), None);
        assert_eq!(find(0, 4096), None);
        // SAFETY: as above.
        unsafe { dpdk_sys::shim_dma_buf_forget(at(first)) };
        assert_eq!((find(first, 1), find(second, 1)), (None, Some((1002, 0))));
        // SAFETY: as above. There is room for few.
        let full = unsafe {
            dpdk_sys::shim_dma_buf_forget(at(second));
            let notes = (1..40_usize).map(|n| dpdk_sys::shim_dma_buf_note(at(n << 42), 1, 1003));
            let full = notes.filter(|&code| code != 0).count();
            (1..40_usize).for_each(|n| dpdk_sys::shim_dma_buf_forget(at(n << 42)));
            full
        };
        assert!(full > 0 && find(1 << 42, 1).is_none());
    }
}
