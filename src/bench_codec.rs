//! `shadowserve bench codec`: what each codec, compression and back end costs on one core and on several.
//!
//! In every round all parts take turns over the same planes, and the time of a part is the sum of its planes' medians
//! over the rounds, so that another load on the machine disturbs little, and all alike; ratios compare parts of one run.
//! The parts:
//!
//! - `zeros`: writing zeros to the slots, as the yardstick of their memory.
//! - `bare`: decompression alone of the planes' sections into scratch (for zstd, `ZSTD_decompressDCtx`).
//! - `fused`: decompression and dequantization into slots; without compression, dequantization alone.
//! - `whole`: what the data plane does: linearize packets, CRC32C, decompression, dequantization.
//! - `encode`: quantization, packing and compression, as a store does it.
//!
//! With `--compress-dev` the same for planes that a compression device decompresses (`bench_codec_device.rs`): `fused` and `whole` are then the device and the
//! core's part, one after the other.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use comfy_table::Table;
use compress::{
    ChunkView, Codec, Compression, Decoder, Encoder, OutDtype, PlaneCodec, PlaneEntry, SectionReader, Shape,
    plane_of,
};
use serde_json::{Value, json};
use store::kv_file::KvFile;

use crate::bench_codec_device::{self, Device, DeviceQueue, PlaneBytes, SEGMENT_BYTES};
use crate::out::print_line;

#[derive(Debug, Args)]
pub(crate) struct Flags {
    /// KV cache: .safetensors with `k`, `v` and `tokens`, whole chunks of it [default: a sample inside this program;
    /// perf/compose_llama.py makes one in the shape of Llama-3.1-8B]
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Codecs to measure [default: all]
    #[arg(long, value_name = "CODEC,...", value_delimiter = ',')]
    codecs: Vec<Codec>,
    /// Compressions to measure [default: all]
    #[arg(long, value_name = "COMPRESSION,...", value_delimiter = ',')]
    compressions: Vec<Compression>,
    /// Element type of the decoded planes; exact codecs are left out where it isn't that of the file
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    out_dtype: Out,
    /// CPUs to decode on, one pinned thread each, as in 0-7: measured with one, with half and with all of them
    #[arg(long, value_name = "CPUS", default_value = "0")]
    cpus: String,
    /// Decoded planes of each thread, written in turn [default: 256 MiB of them, which no cache holds]
    #[arg(long, value_name = "COUNT")]
    slots: Option<usize>,
    /// Rounds, of which the median counts
    #[arg(long, value_name = "COUNT", default_value_t = 15)]
    rounds: usize,
    /// Compression device to measure too, for planes compressed with Deflate: compress_isal, compress_zlib or a BlueField's PCI address; may be repeated
    #[arg(long, value_name = "DEVICE")]
    compress_dev: Vec<String>,
    /// With --compress-dev: run DPDK on ordinary pages
    #[arg(long, requires = "compress_dev")]
    no_huge: bool,
    /// Most chunks of the file to measure with
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    chunks: usize,
    /// Print one JSON object on standard output and nothing else there
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Out {
    Bf16,
    F16,
    /// With a scale of 1
    Fp8,
}

impl From<Out> for OutDtype {
    fn from(out: Out) -> Self {
        match out {
            Out::Bf16 => Self::Bf16,
            Out::F16 => Self::F16,
            Out::Fp8 => Self::Fp8E4M3 { scale: 1.0 },
        }
    }
}

/// What each round measures, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    ZerosCached,
    ZerosStreaming,
    Bare,
    FusedCached,
    FusedStreaming,
    Whole,
    Encode,
}

impl Part {
    const ALL: [Self; 7] = [
        Self::ZerosCached,
        Self::ZerosStreaming,
        Self::Bare,
        Self::FusedCached,
        Self::FusedStreaming,
        Self::Whole,
        Self::Encode,
    ];
}

/// The planes of some chunks, as they lie in a file.
struct Input {
    shapes: Vec<Shape>,
    /// By chunk, then by plane.
    planes: Vec<Vec<Vec<u8>>>,
}

