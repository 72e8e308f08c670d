//! The sink in GPU memory: pages and rings, on any number of GPUs.
//!
//! Each GPU has several streams. Transfers are gathered in one open batch per GPU and started together, in the streams'
//! turn; an event behind each batch tells when its copies have ended, and only then are its slots free. Within a stream
//! batches end in order; between streams they need not.
//!
//! A batch is started when it is large enough, when it is old enough, or as soon as there is nothing before it: waiting
//! makes batches larger, and costs nothing only while the copy engine is busy anyway.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::copies::{CopyList, Run};
use crate::driver::{DeviceIndex, Driver, DriverError, EventId, StreamId};
use crate::memory::RingMemory;
use crate::paged::{self, SlotOrder};
use crate::sink::{BATCH, Batch, Decoded, Destination, Finished, FinishedBatch, Sink, SinkFault, Transfer};

/// How copies are gathered and started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuSinkConfig {
    /// Streams per GPU.
    pub streams: usize,
    /// A batch with so many pieces is started at once.
    pub batch_pieces: usize,
    /// A batch with so many bytes is started at once.
    pub batch_bytes: u64,
    /// A batch so old is started even while others are under way.
    pub batch_age: Duration,
    /// Batches under way per stream; then the sink takes no more.
    pub batches_per_stream: usize,
    /// How long a plane waits for a free entry of a ring.
    pub ring_patience: Duration,
}

impl Default for GpuSinkConfig {
    /// Two streams, 1024 pieces or 4 MiB or 50 us, 4 batches each, 200 ms.
    fn default() -> Self {
        Self {
            streams: 2,
            batch_pieces: 1024,
            batch_bytes: 4 << 20,
            batch_age: Duration::from_micros(50),
            batches_per_stream: 4,
            ring_patience: Duration::from_millis(200),
        }
    }
}

/// What all sinks of a process count, and whether a GPU is lost. Read by other threads.
#[derive(Debug, Default)]
pub struct GpuHealth {
    lost: OnceLock<DriverError>,
    /// Batches started.
    pub batches: AtomicU64,
    /// Pieces and strided copies in them.
    pub copies: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// Transfers that failed.
    pub faults: AtomicU64,
    /// Transfers that found a ring full.
    pub ring_waits: AtomicU64,
}

impl GpuHealth {
    /// Notes that a GPU is lost, if that is what the error means.
    pub(crate) fn note(&self, error: DriverError) {
        if error.sticky {
            let _ = self.lost.set(error);
        }
    }

    /// The error after which no call on a GPU succeeds any more, if there was one.
    #[must_use]
    pub fn lost(&self) -> Option<DriverError> {
        self.lost.get().copied()
    }

    /// Every counter with its name.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 5] {
        let Self { batches, copies, bytes, faults, ring_waits, .. } = self;
        [
            ("gpu_batches", batches.load(Relaxed)),
            ("gpu_copies", copies.load(Relaxed)),
            ("gpu_bytes", bytes.load(Relaxed)),
            ("gpu_faults", faults.load(Relaxed)),
            ("gpu_ring_waits", ring_waits.load(Relaxed)),
        ]
    }
}

/// A transfer whose copies are in a batch.
#[derive(Debug)]
struct Entry<T> {
    transfer: Transfer<T>,
    /// The entry's number, if it goes to a ring.
    sequence: Option<u64>,
    pieces: Range<usize>,
    strided: Range<usize>,
    within: Range<usize>,
    result: Result<(), SinkFault>,
}

/// Copies that are, or will be, started together.
#[derive(Debug)]
struct CopyBatch<T> {
    /// From host memory.
    list: CopyList,
    /// From the GPU's own.
    within: CopyList,
    entries: VecDeque<Entry<T>>,
    event: EventId,
    bytes: u64,
    opened: Option<Instant>,
}

