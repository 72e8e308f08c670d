//! One piece of work for a compression device, with all that it needs.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use dpdk_sys::rte_comp_op;

use crate::compress::DevInner;
use crate::compress_error::{CompressError, OpError, Unfit};
use crate::compress_memory::Memory;
use crate::mbuf::Mbuf;

/// An op: the source that it holds from [`CompressOp::load`] on, its destination, and a context of the caller's. It is made when the device is opened
/// and goes round between caller and device; dropping it gives everything back.
pub struct CompressOp<T> {
    raw: NonNull<rte_comp_op>,
    xform: NonNull<std::ffi::c_void>,
    /// The xform is this op's own.
    owns_xform: bool,
    source: Option<Mbuf>,
    context: Option<T>,
    expected_bytes: usize,
    destination: Memory,
    /// Where the source is copied to for a device that reads no chains.
    linear: Option<Memory>,
    /// Last: everything above is given back to it.
    dev: Arc<DevInner>,
}

// SAFETY: an op is used by one thread at a time; what it points to is its own.
unsafe impl<T: Send> Send for CompressOp<T> {}

/// What [`CompressOp::load`] did not take.
#[derive(Debug)]
pub struct Rejected<T> {
    /// Why.
    pub reason: Unfit,
    /// The source as it was.
    pub source: Mbuf,
    /// The context.
    pub context: T,
}

impl<T> CompressOp<T> {
    pub(crate) fn new(dev: &Arc<DevInner>) -> Result<Box<Self>, CompressError> {
        let destination = Memory::destination(dev)?;
        let linear = if dev.reads_chains { None } else { Some(Memory::source(dev)?) };
        let (xform, owns_xform) = dev.xform()?;
        let raw = dev.alloc_op().ok_or_else(|| CompressError::Failed {
            name: dev.name.clone(),
            step: "taking an op from its pool",
            reason: "the pool is empty".to_owned(),
        });
        let raw = match raw {
            Ok(raw) => raw,
            Err(error) => {
                if owns_xform {
                    dev.free_xform(xform);
                }
                return Err(error);
            }
        };
        let dev = Arc::clone(dev);
        let (source, context, expected_bytes) = (None, None, 0);
        Ok(Box::new(Self {
            raw,
            xform,
            owns_xform,
            source,
            context,
            expected_bytes,
            destination,
            linear,
            dev,
        }))
    }

    /// Fills the op in: bytes `range` of `source` are one Deflate stream that must give exactly `expected_bytes` bytes. The range starts in the first
    /// buffer of the chain and ends where the chain ends. For a device that reads no chains the bytes are copied.
    ///
    /// # Errors
    /// Gives everything back with the reason.
    ///
    /// # Panics
    /// When the op still holds a source: it was not taken after the last use.
    pub fn load(
        &mut self,
        source: Mbuf,
        range: Range<usize>,
        expected_bytes: usize,
        context: T,
    ) -> Result<(), Rejected<T>> {
        assert!(self.source.is_none(), "the op holds a source already");
        if let Err(reason) = self.fits(&source, &range, expected_bytes) {
            return Err(Rejected { reason, source, context });
        }
        let [offset, length] =
            [range.start, range.len()].map(|number| u32::try_from(number).unwrap_or(u32::MAX));
        let (mbuf, offset) = match &mut self.linear {
            None => (source.as_raw(), offset),
            Some(linear) => (linear.fill(source.segments(), range.start), 0),
        };
        // SAFETY: the op, the xform and both mbufs live until the op is taken back: this owns them.
        unsafe {
            dpdk_sys::shim_comp_op_set(
                self.raw.as_ptr(),
                self.xform.as_ptr(),
                mbuf.as_ptr(),
                offset,
                length,
                self.destination.mbuf().as_ptr(),
            );
        }
        self.source = Some(source);
        self.context = Some(context);
        self.expected_bytes = expected_bytes;
        Ok(())
    }

