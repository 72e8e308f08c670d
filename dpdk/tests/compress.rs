//! Compression devices in software: what they decompress, what they refuse, and that all mbufs and ops come back.

mod support;

use arrayvec::ArrayVec;
use dpdk::{
    BURST, CompressAlgorithm, CompressConfig, CompressDev, CompressError, CompressOp, CompressQueue, Eal,
    Mbuf, OpError, Pool, PoolConfig, Unfit,
};
use libdeflater::{CompressionLvl, Compressor};

/// Bytes of a plane's codes: more than one mbuf of a destination takes.
const OUTPUT_BYTES: usize = 128 << 10;

type Ops = ArrayVec<Box<CompressOp<usize>>, BURST>;

fn config(queue_pairs: u16) -> CompressConfig {
    CompressConfig { queue_pairs, in_flight: 16, output_bytes: OUTPUT_BYTES }
}

/// Skewed nibbles: what codes look like.
fn codes(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut nibble = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let [.., high] = state.to_be_bytes().map(|byte| byte & 3);
        let [first, second, ..] = state.to_be_bytes();
        (first & 7) + (second & 7) + high / 2
    };
    (0..bytes).map(|_| (nibble() & 15) | (nibble() << 4)).collect()
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut compressor = Compressor::new(CompressionLvl::new(6).expect("a level"));
    let mut out = vec![0; compressor.deflate_compress_bound(bytes.len())];
    let length = compressor.deflate_compress(bytes, &mut out).expect("the bound holds");
    out.truncate(length);
    out
}

/// `front` bytes that are not compressed and then the stream, cut into buffers of `segment` bytes.
fn chain(pool: &Pool, front: usize, stream: &[u8], segment: usize) -> Mbuf {
    let packet: Vec<u8> = std::iter::repeat_n(0xee, front).chain(stream.iter().copied()).collect();
    let mut mbufs = packet.chunks(segment).map(|bytes| {
        let mut mbuf = pool.alloc().expect("one is free");
        mbuf.append(bytes.len()).expect("room").copy_from_slice(bytes);
        mbuf
    });
    let mut head = mbufs.next().expect("not empty");
    mbufs.for_each(|mbuf| head.chain(mbuf).expect("few"));
    head
}

/// Enqueues and waits for all.
fn through(queue: &mut CompressQueue<usize>, mut ops: Ops) -> Ops {
    let expected = ops.len();
    let mut done = Ops::new();
    // Bounded by the driver's own work: a software device has done all that it took.
    while done.len() < expected {
        queue.enqueue_burst(&mut ops);
        queue.dequeue_burst(&mut done);
    }
    assert!(ops.is_empty() && queue.in_flight() == 0);
    done
}

fn load(
    queue: &mut CompressQueue<usize>,
    source: Mbuf,
    front: usize,
    bytes: usize,
    context: usize,
) -> Box<CompressOp<usize>> {
    let mut op = queue.take_op().expect("one is idle");
    let range = front..source.total_bytes();
    assert!(op.load(source, range, bytes, context).is_ok());
    op
}

fn streams_of_every_cut_come_back_as_they_were(eal: &Eal, pool: &Pool, name: &str) {
    let (dev, mut queues) = CompressDev::open(eal, name, &config(1)).expect("opens");
    let queue = &mut queues[0];
    // A device that writes no chains gives what one mbuf takes.
    let most = dev.max_output_bytes();
    assert!(most == OUTPUT_BYTES || most == 65_408, "{most}");
    for (bytes, front, segment) in [
        (most, 0, 1376),
        (most, 300, 1376),
        (most, 1375, 1376),
        (65_472, 7, 1000),
        (65_473, 7, 1000),
        (4096, 0, 2048),
        (1000, 3, 17),
        (1, 0, 1),
        (1, 5, 100),
    ] {
        let bytes = bytes.min(most);
        let plain = codes(bytes, bytes as u64 + front as u64);
        let front = front.min(segment - 1);
        let ops: Ops = (0..4)
            .map(|i| load(queue, chain(pool, front, &deflate(&plain), segment), front, bytes, i))
            .collect();
        let done = through(queue, ops);
        let mut contexts = Vec::new();
        for mut op in done {
            assert_eq!(op.output(), Ok(plain.as_slice()), "{name}: {bytes} bytes in buffers of {segment}");
            contexts.push(*op.context_mut().expect("loaded"));
            queue.give_back(op);
        }
        contexts.sort_unstable();
        assert_eq!(contexts, [0, 1, 2, 3]);
        assert_eq!(pool.in_use(), 0);
    }
    drop(queues);
    assert_eq!(dev.in_use(), 0);
}

