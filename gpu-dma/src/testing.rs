//! A driver without a GPU: its GPU memory is memory of this process, and its copies end when, and how, a test says.
//!
//! Used by the tests of this crate and of the data plane. It checks what a real driver leaves to its user: that copies
//! read registered memory, write mapped memory, and have ended before either is taken away.

use std::alloc::Layout;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::copies::{CopyList, Run};
use crate::driver::{Device, DeviceIndex, Driver, DriverError, EventId, ForNic, Mapping, NicUnfit, StreamId};

/// When copies end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Before the call returns.
    AtOnce,
    /// One step of one stream each time that an event is asked for, the stream being chosen by these random bits.
    Random(u64),
    /// When [`FakeDriver::step`] is called.
    ByHand,
}

/// Calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// [`Driver::register_host`]
    RegisterHost,
    /// [`Driver::open_ipc`]
    OpenIpc,
    /// [`Driver::copy_pieces`]
    CopyPieces,
    /// [`Driver::copy_rows`]
    CopyRows,
    /// [`Driver::read_rows`]
    ReadRows,
    /// [`Driver::copy_within`]
    CopyWithin,
    /// [`Driver::allocate_for_nic`]
    AllocateForNic,
    /// [`Driver::record`]
    Record,
    /// [`Driver::query`]
    Query,
}

/// A call that the fake was made to refuse: `CUDA_ERROR_INVALID_VALUE`.
#[must_use]
pub fn refused(call: &'static str) -> DriverError {
    DriverError { call, code: 1, name: "CUDA_ERROR_INVALID_VALUE", sticky: false }
}

/// A lost GPU: `CUDA_ERROR_ILLEGAL_ADDRESS`.
#[must_use]
pub fn lost(call: &'static str) -> DriverError {
    DriverError { call, code: 700, name: "CUDA_ERROR_ILLEGAL_ADDRESS", sticky: true }
}

#[derive(Debug)]
enum Step {
    Copy(Run),
    /// From the GPU to host memory.
    Read(Run),
    /// From one place in the GPU's memory to another.
    Within(Run),
    Mark(EventId),
}

#[derive(Debug)]
struct Allocation {
    device: usize,
    address: u64,
    memory: Box<[u64]>,
    bytes: u64,
    mapped: usize,
    alive: bool,
}

