//! Reading planes out of a paged KV cache against a fake driver: whatever the layout, what was scattered by a sink comes back;
//! and what happens when the driver refuses.

use std::sync::Arc;
use std::time::Duration;

use control::{
    DeviceUuid, ElementType, GpuAllocation, IpcHandle, LayerBase, PageStrides, PagedKv, PlaneBase,
};
use gpu_dma::testing::{Call, FakeDriver, Pace, lost};
use gpu_dma::{
    Batch, Destination, Driver, FinishedBatch, GpuHealth, GpuSink, GpuSinkConfig, GpuSource, Origin,
    PagedMemory, Read, ReadBatch, ReadDone, Sink, SlotOrder, Source, SourceFault, Sources, Transfer, paged,
    pin,
};
use hugepages::{Arena, ArenaConfig, PageChoice, Slot, Slots};
use proptest::prelude::*;

const PAGES: u32 = 9;
const HEADS: u16 = 3;
const HEAD_DIM: u16 = 4;

struct Bench {
    fake: Arc<FakeDriver>,
    health: Arc<GpuHealth>,
    slots: Vec<Slot>,
}

impl Bench {
    fn new(pace: Pace) -> Self {
        let fake = Arc::new(FakeDriver::new(1, pace));
        let driver: Arc<dyn Driver> = fake.clone();
        let config = ArenaConfig { name: "source", bytes: 8 * 4096, page: PageChoice::Base, numa_node: None };
        let pinned = pin(&driver, Arena::new(config).unwrap()).unwrap();
        let slots = Slots::new(pinned, 4096).unwrap().take();
        Self { fake, health: Arc::default(), slots }
    }

    fn driver(&self) -> Arc<dyn Driver> {
        self.fake.clone()
    }

    /// A cache of one layer; `hnd` says that heads vary slower than tokens within a page.
    fn pages(&self, page_tokens: u16, hnd: bool) -> Arc<PagedMemory> {
        let element = ElementType::Bf16;
        let (head, token) = (u64::from(HEAD_DIM) * 2, u64::from(HEADS) * u64::from(HEAD_DIM) * 2);
        let page_bytes = u64::from(page_tokens) * token;
        let nhd = PageStrides::nhd(page_tokens, HEADS, HEAD_DIM, element);
        let by_head = PageStrides { page: page_bytes, token: head, head: u64::from(page_tokens) * head };
        let strides = if hnd { by_head } else { nhd };
        let bytes = 2 * u64::from(PAGES) * page_bytes;
        let handle = self.fake.allocate(0, bytes);
        let base = |offset| PlaneBase::new(0, offset);
        let kv = PagedKv {
            device: DeviceUuid([1; 16]),
            allocations: vec![GpuAllocation { handle: IpcHandle::new(handle), bytes }],
            element,
            page_tokens,
            pages: PAGES,
            kv_heads: HEADS,
            head_dim: HEAD_DIM,
            k: strides,
            v: strides,
            layers: vec![LayerBase { k: base(0), v: base(u64::from(PAGES) * page_bytes) }],
        };
        assert_eq!(kv.check(), Ok(()));
        Arc::new(PagedMemory::open(&self.driver(), kv).unwrap())
    }

    fn source(&self) -> Sources<u32> {
        Sources::new(Some(GpuSource::new(self.driver(), Arc::clone(&self.health)).unwrap()))
    }

    fn read(&mut self, memory: &Arc<PagedMemory>, table: &[u32], first_token: u64, tokens: u16) -> Read<u32> {
        let slot = Box::new(self.slots.pop().unwrap());
        let from = Origin::Pages { memory: Arc::clone(memory), table: table.into(), first_token, tokens };
        Read { context: 5, slot, from, plane: 1 }
    }
}

/// Polls until the reads have ended; the fake's streams advance by a step each time.
fn finish(bench: &Bench, source: &mut Sources<u32>) -> Vec<ReadDone<u32>> {
    let (mut done, mut all) = (ReadBatch::new(), Vec::new());
    for turn in 0..10_000 {
        source.poll(&mut done);
        all.extend(done.drain(..));
        if source.in_flight() == 0 {
            return all;
        }
        bench.fake.step(turn);
    }
    panic!("the reads do not end");
}