impl Input {
    fn read(file: &KvFile, most_chunks: usize) -> anyhow::Result<Self> {
        let mut input = Self { shapes: vec![], planes: vec![] };
        for chunk in 0..file.shape().chunks().min(most_chunks.max(1)) {
            let shape = file.shape().chunk(chunk);
            let mut planes = vec![Vec::new(); shape.planes()];
            for (index, plane) in planes.iter_mut().enumerate() {
                let (layer, side) = plane_of(index);
                file.read_plane(chunk, layer, side, plane)?;
            }
            input.shapes.push(shape);
            input.planes.push(planes);
        }
        Ok(input)
    }

    fn encode(&self, encoder: &mut Encoder, chunk: usize, out: &mut Vec<u8>) -> anyhow::Result<()> {
        let plane = |layer, side| self.planes[chunk][compress::plane_index(layer, side)].as_slice();
        Ok(encoder.encode_chunk(&[0; 32], &self.shapes[chunk], plane, out)?)
    }

    fn plane_bytes(&self) -> usize {
        self.shapes.iter().map(Shape::plane_bytes).max().unwrap_or(0)
    }
}

/// What is measured of one codec with one compression.
struct Case<'a> {
    input: &'a Input,
    plane_codec: PlaneCodec,
    out_dtype: OutDtype,
    slots: usize,
    rounds: usize,
    /// Encoded chunks with their entries.
    chunks: Vec<(Vec<u8>, Vec<PlaneEntry>)>,
}

/// Median time of each part over all planes, by [`Part`], of one thread.
type Medians = [Duration; Part::ALL.len()];

impl Case<'_> {
    fn encoded_bytes(&self) -> usize {
        self.chunks.iter().map(|(chunk, _)| chunk.len()).sum()
    }

    fn elements(&self) -> usize {
        self.input.shapes.iter().map(|shape| shape.planes() * shape.elements_per_plane()).sum()
    }

    fn out_bytes(&self) -> usize {
        self.elements() * self.out_dtype.bytes()
    }

    /// Every plane with its shape and entry.
    fn planes(&self) -> impl Iterator<Item = (&Shape, &PlaneEntry, &[u8])> {
        self.chunks.iter().zip(&self.input.shapes).flat_map(|((chunk, entries), shape)| {
            entries.iter().map(move |entry| {
                let start = usize::try_from(entry.offset).expect("a chunk in memory");
                (shape, entry, &chunk[start..][..usize::try_from(entry.bytes).expect("a chunk in memory")])
            })
        })
    }

    /// Runs on as many pinned threads as there are CPUs, which begin every part together; with a device, each has one of `queues`.
    fn measure(&self, cpus: &[usize], queues: &mut [DeviceQueue]) -> anyhow::Result<Vec<Medians>> {
        let barrier = Barrier::new(cpus.len());
        let queues = queues.iter_mut().map(Some).chain(std::iter::repeat_with(|| None));
        std::thread::scope(|scope| {
            let threads: Vec<_> = cpus
                .iter()
                .zip(queues)
                .map(|(&cpu, queue)| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        let pinned = pin(cpu);
                        // Also if this one is not where it should be: the others wait.
                        let medians = self.measure_here(barrier, queue);
                        pinned.map(|()| medians)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("measuring does not panic")).collect()
        })
    }

    fn measure_here(&self, barrier: &Barrier, device: Option<&mut DeviceQueue>) -> Medians {
        let mut work = Work::new(self, device);
        let planes = self.planes().count();
        // By part, then by plane, or by layer for encoding.
        let mut times = [(); Part::ALL.len()].map(|()| vec![Vec::with_capacity(self.rounds); planes]);
        // The first round warms up.
        for round in 0..=self.rounds {
            for (part, times) in Part::ALL.into_iter().zip(&mut times) {
                barrier.wait();
                work.run(self, part, |plane, time| {
                    if round > 0 {
                        times[plane].push(time);
                    }
                });
            }
        }
        times.map(|mut planes| planes.iter_mut().map(|times| median(times)).sum())
    }
}

