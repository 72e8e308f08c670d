//! Pools of packet buffers.

use std::ffi::CString;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use crate::burst::Burst;
use crate::device_memory::DeviceMemory;
use crate::eal::{Eal, EalInner};
use crate::mbuf::Mbuf;

/// Size and place of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolConfig {
    /// Number of mbufs. One less than a power of two uses memory best.
    pub mbufs: u32,
    /// Mbufs that each lcore may keep aside, at most 512 and two thirds of `mbufs`; 0 for none.
    pub cache: u32,
    /// Bytes of one buffer, with the [`crate::HEADROOM_BYTES`] that are left free in front of a packet.
    pub data_room_bytes: u16,
    /// NUMA node of the memory; `None` for any.
    pub numa_node: Option<u32>,
    /// Which of the mbufs in the pool is handed out next.
    pub order: PoolOrder,
}

/// Which of the mbufs in a pool is handed out next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PoolOrder {
    /// The one that has been in it for longest, DPDK's default: all of the pool passes through the caches again and again.
    #[default]
    OldestFirst,
    /// The one that came back last, which is likely to be in a cache still.
    NewestFirst,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            mbufs: 8191,
            cache: 256,
            data_room_bytes: 2048 + crate::HEADROOM_BYTES,
            numa_node: None,
            order: PoolOrder::default(),
        }
    }
}

/// Why a pool was not made.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// DPDK's names are short and unique.
    #[error("pool name {0:?} must be 1 to 24 bytes long without NUL")]
    BadName(String),
    /// The name is taken.
    #[error("there is already a pool named {0:?}")]
    Exists(String),
    /// A configuration that no pool can have.
    #[error("pool {name:?}: {what}")]
    BadConfig {
        /// Name of the pool.
        name: String,
        /// What is wrong with which number.
        what: String,
    },
    /// Too little memory.
    #[error(
        "no memory for pool {name:?} ({mib} MiB): reserve more hugepages (`hugepages/setup.sh config`), or give the EAL more (-m), or ask \
         for fewer mbufs"
    )]
    NoMemory {
        /// Name of the pool.
        name: String,
        /// What its mbufs take.
        mib: u64,
    },
    /// Anything else.
    #[error("pool {name:?} was not made: {reason}")]
    Failed {
        /// Name of the pool.
        name: String,
        /// DPDK's message.
        reason: String,
    },
}

/// A pool of mbufs of one size; clones share it. It is freed when the last clone is dropped, provided that all mbufs are back by then.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<PoolInner>,
}

struct PoolInner {
    raw: NonNull<dpdk_sys::rte_mempool>,
    capacity: u32,
    /// Where its buffers lie, if not in the environment's memory.
    memory: ManuallyDrop<Option<DeviceMemory>>,
    eal: ManuallyDrop<Arc<EalInner>>,
}

// SAFETY: a mempool may be used from any thread: its ring is multi-producer and multi-consumer, its caches belong to lcores.
unsafe impl Send for PoolInner {}
// SAFETY: as above.
unsafe impl Sync for PoolInner {}

/// Bytes of an mbuf's header and of the mempool's own header and trailer around it.
const MBUF_OVERHEAD_BYTES: u64 = 128 + 64;

/// What `shim_external_attach` keeps in an mbuf's private area, rounded up to its alignment.
const EXTERNAL_COUNT_BYTES: u16 = {
    let bytes = size_of::<dpdk_sys::rte_mbuf_ext_shared_info>().next_multiple_of(8);
    assert!(bytes <= 64, "a few words");
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    {
        bytes as u16
    }
};

