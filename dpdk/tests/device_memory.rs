//! Packet buffers in memory that is not the CPU's, for which ordinary memory stands in: DPDK knows it, pools lie in it, drivers that do not look
//! at it fill it, and packets are cut in two on their way into it.

mod support;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dpdk::{
    Burst, Checksum, DEVICE_PAGE_BYTES, DeviceMemory, DevicePool, Eal, ExternalError, Pool, Port, PortConfig,
    SplitPools, SplitUnfit,
};
use hugepages::DeviceWritable;

/// How many of them there are.
static ALIVE: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug)]
struct Memory {
    start: usize,
    bytes: usize,
    is_cpu_memory: bool,
}

const PAGES: usize = 8;

impl Memory {
    fn layout(bytes: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(bytes, DEVICE_PAGE_BYTES).expect("a layout")
    }

    fn new(is_cpu_memory: bool) -> Arc<Self> {
        let bytes = PAGES * DEVICE_PAGE_BYTES;
        // SAFETY: some bytes.
        let start = unsafe { std::alloc::alloc_zeroed(Self::layout(bytes)) };
        assert!(!start.is_null());
        ALIVE.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { start: start.expose_provenance(), bytes, is_cpu_memory })
    }

    /// What lies at an address, while nobody writes there.
    fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let address = usize::try_from(address).expect("an address");
        assert!(address >= self.start && address + bytes <= self.start + self.bytes);
        // SAFETY: within the memory; the test's only thread reads it.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), bytes).to_vec() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`.
        unsafe {
            let start = std::ptr::with_exposed_provenance_mut(self.start);
            std::alloc::dealloc(start, Self::layout(self.bytes));
        }
        ALIVE.fetch_sub(1, Ordering::Relaxed);
    }
}

// SAFETY: allocated for this alone; references are made only when nothing is being received.
unsafe impl DeviceWritable for Memory {
    fn address(&self) -> usize {
        self.start
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn is_cpu_memory(&self) -> bool {
        self.is_cpu_memory
    }
}

/// A part of other memory.
#[derive(Debug)]
struct Part(Arc<Memory>, usize, usize);

// SAFETY: within memory that it holds.
unsafe impl DeviceWritable for Part {
    fn address(&self) -> usize {
        self.0.start + self.1
    }

    fn bytes(&self) -> usize {
        self.2
    }

