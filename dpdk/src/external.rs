//! Packets sent from memory outside of pools, without copying.
//!
//! A packet's headers lie in an mbuf of its own, to which an mbuf without a buffer is chained that points into the external memory
//! (DPDK's mbuf guide, "Direct and Indirect Buffers"). Each of these has a reference count of its own in its private area, so attaching
//! and freeing one touches nothing shared but a count of those that came back, by which
//! [`Attacher`] knows when the memory's owner may go.

use std::fmt;
use std::mem::{ManuallyDrop, offset_of};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::eal::{Eal, EalInner};
use crate::mbuf::Mbuf;
use crate::pool::{Pool, PoolError};
use crate::port::{Port, PortInner};

/// Why a device cannot send from external memory.
#[derive(Debug, thiserror::Error)]
pub enum ExternalError {
    /// The memory is not whole pages.
    #[error("memory of {bytes} bytes at {address:#x} is not whole pages of {page_bytes} bytes")]
    Unaligned {
        /// Where it begins.
        address: usize,
        /// Its size.
        bytes: usize,
        /// The size of its pages.
        page_bytes: usize,
    },
    /// Devices address memory by its physical address, and the kernel does not tell it.
    #[error("the physical address of memory to send from is not known: run as root, or with an IOMMU")]
    NoAddress,
    /// DPDK or the driver refused it.
    #[error("{step} failed: {reason}")]
    Failed {
        /// What was being done.
        step: &'static str,
        /// DPDK's message.
        reason: String,
    },
}

/// How a device addresses the memory.
enum Addresses {
    /// As we do.
    Virtual,
    /// Page by page: what crosses a boundary has no one address.
    Pages(Vec<u64>),
}

/// A range of memory that devices may read. Clones share it.
#[derive(Clone)]
pub struct ExternalMemory {
    inner: Arc<Inner>,
}

struct Inner {
    start: usize,
    bytes: usize,
    page_bytes: usize,
    addresses: Addresses,
    /// The devices that were told of it.
    mapped: Mutex<Vec<Arc<PortInner>>>,
    _eal: Arc<EalInner>,
}

impl ExternalMemory {
    /// The `bytes` from address `start`, in pages of `page_bytes`. Nothing is read by this, nor need it stay: whoever sends from it says who
    /// owns it ([`Attacher::attach`]).
    ///
    /// # Errors
    /// When the memory is not whole pages or devices cannot address it.
    pub fn new(eal: &Eal, start: usize, bytes: usize, page_bytes: usize) -> Result<Self, ExternalError> {
        if page_bytes == 0
            || bytes == 0
            || !start.is_multiple_of(page_bytes)
            || !bytes.is_multiple_of(page_bytes)
            || start.checked_add(bytes).is_none()
        {
            return Err(ExternalError::Unaligned { address: start, bytes, page_bytes });
        }
        let addresses = addresses(start, bytes, page_bytes)?;
        let (mapped, _eal) = (Mutex::default(), Arc::clone(eal.inner()));
        Ok(Self { inner: Arc::new(Inner { start, bytes, page_bytes, addresses, mapped, _eal }) })
    }

    /// Lets the device of `port` read the memory. Virtual devices need not be told.
    ///
    /// # Errors
    /// When DPDK or the driver refuses.
    pub fn map(&self, port: &Port) -> Result<(), ExternalError> {
        if port.inner().is_virtual() {
            return Ok(());
        }
        let mut mapped = self.inner.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        if mapped.is_empty() {
            self.inner.register()?;
        }
        for (address, device_address, bytes) in self.inner.pieces() {
            // SAFETY: the device exists, and the memory stays until it is unmapped.
            let code =
                unsafe { dpdk_sys::rte_dev_dma_map(port.inner().device(), address, device_address, bytes) };
            // SAFETY: reads a thread-local variable.
            let errno = unsafe { dpdk_sys::shim_errno() };
            // A bus without such maps needs none.
            if code != 0 && errno != rustix::io::Errno::NOTSUP.raw_os_error() {
                let reason = crate::error_text(errno);
                return Err(ExternalError::Failed { step: "letting the device read the memory", reason });
            }
        }
        mapped.push(Arc::clone(port.inner()));
        Ok(())
    }
}

fn addresses(start: usize, bytes: usize, page_bytes: usize) -> Result<Addresses, ExternalError> {
    // SAFETY: only asks.
    let physical = unsafe {
        dpdk_sys::rte_eal_iova_mode() == dpdk_sys::RTE_IOVA_PA && dpdk_sys::rte_eal_has_hugepages() != 0
    };
    if !physical {
        return Ok(Addresses::Virtual);
    }
    let pages = (start..start + bytes).step_by(page_bytes);
    // SAFETY: only looks addresses up.
    let pages: Vec<u64> =
        pages.map(|page| unsafe { dpdk_sys::rte_mem_virt2iova(page as *const _) }).collect();
    if pages.iter().any(|&page| page == u64::MAX || page == 0) {
        return Err(ExternalError::NoAddress);
    }
    Ok(Addresses::Pages(pages))
}

