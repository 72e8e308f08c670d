//! The part of `bench codec` that has a compression device decompress: the planes' packets as a receive queue would have them, one plane at a time, as a
//! decode lcore hands them to a software device. Of hardware, that is the latency and not the rate.

use anyhow::{Context, bail};
use arrayvec::ArrayVec;
use compress::{PlaneEntry, Section, Shape};
use dpdk::{
    BURST, CompressConfig, CompressDev, CompressOp, CompressQueue, Eal, EalConfig, Mbuf, Pool, PoolConfig,
};

/// Payload bytes of one packet on an ordinary link.
pub(crate) const SEGMENT_BYTES: usize = 1376;
/// Ops of a queue pair.
const IN_FLIGHT: u16 = 16;

/// A plane as a device is to have it.
pub(crate) struct PlaneBytes<'a> {
    pub(crate) shape: &'a Shape,
    pub(crate) entry: &'a PlaneEntry,
    pub(crate) encoded: &'a [u8],
}

/// An open device and the packets for it.
pub(crate) struct Device {
    /// For each thread. First, so that packets and ops are back before their pool and the device go.
    pub(crate) queues: Vec<DeviceQueue>,
    pool: Pool,
    dev: CompressDev,
}

/// A queue pair, with packets of every plane.
pub(crate) struct DeviceQueue {
    queue: CompressQueue<()>,
    planes: Vec<Option<Source>>,
}

/// A plane's compressed bytes: where they start in the first of these buffers, and what they must give.
struct Source {
    packets: Mbuf,
    start: usize,
    bytes: usize,
}

/// Starts DPDK, without hugepages if there are none.
pub(crate) fn start(huge: bool) -> anyhow::Result<Eal> {
    let memory_mib = (!huge).then_some(1024);
    let file_prefix = format!("shadowserve-bench-{}", std::process::id());
    let config = EalConfig { file_prefix, huge, memory_mib, ..EalConfig::default() };
    Eal::start(&config).context("--compress-dev needs DPDK; without hugepages add --no-huge")
}

impl Device {
    /// Opens `name` with a queue pair for each of `threads`; a decoded plane has at most `plane_bytes`.
    pub(crate) fn open(eal: &Eal, name: &str, threads: usize, plane_bytes: usize) -> anyhow::Result<Self> {
        let config = CompressConfig {
            queue_pairs: u16::try_from(threads)?,
            in_flight: IN_FLIGHT,
            // What is compressed of a quantized plane is at most a byte of every element.
            output_bytes: plane_bytes.div_ceil(2),
        };
        let (dev, queues) = CompressDev::open(eal, name, &config)?;
        let pool = PoolConfig { mbufs: 131_071, cache: 0, ..PoolConfig::default() };
        let pool = Pool::new(eal, &format!("bench_{name}"), pool)
            .context("memory for packets; give DPDK more hugepages")?;
        let queues = queues.into_iter().map(|queue| DeviceQueue { queue, planes: Vec::new() }).collect();
        Ok(Self { queues, pool, dev })
    }

    /// Makes packets of the planes, for every queue; returns how many planes the device takes.
    pub(crate) fn load(&mut self, planes: &[PlaneBytes<'_>]) -> anyhow::Result<usize> {
        for queue in &mut self.queues {
            queue.planes.clear();
        }
        let mut taken = 0;
        for plane in planes {
            let section = self.takes(plane)?;
            taken += usize::from(section.is_some());
            for queue in &mut self.queues {
                let source =
                    section.map(|section| source(&self.pool, plane.encoded, &section)).transpose()?;
                queue.planes.push(source);
            }
        }
        Ok(taken)
    }

    fn takes(&self, plane: &PlaneBytes<'_>) -> anyhow::Result<Option<Section>> {
        let fits = |section: &Section| {
            section.bytes <= self.dev.max_output_bytes()
                && self.dev.max_source_bytes().is_none_or(|most| section.compressed_bytes <= most)
        };
        Ok(plane.entry.section(plane.shape)?.filter(fits))
    }
}

/// The packets of a plane from the one on in which the section begins.
fn source(pool: &Pool, encoded: &[u8], section: &Section) -> anyhow::Result<Source> {
    let first = section.start / SEGMENT_BYTES * SEGMENT_BYTES;
    let mut chain: Option<Mbuf> = None;
    // From the back: a chain is appended to a single buffer, whose end need not be looked for.
    for bytes in encoded[first..].chunks(SEGMENT_BYTES).rev() {
        let mut packet = pool.alloc().context("no packet is free: measure fewer --chunks or --cpus")?;
        packet.append(bytes.len()).context("a packet is too small")?.copy_from_slice(bytes);
        if let Some(rest) = chain.take()
            && packet.chain(rest).is_err()
        {
            bail!("a plane of {} bytes has more packets than a chain takes", encoded.len());
        }
        chain = Some(packet);
    }
    let packets = chain.context("a section of no bytes")?;
    Ok(Source { packets, start: section.start - first, bytes: section.bytes })
}

impl DeviceQueue {
    /// Has the device decompress plane `plane` and gives what comes of it to `then`; false if the device does not take it.
    ///
    /// # Panics
    /// When the device fails: what it is given was encoded here.
    pub(crate) fn decompress(&mut self, plane: usize, then: impl FnOnce(&[u8])) -> bool {
        let Some(Source { packets, start, bytes }) = self.planes[plane].take() else { return false };
        let mut op = self.queue.take_op().expect("one plane at a time");
        let end = packets.total_bytes();
        assert!(op.load(packets, start..end, bytes, ()).is_ok(), "the device takes the plane");
        let mut ops: ArrayVec<Box<CompressOp<()>>, BURST> = ArrayVec::from_iter([op]);
        let mut done = ArrayVec::new();
        while done.is_empty() {
            self.queue.enqueue_burst(&mut ops);
            self.queue.dequeue_burst(&mut done);
        }
        let mut op = done.pop().expect("it came back");
        then(op.output().expect("what the encoder wrote"));
        self.planes[plane] = op.unload().map(|(packets, ())| Source { packets, start, bytes });
        self.queue.give_back(op);
        true
    }
}
