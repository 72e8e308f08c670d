//! A queue pair of a compression device, for one lcore.

use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use dpdk_sys::rte_comp_op;

use crate::burst::BURST;
use crate::compress::DevInner;
use crate::compress_error::CompressError;
use crate::compress_op::CompressOp;

/// How long a queue that is dropped waits for what the device still has.
const DRAIN: Duration = Duration::from_secs(2);

/// A queue pair. It knows how many ops the device has; when it is dropped it takes them back first.
pub struct CompressQueue<T> {
    queue: u16,
    in_flight: usize,
    idle: Vec<Box<CompressOp<T>>>,
    dev: Arc<DevInner>,
    ops: PhantomData<T>,
}

impl<T> CompressQueue<T> {
    pub(crate) fn new(dev: &Arc<DevInner>, queue: u16, ops: u16) -> Result<Self, CompressError> {
        let mut idle = Vec::with_capacity(ops.into());
        for _ in 0..ops {
            idle.push(CompressOp::new(dev)?);
        }
        Ok(Self { queue, in_flight: 0, idle, dev: Arc::clone(dev), ops: PhantomData })
    }

    /// Index of this queue pair.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.queue
    }

    /// Takes an op that nobody uses; `None` when all are under way.
    #[inline]
    pub fn take_op(&mut self) -> Option<Box<CompressOp<T>>> {
        self.idle.pop()
    }

    /// Gives an op back. What it still holds is dropped. An op of another device is dropped whole.
    #[inline]
    pub fn give_back(&mut self, mut op: Box<CompressOp<T>>) {
        drop(op.unload());
        // Room for all ops of the queue was made at the start; those of other queues of the device are taken while there is room.
        if op.belongs_to(&self.dev) && self.idle.len() < self.idle.capacity() {
            self.idle.push(op);
        }
    }

    /// Ops that nobody uses.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Ops that the device has.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Hands ops to the device from the front of `ops`, as many as it takes, and returns how many; the rest stays.
    ///
    /// # Panics
    /// When an op is not loaded or belongs to another device.
    pub fn enqueue_burst(&mut self, ops: &mut ArrayVec<Box<CompressOp<T>>, BURST>) -> usize {
        let fits = |op: &CompressOp<T>| op.is_loaded() && op.belongs_to(&self.dev);
        assert!(ops.iter().all(|op| fits(op)), "an op is not loaded or is another device's");
        let mut raw: ArrayVec<NonNull<rte_comp_op>, BURST> =
            ops.drain(..).map(CompressOp::into_raw).collect();
        let count = u16::try_from(raw.len()).unwrap_or(0);
        // SAFETY: the device is started, this handle is the queue pair's only one, borrowed exclusively; there are `count` ops, loaded, of this
        // device.
        let taken = usize::from(unsafe {
            dpdk_sys::rte_compressdev_enqueue_burst(self.dev.id, self.queue, raw.as_mut_ptr().cast(), count)
        });
        self.in_flight += taken;
        // SAFETY: the device did not take these.
        ops.extend(raw.drain(..).skip(taken).map(|raw| unsafe { CompressOp::from_raw(raw) }));
        taken
    }

    /// Appends ops that the device is done with, in any order, up to the free room of `ops`, and returns how many.
    pub fn dequeue_burst(&mut self, ops: &mut ArrayVec<Box<CompressOp<T>>, BURST>) -> usize {
        if self.in_flight == 0 {
            return 0;
        }
        let mut raw = [NonNull::<rte_comp_op>::dangling(); BURST];
        let room = u16::try_from(ops.remaining_capacity()).unwrap_or(0);
        // SAFETY: as above; there is that much room.
        let done = usize::from(unsafe {
            dpdk_sys::rte_compressdev_dequeue_burst(self.dev.id, self.queue, raw.as_mut_ptr().cast(), room)
        });
        self.in_flight -= done;
        // SAFETY: ops that this queue gave to the device, each once.
        ops.extend(raw[..done].iter().map(|&raw| unsafe { CompressOp::from_raw(raw) }));
        done
    }
}

impl<T> Drop for CompressQueue<T> {
    /// Takes back what the device has. Ops that a broken device does not give back stay allocated, with their mbufs and the device.
    fn drop(&mut self) {
        let deadline = Instant::now() + DRAIN;
        let mut done = ArrayVec::new();
        while self.in_flight > 0 && Instant::now() < deadline {
            self.dequeue_burst(&mut done);
            done.clear();
        }
        if self.in_flight > 0 {
            self.dev.keep_for_ever();
        }
    }
}

impl<T> fmt::Debug for CompressQueue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressQueue")
            .field("queue", &self.queue)
            .field("in_flight", &self.in_flight)
            .field("idle", &self.idle.len())
            .finish_non_exhaustive()
    }
}
