//! The sinks in GPU memory against a fake driver: what arrives, in which order, and what happens when it does not.

use std::sync::Arc;
use std::time::Duration;

use control::{
    DeviceUuid, ElementType, GpuAllocation, GpuRingError, IpcHandle, LayerBase, PageStrides, PagedKv,
    PlaneBase, RingConsumer, RingKv, ring_words_bytes,
};
use gpu_dma::testing::{Call, FakeDriver, Pace, lost, refused};
use gpu_dma::{
    Batch, ChunkShape, Decoded, Destination, DeviceIndex, Driver, FinishedBatch, GpuHealth, GpuSink,
    GpuSinkConfig, OpenError, PagedMemory, ReceiveMemory, Received, RingMemory, Sink, SinkFault, Sinks,
    Transfer, pin, yardstick,
};
use hugepages::{Arena, ArenaConfig, DeviceWritable, PageChoice, Slot, Slots};
use proptest::prelude::*;

const PAGE_TOKENS: u16 = 16;
const PAGES: u32 = 12;
const PAGE_BYTES: u64 = 16 * 2 * 4 * 2;
const PLANE_BYTES: usize = 32 * 2 * 4 * 2;
const SHAPE: ChunkShape = ChunkShape { layers: 1, tokens: 32, kv_heads: 2, head_dim: 4 };

fn arena(bytes: usize) -> Arena {
    Arena::new(ArenaConfig { name: "gpu-sink-test", bytes, page: PageChoice::Base, numa_node: None }).unwrap()
}

/// A serving process's cache of one layer, K and then V, on one GPU.
fn describe(device: u8, handle: [u8; 64]) -> PagedKv {
    let element = ElementType::Bf16;
    let strides = PageStrides::nhd(PAGE_TOKENS, 2, 4, element);
    let base = |offset| PlaneBase::new(0, offset);
    PagedKv {
        device: DeviceUuid([device + 1; 16]),
        allocations: vec![GpuAllocation {
            handle: IpcHandle::new(handle),
            bytes: 2 * u64::from(PAGES) * PAGE_BYTES,
        }],
        element,
        page_tokens: PAGE_TOKENS,
        pages: PAGES,
        kv_heads: 2,
        head_dim: 4,
        k: strides,
        v: strides,
        layers: vec![LayerBase { k: base(0), v: base(u64::from(PAGES) * PAGE_BYTES) }],
    }
}

struct Bench {
    fake: Arc<FakeDriver>,
    health: Arc<GpuHealth>,
    #[expect(clippy::vec_box, reason = "a transfer carries its slot in a box")]
    slots: Vec<Box<Slot>>,
    // Dropped before `fake` is looked at by the tests: see `the_arena_is_unregistered_before_it_is_unmapped`.
    sink: Option<Sinks<u32>>,
}

fn config() -> GpuSinkConfig {
    GpuSinkConfig {
        streams: 3,
        batch_pieces: 6,
        batch_bytes: 1 << 20,
        batch_age: Duration::ZERO,
        batches_per_stream: 2,
        ring_patience: Duration::from_secs(60),
    }
}

impl Bench {
    fn new(devices: u8, pace: Pace, config: GpuSinkConfig) -> Self {
        let fake = Arc::new(FakeDriver::new(devices, pace));
        let driver: Arc<dyn Driver> = fake.clone();
        let pinned = pin(&driver, arena(64 * 4096)).unwrap();
        let slots = Slots::new(pinned, 4096).unwrap().take().into_iter().map(Box::new).collect();
        let health = Arc::new(GpuHealth::default());
        let sink = GpuSink::new(driver, config, Arc::clone(&health)).unwrap();
        Self { fake, health, slots, sink: Some(Sinks::new(Some(sink))) }
    }

    fn driver(&self) -> Arc<dyn Driver> {
        self.fake.clone()
    }