impl Inner {
    /// Where `bytes`, which are some, are for devices; `None` if not here, or if they have no one address.
    #[inline]
    fn device_address(&self, bytes: &[u8]) -> Option<u64> {
        let address = bytes.as_ptr() as usize;
        let begin = address.checked_sub(self.start)?;
        let last = begin + bytes.len() - 1;
        if last >= self.bytes {
            return None;
        }
        match &self.addresses {
            Addresses::Virtual => Some(address as u64),
            Addresses::Pages(pages) => {
                let (first, last) = (begin / self.page_bytes, last / self.page_bytes);
                (first == last).then(|| pages[first] + (begin % self.page_bytes) as u64)
            }
        }
    }

    /// What a device is told: address, device's address, bytes.
    fn pieces(&self) -> Vec<(*mut std::ffi::c_void, u64, usize)> {
        let start = self.start as *mut std::ffi::c_void;
        match &self.addresses {
            Addresses::Virtual => vec![(start, self.start as u64, self.bytes)],
            Addresses::Pages(pages) => (0..)
                .zip(pages)
                .map(|(page, &address)| {
                    (start.wrapping_byte_add(page * self.page_bytes), address, self.page_bytes)
                })
                .collect(),
        }
    }

    fn register(&self) -> Result<(), ExternalError> {
        let pages = self.bytes / self.page_bytes;
        let mut addresses: Vec<u64> = match &self.addresses {
            Addresses::Virtual => {
                (0..pages).map(|page| (self.start + page * self.page_bytes) as u64).collect()
            }
            Addresses::Pages(pages) => pages.clone(),
        };
        let count = u32::try_from(pages).unwrap_or(u32::MAX);
        let start = self.start as *mut std::ffi::c_void;
        // SAFETY: DPDK only notes the addresses; there are as many as pages.
        let code = unsafe {
            dpdk_sys::rte_extmem_register(start, self.bytes, addresses.as_mut_ptr(), count, self.page_bytes)
        };
        if code == 0 {
            return Ok(());
        }
        // SAFETY: reads a thread-local variable.
        let reason = crate::error_text(unsafe { dpdk_sys::shim_errno() });
        Err(ExternalError::Failed { step: "registering the memory with DPDK", reason })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mapped = std::mem::take(self.mapped.get_mut().unwrap_or_else(PoisonError::into_inner));
        if mapped.is_empty() {
            return;
        }
        for (address, device_address, bytes) in self.pieces() {
            for port in &mapped {
                // SAFETY: mapped by us; no mbuf points to it any more, for each would hold this.
                unsafe { dpdk_sys::rte_dev_dma_unmap(port.device(), address, device_address, bytes) };
            }
        }
        // SAFETY: registered by us.
        unsafe { dpdk_sys::rte_extmem_unregister(self.start as *mut std::ffi::c_void, self.bytes) };
    }
}

impl fmt::Debug for ExternalMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExternalMemory").field("bytes", &self.inner.bytes).finish_non_exhaustive()
    }
}

/// Makes mbufs that point into external memory, for one queue.
///
/// Each holds the owner of its bytes by a *lease*, of which there is one for all mbufs of an owner that are out. Leases are given up by
/// [`Attacher::let_go`], or when there are no free ones left.
pub struct Attacher<M> {
    memory: ManuallyDrop<ExternalMemory>,
    pool: Pool,
    /// Boxed, because mbufs write to them as long as they live.
    leases: Vec<ManuallyDrop<Box<Lease<M>>>>,
    /// The one used last.
    current: usize,
    /// Those from here on have no owner: a store's lcore looks through the others at every turn.
    used: usize,
}

struct Lease<M> {
    owner: Option<Arc<M>>,
    attached: u64,
    detached: Detached,
}

/// Mbufs that came back, as `shim_external_attach` counts them.
#[derive(Default)]
#[repr(C)]
struct Detached {
    /// Those that lcore `lcore` freed, which writes them without a lock.
    own: AtomicU64,
    /// Those that were freed elsewhere.
    others: AtomicU64,
    /// Written only while none is out.
    lcore: u32,
}

const _: () = {
    use dpdk_sys::shim_detached;
    assert!(size_of::<Detached>() == size_of::<shim_detached>(), "the same struct");
    assert!(offset_of!(Detached, others) == offset_of!(shim_detached, others), "the same struct");
    assert!(offset_of!(Detached, lcore) == offset_of!(shim_detached, lcore), "the same struct");
};

