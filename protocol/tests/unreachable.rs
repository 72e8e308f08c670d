//! ICMP errors by which a store cannot be reached: true ones spare a fetch its timeouts, made-up ones change nothing.
#![allow(clippy::cast_possible_truncation, reason = "numbers of the tests are small")]

mod network;

use network::World;
use network::situations::{SECOND, SHAPE, config, fill_placed, serve};
use protocol::{
    ChunkFailure, FetchConfig, FetchOutcome, Instant, Key, LookupId, LookupOutcome, Sources, StoreIndex,
};

/// What Linux does.
const ERRORS_EVERY: Option<u64> = Some(SECOND);

/// A world of `stores` stores that hold 100 chunks, each on `replicas` of them.
fn world(seed: u64, stores: u16, replicas: usize) -> (World, Vec<Key>) {
    let config = FetchConfig { stores, ..config() };
    let mut world = World::with_replicas(seed, &config, serve(), replicas);
    let keys = fill_placed(&mut world, 0, 100, &SHAPE);
    (world, keys)
}

/// Starts a fetch and a lookup of all keys, with a minute's patience.
fn start(world: &mut World, id: u64, keys: &[Key]) {
    let later = Instant::from_nanos(world.now + 60 * SECOND);
    let now = world.now();
    world.engine_mut(0).lookup(now, LookupId(id), later, Sources::Placed, keys).unwrap();
    world.start_from(id, Sources::Placed, keys, &SHAPE, later.nanos());
}

fn ended(world: &World, id: u64) -> (u64, FetchOutcome) {
    world.records[&(0, id)].ended.expect("ended")
}

#[test]
fn where_nobody_listens_a_fetch_fails_at_once_and_says_why() {
    for (stores, replicas) in [(1, 1), (2, 2), (3, 2)] {
        let (mut world, keys) = world(1, stores, replicas);
        for store in &mut world.stores {
            (store.alive, store.errors_every_nanos) = (false, ERRORS_EVERY);
        }
        start(&mut world, 1, &keys);
        world.run();
        world.assert_quiet();
        assert_eq!(world.lookups[&1].0, LookupOutcome::Unreachable);
        let (at, outcome) = ended(&world, 1);
        assert!(at < SECOND && outcome == FetchOutcome::Failed, "{outcome:?} at {at} ns");
        let failed = &world.records[&(0, 1)].failed;
        assert!(failed.len() == keys.len() && failed.values().all(|why| *why == ChunkFailure::Unreachable));
    }
}

#[test]
fn a_store_that_dies_in_the_midst_fails_its_fetches_and_works_again_when_it_is_back() {
    let (mut world, keys) = world(2, 1, 1);
    start(&mut world, 1, &keys);
    world.run_until(400_000);
    assert!(world.records[&(0, 1)].ended.is_none(), "it is under way");
    (world.stores[0].alive, world.stores[0].errors_every_nanos) = (false, ERRORS_EVERY);
    let died = world.now;
    world.run_until(died + SECOND + SECOND / 2);
    let (at, outcome) = ended(&world, 1);
    assert!(at - died < 2 * SECOND && outcome == FetchOutcome::Failed, "{outcome:?} {} ns after", at - died);
    assert!(world.engine(0).counters().unreachable > 0);
    // The next is told at once, without a packet of its own but the knock that finds out that it is back.
    let begin = world.now;
    world.stores[0].alive = true;
    world.restart(0);
    start(&mut world, 2, &keys);
    world.run();
    assert_eq!(
        (ended(&world, 2), world.lookups[&2].0),
        ((begin, FetchOutcome::Failed), LookupOutcome::Unreachable)
    );
    start(&mut world, 3, &keys);
    world.run();
    world.assert_quiet();
    assert_eq!((ended(&world, 3).1, world.lookups[&3].0), (FetchOutcome::Done, LookupOutcome::Done));
}

