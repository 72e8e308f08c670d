//! Packets from memory outside of pools: what is sent is what lies there, nothing of it can be written, and every mbuf comes back.

mod support;

use std::sync::Arc;

use dpdk::{Attacher, Burst, Eal, ExternalMemory, Mbuf, Pool, Port, PortConfig, RxQueue, TxQueue};

const PAGE: usize = 4096;

/// Bytes at the beginning of a page, and whether they are still there.
struct Memory {
    bytes: Box<[Page]>,
    _alive: Arc<()>,
}

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        // A page is its bytes; a test needs no more than the first.
        &self.bytes[0].0
    }
}

impl Memory {
    fn start(&self) -> usize {
        self.as_ref().as_ptr() as usize
    }
}

/// All of it may be sent from.
fn external(eal: &Eal, memory: &Arc<Memory>, name: &str, mbufs: u32) -> (ExternalMemory, Attacher<Memory>) {
    let external = ExternalMemory::new(eal, memory.start(), PAGE, PAGE).expect("a whole page");
    let attacher = Attacher::new(eal, name, &external, mbufs, 2).expect("a pool");
    (external, attacher)
}

fn memory(alive: &Arc<()>) -> Arc<Memory> {
    let mut page = Page([0; PAGE]);
    page.0.iter_mut().enumerate().for_each(|(at, byte)| *byte = u8::try_from(at % 251).expect("small"));
    Arc::new(Memory { bytes: vec![page].into(), _alive: Arc::clone(alive) })
}

fn open(eal: &Eal, name: &str, pool: &Pool) -> (Port, RxQueue, TxQueue) {
    let (port, mut rx, mut tx) =
        Port::open(eal, name, &PortConfig::default(), std::slice::from_ref(pool)).expect("opens");
    assert!(port.capabilities().tx_multi_segment, "{name} sends chains");
    (port, rx.remove(0), tx.remove(0))
}

fn packet(
    pool: &Pool,
    attacher: &mut Attacher<Memory>,
    memory: &Arc<Memory>,
    begin: usize,
    bytes: usize,
) -> Mbuf {
    let mut head = pool.alloc().expect("a buffer");
    head.append(42).expect("room").fill(7);
    let tail = attacher.attach(memory, begin..begin + bytes).expect("an mbuf");
    head.chain(tail).expect("a chain of two");
    head
}

fn packets_are_what_lies_there(eal: &Eal, pool: &Pool) {
    let alive = Arc::new(());
    let memory = memory(&alive);
    let (external, mut attacher) = external(eal, &memory, "tails", 63);
    let (a, b) = Port::ring_pair(eal, "external").expect("a pair");
    let (port_a, _rx_a, mut tx_a) = open(eal, &a, pool);
    let (port_b, mut rx_b, _tx_b) = open(eal, &b, pool);
    external.map(&port_a).expect("a virtual device needs no map");
    let mut burst = Burst::new();
    for index in 0..32 {
        burst.push(packet(pool, &mut attacher, &memory, index * 3, 100 + index)).expect("room");
    }
    assert_eq!(tx_a.send(&mut burst), 32);
    assert_eq!((attacher.in_flight(), pool.in_use()), (32, 32));
    assert_eq!(rx_b.receive(&mut burst), 32);
    for (index, mbuf) in burst.iter_mut().enumerate() {
        let expected = &(*memory).as_ref()[index * 3..index * 3 + 100 + index];
        assert_eq!((mbuf.segment_count(), mbuf.total_bytes()), (2, 142 + index));
        assert_eq!(mbuf.segments().nth(1), Some(expected));
        // Nothing behind the headers can be written.
        assert_eq!(mbuf.tailroom(), 0);
        assert!(mbuf.trim_back(1) && mbuf.append(1).is_none());
    }
    burst.clear();
    assert_eq!((attacher.in_flight(), pool.in_use()), (0, 0));
    assert_eq!(Arc::strong_count(&memory), 2, "held until it is let go");
    attacher.let_go();
    assert_eq!(Arc::strong_count(&memory), 1);
    drop((attacher, external, port_a, port_b, memory));
    assert_eq!(Arc::strong_count(&alive), 1);
}

fn an_external_head_cannot_be_written(eal: &Eal, _pool: &Pool) {
    let memory = memory(&Arc::new(()));
    let (_external, mut attacher) = external(eal, &memory, "heads", 3);
    let mut mbuf = attacher.attach(&memory, 100..200).expect("an mbuf");
    assert_eq!(mbuf.data(), &(*memory).as_ref()[100..200]);
    assert!(mbuf.data_mut().is_empty());
    assert!(mbuf.trim_front(10) && mbuf.prepend(10).is_none());
    assert_eq!((mbuf.headroom(), mbuf.tailroom()), (0, 0));
}

