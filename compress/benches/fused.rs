//! Ways from the zstd frame of an `int4` plane to its elements, and what zstd and memory alone take: the comparison of
//! `docs/CODEC.md`.
//!
//! `cargo bench -p compress --bench fused -- [FILE.safetensors] [--slots N]`; without a file, synthetic planes in the
//! shape of Llama-3.1-8B. All ways take turns on each plane; a plane's time is the median of its rounds, and the table
//! has the mean over planes.

#[path = "../tests/planes/mod.rs"]
mod planes;

use std::hint::black_box;
use std::time::{Duration, Instant};

use compress::kernels::{Job, Packing, dequantize, sliced};
use compress::{
    ChunkView, Codec, Compression, Encoder, Isa, OutDtype, PlaneCodec, Quantizer, SectionReader, Shape,
    write_zeros,
};
use planes::Planes;
use planes::bare::SEGMENT_BYTES;
use zstd_safe::{CCtx, CParameter, DCtx, DDict, InBuffer, OutBuffer, ParamSwitch};

const ROUNDS: usize = 31;
const BLOCK_KIB: [usize; 4] = [16, 32, 64, 128];

/// One plane, its codes not compressed, and compressed in several ways.
struct Plane {
    shape: Shape,
    per_channel: bool,
    scales: Vec<f32>,
    offsets: Vec<f32>,
    codes: Vec<u8>,
    whole: Vec<u8>,
    sliced: Vec<u8>,
    with_dictionary: Vec<u8>,
    dictionary: Option<DDict<'static>>,
    /// By size of block, frames one after another.
    blocks: Vec<Vec<Vec<u8>>>,
}

impl Plane {
    fn job<'a>(&'a self, codes: &'a [u8], first_row: usize, streaming: bool) -> Job<'a> {
        let dim = usize::from(self.shape.head_dim);
        let rows = codes.len() * 2 / dim;
        let groups = if self.per_channel { 0..self.scales.len() } else { first_row..first_row + rows };
        Job {
            packing: Packing::Nibbles,
            plain: &[],
            section: codes,
            scales: &self.scales[groups.clone()],
            offsets: &self.offsets[groups],
            per_channel: self.per_channel,
            head_dim: dim,
            out_dtype: OutDtype::Bf16,
            streaming,
        }
    }
}

fn context(level: i32) -> CCtx<'static> {
    let mut context = CCtx::create();
    context.set_parameter(CParameter::CompressionLevel(level)).expect("a level");
    context.set_parameter(CParameter::LiteralCompressionMode(ParamSwitch::Enable)).expect("a mode");
    context
}

fn compress(context: &mut CCtx<'_>, bytes: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(zstd_safe::compress_bound(bytes.len()));
    context.compress2(&mut frame, bytes).expect("memory");
    frame
}

/// The planes of a chunk; `other` is the chunk that dictionaries are trained with.
fn planes_of(chunk: &Planes, other: &Planes) -> Vec<Plane> {
    let (mine, theirs) = (uncompressed(chunk), uncompressed(other));
    mine.into_iter().zip(theirs).map(|(plane, other)| with_frames(plane, &other.codes)).collect()
}

/// Planes with codes, without frames.
fn uncompressed(chunk: &Planes) -> Vec<Plane> {
    let shape = chunk.shape;
    let mut encoded = Vec::new();
    let plane_codec = PlaneCodec { compression: Compression::None, ..Codec::Int4.into() };
    let plane = |layer, side| chunk.bytes[compress::plane_index(layer, side)].as_slice();
    Encoder::new(plane_codec, 1).encode_chunk(&[0; 32], &shape, plane, &mut encoded).expect("finite planes");
    let view = ChunkView::parse(&encoded).expect("what the encoder writes parses");
    let entries = view.planes().map(|entry| {
        let start = usize::try_from(entry.offset).expect("a chunk in memory");
        let encoded = &encoded[start..][..usize::try_from(entry.bytes).expect("a chunk in memory")];
        let (groups, codes) = encoded.split_at(encoded.len() - shape.elements_per_plane() / 2);
        let widen = |bytes: &[u8]| -> Vec<f32> {
            bytes
                .chunks_exact(2)
                .map(|bytes| half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32())
                .collect()
        };
        let (scales, offsets) = groups.split_at(groups.len() / 2);
        Plane {
            shape,
            per_channel: entry.quantizer == Quantizer::PerChannel,
            scales: widen(scales),
            offsets: widen(offsets),
            codes: codes.to_vec(),
            whole: vec![],
            sliced: vec![],
            with_dictionary: vec![],
            dictionary: None,
            blocks: vec![],
        }
    });
    entries.collect()
}

