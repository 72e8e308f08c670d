//! Encoding beside decoding: quantization alone and dequantization alone, then whole planes, by codec and compression.
//!
//! `cargo bench -p compress --bench encode -- [FILE.safetensors] [--slots N] [--isa NAME] [--codec NAME]`; without a file, synthetic
//! planes in the shape of Llama-3.1-8B. All ways take turns on each plane; a plane's time is the median of its rounds, and the table
//! has the mean over planes. Slots hold the 16-bit elements: what is encoded is read from them in turn, what is decoded is written to
//! them. `crc` is that of all encoded bytes, which no faster kernel may change.

#[path = "../tests/planes/mod.rs"]
mod planes;

use std::hint::black_box;
use std::time::{Duration, Instant};

use compress::kernels::{Job, Packing, QuantizeJob, QuantizeScratch, dequantize, quantize};
use compress::{
    ChunkView, ChunkWriter, Codec, Compression, Decoder, Encoder, Isa, OutDtype, PlaneCodec, PlaneEntry,
    Quantizer, Shape, max_encoded_bytes,
};
use planes::Planes;

const ROUNDS: usize = 31;
const WAYS: [&str; 6] =
    ["quantize", "dequantize", "dequantize, streaming", "encode", "decode", "decode, streaming"];
const CODECS: [(Codec, Packing, u8); 4] = [
    (Codec::Int8, Packing::NibblesAndNibbles, 255),
    (Codec::Int5, Packing::NibblesAndBits, 31),
    (Codec::Int4, Packing::Nibbles, 15),
    (Codec::Int3, Packing::CrumbsAndBits, 7),
];

/// A plane as it is encoded, and the parts of it.
struct Plane {
    shape: Shape,
    quantizer: Quantizer,
    packing: Packing,
    largest: u8,
    entry: PlaneEntry,
    encoded: Vec<u8>,
    scales: Vec<f32>,
    offsets: Vec<f32>,
    plain: Vec<u8>,
    section: Vec<u8>,
}

impl Plane {
    fn quantize_job<'a>(&'a self, elements: &'a [u8]) -> QuantizeJob<'a> {
        QuantizeJob {
            plane: elements,
            shape: &self.shape,
            quantizer: self.quantizer,
            packing: self.packing,
            largest_used: self.largest,
            largest_code: self.largest,
        }
    }

    fn dequantize_job(&self, streaming: bool) -> Job<'_> {
        Job {
            packing: self.packing,
            plain: &self.plain,
            section: &self.section,
            scales: &self.scales,
            offsets: &self.offsets,
            per_channel: self.quantizer == Quantizer::PerChannel,
            head_dim: usize::from(self.shape.head_dim),
            out_dtype: OutDtype::from(self.shape.dtype),
            streaming,
        }
    }
}

/// What a thread needs for all ways.
struct Work {
    isa: Isa,
    scratch: QuantizeScratch,
    row: Vec<u8>,
    front: Vec<u8>,
    section: Vec<u8>,
    encoder: Encoder,
    writer: ChunkWriter,
    decoders: [Decoder; 2],
}

impl Work {
    /// One way, on a plane whose elements lie in `slot`, or are to.
    fn run(&mut self, way: usize, plane: &Plane, slot: &mut [u8]) {
        match way {
            0 => {
                let job = plane.quantize_job(slot);
                let front = &mut self.front[..4 * plane.scales.len() + plane.plain.len()];
                let section = &mut self.section[..plane.section.len()];
                quantize(self.isa, &job, &mut self.scratch, front, section).expect("finite elements");
            }
            1 | 2 => dequantize(self.isa, &plane.dequantize_job(way == 2), &mut self.row, slot),
            3 => self.writer.add_plane(&mut self.encoder, slot).expect("finite elements"),
            _ => self.decoders[way - 4]
                .decode(&plane.shape, &plane.entry, &plane.encoded, plane.shape.dtype, slot)
                .expect("what was encoded"),
        }
    }

