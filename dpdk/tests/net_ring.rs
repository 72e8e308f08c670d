//! Ports over rings: what is sent arrives, and whatever happens, every mbuf comes back.

mod support;

use dpdk::{Burst, Eal, Pool, Port, PortConfig, PortError, RxQueue, TxQueue};

fn open(eal: &Eal, name: &str, pool: &Pool) -> (Port, RxQueue, TxQueue) {
    let (port, mut rx, mut tx) =
        Port::open(eal, name, &PortConfig::default(), std::slice::from_ref(pool)).expect("a ring port opens");
    (port, rx.remove(0), tx.remove(0))
}

fn fill(pool: &Pool, burst: &mut Burst, count: usize) {
    assert!(pool.alloc_burst(burst, count), "{count} mbufs are free");
    for (index, mbuf) in burst.iter_mut().enumerate() {
        let bytes = mbuf.append(64 + index).expect("room");
        bytes.fill(u8::try_from(index).expect("small"));
    }
}

fn packets_go_both_ways_in_order(eal: &Eal, pool: &Pool) {
    let (a, b) = Port::ring_pair(eal, "pair").expect("a pair");
    let (port_a, mut rx_a, mut tx_a) = open(eal, &a, pool);
    let (port_b, mut rx_b, mut tx_b) = open(eal, &b, pool);
    assert_eq!(port_a.driver(), "net_ring");
    assert!(port_a.link_up() && port_b.link_up());
    assert!(matches!(
        Port::open(eal, &a, &PortConfig::default(), std::slice::from_ref(pool)),
        Err(PortError::AlreadyOpen(_))
    ));

    let mut burst = Burst::new();
    for (tx, rx) in [(&mut tx_a, &mut rx_b), (&mut tx_b, &mut rx_a)] {
        fill(pool, &mut burst, 32);
        assert_eq!((tx.send(&mut burst), burst.len()), (32, 0));
        assert_eq!(rx.receive(&mut burst), 32);
        for (index, mbuf) in burst.drain().enumerate() {
            assert_eq!(mbuf.data(), vec![u8::try_from(index).expect("small"); 64 + index]);
        }
    }
    assert_eq!((port_a.stats().tx_packets, port_a.stats().rx_packets), (32, 32));
    assert_eq!(pool.in_use(), 0);
}

fn a_full_queue_leaves_the_rest_in_the_burst(eal: &Eal, pool: &Pool) {
    let (a, b) = Port::ring_pair_with(eal, "narrow", 1, 40).expect("a pair");
    let (_port_a, _rx_a, mut tx_a) = open(eal, &a, pool);
    let (_port_b, mut rx_b, _tx_b) = open(eal, &b, pool);
    let mut burst = Burst::new();
    fill(pool, &mut burst, 32);
    assert_eq!(tx_a.send(&mut burst), 32);
    fill(pool, &mut burst, 32);
    assert_eq!(tx_a.send(&mut burst), 8);
    assert_eq!(burst.len(), 24);
    assert_eq!(burst[0].total_bytes(), 64 + 8, "the ninth is first now");
    assert_eq!(tx_a.send(&mut burst), 0);

    let mut received = Burst::new();
    assert_eq!(rx_b.receive(&mut received), 32);
    assert_eq!(tx_a.send(&mut burst), 24);
    received.clear();
    assert_eq!(rx_b.receive(&mut received), 32);
    // 8 of the second burst's packets stay received, none stays in the rings after the last 0.
    assert_eq!(rx_b.receive(&mut Burst::new()), 0);
    drop(received);
    assert_eq!(pool.in_use(), 0);
}

fn packets_in_flight_come_back_when_ports_close(eal: &Eal, pool: &Pool) {
    for _ in 0..50 {
        let (a, b) = Port::ring_pair(eal, "again").expect("the name is free again");
        let (port_a, rx_a, mut tx_a) = open(eal, &a, pool);
        let (port_b, rx_b, mut tx_b) = open(eal, &b, pool);
        let mut burst = Burst::new();
        for tx in [&mut tx_a, &mut tx_b] {
            fill(pool, &mut burst, 20);
            assert_eq!(tx.send(&mut burst), 20);
        }
        assert_eq!(pool.in_use(), 40);
        drop((port_a, port_b, rx_a, rx_b));
        assert_eq!(pool.in_use(), 40, "the send queues keep the ports");
        drop((tx_a, tx_b));
        assert_eq!(pool.in_use(), 0);
    }
}

fn a_loop_port_can_be_attached_again(eal: &Eal, pool: &Pool) {
    for _ in 0..20 {
        let name = eal.attach("net_ring_loop").expect("net_ring is linked");
        let (port, rx, mut tx) = open(eal, &name, pool);
        let mut burst = Burst::new();
        fill(pool, &mut burst, 7);
        assert_eq!(tx.send(&mut burst), 7);
        drop((port, rx, tx));
        assert_eq!(pool.in_use(), 0);
    }
}

fn mistakes_are_named(eal: &Eal, pool: &Pool) {
    let config = PortConfig::default();
    let error = |name: &str, config: &PortConfig, pools: &[Pool]| {
        Port::open(eal, name, config, pools).expect_err("wrong").to_string()
    };
    assert!(
        error("net_ring_none", &config, std::slice::from_ref(pool)).contains("no port \"net_ring_none\"")
    );
    assert!(error("net_ring_none", &config, &[]).contains("0 pools"));
    let (a, _b) = Port::ring_pair(eal, "wrong").expect("a pair");
    let many = PortConfig { rx_queues: 2, ..config };
    assert!(error(&a, &many, &[pool.clone(), pool.clone()]).contains("at most 1 receive queues"));
    assert!(Port::ring_pair(eal, "wrong").expect_err("taken").to_string().contains("already"));
    assert!(eal.attach("net_nothing0").expect_err("no driver").to_string().contains("net_nothing0"));
}

#[test]
fn ring_ports() {
    let eal = support::eal(vec![], &[]);
    let pool = support::pool(&eal, "pool", 255);
    for scenario in [
        packets_go_both_ways_in_order,
        a_full_queue_leaves_the_rest_in_the_burst,
        packets_in_flight_come_back_when_ports_close,
        a_loop_port_can_be_attached_again,
        mistakes_are_named,
    ] {
        scenario(&eal, &pool);
        assert_eq!(pool.available(), pool.capacity());
    }
    every_driver_is_linked();
}

fn every_driver_is_linked() {
    let linked = dpdk::drivers();
    let mut expected = vec![
        "net_ice",
        "net_i40e",
        "net_ixgbe",
        "net_ena",
        "net_virtio",
        "net_vhost",
        "net_af_packet",
        "net_tap",
        "net_memif",
        "net_ring",
        "net_null",
        "compress_zlib",
    ];
    let optional: [(bool, &[&str]); 4] = [
        (cfg!(feature = "mlx5"), &["net_mlx5", "compress_mlx5"]),
        (cfg!(feature = "af_xdp"), &["net_af_xdp"]),
        (cfg!(feature = "pcap"), &["net_pcap"]),
        // Debian has ISA-L, and so its driver, for x86 and Arm alike; its archive is optional all the same.
        (cfg!(all(feature = "isal", target_arch = "x86_64")), &["compress_isal"]),
    ];
    optional.iter().filter(|(on, _)| *on).for_each(|(_, names)| expected.extend_from_slice(names));
    let missing: Vec<_> =
        expected.into_iter().filter(|name| !linked.iter().any(|driver| driver == name)).collect();
    assert!(missing.is_empty(), "{missing:?} are not in {linked:?}");
}
