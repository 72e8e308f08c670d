//! Figures that named scenarios must reach, with something to spare: what they are about must not quietly break.

use sim::catalogue::{ENTRIES, Figures};
use sim::scenario::Design;

fn run(name: &str, scale: u32) -> Figures {
    let entry = ENTRIES.iter().find(|entry| entry.name == name).expect("there is such a scenario");
    let figures = entry.run(Design::Ours, 1, scale).figures;
    assert_eq!(figures.not_done, 0, "{name}: everything arrives");
    figures
}

#[test]
fn a_replica_is_asked_for_planes_of_a_slow_store_within_its_credit() {
    let figures = run("hedge-planes", 2);
    let of = |name: &str| figures.counters[name];
    assert!(of("chunks_hedged") > 10 && of("planes_hedged") > 100, "{figures:?}");
    assert!(of("segments_hedged") * 100 <= of("asked") * 5, "{figures:?}");
    assert!(figures.resent_percent < 0.5, "what was asked for twice is little: {figures:?}");
    assert!(figures.p99_of_alone.expect("it is measured") < 0.8, "{figures:?}");
}

#[test]
fn four_stores_are_no_slower_than_three() {
    let (four, three) = (run("placed-4", 1), run("placed-4-dead", 1));
    assert!(four.of_ideal > 0.97 && four.of_ideal >= three.of_ideal - 0.005, "{four:?}\n{three:?}");
}

#[test]
fn a_restart_costs_little_more_than_the_time_that_it_takes() {
    let figures = run("restart", 1);
    // The store is down for 2 of 80 ms.
    assert!(figures.of_ideal > 0.96, "{figures:?}");
    // One refusal for the PULLs of a round trip, not one for every chunk.
    assert!(figures.counters["store_refused"] < 60, "{figures:?}");
}

#[test]
fn a_path_that_carries_less_all_of_a_sudden_is_found_out_in_time() {
    let (large, shrinks) = (run("mtu-9000", 2), run("mtu-shrinks", 2));
    assert!(large.of_ideal > 0.98, "{large:?}");
    let lost_ms = shrinks.simulated_ms - large.simulated_ms;
    assert!(lost_ms < 30.0, "{lost_ms} ms: {shrinks:?}");
}

#[test]
fn replicas_that_are_farther_away_than_the_longest_timeout_are_heard() {
    // 8 ms: the fetch takes 202 ms by the link alone. 100 ms: some round trips more until timeouts are as long.
    let (near, far) = (run("far-4", 1), run("far-50", 1));
    assert!(near.simulated_ms < 300.0 && far.simulated_ms < 1000.0, "{near:?}\n{far:?}");
}

#[test]
fn saving_fills_the_link() {
    let figures = run("save", 2);
    assert!(figures.of_ideal > 0.97 && figures.counters["put_asked_again"] == 0, "{figures:?}");
    for name in ["save-loss-1", "save-loss-1-measured"] {
        let figures = run(name, 1);
        assert!(figures.of_ideal > 0.9, "{name}: {figures:?}");
        assert!(figures.resent_per_lost.expect("some was lost") < 1.15, "{name}: {figures:?}");
    }
}