/// Zero of no times.
fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// What one thread needs.
struct Work<'d> {
    device: Option<&'d mut DeviceQueue>,
    /// With ordinary and with streaming stores.
    decoders: [Decoder; 2],
    sections: SectionReader,
    scratch: Vec<u8>,
    encoder: Encoder,
    encoded: Vec<u8>,
    memory: Vec<u8>,
    slot_bytes: usize,
    next_slot: usize,
}

impl<'d> Work<'d> {
    fn new(case: &Case<'_>, device: Option<&'d mut DeviceQueue>) -> Self {
        let plane_bytes = case.input.plane_bytes();
        let slot_bytes = plane_bytes.next_multiple_of(64);
        Self {
            device,
            decoders: [false, true]
                .map(|streaming| Decoder::new(plane_bytes).with_streaming_stores(streaming)),
            sections: SectionReader::new(),
            scratch: vec![1; plane_bytes],
            encoder: Encoder::new(case.plane_codec, compress::DEFAULT_ZSTD_LEVEL),
            encoded: Vec::new(),
            memory: vec![1; (case.slots + 1) * slot_bytes],
            slot_bytes,
            next_slot: 0,
        }
    }

    fn run(&mut self, case: &Case<'_>, part: Part, mut took: impl FnMut(usize, Duration)) {
        if part == Part::Encode {
            let mut layers = 0;
            for (shape, planes) in case.input.shapes.iter().zip(&case.input.planes) {
                // Layer by layer, so that few measurements are interrupted.
                for planes in planes.chunks_exact(2) {
                    let start = Instant::now();
                    let plane = |_, side| planes[compress::plane_index(0, side)].as_slice();
                    let shape = Shape { layers: 1, ..*shape };
                    let encoded = self.encoder.encode_chunk(&[0; 32], &shape, plane, &mut self.encoded);
                    encoded.expect("it was encoded before");
                    took(layers, start.elapsed());
                    layers += 1;
                }
            }
            return;
        }
        for (plane, (shape, entry, encoded)) in case.planes().enumerate() {
            let start = Instant::now();
            if !self.run_on_device(case, part, plane, (shape, entry, encoded)) {
                self.run_plane(case, part, shape, entry, encoded);
            }
            took(plane, start.elapsed());
        }
    }

    /// False where there is no device, or none that takes the plane, or nothing for it to do.
    fn run_on_device(
        &mut self,
        case: &Case<'_>,
        part: Part,
        plane: usize,
        (shape, entry, encoded): (&Shape, &PlaneEntry, &[u8]),
    ) -> bool {
        let Some(device) = &mut self.device else { return false };
        if matches!(part, Part::ZerosCached | Part::ZerosStreaming | Part::Encode) {
            return false;
        }
        let segments = || encoded.chunks(SEGMENT_BYTES);
        if part == Part::Whole {
            Decoder::check_segments(segments(), entry).expect("what the encoder wrote");
        }
        let decoder = &mut self.decoders[usize::from(part == Part::FusedStreaming)];
        let out_bytes = shape.elements_per_plane() * case.out_dtype.bytes();
        let aligned = self.memory.as_ptr().align_offset(64);
        let out = &mut self.memory[aligned + self.next_slot * self.slot_bytes..][..out_bytes];
        let taken = device.decompress(plane, |section| {
            if part == Part::Bare {
                std::hint::black_box(section);
                return;
            }
            let decoded = decoder.decode_decompressed(shape, entry, segments(), section, case.out_dtype, out);
            decoded.expect("what the encoder wrote");
        });
        self.next_slot = (self.next_slot + usize::from(taken)) % case.slots;
        taken
    }

