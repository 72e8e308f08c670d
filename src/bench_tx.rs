//! `shadowserve bench tx`: what sending a segment costs when it is copied into a packet and when it is sent from where it lies.
//!
//! One thread sends bursts of DATA frames through the store's own link and takes them out at the other end of the wire, and only the sending
//! is timed. The two ways take turns, burst by burst, over the same memory, which is larger than the caches: whatever else the machine does
//! meets both alike, and medians of bursts of some microseconds are hardly touched by it.

use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use dpdk::{
    Attacher, BURST, Burst, Eal, EalConfig, ExternalMemory, Pool, PoolConfig, Port, PortConfig, RxQueue,
};
use hugepages::{Arena, ArenaConfig, Block, Heap};
use iface::{IfaceConfig, IpPrefix, Link, Outgoing};
use protocol::frame::{Peer, max_segment_bytes};
use protocol::wire::message::{self, Data};
use serde_json::{Value, json};

use crate::flags::EalFlags;
use crate::out::print_line;

#[derive(Debug, Args)]
pub(crate) struct TxFlags {
    /// Device to send on [default: a net_memif to --sink in this process]
    #[arg(long, value_name = "DEVICE")]
    port: Option<String>,
    /// Device at the other end of the wire
    #[arg(long, value_name = "DEVICE", requires = "port")]
    sink: Option<String>,
    /// Address of this end: IPv4 or IPv6 decides the headers and, over IPv6 without checksum offload, that payloads are summed
    #[arg(long, value_name = "ADDRESS/BITS", default_value = "10.99.0.1/24")]
    ip: IpPrefix,
    /// Largest IP packet, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 1500)]
    mtu: u16,
    /// Memory that segments are taken from, one after another, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    memory_mib: usize,
    /// Bursts of 32 packets of each way
    #[arg(long, value_name = "COUNT", default_value_t = 20_000)]
    bursts: usize,
    /// CPU to run on
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    lcore: usize,
    #[command(flatten)]
    eal: EalFlags,
}

/// Memory to send from.
struct Piece(Block);

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

pub(crate) fn run(flags: &TxFlags) -> anyhow::Result<ExitCode> {
    let folder = tempfile::tempdir()?;
    let memif = |number: u32, role: &str| {
        let socket = folder.path().join("memif.sock");
        format!(
            "net_memif{number},id=0,role={role},socket={},socket-abstract=no,rsize=11,bsize={}",
            socket.display(),
            if flags.mtu > 1500 { 9216 } else { 2048 }
        )
    };
    let device = flags.port.clone().unwrap_or_else(|| memif(0, "server"));
    let sink = flags.sink.clone().unwrap_or_else(|| memif(1, "client"));
    let vdevs = [&device, &sink].into_iter().filter(|name| name.starts_with("net_")).cloned().collect();
    let eal = Eal::start(&EalConfig { vdevs, ..flags.eal.config([flags.lcore], "") })?;
    let heap = Heap::new(Arena::new(ArenaConfig {
        name: "bench",
        bytes: flags.memory_mib << 20,
        page: flags.eal.pages(),
        numa_node: None,
    })?)?;
    let (report, in_flight) = {
        let mut bench = Bench::open(&eal, flags, &device, &sink, &heap)?;
        (bench.measure(flags.bursts)?, bench.attacher.in_flight())
    };
    print_line!("{report}")?;
    if in_flight > 0 {
        bail!("{in_flight} packets were not freed by the device");
    }
    Ok(ExitCode::SUCCESS)
}

struct Bench {
    link: Link,
    _port: Port,
    _sink: Port,
    rx: RxQueue,
    attacher: Attacher<Piece>,
    memory: Arc<Piece>,
    segment_bytes: usize,
    to: Peer,
    /// Where the next segment begins.
    next: usize,
    report: Value,
}

