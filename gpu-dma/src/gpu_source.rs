//! The source in GPU memory: planes out of pages of a KV cache, by the copy engine.
//!
//! One stream per GPU; an event behind each read tells when its copies have ended, and only then its slot is given back.
//! Reads are few, two per encoder, and large against what encoding them costs, so they are started one by one.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::copies::Run;
use crate::driver::{DeviceIndex, Driver, DriverError, EventId, StreamId};
use crate::gpu_sink::GpuHealth;
use crate::paged::{self, SlotOrder};
use crate::source::{HostSource, Origin, READS, Read, ReadBatch, ReadDone, Source, SourceFault};

/// A read whose copies are under way.
#[derive(Debug)]
struct Flying<T> {
    read: Read<T>,
    event: EventId,
    result: Result<(), SourceFault>,
}

/// One GPU.
#[derive(Debug)]
struct Gpu<T> {
    index: DeviceIndex,
    stream: StreamId,
    /// Oldest first.
    flying: VecDeque<Flying<T>>,
    events: Vec<EventId>,
}

/// Reads GPU memory; see the module's documentation.
#[derive(Debug)]
pub struct GpuSource<T> {
    driver: Arc<dyn Driver>,
    health: Arc<GpuHealth>,
    gpus: Vec<Gpu<T>>,
    /// Reads that ended without a copy.
    ended: ReadBatch<T>,
}

impl<T> GpuSource<T> {
    /// A source with a stream and events on every GPU of `driver`.
    ///
    /// # Errors
    /// When the driver refuses to make them.
    pub fn new(driver: Arc<dyn Driver>, health: Arc<GpuHealth>) -> Result<Self, DriverError> {
        let mut source = Self { driver, health, gpus: Vec::new(), ended: ReadBatch::new() };
        for index in (0..source.driver.devices().len()).map(DeviceIndex) {
            let stream = source.driver.create_stream(index)?;
            let (flying, events) = (VecDeque::with_capacity(READS), Vec::with_capacity(READS));
            source.gpus.push(Gpu { index, stream, flying, events });
            for _ in 0..READS {
                let event = source.driver.create_event(index)?;
                source.gpus[index.0].events.push(event);
            }
        }
        Ok(source)
    }

    /// Starts the copies of a read. An error says that they are not to be relied on; some may be under way.
    fn start(driver: &dyn Driver, at: (DeviceIndex, StreamId), read: &Read<T>) -> Result<(), DriverError> {
        let Origin::Pages { memory, table, first_token, tokens } = &read.from else { return Ok(()) };
        let (base, slot) = (memory.base(read.plane).unwrap_or(0), read.slot.addr() as u64);
        let mut started = Ok(());
        paged::runs(memory.kv(), read.plane, table, *first_token, *tokens, SlotOrder::Tokens, |run| {
            // The arithmetic is that of a copy into the pages.
            let run = Run {
                to: slot + run.from,
                from: base + run.to,
                to_pitch: run.from_pitch,
                from_pitch: run.to_pitch,
                ..run
            };
            let rows = if run.rows == 1 || run.strided() { 1 } else { run.rows };
            for row in 0..rows {
                let (to, from) = (run.to + row * run.to_pitch, run.from + row * run.from_pitch);
                let part = if rows == 1 { run } else { Run::row(to, from, run.bytes) };
                if started.is_ok() {
                    // SAFETY: the slot is a part of an arena that was pinned with this driver (see `Sinks`), is owned by the
                    // read, and the read by `flying` until the event behind the copies has come; the cache's memory is
                    // mapped for as long as the read keeps it.
                    started = unsafe { driver.read_rows(at.0, at.1, &part) };
                }
            }
        });
        started
    }

    fn fault(&self, read: &Read<T>) -> Option<SourceFault> {
        let (plane_bytes, planes) = (read.from.plane_bytes(), read.from.planes());
        if read.plane >= planes {
            return Some(SourceFault::NoSuchPlane { plane: read.plane, planes });
        }
        let slot_bytes = read.slot.bytes();
        if plane_bytes > slot_bytes as u64 {
            return Some(SourceFault::SlotTooSmall { slot_bytes, plane_bytes });
        }
        self.health.lost().map(SourceFault::Device)
    }
}

