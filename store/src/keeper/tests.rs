//! What a keeper holds and lets go: made-up chunks, real memory.

use std::collections::HashMap;

use hugepages::PageChoice;
use proptest::prelude::*;
use protocol::ChunkSource;

use super::*;

const PAGE: usize = hugepages::BLOCK_ALIGN_BYTES;

fn keeper(pages: usize, pinned_pages: usize) -> Keeper {
    let config = ArenaConfig { name: "keeper", bytes: pages * PAGE, page: PageChoice::Base, numa_node: None };
    let mut keeper = Keeper::new(Heap::new(Arena::new(config).unwrap()).unwrap(), pinned_pages * PAGE, true);
    for number in 0..pinned_pages {
        let block = keeper.heap.take(PAGE).unwrap();
        keeper.under_way.insert(key(1000 + number));
        keeper.publish(key(1000 + number), block, info(PAGE), true);
    }
    keeper
}

fn key(number: usize) -> Key {
    let mut key = Key([1; 32]);
    key.0[..8].copy_from_slice(&number.to_le_bytes());
    key
}

fn info(bytes: usize) -> ChunkInfo {
    ChunkInfo { chunk_bytes: bytes as u64, tokens: 256, ..ChunkInfo::default() }
}

fn bytes_of(pages: usize) -> u32 {
    u32::try_from(pages * PAGE).unwrap()
}

/// Puts a chunk whose bytes are all `number`; the reason if it is not taken.
fn put(keeper: &mut Keeper, number: usize, pages: usize) -> Result<u32, Declined> {
    match keeper.reserve(&key(number), bytes_of(pages)) {
        Room::Block(mut block) => {
            block.as_mut_slice().fill(number.to_le_bytes()[0]);
            keeper.publish(key(number), block, info(pages * PAGE), false);
            Ok(keeper.chunks.find(&key(number)).unwrap().handle)
        }
        Room::Declined(why) => Err(why),
        Room::Soon => panic!("nobody reads, so what is evicted is free at once"),
    }
}

fn declined(room: &Room) -> Option<Declined> {
    match room {
        Room::Declined(why) => Some(*why),
        _ => None,
    }
}

#[test]
fn a_full_store_evicts_and_a_pinned_one_says_why_not() {
    let mut keeper = keeper(8, 4);
    for number in 0..20 {
        put(&mut keeper, number, 1).unwrap();
        assert!(keeper.held_bytes <= 8 * PAGE as u64);
    }
    assert_eq!((keeper.len(), keeper.counts.evicted), (8, 16));
    assert!((0..4).all(|number| keeper.chunks.contains(&key(1000 + number))), "what is pinned stays");
    assert_eq!(put(&mut keeper, 19, 1), Err(Declined::AlreadyStored));
    assert_eq!(put(&mut keeper, 50, 9), Err(Declined::TooLarge));
    assert_eq!(
        put(&mut keeper, 50, 5),
        Err(Declined::Full),
        "the pinned ones leave no room for it, whatever goes"
    );
    // Chunks on their way in may fail, or be evicted later: not for ever.
    let rooms: Vec<Room> = (60..64).map(|number| keeper.reserve(&key(number), bytes_of(1))).collect();
    assert!(rooms.iter().all(|room| matches!(room, Room::Block(_))));
    assert_eq!(declined(&keeper.reserve(&key(70), bytes_of(1))), Some(Declined::Busy));
    assert_eq!(
        declined(&keeper.reserve(&key(60), bytes_of(1))),
        Some(Declined::Busy),
        "somebody else puts it"
    );
    for (number, room) in (60..64).zip(rooms) {
        let Room::Block(block) = room else { unreachable!() };
        keeper.release(&key(number), block);
    }
    put(&mut keeper, 70, 4).unwrap();
    assert_eq!((keeper.heap.free_bytes(), keeper.heap.blocks()), (0, 5));
}

#[test]
fn evicted_memory_is_not_used_while_it_is_read() {
    let mut keeper = keeper(2, 0);
    let handle = put(&mut keeper, 1, 2).unwrap();
    let read = keeper.chunks.load(handle).unwrap();
    assert!(matches!(keeper.reserve(&key(2), bytes_of(2)), Room::Soon));
    assert_eq!(keeper.chunks.find(&key(1)), None, "not found any more");
    assert!(keeper.chunks.load(handle).is_none() && keeper.chunks.chunk_bytes(handle).is_none());
    assert!(matches!(keeper.reserve(&key(2), bytes_of(2)), Room::Soon));
    assert!(read.bytes().iter().all(|byte| *byte == 1), "and still there");
    drop(read);
    put(&mut keeper, 2, 2).unwrap();
    assert_eq!(keeper.counts.evicted, 1);
}