    fn is_cpu_memory(&self) -> bool {
        true
    }
}

fn memory_is_registered_once_and_let_go(eal: &Eal) {
    let memory = Memory::new(true);
    for (first, bytes) in
        [(1, DEVICE_PAGE_BYTES), (0, DEVICE_PAGE_BYTES + 4096), (4096, DEVICE_PAGE_BYTES), (0, 0)]
    {
        let refused = DeviceMemory::register(eal, Arc::new(Part(Arc::clone(&memory), first, bytes)));
        assert!(matches!(refused, Err(ExternalError::Unaligned { .. })), "{first}, {bytes}: {refused:?}");
    }
    let registered = DeviceMemory::register(eal, memory.clone()).expect("whole pages");
    let again = DeviceMemory::register(eal, memory.clone()).expect_err("DPDK knows it already").to_string();
    assert!(again.contains("registering the memory with DPDK failed"), "{again}");
    drop(registered);
    drop(DeviceMemory::register(eal, memory).expect("it was let go"));
    assert_eq!(ALIVE.load(Ordering::Relaxed), 0);
}

/// Virtual devices take any memory, and cannot be used with what the CPU cannot write.
fn virtual_devices_are_found_out(eal: &Eal) {
    let memory = DeviceMemory::register(eal, Memory::new(false)).expect("registers");
    let probe = Port::probe(eal, "net_null0").expect("is there");
    assert!(probe.is_virtual());
    memory.map(&probe).expect("a virtual device accepts it");
    assert_eq!(probe.can_split(2), Err(SplitUnfit::Virtual { driver: "net_null".to_owned() }));
    assert!(Port::probe(eal, "net_none7").is_err_and(|error| error.to_string().contains("net_none7")));
}

/// The null driver hands out buffers without a look at them.
fn a_driver_that_looks_at_nothing_fills_it(eal: &Eal) {
    let memory = Memory::new(false);
    let registered = DeviceMemory::register(eal, memory.clone()).expect("registers");
    registered.map(&Port::probe(eal, "net_null0").expect("is there")).expect("accepted");
    let too_many =
        DevicePool::new(eal, "toomany", &registered, 64, 256, 2048).expect_err("too many").to_string();
    assert!(too_many.contains("exceed"), "{too_many}");
    let tail = DevicePool::new(eal, "whole", &registered, 0, 256, 2048).expect("a pool");
    drop(registered);
    let config = PortConfig { rx_queues: 0, ..PortConfig::default() };
    let pools = SplitPools { head: None, tail: tail.clone(), at_bytes: 0 };
    let dpdk::OpenPort { port, split_rx: mut split, tx, .. } =
        Port::open_split(eal, "net_null0", &config, &[], std::slice::from_ref(&pools)).expect("opens");
    drop(pools);
    let mut held = Vec::new();
    for _ in 0..4 {
        let count = split[0].receive();
        assert!(count > 0);
        for packet in std::iter::from_fn(|| split[0].take()) {
            let buffer = packet.tail.expect("all of it lies there");
            assert!(packet.head.is_none() && buffer.bytes() == 64);
            let (first, end) = (memory.start as u64, (memory.start + memory.bytes) as u64);
            assert!((first..end - 64).contains(&buffer.address()));
            assert!(memory.read(buffer.address(), 64).iter().all(|&byte| byte == 0), "nothing was written");
            held.push(buffer);
        }
    }
    assert_eq!(held.len(), 128);
    let places: HashSet<u64> = held.iter().map(dpdk::DeviceBuffer::address).collect();
    assert_eq!(places.len(), 128, "each has a place of its own");
    drop(held);
    drop((port, split, tx));
    assert_eq!(tail.in_use(), 0, "every buffer is back");
    drop(tail);
    drop(memory);
    assert_eq!(ALIVE.load(Ordering::Relaxed), 0, "pool, port and registration let the memory go");
}

/// An IPv4 or IPv6 datagram of `payload`, with or without a tag, whose checksum is right.
fn frame(ipv6: bool, tagged: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2; 12];
    if tagged {
        bytes.extend([0x81, 0, 0, 5]);
    }
    let udp_bytes = u16::try_from(8 + payload.len()).expect("small").to_be_bytes();
    let ip = bytes.len() + 2;
    let addresses = if ipv6 {
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, udp_bytes[0], udp_bytes[1], 17, 64]);
        bytes.extend([7; 32]);
        ip + 8..ip + 40
    } else {
        let total = u16::try_from(28 + payload.len()).expect("small").to_be_bytes();
        bytes.extend([8, 0, 0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0]);
        bytes.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        ip + 12..ip + 20
    };
    let udp = bytes.len();
    bytes.extend([0x12, 0x34, 0x56, 0x78, udp_bytes[0], udp_bytes[1], 0, 0]);
    bytes.extend(payload);
    let summed = [&bytes[addresses], &[0, 17], &udp_bytes, &bytes[udp..]].concat();
    let words = summed.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).expect("folded");
    bytes[udp + 6..udp + 8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    bytes
}

