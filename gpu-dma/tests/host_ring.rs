//! The host ring: what arrives, where, and what comes back.

use std::sync::Arc;

use gpu_dma::{
    BATCH, Batch, ChunkShape, Destination, FinishedBatch, HeadOrder, HostRing, Layout, Placement,
    SUBMIT_BYTES, Sink, SinkFault, Transfer,
};
use hugepages::{Arena, ArenaConfig, PageChoice, Slot, Slots};
use proptest::prelude::*;

fn arena(bytes: usize) -> Arena {
    Arena::new(ArenaConfig { name: "host-ring-test", bytes, page: PageChoice::Base, numa_node: None })
        .unwrap()
}

#[expect(clippy::vec_box, reason = "a transfer carries its slot in a box")]
fn slots(count: usize, bytes: usize) -> Vec<Box<Slot>> {
    Slots::new(arena(count * bytes), bytes).unwrap().take().into_iter().map(Box::new).collect()
}

fn contents(region: &Arena) -> Vec<u8> {
    let mut bytes = vec![0; region.bytes()];
    region.copy_out(0, &mut bytes).unwrap();
    bytes
}

/// Submits everything, however often it takes, and returns what finished.
fn run<T: Send>(sink: &mut HostRing<T>, offered: &mut Batch<T>) -> FinishedBatch<T> {
    let mut finished = FinishedBatch::new();
    while !offered.is_empty() {
        let before = offered.len();
        let accepted = sink.submit(offered);
        assert!(accepted > 0 && offered.len() == before - accepted);
        assert_eq!(Sink::in_flight(sink), accepted);
        sink.flush();
        assert_eq!(sink.poll(&mut finished), accepted);
    }
    assert_eq!(Sink::<T>::in_flight(sink), 0);
    finished
}

proptest! {
    /// The twin writes one byte at a time, by the formula in `Layout`'s documentation.
    #[test]
    fn planes_land_where_the_layout_says(
        (layers, tokens, kv_heads, head_dim) in (1..4u16, 1..6u16, 1..4u16, 1..9u16),
        hnd in any::<bool>(), two_tensors in any::<bool>(), extra_tokens in 0..3u32, base in 0..50u64, seed in any::<u8>(),
    ) {
        let shape = ChunkShape { layers, tokens, kv_heads, head_dim };
        let order = if hnd { HeadOrder::Hnd } else { HeadOrder::Nhd };
        let layout = match two_tensors {
            true => Layout::two_tensors(&shape, u32::from(tokens) + extra_tokens, order),
            false => Layout::contiguous(&shape, order),
        };
        let (layout, base) = (layout.unwrap(), base * 2);
        let region = Arc::new(arena(32 << 10));
        region.copy_in(0, &vec![seed; 32 << 10]).unwrap();
        let placement = Placement::new(layout, shape, base, 32 << 10).unwrap();
        let mut twin = contents(&region);
        let mut slots = slots(usize::try_from(shape.planes()).unwrap(), 4096);
        let mut offered = Batch::new();
        for (plane, mut slot) in (0..shape.planes()).zip(slots.drain(..)) {
            let mut from = 0;
            for token in 0..u64::from(tokens) {
                for head in 0..u64::from(kv_heads) {
                    for byte in 0..u64::from(head_dim) * 2 {
                        let value = seed ^ (from * 31 + usize::try_from(plane).unwrap() * 7).to_le_bytes()[0];
                        slot.as_mut_slice()[from] = value;
                        from += 1;
                        let side = u64::from(plane % 2) * layout.side + u64::from(plane / 2) * layout.layer;
                        let to = base + side + token * layout.token + head * layout.head + byte;
                        twin[usize::try_from(to).unwrap()] = value;
                    }
                }
            }
            let to = Destination::Host { region: Arc::clone(&region), placement };
            offered.push(Transfer { context: plane, from: slot.into(), to, plane });
        }
        let finished = run(&mut HostRing::default(), &mut offered);
        prop_assert_eq!(finished.len(), usize::try_from(shape.planes()).unwrap());
        prop_assert!(finished.iter().all(|end| end.result.is_ok()));
        prop_assert_eq!(contents(&region), twin);
    }
}

