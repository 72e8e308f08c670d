//! The receive path of one queue: parsing frames, and the engine's share of each DATA packet.
//!
//! `engine/*` drives a fetch engine with a store that answers at once: bursts of 32 DATA messages in, verdicts, events
//! and the PULLs that refill the window out. `frame/*` checks a full frame. `twin/*` is the checksum as
//! RFC 1071 writes it, to compare with in the same run.
#![allow(missing_docs, reason = "a benchmark")]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant as Clock};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use protocol::chunk::BadHeader;
use protocol::frame::Outgoing;
use protocol::wire::Ecn;
use protocol::wire::message::{self, Data, MAX_CONTROL_BYTES, Message, PullRange, Run};
use protocol::{
    Accepted, ChunkInfo, ChunkLayout, ChunkShape, Event, FetchConfig, FetchEngine, FetchId, HardwareChecks,
    Instant, Key, Local, Peer, PlaneRange, PlaneRanges, StoreIndex, TxChecksum, Verdict, frame,
};

const SEGMENT_BYTES: u16 = 1440;
const PLANE_SEGMENTS: u32 = 80;
const HEADER_BYTES: u32 = 2048;
const SHAPE: ChunkShape = ChunkShape { layers: 32, kv_heads: 8, head_dim: 128, dtype: 1 };
const BURST: usize = 32;
const CHUNKS: usize = 64;

/// 64 planes of 80 full segments each, one behind the other.
struct Planes;

impl ChunkLayout for Planes {
    fn planes(&self, _: &Key, _: &[u8], _: &ChunkInfo, out: &mut PlaneRanges) -> Result<(), BadHeader> {
        let bytes = PLANE_SEGMENTS * u32::from(SEGMENT_BYTES);
        for plane in 0..u64::from(SHAPE.planes()) {
            let offset = u64::from(HEADER_BYTES) + plane * u64::from(bytes);
            out.push(PlaneRange { offset, bytes }).map_err(|_| BadHeader)?;
        }
        Ok(())
    }
}

/// A store that answers a message at once: what it would send, as (tag, segment, epoch, sequence, bytes).
#[derive(Default)]
struct Answers {
    segments: Vec<(u32, u32, u64, u32, usize)>,
    replies: Vec<Vec<u8>>,
}

impl Answers {
    fn take_in(&mut self, payload: &[u8]) {
        match Message::new_checked(payload).expect("the engine sends valid messages") {
            Message::Lookup(lookup) => {
                let mut out = vec![0; MAX_CONTROL_BYTES];
                let info = ChunkInfo {
                    handle: 1,
                    header_bytes: HEADER_BYTES,
                    chunk_bytes: 1 << 30,
                    tokens: 256,
                    layers: SHAPE.layers,
                    kv_heads: SHAPE.kv_heads,
                    head_dim: SHAPE.head_dim,
                    dtype: SHAPE.dtype,
                    codec: 1,
                };
                let entries = lookup.keys().map(|_| Some(info));
                let len = message::emit_lookup_reply(&mut out, lookup.request, 1, entries).expect("fits");
                out.truncate(len);
                self.replies.push(out);
            }
            Message::Pull(pull) => {
                pull.runs().for_each(|run| self.take_in_run(&pull.range, pull.sequence, run))
            }
            _ => unreachable!("the engine sends nothing else"),
        }
    }

    fn take_in_run(&mut self, range: &PullRange, sequence: u32, run: Run) {
        for segment in run.first..run.first + u32::from(run.count) {
            let begin = segment * u32::from(SEGMENT_BYTES);
            let bytes = (range.bytes - begin).min(u32::from(SEGMENT_BYTES)) as usize;
            self.segments.push((range.tag, segment, range.epoch, sequence, bytes));
        }
    }
}