/// Where the CPU plays the NIC: cut at the right byte, checksums judged, lost when no buffer is free.
fn packets_are_cut(eal: &Eal, head: &Pool) {
    const AT: usize = 74;
    let memory = Memory::new(true);
    let registered = DeviceMemory::register(eal, memory.clone()).expect("registers");
    let tail = DevicePool::new(eal, "tails", &registered, DEVICE_PAGE_BYTES, 7, 1024).expect("a pool");
    let (near, far) = Port::ring_pair_with(eal, "cut", 2, 256).expect("a pair");
    let config = PortConfig { tx_queues: 2, rx_queues: 2, ..PortConfig::default() };
    let (_near, _, mut tx) = Port::open(eal, &near, &config, &[head.clone(), head.clone()]).expect("opens");
    registered.map(&Port::probe(eal, &far).expect("is there")).expect("accepted");
    let pools = SplitPools { head: Some(head.clone()), tail: tail.clone(), at_bytes: 74 };
    let dpdk::OpenPort { port: far, rx: mut plain, split_rx: mut split, .. } =
        Port::open_split(eal, &far, &PortConfig::default(), std::slice::from_ref(head), &[pools])
            .expect("opens");
    assert!(far.split_refused().is_none());
    let mut send = |queue: usize, bytes: &[u8]| {
        let mut mbuf = head.alloc().expect("a buffer");
        mbuf.append(bytes.len()).expect("room").copy_from_slice(bytes);
        let mut burst = Burst::new();
        burst.push(mbuf).expect("room");
        assert_eq!(tx[queue].send(&mut burst), 1);
    };
    let payload: Vec<u8> = (0..=255).cycle().take(700).collect();
    for ipv6 in [false, true] {
        for tagged in [false, true] {
            for bytes in [0, 3, 21, 32, 33, 34, 700] {
                let right = frame(ipv6, tagged, &payload[..bytes]);
                let mut wrong = right.clone();
                *wrong.last_mut().expect("some") ^= 1;
                let mut absent = right.clone();
                let udp = right.len() - bytes - 8;
                absent[udp + 6..udp + 8].fill(0);
                let absent_is = if ipv6 { Checksum::Bad } else { Checksum::Unknown };
                for (packet, sum) in [(right, Checksum::Good), (wrong, Checksum::Bad), (absent, absent_is)] {
                    send(1, &packet);
                    assert_eq!((split[0].receive(), plain[0].receive(&mut Burst::new())), (1, 0));
                    let got = split[0].take().expect("one");
                    assert_eq!(got.total_bytes(), packet.len());
                    let first = got.head.expect("headers lie in host memory");
                    assert_eq!((first.data(), first.l4_checksum()), (&packet[..packet.len().min(AT)], sum));
                    assert_eq!(got.tail.is_some(), packet.len() > AT);
                    if let Some(rest) = got.tail {
                        assert_eq!(memory.read(rest.address(), rest.bytes()), packet[AT..]);
                    }
                }
            }
        }
    }
    let packet = frame(false, false, &payload);
    let held: Vec<_> = (0..7)
        .map(|_| {
            send(1, &packet);
            split[0].receive();
            split[0].take().expect("one")
        })
        .collect();
    let places: HashSet<u64> =
        held.iter().map(|packet| packet.tail.as_ref().expect("cut").address()).collect();
    assert_eq!(places.len(), 7, "each has a place of its own");
    send(1, &packet);
    assert_eq!(split[0].receive(), 1);
    let lost = split[0].take().expect("one");
    assert!(lost.head.is_none() && lost.tail.is_none(), "no buffer was free");
    drop(held);
    send(1, &frame(false, false, &[0; 1400]));
    assert_eq!(split[0].receive(), 1);
    assert!(split[0].take().expect("one").tail.is_none(), "larger than a buffer");
    send(0, &packet);
    let mut burst = Burst::new();
    assert_eq!(
        (plain[0].receive(&mut burst), burst[0].data()),
        (1, &packet[..]),
        "the other queue is as ever"
    );
    drop(burst);
    assert_eq!(tail.in_use(), 0);
}

#[test]
fn device_memory() {
    let eal = support::eal(vec![], &["net_null0"]);
    memory_is_registered_once_and_let_go(&eal);
    virtual_devices_are_found_out(&eal);
    assert_eq!(ALIVE.load(Ordering::Relaxed), 0);
    a_driver_that_looks_at_nothing_fills_it(&eal);
    let head = support::pool(&eal, "heads", 1023);
    packets_are_cut(&eal, &head);
    assert_eq!(head.in_use(), 0);
    assert_eq!(ALIVE.load(Ordering::Relaxed), 0);
}