#[derive(Debug, Default)]
struct State {
    pace: Option<Pace>,
    next: u64,
    host: BTreeMap<usize, usize>,
    /// Memory that a NIC may write to, by its address: the GPU and the allocation.
    for_nic: BTreeMap<u64, (usize, Layout)>,
    allocations: HashMap<[u8; 64], Allocation>,
    streams: BTreeMap<(usize, u64), VecDeque<Step>>,
    events: HashMap<u64, bool>,
    failing: HashMap<Call, usize>,
    broken: HashMap<usize, DriverError>,
    /// Copies that ended, by destination address, in order.
    log: Vec<Run>,
    starts: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct FakeDriver {
    devices: Vec<Device>,
    state: Mutex<State>,
}

impl FakeDriver {
    /// A driver with `devices` GPUs; the UUID of number `n` is 16 times `n + 1`.
    #[must_use]
    pub fn new(devices: u8, pace: Pace) -> Self {
        let device = |n: u8| Device {
            ordinal: i32::from(n),
            uuid: [n + 1; 16],
            name: format!("fake {n}"),
            bytes: 1 << 30,
        };
        let state = State { pace: Some(pace), ..State::default() };
        Self { devices: (0..devices).map(device).collect(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// "Another process" allocates and exports `bytes` of GPU memory, all zeros.
    pub fn allocate(&self, device: usize, bytes: u64) -> [u8; 64] {
        let mut state = self.state();
        state.next += 1;
        let mut handle = [0xa5; 64];
        handle[..8].copy_from_slice(&state.next.to_le_bytes());
        let memory =
            vec![0u64; usize::try_from(bytes.div_ceil(8)).expect("a test's size")].into_boxed_slice();
        let address = memory.as_ptr().addr() as u64;
        let allocation = Allocation { device, address, memory, bytes, mapped: 0, alive: true };
        state.allocations.insert(handle, allocation);
        handle
    }

    /// What lies in an allocation.
    #[must_use]
    pub fn contents(&self, handle: &[u8; 64]) -> Vec<u8> {
        let state = self.state();
        let Some(allocation) = state.allocations.get(handle) else { return Vec::new() };
        let bytes = allocation.memory.iter().flat_map(|word| word.to_ne_bytes());
        bytes.take(usize::try_from(allocation.bytes).unwrap_or(0)).collect()
    }

    /// The process that allocated it dies: the handle opens nothing any more, and copies into it are lost GPUs.
    pub fn kill(&self, handle: &[u8; 64]) {
        if let Some(allocation) = self.state().allocations.get_mut(handle) {
            allocation.alive = false;
        }
    }

    /// How often an allocation is mapped now.
    #[must_use]
    pub fn mapped(&self, handle: &[u8; 64]) -> usize {
        self.state().allocations.get(handle).map_or(0, |allocation| allocation.mapped)
    }

    /// Host ranges registered now.
    #[must_use]
    pub fn registered(&self) -> usize {
        self.state().host.len()
    }

    /// Allocations that NICs may write to.
    #[must_use]
    pub fn for_nic(&self) -> usize {
        self.state().for_nic.len()
    }

    /// Lets the next `count` calls of a kind fail.
    pub fn fail(&self, call: Call, count: usize) {
        self.state().failing.insert(call, count);
    }

    /// Every further call on a GPU fails.
    pub fn break_device(&self, device: usize) {
        self.state().broken.insert(device, lost("cuEventQuery"));
    }

    /// Changes when copies end.
    pub fn set_pace(&self, pace: Pace) {
        self.state().pace = Some(pace);
    }

    /// Ends the oldest copy, or passes the oldest mark, of the `pick`-th stream (modulo their number) that has any.
    /// Whether there was one.
    pub fn step(&self, pick: usize) -> bool {
        self.state().step(pick)
    }

    /// Copies that have ended, in order.
    #[must_use]
    pub fn copied(&self) -> Vec<Run> {
        self.state().log.clone()
    }

    /// Calls that started copies.
    #[must_use]
    pub fn starts(&self) -> usize {
        self.state().starts
    }
}

impl State {
    fn fails(&mut self, call: Call) -> bool {
        match self.failing.get_mut(&call) {
            Some(count) if *count > 0 => {
                *count -= 1;
                true
            }
            _ => false,
        }
    }

    fn check(&mut self, device: DeviceIndex, call: Call, name: &'static str) -> Result<(), DriverError> {
        if let Some(&error) = self.broken.get(&device.0) {
            return Err(error);
        }
        if self.fails(call) { Err(refused(name)) } else { Ok(()) }
    }

    fn step(&mut self, pick: usize) -> bool {
        let busy: Vec<(usize, u64)> = self
            .streams
            .iter()
            .filter(|(at, steps)| !steps.is_empty() && !self.broken.contains_key(&at.0))
            .map(|(&at, _)| at)
            .collect();
        if busy.is_empty() {
            return false;
        }
        let at = busy[pick % busy.len()];
        match self.streams.get_mut(&at).and_then(VecDeque::pop_front) {
            Some(Step::Mark(event)) => drop(self.events.insert(event.0, true)),
            Some(step) => self.carry_out(at.0, &step),
            None => {}
        }
        true
    }

    fn carry_out(&mut self, device: usize, step: &Step) {
        match step {
            Step::Copy(run) => self.copy(device, run, false, |state, first, end| {
                state
                    .host
                    .iter()
                    .any(|(&start, &bytes)| start as u64 <= first && end <= (start + bytes) as u64)
            }),
            Step::Read(run) => self.copy(device, run, true, |state, first, end| {
                state
                    .host
                    .iter()
                    .any(|(&start, &bytes)| start as u64 <= first && end <= (start + bytes) as u64)
            }),
            Step::Within(run) => {
                self.copy(device, run, false, |state, first, end| state.is_for_nic(device, first, end));
            }
            Step::Mark(_) => {}
        }
    }

    /// Whether all of a range is memory of a GPU that NICs may write to.
    fn is_for_nic(&self, device: usize, first: u64, end: u64) -> bool {
        self.for_nic.iter().any(|(&start, (owner, layout))| {
            *owner == device && start <= first && end <= start + layout.size() as u64
        })
    }

    /// `known` says whether the other end, which is not in an allocation, may be used.
    fn copy(&mut self, device: usize, run: &Run, is_read: bool, known: impl Fn(&Self, u64, u64) -> bool) {
        for row in 0..run.rows {
            let (to, from) = (run.to + row * run.to_pitch, run.from + row * run.from_pitch);
            let (of_gpu, of_host) = if is_read { (from, to) } else { (to, from) };
            let lent = self.allocations.values().find(|allocation| {
                allocation.address <= of_gpu && of_gpu + run.bytes <= allocation.address + allocation.bytes
            });
            if let Some(target) = lent {
                assert!(
                    target.device == device && target.mapped > 0,
                    "a copy to or from memory that is not mapped"
                );
                if !target.alive {
                    self.broken.insert(device, lost("cuEventQuery"));
                    return;
                }
            } else {
                assert!(
                    self.is_for_nic(device, of_gpu, of_gpu + run.bytes),
                    "a copy reaches beyond every allocation"
                );
            }
            assert!(
                known(self, of_host, of_host + run.bytes),
                "a copy from or to memory that is not registered, or no NIC's"
            );
            let bytes = usize::try_from(run.bytes).expect("a test's size");
            let (to, from) = (usize::try_from(to).expect("an address"), usize::try_from(from).expect("one"));
            // SAFETY: one end lies in a registered range, or in one that NICs write to, which its owner keeps mapped and does not touch (of a copy to the
            // GPU: does not write to) before the copy has ended; the other lies in `memory` of an allocation, which lives
            // in this map and is only touched under the same lock.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    std::ptr::with_exposed_provenance::<u8>(from),
                    std::ptr::with_exposed_provenance_mut::<u8>(to),
                    bytes,
                );
            }
        }
        self.log.push(*run);
    }

    fn add(&mut self, device: DeviceIndex, stream: StreamId, steps: impl IntoIterator<Item = Step>) {
        self.streams.get_mut(&(device.0, stream.0)).expect("a stream that exists").extend(steps);
        if self.pace == Some(Pace::AtOnce) {
            while self.step(0) {}
        }
    }

    /// Starts copies as one batch. One that is refused may have begun, as with CUDA.
    fn start_pieces(
        &mut self,
        device: DeviceIndex,
        stream: StreamId,
        call: Call,
        list: &CopyList,
        pieces: Range<usize>,
        step: fn(Run) -> Step,
    ) -> Result<(), DriverError> {
        self.starts += 1;
        let failed = self.check(device, call, "cuMemcpyBatchAsync");
        let pieces = if failed.is_err() { pieces.start..pieces.start + pieces.len() / 2 } else { pieces };
        if !self.broken.contains_key(&device.0) {
            let run = |n: usize| Run::row(list.to[n], list.from[n], list.bytes[n] as u64);
            self.add(device, stream, pieces.map(|n| step(run(n))));
        }
        failed
    }
}

impl Driver for FakeDriver {
    fn devices(&self) -> &[Device] {
        &self.devices
    }

