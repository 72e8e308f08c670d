//! The null driver, and receiving and writing capture files.

mod support;

use std::fs;
use std::path::Path;

use dpdk::{Burst, Pool, Port, PortConfig};

/// One packet as a classic little-endian capture file holds it.
fn pcap_record(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("small").to_le_bytes();
    [&[0; 8], &length[..], &length[..], bytes].concat()
}

fn write_pcap(path: &Path, packets: &[Vec<u8>]) {
    let header: [&[u8]; 6] = [
        &0xa1b2_c3d4_u32.to_le_bytes(),
        &[2, 0, 4, 0],
        &[0; 4],
        &[0; 4],
        &65535_u32.to_le_bytes(),
        &1_u32.to_le_bytes(),
    ];
    let records = packets.iter().flat_map(|packet| pcap_record(packet));
    fs::write(path, header.concat().into_iter().chain(records).collect::<Vec<u8>>()).expect("write");
}

fn read_pcap(path: &Path) -> Vec<Vec<u8>> {
    let file = fs::read(path).expect("read");
    let mut rest = &file[24..];
    let mut packets = Vec::new();
    while let Some((header, after)) = rest.split_at_checked(16) {
        let length = u32::from_le_bytes(header[8..12].try_into().expect("4 bytes"));
        let (packet, after) = after.split_at(length as usize);
        packets.push(packet.to_vec());
        rest = after;
    }
    packets
}

fn packets() -> Vec<Vec<u8>> {
    let byte = |index: usize| u8::try_from(index % 251).expect("small");
    [60, 61, 1500, 1514, 3000, 64].into_iter().map(|length| (0..length).map(byte).collect()).collect()
}

fn null_sends_everything_and_receives_empty_packets(eal: &dpdk::Eal, pool: &Pool) {
    let config = PortConfig::default();
    let (port, mut rx, mut tx) =
        Port::open(eal, "net_null0", &config, std::slice::from_ref(pool)).expect("opens");
    let mut burst = Burst::new();
    for _ in 0..100 {
        assert_eq!(rx[0].receive(&mut burst), 32);
        assert!(burst.iter().all(|mbuf| mbuf.total_bytes() == 64));
        assert_eq!(tx[0].send(&mut burst), 32);
    }
    assert_eq!((port.stats().rx_packets, port.stats().tx_packets), (3200, 3200));
    // With packets in hand, not sent:
    assert_eq!(rx[0].receive(&mut burst), 32);
}

fn what_a_capture_holds_is_received(eal: &dpdk::Eal, pool: &Pool, folder: &Path) {
    let (input, output) = (folder.join("in.pcap"), folder.join("out.pcap"));
    write_pcap(&input, &packets());
    let device = format!("net_pcap1,rx_pcap={},tx_pcap={}", input.display(), output.display());
    let name = eal.attach(&device).expect("net_pcap is linked");
    let config = PortConfig { mtu: 1500, ..PortConfig::default() };
    let (port, mut rx, mut tx) = Port::open(eal, &name, &config, std::slice::from_ref(pool)).expect("opens");
    let mut burst = Burst::new();
    assert_eq!(rx[0].receive(&mut burst), packets().len());
    for (mbuf, expected) in burst.iter().zip(packets()) {
        assert_eq!(mbuf.segments().collect::<Vec<_>>().concat(), expected);
        // 3000 bytes do not fit one buffer of 2048.
        assert_eq!(mbuf.segment_count(), expected.len().div_ceil(2048));
    }
    assert_eq!(tx[0].send(&mut burst), packets().len());
    assert_eq!(port.stats().tx_packets, packets().len() as u64);
    drop((port, rx, tx));
    assert_eq!(read_pcap(&output), packets());
}

#[test]
fn null_and_pcap() {
    let eal = support::eal(vec![], &["net_null0"]);
    let pool = support::pool(&eal, "pool", 1023);
    let folder = tempfile::tempdir().expect("temporary folder");
    null_sends_everything_and_receives_empty_packets(&eal, &pool);
    assert_eq!(pool.available(), pool.capacity());
    if cfg!(feature = "pcap") {
        what_a_capture_holds_is_received(&eal, &pool, folder.path());
    } else {
        println!("skipped: capture files: built without the feature `pcap`");
    }
    assert_eq!(pool.available(), pool.capacity());
}