fn bad_streams_fail_and_the_queue_goes_on(eal: &Eal, pool: &Pool, name: &str) {
    let (dev, mut queues) = CompressDev::open(eal, name, &config(1)).expect("opens");
    let most = dev.max_output_bytes();
    let queue = &mut queues[0];
    let plain = codes(most, 5);
    let good = deflate(&plain);
    let bomb = deflate(&vec![0; 16 << 20]);
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 0x10;
    let cases: [(&str, &[u8], usize); 8] = [
        ("truncated by a byte", &good[..good.len() - 1], most),
        ("truncated to half", &good[..good.len() / 2], most),
        ("one byte", &good[..1], most),
        ("too short", &deflate(&plain[..1000]), most),
        ("too long", &good, most - 1),
        ("16 MiB of zeros", &bomb, most),
        ("no Deflate at all", &[0xff; 3000], most),
        ("an empty stored block over and over", &[0, 0, 0, 0xff, 0xff].repeat(1000), most),
    ];
    for (what, stream, bytes) in cases {
        for segment in [1376, 60_000] {
            let source = chain(pool, 10, stream, segment.min(2048));
            let op = load(queue, source, 10, bytes, 0);
            let mut done = through(queue, Ops::from_iter([op]));
            let op = done.pop().expect("one");
            assert!(op.output().is_err(), "{name}: {what}: {:?}", op.output().map(<[u8]>::len));
            assert_ne!(op.output().map(drop), Err(OpError::NotProcessed), "{name}: {what}");
            queue.give_back(op);
        }
    }
    // A flipped bit in the midst of codes may decode to as many other codes: whatever it does, it ends.
    let op = load(queue, chain(pool, 0, &flipped, 1376), 0, most, 0);
    drop(through(queue, Ops::from_iter([op])));
    let op = load(queue, chain(pool, 0, &good, 1376), 0, most, 0);
    let mut done = through(queue, Ops::from_iter([op]));
    let op = done.pop().expect("one");
    assert_eq!(op.output(), Ok(plain.as_slice()), "{name}: the queue still works");
    drop(op);
    drop(queues);
    assert_eq!(pool.in_use(), 0);
}

fn everything_comes_back_when_queues_are_dropped_at_work(eal: &Eal, pool: &Pool, name: &str) {
    let plain = codes(4000, 9);
    let stream = deflate(&plain);
    for round in 0..8 {
        let (dev, mut queues) = CompressDev::open(eal, name, &config(2)).expect("opens again");
        for queue in &mut queues {
            let mut ops: Ops =
                (0..3 + round % 3).map(|i| load(queue, chain(pool, 0, &stream, 500), 0, 4000, i)).collect();
            let unsent = load(queue, chain(pool, 0, &stream, 500), 0, 4000, 9);
            queue.enqueue_burst(&mut ops);
            assert!(queue.in_flight() > 0);
            // Some are dropped with what they hold, some with the device, some with the queue.
            drop((ops, unsent));
        }
        drop(queues);
        assert_eq!(pool.in_use(), 0, "{name}: sources");
        assert_eq!(dev.in_use(), 0, "{name}: ops and destinations");
    }
}

fn the_device_takes_no_more_than_fit(eal: &Eal, pool: &Pool, name: &str) {
    let (_dev, mut queues) = CompressDev::open(eal, name, &config(1)).expect("opens");
    let queue = &mut queues[0];
    let plain = codes(100, 3);
    let stream = deflate(&plain);
    let mut held = 0;
    while let Some(mut op) = queue.take_op() {
        let source = chain(pool, 0, &stream, 100);
        let range = 0..source.total_bytes();
        assert!(op.load(source, range, 100, held).is_ok());
        let mut ops = Ops::from_iter([op]);
        queue.enqueue_burst(&mut ops);
        held += 1;
    }
    assert_eq!((held, queue.idle()), (16, 0), "{name}");
    let mut done = Ops::new();
    let mut back = 0;
    while queue.in_flight() > 0 {
        queue.dequeue_burst(&mut done);
        for op in done.drain(..) {
            assert_eq!(op.output(), Ok(plain.as_slice()));
            queue.give_back(op);
            back += 1;
        }
    }
    assert!(back > 0 && queue.idle() == back);
}

