//! Rings against a queue of the standard library, and between threads.

mod support;

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use arrayvec::ArrayVec;
use dpdk::{BURST, Eal, Mbuf, Ring, RingError, RingMode};
use proptest::prelude::*;

fn eal() -> &'static Eal {
    static EAL: OnceLock<Eal> = OnceLock::new();
    EAL.get_or_init(|| support::eal(vec![], &[]))
}

/// Names must differ while rings live.
fn fresh_name() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("ring{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Counts how many are alive.
struct Counted<'a>(u32, &'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(value: u32, alive: &'a AtomicUsize) -> Box<Self> {
        alive.fetch_add(1, Ordering::Relaxed);
        Box::new(Self(value, alive))
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Put,
    Take,
    PutBurst(usize),
    TakeBurst(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Put),
        Just(Step::Take),
        (0..=BURST).prop_map(Step::PutBurst),
        (0..=BURST).prop_map(Step::TakeBurst),
    ]
}

proptest! {
    #[test]
    fn rings_behave_like_queues(
        entries in 1_u32..70,
        mode in prop_oneof![Just(RingMode::Mpmc), Just(RingMode::Relaxed)],
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let alive = AtomicUsize::new(0);
        let ring = Ring::new(eal(), &fresh_name(), entries, mode).expect("a ring fits");
        prop_assert_eq!(ring.capacity(), entries as usize);
        let (mut model, mut next) = (VecDeque::new(), 0..);
        for step in steps {
            match step {
                Step::Put => {
                    let item = Counted::new(next.next().expect("endless"), &alive);
                    let value = item.0;
                    match ring.enqueue(item) {
                        Ok(()) => model.push_back(value),
                        Err(item) => prop_assert!(item.0 == value && model.len() == entries as usize),
                    }
                }
                Step::Take => prop_assert_eq!(ring.dequeue().map(|item| item.0), model.pop_front()),
                Step::PutBurst(count) => {
                    let mut items: ArrayVec<_, BURST> = next.by_ref().take(count).map(|value| Counted::new(value, &alive)).collect();
                    let values: Vec<u32> = items.iter().map(|item| item.0).collect();
                    let taken = ring.enqueue_burst(&mut items);
                    prop_assert_eq!(taken, count.min(entries as usize - model.len()));
                    model.extend(&values[..taken]);
                    prop_assert_eq!(items.iter().map(|item| item.0).collect::<Vec<_>>(), &values[taken..]);
                }
                Step::TakeBurst(count) => {
                    let mut items = ArrayVec::<_, BURST>::new();
                    (count..BURST).for_each(|_| items.push(Counted::new(u32::MAX, &alive)));
                    let taken = ring.dequeue_burst(&mut items);
                    prop_assert_eq!(taken, count.min(model.len()));
                    let got: Vec<u32> = items.iter().skip(BURST - count).map(|item| item.0).collect();
                    prop_assert_eq!(got, model.drain(..taken).collect::<Vec<_>>());
                }
            }
            prop_assert_eq!((ring.len(), ring.is_empty()), (model.len(), model.is_empty()));
            prop_assert_eq!(alive.load(Ordering::Relaxed), model.len(), "none lost, none twice");
        }
        let other = ring.clone();
        drop(ring);
        prop_assert_eq!(alive.load(Ordering::Relaxed), model.len(), "a handle is left");
        drop(other);
        prop_assert_eq!(alive.load(Ordering::Relaxed), 0, "leftovers are dropped with the last handle");
    }
}

const ITEMS: usize = 20_000;

fn send_all(mut enqueue: impl FnMut(&mut ArrayVec<Box<usize>, BURST>) -> usize, first: usize) {
    let mut items = ArrayVec::new();
    let mut next = first..first + ITEMS;
    while !next.is_empty() || !items.is_empty() {
        items.extend(next.by_ref().take(items.remaining_capacity()).map(Box::new));
        if enqueue(&mut items) == 0 {
            thread::yield_now();
        }
    }
}

fn receive(
    mut dequeue: impl FnMut(&mut ArrayVec<Box<usize>, BURST>) -> usize,
    count: &AtomicUsize,
    total: usize,
) -> Vec<usize> {
    let mut got = Vec::new();
    while count.load(Ordering::Relaxed) < total {
        let mut items = ArrayVec::new();
        if dequeue(&mut items) == 0 {
            thread::yield_now();
        }
        count.fetch_add(items.len(), Ordering::Relaxed);
        got.extend(items.into_iter().map(|item| *item));
    }
    got
}

#[test]
fn one_sender_and_one_receiver_keep_the_order() {
    let (mut sender, mut receiver) = Ring::spsc(eal(), &fresh_name(), 50).expect("a ring fits");
    let count = AtomicUsize::new(0);
    let got = thread::scope(|scope| {
        scope.spawn(move || send_all(|items| sender.enqueue_burst(items), 0));
        receive(|items| receiver.dequeue_burst(items), &count, ITEMS)
    });
    assert!(got.iter().copied().eq(0..ITEMS));
}

#[test]
fn many_threads_lose_and_double_nothing() {
    for mode in [RingMode::Mpmc, RingMode::Relaxed] {
        let ring = Ring::new(eal(), &fresh_name(), 64, mode).expect("a ring fits");
        let count = AtomicUsize::new(0);
        let mut got: Vec<usize> = thread::scope(|scope| {
            let (ring, count) = (&ring, &count);
            (0..3).for_each(|thread| {
                drop(scope.spawn(move || send_all(|items| ring.enqueue_burst(items), thread * ITEMS)))
            });
            let receivers: Vec<_> = (0..2)
                .map(|_| scope.spawn(move || receive(|items| ring.dequeue_burst(items), count, 3 * ITEMS)))
                .collect();
            receivers.into_iter().flat_map(|receiver| receiver.join().expect("no panic")).collect()
        });
        got.sort_unstable();
        assert!(got.iter().copied().eq(0..3 * ITEMS));
    }
}

#[test]
fn mbufs_travel_and_leftovers_return_to_their_pool() {
    let pool = support::pool(eal(), "ring-mbufs", 63);
    let ring = Ring::<Mbuf>::new(eal(), &fresh_name(), 32, RingMode::Mpmc).expect("a ring fits");
    let mut mbuf = pool.alloc().expect("one is free");
    mbuf.append(3).expect("room").copy_from_slice(b"abc");
    ring.enqueue(mbuf).expect("room");
    ring.enqueue(pool.alloc().expect("one is free")).expect("room");
    assert_eq!(ring.dequeue().expect("the first").data(), b"abc");
    assert_eq!(pool.in_use(), 1);
    drop(ring);
    assert_eq!(pool.in_use(), 0);
}

#[test]
fn mistakes_are_named() {
    let error =
        |name: &str, entries| Ring::<Mbuf>::new(eal(), name, entries, RingMode::Mpmc).expect_err("wrong");
    let _held = Ring::<Mbuf>::new(eal(), "held", 8, RingMode::Mpmc).expect("a ring fits");
    assert!(matches!(error("held", 8), RingError::Exists(_)));
    assert!(matches!(error("none", 0), RingError::BadSize { entries: 0, .. }));
    assert!(matches!(error("much", u32::MAX), RingError::BadSize { .. }));
    assert!(matches!(error("much", 1 << 28), RingError::NoMemory { .. }));
    assert!(matches!(error("", 8), RingError::BadName(_)));
    assert!(matches!(error(&"n".repeat(29), 8), RingError::BadName(_)));
}
