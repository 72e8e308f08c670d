//! Compression devices: what takes the decompression off the lcores.

use std::ffi::{CString, c_void};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dpdk_sys::rte_comp_op;

use crate::compress_caps::{self, CompressAlgorithm, CompressCapabilities};
use crate::compress_error::{CompressError, check};
use crate::compress_memory::{OUTPUT_SLACK_BYTES, PIECE_BYTES};
use crate::compress_queue::CompressQueue;
use crate::eal::{Eal, EalInner};
use crate::pool::{Pool, PoolConfig};

/// Base-2 logarithm of Deflate's largest window, which encoders use.
const DEFLATE_WINDOW_LOG2: u8 = 15;

/// Most ops of one queue pair.
const MAX_IN_FLIGHT: u16 = 1024;

/// Size of a device's queues and buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressConfig {
    /// Queue pairs, one for each lcore that uses the device.
    pub queue_pairs: u16,
    /// Ops of each queue pair; a power of two.
    pub in_flight: u16,
    /// Most bytes that one op is to give. A device that writes no chains gives fewer: [`CompressDev::max_output_bytes`].
    pub output_bytes: usize,
}

/// A started compression device. It is stopped and closed when this, its queues and all of their ops are dropped. One that is virtual stays attached, since DPDK
/// cannot make a compression device a second time in the place of one that was removed; it can be opened again.
#[derive(Debug)]
pub struct CompressDev {
    inner: Arc<DevInner>,
}

/// What device, queues and ops hold on to.
pub(crate) struct DevInner {
    pub(crate) id: u8,
    pub(crate) name: String,
    capabilities: CompressCapabilities,
    pub(crate) output_bytes: usize,
    /// A source may be a chain.
    pub(crate) reads_chains: bool,
    /// One buffer may be longer than its 16-bit length: the driver reads the packet's.
    pub(crate) long_buffers: bool,
    /// Ops may share `xform`.
    shared_xform: Option<NonNull<c_void>>,
    configured: bool,
    started: bool,
    ops: Option<NonNull<dpdk_sys::rte_mempool>>,
    op_count: u32,
    mbufs: Option<Pool>,
    broken: AtomicBool,
    eal: Arc<EalInner>,
}

// SAFETY: the pointers are the device's and the EAL's; what is done with them from several threads is taking ops and xforms, at start and end.
unsafe impl Send for DevInner {}
// SAFETY: as above: mempools synchronise themselves; xforms are made when the device is opened and freed by the last owner of an op.
unsafe impl Sync for DevInner {}

impl CompressDev {
    /// Opens and starts a device and hands out its queue pairs, once, each with its ops. `name` is a virtual device (`compress_isal`, `compress_zlib`), which is
    /// made if it is not there, or the PCI address of a device with a compression engine (`0000:03:00.0`).
    ///
    /// # Errors
    /// See [`CompressError`].
    pub fn open<T>(
        eal: &Eal,
        name: &str,
        config: &CompressConfig,
    ) -> Result<(CompressDev, Vec<CompressQueue<T>>), CompressError> {
        let mut inner = DevInner::attach(eal, name)?;
        inner.configure(config)?;
        inner.make_pools(eal, config)?;
        let inner = Arc::new(inner);
        let queues = (0..config.queue_pairs).map(|queue| CompressQueue::new(&inner, queue, config.in_flight));
        let queues = queues.collect::<Result<Vec<_>, _>>()?;
        Ok((CompressDev { inner }, queues))
    }

    /// What a device can do, without starting it.
    ///
    /// # Errors
    /// When there is no such device or it is open.
    pub fn probe(eal: &Eal, name: &str) -> Result<CompressCapabilities, CompressError> {
        let inner = DevInner::attach(eal, name)?;
        Ok(inner.capabilities.clone())
    }

    /// What the device can do.
    #[must_use]
    pub fn capabilities(&self) -> &CompressCapabilities {
        &self.inner.capabilities
    }