    /// One way, on K and V of a layer in two neighbouring slots, and how long each took.
    fn run_layer(&mut self, way: usize, layer: &[Plane], slots: &mut [u8]) -> [Duration; 2] {
        self.writer.begin(&[0; 32], &layer[0].shape).expect("a shape");
        let bytes = slots.len() / 2;
        [0, 1].map(|side| {
            let slot = &mut slots[side * bytes..][..bytes];
            let start = Instant::now();
            self.run(way, &layer[side], slot);
            let time = start.elapsed();
            black_box(slot);
            time
        })
    }
}

/// The planes of a chunk, encoded, and the CRC of the chunk.
fn planes_of(
    isa: Isa,
    chunk: &Planes,
    (codec, packing, largest): (Codec, Packing, u8),
    with: Compression,
) -> (Vec<Plane>, u32) {
    let mut encoded = Vec::new();
    let plane = |layer, side| chunk.bytes[compress::plane_index(layer, side)].as_slice();
    let plane_codec = PlaneCodec { compression: with, ..codec.into() };
    Encoder::new(plane_codec, 1)
        .with_isa(isa)
        .encode_chunk(&[0; 32], &chunk.shape, plane, &mut encoded)
        .expect("finite planes");
    let view = ChunkView::parse(&encoded).expect("what the encoder writes parses");
    let planes = view.planes().enumerate().map(|(index, entry)| {
        let start = usize::try_from(entry.offset).expect("a chunk in memory");
        let encoded = encoded[start..][..usize::try_from(entry.bytes).expect("a chunk in memory")].to_vec();
        let mut plane = Plane {
            shape: Shape { layers: 1, ..chunk.shape },
            quantizer: entry.quantizer,
            packing,
            largest,
            entry,
            encoded,
            scales: vec![],
            offsets: vec![],
            plain: vec![],
            section: vec![],
        };
        let per_channel = entry.quantizer == Quantizer::PerChannel;
        let groups = if per_channel { chunk.shape.channels() } else { chunk.shape.head_rows() };
        let elements = chunk.shape.elements_per_plane();
        let [plain_bytes, section_bytes] = match packing {
            Packing::Nibbles => [0, elements / 2],
            Packing::NibblesAndNibbles => [elements / 2, elements / 2],
            Packing::NibblesAndBits => [elements / 8, elements / 2],
            Packing::CrumbsAndBits => [elements / 8, elements / 4],
        };
        let (mut parts, mut section) = (vec![0; 4 * groups + plain_bytes], vec![0; section_bytes]);
        let job = plane.quantize_job(&chunk.bytes[index]);
        quantize(isa, &job, &mut QuantizeScratch::default(), &mut parts, &mut section).expect("finite");
        let widen = |bytes: &[u8]| -> Vec<f32> {
            bytes
                .chunks_exact(2)
                .map(|bits| chunk.shape.dtype.widen(u16::from_le_bytes([bits[0], bits[1]])))
                .collect()
        };
        plane.scales = widen(&parts[..2 * groups]);
        plane.offsets = widen(&parts[2 * groups..4 * groups]);
        plane.plain = parts[4 * groups..].to_vec();
        plane.section = section;
        plane
    });
    let planes = planes.collect();
    (planes, compress::crc32c(&encoded))
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let value = |flag: &str| {
        let at = arguments.iter().position(|argument| argument == flag);
        at.and_then(|at| arguments.get(at + 1)).cloned()
    };
    let path = arguments.first().filter(|argument| !argument.starts_with("--"));
    let chunk = match path {
        Some(path) => {
            let file = std::fs::read(path).unwrap_or_else(|error| panic!("can't read {path}: {error}"));
            Planes::from_safetensors(path, &file).swap_remove(0)
        }
        None => Planes::synthetic(4, 8, 128, 256),
    };
    let plane_bytes = chunk.shape.plane_bytes();
    let slots = value("--slots")
        .and_then(|slots| slots.parse().ok())
        .unwrap_or((256 << 20) / plane_bytes)
        .next_multiple_of(2)
        .max(2);
    let isa = match value("--isa") {
        Some(name) => {
            Isa::supported().find(|isa| isa.name() == name).expect("an instruction set of this CPU")
        }
        None => Isa::detect(),
    };
    println!("planes: {}, {:?}; {slots} slots; {}", chunk.origin, chunk.shape, isa.name());
    println!("us a plane, K and V; `of decoding`: time of decoding by ordinary stores / time of encoding");
    println!("{:15} {:>10} {}  of decoding", "", "crc", WAYS.map(|way| format!("{way:>22}")).concat());
    for codec in CODECS.into_iter().filter(|codec| value("--codec").is_none_or(|name| codec.0.name() == name))
    {
        for with in [Compression::None, Compression::Sliced] {
            let (planes, crc) = planes_of(isa, &chunk, codec, with);
            measure(isa, &chunk, &planes, slots, &format!("{}/{with}", codec.0), crc);
        }
    }
}