fn with_frames(mut plane: Plane, sample: &[u8]) -> Plane {
    let mut zstd = context(1);
    plane.whole = compress(&mut zstd, &plane.codes);
    plane.sliced = sliced(&plane.codes);
    plane.blocks = BLOCK_KIB
        .iter()
        .map(|kib| plane.codes.chunks(kib << 10).map(|block| compress(&mut zstd, block)).collect())
        .collect();
    // Samples of the size that a dictionary is trained with; matches with its content don't pay, its entropy tables might.
    let samples: Vec<usize> = sample.chunks(4096).map(<[u8]>::len).collect();
    let mut dictionary = Vec::with_capacity(4096);
    if zstd_safe::train_from_buffer(&mut dictionary, sample, &samples).is_ok() {
        let mut zstd = context(1);
        zstd.load_dictionary(&dictionary).expect("a trained dictionary");
        plane.with_dictionary = compress(&mut zstd, &plane.codes);
        plane.dictionary = DDict::try_create(&dictionary);
    }
    plane
}

/// What a thread needs to decode.
struct Work {
    isa: Isa,
    /// Decompresses zstd in place.
    sections: SectionReader,
    zstd: DCtx<'static>,
    linear: Vec<u8>,
    scratch: Vec<u8>,
    row: Vec<u8>,
}

type Way = fn(&mut Work, &Plane, &mut [u8]);

impl Work {
    fn dequantize(&mut self, plane: &Plane, first_row: usize, bytes: usize, streaming: bool, out: &mut [u8]) {
        let job = plane.job(&self.scratch[..bytes], first_row, streaming);
        dequantize(self.isa, &job, &mut self.row, out);
    }

    fn blocks(&mut self, plane: &Plane, size: usize, streaming: bool, out: &mut [u8]) {
        let dim = usize::from(plane.shape.head_dim);
        let mut first_row = 0;
        let block_bytes = BLOCK_KIB[size] << 10;
        for (frame, out) in plane.blocks[size].iter().zip(out.chunks_mut(block_bytes * 4)) {
            let bytes = self.zstd.decompress(&mut self.scratch[..], frame).expect("a frame");
            self.dequantize(plane, first_row, bytes, streaming, out);
            first_row += bytes * 2 / dim;
        }
    }

    fn linearize(&mut self, frame: &[u8]) {
        let mut at = 0;
        for segment in frame.chunks(SEGMENT_BYTES) {
            self.linear[at..at + segment.len()].copy_from_slice(segment);
            at += segment.len();
        }
    }
}

fn bare(work: &mut Work, plane: &Plane, _: &mut [u8]) {
    work.zstd.decompress(&mut work.scratch[..], &plane.whole).expect("a frame");
}

fn bare_with_dictionary(work: &mut Work, plane: &Plane, _: &mut [u8]) {
    let Some(dictionary) = &plane.dictionary else { return };
    work.zstd
        .decompress_using_ddict(&mut work.scratch[..], &plane.with_dictionary, dictionary)
        .expect("a frame");
}

/// Into a destination without a byte more than the frame gives.
fn bare_exact(work: &mut Work, plane: &Plane, _: &mut [u8]) {
    work.zstd.decompress(&mut work.scratch[..plane.codes.len()], &plane.whole).expect("a frame");
}

fn bare_linearized(work: &mut Work, plane: &Plane, _: &mut [u8]) {
    work.linearize(&plane.whole);
    work.zstd.decompress(&mut work.scratch[..], &work.linear[..plane.whole.len()]).expect("a frame");
}

fn bare_streamed(work: &mut Work, plane: &Plane, _: &mut [u8]) {
    work.zstd.reset(zstd_safe::ResetDirective::SessionOnly).expect("a context");
    let mut out = OutBuffer::around(&mut work.scratch[..]);
    for segment in plane.whole.chunks(SEGMENT_BYTES) {
        let mut segment = InBuffer::around(segment);
        while segment.pos() < segment.src.len() {
            work.zstd.decompress_stream(&mut out, &mut segment).expect("a frame");
        }
    }
    assert_eq!(out.pos(), plane.codes.len());
}