proptest! {
    #[test]
    fn what_a_sink_scattered_a_source_gathers(
        page_tokens in 16_u16..40, hnd: bool, first in 0_u64..60, tokens in 1_u16..150, seed: u8, at_once: bool,
    ) {
        let pages = (first + u64::from(tokens)).div_ceil(u64::from(page_tokens));
        prop_assume!(pages <= u64::from(PAGES));
        // Pages in no order.
        let table: Vec<u32> = (0..u32::try_from(pages).unwrap()).map(|at| (at * 4 + u32::from(seed)) % PAGES).collect();
        let mut bench = Bench::new(if at_once { Pace::AtOnce } else { Pace::ByHand });
        let memory = bench.pages(page_tokens, hnd);
        let bytes = usize::from(tokens) * usize::from(HEADS) * usize::from(HEAD_DIM) * 2;
        prop_assume!(bytes <= 4096);
        let plane: Vec<u8> = (0..bytes).map(|at| (at * 31 + usize::from(seed)).to_le_bytes()[0]).collect();

        let mut sink = GpuSink::new(bench.driver(), GpuSinkConfig { batch_age: Duration::ZERO, ..GpuSinkConfig::default() }, Arc::default()).unwrap();
        let mut slot = Box::new(bench.slots.pop().unwrap());
        match memory.order() {
            SlotOrder::Tokens => slot.as_mut_slice()[..bytes].copy_from_slice(&plane),
            SlotOrder::Pages => paged::by_page(memory.kv(), first, tokens, &plane, &mut slot.as_mut_slice()[..bytes]),
        }
        let to = Destination::Pages { memory: Arc::clone(&memory), table: table.as_slice().into(), first_token: first, tokens };
        let mut offered = Batch::new();
        offered.push(Transfer { context: 1, from: slot.into(), to, plane: 1 });
        let mut finished = FinishedBatch::new();
        for turn in 0..10_000 {
            sink.submit(&mut offered);
            sink.flush();
            bench.fake.step(turn);
            if sink.poll(&mut finished) > 0 {
                break;
            }
        }
        prop_assert!(finished[0].result.is_ok());

        let mut source = bench.source();
        let read = bench.read(&memory, &table, first, tokens);
        source.submit(read).unwrap();
        let done = finish(&bench, &mut source);
        prop_assert_eq!((done.len(), done[0].context, done[0].result), (1, 5, Ok(())));
        prop_assert_eq!(&done[0].slot.as_slice()[..bytes], &plane[..]);
    }
}

#[test]
fn a_read_that_the_driver_refuses_ends_with_its_fault_and_the_next_one_works() {
    let mut bench = Bench::new(Pace::ByHand);
    let memory = bench.pages(16, false);
    let mut source = bench.source();
    for call in [Call::ReadRows, Call::Record] {
        bench.fake.fail(call, 1);
        let read = bench.read(&memory, &[3, 1], 0, 32);
        source.submit(read).unwrap();
        let done = finish(&bench, &mut source);
        assert!(
            matches!(done[0].result, Err(SourceFault::Device(error)) if !error.sticky),
            "{:?}",
            done[0].result
        );
        assert_eq!(bench.health.lost(), None);
    }
    let read = bench.read(&memory, &[3, 1], 0, 32);
    source.submit(read).unwrap();
    assert_eq!(finish(&bench, &mut source)[0].result, Ok(()));
}

#[test]
fn a_lost_gpu_is_noted_and_reads_nothing_more() {
    let mut bench = Bench::new(Pace::ByHand);
    let memory = bench.pages(16, false);
    let mut source = bench.source();
    let read = bench.read(&memory, &[3, 1], 0, 32);
    source.submit(read).unwrap();
    bench.fake.break_device(0);
    assert!(finish(&bench, &mut source)[0].result.is_err());
    assert_eq!(bench.health.lost().map(|error| error.code), Some(lost("x").code));
    let read = bench.read(&memory, &[3, 1], 0, 32);
    source.submit(read).unwrap();
    assert!(matches!(finish(&bench, &mut source)[0].result, Err(SourceFault::Device(_))));
}

#[test]
fn without_a_gpu_and_beyond_the_cache_reads_end_with_a_fault() {
    let mut bench = Bench::new(Pace::AtOnce);
    let memory = bench.pages(16, false);
    let mut none = Sources::new(None);
    let read = bench.read(&memory, &[0], 0, 16);
    none.submit(read).unwrap();
    assert_eq!(finish(&bench, &mut none)[0].result, Err(SourceFault::OtherSource));
    let mut source = bench.source();
    let mut read = bench.read(&memory, &[0], 0, 16);
    read.plane = 2;
    source.submit(read).unwrap();
    assert_eq!(finish(&bench, &mut source)[0].result, Err(SourceFault::NoSuchPlane { plane: 2, planes: 2 }));
}

#[test]
fn a_source_that_is_dropped_waits_for_its_copies() {
    let mut bench = Bench::new(Pace::ByHand);
    let memory = bench.pages(16, true);
    let mut source = bench.source();
    let read = bench.read(&memory, &[3, 1], 0, 32);
    source.submit(read).unwrap();
    // Unmapping memory, or unregistering it, under a copy makes the fake panic.
    drop(source);
    drop(memory);
    drop(std::mem::take(&mut bench.slots));
}
