//! `shadowserve bench gpu`: the sinks in GPU memory beside bare copies of the same pieces, in turns within one run.
//!
//! GPU memory must be another process's, as it is in service: a child of this program allocates and exports it, and tells
//! afterwards what lies in it.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use control::{
    DeviceUuid, ElementType, GpuAllocation, IpcHandle, LayerBase, PageStrides, PagedKv, PlaneBase,
    RingConsumer, RingKv, ring_words_bytes,
};
use gpu_dma::cuda::Cuda;
use gpu_dma::{
    Batch, ChunkShape, Decoded, Destination, DeviceIndex, Driver, FinishedBatch, GpuHealth, GpuSink,
    GpuSinkConfig, PagedMemory, ReceiveMemory, Received, RingMemory, Sink, Transfer, paged, yardstick,
};
use hugepages::{Arena, ArenaConfig, DeviceWritable, PageChoice, Slot, Slots};
use serde_json::{Value, json};

use crate::bench_pages::Description;
use crate::out::print_line;

/// Layers of the cache that is copied to.
const LAYERS: u16 = 32;
const HEAD_DIM: u16 = 128;
const CHUNK_TOKENS: u16 = 256;

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// The GPU's number
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    device: usize,
    /// GPU memory to scatter over, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    memory_mib: usize,
    /// How long each measurement takes, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 300)]
    round_ms: u64,
    /// How often each is measured, in turns
    #[arg(long, value_name = "COUNT", default_value_t = 7)]
    rounds: usize,
    /// Slots of 512 KiB to copy from
    #[arg(long, value_name = "COUNT", default_value_t = 64)]
    slots: usize,
    /// Streams
    #[arg(long, value_name = "COUNT", default_value_t = 2)]
    copy_streams: usize,
    /// Copies in a batch
    #[arg(long, value_name = "COUNT", default_value_t = 1024)]
    gpu_batch: usize,
    /// Pages to copy from: `auto`, or `base` for ordinary ones
    #[arg(long, value_name = "KIND", default_value = "auto")]
    pages: String,
    /// Instead of measuring, deliver planes from memory to the GPU pages that this file describes, as `bench pages` takes it
    #[arg(long, value_name = "FILE", requires = "delivered_gbps")]
    into: Option<PathBuf>,
    /// Gbit/s of decoded planes to deliver there
    #[arg(long, value_name = "GBPS")]
    delivered_gbps: Option<f64>,
    /// For how long, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    duration_ms: u64,
}

#[derive(Debug, Args)]
pub(crate) struct HolderFlags {
    /// The GPU's number
    #[arg(long)]
    device: usize,
    /// Bytes to allocate
    #[arg(long)]
    bytes: usize,
}