/// One stream and the batches under way in it, oldest first.
#[derive(Debug)]
struct Stream<T> {
    id: StreamId,
    flying: VecDeque<CopyBatch<T>>,
}

/// One GPU that this sink has delivered to.
#[derive(Debug)]
struct Gpu<T> {
    index: DeviceIndex,
    streams: Vec<Stream<T>>,
    /// The stream whose turn it is.
    turn: usize,
    open: CopyBatch<T>,
    spare: Vec<CopyBatch<T>>,
    /// Why this GPU takes no more copies.
    lost: Option<DriverError>,
}

/// Delivers to GPU memory; see the module's documentation.
#[derive(Debug)]
pub struct GpuSink<T> {
    driver: Arc<dyn Driver>,
    config: GpuSinkConfig,
    health: Arc<GpuHealth>,
    gpus: Vec<Gpu<T>>,
    /// Transfers whose ring is full, oldest first, and since when.
    parked: VecDeque<(Instant, Transfer<T>)>,
    /// Transfers that ended without a copy.
    ended: VecDeque<Finished<T>>,
    in_flight: usize,
}

impl<T> GpuSink<T> {
    /// A sink with streams and events on every GPU of `driver`.
    ///
    /// # Errors
    /// When the driver refuses to make them.
    pub fn new(
        driver: Arc<dyn Driver>,
        config: GpuSinkConfig,
        health: Arc<GpuHealth>,
    ) -> Result<Self, DriverError> {
        let mut sink = Self {
            driver,
            config,
            health,
            gpus: Vec::new(),
            parked: VecDeque::with_capacity(BATCH),
            ended: VecDeque::with_capacity(2 * BATCH),
            in_flight: 0,
        };
        for index in (0..sink.driver.devices().len()).map(DeviceIndex) {
            let gpu = sink.new_gpu(index)?;
            sink.gpus.push(gpu);
        }
        Ok(sink)
    }

    fn new_gpu(&self, index: DeviceIndex) -> Result<Gpu<T>, DriverError> {
        let GpuSinkConfig { streams, batch_pieces, batches_per_stream, .. } = self.config;
        let batch = || {
            let event = self.driver.create_event(index)?;
            let list = CopyList::with_capacity(2 * batch_pieces.max(1));
            let (within, entries) = (CopyList::default(), VecDeque::with_capacity(4 * BATCH));
            Ok(CopyBatch { list, within, entries, event, bytes: 0, opened: None })
        };
        let flying = streams.max(1) * batches_per_stream.max(1);
        let open = batch()?;
        let spare = (0..flying).map(|_| batch()).collect::<Result<_, _>>()?;
        let stream = |_| {
            let id = self.driver.create_stream(index)?;
            Ok(Stream { id, flying: VecDeque::with_capacity(flying) })
        };
        let streams = (0..streams.max(1)).map(stream).collect::<Result<_, _>>()?;
        Ok(Gpu { index, streams, turn: 0, open, spare, lost: None })
    }

    /// Ends a transfer without a copy.
    fn end(&mut self, Transfer { context, from, .. }: Transfer<T>, fault: SinkFault) {
        self.health.faults.fetch_add(1, Relaxed);
        self.ended.push_back(Finished { context, from, result: Err(fault) });
    }

