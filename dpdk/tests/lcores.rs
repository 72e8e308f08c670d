//! Workers: pinned where they were asked to be, and a panic stays inside.

mod support;

use std::sync::mpsc;
use std::time::Duration;

use dpdk::{Burst, EalConfig, EalError, LaunchError, Pool, PoolConfig};
use rustix::thread::{CpuSet, sched_getaffinity};

fn my_cpus() -> Vec<usize> {
    let set = sched_getaffinity(None).expect("readable");
    (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

fn pinned_and_floating(eal: &dpdk::Eal, cpus: &[usize], asked: &[usize]) {
    assert_eq!(my_cpus(), cpus, "the main lcore floats");
    assert_eq!(std::thread::spawn(my_cpus).join().expect("no panic"), cpus, "so do later threads");
    let (sender, receiver) = mpsc::channel();
    for worker in 0..asked.len() {
        let sender = sender.clone();
        eal.launch(worker, move || sender.send((worker, my_cpus())).expect("received")).expect("idle");
    }
    (0..asked.len()).for_each(|worker| eal.wait(worker).expect("no panic"));
    let mut got: Vec<_> = receiver.try_iter().collect();
    got.sort();
    let expected: Vec<_> = asked.iter().enumerate().map(|(worker, &cpu)| (worker, vec![cpu])).collect();
    assert_eq!(got, expected);
}

fn busy_and_panicking(eal: &dpdk::Eal) {
    let (release, held) = mpsc::channel::<()>();
    eal.launch(0, move || held.recv().unwrap_or_default()).expect("idle");
    assert!(eal.is_running(0));
    let refused = eal.launch(0, || ());
    assert!(matches!(refused, Err(LaunchError::Busy(0))));
    drop(release);
    eal.wait(0).expect("no panic");
    assert!(!eal.is_running(0));

    eal.launch(0, || panic!("on purpose: {}", 7)).expect("idle");
    let panicked = eal.wait(0).expect_err("it did");
    assert_eq!((panicked.worker, panicked.message.as_str()), (0, "on purpose: 7"));
    eal.wait(0).expect("said once");
    eal.launch(0, || ()).expect("usable again");
    eal.wait(0).expect("no panic");

    let missing = eal.launch(99, || ()).expect_err("no such worker").to_string();
    assert!(missing.contains("no worker 99") && missing.contains('3'), "{missing}");
    eal.wait(99).expect("nothing to wait for");
}

fn caches_of_lcores_count_as_available(eal: &dpdk::Eal) {
    let config = PoolConfig { mbufs: 511, cache: 64, ..PoolConfig::default() };
    for round in 0..20 {
        let pool = Pool::new(eal, "cached", config).unwrap_or_else(|error| panic!("round {round}: {error}"));
        for worker in 0..eal.workers() {
            let pool = pool.clone();
            let take_and_return = move || {
                let mut burst = Burst::new();
                for count in (0..2000).map(|index| index % 33) {
                    assert!(pool.alloc_burst(&mut burst, count));
                    burst.clear();
                }
            };
            eal.launch(worker, take_and_return).expect("idle");
        }
        (0..eal.workers()).for_each(|worker| eal.wait(worker).expect("no panic"));
        assert_eq!(pool.available(), pool.capacity());
    }
}

#[test]
fn lcores() {
    let cpus = my_cpus();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    let absent = EalConfig { lcores: vec![first, 100_000], huge: false, ..EalConfig::default() };
    assert!(matches!(
        dpdk::Eal::start(&absent),
        Err(EalError::CpuNotAllowed { worker: 1, cpu: 100_000, .. })
    ));

    let asked = [last, first, last];
    let eal = support::eal(asked.to_vec(), &[]);
    assert_eq!(eal.workers(), 3);
    pinned_and_floating(&eal, &cpus, &asked);
    busy_and_panicking(&eal);
    caches_of_lcores_count_as_available(&eal);
    assert!(matches!(dpdk::Eal::start(&EalConfig::default()), Err(EalError::AlreadyStarted)));

    // Dropped while a worker runs: waits for it.
    let (sender, receiver) = mpsc::channel();
    eal.launch(2, move || {
        std::thread::sleep(Duration::from_millis(100));
        sender.send(()).expect("received");
    })
    .expect("idle");
    drop(eal);
    receiver.try_recv().expect("the worker had ended");
    let left = [
        "/var/run/dpdk".to_owned(),
        "/tmp/dpdk".to_owned(),
        std::env::var("XDG_RUNTIME_DIR").unwrap_or_default() + "/dpdk",
    ];
    let own = format!("test-{}", std::process::id());
    assert!(
        left.iter().all(|folder| !std::path::Path::new(folder).join(&own).exists()),
        "no folder stays behind"
    );
}
