//! Mbufs against vectors of bytes.

mod support;

use std::sync::OnceLock;

use dpdk::{Checksum, Eal, HEADROOM_BYTES, Mbuf, Pool, PoolConfig, PoolError};
use proptest::prelude::*;

/// Usable bytes of a buffer with no headroom: small, so that its ends are met often.
const ROOM: usize = 300;

fn setup() -> &'static (Eal, Pool) {
    static SETUP: OnceLock<(Eal, Pool)> = OnceLock::new();
    SETUP.get_or_init(|| {
        let eal = support::eal(vec![], &[]);
        let room = u16::try_from(ROOM).expect("small");
        let config = PoolConfig {
            mbufs: 127,
            cache: 0,
            data_room_bytes: HEADROOM_BYTES + room,
            ..PoolConfig::default()
        };
        let pool = Pool::new(&eal, "model", config).expect("a pool fits");
        (eal, pool)
    })
}

/// A chain as DPDK defines it: each buffer has free bytes before and after its data.
#[derive(Debug, Clone)]
struct Model(Vec<(usize, Vec<u8>)>);

impl Model {
    fn fresh() -> Self {
        Self(vec![(usize::from(HEADROOM_BYTES), Vec::new())])
    }

    fn tailroom(&self) -> usize {
        let (head, data) = self.0.last().expect("never empty");
        usize::from(HEADROOM_BYTES) + ROOM - head - data.len()
    }

    fn prepend(&mut self, bytes: &[u8]) -> bool {
        let (head, data) = &mut self.0[0];
        if *head < bytes.len() {
            return false;
        }
        *head -= bytes.len();
        data.splice(..0, bytes.iter().copied());
        true
    }

    fn append(&mut self, bytes: &[u8]) -> bool {
        let fits = self.tailroom() >= bytes.len();
        if fits {
            self.0.last_mut().expect("never empty").1.extend_from_slice(bytes);
        }
        fits
    }

    fn trim_front(&mut self, n: usize) -> bool {
        let (head, data) = &mut self.0[0];
        if data.len() < n {
            return false;
        }
        *head += n;
        data.drain(..n);
        true
    }

    fn trim_back(&mut self, n: usize) -> bool {
        let (_, data) = self.0.last_mut().expect("never empty");
        let left = data.len().checked_sub(n);
        if let Some(left) = left {
            data.truncate(left);
        }
        left.is_some()
    }

    fn matches(&self, mbuf: &Mbuf) {
        let expected: Vec<&[u8]> = self.0.iter().map(|(_, data)| data.as_slice()).collect();
        assert_eq!(mbuf.segments().collect::<Vec<_>>(), expected);
        assert_eq!(mbuf.data(), expected[0]);
        assert_eq!(mbuf.segment_count(), expected.len());
        assert_eq!(mbuf.total_bytes(), expected.iter().map(|data| data.len()).sum::<usize>());
        assert_eq!((mbuf.headroom(), mbuf.tailroom()), (self.0[0].0, self.tailroom()));
    }
}

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<u8>),
    Prepend(Vec<u8>),
    TrimFront(usize),
    TrimBack(usize),
    Chain(Vec<u8>),
    Overwrite(u8),
    ThroughRaw,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..200);
    prop_oneof![
        3 => bytes().prop_map(Step::Append),
        3 => bytes().prop_map(Step::Prepend),
        2 => (0_usize..400).prop_map(Step::TrimFront),
        2 => (0_usize..400).prop_map(Step::TrimBack),
        1 => bytes().prop_map(Step::Chain),
        1 => any::<u8>().prop_map(Step::Overwrite),
        1 => Just(Step::ThroughRaw),
    ]
}

fn apply(pool: &Pool, mut mbuf: Mbuf, model: &mut Model, step: Step) -> Mbuf {
    match step {
        Step::Append(bytes) => {
            let room = mbuf.append(bytes.len()).map(|room| room.copy_from_slice(&bytes));
            assert_eq!(room.is_some(), model.append(&bytes));
        }
        Step::Prepend(bytes) => {
            let room = mbuf.prepend(bytes.len()).map(|room| room.copy_from_slice(&bytes));
            assert_eq!(room.is_some(), model.prepend(&bytes));
        }
        Step::TrimFront(n) => assert_eq!(mbuf.trim_front(n), model.trim_front(n)),
        Step::TrimBack(n) => assert_eq!(mbuf.trim_back(n), model.trim_back(n)),
        Step::Chain(bytes) => {
            let mut tail = pool.alloc().expect("few are out");
            tail.append(bytes.len()).expect("room").copy_from_slice(&bytes);
            assert!(mbuf.chain(tail).is_ok());
            model.0.push((usize::from(HEADROOM_BYTES), bytes));
        }
        Step::Overwrite(byte) => {
            mbuf.data_mut().fill(byte);
            model.0[0].1.fill(byte);
        }
        Step::ThroughRaw => {
            let raw = mbuf.into_raw();
            // SAFETY: given up in the line above.
            mbuf = unsafe { Mbuf::from_raw(raw) };
        }
    }
    model.matches(&mbuf);
    mbuf
}