    fn run_plane(&mut self, case: &Case<'_>, part: Part, shape: &Shape, entry: &PlaneEntry, encoded: &[u8]) {
        let Self { decoders, sections, scratch, memory, slot_bytes, next_slot, .. } = self;
        let aligned = memory.as_ptr().align_offset(64);
        let out_bytes = shape.elements_per_plane() * case.out_dtype.bytes();
        let out = &mut memory[aligned + *next_slot * *slot_bytes..][..out_bytes];
        *next_slot = (*next_slot + 1) % case.slots;
        match part {
            Part::ZerosCached => compress::write_zeros(out, false),
            Part::ZerosStreaming => compress::write_zeros(out, true),
            Part::Bare => {
                for (section, bytes) in sections_of(shape, entry, encoded) {
                    let read = sections.read(entry.compression, section, bytes, scratch);
                    std::hint::black_box(read.expect("what the encoder wrote"));
                }
            }
            Part::FusedCached | Part::FusedStreaming => {
                let decoder = &mut decoders[usize::from(part == Part::FusedStreaming)];
                decoder
                    .decode_without_crc(shape, entry, encoded, case.out_dtype, out)
                    .expect("what the encoder wrote");
            }
            Part::Whole | Part::Encode => {
                let segments = encoded.chunks(SEGMENT_BYTES);
                decoders[0]
                    .decode_segments(shape, entry, segments, case.out_dtype, out)
                    .expect("what the encoder wrote");
            }
        }
    }
}

/// The compressed sections of a plane, with what each stands for.
fn sections_of<'a>(shape: &Shape, entry: &PlaneEntry, encoded: &'a [u8]) -> Vec<(&'a [u8], usize)> {
    if entry.codec == Codec::Lossless {
        // The length of the first section is in front of it.
        let (length, sections) = encoded.split_first_chunk::<4>().expect("what the encoder wrote");
        let length = usize::try_from(u32::from_le_bytes(*length)).expect("a section in memory");
        let (high, low) = sections.split_at(length);
        return vec![(high, shape.elements_per_plane()), (low, shape.elements_per_plane())];
    }
    let section = entry.section(shape).expect("what the encoder wrote");
    section.map(|section| (&encoded[section.start..], section.bytes)).into_iter().collect()
}

/// Pins the calling thread to one CPU.
fn pin(cpu: usize) -> anyhow::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("--cpus: can't run on CPU {cpu}"))
}