impl Pool {
    /// Makes a pool; its memory is allocated now.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn new(eal: &Eal, name: &str, config: PoolConfig) -> Result<Self, PoolError> {
        check(name, &config)?;
        Self::create(eal, name, config, 0)
    }

    /// A pool of mbufs that have no buffers, but room for the reference count of an external one.
    pub(crate) fn without_buffers(eal: &Eal, name: &str, mbufs: u32) -> Result<Self, PoolError> {
        let cache = (mbufs / 2).min(256);
        let config = PoolConfig { mbufs, cache, data_room_bytes: 0, ..PoolConfig::default() };
        check(name, &PoolConfig { data_room_bytes: u16::MAX, ..config })?;
        Self::create(eal, name, config, EXTERNAL_COUNT_BYTES)
    }

    fn create(eal: &Eal, name: &str, config: PoolConfig, private_bytes: u16) -> Result<Self, PoolError> {
        let c_name = CString::new(name).map_err(|_| PoolError::BadName(name.to_owned()))?;
        let node =
            config.numa_node.map_or(dpdk_sys::SOCKET_ID_ANY, |node| i32::try_from(node).unwrap_or(i32::MAX));
        let ops = match config.order {
            PoolOrder::OldestFirst => ptr::null(),
            PoolOrder::NewestFirst => c"stack".as_ptr(),
        };
        // SAFETY: the environment is up; the names are C strings that are copied, or null for the default.
        let raw = unsafe {
            dpdk_sys::rte_pktmbuf_pool_create_by_ops(
                c_name.as_ptr(),
                config.mbufs,
                config.cache,
                private_bytes,
                config.data_room_bytes,
                node,
                ops,
            )
        };
        Self::adopt(eal, name, config, raw, None)
    }

    /// The pool that DPDK has just made, or why it has not.
    pub(crate) fn adopt(
        eal: &Eal,
        name: &str,
        config: PoolConfig,
        raw: *mut dpdk_sys::rte_mempool,
        memory: Option<DeviceMemory>,
    ) -> Result<Self, PoolError> {
        let Some(raw) = NonNull::new(raw) else {
            // SAFETY: reads a thread-local variable.
            return Err(explain(name, &config, unsafe { dpdk_sys::shim_errno() }));
        };
        let (memory, eal) = (ManuallyDrop::new(memory), ManuallyDrop::new(Arc::clone(eal.inner())));
        Ok(Self { inner: Arc::new(PoolInner { raw, capacity: config.mbufs, memory, eal }) })
    }

    /// Takes an empty mbuf, or `None` when all are out.
    #[inline]
    #[must_use]
    pub fn alloc(&self) -> Option<Mbuf> {
        // SAFETY: the pool lives; what it returns is a fresh mbuf that nobody else has.
        unsafe { NonNull::new(dpdk_sys::shim_mbuf_alloc(self.raw())).map(|raw| Mbuf::from_raw(raw)) }
    }

    /// Appends `n` empty mbufs to `burst`, or none: false when fewer are left or the burst has no room for them.
    #[inline]
    pub fn alloc_burst(&self, burst: &mut Burst, n: usize) -> bool {
        let (spare, room) = burst.spare();
        let Ok(count) = u32::try_from(n) else { return false };
        // SAFETY: `spare` has room for `n` pointers; on success all of them were written with fresh mbufs.
        if n > room || unsafe { dpdk_sys::shim_mbuf_alloc_bulk(self.raw(), spare, count) } != 0 {
            return false;
        }
        // SAFETY: just written.
        unsafe { burst.grow(n) };
        true
    }

    /// Mbufs in the pool. Exact only while no thread takes or returns any.
    #[must_use]
    pub fn available(&self) -> u32 {
        // SAFETY: the pool lives.
        unsafe { dpdk_sys::rte_mempool_avail_count(self.raw()) }
    }

    /// Mbufs that are out: held by code, queued in rings or posted to a device. As exact as [`Pool::available`].
    #[must_use]
    pub fn in_use(&self) -> u32 {
        self.capacity().saturating_sub(self.available())
    }

    /// Mbufs in all.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.inner.capacity
    }

    /// Bytes of one buffer, with the headroom.
    #[must_use]
    pub fn data_room_bytes(&self) -> u16 {
        // SAFETY: the pool lives.
        unsafe { dpdk_sys::shim_pool_data_room(self.raw()) }
    }

    pub(crate) fn raw(&self) -> *mut dpdk_sys::rte_mempool {
        self.inner.raw.as_ptr()
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("capacity", &self.capacity())
            .field("in_use", &self.in_use())
            .finish_non_exhaustive()
    }
}

impl Drop for PoolInner {
    /// Frees the pool if that is certain to be safe: all mbufs are back, and no other lcore can be in the midst of returning one
    /// (it counts an mbuf as returned a moment before it has written it to its cache). Otherwise the pool and the environment stay.
    fn drop(&mut self) {
        // SAFETY: the pool lives until here.
        let available = unsafe { dpdk_sys::rte_mempool_avail_count(self.raw.as_ptr()) };
        if available < self.capacity || !self.eal.is_quiet() {
            return;
        }
        // SAFETY: nothing of the pool is in use. The environment is released after it, once.
        unsafe {
            dpdk_sys::rte_mempool_free(self.raw.as_ptr());
            ManuallyDrop::drop(&mut self.memory);
            ManuallyDrop::drop(&mut self.eal);
        }
    }
}

pub(crate) fn check(name: &str, config: &PoolConfig) -> Result<(), PoolError> {
    let bad = |what: String| Err(PoolError::BadConfig { name: name.to_owned(), what });
    // RTE_STACK_NAMESIZE less the prefix of mempools and a NUL, should one be a stack; a ring would take one byte more.
    if name.is_empty() || name.len() > 24 {
        return Err(PoolError::BadName(name.to_owned()));
    }
    if config.mbufs == 0 {
        return bad("a pool of 0 mbufs is of no use".to_owned());
    }
    let most = dpdk_sys::RTE_MEMPOOL_CACHE_MAX_SIZE;
    if config.cache > most || u64::from(config.cache) * 3 > u64::from(config.mbufs) * 2 {
        return bad(format!(
            "a cache of {} is more than {most} or than two thirds of {} mbufs",
            config.cache, config.mbufs
        ));
    }
    if config.data_room_bytes <= crate::HEADROOM_BYTES {
        return bad(format!(
            "a data room of {} bytes is all headroom ({})",
            config.data_room_bytes,
            crate::HEADROOM_BYTES
        ));
    }
    Ok(())
}

fn explain(name: &str, config: &PoolConfig, errno: i32) -> PoolError {
    use rustix::io::Errno;
    let name = name.to_owned();
    match Errno::from_raw_os_error(errno) {
        Errno::EXIST => PoolError::Exists(name),
        Errno::NOMEM | Errno::NOSPC | Errno::NOBUFS => {
            let bytes = u64::from(config.mbufs) * (u64::from(config.data_room_bytes) + MBUF_OVERHEAD_BYTES);
            PoolError::NoMemory { name, mib: bytes.div_ceil(1 << 20) }
        }
        _ => PoolError::Failed { name, reason: crate::error_text(errno) },
    }
}
