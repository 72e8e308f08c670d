//! Planes whose sections a compression device decompresses: the buffers of their packets are its source, nothing is copied.

use arrayvec::ArrayVec;
use compress::{Compression, Offload, Section, Untaken};
use dpdk::{BURST, CompressConfig, CompressDev, CompressError, CompressOp, CompressQueue};

use crate::job::PlaneJob;

/// Planes that a decode lcore may have at the device.
const IN_FLIGHT: u16 = 16;

type Op = Box<CompressOp<Box<PlaneJob>>>;

/// A queue pair of the device and what goes through it.
pub(crate) struct DeviceOffload {
    queue: CompressQueue<Box<PlaneJob>>,
    /// Loaded, and not taken by the device yet.
    loaded: ArrayVec<Op, BURST>,
    /// Done, and not handed on yet.
    done: ArrayVec<Op, BURST>,
    max_output_bytes: usize,
    max_source_bytes: Option<usize>,
    /// Times that the device took less than it was offered.
    pub(crate) refused: u64,
    /// Planes that it gave back, and how many of these make one that counts as failed, though it is not; 0 for none.
    finished: u64,
    fail_every: u64,
}

/// Takes `,fail_every=N` from the end of a device's name: tests have it fail at every Nth plane, since the software drivers fail only at what no core can decode
/// either.
pub(crate) fn fault_of(device: &str) -> Result<(&str, u64), CompressError> {
    let Some((name, every)) = device.split_once(",fail_every=") else { return Ok((device, 0)) };
    let every = every.parse().ok().filter(|&every| every > 0);
    let what = || "fail_every is how many planes make one that fails, at least 1, behind all else".to_owned();
    Ok((name, every.ok_or_else(|| CompressError::BadConfig { name: device.to_owned(), what: what() })?))
}

/// How a device is set up for `lcores` decode lcores and planes of `plane_bytes` decoded bytes.
pub(crate) fn device_config(lcores: u16, plane_bytes: usize) -> CompressConfig {
    // What is compressed of a quantized plane is at most a byte of every element.
    CompressConfig { queue_pairs: lcores, in_flight: IN_FLIGHT, output_bytes: plane_bytes.div_ceil(2) }
}

impl DeviceOffload {
    pub(crate) fn new(dev: &CompressDev, queue: CompressQueue<Box<PlaneJob>>, fail_every: u64) -> Self {
        Self {
            queue,
            loaded: ArrayVec::new(),
            done: ArrayVec::new(),
            max_output_bytes: dev.max_output_bytes(),
            max_source_bytes: dev.max_source_bytes(),
            refused: 0,
            finished: 0,
            fail_every,
        }
    }
}

impl Offload<Box<PlaneJob>> for DeviceOffload {
    fn takes(&self, section: &Section) -> Result<(), Untaken> {
        if section.compression != Compression::Deflate {
            return Err(Untaken::Compression);
        }
        let source_fits = self.max_source_bytes.is_none_or(|most| section.compressed_bytes <= most);
        if section.bytes > self.max_output_bytes || !source_fits {
            return Err(Untaken::TooLarge);
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.queue.idle() > 0 && !self.loaded.is_full()
    }

    fn submit(&mut self, mut plane: Box<PlaneJob>, section: &Section) -> Result<(), Box<PlaneJob>> {
        let Some(mut op) = self.queue.take_op() else { return Err(plane) };
        let Some((tail, start)) = plane.take_tail(section.start) else {
            self.queue.give_back(op);
            return Err(plane);
        };
        let end = tail.total_bytes();
        if let Err(rejected) = op.load(tail, start..end, section.bytes, plane) {
            self.queue.give_back(op);
            let mut plane = rejected.context;
            plane.tail = Some(rejected.source);
            return Err(plane);
        }
        self.loaded.push(op);
        Ok(())
    }

    fn flush(&mut self) {
        if !self.loaded.is_empty() {
            self.queue.enqueue_burst(&mut self.loaded);
            self.refused += u64::from(!self.loaded.is_empty());
        }
    }

    fn in_flight(&self) -> usize {
        self.queue.in_flight() + self.loaded.len() + self.done.len()
    }

    fn finish(&mut self, done: impl FnOnce(Box<PlaneJob>, Option<&[u8]>)) -> bool {
        if self.done.is_empty() {
            self.queue.dequeue_burst(&mut self.done);
        }
        let Some(mut op) = self.done.pop() else { return false };
        if let Some((tail, mut plane)) = op.unload() {
            plane.tail = Some(tail);
            self.finished += 1;
            let made_to_fail = self.fail_every > 0 && self.finished.is_multiple_of(self.fail_every);
            done(plane, op.output().ok().filter(|_| !made_to_fail));
        }
        self.queue.give_back(op);
        true
    }
}