#[test]
fn a_store_that_nobody_knocks_at_is_asked_again_after_a_while() {
    let (mut world, keys) = world(6, 1, 1);
    (world.stores[0].alive, world.stores[0].errors_every_nanos) = (false, ERRORS_EVERY);
    start(&mut world, 1, &keys);
    world.run();
    assert_eq!(ended(&world, 1).1, FetchOutcome::Failed);
    world.stores[0].alive = true;
    world.run_until(world.now + SECOND);
    start(&mut world, 2, &keys);
    world.run();
    world.assert_quiet();
    assert_eq!((ended(&world, 2).1, world.lookups[&2].0), (FetchOutcome::Done, LookupOutcome::Done));
}

#[test]
fn replicas_take_over_before_any_timeout() {
    let (mut world, keys) = world(3, 2, 2);
    start(&mut world, 1, &keys);
    world.run_until(400_000);
    (world.stores[0].alive, world.stores[0].errors_every_nanos) = (false, ERRORS_EVERY);
    world.run();
    world.assert_quiet();
    assert_eq!((ended(&world, 1).1, world.lookups[&1].0), (FetchOutcome::Done, LookupOutcome::Done));
    let counters = world.engine(0).counters();
    assert!(counters.failovers > 0 && counters.unreachable > 0);
    assert_eq!(counters.timeouts, 0, "nothing was waited for");
    assert!(world.engine(0).is_silent(StoreIndex(0)));
}

/// Somebody who does not see our packets knows addresses, ports and what messages look like.
#[test]
fn errors_that_quote_nothing_under_way_change_nothing() {
    let (mut world, keys) = world(4, 2, 1);
    start(&mut world, 1, &keys);
    let mut quotes = Vec::new();
    while !quotes.iter().any(|quote: &Vec<u8>| quote[5] == 3) {
        world.run_until(world.now + 5_000);
        quotes.extend((0..2).flat_map(|store| world.on_the_way_to(store)));
        assert!(world.records[&(0, 1)].ended.is_none(), "PULLs are sent before the end");
    }
    let before = *world.engine(0).counters();
    let mut tried = 0;
    for quote in &quotes {
        for bit in 0..8 * 12 {
            // Of magic, version, type, flags and the number behind them, any bit is one too many.
            let mut forged = quote.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            for store in 0..2 {
                assert!(!world.take_error(0, store, &forged), "bit {bit}");
                tried += 1;
            }
        }
        for bytes in 0..48 {
            assert!(!world.take_error(0, 0, &quote[..bytes]), "{bytes} bytes");
            tried += 1;
        }
        assert!(!world.take_error(0, 2, quote), "there is no such store");
        tried += 1;
    }
    let after = *world.engine(0).counters();
    assert_eq!(after.unreachable_unproven - before.unreachable_unproven, tried);
    world.run();
    // What has been answered is not under way any more.
    for quote in &quotes {
        for store in 0..2 {
            assert!(!world.take_error(0, store, quote));
        }
    }
    world.assert_quiet();
    assert_eq!((ended(&world, 1).1, world.lookups[&1].0), (FetchOutcome::Done, LookupOutcome::Done));
    let counters = world.engine(0).counters();
    assert_eq!((counters.unreachable, counters.lookups_again, counters.timeouts), (0, 0, 0));
}

/// One who sees them can have a chunk looked up again, and no more.
#[test]
fn an_error_about_a_store_that_answers_fails_nothing() {
    let (mut world, keys) = world(5, 2, 1);
    start(&mut world, 1, &keys);
    let mut taken = 0;
    for step in 1..4 {
        world.run_until(step * 150_000);
        for store in 0..2 {
            if let Some(quote) = world.on_the_way_to(store).first() {
                taken += u64::from(world.take_error(0, store, quote));
            }
        }
        world.drain();
    }
    world.run();
    world.assert_quiet();
    assert_eq!(world.engine(0).counters().unreachable, taken);
    assert!(taken > 0);
    assert_eq!((ended(&world, 1).1, world.lookups[&1].0), (FetchOutcome::Done, LookupOutcome::Done));
}