    fn pages(&self, device: u8) -> ([u8; 64], Arc<PagedMemory>) {
        let handle = self.fake.allocate(usize::from(device), 2 * u64::from(PAGES) * PAGE_BYTES);
        let kv = describe(device, handle);
        assert_eq!(kv.check(), Ok(()));
        (handle, Arc::new(PagedMemory::open(&self.driver(), kv).unwrap()))
    }

    fn ring(&self, entries: u32) -> ([u8; 64], Arc<RingMemory>, RingConsumer) {
        let handle = self.fake.allocate(0, 4096 * u64::from(entries));
        let words = Arc::new(arena(ring_words_bytes(entries)));
        let consumer = RingConsumer::create(Arc::clone(&words), entries, 512, 9).unwrap();
        let ring = RingKv {
            device: DeviceUuid([1; 16]),
            allocation: GpuAllocation { handle: IpcHandle::new(handle), bytes: 512 * u64::from(entries) },
            element: ElementType::Bf16,
            offset: 0,
            entry_bytes: 512,
            entries,
            generation: 9,
        };
        assert_eq!(ring.check(), Ok(()));
        (handle, Arc::new(RingMemory::open(&self.driver(), ring, words).unwrap()), consumer)
    }

    /// A plane full of one byte on its way to two pages.
    fn page_transfer(
        &mut self,
        number: u32,
        memory: &Arc<PagedMemory>,
        pages: [u32; 2],
        plane: u32,
    ) -> Transfer<u32> {
        let mut slot = self.slots.pop().expect("a free slot");
        slot.as_mut_slice()[..PLANE_BYTES].fill(fill(number));
        let to = Destination::Pages {
            memory: Arc::clone(memory),
            table: Arc::from(pages),
            first_token: 0,
            tokens: 32,
        };
        Transfer { context: number, from: slot.into(), to, plane }
    }

    fn ring_transfer(&mut self, number: u32, memory: &Arc<RingMemory>) -> Transfer<u32> {
        let mut slot = self.slots.pop().expect("a free slot");
        slot.as_mut_slice()[..PLANE_BYTES].fill(fill(number));
        let to = Destination::Ring { memory: Arc::clone(memory), fetch: 77, chunk: number, shape: SHAPE };
        Transfer { context: number, from: slot.into(), to, plane: number % 2 }
    }

    fn sink(&mut self) -> &mut Sinks<u32> {
        self.sink.as_mut().unwrap()
    }

    /// One turn of the dma stage: the ends that it saw.
    fn turn(&mut self, offered: &mut Batch<u32>) -> Vec<(u32, Result<(), SinkFault>)> {
        let sink = self.sink();
        sink.submit(offered);
        sink.flush();
        let mut finished = FinishedBatch::new();
        sink.poll(&mut finished);
        finished
            .into_iter()
            .map(|end| {
                self.slots.extend(end.from.into_slot());
                (end.context, end.result)
            })
            .collect()
    }

    fn turns(&mut self, offered: &mut Batch<u32>, count: usize) -> Vec<(u32, Result<(), SinkFault>)> {
        let mut ended = Vec::new();
        for _ in 0..10_000 {
            ended.extend(self.turn(offered));
            if ended.len() == count {
                assert!(offered.is_empty() && self.sink().in_flight() == 0);
                return ended;
            }
        }
        panic!("{} of {count} transfers ended", ended.len());
    }
}

fn fill(number: u32) -> u8 {
    number.to_le_bytes()[0] + 1
}