    /// The name that it was opened by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Whether the packets' own buffers are handed to it; otherwise the bytes are copied into one.
    #[must_use]
    pub fn reads_chains(&self) -> bool {
        self.inner.reads_chains
    }

    /// Most bytes that one op gives.
    #[must_use]
    pub fn max_output_bytes(&self) -> usize {
        self.inner.output_bytes
    }

    /// Most bytes that an op reads; `None` where a chain may have any length.
    #[must_use]
    pub fn max_source_bytes(&self) -> Option<usize> {
        let inner = &self.inner;
        (!inner.reads_chains).then(|| inner.max_linear_bytes())
    }

    /// Mbufs of destinations that are out, and ops that are out: 0 once all queues and ops are dropped.
    #[must_use]
    pub fn in_use(&self) -> u32 {
        self.inner.mbufs.as_ref().map_or(0, Pool::in_use) + self.inner.ops_in_use()
    }
}

impl DevInner {
    fn attach(eal: &Eal, name: &str) -> Result<Self, CompressError> {
        if name.starts_with("compress_isal") && !crate::isal_available() {
            return Err(CompressError::IsalMissing(name.to_owned()));
        }
        let device = name.split(',').next().unwrap_or(name);
        let id = find_or_attach(eal, name, device)?;
        let claimed = eal.inner().open_compress.lock().map(|mut open| open.insert(id)).unwrap_or(false);
        if !claimed {
            return Err(CompressError::AlreadyOpen(name.to_owned()));
        }
        let capabilities = compress_caps::capabilities(id);
        // A driver logs every stream that it cannot read, and anybody may send such streams: they are counted, not logged.
        // SAFETY: reads a C string.
        unsafe { dpdk_sys::rte_log_set_level_pattern(c"pmd.compress.*".as_ptr(), dpdk_sys::RTE_LOG_CRIT) };
        Ok(Self {
            id,
            name: name.to_owned(),
            capabilities,
            output_bytes: 0,
            reads_chains: false,
            long_buffers: false,
            shared_xform: None,
            configured: false,
            started: false,
            ops: None,
            op_count: 0,
            mbufs: None,
            broken: AtomicBool::new(false),
            eal: Arc::clone(eal.inner()),
        })
    }

    fn configure(&mut self, config: &CompressConfig) -> Result<(), CompressError> {
        let bad = |what: String| Err(CompressError::BadConfig { name: self.name.clone(), what });
        let CompressConfig { queue_pairs, in_flight, output_bytes } = *config;
        if queue_pairs == 0 || self.capabilities.max_queue_pairs.is_some_and(|most| queue_pairs > most) {
            let most = self.capabilities.max_queue_pairs.unwrap_or(u16::MAX);
            return bad(format!("{queue_pairs} queue pairs were asked for, it has 1 to {most}"));
        }
        if !in_flight.is_power_of_two() || !(2..=MAX_IN_FLIGHT).contains(&in_flight) {
            return bad(format!(
                "{in_flight} ops in flight were asked for: give a power of two from 2 to {MAX_IN_FLIGHT}"
            ));
        }
        if output_bytes == 0 || output_bytes > 1 << 30 {
            return bad(format!("an output of {output_bytes} bytes was asked for: give 1 to 2^30"));
        }
        let no_deflate =
            || CompressError::NoDeflate { name: self.name.clone(), found: self.capabilities.to_string() };
        let deflate = self.capabilities.of(CompressAlgorithm::Deflate);
        let deflate = deflate
            .filter(|deflate| (deflate.window_log2.0..=deflate.window_log2.1).contains(&DEFLATE_WINDOW_LOG2));
        let deflate = deflate.ok_or_else(no_deflate)?;
        // mlx5 reads no chains, but takes the length of a destination from the packet and that of a source from the op, 32 bits each.
        self.long_buffers = !deflate.takes_chains(1, 2) && self.capabilities.driver.starts_with("mlx5");
        let one_buffer = PIECE_BYTES - OUTPUT_SLACK_BYTES;
        let in_chains = deflate.takes_chains(1, 2);
        self.output_bytes =
            if self.long_buffers || in_chains { output_bytes } else { output_bytes.min(one_buffer) };
        let pieces = if in_chains { (output_bytes + OUTPUT_SLACK_BYTES).div_ceil(PIECE_BYTES) } else { 1 };
        self.reads_chains = deflate.takes_chains(2, pieces);
        let xforms = if deflate.shares_xforms() { 1 } else { u32::from(queue_pairs) * u32::from(in_flight) };
        let Ok(max_nb_priv_xforms) = u16::try_from(xforms) else {
            return bad(format!("{xforms} ops in all are more than {}", u16::MAX));
        };
        let mut wanted = dpdk_sys::rte_compressdev_config {
            // SAFETY: the device exists.
            socket_id: unsafe { dpdk_sys::rte_compressdev_socket_id(self.id) },
            nb_queue_pairs: queue_pairs,
            max_nb_priv_xforms,
            max_nb_streams: 0,
        };
        // SAFETY: the device exists and is not started; the structure is read.
        let code = unsafe { dpdk_sys::rte_compressdev_configure(self.id, &raw mut wanted) };
        check(&self.name, "configuring the device", code)?;
        self.configured = true;
        for queue in 0..queue_pairs {
            // SAFETY: the device is configured with that many queue pairs.
            let code = unsafe {
                dpdk_sys::rte_compressdev_queue_pair_setup(
                    self.id,
                    queue,
                    u32::from(in_flight),
                    wanted.socket_id,
                )
            };
            check(&self.name, "setting up a queue pair", code)?;
        }
        // SAFETY: the device is configured and its queue pairs are set up.
        check(&self.name, "starting the device", unsafe { dpdk_sys::rte_compressdev_start(self.id) })?;
        self.started = true;
        if deflate.shares_xforms() {
            self.shared_xform = Some(self.new_xform()?);
        }
        Ok(())
    }