pub(crate) fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let cpus = dataplane::parse_cpus(&flags.cpus).context("--cpus")?;
    let (input, origin) = match &flags.input {
        Some(path) => (Input::read(&KvFile::open(path)?, flags.chunks)?, path.display().to_string()),
        None => (sample(flags.chunks)?, "sample".to_owned()),
    };
    let ghz = core_ghz(cpus[0])?;
    let mut results = Vec::new();
    let cases = cases(flags, &input)?;
    for case in &cases {
        for count in thread_counts(cpus.len()) {
            let medians = case.measure(&cpus[..count], &mut [])?;
            results.push(report(case, &medians, ghz, "cpu", 0));
        }
    }
    let eal =
        if flags.compress_dev.is_empty() { None } else { Some(bench_codec_device::start(!flags.no_huge)?) };
    for name in &flags.compress_dev {
        let eal = eal.as_ref().context("DPDK is started where there is a device")?;
        let mut device = Device::open(eal, name, cpus.len(), input.plane_bytes())?;
        for case in cases.iter().filter(|case| case.plane_codec.compression == Compression::Deflate) {
            let planes: Vec<PlaneBytes<'_>> =
                case.planes().map(|(shape, entry, encoded)| PlaneBytes { shape, entry, encoded }).collect();
            // A codec whose planes the device does not take was measured above.
            let planes_by_device = device.load(&planes)?;
            for count in thread_counts(cpus.len()).into_iter().filter(|_| planes_by_device > 0) {
                let medians = case.measure(&cpus[..count], &mut device.queues)?;
                results.push(report(case, &medians, ghz, name, planes_by_device));
            }
            if planes_by_device < planes.len() && !flags.json {
                let left = planes.len() - planes_by_device;
                print_line!(
                    "{name}: {left} of {} planes of {} are too large for it or have no section",
                    planes.len(),
                    case.plane_codec.codec
                )?;
            }
        }
    }
    let shape = input.shapes[0];
    let report = json!({
        "machine": crate::report::machine(),
        "core_ghz": ghz,
        "isa": compress::Isa::detect().name(),
        "input": origin,
        "shape": {
            "layers": shape.layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "tokens": shape.tokens,
        },
        "rounds": flags.rounds,
        "results": results,
    });
    if flags.json {
        print_line!("{report}")?;
    } else {
        print(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn sample(chunks: usize) -> anyhow::Result<Input> {
    let folder = tempfile::Builder::new().prefix("shadowserve-").tempdir().context("a temporary folder")?;
    let path = folder.path().join("sample.safetensors");
    std::fs::write(&path, crate::demo::SAMPLE).with_context(|| path.display().to_string())?;
    Input::read(&KvFile::open(&path)?, chunks)
}

/// Each codec with each compression that it can have and that does something.
fn cases<'a>(flags: &Flags, input: &'a Input) -> anyhow::Result<Vec<Case<'a>>> {
    let (codecs, compressions) =
        (listed(&flags.codecs, &Codec::ALL), listed(&flags.compressions, &Compression::ALL));
    let out_dtype = OutDtype::from(flags.out_dtype);
    let plane_bytes = input.plane_bytes();
    let slots = flags.slots.unwrap_or((256 << 20) / plane_bytes).max(1);
    let mut cases = Vec::new();
    for &codec in codecs {
        if codec.is_exact() && out_dtype != OutDtype::from(input.shapes[0].dtype) {
            continue;
        }
        let of_codec = compressions.iter().filter(|&&compression| match codec {
            Codec::Raw => compression == Compression::None,
            Codec::Lossless => compression != Compression::None,
            _ => true,
        });
        for &compression in of_codec {
            let plane_codec = PlaneCodec { compression, ..codec.into() };
            let mut encoder = Encoder::new(plane_codec, compress::DEFAULT_ZSTD_LEVEL);
            let mut chunks = Vec::new();
            for chunk in 0..input.shapes.len() {
                let mut bytes = Vec::new();
                input.encode(&mut encoder, chunk, &mut bytes)?;
                let entries = ChunkView::parse(&bytes)?.planes().collect();
                chunks.push((bytes, entries));
            }
            cases.push(Case { input, plane_codec, out_dtype, slots, rounds: flags.rounds.max(1), chunks });
        }
    }
    Ok(cases)
}

fn listed<'a, T>(chosen: &'a [T], all: &'a [T]) -> &'a [T] {
    if chosen.is_empty() { all } else { chosen }
}

/// One, half and all.
fn thread_counts(cpus: usize) -> Vec<usize> {
    let mut counts = vec![1, cpus / 2, cpus];
    counts.retain(|&count| count > 0);
    counts.dedup();
    counts
}