    /// Takes a transfer; gives it back if its ring is full.
    fn take(&mut self, transfer: Transfer<T>) -> Option<Transfer<T>> {
        let (plane_bytes, planes) = (transfer.to.plane_bytes(), transfer.to.planes());
        if transfer.plane >= planes {
            let fault = SinkFault::NoSuchPlane { plane: transfer.plane, planes };
            self.end(transfer, fault);
            return None;
        }
        let slot_bytes = transfer.from.bytes();
        if plane_bytes > slot_bytes {
            let slot_bytes = usize::try_from(slot_bytes).unwrap_or(usize::MAX);
            self.end(transfer, SinkFault::SlotTooSmall { slot_bytes, plane_bytes });
            return None;
        }
        if let Decoded::Received(plane) = &transfer.from
            && transfer.to.device() != Some(plane.device())
        {
            self.end(transfer, SinkFault::OtherSink);
            return None;
        }
        let (device, sequence) = match &transfer.to {
            Destination::Pages { memory, .. } => (memory.device(), None),
            Destination::Ring { memory, .. } => match memory.producer().claim() {
                Ok(Some(sequence)) => (memory.device(), Some(sequence)),
                Ok(None) => return Some(transfer),
                Err(fault) => {
                    self.end(transfer, fault.into());
                    return None;
                }
            },
            Destination::Host { .. } => {
                self.end(transfer, SinkFault::OtherSink);
                return None;
            }
        };
        let gpu = &mut self.gpus[device.0];
        gpu.open.add(transfer, sequence, plane_bytes);
        if gpu.open.copies() >= self.config.batch_pieces || gpu.open.bytes >= self.config.batch_bytes {
            gpu.start(&*self.driver, &self.health);
        }
        None
    }

    /// Tries again for those whose ring was full.
    fn take_parked(&mut self, now: Instant) {
        for _ in 0..self.parked.len() {
            let Some((since, transfer)) = self.parked.pop_front() else { break };
            if !self.has_room(&transfer) {
                self.parked.push_back((since, transfer));
            } else if let Some(transfer) = self.take(transfer) {
                if now.duration_since(since) < self.config.ring_patience {
                    self.parked.push_back((since, transfer));
                } else {
                    self.end(transfer, SinkFault::RingFull);
                }
            }
        }
    }

    /// Whether a batch can take it.
    fn has_room(&self, transfer: &Transfer<T>) -> bool {
        let Some(device) = transfer.to.device() else { return true };
        let gpu = &self.gpus[device.0];
        let open = &gpu.open;
        open.copies() < self.config.batch_pieces && open.bytes < self.config.batch_bytes
    }
}

impl<T> CopyBatch<T> {
    /// Copies in it.
    fn copies(&self) -> usize {
        self.list.len() + self.within.len()
    }

    /// Adds the copies of a transfer.
    fn add(&mut self, transfer: Transfer<T>, sequence: Option<u64>, plane_bytes: u64) {
        let (first_piece, first_strided) = self.list.close();
        let (first_within, _) = self.within.close();
        let (list, within) = (&mut self.list, &mut self.within);
        let mut push = |run: Run| match &transfer.from {
            Decoded::Slot(slot) => list.push(Run { from: slot.addr() as u64 + run.from, ..run }),
            Decoded::Received(plane) => plane.parts(run, |part| within.push(part)),
        };
        let plane = transfer.plane;
        match &transfer.to {
            Destination::Pages { memory, table, first_token, tokens } => {
                let base = memory.base(plane).unwrap_or(0);
                let order = match &transfer.from {
                    Decoded::Slot(_) => memory.order(),
                    Decoded::Received(_) => SlotOrder::Tokens,
                };
                paged::runs(memory.kv(), plane, table, *first_token, *tokens, order, |run| {
                    push(Run { to: base + run.to, ..run });
                });
            }
            Destination::Ring { memory, .. } => {
                push(Run::row(memory.entry_address(sequence.unwrap_or(0)), 0, plane_bytes));
            }
            Destination::Host { .. } => {}
        }
        self.list.group();
        let (pieces, strided) = self.list.close();
        let (end_within, _) = self.within.close();
        self.bytes += plane_bytes;
        self.opened.get_or_insert_with(Instant::now);
        self.entries.push_back(Entry {
            transfer,
            sequence,
            pieces: first_piece..pieces,
            strided: first_strided..strided,
            within: first_within..end_within,
            result: Ok(()),
        });
    }