fn bare_new_context(work: &mut Work, plane: &Plane, _: &mut [u8]) {
    DCtx::create().decompress(&mut work.scratch[..], &plane.whole).expect("a frame");
}

/// The frame at the end of the buffer whose front takes what it holds.
fn bare_in_place(work: &mut Work, plane: &Plane, _: &mut [u8]) {
    let bytes = plane.codes.len();
    let read = work.sections.read(Compression::Zstd, &plane.whole, bytes, &mut work.scratch);
    read.expect("a frame");
}

fn whole(work: &mut Work, plane: &Plane, out: &mut [u8]) {
    bare(work, plane, out);
    work.dequantize(plane, 0, plane.codes.len(), false, out);
}

fn whole_streaming(work: &mut Work, plane: &Plane, out: &mut [u8]) {
    bare(work, plane, out);
    work.dequantize(plane, 0, plane.codes.len(), true, out);
}

fn in_place(work: &mut Work, plane: &Plane, out: &mut [u8]) {
    bare_in_place(work, plane, out);
    work.dequantize(plane, 0, plane.codes.len(), false, out);
}

fn alone(work: &mut Work, plane: &Plane, out: &mut [u8]) {
    dequantize(work.isa, &plane.job(&plane.codes, 0, false), &mut work.row, out);
}

fn alone_streaming(work: &mut Work, plane: &Plane, out: &mut [u8]) {
    dequantize(work.isa, &plane.job(&plane.codes, 0, true), &mut work.row, out);
}

fn bare_sliced(work: &mut Work, plane: &Plane, _: &mut [u8]) {
    let bytes = plane.codes.len();
    let read = work.sections.read(Compression::Sliced, &plane.sliced, bytes, &mut work.scratch);
    read.expect("what was encoded");
}

fn whole_sliced(work: &mut Work, plane: &Plane, out: &mut [u8]) {
    bare_sliced(work, plane, out);
    work.dequantize(plane, 0, plane.codes.len(), false, out);
}

fn whole_sliced_streaming(work: &mut Work, plane: &Plane, out: &mut [u8]) {
    bare_sliced(work, plane, out);
    work.dequantize(plane, 0, plane.codes.len(), true, out);
}

const WAYS: [(&str, Way); 24] = [
    ("zeros", |_, _, out| write_zeros(out, false)),
    ("zeros, streaming stores", |_, _, out| write_zeros(out, true)),
    ("dequantize", alone),
    ("dequantize, streaming stores", alone_streaming),
    ("bare zstd", bare),
    ("bare zstd, destination without room to spare", bare_exact),
    ("bare zstd, a new context each time", bare_new_context),
    ("bare zstd with a dictionary", bare_with_dictionary),
    ("bare zstd of 16 KiB blocks", |work, plane, _| bare_blocks(work, plane, 0)),
    ("bare zstd of 32 KiB blocks", |work, plane, _| bare_blocks(work, plane, 1)),
    ("bare zstd, linearized first", bare_linearized),
    ("bare zstd, fed with fragments", bare_streamed),
    ("bare zstd in place, frame copied to its end", bare_in_place),
    ("bare sliced", bare_sliced),
    ("fused: sliced", whole_sliced),
    ("fused: sliced, streaming stores", whole_sliced_streaming),
    ("fused: whole plane", whole),
    ("fused: whole plane, streaming stores", whole_streaming),
    ("fused: in place", in_place),
    ("fused: blocks of 32 KiB, streaming stores", |work, plane, out| work.blocks(plane, 1, true, out)),
    ("fused: blocks of 16 KiB", |work, plane, out| work.blocks(plane, 0, false, out)),
    ("fused: blocks of 32 KiB", |work, plane, out| work.blocks(plane, 1, false, out)),
    ("fused: blocks of 64 KiB", |work, plane, out| work.blocks(plane, 2, false, out)),
    ("fused: blocks of 128 KiB", |work, plane, out| work.blocks(plane, 3, false, out)),
];