/// One row of the results. Rates are sums over threads; times are those of a plane on the first.
#[expect(clippy::cast_precision_loss, reason = "sizes need no more than 53 bits")]
fn report(case: &Case<'_>, medians: &[Medians], ghz: f64, backend: &str, planes_by_device: usize) -> Value {
    let planes: usize = case.input.shapes.iter().map(Shape::planes).sum();
    let seconds = |part: Part| medians[0][part as usize].as_secs_f64();
    let rate = |part: Part, bytes: usize| {
        medians.iter().map(|medians| bytes as f64 / medians[part as usize].as_secs_f64()).sum::<f64>() / 1e9
    };
    let (out_bytes, encoded_bytes) = (case.out_bytes(), case.encoded_bytes());
    let source_bytes: usize = case.input.planes.iter().flatten().map(Vec::len).sum();
    let us = |part: Part| seconds(part) * 1e6 / planes as f64;
    json!({
        "backend": backend,
        "planes_by_device": planes_by_device,
        "codec": case.plane_codec.codec.name(),
        "compression": case.chunks[0].1[0].compression.name(),
        "out_dtype": case.out_dtype.name(),
        "threads": medians.len(),
        "ratio": source_bytes as f64 / encoded_bytes as f64,
        "encoded_gbps": rate(Part::Whole, encoded_bytes) * 8.0,
        "output_gb_s": rate(Part::Whole, out_bytes),
        "cycles_per_output_byte": seconds(Part::Whole) * ghz * 1e9 / out_bytes as f64,
        "encode_gb_s": rate(Part::Encode, source_bytes),
        "fused_cached_gb_s": rate(Part::FusedCached, out_bytes),
        "fused_streaming_gb_s": rate(Part::FusedStreaming, out_bytes),
        "bare_gb_s": rate(Part::Bare, out_bytes),
        "zeros_cached_gb_s": rate(Part::ZerosCached, out_bytes),
        "zeros_streaming_gb_s": rate(Part::ZerosStreaming, out_bytes),
        "bare_us": us(Part::Bare),
        "fused_cached_us": us(Part::FusedCached),
        "fused_streaming_us": us(Part::FusedStreaming),
        "whole_us": us(Part::Whole),
        "encode_us": us(Part::Encode),
        "bare_to_fused": seconds(Part::Bare) / seconds(Part::FusedCached).min(seconds(Part::FusedStreaming)),
        "bare_to_whole": seconds(Part::Bare) / seconds(Part::Whole),
        "zeros_to_fused_cached": seconds(Part::ZerosCached) / seconds(Part::FusedCached),
        "zeros_to_fused_streaming": seconds(Part::ZerosStreaming) / seconds(Part::FusedStreaming),
    })
}

/// Clock of a core at work, GHz: the time of instructions that each wait for the one before and take one cycle.
fn core_ghz(cpu: usize) -> anyhow::Result<f64> {
    std::thread::spawn(move || {
        pin(cpu)?;
        let chain = || {
            let (start, mut x) = (Instant::now(), std::hint::black_box(1_u64));
            for round in 0..4_000_000_u64 {
                // An exclusive or and a rotation.
                x = (x ^ round).rotate_left(7);
            }
            std::hint::black_box(x);
            8e6 / start.elapsed().as_secs_f64() / 1e9
        };
        Ok((0..9).map(|_| chain()).fold(0.0, f64::max))
    })
    .join()
    .expect("the chain does not panic")
}

fn print(report: &Value) -> anyhow::Result<()> {
    print_line!(
        "machine: {}, {:.2} GHz, {}",
        report["machine"],
        report["core_ghz"].as_f64().unwrap_or(0.0),
        report["isa"]
    )?;
    print_line!("planes: {}, {}", report["input"], report["shape"])?;
    let columns: [(&str, &str, usize); 12] = [
        ("ratio", "ratio", 2),
        ("encoded_gbps", "Gbps in", 1),
        ("output_gb_s", "GB/s out", 2),
        ("cycles_per_output_byte", "cycles/B", 3),
        ("bare_us", "bare us", 1),
        ("fused_cached_us", "fused us", 1),
        ("fused_streaming_us", "streamed us", 1),
        ("whole_us", "whole us", 1),
        ("bare_to_fused", "bare/fused", 2),
        ("zeros_to_fused_cached", "zeros/fused", 2),
        ("zeros_to_fused_streaming", "streamed", 2),
        ("encode_gb_s", "encode GB/s", 2),
    ];
    let header: Vec<&str> = ["codec", "compression", "back end", "threads"]
        .into_iter()
        .chain(columns.map(|(_, title, _)| title))
        .collect();
    let mut table: Table = crate::report::new_table(&header);
    for result in report["results"].as_array().into_iter().flatten() {
        let text = |name: &str| result[name].as_str().unwrap_or("").to_owned();
        let mut row =
            vec![text("codec"), text("compression"), text("backend"), result["threads"].to_string()];
        row.extend(
            columns
                .map(|(name, _, digits)| format!("{:.digits$}", result[name].as_f64().unwrap_or(f64::NAN))),
        );
        table.add_row(row);
    }
    print_line!("{table}")
}