/// The child: allocates, prints identity and handle, then answers `sum OFFSET BYTES` with a CRC32C until its input
/// ends.
pub(crate) fn hold(flags: &HolderFlags) -> anyhow::Result<ExitCode> {
    let cuda = Cuda::open(|number| number == flags.device)?;
    let uuid = cuda.devices().first().context("no such GPU")?.uuid;
    let memory = cuda.allocate(DeviceIndex(0), flags.bytes)?;
    print_line!("{} {}", hex(&uuid), hex(&memory.export()?))?;
    let mut bytes = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let &["sum", offset, length] = words.as_slice() else { bail!("unknown request {line:?}") };
        bytes.resize(length.parse()?, 0);
        memory.read(offset.parse()?, &mut bytes)?;
        print_line!("{}", hash(&bytes))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn hash(bytes: &[u8]) -> String {
    format!("{:08x}", compress::crc32c(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> anyhow::Result<[u8; N]> {
    let bytes = (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16));
    let bytes: Vec<u8> = bytes.collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("a number of the wrong length")
}

struct Holder {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    uuid: [u8; 16],
    handle: [u8; 64],
}

impl Holder {
    fn start(device: usize, bytes: usize) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["bench", "gpu-holder", "--device", &device.to_string(), "--bytes", &bytes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the process that holds the GPU memory")?;
        let input = child.stdin.take();
        let mut output = BufReader::new(child.stdout.take().context("its output")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let (uuid, handle) = line.trim().split_once(' ').context("the holder of GPU memory failed")?;
        let (uuid, handle) = (unhex(uuid)?, unhex(handle)?);
        Ok(Self { child, input, output, uuid, handle })
    }

    fn sum(&mut self, offset: u64, bytes: usize) -> anyhow::Result<String> {
        let input = self.input.as_mut().context("the holder has been told to end")?;
        writeln!(input, "sum {offset} {bytes}")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It ends when its input does.
        self.input = None;
        let _ = self.child.wait();
    }
}

/// Planes from slots to pages at a given rate: what the data plane does to a GPU, whatever feeds it.
fn deliver_into(flags: &Flags, file: &Path, delivered_gbps: f64) -> anyhow::Result<ExitCode> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let Description { kv, table } =
        serde_json::from_str(&text).with_context(|| file.display().to_string())?;
    kv.check()?;
    let chunk_pages = usize::from(CHUNK_TOKENS.div_ceil(kv.page_tokens));
    anyhow::ensure!(table.iter().all(|&page| page < kv.pages), "the table names a page that there is not");
    let tables: Vec<Arc<[u32]>> = table.chunks_exact(chunk_pages).map(Arc::from).collect();
    anyhow::ensure!(!tables.is_empty(), "the table has no whole chunk");
    let driver: Arc<dyn Driver> = Arc::new(Cuda::open(|number| number == flags.device)?);
    let mut slots = boxed_slots(&driver, flags)?;
    let memory = Arc::new(PagedMemory::open(&driver, kv)?);
    let planes = u32::try_from(2 * memory.kv().layers.len())?;
    let config = GpuSinkConfig {
        streams: flags.copy_streams,
        batch_pieces: flags.gpu_batch,
        ..GpuSinkConfig::default()
    };
    let mut sink = GpuSink::new(driver, config, Arc::default())?;
    let (mut offered, mut finished) = (Batch::new(), FinishedBatch::new());
    let (mut number, mut bytes) = (0_u32, 0_u64);
    let (begun, duration) = (Instant::now(), Duration::from_millis(flags.duration_ms));
    while begun.elapsed() < duration || sink.in_flight() > 0 || !offered.is_empty() {
        #[expect(clippy::cast_precision_loss, reason = "a pace, not a count")]
        let behind = || bytes as f64 * 8.0 <= begun.elapsed().as_secs_f64() * delivered_gbps * 1e9;
        if begun.elapsed() < duration
            && !offered.is_full()
            && behind()
            && let Some(slot) = slots.pop()
        {
            let to = Destination::Pages {
                memory: Arc::clone(&memory),
                table: Arc::clone(&tables[(number / planes) as usize % tables.len()]),
                first_token: 0,
                tokens: CHUNK_TOKENS,
            };
            bytes += to.plane_bytes();
            offered.push(Transfer { context: (), from: slot.into(), to, plane: number % planes });
            number = number.wrapping_add(1);
        }
        sink.submit(&mut offered);
        sink.flush();
        sink.poll(&mut finished);
        for done in finished.drain(..) {
            done.result?;
            slots.extend(done.from.into_slot());
        }
    }
    let done = rate(bytes, begun.elapsed(), Duration::ZERO, 1);
    print_line!("{}", json!({ "planes": number, "delivered_gbps": done.gbytes_per_s * 8.0 }))?;
    Ok(ExitCode::SUCCESS)
}

const SLOT_BYTES: usize = 512 << 10;

#[expect(clippy::vec_box, reason = "a transfer carries its slot in a box")]
fn boxed_slots(driver: &Arc<dyn Driver>, flags: &Flags) -> anyhow::Result<Vec<Box<Slot>>> {
    let page = if flags.pages == "base" { PageChoice::Base } else { PageChoice::Auto };
    let bytes = flags.slots * SLOT_BYTES;
    let arena = Arena::new(ArenaConfig { name: "slots", bytes, page, numa_node: None })?;
    let mut slots = Slots::new(gpu_dma::pin(driver, arena)?, SLOT_BYTES)?;
    eprintln!("{} slots of {SLOT_BYTES} bytes in {}", slots.count(), slots.page_size());
    let mut slots: Vec<Box<Slot>> = slots.take().into_iter().map(Box::new).collect();
    for (number, slot) in slots.iter_mut().enumerate() {
        let mut state = number as u64 + 1;
        for word in slot.as_mut_slice().chunks_exact_mut(8) {
            state = next(state);
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    Ok(slots)
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    if let (Some(file), Some(rate)) = (&flags.into, flags.delivered_gbps) {
        return deliver_into(flags, file, rate);
    }
    let bytes = flags.memory_mib << 20;
    let mut holder = Holder::start(flags.device, bytes)?;
    let cuda = Arc::new(Cuda::open(|number| number == flags.device)?);
    let driver: Arc<dyn Driver> = cuda.clone();
    let slots = boxed_slots(&driver, flags)?;
    let mut bench = Bench {
        driver,
        flags,
        slots,
        round: Duration::from_millis(flags.round_ms),
        holder: &mut holder,
        bytes: bytes as u64,
    };
    let (major, minor) = cuda.version();
    let device = &cuda.devices()[0];
    let report = json!({
        "gpu": device.name,
        "driver_cuda": format!("{major}.{minor}"),
        "method": cuda.method(),
        "copy_streams": flags.copy_streams,
        "gpu_batch": flags.gpu_batch,
        "pages_32_kib": bench.pages(8)?,
        "pages_16_kib": bench.pages(4)?,
        "ring": bench.ring()?,
        "received": bench.received()?,
    });
    print_line!("{report:#}")?;
    Ok(ExitCode::SUCCESS)
}

/// A step of xorshift: numbers without a pattern that a copy engine could profit by.
fn next(state: u64) -> u64 {
    let state = state ^ (state << 13);
    let state = state ^ (state >> 7);
    state ^ (state << 17)
}

struct Bench<'a> {
    driver: Arc<dyn Driver>,
    flags: &'a Flags,
    #[expect(clippy::vec_box, reason = "a transfer carries its slot in a box")]
    slots: Vec<Box<Slot>>,
    round: Duration,
    holder: &'a mut Holder,
    bytes: u64,
}

/// What one round gave.
#[derive(Clone, Copy)]
struct Rate {
    gbytes_per_s: f64,
    /// Of the calling thread, per copy.
    cpu_us_per_copy: f64,
}

impl Bench<'_> {
    fn config(&self) -> GpuSinkConfig {
        GpuSinkConfig {
            streams: self.flags.copy_streams,
            batch_pieces: self.flags.gpu_batch,
            ..GpuSinkConfig::default()
        }
    }

    /// A cache of `kv_heads` heads with pages of 16 tokens, `[pages, 2, tokens, heads, dim]` per layer, in all the memory.
    fn cache(&self, kv_heads: u16) -> PagedKv {
        let mut strides = PageStrides::nhd(16, kv_heads, HEAD_DIM, ElementType::Bf16);
        let page_bytes = strides.page;
        strides.page *= 2;
        let pages = self.bytes / (u64::from(LAYERS) * strides.page);
        let layer = |layer| {
            let offset = layer * pages * strides.page;
            LayerBase { k: PlaneBase::new(0, offset), v: PlaneBase::new(0, offset + page_bytes) }
        };
        PagedKv {
            device: DeviceUuid(self.holder.uuid),
            allocations: vec![GpuAllocation {
                handle: IpcHandle::new(self.holder.handle),
                bytes: self.bytes,
            }],
            element: ElementType::Bf16,
            page_tokens: 16,
            pages: u32::try_from(pages).unwrap_or(u32::MAX),
            kv_heads,
            head_dim: HEAD_DIM,
            k: strides,
            v: strides,
            layers: (0..u64::from(LAYERS)).map(layer).collect(),
        }
    }

    fn pages(&mut self, kv_heads: u16) -> anyhow::Result<Value> {
        let kv = self.cache(kv_heads);
        kv.check()?;
        let memory = Arc::new(PagedMemory::open(&self.driver, kv)?);
        let tables = tables(memory.kv());
        self.check_pages(&memory, &tables[0])?;
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..self.flags.rounds {
            ours.push(self.sink_round(|number, plane| Destination::Pages {
                memory: Arc::clone(&memory),
                table: Arc::clone(&tables[(number / 64 + plane) % tables.len()]),
                first_token: 0,
                tokens: CHUNK_TOKENS,
            })?);
            let done = yardstick::pages(&*self.driver, &memory, &self.slots, &tables, &self.bare())?;
            bare.push(rate(done.bytes, done.elapsed, done.busy, done.copies));
        }
        Ok(compare("sink", &ours, "bare_batches", &bare))
    }

    /// One plane through the sink, and what the holder then finds in the pages.
    fn check_pages(&mut self, memory: &Arc<PagedMemory>, table: &Arc<[u32]>) -> anyhow::Result<()> {
        let slot = self.slots.pop().context("no slot")?;
        let contents = slot.as_slice().to_vec();
        let from = self.check_pages_of(memory, table, slot.into(), &contents)?;
        self.slots.extend(from.into_slot());
        Ok(())
    }

    /// The same of a plane that holds `contents`, wherever it is; gives it back.
    fn check_pages_of(
        &mut self,
        memory: &Arc<PagedMemory>,
        table: &Arc<[u32]>,
        from: Decoded,
        contents: &[u8],
    ) -> anyhow::Result<Decoded> {
        let plane = 5;
        let to = Destination::Pages {
            memory: Arc::clone(memory),
            table: Arc::clone(table),
            first_token: 0,
            tokens: CHUNK_TOKENS,
        };
        let mut sink = GpuSink::new(Arc::clone(&self.driver), self.config(), Arc::default())?;
        let mut offered = Batch::new();
        offered.push(Transfer { context: (), from, to, plane });
        let mut finished = FinishedBatch::new();
        while finished.is_empty() {
            sink.submit(&mut offered);
            sink.flush();
            sink.poll(&mut finished);
        }
        let done = finished.pop().context("a transfer")?;
        done.result?;
        let mut runs = Vec::new();
        paged::runs(memory.kv(), plane, table, 0, CHUNK_TOKENS, memory.order(), |run| runs.push(run));
        for run in runs {
            let (from, bytes) = (usize::try_from(run.from)?, usize::try_from(run.bytes)?);
            let expected = hash(&contents[from..from + bytes]);
            let found = self.holder.sum(run.to, bytes)?;
            anyhow::ensure!(found == expected, "the page at {} holds {found}, not {expected}", run.to);
        }
        Ok(done.from)
    }

    /// Planes through the sink for one round: as many as there are slots, each started anew when it has ended.
    fn sink_round(&mut self, to: impl Fn(usize, usize) -> Destination) -> anyhow::Result<Rate> {
        let mut sources = self.slots.drain(..).map(Decoded::from).collect();
        let rate = self.round_of(&mut sources, to);
        self.slots.extend(sources.into_iter().filter_map(Decoded::into_slot));
        rate
    }

    fn round_of(
        &self,
        sources: &mut Vec<Decoded>,
        to: impl Fn(usize, usize) -> Destination,
    ) -> anyhow::Result<Rate> {
        let health = Arc::new(GpuHealth::default());
        let mut sink = GpuSink::new(Arc::clone(&self.driver), self.config(), Arc::clone(&health))?;
        let (mut offered, mut finished) = (Batch::new(), FinishedBatch::new());
        let (mut number, mut bytes) = (0_usize, 0_u64);
        let begun = Instant::now();
        let mut busy = Duration::ZERO;
        while begun.elapsed() < self.round || sink.in_flight() > 0 {
            let turn = Instant::now();
            while begun.elapsed() < self.round
                && !offered.is_full()
                && let Some(from) = sources.pop()
            {
                let plane = number % 64;
                let to = to(number, plane);
                offered.push(Transfer { context: to.plane_bytes(), from, to, plane: u32::try_from(plane)? });
                number += 1;
            }
            let submitted = sink.submit(&mut offered);
            sink.flush();
            let ended = sink.poll(&mut finished);
            for done in finished.drain(..) {
                done.result?;
                bytes += done.context;
                sources.push(done.from);
            }
            if submitted + ended > 0 {
                busy += turn.elapsed();
            }
        }
        let elapsed = begun.elapsed();
        for left in offered.drain(..) {
            sources.push(left.from);
        }
        let copies = health.named().iter().find(|(name, _)| *name == "gpu_copies").map_or(1, |(_, n)| *n);
        Ok(rate(bytes, elapsed, busy, copies))
    }

    /// Planes that lie in the GPU's memory in pieces, as a NIC would have put them there, to pages of 32 KiB; beside them the same planes from slots.
    fn received(&mut self) -> anyhow::Result<Value> {
        let kv = self.cache(8);
        kv.check()?;
        let memory = Arc::new(PagedMemory::open(&self.driver, kv)?);
        let tables = tables(memory.kv());
        let to = |number: usize, plane: usize| Destination::Pages {
            memory: Arc::clone(&memory),
            table: Arc::clone(&tables[(number / 64 + plane) % tables.len()]),
            first_token: 0,
            tokens: CHUNK_TOKENS,
        };
        let mut report = serde_json::Map::new();
        // What segments have at an MTU of 1,500 and 9,000, and as if a page were one.
        for piece_bytes in [1440, 8928, 32 << 10] {
            let mut planes = self.received_planes(piece_bytes)?;
            let (mut ours, mut slots) = (Vec::new(), Vec::new());
            self.check_received(&memory, &tables[0], &mut planes)?;
            for _ in 0..self.flags.rounds {
                ours.push(self.round_of(&mut planes, to)?);
                slots.push(self.sink_round(to)?);
            }
            report
                .insert(format!("pieces_of_{piece_bytes}"), compare("received", &ours, "from_slots", &slots));
        }
        Ok(report.into())
    }

    /// Copies of the slots' planes in pieces of GPU memory, no two of which touch.
    fn received_planes(&self, piece_bytes: usize) -> anyhow::Result<Vec<Decoded>> {
        let pieces = SLOT_BYTES.div_ceil(piece_bytes);
        let room = (piece_bytes + 128).next_multiple_of(64);
        let count = self.slots.len().min(16);
        let memory = ReceiveMemory::allocate(&self.driver, DeviceIndex(0), count * pieces * room)?;
        let memory = Arc::new(memory);
        let mut planes = Vec::new();
        for (number, slot) in self.slots.iter().take(count).enumerate() {
            let mut plane = Box::new(Received::new(Arc::clone(&memory), pieces));
            plane.begin(piece_bytes as u64);
            for piece in 0..pieces {
                let address = memory.address() + (number * pieces + piece) * room;
                let bytes = piece_bytes.min(SLOT_BYTES - piece * piece_bytes);
                anyhow::ensure!(plane.push(address as u64, bytes as u64), "a piece lies in the memory");
            }
            yardstick::play_nic(&*self.driver, slot, &plane)?;
            planes.push(Decoded::Received(plane));
        }
        Ok(planes)
    }

    /// One of these planes through the sink, and what the holder then finds in the pages; the first plane is the first slot's.
    fn check_received(
        &mut self,
        memory: &Arc<PagedMemory>,
        table: &Arc<[u32]>,
        planes: &mut Vec<Decoded>,
    ) -> anyhow::Result<()> {
        let contents = self.slots[0].as_slice().to_vec();
        let from = planes.remove(0);
        let from = self.check_pages_of(memory, table, from, &contents)?;
        planes.insert(0, from);
        Ok(())
    }

    /// How the bare loops are run: as the sink does, without its bookkeeping.
    fn bare(&self) -> yardstick::Loop {
        let GpuSinkConfig { streams, batch_pieces, batches_per_stream, .. } = self.config();
        yardstick::Loop { duration: self.round, streams, batch_pieces, batches_per_stream }
    }

    fn ring(&mut self) -> anyhow::Result<Value> {
        let entry_bytes: u64 = 512 << 10;
        let entries = u32::try_from(self.bytes / entry_bytes)?.min(4096);
        let ring = RingKv {
            device: DeviceUuid(self.holder.uuid),
            allocation: GpuAllocation { handle: IpcHandle::new(self.holder.handle), bytes: self.bytes },
            offset: 0,
            entry_bytes,
            entries,
            element: ElementType::Bf16,
            generation: 1,
        };
        ring.check()?;
        let shape = ChunkShape { layers: LAYERS, tokens: CHUNK_TOKENS, kv_heads: 8, head_dim: HEAD_DIM };
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..self.flags.rounds {
            let words = Arc::new(Arena::new(ArenaConfig {
                name: "ring",
                bytes: ring_words_bytes(entries),
                page: PageChoice::Base,
                numa_node: None,
            })?);
            let consumer = RingConsumer::create(Arc::clone(&words), entries, entry_bytes, 1)?;
            let memory = Arc::new(RingMemory::open(&self.driver, ring.clone(), words)?);
            let stop = std::sync::atomic::AtomicBool::new(false);
            let through_sink = std::thread::scope(|scope| {
                scope.spawn(|| empty(consumer, &stop));
                let rate = self.sink_round(|_, _| Destination::Ring {
                    memory: Arc::clone(&memory),
                    fetch: 1,
                    chunk: 0,
                    shape,
                });
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
                rate
            });
            ours.push(through_sink?);
            let done = yardstick::one_large_copy(&*self.driver, &memory, &self.slots, &self.bare())?;
            bare.push(rate(done.bytes, done.elapsed, done.busy, done.copies));
        }
        Ok(compare("sink", &ours, "one_large_copy", &bare))
    }
}

/// The serving process's part of a ring.
fn empty(mut consumer: RingConsumer, stop: &std::sync::atomic::AtomicBool) {
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        match consumer.peek() {
            Ok(Some(_)) => consumer.release(),
            Ok(None) => std::hint::spin_loop(),
            Err(error) => return eprintln!("{error}"),
        }
    }
}

/// Page tables without neighbours in a row, each of one chunk; together they name every page once.
fn tables(kv: &PagedKv) -> Vec<Arc<[u32]>> {
    let mut pages: Vec<u32> = (0..kv.pages).collect();
    let mut state = 88_172_645_463_325_252;
    for at in (1..pages.len()).rev() {
        state = next(state);
        pages.swap(at, usize::try_from(state % (at as u64 + 1)).unwrap_or(0));
    }
    pages.chunks_exact(usize::from(CHUNK_TOKENS / kv.page_tokens)).map(Arc::from).collect()
}

fn rate(bytes: u64, elapsed: Duration, busy: Duration, copies: u64) -> Rate {
    #[expect(clippy::cast_precision_loss, reason = "rates are printed with four digits")]
    Rate {
        gbytes_per_s: bytes as f64 / elapsed.as_secs_f64() / 1e9,
        cpu_us_per_copy: busy.as_secs_f64() * 1e6 / copies.max(1) as f64,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Medians of both, and the ratio of each pair of neighbours.
fn compare(name: &str, ours: &[Rate], other_name: &str, others: &[Rate]) -> Value {
    let of = |rates: &[Rate]| {
        let values: Vec<f64> = rates.iter().map(|rate| rate.gbytes_per_s).collect();
        json!({
            "gbytes_per_s": median(values.clone()),
            "least": values.iter().copied().fold(f64::INFINITY, f64::min),
            "most": values.iter().copied().fold(0.0, f64::max),
            "cpu_us_per_copy": median(rates.iter().map(|rate| rate.cpu_us_per_copy).collect()),
        })
    };
    let ratios = ours.iter().zip(others).map(|(ours, other)| ours.gbytes_per_s / other.gbytes_per_s);
    json!({ name: of(ours), other_name: of(others), "ratio": median(ratios.collect()) })
}