fn what_cannot_be_attached_is_refused(eal: &Eal, _pool: &Pool) {
    let first = memory(&Arc::new(()));
    for (start, bytes, page) in [(first.start() + 1, PAGE, PAGE), (first.start(), 100, PAGE), (0, 0, PAGE)] {
        assert!(ExternalMemory::new(eal, start, bytes, page).is_err());
    }
    let (_external, mut attacher) = external(eal, &first, "few", 3);
    for range in [0..0, PAGE - 1..PAGE + 1, PAGE..PAGE + 1, 5..5] {
        assert!(attacher.attach(&first, range).is_none());
    }
    let elsewhere = memory(&Arc::new(()));
    assert!(attacher.attach(&elsewhere, 0..10).is_none(), "not in the range that devices know");
    let held: Vec<Mbuf> = std::iter::from_fn(|| attacher.attach(&first, 0..10)).collect();
    assert_eq!((held.len(), attacher.in_flight()), (3, 3), "as many as the pool has");
    drop(held);
    assert!(attacher.attach(&first, PAGE - 1..PAGE).is_some());
    assert_eq!(attacher.in_flight(), 0);
}

/// Two owners of one range, as many as there are leases: a third waits until one of them is free.
fn owners_are_held_while_packets_are_out(eal: &Eal, pool: &Pool) {
    struct Part(Arc<Memory>);
    impl AsRef<[u8]> for Part {
        fn as_ref(&self) -> &[u8] {
            (*self.0).as_ref()
        }
    }
    let whole = memory(&Arc::new(()));
    let external = ExternalMemory::new(eal, whole.start(), PAGE, PAGE).expect("a whole page");
    let mut attacher = Attacher::new(eal, "parts", &external, 15, 2).expect("a pool");
    let parts: Vec<Arc<Part>> = (0..3).map(|_| Arc::new(Part(Arc::clone(&whole)))).collect();
    let counts = |parts: &[Arc<Part>]| parts.iter().map(Arc::strong_count).collect::<Vec<_>>();
    let a = attacher.attach(&parts[0], 0..9).expect("a lease");
    let b = attacher.attach(&parts[1], 0..9).expect("a lease");
    let again = attacher.attach(&parts[0], 9..12).expect("the first lease");
    assert!(attacher.attach(&parts[2], 0..9).is_none());
    attacher.let_go();
    assert_eq!(counts(&parts), [2, 2, 1]);
    drop(a);
    attacher.let_go();
    assert_eq!(counts(&parts), [2, 2, 1], "one of its packets is still out");
    drop(b);
    let c = attacher.attach(&parts[2], 0..9).expect("the second lease is free");
    assert_eq!(counts(&parts), [2, 1, 2]);
    drop((c, again));
    attacher.let_go();
    assert_eq!(counts(&parts), [1, 1, 1]);
    assert_eq!(pool.in_use(), 0);
}

fn memory_outlives_packets_that_outlive_their_maker(eal: &Eal, pool: &Pool) {
    let alive = Arc::new(());
    let memory = memory(&alive);
    let (external, mut attacher) = external(eal, &memory, "orphans", 3);
    let orphan = packet(pool, &mut attacher, &memory, 0, 50);
    drop((attacher, external, memory));
    assert_eq!(orphan.segments().nth(1).map(<[u8]>::len), Some(50));
    assert_eq!(Arc::strong_count(&alive), 2, "still there");
    drop(orphan);
    assert_eq!(Arc::strong_count(&alive), 2, "and stays, for nobody was left to free it");
}

fn packets_in_flight_come_back_when_ports_close(eal: &Eal, pool: &Pool) {
    for _ in 0..20 {
        let alive = Arc::new(());
        let memory = memory(&alive);
        let (external, mut attacher) = external(eal, &memory, "tails", 63);
        let (a, b) = Port::ring_pair(eal, "closing").expect("a pair");
        let ports = (open(eal, &a, pool), open(eal, &b, pool));
        let mut burst = Burst::new();
        for _ in 0..20 {
            burst.push(packet(pool, &mut attacher, &memory, 0, 1000)).expect("room");
        }
        let ((port_a, rx_a, mut tx_a), others) = ports;
        assert_eq!(tx_a.send(&mut burst), 20);
        drop((port_a, rx_a, tx_a, others));
        assert_eq!((attacher.in_flight(), pool.in_use()), (0, 0));
        drop((attacher, external, memory));
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}

fn a_null_port_frees_what_it_takes(eal: &Eal, pool: &Pool) {
    let memory = memory(&Arc::new(()));
    let (_external, mut attacher) = external(eal, &memory, "tails", 63);
    let config = PortConfig::default();
    let (_port, _rx, mut tx) =
        Port::open(eal, "net_null0", &config, std::slice::from_ref(pool)).expect("opens");
    let mut burst = Burst::new();
    for _ in 0..100 {
        for _ in 0..32 {
            burst.push(packet(pool, &mut attacher, &memory, 0, 1440)).expect("room");
        }
        assert_eq!(tx[0].send(&mut burst), 32);
        assert_eq!((attacher.in_flight(), pool.in_use()), (0, 0));
    }
}

#[test]
fn external_memory() {
    let eal = support::eal(vec![], &["net_null0"]);
    let pool = support::pool(&eal, "pool", 255);
    for scenario in [
        packets_are_what_lies_there,
        an_external_head_cannot_be_written,
        what_cannot_be_attached_is_refused,
        owners_are_held_while_packets_are_out,
        memory_outlives_packets_that_outlive_their_maker,
        packets_in_flight_come_back_when_ports_close,
        a_null_port_frees_what_it_takes,
    ] {
        scenario(&eal, &pool);
        assert_eq!(pool.available(), pool.capacity());
    }
}