    /// Starts the copies of `pieces`, `strided` and `within`.
    fn copy(
        &self,
        driver: &dyn Driver,
        (device, stream): (DeviceIndex, StreamId),
        (pieces, strided, within): (Range<usize>, Range<usize>, Range<usize>),
    ) -> Result<(), DriverError> {
        if !pieces.is_empty() {
            // SAFETY: every source lies in the slot of an entry, which stays in this batch, and every destination in
            // memory that the entry keeps mapped, by `paged::runs` and `RingMemory`; the batch gives its entries back
            // only after its event.
            unsafe { driver.copy_pieces(device, stream, &self.list, pieces)? };
        }
        for run in &self.list.strided[strided] {
            // SAFETY: as above.
            unsafe { driver.copy_rows(device, stream, run)? };
        }
        if !within.is_empty() {
            // SAFETY: every source lies in the memory of a `Received`, which the entry keeps; the destinations as above.
            unsafe { driver.copy_within(device, stream, &self.within, within)? };
        }
        Ok(())
    }

    /// Starts all copies; those of each transfer alone if the driver does not take them together, so that one client's
    /// bad memory fails nobody else's planes. The error is that of a lost GPU.
    fn start(&mut self, driver: &dyn Driver, at: (DeviceIndex, StreamId)) -> Result<(), DriverError> {
        let all = (0..self.list.to.len(), 0..self.list.strided.len(), 0..self.within.to.len());
        let all = self.copy(driver, at, all);
        if let Err(error) = all {
            if error.sticky {
                return Err(error);
            }
            let mut entries = std::mem::take(&mut self.entries);
            let each = entries.iter_mut().try_for_each(|entry| {
                let own = (entry.pieces.clone(), entry.strided.clone(), entry.within.clone());
                match self.copy(driver, at, own) {
                    Err(error) if error.sticky => Err(error),
                    result => {
                        entry.result = result.map_err(SinkFault::from);
                        Ok(())
                    }
                }
            });
            self.entries = entries;
            each?;
        }
        driver.record(at.0, self.event, at.1)
    }

    /// Gives back transfers, as many as fit; whether all are back.
    fn give_back(&mut self, finished: &mut FinishedBatch<T>, lost: Option<DriverError>) -> bool {
        while !finished.is_full() {
            let Some(entry) = self.entries.pop_front() else { break };
            let Entry { transfer: Transfer { context, from, to, plane }, sequence, result, .. } = entry;
            let result = lost.map_or(result, |error| Err(error.into()));
            if let (Destination::Ring { memory, fetch, chunk, .. }, Some(sequence)) = (&to, sequence) {
                publish(memory, sequence, *fetch, *chunk, plane, to.plane_bytes(), result.is_ok());
            }
            finished.push(Finished { context, from, result });
        }
        self.entries.is_empty()
    }

    fn clear(&mut self) {
        self.list.clear();
        self.within.clear();
        (self.bytes, self.opened) = (0, None);
    }
}

fn publish(
    memory: &RingMemory,
    sequence: u64,
    fetch: u64,
    chunk: u32,
    plane: u32,
    plane_bytes: u64,
    delivered: bool,
) {
    let bytes = u32::try_from(plane_bytes).unwrap_or(u32::MAX);
    let descriptor = control::RingDescriptor { fetch, chunk, plane, bytes, delivered };
    memory.producer().publish(sequence, &descriptor);
}

impl<T> Gpu<T> {
    /// Starts the open batch in the next stream, if there is a spare batch to go on with.
    fn start(&mut self, driver: &dyn Driver, health: &GpuHealth) {
        if self.open.entries.is_empty() {
            return;
        }
        let Some(spare) = self.spare.pop() else { return };
        let mut batch = std::mem::replace(&mut self.open, spare);
        self.turn = (self.turn + 1) % self.streams.len();
        let stream = &mut self.streams[self.turn];
        health.batches.fetch_add(1, Relaxed);
        health.copies.fetch_add(batch.copies() as u64, Relaxed);
        health.bytes.fetch_add(batch.bytes, Relaxed);
        if self.lost.is_none()
            && let Err(error) = batch.start(driver, (self.index, stream.id))
        {
            // Without an event behind it nobody can know when a copy has ended: the GPU counts as lost.
            if !error.sticky {
                let _ = driver.synchronize(self.index, stream.id);
            }
            lose(&mut self.lost, health, error);
        }
        stream.flying.push_back(batch);
    }