proptest! {
    #[test]
    fn mbufs_behave_like_vectors(steps in prop::collection::vec(step(), 0..60)) {
        let (_, pool) = setup();
        let (mut mbuf, mut model) = (pool.alloc().expect("one is free"), Model::fresh());
        model.matches(&mbuf);
        for step in steps {
            mbuf = apply(pool, mbuf, &mut model, step);
        }
        drop(mbuf);
        prop_assert_eq!(pool.in_use(), 0, "the whole chain went back");
    }
}

#[test]
fn limits_of_pools_and_mbufs_are_told() {
    let (eal, _) = setup();
    let pool = support::pool(eal, "limits", 3);
    let all: Vec<Mbuf> = std::iter::from_fn(|| pool.alloc()).collect();
    assert_eq!((all.len(), pool.in_use(), pool.available()), (3, 3, 0));
    let mut burst = dpdk::Burst::new();
    assert!(!pool.alloc_burst(&mut burst, 1) && burst.is_empty());
    drop(all);
    assert!(!pool.alloc_burst(&mut burst, 4) && burst.is_empty(), "all or none");
    assert!(pool.alloc_burst(&mut burst, 3));
    assert!(!pool.alloc_burst(&mut burst, usize::MAX));
    drop(burst);
    assert_eq!(pool.in_use(), 0);

    let mut mbuf = pool.alloc().expect("one is free");
    assert!(mbuf.append(1 << 20).is_none() && mbuf.prepend(1 << 20).is_none());
    assert!(!mbuf.trim_front(1 << 20) && !mbuf.trim_back(1 << 20));
    assert_eq!(
        (mbuf.ip_checksum(), mbuf.l4_checksum(), mbuf.rss_hash()),
        (Checksum::Unknown, Checksum::Unknown, 0)
    );
    assert!(
        mbuf.request_tx_checksum(14, 20, false)
            && !mbuf.request_tx_checksum(128, 20, false)
            && !mbuf.request_tx_checksum(14, 512, true)
    );

    let error = |name: &str, config: PoolConfig| Pool::new(eal, name, config).expect_err("wrong");
    let config = PoolConfig { mbufs: 31, cache: 0, ..PoolConfig::default() };
    assert!(matches!(error("limits", config), PoolError::Exists(_)));
    assert!(matches!(error("", config), PoolError::BadName(_)));
    assert!(matches!(error(&"x".repeat(25), config), PoolError::BadName(_)));
    assert!(matches!(error("zero", PoolConfig { mbufs: 0, ..config }), PoolError::BadConfig { .. }));
    assert!(matches!(error("cache", PoolConfig { cache: 21, ..config }), PoolError::BadConfig { .. }));
    assert!(matches!(
        error("room", PoolConfig { data_room_bytes: 128, ..config }),
        PoolError::BadConfig { .. }
    ));
    let huge = error("huge", PoolConfig { mbufs: 1 << 20, ..config });
    assert!(matches!(huge, PoolError::NoMemory { mib: 2368, .. }), "{huge}");
    let fits = Pool::new(eal, &"x".repeat(24), config);
    assert!(fits.is_ok(), "{fits:?}");
}

#[test]
fn a_pool_dropped_before_its_mbufs_stays() {
    let (eal, _) = setup();
    let pool = support::pool(eal, "early", 7);
    let mut mbuf = pool.alloc().expect("one is free");
    drop(pool);
    mbuf.append(5).expect("room").copy_from_slice(b"alive");
    assert_eq!(mbuf.data(), b"alive");
    drop(mbuf);
    let again = Pool::new(eal, "early", PoolConfig { mbufs: 7, cache: 0, ..PoolConfig::default() });
    assert!(matches!(again, Err(PoolError::Exists(_))), "a pool that was left is not freed under its mbufs");
}
