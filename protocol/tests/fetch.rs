//! What both engines do in named situations, over a network that loses nothing. What they do over a bad one, in situations of all kinds, is
//! tried in `sim`, seed by seed.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "numbers of the tests are small"
)]

mod network;

use std::time::Duration;

use network::World;
use network::chunks::Chunk;
use network::situations::{SECOND, SHAPE, config, fill_placed, key, serve};
use protocol::{
    ChunkFailure, ChunkShape, FetchConfig, FetchOutcome, Instant, Key, LookupId, LookupOutcome, Sources,
    StoreIndex,
};

/// Fills a store with chunks `first..first + count` and returns their keys.
fn fill(world: &mut World, store: usize, first: u64, count: u64, shape: &ChunkShape) -> Vec<Key> {
    let keys: Vec<Key> = (first..first + count).map(key).collect();
    let max = world.engine(0).config().max_plane_bytes;
    for key in &keys {
        let chunk = Chunk::new(key, shape, max, &mut world.random);
        world.stores[store].library.insert(*key, chunk);
    }
    keys
}

fn outcome(world: &World, queue: usize, id: u64) -> FetchOutcome {
    world.records[&(queue, id)].ended.expect("ended").1
}

#[test]
fn a_fetch_over_a_good_network_is_done_and_asks_nothing_twice() {
    let mut world = World::new(1, &config(), serve());
    let keys = fill(&mut world, 0, 0, 100, &SHAPE);
    world.start(1, 0, &keys, &SHAPE, 10 * SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(outcome(&world, 0, 1), FetchOutcome::Done);
    assert_eq!(world.records[&(0, 1)].delivered.len(), 800);
    let counters = world.engine(0).counters();
    assert_eq!(counters.segments_asked_again, 0);
    assert_eq!(counters.timeouts, 0);
    assert_eq!(counters.dropped(), 0);
    assert_eq!(counters.planes_arrived, 800);
    assert_eq!(world.stores[0].engine.counters().segments, counters.segments_asked);
    // A PULL carries a turn, not a segment.
    assert!(counters.pulls_sent * 3 < counters.segments_asked, "{counters:?}");
}

#[test]
fn segments_grow_and_shrink_with_the_path() {
    let mut world = World::new(1, &config(), serve());
    let keys = fill(&mut world, 0, 0, 30, &SHAPE);
    let least = config().segment_bytes;
    let mut asked = Vec::new();
    for (id, bytes) in (1..).zip([least, 4 * least + 31, 0]) {
        world.engine_mut(0).set_segment_bytes(StoreIndex(0), bytes);
        let before = world.engine(0).counters().segments_asked;
        let deadline = world.now + 10 * SECOND;
        world.start(id, 0, &keys, &SHAPE, deadline);
        world.run();
        assert_eq!(outcome(&world, 0, id), FetchOutcome::Done);
        asked.push(world.engine(0).counters().segments_asked - before);
    }
    world.assert_quiet();
    assert!(asked[1] * 2 < asked[0] && asked[0] == asked[2], "{asked:?}");
}

#[test]
fn several_queues_share_a_fetch() {
    for queues in [2, 3, 7, 40] {
        let mut world = World::new(2, &FetchConfig { queues, ..config() }, serve());
        let keys = fill(&mut world, 0, 0, 9, &SHAPE);
        world.start(1, 0, &keys, &SHAPE, 10 * SECOND);
        world.run();
        world.assert_quiet();
        let total: usize = world.records.values().map(|record| record.delivered.len()).sum();
        assert_eq!(total, 72, "all planes over {queues} queues");
        assert!(world.records.values().all(|record| record.ended.unwrap().1 == FetchOutcome::Done));
    }
}

#[test]
fn a_partly_stored_prefix_arrives_and_the_rest_is_named() {
    let mut world = World::new(3, &config(), serve());
    let mut keys = fill(&mut world, 0, 0, 20, &SHAPE);
    keys.extend((500..510).map(key));
    let now = world.now();
    let deadline = Instant::from_nanos(SECOND);
    world.engine_mut(0).lookup(now, LookupId(5), deadline, StoreIndex(0), &keys).unwrap();
    world.start(1, 0, &keys, &SHAPE, 10 * SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.lookups[&5], (LookupOutcome::Done, 20, 20 * 256));
    assert_eq!(outcome(&world, 0, 1), FetchOutcome::Failed);
    let record = &world.records[&(0, 1)];
    assert_eq!(record.delivered.len(), 160);
    assert_eq!(record.failed.len(), 10);
    assert!(record.failed.iter().all(|(chunk, why)| *chunk >= 20 && *why == ChunkFailure::NotStored));
}

/// Looks one key up and runs until there is an answer; returns how many LOOKUPs that took, and how long.
fn look_up(world: &mut World, id: u64, key: &Key) -> (u64, u64) {
    let (now, begin, sent) = (world.now(), world.now, world.engine(0).counters().lookups_sent);
    let at = now + Duration::from_secs(20);
    world.engine_mut(0).lookup(now, LookupId(id), at, StoreIndex(0), &[*key]).unwrap();
    world.drain();
    while !world.lookups.contains_key(&id) {
        let soon = world.now + 10_000;
        world.run_until(soon);
    }
    assert_eq!(world.lookups[&id].1, 1);
    (world.engine(0).counters().lookups_sent - sent, world.now - begin)
}

#[test]
fn lookups_are_sent_once_again_after_the_round_trip_has_grown() {
    let mut world = World::new(25, &config(), serve());
    let keys = fill(&mut world, 0, 0, 1, &SHAPE);
    for id in 0..20 {
        look_up(&mut world, id, &keys[0]);
    }
    // From 40 us to 200.
    world.latency_nanos = 100_000;
    let sent: u64 = (100..120).map(|id| look_up(&mut world, id, &keys[0]).0).sum();
    assert!(sent < 20 + 10, "{sent} LOOKUPs for 20 keys");
    assert_eq!(look_up(&mut world, 200, &keys[0]).0, 1);
}

#[test]
fn a_store_that_was_down_for_long_is_not_waited_for_as_long_again() {
    let mut world = World::new(26, &config(), serve());
    let keys = fill(&mut world, 0, 0, 1, &SHAPE);
    let (now, at) = (world.now(), Instant::from_nanos(20 * SECOND));
    world.stores[0].alive = false;
    world.engine_mut(0).lookup(now, LookupId(1), at, StoreIndex(0), &keys).unwrap();
    world.drain();
    world.run_until(6 * SECOND);
    world.stores[0].alive = true;
    world.run_until(7 * SECOND);
    assert_eq!(world.lookups[&1].1, 1);
    // The next LOOKUP is lost.
    world.stores[0].alive = false;
    let (now, begin) = (world.now(), world.now);
    world.engine_mut(0).lookup(now, LookupId(2), at, StoreIndex(0), &keys).unwrap();
    world.drain();
    world.run_until(begin + 1_000_000);
    world.stores[0].alive = true;
    world.run_until(begin + 100_000_000);
    assert!(world.lookups.contains_key(&2), "the longest timeout is 20 ms");
}

#[test]
fn long_lookups_take_several_messages() {
    let mut world = World::new(4, &config(), serve());
    let keys = fill(&mut world, 0, 0, 128, &SHAPE);
    for (id, count) in [(1, 40), (2, 41), (3, 128), (4, 1)] {
        let now = world.now();
        let at = now + Duration::from_secs(1);
        world.engine_mut(0).lookup(now, LookupId(id), at, StoreIndex(0), &keys[..count]).unwrap();
        world.drain();
        world.run();
        assert_eq!(world.lookups[&id], (LookupOutcome::Done, count as u32, count as u64 * 256));
    }
    world.assert_quiet();
}

#[test]
fn a_silent_store_fails_the_fetch_at_its_deadline_naming_what_is_missing() {
    let mut world = World::new(5, &config(), serve());
    let keys = fill(&mut world, 0, 0, 30, &SHAPE);
    world.start(1, 0, &keys, &SHAPE, SECOND);
    world.run_until(700_000);
    world.stores[0].alive = false;
    let now = world.now();
    let deadline = now + Duration::from_millis(50);
    world.engine_mut(0).lookup(now, LookupId(1), deadline, StoreIndex(0), &keys).unwrap();
    world.run();
    world.assert_quiet();
    let record = &world.records[&(0, 1)];
    let (at, outcome) = record.ended.unwrap();
    assert_eq!(outcome, FetchOutcome::Failed);
    assert_eq!(at, SECOND);
    assert!(!record.delivered.is_empty() && !record.failed.is_empty());
    assert!(record.failed.values().all(|why| *why == ChunkFailure::Deadline));
    assert_eq!(world.lookups[&1].0, LookupOutcome::Deadline);
    // Silence costs little: asked again at most once per RTO, which doubles.
    assert!(world.engine(0).counters().pulls_sent < 2000, "{:?}", world.engine(0).counters());
    // And the next fetch after the store is back is served.
    world.stores[0].alive = true;
    world.restart(0);
    world.start(2, 0, &keys, &SHAPE, 5 * SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.records[&(0, 2)].ended.unwrap().1, FetchOutcome::Done);
}

#[test]
fn a_silent_store_does_not_stop_the_others() {
    let config = FetchConfig { stores: 3, ..config() };
    let mut world = World::new(6, &config, serve());
    let dead = fill(&mut world, 0, 0, 50, &SHAPE);
    let alive = fill(&mut world, 1, 100, 50, &SHAPE);
    // It falls silent while its fetches hold all the chunks, planes and memory that they can get.
    world.start(1, 0, &dead, &SHAPE, 5 * SECOND);
    world.start(2, 0, &dead, &SHAPE, 5 * SECOND);
    world.run_until(700_000);
    world.stores[0].alive = false;
    assert!(world.engine(0).planes_under_way() > 0);
    world.start(3, 1, &alive, &SHAPE, 3 * SECOND);
    world.run();
    world.assert_quiet();
    let (at, outcome) = world.records[&(0, 3)].ended.unwrap();
    assert_eq!(outcome, FetchOutcome::Done);
    assert!(at < SECOND, "{at}");
    assert_eq!(world.records[&(0, 1)].ended.unwrap().1, FetchOutcome::Failed);
}

#[test]
fn a_short_fetch_is_not_stuck_behind_a_long_one() {
    let mut world = World::new(7, &config(), serve());
    let long = fill(&mut world, 0, 0, 128, &SHAPE);
    let short = fill(&mut world, 0, 1000, 2, &SHAPE);
    world.start(1, 0, &long, &SHAPE, 10 * SECOND);
    world.run_until(1_000_000);
    world.start(2, 0, &short, &SHAPE, 10 * SECOND);
    world.run();
    world.assert_quiet();
    let took = |id| world.records[&(0, id)].ended.unwrap().0;
    assert!((took(2) - 1_000_000) * 5 < took(1), "short {} of long {}", took(2) - 1_000_000, took(1));
}

#[test]
fn a_restarted_store_is_asked_again() {
    let mut world = World::new(8, &config(), serve());
    let keys = fill(&mut world, 0, 0, 60, &SHAPE);
    world.start(1, 0, &keys, &SHAPE, 10 * SECOND);
    for at in [400_000, 900_000, 2_000_000] {
        world.run_until(at);
        world.restart(0);
    }
    world.run();
    world.assert_quiet();
    assert_eq!(outcome(&world, 0, 1), FetchOutcome::Done);
    assert!(world.engine(0).counters().lookups_again > 0);
}

#[test]
fn a_store_that_keeps_forgetting_fails_the_chunk() {
    let mut world = World::new(9, &FetchConfig { lookup_retries: 2, ..config() }, serve());
    let keys = fill(&mut world, 0, 0, 1, &SHAPE);
    world.start(1, 0, &keys, &SHAPE, 10 * SECOND);
    // Restarts between each answer to a LOOKUP and the PULL that follows: every 40 us one way.
    for turn in 0..40 {
        world.run_until(turn * 20_000 + 10_000);
        world.restart(0);
    }
    world.run();
    world.assert_quiet();
    let why = world.records[&(0, 1)].failed[&0];
    assert!(matches!(why, ChunkFailure::Refused(_)), "{why:?}");
}

#[test]
fn corrupt_planes_are_pulled_again_then_reported() {
    let mut world = World::new(10, &config(), serve());
    let keys = fill(&mut world, 0, 0, 10, &SHAPE);
    world.false_corrupt = 0.05;
    world.start(1, 0, &keys, &SHAPE, 10 * SECOND);
    world.run();
    assert_eq!(outcome(&world, 0, 1), FetchOutcome::Done);
    world.false_corrupt = 1.0;
    let before = world.engine(0).counters().planes_corrupt;
    world.start(2, 0, &keys[..1], &SHAPE, 20 * SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.records[&(0, 2)].failed[&0], ChunkFailure::Corrupt);
    // The first plane to be corrupt a fourth time fails the chunk; the seven others were at most as bad.
    let corrupt = world.engine(0).counters().planes_corrupt - before;
    assert!((4..=32).contains(&corrupt), "{corrupt}");
}

#[test]
fn a_rejected_plane_fails_its_chunk() {
    let mut world = World::new(11, &config(), serve());
    let keys = fill(&mut world, 0, 0, 3, &SHAPE);
    world.rejected = 1.0;
    world.start(1, 0, &keys, &SHAPE, SECOND);
    world.run();
    world.assert_quiet();
    assert!(world.records[&(0, 1)].failed.values().all(|why| *why == ChunkFailure::Rejected(7)));
    assert_eq!(world.records[&(0, 1)].failed.len(), 3);
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_pulled() {
    let mut world = World::new(12, &config(), serve());
    let keys = fill(&mut world, 0, 0, 3, &SHAPE);
    let other = ChunkShape { head_dim: 9, ..SHAPE };
    world.start(1, 0, &keys, &other, SECOND);
    let big = key(77);
    let chunk = Chunk::new(&big, &SHAPE, 200_000, &mut world.random);
    world.stores[0].library.insert(big, chunk);
    world.start(2, 0, &[big], &SHAPE, SECOND);
    world.run();
    world.assert_quiet();
    assert!(world.records[&(0, 1)].failed.values().all(|why| *why == ChunkFailure::ShapeMismatch));
    assert_eq!(world.records[&(0, 2)].failed[&0], ChunkFailure::TooLarge);
    assert_eq!(world.engine(0).counters().segments_placed, 0);
}

#[test]
fn a_cancelled_fetch_ends_at_once_but_for_verdicts() {
    for at in (0..60).map(|step| step * 37_000) {
        let mut world = World::new(at, &config(), serve());
        let keys = fill(&mut world, 0, 0, 12, &SHAPE);
        world.start(1, 0, &keys, &SHAPE, 10 * SECOND);
        world.run_until(at);
        world.cancel(1);
        world.run();
        world.assert_quiet();
        let (ended, outcome) = world.records[&(0, 1)].ended.unwrap();
        if outcome == FetchOutcome::Cancelled {
            assert!(ended <= at + world.decode_nanos, "{ended} after {at}");
        }
    }
}

#[test]
fn slots_are_limited_and_named() {
    use protocol::{FetchId, StartError};
    let mut world = World::new(13, &config(), serve());
    let keys: Vec<Key> = (0..129).map(key).collect();
    let (now, later) = (world.now(), Instant::from_nanos(SECOND));
    let engine = world.engine_mut(0);
    let mut start = |id, store, keys: &[Key], shape: &ChunkShape, deadline| {
        engine.start(now, FetchId(id), deadline, StoreIndex(store), keys, shape)
    };
    assert_eq!(start(1, 0, &[], &SHAPE, later), Err(StartError::NoKeys));
    assert_eq!(start(1, 0, &keys, &SHAPE, later), Err(StartError::TooManyKeys { keys: 129, limit: 128 }));
    assert_eq!(start(1, 1, &keys[..1], &SHAPE, later), Err(StartError::UnknownStore(1)));
    assert_eq!(start(1, 0, &keys[..1], &SHAPE, now), Err(StartError::DeadlinePassed));
    let deep = ChunkShape { layers: 9, ..SHAPE };
    assert_eq!(start(1, 0, &keys[..1], &deep, later), Err(StartError::BadShape { planes: 18, limit: 16 }));
    for id in 0..8 {
        assert_eq!(start(id, 0, &keys[..1], &SHAPE, later), Ok(()));
    }
    assert_eq!(start(3, 0, &keys[..1], &SHAPE, later), Err(StartError::DuplicateId));
    assert_eq!(start(9, 0, &keys[..1], &SHAPE, later), Err(StartError::Full(8)));
}

fn served(world: &World) -> Vec<u64> {
    world.stores.iter().map(|store| store.engine.counters().segments).collect()
}

#[test]
fn chunks_placed_over_stores_come_from_all_of_them() {
    let mut world = World::with_replicas(20, &FetchConfig { stores: 4, ..config() }, serve(), 2);
    let keys = fill_placed(&mut world, 0, 120, &SHAPE);
    let (now, later) = (world.now(), Instant::from_nanos(SECOND));
    world.engine_mut(0).lookup(now, LookupId(1), later, Sources::Placed, &keys).unwrap();
    world.start_from(1, Sources::Placed, &keys, &SHAPE, 10 * SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.lookups[&1], (LookupOutcome::Done, 120, 120 * 256));
    assert_eq!(outcome(&world, 0, 1), FetchOutcome::Done);
    let served = served(&world);
    let total: u64 = served.iter().sum();
    assert!(served.iter().all(|segments| segments * 8 > total), "each has a fair share: {served:?}");
    assert_eq!(world.engine(0).counters().segments_asked_again, 0);
}

/// A query whose store is late goes to the replica, and back: if no answer is ever in time, one that is late has to say by how much.
#[test]
fn replicas_that_are_all_farther_away_than_the_longest_timeout_are_heard() {
    for (seed, latency_nanos) in [(30, 1_000_050), (31, 1_500_000), (32, 2_500_000)] {
        let config = FetchConfig { stores: 3, rto_max: Duration::from_millis(2), ..config() };
        let mut world = World::with_replicas(seed, &config, serve(), 2);
        world.latency_nanos = latency_nanos;
        let keys = fill_placed(&mut world, 0, 20, &SHAPE);
        world.start_from(1, Sources::Placed, &keys, &SHAPE, 10 * SECOND);
        world.run();
        world.assert_quiet();
        assert_eq!(outcome(&world, 0, 1), FetchOutcome::Done, "{latency_nanos} ns one way");
        let counters = world.engine(0).counters();
        assert!(counters.lookups_sent < 200, "{counters:?}");
    }
}

#[test]
fn a_dead_store_costs_little_when_there_are_replicas_and_is_used_again_when_it_is_back() {
    let mut world = World::with_replicas(21, &FetchConfig { stores: 3, ..config() }, serve(), 2);
    let keys = fill_placed(&mut world, 0, 128, &SHAPE);
    world.start_from(1, Sources::Placed, &keys, &SHAPE, 10 * SECOND);
    world.run();
    let usual = world.records[&(0, 1)].ended.unwrap().0;
    // Dies in the midst of a fetch.
    let begin = world.now;
    world.start_from(2, Sources::Placed, &keys, &SHAPE, begin + 10 * SECOND);
    world.run_until(begin + usual / 3);
    world.stores[0].alive = false;
    world.run();
    assert_eq!(outcome(&world, 0, 2), FetchOutcome::Done);
    assert!(world.engine(0).counters().failovers > 0 && world.engine(0).is_silent(StoreIndex(0)));
    let took = world.records[&(0, 2)].ended.unwrap().0 - begin;
    assert!(took < 3 * usual + 10_000_000, "{took} where {usual} is usual");
    // While it is dead, fetches and lookups do without it from the start.
    let begin = world.now;
    world.start_from(3, Sources::Placed, &keys, &SHAPE, begin + 10 * SECOND);
    let now = world.now();
    let later = now + Duration::from_secs(1);
    world.engine_mut(0).lookup(now, LookupId(3), later, Sources::Placed, &keys).unwrap();
    world.run();
    assert_eq!(outcome(&world, 0, 3), FetchOutcome::Done);
    assert_eq!(world.lookups[&3].1, 128);
    let took = world.records[&(0, 3)].ended.unwrap().0 - begin;
    assert!(took < 3 * usual, "{took} where {usual} is usual");
    // Back: found by a knock, and used again.
    world.stores[0].alive = true;
    world.restart(0);
    for id in 4..8 {
        let begin = world.now;
        world.run_until(begin + 200_000_000);
        world.start_from(id, Sources::Placed, &keys, &SHAPE, world.now + 10 * SECOND);
        world.run();
        assert_eq!(outcome(&world, 0, id), FetchOutcome::Done);
    }
    assert!(!world.engine(0).is_silent(StoreIndex(0)));
    assert!(served(&world)[0] > 0, "the restarted store serves: {:?}", served(&world));
    world.assert_quiet();
}

#[test]
fn what_one_replica_lacks_another_has() {
    let mut world = World::with_replicas(22, &FetchConfig { stores: 3, ..config() }, serve(), 2);
    let keys = fill_placed(&mut world, 0, 40, &SHAPE);
    let placement = world.engine(0).placement().clone();
    for key in &keys[..39] {
        let first = placement.candidates(key).as_slice()[0];
        world.stores[usize::from(first.0)].library.remove(key);
    }
    for store in &mut world.stores {
        store.library.remove(&keys[39]);
    }
    let (now, later) = (world.now(), Instant::from_nanos(SECOND));
    world.engine_mut(0).lookup(now, LookupId(1), later, Sources::Placed, &keys).unwrap();
    world.start_from(1, Sources::Placed, &keys, &SHAPE, 10 * SECOND);
    world.run();
    world.assert_quiet();
    assert_eq!(world.lookups[&1].1, 39);
    let record = &world.records[&(0, 1)];
    assert_eq!(record.failed.iter().collect::<Vec<_>>(), [(&39, &ChunkFailure::NotStored)]);
    assert_eq!(record.delivered.len(), 39 * 8);
}

#[test]
fn a_slow_store_is_hedged() {
    let run = |replicas| {
        let mut world = World::with_replicas(23, &FetchConfig { stores: 3, ..config() }, serve(), replicas);
        let keys = fill_placed(&mut world, 0, 60, &SHAPE);
        let mut took = 0;
        for id in 1..30 {
            // Its answers begin to take 20 ms, now and then.
            world.stores[1].delay_nanos = if id % 7 == 0 { 20_000_000 } else { 0 };
            let begin = world.now;
            world.start_from(id, Sources::Placed, &keys, &SHAPE, begin + 10 * SECOND);
            world.run();
            assert_eq!(outcome(&world, 0, id), FetchOutcome::Done);
            took = took.max(world.records[&(0, id)].ended.unwrap().0 - begin);
        }
        world.assert_quiet();
        took
    };
    let (alone, hedged) = (run(1), run(2));
    assert!(hedged * 2 < alone, "{hedged} with a replica, {alone} without");
}

#[test]
fn a_busy_store_is_left_alone_and_everything_still_arrives() {
    for replicas in [1, 2] {
        let mut world = World::with_replicas(24, &FetchConfig { stores: 2, ..config() }, serve(), replicas);
        let keys = fill_placed(&mut world, 0, 60, &SHAPE);
        // At first for everything, later in the midst of it.
        world.stores[0].busy_for_nanos = 1_000_000;
        world.start_from(1, Sources::Placed, &keys, &SHAPE, 10 * SECOND);
        world.run_until(1_500_000);
        world.stores[1].busy_for_nanos = 20_000_000;
        world.run();
        world.assert_quiet();
        assert_eq!(outcome(&world, 0, 1), FetchOutcome::Done);
        let counters = world.engine(0).counters();
        // Each answer buys 100 us of peace: two or three questions, over 21 ms.
        assert!((1..1000).contains(&counters.busy), "{counters:?}");
        assert_eq!(counters.timeouts, 0);
        if replicas == 2 {
            assert!(world.records[&(0, 1)].ended.unwrap().0 < 15_000_000, "the other store has it all");
        }
    }
}
