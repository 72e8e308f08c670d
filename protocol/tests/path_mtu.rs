//! The search for a path's MTU over simulated paths.
#![allow(missing_docs, reason = "a test")]

use std::time::Duration;

use proptest::prelude::*;
use protocol::Instant;
use protocol::path_mtu::PathMtu;
use protocol::wire::message::{Message, Probe};

const LEAST: u16 = 1472;
const MOST: u16 = 8972;

/// A path that carries messages of up to `carries` bytes and loses some.
struct Path {
    carries: u16,
    lose: Box<dyn FnMut() -> bool>,
    probes: u32,
}

/// Lets time pass until `until`; checks that what is in use was carried when it was found.
fn run(search: &mut PathMtu, path: &mut Path, now: &mut Duration, until: Duration) {
    let mut out = vec![0; usize::from(MOST)];
    while let Some(at) = search.poll_timeout() {
        let at = Duration::from_nanos(at.nanos()).max(*now);
        if at > until {
            break;
        }
        *now = at;
        let time = Instant::ZERO + *now;
        let Some(len) = search.poll_transmit(time, &mut out) else {
            assert!(search.poll_timeout().is_none_or(|next| next > time), "something is to come");
            continue;
        };
        path.probes += 1;
        let Ok(Message::Probe(probe)) = Message::new_checked(&out[..len]) else { panic!("a probe") };
        if usize::from(path.carries) >= len && !(path.lose)() {
            *now += Duration::from_micros(50);
            let time = Instant::ZERO + *now;
            let wrong = Probe { id: probe.id.wrapping_add(1), ..probe };
            assert!(!search.handle_reply(time, &wrong), "an answer to something else");
            assert!(!search.handle_reply(time, &Probe { bytes: probe.bytes - 1, ..probe }));
            assert!(search.handle_reply(time, &Probe { epoch: 7, ..probe }));
            assert!(!search.handle_reply(time, &probe), "answered once");
            assert!(search.bytes() <= path.carries);
        }
    }
    *now = until;
}

fn path(carries: u16) -> Path {
    Path { carries, lose: Box::new(|| false), probes: 0 }
}

#[test]
fn a_path_that_carries_all_is_known_after_one_probe() {
    let (mut search, mut path, mut now) = (PathMtu::new(LEAST, MOST, 1), path(MOST), Duration::ZERO);
    assert_eq!(search.bytes(), LEAST, "until something came back");
    run(&mut search, &mut path, &mut now, Duration::from_secs(1));
    assert_eq!((search.bytes(), path.probes), (MOST, 1));
    // Confirmed every ten seconds.
    run(&mut search, &mut path, &mut now, Duration::from_secs(61));
    assert_eq!((search.bytes(), path.probes), (MOST, 7));
}

#[test]
fn where_nothing_is_to_be_found_nothing_is_sent() {
    let search = PathMtu::new(LEAST, LEAST, 1);
    assert_eq!((search.poll_timeout(), search.bytes()), (None, LEAST));
}

#[test]
fn a_path_that_shrinks_is_found_out_and_one_that_grows() {
    let (mut search, mut path, mut now) = (PathMtu::new(LEAST, MOST, 1), path(MOST), Duration::ZERO);
    run(&mut search, &mut path, &mut now, Duration::from_secs(5));
    path.carries = 4000;
    run(&mut search, &mut path, &mut now, Duration::from_secs(30));
    assert!((3936..=4000).contains(&search.bytes()), "{}", search.bytes());
    path.carries = MOST;
    run(&mut search, &mut path, &mut now, Duration::from_secs(120));
    assert_eq!(search.bytes(), MOST);
}