/// Runs fetches until `packets` DATA packets were taken in; returns the time the engine took, without the store's.
fn drive(packets: u64) -> Duration {
    let config = FetchConfig {
        segment_bytes: SEGMENT_BYTES,
        max_fetches: 8,
        max_lookups: 8,
        max_chunks_per_fetch: 64,
        window_segments: 512,
        ..FetchConfig::default()
    };
    let mut engine = FetchEngine::new(config, Planes).expect("valid budgets");
    let keys = vec![Key([3; 32]); CHUNKS];
    let mut answers = Answers::default();
    let mut out = [0; MAX_CONTROL_BYTES];
    let mut burst: Vec<Vec<u8>> =
        vec![vec![0; message::DATA_HEADER_BYTES + usize::from(SEGMENT_BYTES)]; BURST];
    let (mut nanos, mut taken, mut fetches, mut elapsed) = (0, 0, 0, Duration::ZERO);
    while taken < packets {
        nanos += 1000;
        let now = Instant::from_nanos(nanos);
        while engine.fetches() < 2 {
            fetches += 1;
            let deadline = now + Duration::from_secs(60);
            engine.start(now, FetchId(fetches), deadline, StoreIndex(0), &keys, &SHAPE).expect("a free slot");
        }
        for reply in answers.replies.drain(..) {
            engine.handle_datagram(now, StoreIndex(0), false, &reply).expect("a good reply");
        }
        let count = answers.segments.len().min(BURST);
        let drained = answers.segments.drain(..count);
        for (packet, (tag, segment, epoch, sequence, bytes)) in burst.iter_mut().zip(drained) {
            packet.resize(message::DATA_HEADER_BYTES + bytes, 0);
            let data = Data { tag, segment, epoch, sequence, waited_ns: 0, payload: &[] };
            message::emit_data_header(packet, &data).expect("fits");
        }
        taken += count as u64;
        let mut sent = Vec::new();
        let start = Clock::now();
        for packet in &burst[..count] {
            match engine.handle_datagram(now, StoreIndex(0), false, packet) {
                Ok(Accepted::Segment { segment, .. }) => {
                    black_box(segment);
                }
                Ok(Accepted::Control) => {}
                Err(reason) => panic!("dropped: {}", reason.name()),
            }
        }
        engine.handle_timeout(now);
        while let Some(event) = engine.poll_event() {
            if let Event::PlaneArrived { transfer, .. } = event {
                assert!(engine.verdict(now, transfer, Verdict::Delivered));
            }
        }
        while let Some(transmit) = engine.poll_transmit(now, &mut out) {
            sent.push(out[..transmit.len].to_vec());
        }
        elapsed += start.elapsed();
        sent.iter().for_each(|message| answers.take_in(message));
    }
    elapsed
}

fn engine(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("engine");
    group.throughput(Throughput::Elements(1));
    group.bench_function("data packet, bursts of 32, with verdicts and refill", |bencher| {
        bencher.iter_custom(drive);
    });
    group.finish();
}

fn idle(criterion: &mut Criterion) {
    let mut engine = FetchEngine::new(FetchConfig::default(), Planes).expect("valid budgets");
    let mut out = [0; MAX_CONTROL_BYTES];
    let now = Instant::from_nanos(1);
    criterion.bench_function("engine/idle turn: timeout, event, transmit", |bencher| {
        bencher.iter(|| {
            engine.handle_timeout(black_box(now));
            black_box((engine.poll_event(), engine.poll_transmit(now, &mut out)));
        });
    });
}

fn frames(criterion: &mut Criterion) {
    let ours = Local {
        mac: [2; 6],
        ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
        first_port: 4791,
        ports: 1,
        vlan: None,
    };
    let theirs = Local {
        mac: [4; 6],
        ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)),
        first_port: 9,
        ports: 1,
        vlan: None,
    };
    let to = Peer { mac: ours.mac, ip: ours.ip, port: 4791 };
    let payload = message::DATA_HEADER_BYTES + usize::from(SEGMENT_BYTES);
    let mut bytes: Vec<u8> = (0..=u8::MAX).cycle().take(frame::IPV4_HEADER_BYTES + payload).collect();
    let (checksum, ecn) = (TxChecksum::Software, Ecn::Ect0);
    let datagram = Outgoing { source_port: 9, to, payload_bytes: payload, attached: &[], checksum, ecn };
    frame::emit_udp(&mut bytes, &theirs, &datagram).expect("fits");
    let mut group = criterion.benchmark_group("frame");
    group.throughput(Throughput::Elements(1));
    for (name, good) in [("software checksums", false), ("hardware checksums", true)] {
        let hardware = HardwareChecks { ip_good: good, udp_good: good };
        group.bench_function(format!("parse {} bytes, {name}", bytes.len()), |bencher| {
            bencher.iter(|| frame::parse(black_box(&bytes), &ours, hardware).expect("a good frame"));
        });
    }
    group.bench_function(format!("emit {} bytes, software checksums", bytes.len()), |bencher| {
        bencher.iter(|| frame::emit_udp(black_box(&mut bytes), &theirs, black_box(&datagram)));
    });
    group.finish();
    criterion.bench_function("twin/checksum of 1464 bytes, 16 bits at a time", |bencher| {
        bencher.iter(|| {
            let pairs = black_box(&bytes[42..]).chunks_exact(2);
            pairs.fold(0_u32, |sum, pair| {
                let sum = sum + u32::from(u16::from_be_bytes([pair[0], pair[1]]));
                (sum & 0xffff) + (sum >> 16)
            })
        });
    });
}

criterion_group!(benches, engine, idle, frames);
criterion_main!(benches);