#[test]
fn a_call_copies_a_bounded_number_of_bytes() {
    let shape = ChunkShape { layers: 16, tokens: 256, kv_heads: 8, head_dim: 128 };
    let plane_bytes = usize::try_from(shape.plane_bytes()).unwrap();
    let region = Arc::new(arena(32 * plane_bytes));
    let layout = Layout::contiguous(&shape, HeadOrder::Nhd).unwrap();
    let placement = Placement::new(layout, shape, 0, u64::try_from(region.bytes()).unwrap()).unwrap();
    let mut sink = HostRing::default();
    let mut offered = Batch::new();
    for (plane, slot) in (0..).zip(slots(BATCH, plane_bytes)) {
        let to = Destination::Host { region: Arc::clone(&region), placement };
        offered.push(Transfer { context: plane, from: slot.into(), to, plane });
    }
    let per_call = usize::try_from(SUBMIT_BYTES / shape.plane_bytes()).unwrap();
    assert_eq!(sink.submit(&mut offered), per_call);
    let mut finished = FinishedBatch::new();
    assert_eq!(sink.poll(&mut finished), per_call);
    finished.extend(run(&mut sink, &mut offered));
    let order = finished.into_iter().map(|end| (end.context, end.from.into_slot().unwrap().index()));
    let order: Vec<_> = order.collect();
    assert_eq!(order, (0u32..).zip(0..BATCH).collect::<Vec<_>>());
}

#[test]
fn without_polling_it_accepts_no_more_than_it_can_report() {
    let shape = ChunkShape { layers: 1, tokens: 1, kv_heads: 1, head_dim: 1 };
    let layout = Layout::contiguous(&shape, HeadOrder::Nhd).unwrap();
    let placement = Placement::new(layout, shape, 0, 4096).unwrap();
    let mut sink = HostRing::default();
    let region = Arc::new(arena(4096));
    let mut slots = slots(BATCH + 1, 4096);
    let mut offered: Batch<()> = Batch::new();
    let mut transfer = || {
        let slot = slots.pop().unwrap();
        let to = Destination::Host { region: Arc::clone(&region), placement };
        Transfer { context: (), from: slot.into(), to, plane: 0 }
    };
    offered.extend((0..BATCH).map(|_| transfer()));
    assert_eq!(sink.submit(&mut offered), BATCH);
    offered.push(transfer());
    assert_eq!((sink.submit(&mut offered), offered.len()), (0, 1));
    let mut finished = FinishedBatch::new();
    assert_eq!(sink.poll(&mut finished), BATCH);
    assert_eq!(sink.submit(&mut offered), 1);
    // A caller's list that has no room takes none, and none is lost.
    assert_eq!((sink.poll(&mut finished), Sink::in_flight(&sink)), (0, 1));
    finished.clear();
    assert_eq!((sink.poll(&mut finished), Sink::in_flight(&sink)), (1, 0));
}

#[test]
fn faults_come_back_with_the_slot() {
    let shape = ChunkShape { layers: 2, tokens: 16, kv_heads: 2, head_dim: 128 };
    let layout = Layout::contiguous(&shape, HeadOrder::Nhd).unwrap();
    let chunk_bytes = u64::from(shape.planes()) * shape.plane_bytes();
    let region = Arc::new(arena(usize::try_from(chunk_bytes).unwrap()));
    let region_bytes = region.bytes();
    let fits = Placement::new(layout, shape, 0, chunk_bytes).unwrap();
    let of_another_region = Placement::new(layout, shape, 3 * chunk_bytes, 4 * chunk_bytes).unwrap();
    let plane_bytes = shape.plane_bytes();
    let mut small = slots(1, 4096);
    let mut large = slots(3, 8192);
    let mut offered = Batch::new();
    let too_small = SinkFault::SlotTooSmall { slot_bytes: 4096, plane_bytes };
    let no_plane = SinkFault::NoSuchPlane { plane: 4, planes: 4 };
    for (slot, placement, plane, expected) in [
        (small.pop(), fits, 0, Err(too_small)),
        (large.pop(), fits, 4, Err(no_plane)),
        (large.pop(), of_another_region, 0, Err(SinkFault::OutOfRange { region_bytes })),
        (large.pop(), fits, 3, Ok(())),
    ] {
        let mut slot = slot.unwrap();
        slot.as_mut_slice().fill(1);
        let to = Destination::Host { region: Arc::clone(&region), placement };
        offered.push(Transfer { context: expected, from: slot.into(), to, plane });
    }
    let finished = run(&mut HostRing::default(), &mut offered);
    assert_eq!(finished.len(), 4);
    assert!(finished.iter().all(|end| end.result == end.context), "{finished:?}");
    let written = contents(&region);
    let (before, plane_3) = written.split_at(3 * 16 * 512);
    assert!(before.iter().all(|&byte| byte == 0) && plane_3.iter().all(|&byte| byte == 1));
}