#[test]
fn silence_makes_it_look_sooner_and_repeat_soon() {
    let (mut search, mut path, mut now) = (PathMtu::new(LEAST, MOST, 1), path(MOST), Duration::ZERO);
    run(&mut search, &mut path, &mut now, Duration::from_secs(1));
    let round_trip = Some(Duration::from_micros(50));
    // Nothing is wrong: one probe, no change.
    search.handle_silence(Instant::ZERO + now, round_trip);
    let soon = now + Duration::from_millis(20);
    run(&mut search, &mut path, &mut now, soon);
    assert_eq!((search.bytes(), path.probes), (MOST, 2));
    path.carries = LEAST;
    search.handle_silence(Instant::ZERO + now, round_trip);
    let soon = now + Duration::from_millis(20);
    run(&mut search, &mut path, &mut now, soon);
    assert_eq!(search.bytes(), LEAST, "found out in three probes of 5 ms");
}

#[test]
fn a_path_that_is_down_says_nothing_about_what_it_carries() {
    let (mut search, mut path, mut now) = (PathMtu::new(LEAST, MOST, 1), path(MOST), Duration::ZERO);
    run(&mut search, &mut path, &mut now, Duration::from_secs(1));
    for outage in [1, 30] {
        path.carries = 0;
        search.handle_silence(Instant::ZERO + now, None);
        let end = now + Duration::from_secs(outage);
        run(&mut search, &mut path, &mut now, end);
        assert_eq!(search.bytes(), LEAST);
        path.carries = MOST;
        let end = now + Duration::from_secs(1);
        run(&mut search, &mut path, &mut now, end);
        assert_eq!(search.bytes(), MOST, "back at once after {outage} s");
    }
    // The same when it is down from the beginning.
    let (mut search, mut now) = (PathMtu::new(LEAST, MOST, 2), Duration::ZERO);
    path.carries = 0;
    run(&mut search, &mut path, &mut now, Duration::from_secs(8));
    path.carries = MOST;
    run(&mut search, &mut path, &mut now, Duration::from_secs(9));
    assert_eq!(search.bytes(), MOST);
}

#[test]
fn a_hint_only_makes_it_look_sooner() {
    let (mut search, mut path, mut now) = (PathMtu::new(LEAST, MOST, 1), path(MOST), Duration::ZERO);
    run(&mut search, &mut path, &mut now, Duration::from_secs(1));
    let probes = path.probes;
    for forged in [0, 68, 1280, u32::MAX] {
        search.handle_hint(Instant::ZERO + now, forged);
        let soon = now + Duration::from_millis(100);
        run(&mut search, &mut path, &mut now, soon);
        assert_eq!(search.bytes(), MOST, "a lie changes nothing");
    }
    assert_eq!(path.probes, probes + 3);
    path.carries = 5000;
    search.handle_hint(Instant::ZERO + now, 5000);
    let soon = now + Duration::from_secs(8);
    run(&mut search, &mut path, &mut now, soon);
    assert!((4936..=5000).contains(&search.bytes()), "{}", search.bytes());
}

proptest! {
    /// Whatever the path carries is found to the grain, in a bounded number of probes, also when a few of them are lost.
    #[test]
    fn any_path_is_found(carries in LEAST..10_000, losses in proptest::collection::vec(any::<bool>(), 0..20), seed in any::<u32>()) {
        // Never three in a row of one size.
        let mut losses = losses.into_iter();
        let mut in_a_row = 0;
        let lose = move || {
            let lost = losses.next().unwrap_or(false) && in_a_row < 1;
            in_a_row = if lost { in_a_row + 1 } else { 0 };
            lost
        };
        let mut path = Path { carries, lose: Box::new(lose), probes: 0 };
        let (mut search, mut now) = (PathMtu::new(LEAST, MOST, seed), Duration::ZERO);
        run(&mut search, &mut path, &mut now, Duration::from_secs(9));
        let found = search.bytes();
        prop_assert!(found <= carries && found + 64 >= carries.min(MOST), "{found} of {carries}");
        prop_assert!(path.probes <= 60, "{} probes", path.probes);
    }
}