fn bare_blocks(work: &mut Work, plane: &Plane, size: usize) {
    for frame in &plane.blocks[size] {
        work.zstd.decompress(&mut work.scratch[..], frame).expect("a frame");
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let slots = arguments.iter().position(|argument| argument == "--slots");
    let slots = slots.and_then(|at| arguments.get(at + 1)).and_then(|count| count.parse::<usize>().ok());
    let path = arguments.first().filter(|argument| !argument.starts_with("--"));
    let chunks = match path {
        Some(path) => {
            let file = std::fs::read(path).unwrap_or_else(|error| panic!("can't read {path}: {error}"));
            Planes::from_safetensors(path, &file)
        }
        None => vec![Planes::synthetic(4, 8, 128, 256), Planes::synthetic(4, 8, 128, 256)],
    };
    let planes = planes_of(&chunks[0], chunks.get(1).unwrap_or(&chunks[0]));
    let out_bytes = chunks[0].shape.plane_bytes();
    let slots = slots.unwrap_or((256 << 20) / out_bytes).max(1);
    println!("planes: {}, {:?}; {slots} slots; {}", chunks[0].origin, chunks[0].shape, Isa::detect().name());
    for isa in Isa::supported() {
        measure(isa, &planes, out_bytes, slots);
    }
}

fn measure(isa: Isa, planes: &[Plane], out_bytes: usize, slots: usize) {
    let mut work = Work {
        isa,
        sections: SectionReader::new().with_isa(isa).with_in_place(true),
        zstd: DCtx::create(),
        linear: vec![1; out_bytes],
        // With zstd's margin for decompression in place.
        scratch: vec![1; out_bytes + (132 << 10)],
        row: vec![1; usize::from(planes[0].shape.head_dim)],
    };
    let mut memory = vec![1_u8; slots * out_bytes + 64];
    let aligned = memory.as_ptr().align_offset(64);
    let mut means = vec![Duration::ZERO; WAYS.len()];
    let mut slot = 0;
    for plane in planes {
        let mut times = vec![Vec::with_capacity(ROUNDS); WAYS.len()];
        for _ in 0..ROUNDS {
            for ((_, way), times) in WAYS.iter().zip(&mut times) {
                // Twice, because what one way has left in caches and write queues the next one pays for.
                for timed in [false, true] {
                    let out = &mut memory[aligned + slot * out_bytes..][..out_bytes];
                    slot = (slot + 1) % slots;
                    let start = Instant::now();
                    way(&mut work, plane, out);
                    if timed {
                        times.push(start.elapsed());
                    }
                    black_box(out);
                }
            }
        }
        for (mean, times) in means.iter_mut().zip(&mut times) {
            times.sort_unstable();
            *mean += times[ROUNDS / 2] / u32::try_from(planes.len()).expect("few planes");
        }
    }
    report(isa, planes, &means);
}

fn report(isa: Isa, planes: &[Plane], means: &[Duration]) {
    let mean = |name: &str| {
        let way = WAYS.iter().position(|(way, _)| *way == name).expect("a way's name");
        means[way].as_secs_f64()
    };
    let total = |bytes: fn(&Plane) -> usize| planes.iter().map(bytes).sum::<usize>();
    let codes = total(|plane| plane.codes.len()) as f64;
    println!("\n{}: us a plane, bare zstd = 1", isa.name());
    for (name, _) in WAYS {
        println!("{name:45} {:8.1} {:6.2}", mean(name) * 1e6, mean("bare zstd") / mean(name));
    }
    println!("zeros / dequantize                            {:.2}", mean("zeros") / mean("dequantize"));
    println!(
        "the same, streaming stores                    {:.2}",
        mean("zeros, streaming stores") / mean("dequantize, streaming stores")
    );
    println!("ratio of codes: whole {:.4}", codes / total(|plane| plane.whole.len()) as f64);
    println!("                sliced {:.4}", codes / total(|plane| plane.sliced.len()) as f64);
    println!("                dictionary {:.4}", codes / total(|plane| plane.with_dictionary.len()) as f64);
    for (size, kib) in BLOCK_KIB.iter().enumerate() {
        let bytes: usize = planes.iter().flat_map(|plane| &plane.blocks[size]).map(Vec::len).sum();
        println!("                {kib} KiB blocks {:.4}", codes / bytes as f64);
    }
}