    unsafe fn register_host(&self, address: usize, bytes: usize) -> Result<(), DriverError> {
        let mut state = self.state();
        state.check(DeviceIndex(0), Call::RegisterHost, "cuMemHostRegister")?;
        state.host.insert(address, bytes);
        Ok(())
    }

    fn unregister_host(&self, address: usize) -> Result<(), DriverError> {
        let mut state = self.state();
        let bytes = state.host.remove(&address).ok_or(refused("cuMemHostUnregister"))?;
        let range = address as u64..(address + bytes) as u64;
        let broken = state.broken.keys().copied().collect::<Vec<_>>();
        let live = state.streams.iter().filter(|((device, _), _)| !broken.contains(device));
        let reads = live.flat_map(|(_, steps)| steps).any(|step| match step {
            Step::Copy(run) => range.contains(&run.from),
            Step::Read(run) => range.contains(&run.to),
            Step::Within(_) | Step::Mark(_) => false,
        });
        assert!(!reads, "memory is unregistered while copies from it are under way");
        Ok(())
    }

    fn open_ipc(&self, device: DeviceIndex, handle: &[u8; 64]) -> Result<Mapping, DriverError> {
        let mut state = self.state();
        state.check(device, Call::OpenIpc, "cuIpcOpenMemHandle")?;
        match state.allocations.get_mut(handle) {
            Some(allocation) if allocation.alive && allocation.device == device.0 => {
                allocation.mapped += 1;
                Ok(Mapping { address: allocation.address, bytes: allocation.bytes })
            }
            _ => Err(refused("cuIpcOpenMemHandle")),
        }
    }

    fn close_ipc(&self, device: DeviceIndex, address: u64) -> Result<(), DriverError> {
        let mut state = self.state();
        let broken = state.broken.contains_key(&device.0);
        let allocation = state.allocations.values_mut().find(|allocation| allocation.address == address);
        let allocation = allocation.ok_or(refused("cuIpcCloseMemHandle"))?;
        allocation.mapped -= 1;
        let range = address..address + allocation.bytes;
        let last = allocation.mapped == 0 && !broken;
        let writes = state.streams.values().flatten().any(|step| match step {
            Step::Copy(run) | Step::Within(run) => range.contains(&run.to),
            Step::Read(run) => range.contains(&run.from),
            Step::Mark(_) => false,
        });
        assert!(!(last && writes), "memory is unmapped while copies to it are under way");
        Ok(())
    }

    fn create_stream(&self, device: DeviceIndex) -> Result<StreamId, DriverError> {
        let mut state = self.state();
        state.next += 1;
        let stream = StreamId(state.next);
        state.streams.insert((device.0, stream.0), VecDeque::new());
        Ok(stream)
    }

    fn destroy_stream(&self, device: DeviceIndex, stream: StreamId) {
        self.state().streams.remove(&(device.0, stream.0));
    }