fn measure(isa: Isa, chunk: &Planes, planes: &[Plane], slots: usize, name: &str, crc: u32) {
    let plane_bytes = chunk.shape.plane_bytes();
    let decoder = || Decoder::new(plane_bytes).with_isa(isa);
    let mut work = Work {
        isa,
        scratch: QuantizeScratch::default(),
        row: vec![1; usize::from(chunk.shape.head_dim)],
        front: vec![1; plane_bytes],
        section: vec![1; plane_bytes],
        encoder: Encoder::new(PlaneCodec { compression: Compression::None, ..Codec::Int4.into() }, 1)
            .with_isa(isa),
        writer: ChunkWriter::new(3 * max_encoded_bytes(plane_bytes)),
        decoders: [decoder(), decoder().with_streaming_stores(true)],
    };
    let mut memory = vec![1_u8; slots * plane_bytes + 64];
    let mut streamed = memory.clone();
    let aligned = [&memory, &streamed].map(|memory| memory.as_ptr().align_offset(64));
    let mut medians = vec![];
    let mut slot = 0;
    for (layer, elements) in planes.chunks_exact(2).zip(chunk.bytes.chunks_exact(2)) {
        work.encoder
            .choose(PlaneCodec { compression: layer[0].entry.compression, ..layer[0].entry.codec.into() });
        for slots in memory[aligned[0]..].chunks_exact_mut(2 * plane_bytes) {
            slots.copy_from_slice(&elements.concat());
        }
        let mut times = WAYS.map(|_| [vec![], vec![]]);
        for _ in 0..ROUNDS {
            for (way, times) in times.iter_mut().enumerate() {
                // Twice, because what one way has left in caches and write queues the next one pays for. What is decoded
                // into a slot is close enough to its elements to be encoded again.
                for timed in [false, true] {
                    // Streaming stores take their slots out of the caches: they have slots of their own.
                    let memory = if matches!(way, 2 | 5) {
                        &mut streamed[aligned[1]..]
                    } else {
                        &mut memory[aligned[0]..]
                    };
                    let place = &mut memory[slot * plane_bytes..][..2 * plane_bytes];
                    slot = (slot + 2) % slots;
                    let took = work.run_layer(way, layer, place);
                    if timed {
                        times.iter_mut().zip(took).for_each(|(times, took)| times.push(took));
                    }
                }
            }
        }
        medians.push(times.map(|sides| sides.map(median)));
    }
    report(name, crc, &medians);
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

/// `medians` by layer, way and side.
fn report(name: &str, crc: u32, medians: &[[[f64; 2]; WAYS.len()]]) {
    let mean = |way: usize, side: usize| {
        medians.iter().map(|layer| layer[way][side]).sum::<f64>() / medians.len() as f64
    };
    let cells: String = (0..WAYS.len())
        .map(|way| format!("{:>22}", format!("{:.1} {:.1}", mean(way, 0), mean(way, 1))))
        .collect();
    let total = |way: usize| mean(way, 0) + mean(way, 1);
    println!("{name:15} {crc:>10x} {cells}  {:.2} {:.2}", total(1) / total(0), total(4) / total(3));
}