fn page(contents: &[u8], plane: u32, page: u32) -> &[u8] {
    let at = usize::try_from((plane * PAGES + page) * u32::try_from(PAGE_BYTES).unwrap()).unwrap();
    &contents[at..at + usize::try_from(PAGE_BYTES).unwrap()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Copies end in any order between streams; every plane lies in its pages and every slot comes back, once.
    #[test]
    fn planes_reach_their_pages_in_any_order_of_completion(
        seed in any::<u64>(),
        plan in prop::collection::vec((0..2u8, 0..2u32, 0..6u32), 1..40),
        streams in 1..4usize, batch_pieces in 1..9usize, per_stream in 1..3usize,
    ) {
        let config = GpuSinkConfig { streams, batch_pieces, batches_per_stream: per_stream, ..config() };
        let mut bench = Bench::new(2, Pace::Random(seed), config);
        let caches = [bench.pages(0), bench.pages(1)];
        let slots = bench.slots.len();
        let mut offered = Batch::new();
        let mut ended = Vec::new();
        // The last one to a place is not known to be the last to arrive: each place is used once.
        let mut used = std::collections::HashMap::new();
        for (number, &(device, plane, pair)) in (0u32..).zip(&plan) {
            if used.contains_key(&(device, plane, pair)) {
                continue;
            }
            used.insert((device, plane, pair), number);
            let pages = [2 * pair + 1, 2 * pair];
            let transfer = bench.page_transfer(number, &caches[usize::from(device)].1, pages, plane);
            offered.push(transfer);
            ended.extend(bench.turn(&mut offered));
        }
        for _ in 0..100_000 {
            if bench.sink().in_flight() == 0 && offered.is_empty() {
                break;
            }
            ended.extend(bench.turn(&mut offered));
        }
        prop_assert!(ended.iter().all(|(_, result)| result.is_ok()));
        prop_assert_eq!(bench.slots.len(), slots);
        let mut numbers: Vec<u32> = ended.iter().map(|&(number, _)| number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        prop_assert_eq!(numbers.len(), ended.len(), "each ends once");
        for ((device, plane, pair), number) in used {
            let contents = bench.fake.contents(&caches[usize::from(device)].0);
            for at in [2 * pair, 2 * pair + 1] {
                prop_assert!(page(&contents, plane, at).iter().all(|&byte| byte == fill(number)));
            }
        }
    }
}

#[test]
fn batches_of_one_stream_end_in_order_and_hold_their_slots_until_then() {
    let mut bench = Bench::new(1, Pace::ByHand, GpuSinkConfig { streams: 1, ..config() });
    let (_, memory) = bench.pages(0);
    let free = bench.slots.len();
    let mut offered = Batch::new();
    for number in 0..6 {
        let transfer = bench.page_transfer(number, &memory, [2 * number, 2 * number + 1], 0);
        offered.push(transfer);
        assert_eq!(bench.turn(&mut offered), []);
    }
    assert_eq!((bench.slots.len(), bench.sink().in_flight()), (free - 6, 6));
    let mut ended = Vec::new();
    while bench.fake.step(0) {
        ended.extend(bench.turn(&mut offered));
    }
    ended.extend(bench.turns(&mut offered, 6 - ended.len()));
    assert_eq!(ended, (0..6).map(|number| (number, Ok(()))).collect::<Vec<_>>());
    assert_eq!(bench.slots.len(), free);
}

#[test]
fn a_full_sink_takes_no_more_until_copies_end() {
    let limits = GpuSinkConfig { streams: 1, batch_pieces: 2, batches_per_stream: 1, ..config() };
    let mut bench = Bench::new(1, Pace::ByHand, limits);
    let (_, memory) = bench.pages(0);
    let mut offered = Batch::new();
    for number in 0..4 {
        // Pages in descending order are two pieces, which make a batch.
        let transfer = bench.page_transfer(number, &memory, [number + 6, number], 0);
        offered.push(transfer);
    }
    let driver = bench.driver();
    let mut sink = GpuSink::new(driver, limits, Arc::default()).unwrap();
    assert_eq!(sink.submit(&mut offered), 2, "one batch under way and one that waits for its turn");
    sink.flush();
    assert_eq!(sink.submit(&mut offered), 0);
    let mut finished = FinishedBatch::new();
    while bench.fake.step(0) {}
    assert_eq!((sink.poll(&mut finished), sink.in_flight()), (1, 1));
    sink.flush();
    assert_eq!(sink.submit(&mut offered), 1);
    bench.fake.set_pace(Pace::AtOnce);
    drop(sink);
}

#[test]
fn small_transfers_share_a_batch_while_another_is_under_way() {
    let limits =
        GpuSinkConfig { streams: 1, batch_pieces: 64, batch_age: Duration::from_secs(3600), ..config() };
    let mut bench = Bench::new(1, Pace::ByHand, limits);
    let (_, memory) = bench.pages(0);
    let mut offered = Batch::new();
    for number in 0..5 {
        let transfer = bench.page_transfer(number, &memory, [number + 6, number], 0);
        offered.push(transfer);
        bench.turn(&mut offered);
    }
    assert_eq!(bench.fake.starts(), 1, "the first at once, the others wait for its end");
    while bench.fake.step(0) {}
    bench.turn(&mut offered);
    bench.turn(&mut offered);
    assert_eq!(bench.fake.starts(), 2, "and go together");
}

#[test]
fn one_client_s_refused_copy_fails_no_other() {
    let mut bench = Bench::new(1, Pace::AtOnce, config());
    let (handle, memory) = bench.pages(0);
    let mut offered = Batch::new();
    for number in 0..3 {
        let transfer = bench.page_transfer(number, &memory, [2 * number, 2 * number + 1], 0);
        offered.push(transfer);
    }
    // The batch, and then the first of its transfers alone.
    bench.fake.fail(Call::CopyPieces, 2);
    let ended = bench.turns(&mut offered, 3);
    let refused = Err(SinkFault::Device(refused("cuMemcpyBatchAsync")));
    assert_eq!(ended, [(0, refused), (1, Ok(())), (2, Ok(()))]);
    let contents = bench.fake.contents(&handle);
    assert!((2..6).all(|at| page(&contents, 0, at)[0] == fill(at / 2)));
    assert_eq!(bench.health.lost(), None);
}

#[test]
fn a_lost_gpu_fails_its_planes_and_no_other_gpu_s() {
    let mut bench = Bench::new(2, Pace::ByHand, config());
    let caches = [bench.pages(0), bench.pages(1)];
    let free = bench.slots.len();
    let mut offered = Batch::new();
    for number in 0..8 {
        let device = usize::from(number % 2 == 1);
        let transfer = bench.page_transfer(number, &caches[device].1, [number, number + 2], 0);
        offered.push(transfer);
        bench.turn(&mut offered);
    }
    bench.fake.break_device(0);
    bench.fake.set_pace(Pace::Random(5));
    let mut ended = bench.turns(&mut offered, 8);
    ended.sort_unstable_by_key(|end| end.0);
    let error = lost("cuEventQuery");
    for (number, result) in ended {
        let expected = if number % 2 == 0 { Err(SinkFault::Device(error)) } else { Ok(()) };
        assert_eq!(result, expected, "{number}");
    }
    assert_eq!((bench.health.lost(), bench.slots.len()), (Some(error), free));
    // What comes later fails too, and the slots come back.
    let transfer = bench.page_transfer(9, &caches[0].1, [0, 1], 0);
    offered.push(transfer);
    assert_eq!(bench.turns(&mut offered, 1), [(9, Err(SinkFault::Device(error)))]);
}

#[test]
fn an_event_that_cannot_be_recorded_is_a_lost_gpu() {
    let mut bench = Bench::new(1, Pace::ByHand, config());
    let (_, memory) = bench.pages(0);
    let mut offered = Batch::new();
    let transfer = bench.page_transfer(0, &memory, [0, 1], 0);
    offered.push(transfer);
    bench.fake.fail(Call::Record, 1);
    let fault = refused("cuEventRecord");
    assert_eq!(bench.turns(&mut offered, 1), [(0, Err(SinkFault::Device(fault)))]);
    assert_eq!(bench.fake.copied().len(), 1, "the slot came back only when its copy had ended");
    assert_eq!(bench.health.lost(), Some(fault));
}

/// The memory of a process that died stays until it is closed; a driver that loses the device over it loses it in order.
#[test]
fn a_client_that_dies_in_mid_copy() {
    let mut bench = Bench::new(1, Pace::ByHand, config());
    let (handle, memory) = bench.pages(0);
    let mut offered = Batch::new();
    let transfer = bench.page_transfer(0, &memory, [3, 8], 1);
    offered.push(transfer);
    bench.turn(&mut offered);
    drop(memory);
    assert_eq!(bench.fake.mapped(&handle), 1, "mapped for as long as the copy is under way");
    while bench.fake.step(0) {}
    assert_eq!(bench.turns(&mut offered, 1), [(0, Ok(()))]);
    assert_eq!(bench.fake.mapped(&handle), 0);

    let (handle, memory) = bench.pages(0);
    let transfer = bench.page_transfer(1, &memory, [3, 8], 1);
    offered.push(transfer);
    bench.turn(&mut offered);
    bench.fake.kill(&handle);
    bench.fake.step(0);
    let ended = bench.turns(&mut offered, 1);
    assert_eq!(ended, [(1, Err(SinkFault::Device(lost("cuEventQuery"))))]);
}

#[test]
fn handles_that_are_not_what_they_should_be() {
    let bench = Bench::new(2, Pace::AtOnce, config());
    let driver = bench.driver();
    let handle = bench.fake.allocate(0, 2 * u64::from(PAGES) * PAGE_BYTES);
    let open = |kv: PagedKv| PagedMemory::open(&driver, kv).unwrap_err();
    let unknown = PagedKv { device: DeviceUuid([9; 16]), ..describe(0, handle) };
    assert_eq!(
        open(unknown).to_string(),
        "this data plane does not use the GPU GPU-09090909-0909-0909-0909-090909090909: name it in --gpu, and see that \
         both processes may use it"
    );
    assert!(matches!(open(describe(1, handle)), OpenError::Handle { allocation: 0, .. }), "of another GPU");
    assert!(matches!(open(describe(0, [0; 64])), OpenError::Handle { .. }), "of nothing");
    let mut larger = describe(0, handle);
    larger.allocations[0].bytes += 1;
    let actual = 2 * u64::from(PAGES) * PAGE_BYTES;
    assert_eq!(open(larger), OpenError::TooSmall { allocation: 0, described: actual + 1, actual });
    assert_eq!(bench.fake.mapped(&handle), 0, "what was refused is closed again");
    bench.fake.kill(&handle);
    assert!(matches!(open(describe(0, handle)), OpenError::Handle { .. }), "of a process that is gone");
}

#[test]
fn a_ring_is_taken_in_the_order_of_its_numbers() {
    let mut bench = Bench::new(1, Pace::Random(3), GpuSinkConfig { batch_pieces: 1, ..config() });
    let (handle, memory, mut consumer) = bench.ring(4);
    let mut offered = Batch::new();
    let (mut ended, mut taken) = (Vec::new(), 0);
    let mut next = 0;
    for round in 0..100_000 {
        if next < 20 && !offered.is_full() {
            let transfer = bench.ring_transfer(next, &memory);
            offered.push(transfer);
            next += 1;
        }
        ended.extend(bench.turn(&mut offered));
        // Slower than it is filled, so that it is full for most of the time.
        if round % 7 == 0
            && let Some((entry, descriptor)) = consumer.peek().unwrap()
        {
            assert_eq!((descriptor.chunk, descriptor.plane, descriptor.fetch), (taken, taken % 2, 77));
            assert!(descriptor.delivered && descriptor.bytes as usize == PLANE_BYTES);
            let at = entry as usize * 512;
            let contents = bench.fake.contents(&handle);
            assert!(contents[at..at + PLANE_BYTES].iter().all(|&byte| byte == fill(taken)));
            consumer.release();
            taken += 1;
        }
        if taken == 20 {
            break;
        }
    }
    assert_eq!((taken, ended.len()), (20, 20));
    assert!(bench.health.named().iter().any(|&(name, count)| name == "gpu_ring_waits" && count > 0));
}

#[test]
fn a_ring_that_nobody_empties_holds_up_nobody_else() {
    let impatient = GpuSinkConfig { ring_patience: Duration::ZERO, ..config() };
    let mut bench = Bench::new(1, Pace::AtOnce, impatient);
    let (_, ring, _consumer) = bench.ring(2);
    let (_, pages) = bench.pages(0);
    let mut offered = Batch::new();
    for number in 0..3 {
        let transfer = bench.ring_transfer(number, &ring);
        offered.push(transfer);
    }
    let transfer = bench.page_transfer(3, &pages, [0, 1], 0);
    offered.push(transfer);
    let mut ended = bench.turns(&mut offered, 4);
    ended.sort_unstable_by_key(|end| end.0);
    assert_eq!(ended, [(0, Ok(())), (1, Ok(())), (2, Err(SinkFault::RingFull)), (3, Ok(()))]);
}

#[test]
fn a_revoked_ring_takes_nothing_more() {
    let mut bench = Bench::new(1, Pace::AtOnce, config());
    let (_, ring, mut consumer) = bench.ring(2);
    consumer.revoke();
    let mut offered = Batch::new();
    let transfer = bench.ring_transfer(0, &ring);
    offered.push(transfer);
    let revoked = GpuRingError::Revoked { registered: 9, found: 10 };
    assert_eq!(bench.turns(&mut offered, 1), [(0, Err(SinkFault::Ring(revoked)))]);
    assert_eq!(bench.fake.copied().len(), 0);
}

#[test]
fn faults_come_back_with_the_slot() {
    let mut bench = Bench::new(1, Pace::AtOnce, config());
    let (_, memory) = bench.pages(0);
    let mut offered = Batch::new();
    let transfer = bench.page_transfer(0, &memory, [0, 1], 2);
    offered.push(transfer);
    let mut transfer = bench.page_transfer(1, &memory, [0, 1], 0);
    // Nine pages of 16 tokens are more than a slot of a page holds in these tests.
    transfer.to = Destination::Pages {
        memory: Arc::clone(&memory),
        table: Arc::from([0; 20]),
        first_token: 0,
        tokens: 20 * 16,
    };
    offered.push(transfer);
    let mut ended = bench.turns(&mut offered, 2);
    ended.sort_unstable_by_key(|end| end.0);
    let too_small = SinkFault::SlotTooSmall { slot_bytes: 4096, plane_bytes: 20 * PAGE_BYTES };
    assert_eq!(ended, [(0, Err(SinkFault::NoSuchPlane { plane: 2, planes: 2 })), (1, Err(too_small))]);
    // Without a GPU sink, GPU memory is no place to deliver to.
    let transfer = bench.page_transfer(2, &memory, [0, 1], 0);
    offered.push(transfer);
    let mut sink = Sinks::new(None);
    sink.submit(&mut offered);
    let mut finished = FinishedBatch::new();
    assert_eq!(sink.poll(&mut finished), 1);
    assert_eq!(finished[0].result, Err(SinkFault::OtherSink));
}

#[test]
fn the_arena_is_unregistered_before_it_is_unmapped_and_after_the_last_copy() {
    let mut bench = Bench::new(1, Pace::ByHand, config());
    let (handle, memory) = bench.pages(0);
    let mut offered = Batch::new();
    let transfer = bench.page_transfer(0, &memory, [0, 1], 0);
    offered.push(transfer);
    bench.turn(&mut offered);
    let fake = Arc::clone(&bench.fake);
    bench.slots.clear();
    assert_eq!(fake.registered(), 1, "the slot under way keeps the arena");
    drop(memory);
    // The fake panics if memory is unregistered or unmapped under a copy: the sink waits for it instead.
    drop(bench.sink.take());
    assert_eq!((fake.registered(), fake.mapped(&handle), fake.copied().len()), (0, 0, 1));
}

#[test]
fn an_arena_that_cannot_be_registered_is_not_used() {
    let fake = Arc::new(FakeDriver::new(1, Pace::AtOnce));
    fake.fail(Call::RegisterHost, 1);
    let driver: Arc<dyn Driver> = fake.clone();
    assert_eq!(pin(&driver, arena(4096)).unwrap_err(), refused("cuMemHostRegister"));
    assert_eq!(fake.registered(), 0);
}

/// Short pages in ascending order go as one strided copy: the driver would have the CPU copy them one by one.
#[test]
fn short_pieces_that_are_evenly_spaced_are_one_copy() {
    let mut bench = Bench::new(1, Pace::AtOnce, config());
    let (handle, memory) = bench.pages(0);
    let mut offered = Batch::new();
    let transfer = bench.page_transfer(4, &memory, [2, 9], 1);
    offered.push(transfer);
    assert_eq!(bench.turns(&mut offered, 1), [(4, Ok(()))]);
    assert_eq!(
        bench.fake.copied().iter().map(|run| (run.rows, run.bytes)).collect::<Vec<_>>(),
        [(2, PAGE_BYTES)]
    );
    let contents = bench.fake.contents(&handle);
    assert!([2, 9].iter().all(|&at| page(&contents, 1, at).iter().all(|&byte| byte == fill(4))));
}

/// A plane full of one byte, in pieces of 96 bytes that lie apart in the GPU's memory, as packets would have brought it.
fn received(bench: &Bench, memory: &Arc<ReceiveMemory>, number: u32) -> Box<Received> {
    let mut plane = Box::new(Received::new(Arc::clone(memory), PLANE_BYTES.div_ceil(96)));
    plane.begin(96);
    for first in (0..PLANE_BYTES).step_by(96) {
        let address = memory.address() + usize::try_from(number).unwrap() * 4096 + first * 4 / 3;
        assert!(plane.push(address as u64, 96.min(PLANE_BYTES - first) as u64));
    }
    let mut slot = Slots::new(pin(&bench.driver(), arena(4096)).unwrap(), 4096).unwrap().take().remove(0);
    slot.as_mut_slice()[..PLANE_BYTES].fill(fill(number));
    yardstick::play_nic(&*bench.driver(), &slot, &plane).unwrap();
    plane
}

/// Copies from one place of a GPU to another, among others from slots; of memory of another GPU nothing is copied.
#[test]
fn planes_that_a_nic_has_put_into_the_gpu_reach_their_pages() {
    let mut bench = Bench::new(2, Pace::AtOnce, config());
    let memory = Arc::new(ReceiveMemory::allocate(&bench.driver(), DeviceIndex(0), 64 << 10).unwrap());
    let ((handle, pages), (_, of_other)) = (bench.pages(0), bench.pages(1));
    let mut offered = Batch::new();
    for number in 0..4 {
        let from = received(&bench, &memory, number);
        let transfer = bench.page_transfer(number, &pages, [2 * number, 2 * number + 1], number % 2);
        offered.push(Transfer { from: Decoded::Received(from), ..transfer });
        let transfer =
            bench.page_transfer(10 + number, &pages, [2 * number, 2 * number + 1], (number + 1) % 2);
        offered.push(transfer);
    }
    let from = received(&bench, &memory, 9);
    let transfer = bench.page_transfer(99, &of_other, [0, 1], 0);
    offered.push(Transfer { from: Decoded::Received(from), ..transfer });
    bench.fake.set_pace(Pace::Random(11));
    bench.fake.fail(Call::CopyWithin, 1);
    let mut ended = bench.turns(&mut offered, 9);
    ended.sort_unstable_by_key(|end| end.0);
    assert_eq!(ended.pop(), Some((99, Err(SinkFault::OtherSink))));
    assert!(ended.iter().all(|end| end.1.is_ok()), "{ended:?}");
    let contents = bench.fake.contents(&handle);
    for number in 0..4 {
        for (plane, who) in [(number % 2, number), ((number + 1) % 2, 10 + number)] {
            let page = usize::try_from(PAGE_BYTES).unwrap();
            let at = (plane as usize * PAGES as usize + 2 * number as usize) * page;
            assert!(contents[at..at + 2 * page].iter().all(|&byte| byte == fill(who)), "plane of {who}");
        }
    }
    drop(memory);
    assert_eq!(bench.fake.for_nic(), 0, "nothing of it is in use");
}