impl<M> Lease<M> {
    fn in_flight(&self) -> u64 {
        let Detached { own, others, .. } = &self.detached;
        self.attached - own.load(Ordering::Acquire) - others.load(Ordering::Acquire)
    }
}

impl<M: AsRef<[u8]> + Send + Sync + 'static> Attacher<M> {
    /// With a pool of `mbufs` mbufs without buffers, as many as can be in flight, of at most `owners` owners.
    ///
    /// # Errors
    /// As for pools.
    pub fn new(
        eal: &Eal,
        name: &str,
        memory: &ExternalMemory,
        mbufs: u32,
        owners: usize,
    ) -> Result<Self, PoolError> {
        let lease = || Box::new(Lease { owner: None, attached: 0, detached: Detached::default() });
        Ok(Self {
            memory: ManuallyDrop::new(memory.clone()),
            pool: Pool::without_buffers(eal, name, mbufs)?,
            leases: (0..owners.max(1)).map(|_| ManuallyDrop::new(lease())).collect(),
            current: 0,
            used: 0,
        })
    }

    /// An mbuf that is `range` of the bytes of `owner`, to be chained behind headers; it cannot be written to, and `owner` is not dropped
    /// before it. `None` when all mbufs or leases are out, or when the range is empty, 64 KiB or more, not of the owner's bytes, not in the
    /// memory, or in two pages that a device cannot read as one.
    #[inline]
    pub fn attach(&mut self, owner: &Arc<M>, range: Range<usize>) -> Option<Mbuf> {
        let bytes = (**owner).as_ref().get(range)?;
        let length = u16::try_from(bytes.len()).ok().filter(|&length| length > 0)?;
        let device_address = self.memory.inner.device_address(bytes)?;
        let start = bytes.as_ptr().cast_mut().cast();
        let lease = self.lease(owner)?;
        let detached = std::ptr::from_ref::<Detached>(&lease.detached).cast_mut().cast();
        lease.attached += 1;
        let pool = self.pool.raw();
        // SAFETY: the bytes were borrowed from what an Arc points to, of which the lease keeps a clone: it is neither moved, nor borrowed
        // mutably, nor dropped before the lease has counted every mbuf back, and so is the counter: see `let_go` and `drop`. Mbuf does not
        // let external bytes be written.
        let raw = unsafe { dpdk_sys::shim_external_attach(pool, start, device_address, length, detached) };
        let Some(raw) = NonNull::new(raw) else {
            self.leases[self.current].attached -= 1;
            return None;
        };
        // SAFETY: a fresh mbuf that nobody else has.
        Some(unsafe { Mbuf::from_raw(raw) })
    }

    /// The lease of `owner`, which becomes the current one.
    #[inline]
    fn lease(&mut self, owner: &Arc<M>) -> Option<&mut Lease<M>> {
        let is_its = |lease: &Lease<M>| lease.owner.as_ref().is_some_and(|held| Arc::ptr_eq(held, owner));
        if !is_its(&self.leases[self.current]) {
            let used = &self.leases[..self.used];
            self.current = match used.iter().position(|lease| is_its(lease)) {
                Some(held) => held,
                None => {
                    let free = used.iter().position(|lease| lease.in_flight() == 0).unwrap_or(self.used);
                    let lease = self.leases.get_mut(free)?;
                    lease.owner = Some(Arc::clone(owner));
                    // SAFETY: reads a thread-local variable.
                    lease.detached.lcore = unsafe { dpdk_sys::shim_lcore_id() };
                    self.used = self.used.max(free + 1);
                    free
                }
            };
        }
        Some(&mut self.leases[self.current])
    }
}

impl<M> Attacher<M> {
    /// Lets go of the owners whose mbufs are all back.
    #[inline]
    pub fn let_go(&mut self) {
        for lease in &mut self.leases[..self.used] {
            if lease.owner.is_some() && lease.in_flight() == 0 {
                lease.owner = None;
            }
        }
        while self.used > 0 && self.leases[self.used - 1].owner.is_none() {
            self.used -= 1;
        }
    }

    /// Mbufs that are out.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.leases.iter().map(|lease| lease.in_flight()).sum()
    }
}

impl<M> fmt::Debug for Attacher<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attacher").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl<M> Drop for Attacher<M> {
    /// What mbufs that are still out point to stays for ever, as a pool does in that case.
    fn drop(&mut self) {
        let mut all_back = true;
        for lease in &mut self.leases {
            if lease.in_flight() > 0 {
                all_back = false;
                continue;
            }
            // SAFETY: nothing points there any more, and it is not used after this.
            unsafe { ManuallyDrop::drop(lease) };
        }
        if all_back {
            // SAFETY: as above.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}