    fn fits(&self, source: &Mbuf, range: &Range<usize>, expected_bytes: usize) -> Result<(), Unfit> {
        let total = source.total_bytes();
        if range.is_empty() || range.end != total || range.start >= source.data().len() {
            return Err(Unfit::Range);
        }
        let most = self.dev.output_bytes;
        if expected_bytes > most {
            return Err(Unfit::OutputTooLong { bytes: expected_bytes, most });
        }
        match &self.linear {
            Some(linear) if range.len() > linear.bytes() => {
                Err(Unfit::SourceTooLong { bytes: range.len(), most: linear.bytes() })
            }
            _ => Ok(()),
        }
    }

    /// The decompressed bytes, once the op was dequeued.
    ///
    /// # Errors
    /// See [`OpError`].
    pub fn output(&self) -> Result<&[u8], OpError> {
        // SAFETY: the op lives and is not with the device.
        let (status, produced) = unsafe {
            let raw = self.raw.as_ptr();
            (dpdk_sys::shim_comp_op_status(raw), dpdk_sys::shim_comp_op_produced(raw))
        };
        match u32::from(status) {
            dpdk_sys::RTE_COMP_OP_STATUS_SUCCESS => {}
            dpdk_sys::RTE_COMP_OP_STATUS_NOT_PROCESSED => return Err(OpError::NotProcessed),
            dpdk_sys::RTE_COMP_OP_STATUS_OUT_OF_SPACE_TERMINATED
            | dpdk_sys::RTE_COMP_OP_STATUS_OUT_OF_SPACE_RECOVERABLE => return Err(OpError::OutOfSpace),
            _ => return Err(OpError::Device(status)),
        }
        let got_bytes = usize::try_from(produced).unwrap_or(usize::MAX);
        let expected_bytes = self.expected_bytes;
        if got_bytes != expected_bytes {
            return Err(OpError::Length { got_bytes, expected_bytes });
        }
        Ok(self.destination.get(expected_bytes))
    }

    /// The context that it was loaded with.
    pub fn context_mut(&mut self) -> Option<&mut T> {
        self.context.as_mut()
    }

    /// Takes source and context out; the op can be loaded again. The output stays until then.
    pub fn unload(&mut self) -> Option<(Mbuf, T)> {
        self.source.take().zip(self.context.take())
    }

    /// Whether it can be enqueued.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        self.source.is_some()
    }

    pub(crate) fn belongs_to(&self, dev: &Arc<DevInner>) -> bool {
        Arc::ptr_eq(&self.dev, dev)
    }

    /// Gives the op up to the device.
    pub(crate) fn into_raw(op: Box<Self>) -> NonNull<rte_comp_op> {
        let raw = op.raw;
        // SAFETY: the op lives; there is room for a pointer behind it.
        unsafe { dpdk_sys::shim_comp_op_user(raw.as_ptr()).write(Box::into_raw(op).cast()) };
        raw
    }

    /// Takes it back.
    ///
    /// # Safety
    /// `raw` came from [`CompressOp::into_raw`] of the same `T`, is taken back once, and the device is done with it.
    pub(crate) unsafe fn from_raw(raw: NonNull<rte_comp_op>) -> Box<Self> {
        // SAFETY: as promised by the caller: the pointer behind the op is the box that was given up.
        unsafe { Box::from_raw(dpdk_sys::shim_comp_op_user(raw.as_ptr()).read().cast()) }
    }
}

impl<T> Drop for CompressOp<T> {
    fn drop(&mut self) {
        // SAFETY: the op is this one's own and is not with the device.
        unsafe { dpdk_sys::rte_comp_op_free(self.raw.as_ptr()) };
        if self.owns_xform {
            self.dev.free_xform(self.xform);
        }
    }
}

impl<T> fmt::Debug for CompressOp<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressOp").field("loaded", &self.is_loaded()).finish_non_exhaustive()
    }
}