impl<T: Send> Source<T> for GpuSource<T> {
    fn submit(&mut self, read: Read<T>) -> Result<(), Read<T>> {
        let Origin::Pages { memory, .. } = &read.from else {
            return self.end(read, SourceFault::OtherSource);
        };
        let at = memory.device().0;
        if let Some(fault) = self.fault(&read) {
            return self.end(read, fault);
        }
        let Some(gpu) = self.gpus.get_mut(at) else { return self.end(read, SourceFault::OtherSource) };
        let Some(event) = gpu.events.pop() else { return Err(read) };
        let driver = &*self.driver;
        let started = Self::start(driver, (gpu.index, gpu.stream), &read);
        let marked = driver.record(gpu.index, event, gpu.stream);
        let mut result = Ok(());
        if let Err(error) = started.and(marked) {
            // What was started is waited for here: without an event nobody could know.
            let _ = driver.synchronize(gpu.index, gpu.stream);
            self.health.note(error);
            result = Err(SourceFault::Device(error));
        }
        gpu.flying.push_back(Flying { read, event, result });
        Ok(())
    }

    fn poll(&mut self, done: &mut ReadBatch<T>) -> usize {
        let before = done.len();
        let count = self.ended.len().min(done.remaining_capacity());
        done.extend(self.ended.drain(..count));
        for gpu in &mut self.gpus {
            while !done.is_full()
                && let Some(front) = gpu.flying.front_mut()
            {
                if front.result.is_ok() {
                    match self.driver.query(gpu.index, front.event) {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(error) => {
                            let _ = self.driver.synchronize(gpu.index, gpu.stream);
                            self.health.note(error);
                            front.result = Err(SourceFault::Device(error));
                        }
                    }
                }
                let Some(Flying { read, event, result }) = gpu.flying.pop_front() else { break };
                gpu.events.push(event);
                done.push(ReadDone { context: read.context, slot: read.slot, result });
            }
        }
        done.len() - before
    }

    fn flush(&mut self) {}

    fn in_flight(&self) -> usize {
        self.ended.len() + self.gpus.iter().map(|gpu| gpu.flying.len()).sum::<usize>()
    }
}

impl<T> GpuSource<T> {
    /// Ends a read without a copy; gives it back if there is no room to say so.
    fn end(&mut self, read: Read<T>, fault: SourceFault) -> Result<(), Read<T>> {
        if self.ended.is_full() {
            return Err(read);
        }
        self.ended.push(ReadDone { context: read.context, slot: read.slot, result: Err(fault) });
        Ok(())
    }
}

impl<T> Drop for GpuSource<T> {
    /// Waits for the copies under way: a slot must not be unmapped, nor a client's memory, while a GPU reads or writes it.
    fn drop(&mut self) {
        for gpu in &mut self.gpus {
            // An error means that the GPU is lost, and with it its copies.
            let _ = self.driver.synchronize(gpu.index, gpu.stream);
            self.driver.destroy_stream(gpu.index, gpu.stream);
            for event in gpu.events.drain(..).chain(gpu.flying.iter().map(|flying| flying.event)) {
                self.driver.destroy_event(gpu.index, event);
            }
        }
    }
}

/// Host memory and, where there is a GPU, its memory, as one source.
#[derive(Debug)]
pub struct Sources<T> {
    host: HostSource<T>,
    gpu: Option<GpuSource<T>>,
}

impl<T> Sources<T> {
    /// Without a GPU source, reads of GPU memory end with a fault.
    #[must_use]
    pub fn new(gpu: Option<GpuSource<T>>) -> Self {
        Self { host: HostSource::default(), gpu }
    }
}

impl<T: Send> Source<T> for Sources<T> {
    fn submit(&mut self, read: Read<T>) -> Result<(), Read<T>> {
        match (&read.from, &mut self.gpu) {
            (Origin::Pages { .. }, Some(gpu)) => gpu.submit(read),
            _ => self.host.submit(read),
        }
    }

    fn poll(&mut self, done: &mut ReadBatch<T>) -> usize {
        let of_host = self.host.poll(done);
        of_host + self.gpu.as_mut().map_or(0, |gpu| gpu.poll(done))
    }

    fn flush(&mut self) {}

    fn in_flight(&self) -> usize {
        self.host.in_flight() + self.gpu.as_ref().map_or(0, Source::in_flight)
    }
}