    fn make_pools(&mut self, eal: &Eal, config: &CompressConfig) -> Result<(), CompressError> {
        let ops = u32::from(config.queue_pairs) * u32::from(config.in_flight);
        let name = format!("comp_ops{}", self.id);
        let c_name = CString::new(name.as_str()).unwrap_or_default();
        let user = u16::try_from(size_of::<*mut c_void>()).unwrap_or(u16::MAX);
        // SAFETY: the environment is up; the name is copied.
        let raw = unsafe {
            dpdk_sys::rte_comp_op_pool_create(c_name.as_ptr(), ops, 0, user, dpdk_sys::SOCKET_ID_ANY)
        };
        let no_memory = || CompressError::NoMemory { name: self.name.clone(), mib: 1 };
        self.ops = Some(NonNull::new(raw).ok_or_else(no_memory)?);
        self.op_count = ops;
        let pieces = (self.output_bytes + OUTPUT_SLACK_BYTES).div_ceil(PIECE_BYTES) + 1;
        let mbufs = ops.saturating_mul(u32::try_from(pieces).unwrap_or(u32::MAX));
        // Their own room is not used: they are attached to memory of the ops.
        let data_room_bytes = crate::HEADROOM_BYTES + 64;
        let pool = PoolConfig { mbufs, cache: 0, data_room_bytes, ..PoolConfig::default() };
        self.mbufs = Some(Pool::new(eal, &format!("comp_mbufs{}", self.id), pool)?);
        Ok(())
    }

    /// Bytes of a source's buffer where the device reads no chains.
    pub(crate) fn max_linear_bytes(&self) -> usize {
        if self.long_buffers { self.output_bytes } else { self.output_bytes.min(PIECE_BYTES) }
    }

    /// A pool of mbufs without room of their own.
    pub(crate) fn mbufs(&self) -> &Pool {
        self.mbufs.as_ref().expect("the pool is made before the first op")
    }

    pub(crate) fn alloc_op(&self) -> Option<NonNull<rte_comp_op>> {
        // SAFETY: the pool lives.
        self.ops.and_then(|pool| NonNull::new(unsafe { dpdk_sys::rte_comp_op_alloc(pool.as_ptr()) }))
    }