impl Bench {
    fn open(eal: &Eal, flags: &TxFlags, device: &str, sink: &str, heap: &Heap) -> anyhow::Result<Self> {
        let name = |device: &str| device.split(',').next().unwrap_or(device).to_owned();
        let config = IfaceConfig {
            device: name(device),
            address: flags.ip,
            vlan: None,
            udp_port: 4791,
            mtu: flags.mtu,
            queues: 1,
            rx_descriptors: 1024,
            tx_descriptors: 1024,
            mbufs: 8192,
            rss: None,
        };
        let mut opened = iface::open(eal, &config, &[], &[])?;
        let link = opened.links.swap_remove(0);
        if !link.sends_chains() {
            bail!("{} sends no packets of several buffers: nothing to compare", opened.port.driver());
        }
        let data_room_bytes = flags.mtu.max(2048) + 256;
        let pool_config = PoolConfig { mbufs: 8191, data_room_bytes, ..PoolConfig::default() };
        let pool = Pool::new(eal, "sink", pool_config)?;
        let port_config = PortConfig { mtu: flags.mtu, ..PortConfig::default() };
        let (sink, mut rx, _tx) = Port::open(eal, &name(sink), &port_config, std::slice::from_ref(&pool))?;
        let external = ExternalMemory::new(eal, heap.addr(), heap.bytes(), heap.page_size().bytes())?;
        external.map(&opened.port)?;
        let block = heap.take(heap.bytes() - (1 << 16)).context("--memory-mib is too small")?;
        let segment_bytes = usize::from(max_segment_bytes(flags.mtu, &flags.ip.ip));
        let ip: IpAddr = if flags.ip.ip.is_ipv4() { [10, 99, 0, 2].into() } else { "fd00::2".parse()? };
        let report = json!({
            "driver": opened.port.driver(),
            "segment_bytes": segment_bytes,
            "memory_bytes": block.bytes(),
            "pages": heap.page_size().to_string(),
            "checksum_offload": opened.port.capabilities().tx_udp_checksum,
            "ip": flags.ip.to_string(),
        });
        Ok(Self {
            link,
            _port: opened.port,
            _sink: sink,
            rx: rx.swap_remove(0),
            attacher: Attacher::new(eal, "attached", &external, 4096, 1)?,
            memory: Arc::new(Piece(block)),
            segment_bytes,
            to: Peer { mac: [2, 0, 0, 0, 0, 9], ip, port: 4800 },
            next: 0,
            report,
        })
    }

    /// Sends a burst; returns nanoseconds per packet.
    fn burst(&mut self, is_copied: bool) -> f64 {
        let Self { link, attacher, memory, segment_bytes, to, next, .. } = self;
        let begin = Instant::now();
        for segment in 0..u32::try_from(BURST).unwrap_or(0) {
            let at = *next;
            let range = at..at + *segment_bytes;
            *next = if range.end + *segment_bytes > memory.0.bytes() { 0 } else { range.end };
            link.send(|buffer| {
                let data = Data { tag: 1, segment, epoch: 1, sequence: 1, waited_ns: 0, payload: &[] };
                let mut payload_bytes = message::emit_data_header(buffer, &data)?;
                let mut tail = None;
                if is_copied {
                    let bytes = memory.as_ref().as_ref().get(range)?;
                    buffer.get_mut(payload_bytes..payload_bytes + bytes.len())?.copy_from_slice(bytes);
                    payload_bytes += bytes.len();
                } else {
                    tail = Some(attacher.attach(memory, range)?);
                }
                let (from_port, to) = (4791, *to);
                Some(Outgoing { from_port, to, payload_bytes, tail, marks_answered: true, covered: true })
            });
        }
        link.flush();
        #[expect(clippy::cast_precision_loss, reason = "a burst takes microseconds")]
        let nanos = begin.elapsed().as_nanos() as f64;
        nanos / f64::from(u16::try_from(BURST).unwrap_or(1))
    }

    /// Takes out what was sent, a burst; returns how many packets arrived. The wire may need several turns for that: a memif
    /// cannot send before its other end has looked for packets for the first time.
    fn drain(&mut self) -> usize {
        let (mut burst, mut packets) = (Burst::new(), 0);
        let deadline = Instant::now() + Duration::from_secs(10);
        while packets < BURST && Instant::now() < deadline {
            self.link.flush();
            packets += self.rx.receive(&mut burst);
            burst.clear();
        }
        packets
    }

    fn measure(&mut self, bursts: usize) -> anyhow::Result<Value> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !(self._port.link_up() && self._sink.link_up()) {
            if Instant::now() > deadline {
                bail!("the link between the two ports does not come up");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let (mut copied, mut attached) = (Vec::with_capacity(bursts), Vec::with_capacity(bursts));
        for round in 0..bursts + 100 {
            for (is_copied, times) in [(true, &mut copied), (false, &mut attached)] {
                let nanos = self.burst(is_copied);
                let arrived = self.drain();
                if arrived != BURST {
                    bail!("{arrived} of {BURST} packets arrived");
                }
                if round >= 100 {
                    times.push(nanos);
                }
            }
        }
        let mut report = self.report.take();
        let (copied, attached) = (quantiles(copied), quantiles(attached));
        report["attached_to_copied"] = json!(attached[1] / copied[1]);
        for (name, [p10, p50, p90]) in [("copied", copied), ("attached", attached)] {
            report[name] = json!({"p10_ns": p10, "p50_ns": p50, "p90_ns": p90});
        }
        Ok(report)
    }
}

fn quantiles(mut times: Vec<f64>) -> [f64; 3] {
    times.sort_by(f64::total_cmp);
    let at = |tenths: usize| times.get(times.len() * tenths / 10).copied().unwrap_or(f64::NAN);
    [at(1), at(5), at(9)]
}
