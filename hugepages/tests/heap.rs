//! Blocks of a heap: apart from each other, and free again when dropped.
#![allow(missing_docs, reason = "tests")]

use hugepages::{Arena, ArenaConfig, Block, Heap, PageChoice};
use proptest::prelude::*;

const PAGE: usize = hugepages::BLOCK_ALIGN_BYTES;

fn heap(pages: usize) -> Heap {
    let config = ArenaConfig { name: "heap", bytes: pages * PAGE, page: PageChoice::Base, numa_node: None };
    Heap::new(Arena::new(config).unwrap()).unwrap()
}

#[test]
fn a_heap_gives_what_it_has_and_takes_it_back() {
    let heap = heap(8);
    assert_eq!((heap.bytes(), heap.free_bytes(), heap.blocks()), (8 * PAGE, 8 * PAGE, 0));
    assert!(heap.take(0).is_none() && heap.take(8 * PAGE + 1).is_none() && heap.take(usize::MAX).is_none());
    let blocks: Vec<Block> = (0..8).map(|_| heap.take(PAGE - 1).unwrap()).collect();
    assert!(heap.take(1).is_none());
    assert_eq!((heap.free_bytes(), heap.blocks()), (0, 8));
    drop(blocks);
    assert_eq!(heap.take(8 * PAGE).unwrap().bytes(), 8 * PAGE, "holes that touch are one");
}

#[test]
fn an_arena_that_another_may_map_is_refused() {
    let config = ArenaConfig { name: "heap", bytes: PAGE, page: PageChoice::Base, numa_node: None };
    let arena = Arena::new(config).unwrap();
    arena.close_to_others().unwrap();
    assert!(Heap::new(arena).is_err());
}

proptest! {
    /// Against the slow twin, a table of which page belongs to whom.
    #[test]
    fn blocks_never_overlap_and_nothing_is_lost(steps in proptest::collection::vec((any::<bool>(), 1_usize..6 * PAGE, any::<u8>()), 1..120)) {
        let heap = heap(32);
        let mut held: Vec<(Block, u8)> = Vec::new();
        let mut owner = [false; 32];
        for (take, bytes, mark) in steps {
            if take || held.is_empty() {
                let pages = bytes.div_ceil(PAGE);
                let fits = owner.windows(pages).any(|window| window.iter().all(|used| !used));
                let Some(mut block) = heap.take(bytes) else {
                    prop_assert!(!fits, "a hole of {} pages was there", pages);
                    continue;
                };
                prop_assert_eq!(block.addr() % PAGE, 0);
                let first = block.offset() / PAGE;
                prop_assert!(owner[first..first + pages].iter().all(|used| !used));
                owner[first..first + pages].fill(true);
                block.as_mut_slice().fill(mark);
                held.push((block, mark));
            } else {
                let (block, mark) = held.swap_remove(usize::from(mark) % held.len());
                prop_assert!(block.as_slice().iter().all(|byte| *byte == mark), "nobody else has written here");
                let first = block.offset() / PAGE;
                owner[first..first + block.bytes().div_ceil(PAGE)].fill(false);
            }
            let free = owner.iter().filter(|used| !**used).count() * PAGE;
            prop_assert_eq!((heap.free_bytes(), heap.blocks()), (free, held.len()));
        }
    }
}