#[test]
fn what_is_asked_for_outlives_what_is_not() {
    let mut keeper = keeper(64, 0);
    for number in 0..32 {
        put(&mut keeper, number, 1).unwrap();
    }
    // Half of the memory is asked for now and then while ten times the memory is put and forgotten.
    for number in 100..100 + 640 {
        for wanted in 0..32 {
            let _ = keeper.chunks.find(&key(wanted));
        }
        put(&mut keeper, number, 1).unwrap();
    }
    let kept = (0..32).filter(|number| keeper.chunks.contains(&key(*number))).count();
    assert!(kept >= 30, "{kept} of 32 are left");
}

#[test]
fn a_handle_rests_before_it_is_used_again() {
    let mut keeper = keeper(4, 0);
    let mut last_use = HashMap::new();
    for number in 0..3 * RESTING_INDICES {
        let handle = put(&mut keeper, number, 1).unwrap();
        assert_eq!(last_use.insert(handle, number), None, "no handle twice");
    }
    // Four places only: an index comes again at once, its handle after 4,096 uses of it.
    assert_eq!(keeper.chunks.capacity(), 4);
}

#[test]
fn holes_between_chunks_of_many_sizes_cost_little() {
    let mut keeper = keeper(4096, 0);
    let mut state = 7_u64;
    let mut used = Vec::new();
    for number in 0..6000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let pages = usize::try_from(16 + (state >> 33) % 112).unwrap();
        put(&mut keeper, number, pages).unwrap();
        if number > 1000 {
            used.push(keeper.heap.bytes() - keeper.heap.free_bytes());
        }
    }
    used.sort_unstable();
    let median = used[used.len() / 2] * 100 / keeper.heap.bytes();
    assert!(median >= 80, "sizes of 64 to 508 KiB fill {median} % of 16 MiB");
    assert!(used[0] * 100 / keeper.heap.bytes() >= 70);
}

proptest! {
    /// Against the slow twin: who holds which memory.
    #[test]
    fn memory_is_somebodys_or_free(steps in proptest::collection::vec((0_u8..6, 0_usize..24, 1_usize..6), 1..200)) {
        let mut keeper = keeper(16, 2);
        let mut coming: HashMap<usize, Block> = HashMap::new();
        let mut reading: Vec<Arc<Chunk>> = Vec::new();
        for (step, number, pages) in steps {
            match step {
                0 | 1 => match keeper.reserve(&key(number), bytes_of(pages)) {
                    Room::Block(block) => {
                        prop_assert!(!coming.contains_key(&number) && !keeper.chunks.contains(&key(number)));
                        coming.insert(number, block);
                    }
                    Room::Soon => prop_assert!(!reading.is_empty()),
                    Room::Declined(Declined::AlreadyStored) => prop_assert!(keeper.chunks.contains(&key(number))),
                    Room::Declined(Declined::Busy) => prop_assert!(!coming.is_empty()),
                    Room::Declined(why) => prop_assert!(false, "16 pages with 2 pinned hold any 5: {:?}", why),
                },
                2 => {
                    if let Some(mut block) = coming.remove(&number) {
                        block.as_mut_slice().fill(number.to_le_bytes()[0]);
                        let bytes = block.bytes();
                        keeper.publish(key(number), block, info(bytes), false);
                    }
                }
                3 => {
                    if let Some(block) = coming.remove(&number) {
                        keeper.release(&key(number), block);
                    }
                }
                4 => reading.extend(keeper.chunks.find(&key(number)).and_then(|info| keeper.chunks.load(info.handle))),
                _ => drop(reading.pop()),
            }
            for chunk in &reading {
                prop_assert!(chunk.bytes().iter().all(|byte| *byte == chunk.key.0[0]), "read bytes do not change");
            }
            keeper.tend();
            let held: u64 = keeper.held_bytes;
            let retired: u64 = keeper.retired.iter().map(|chunk| chunk.info.chunk_bytes).sum();
            let on_the_way: usize = coming.values().map(Block::bytes).sum();
            prop_assert_eq!(keeper.heap.bytes() - keeper.heap.free_bytes(), usize::try_from(held + retired).unwrap() + on_the_way);
            prop_assert_eq!(keeper.under_way.len(), coming.len());
            prop_assert!(keeper.policy.evictable() + 2 >= keeper.held);
            prop_assert!((0..2).all(|number| keeper.chunks.contains(&key(1000 + number))));
        }
    }
}