    fn create_event(&self, _device: DeviceIndex) -> Result<EventId, DriverError> {
        let mut state = self.state();
        state.next += 1;
        Ok(EventId(state.next))
    }

    fn destroy_event(&self, _device: DeviceIndex, event: EventId) {
        self.state().events.remove(&event.0);
    }

    fn record(&self, device: DeviceIndex, event: EventId, stream: StreamId) -> Result<(), DriverError> {
        let mut state = self.state();
        state.check(device, Call::Record, "cuEventRecord")?;
        state.events.insert(event.0, false);
        state.add(device, stream, [Step::Mark(event)]);
        Ok(())
    }

    fn query(&self, device: DeviceIndex, event: EventId) -> Result<bool, DriverError> {
        let mut state = self.state();
        if let Some(Pace::Random(bits)) = state.pace {
            // A step of a linear congruential generator: good enough to choose streams by.
            let bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.pace = Some(Pace::Random(bits));
            state.step(usize::try_from(bits >> 40).unwrap_or(0));
        }
        state.check(device, Call::Query, "cuEventQuery")?;
        Ok(state.events.get(&event.0).copied().unwrap_or(true))
    }

    fn synchronize(&self, device: DeviceIndex, stream: StreamId) -> Result<(), DriverError> {
        let mut state = self.state();
        loop {
            if let Some(&error) = state.broken.get(&device.0) {
                return Err(error);
            }
            match state.streams.get_mut(&(device.0, stream.0)).and_then(VecDeque::pop_front) {
                Some(Step::Mark(event)) => drop(state.events.insert(event.0, true)),
                Some(step) => state.carry_out(device.0, &step),
                None => return Ok(()),
            }
        }
    }

    unsafe fn copy_pieces(
        &self,
        device: DeviceIndex,
        stream: StreamId,
        list: &CopyList,
        pieces: Range<usize>,
    ) -> Result<(), DriverError> {
        self.state().start_pieces(device, stream, Call::CopyPieces, list, pieces, Step::Copy)
    }

    unsafe fn copy_rows(&self, device: DeviceIndex, stream: StreamId, run: &Run) -> Result<(), DriverError> {
        let mut state = self.state();
        state.starts += 1;
        state.check(device, Call::CopyRows, "cuMemcpy2DAsync")?;
        state.add(device, stream, [Step::Copy(*run)]);
        Ok(())
    }

    unsafe fn read_rows(&self, device: DeviceIndex, stream: StreamId, run: &Run) -> Result<(), DriverError> {
        let mut state = self.state();
        state.starts += 1;
        state.check(device, Call::ReadRows, "cuMemcpy2DAsync")?;
        state.add(device, stream, [Step::Read(*run)]);
        Ok(())
    }

    unsafe fn copy_within(
        &self,
        device: DeviceIndex,
        stream: StreamId,
        list: &CopyList,
        pieces: Range<usize>,
    ) -> Result<(), DriverError> {
        self.state().start_pieces(device, stream, Call::CopyWithin, list, pieces, Step::Within)
    }

    fn allocate_for_nic(&self, device: DeviceIndex, bytes: usize) -> Result<ForNic, NicUnfit> {
        let mut state = self.state();
        state.check(device, Call::AllocateForNic, "cuMemAlloc")?;
        let layout = Layout::from_size_align(bytes.max(1), 64 << 10).map_err(|_| refused("cuMemAlloc"))?;
        // SAFETY: at least one byte.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        if memory.is_null() {
            return Err(refused("cuMemAlloc").into());
        }
        let address = memory.expose_provenance() as u64;
        state.for_nic.insert(address, (device.0, layout));
        Ok(ForNic { address, dma_buf: None, is_cpu_memory: true })
    }

    fn free_for_nic(&self, device: DeviceIndex, memory: &ForNic) {
        let mut state = self.state();
        let (owner, layout) = state.for_nic.remove(&memory.address).expect("memory that was allocated");
        assert_eq!(owner, device.0, "freed on the GPU that it was allocated on");
        let range = memory.address..memory.address + layout.size() as u64;
        let live = state.streams.iter().filter(|((device, _), _)| !state.broken.contains_key(device));
        let reads = live.flat_map(|(_, steps)| steps);
        let reads =
            reads.filter(|step| matches!(step, Step::Within(run) if range.contains(&run.from))).count();
        assert_eq!(reads, 0, "memory is freed while copies from it are under way");
        let start = usize::try_from(memory.address).expect("an address");
        // SAFETY: allocated with this layout, and freed once: it was in the list.
        unsafe { std::alloc::dealloc(std::ptr::with_exposed_provenance_mut(start), layout) };
    }

    fn method(&self) -> &'static str {
        "faked"
    }
}