    /// What describes Deflate to the device, and whether the caller must free it.
    pub(crate) fn xform(&self) -> Result<(NonNull<c_void>, bool), CompressError> {
        match self.shared_xform {
            Some(shared) => Ok((shared, false)),
            None => Ok((self.new_xform()?, true)),
        }
    }

    fn new_xform(&self) -> Result<NonNull<c_void>, CompressError> {
        let mut xform = std::ptr::null_mut();
        let step = "preparing to decompress Deflate";
        // SAFETY: the device is started; the pointer is written on success.
        let code = unsafe { dpdk_sys::shim_comp_inflate_xform(self.id, DEFLATE_WINDOW_LOG2, &raw mut xform) };
        check(&self.name, step, code)?;
        NonNull::new(xform).ok_or_else(|| CompressError::Failed {
            name: self.name.clone(),
            step,
            reason: "the driver gave nothing".to_owned(),
        })
    }

    pub(crate) fn free_xform(&self, xform: NonNull<c_void>) {
        // SAFETY: it was made by this device, no op uses it any more.
        unsafe { dpdk_sys::rte_compressdev_private_xform_free(self.id, xform.as_ptr()) };
    }

    fn ops_in_use(&self) -> u32 {
        // SAFETY: the pool lives.
        let available =
            self.ops.map_or(0, |pool| unsafe { dpdk_sys::rte_mempool_avail_count(pool.as_ptr()) });
        self.op_count.saturating_sub(available)
    }

    /// The device did not give ops back: nothing of it can be freed.
    pub(crate) fn keep_for_ever(self: &Arc<Self>) {
        self.broken.store(true, Ordering::Relaxed);
        std::mem::forget(Arc::clone(self));
    }
}

impl Drop for DevInner {
    fn drop(&mut self) {
        if let Some(xform) = self.shared_xform.take() {
            self.free_xform(xform);
        }
        // SAFETY: queues and ops are gone, so no other thread uses the device. The pool's ops are all back: each held this.
        unsafe {
            if self.started {
                dpdk_sys::rte_compressdev_stop(self.id);
            }
            if self.configured {
                dpdk_sys::rte_compressdev_close(self.id);
            }
            if let Some(ops) = self.ops {
                dpdk_sys::rte_mempool_free(ops.as_ptr());
            }
        }
        if let Ok(mut open) = self.eal.open_compress.lock() {
            open.remove(&self.id);
        }
    }
}

impl fmt::Debug for DevInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevInner").field("name", &self.name).finish_non_exhaustive()
    }
}

fn is_pci(device: &str) -> bool {
    device.contains(':') && device.contains('.')
}

fn by_name(device: &str) -> Option<u8> {
    let name = CString::new(device).ok()?;
    // SAFETY: reads a C string.
    u8::try_from(unsafe { dpdk_sys::rte_compressdev_get_dev_id(name.as_ptr()) }).ok()
}

/// Numbers of the devices that the one linked driver of PCI devices has made. They are named by that driver, not by their addresses, so the one that
/// was not there before is the one that was attached.
fn on_pci() -> Vec<u8> {
    let mut ids = [0_u8; 64];
    // SAFETY: reads a C string; writes at most as many numbers as there is room for.
    let found = unsafe { dpdk_sys::rte_compressdev_devices_get(c"mlx5_pci".as_ptr(), ids.as_mut_ptr(), 64) };
    ids[..usize::from(found).min(64)].to_vec()
}

fn find_or_attach(eal: &Eal, name: &str, device: &str) -> Result<u8, CompressError> {
    if let Some(id) = by_name(device) {
        return Ok(id);
    }
    let before = on_pci();
    if is_pci(device) && !name.contains("class=") {
        // The same device's network function stays with the driver that has it.
        eal.attach(&format!("{name},class=compress"))?;
    } else {
        eal.attach(name)?;
    }
    let new = on_pci().into_iter().find(|id| !before.contains(id));
    by_name(device).or(new).ok_or_else(|| CompressError::NotCompress(name.to_owned()))
}
