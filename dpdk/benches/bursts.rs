//! What a burst of 32 costs through a pool, a ring and a pair of ring ports. `--no-huge`: for comparisons within one run.

use std::hint::black_box;

use arrayvec::ArrayVec;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dpdk::{BURST, Burst, Eal, EalConfig, Mbuf, Pool, PoolConfig, Port, PortConfig, Ring, RingMode};

fn bursts(criterion: &mut Criterion) {
    let config = EalConfig {
        huge: false,
        file_prefix: format!("bench-{}", std::process::id()),
        extra: vec!["--no-pci".to_owned()],
        ..EalConfig::default()
    };
    let eal = Eal::start(&config).expect("the EAL starts without hugepages");
    let pool = Pool::new(&eal, "bench", PoolConfig::default()).expect("a pool fits");
    let mut group = criterion.benchmark_group("burst of 32");
    group.throughput(Throughput::Elements(BURST as u64));

    let mut burst = Burst::new();
    group.bench_function("pool: take and return", |bencher| {
        bencher.iter(|| {
            black_box(pool.alloc_burst(&mut burst, BURST));
            burst.clear();
        });
    });

    let ring = Ring::<Mbuf>::new(&eal, "many", 64, RingMode::Mpmc).expect("a ring fits");
    let mut items: ArrayVec<Mbuf, BURST> =
        std::iter::repeat_with(|| pool.alloc().expect("one is free")).take(BURST).collect();
    group.bench_function("ring, many to many: enqueue and dequeue", |bencher| {
        bencher.iter(|| (ring.enqueue_burst(&mut items), ring.dequeue_burst(&mut items)));
    });
    let (mut sender, mut receiver) = Ring::spsc(&eal, "one", 64).expect("a ring fits");
    group.bench_function("ring, one to one: enqueue and dequeue", |bencher| {
        bencher.iter(|| (sender.enqueue_burst(&mut items), receiver.dequeue_burst(&mut items)));
    });
    drop(items);

    let (a, b) = Port::ring_pair(&eal, "pair").expect("a pair");
    let open = |name: &str| {
        Port::open(&eal, name, &PortConfig::default(), std::slice::from_ref(&pool)).expect("opens")
    };
    let ((_port_a, _rx_a, mut tx), (_port_b, mut rx, _tx_b)) = (open(&a), open(&b));
    assert!(pool.alloc_burst(&mut burst, BURST));
    group.bench_function("ring ports: send and receive", |bencher| {
        bencher.iter(|| (tx[0].send(&mut burst), rx[0].receive(&mut burst)));
    });
    group.finish();
}

criterion_group!(benches, bursts);
criterion_main!(benches);