    fn poll(&mut self, driver: &dyn Driver, health: &GpuHealth, finished: &mut FinishedBatch<T>) {
        for stream in &mut self.streams {
            while !finished.is_full()
                && let Some(batch) = stream.flying.front_mut()
            {
                if self.lost.is_none() {
                    match driver.query(self.index, batch.event) {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(error) => {
                            if !error.sticky {
                                let _ = driver.synchronize(self.index, stream.id);
                            }
                            lose(&mut self.lost, health, error);
                        }
                    }
                }
                if batch.give_back(finished, self.lost)
                    && let Some(mut batch) = stream.flying.pop_front()
                {
                    batch.clear();
                    self.spare.push(batch);
                }
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.streams.iter().all(|stream| stream.flying.is_empty())
    }
}

fn lose(lost: &mut Option<DriverError>, health: &GpuHealth, error: DriverError) {
    lost.get_or_insert(error);
    health.lost.get_or_init(|| error);
}

impl<T: Send> Sink<T> for GpuSink<T> {
    fn submit(&mut self, offered: &mut Batch<T>) -> usize {
        let (now, before) = (Instant::now(), offered.len());
        while self.parked.len() < BATCH
            && self.ended.len() < BATCH
            && offered.first().is_some_and(|transfer| self.has_room(transfer))
        {
            self.in_flight += 1;
            let transfer = offered.remove(0);
            // Behind those that wait for a ring, so that none overtakes another.
            let waits = matches!(transfer.to, Destination::Ring { .. }) && !self.parked.is_empty();
            let full = if waits { Some(transfer) } else { self.take(transfer) };
            if let Some(transfer) = full {
                self.health.ring_waits.fetch_add(1, Relaxed);
                self.parked.push_back((now, transfer));
            }
        }
        before - offered.len()
    }

    fn poll(&mut self, finished: &mut FinishedBatch<T>) -> usize {
        let before = finished.len();
        if self.in_flight == 0 {
            return 0;
        }
        for gpu in &mut self.gpus {
            gpu.poll(&*self.driver, &self.health, finished);
        }
        if !self.parked.is_empty() {
            self.take_parked(Instant::now());
        }
        while !finished.is_full()
            && let Some(end) = self.ended.pop_front()
        {
            finished.push(end);
        }
        let count = finished.len() - before;
        self.in_flight -= count;
        count
    }

    /// Starts an open batch if no other is under way on its GPU, or if it is old enough.
    fn flush(&mut self) {
        for gpu in &mut self.gpus {
            let Some(opened) = gpu.open.opened else { continue };
            if gpu.is_idle() || opened.elapsed() >= self.config.batch_age {
                gpu.start(&*self.driver, &self.health);
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl<T> Drop for GpuSink<T> {
    /// Waits for the copies under way: a slot must not be unmapped, nor a client's memory, while a GPU reads or writes it.
    fn drop(&mut self) {
        for gpu in &mut self.gpus {
            for stream in &mut gpu.streams {
                // An error means that the GPU is lost, and with it its copies.
                let _ = self.driver.synchronize(gpu.index, stream.id);
                self.driver.destroy_stream(gpu.index, stream.id);
            }
            let flying = gpu.streams.iter().flat_map(|stream| &stream.flying);
            for batch in flying.chain(&gpu.spare).chain([&gpu.open]) {
                self.driver.destroy_event(gpu.index, batch.event);
            }
        }
    }
}