fn mistakes_are_named(eal: &Eal, pool: &Pool, name: &str) {
    let refuse =
        |config: CompressConfig| CompressDev::open::<()>(eal, name, &config).expect_err("wrong").to_string();
    assert!(refuse(CompressConfig { queue_pairs: 0, ..config(1) }).contains("0 queue pairs"));
    assert!(refuse(CompressConfig { in_flight: 12, ..config(1) }).contains("power of two"));
    assert!(refuse(CompressConfig { output_bytes: 0, ..config(1) }).contains("0 bytes"));
    let (dev, mut queues) = CompressDev::open(eal, name, &config(1)).expect("opens");
    assert!(matches!(CompressDev::open::<()>(eal, name, &config(1)), Err(CompressError::AlreadyOpen(_))));
    let queue = &mut queues[0];
    let mut op: Box<CompressOp<usize>> = queue.take_op().expect("idle");
    assert_eq!(op.output(), Err(OpError::NotProcessed));
    let rejected = |op: &mut CompressOp<usize>, range: std::ops::Range<usize>, bytes| {
        let error = op.load(chain(pool, 0, &[1; 300], 100), range, bytes, 7).expect_err("wrong");
        assert_eq!((error.source.total_bytes(), error.context), (300, 7));
        error.reason
    };
    assert_eq!(rejected(&mut op, 100..300, 10), Unfit::Range, "starts in the second buffer");
    assert_eq!(rejected(&mut op, 0..299, 10), Unfit::Range);
    assert_eq!(rejected(&mut op, 300..300, 10), Unfit::Range);
    let most = dev.max_output_bytes();
    assert_eq!(rejected(&mut op, 0..300, most + 1), Unfit::OutputTooLong { bytes: most + 1, most });
    assert!(!op.is_loaded());
    queue.give_back(op);
    assert_eq!(queue.idle(), 16);
    assert!(dev.name() == name && dev.capabilities().of(CompressAlgorithm::Deflate).is_some());
}

fn capabilities_are_told(eal: &Eal, name: &str) {
    let told = CompressDev::probe(eal, name).expect("there");
    println!("{name}: {told}");
    let deflate = told.of(CompressAlgorithm::Deflate).expect("Deflate");
    assert_eq!(deflate.window_log2.1, 15);
    assert!(!told.hardware && told.of(CompressAlgorithm::Lz4).is_none());
    assert!(told.to_string().contains("deflate (window 2^"), "{told}");
}

#[test]
fn compression_devices() {
    let eal = support::eal(vec![], &[]);
    let config = PoolConfig { mbufs: 4095, cache: 0, ..PoolConfig::default() };
    let pool = Pool::new(&eal, "sources", config).expect("a pool fits");
    let devices: &[&str] = if dpdk::isal_available() {
        &["compress_zlib", "compress_isal"]
    } else {
        println!("SKIPPED compress_isal: libisal.so.2 is not installed (apt-get install libisal2)");
        &["compress_zlib"]
    };
    for name in devices {
        capabilities_are_told(&eal, name);
        for scenario in [
            streams_of_every_cut_come_back_as_they_were,
            bad_streams_fail_and_the_queue_goes_on,
            everything_comes_back_when_queues_are_dropped_at_work,
            the_device_takes_no_more_than_fit,
            mistakes_are_named,
        ] {
            scenario(&eal, &pool, name);
            assert_eq!(pool.in_use(), 0);
        }
    }
    let error = CompressDev::open::<()>(&eal, "compress_none", &self::config(1)).expect_err("no such driver");
    assert!(error.to_string().contains("compress_none"), "{error}");
    let error = CompressDev::open::<()>(&eal, "net_null7", &self::config(1)).expect_err("a port");
    assert!(matches!(error, CompressError::NotCompress(_)), "{error}");
}
